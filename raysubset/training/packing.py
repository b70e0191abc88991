"""Whether stepping several members at once pays on a device: measured with the run's own model and recipe."""

import copy
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from raysubset.config import MinimizeConfig
from raysubset.costs import Cost
from raysubset.data import Examples
from raysubset.errors import first_line
from raysubset.training.loop import minimize
from raysubset.training.packed import minimize_packed
from raysubset.training.records import num_steps_per_epoch

PAYS = 0.9  # packing is taken if a packed step takes less than this share of its members' single steps
_NUM_WARM, _NUM_TIMED = 3, 8  # steps of a repeat: kernels are chosen in the first, and not timed
_MOST_S = 2.0  # of a repeat's timed steps; slow networks are timed over fewer
_NUM_REPEATS = 5  # of each way, in turns; the fastest counts, as whatever else the machine does only adds to it


@dataclass(frozen=True)
class PackingTrial:
    """What a step costs both ways."""

    num_members: int
    single_s: float  # a step of one member, in the fastest repeat
    packed_s: float  # a step of all of them, likewise
    cost: Cost  # of the trial itself

    @property
    def ratio(self) -> float:
        """A packed step's time as a share of as many single steps'."""
        return self.packed_s / (self.num_members * self.single_s)

    @property
    def pays(self) -> bool:
        return self.ratio < PAYS

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio, "pays": self.pays}


def try_packing(models: Sequence[nn.Module], examples: Sequence[Examples], recipe: MinimizeConfig) -> PackingTrial:
    """Time some steps one by one and packed, in turns, on copies of the models.

    Args:
        models: the members', on the device.
        examples: the members'.
        recipe: one that why_not_packed() has nothing against.

    Raises:
        ValueError: if the network cannot be packed, with the reason: vmap cannot do it, it does not fit into memory, or
            a parameter has no part in the loss, which single steps leave alone and packed ones would decay.
    """
    if (unused := _unused_parameter(models[0], examples[0], recipe)) is not None:
        raise ValueError(f"the loss does not depend on the parameter {unused}")
    steps = _NUM_WARM + _NUM_TIMED
    epochs = max(steps / num_steps_per_epoch(len(own), recipe) for own in examples) + 1
    recipe = replace(  # at a rate that moves nothing, so that the trial cannot diverge
        recipe, epochs=epochs, learning_rate=1e-9, schedule="constant", tolerance=None, target_loss=None
    )
    seeds, total, singles, packs = list(range(len(models))), Cost(), [], []
    for _ in range(_NUM_REPEATS):
        watch = _Watch(examples[0].device)
        result = minimize(copy.deepcopy(models[0]), examples[0], recipe, seed=0, on_step=watch)
        singles.append(watch.step_s)
        total += result.cost
        watch = _Watch(examples[0].device)
        try:
            results = minimize_packed(copy.deepcopy(list(models)), examples, recipe, seeds=seeds, on_step=watch)
        except (RuntimeError, NotImplementedError) as error:  # vmap's refusals, and memory that runs out
            raise ValueError(first_line(error)[:200]) from error
        packs.append(watch.step_s)
        for each in results:
            if not isinstance(each, Exception):
                total += each.cost
    return PackingTrial(len(models), min(singles), min(packs), total)


class _Watch:
    """Called after each step: times those after the first few, and ends the run when there are enough.

    What one CPU thread computes is timed by that thread's own clock: on a core that others use as well, a step of 7 ms
    took 40 ms by the wall's, and a pack of one 1.8 times as long as that one alone.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._num_steps, self._started, self.step_s = device, 0, 0.0, 0.0
        is_one_thread = device.type == "cpu" and torch.get_num_threads() == 1
        self._clock = time.thread_time if is_one_thread else time.perf_counter

    def __call__(self, _: object) -> bool:
        self._num_steps += 1
        timed = self._num_steps - _NUM_WARM
        if timed == 0:
            self._started = self._now()
        if timed < 1:
            return False
        if timed < _NUM_TIMED and self._clock() - self._started < _MOST_S:
            return False
        self.step_s = (self._now() - self._started) / timed
        return True

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._clock()


def _unused_parameter(model: nn.Module, examples: Examples, recipe: MinimizeConfig) -> str | None:
    """The name of a parameter that gets no gradient, if there is one."""
    tried = copy.deepcopy(model).train()
    indices = torch.arange(min(4, len(examples)), device=examples.device)
    dtype = next(tried.parameters()).dtype
    inputs, targets = examples.batch(indices, channels_last=recipe.channels_last, dtype=dtype)
    examples.task.loss(tried(inputs), targets).backward()
    return next((name for name, p in tried.named_parameters() if p.requires_grad and p.grad is None), None)
