"""Averages of weights along the way: PSWA, PWALKS and PSWM (arXiv:1905.05774), EMA, and SWA (arXiv:1803.05407).

Measured, PSWA, PWALKS and PSWM were behind plain steps after few passes (jobs/tasks/sisters.py).

PSWA     at each epoch's end  w ← mean of the epoch's samples           a sample every `period` epochs
PWALKS                        w ← mean of the last num_samples samples, of whichever epoch
PSWM     W ← β·W + (1 − β)·sample, and at each epoch's end  w ← W
EMA      W ← β·W + (1 − β)·w after every step; the result is W
SWA      the result is the mean of the weights at the ends of the epochs after swa_start

Restarting, PSWA, PWALKS and PSWM continue from w with the optimizer's momentum as it was, which is our choice. If they
only evaluate, the last w is the result.
"""

from collections import deque
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from raysubset.config import AveragingConfig


class Averaging:
    """Samples a model's parameters, and puts their average into the model.

    Memory: one copy of the parameters; PWALKS keeps num_samples of them. Buffers are left to the caller. Workers that
    hold the same weights do the same arithmetic, so their weights stay the same.
    """

    def __init__(self, recipe: AveragingConfig, model: nn.Module, *, num_steps: int, num_steps_per_epoch: int) -> None:
        self._recipe = recipe
        self._parameters = [p for p in model.parameters() if p.is_floating_point()]  # frozen ones may be integers
        self._period = 1 if recipe.kind == "ema" else max(1, round(recipe.period * num_steps_per_epoch))
        self._first_end = recipe.swa_start * num_steps  # SWA samples at the ends of later epochs
        self._update = (
            get_ema_multi_avg_fn(recipe.decay_or_default())
            if recipe.kind in ("pswm", "ema")
            else get_swa_multi_avg_fn()
        )
        self._samples: deque[list[Tensor]] = deque(maxlen=recipe.num_samples)  # of PWALKS
        self._average: list[Tensor] = []  # of the other kinds
        self._num_averaged = 0

    def after_step(self, step: int) -> None:
        """Take a sample if one is due at this step."""
        if self._recipe.kind != "swa" and step % self._period == 0:
            self._sample()

    def end_epoch(self, step: int, *, last: bool) -> bool:
        """Put the average into the model if it is due, and return whether it was.

        `last`: the minimization ends here.
        """
        if self._recipe.kind == "swa" and step > self._first_end:
            self._sample()
        if self._recipe.restarts():
            is_due = self._num_averaged > 0
        else:
            is_due = last and bool(self._average or self._samples)  # PSWA: the last epoch's if this has no sample
        if is_due:
            self._apply()
        if self._recipe.kind == "pswa":
            self._num_averaged = 0
        return is_due

    @torch.no_grad()
    def _sample(self) -> None:
        current = [p.detach() for p in self._parameters]
        if self._recipe.kind == "pwalks":
            self._samples.append([p.clone() for p in current])  # .cpu() would alias the weights, which keep moving
        elif self._num_averaged == 0:
            self._average = [p.clone() for p in current]
        else:
            self._update(self._average, current, self._num_averaged)
        self._num_averaged += 1

    @torch.no_grad()
    def _apply(self) -> None:
        average = self._average
        if self._recipe.kind == "pwalks":
            average = [p.clone() for p in self._samples[0]]
            for num, sample in enumerate(list(self._samples)[1:], start=1):
                self._update(average, sample, num)
        for parameter, mean in zip(self._parameters, average, strict=True):
            parameter.copy_(mean)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, which is the same for all workers."""
        return {"samples": list(self._samples), "average": self._average, "num_averaged": self._num_averaged}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state, which may be on another device or in another memory layout."""
        self._samples = deque(map(self._placed, state["samples"]), maxlen=self._recipe.num_samples)
        self._average, self._num_averaged = self._placed(state["average"]), state["num_averaged"]

    def _placed(self, values: list[Tensor]) -> list[Tensor]:
        """Copy tensors to the parameters' device and memory layout; an empty list stays empty."""
        pairs = zip(self._parameters, values, strict=True) if values else ()
        return [torch.empty_like(p, requires_grad=False).copy_(value) for p, value in pairs]
