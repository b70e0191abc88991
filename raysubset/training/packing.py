"""A trial, with the run's own model and recipe, of whether stepping several members at once pays on a device."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from raysubset.config import MinimizeConfig
from raysubset.costs import Cost
from raysubset.data import Examples
from raysubset.errors import first_line
from raysubset.models import copied
from raysubset.training.loop import minimize
from raysubset.training.packed import minimize_packed
from raysubset.training.records import num_steps_per_epoch
from raysubset.training.trial import gradients_of

PAYS = 0.9  # packing is chosen if a packed step takes less than this share of its members' single steps
_NUM_WARM, _NUM_TIMED = 3, 8  # steps of a repeat: kernels are chosen in the first, which are not timed
_MOST_S = 2.0  # of a repeat's timed steps; slow networks are timed over fewer
_NUM_REPEATS = 5  # of each way, in turns; the fastest counts, because the machine's other work only adds to a time


@dataclass(frozen=True)
class PackingTrial:
    """The time of a step both ways."""

    num_members: int
    single_s: float  # a step of one member, in the fastest repeat
    packed_s: float  # a step of all members, likewise
    ratio: float  # the time of a packed step as a share of that of as many single steps
    pays: bool
    cost: Cost  # of the trial itself


def try_packing(models: Sequence[nn.Module], examples: Sequence[Examples], recipe: MinimizeConfig) -> PackingTrial:
    """Time some steps singly and packed, in turns, on copies of the models.

    Args:
        models: the members', on the device.
        examples: the members'.
        recipe: one for which why_not_packed() returns None.

    Raises:
        ValueError: if the network cannot be packed, with the reason: vmap cannot run it, memory does not suffice, or
            the loss does not depend on a parameter, which single steps would leave alone and packed ones would decay.
    """
    few = examples[0].select(torch.arange(min(4, len(examples[0])), device=examples[0].device))
    if unused := [name for name, gradient in gradients_of(models[0], few, recipe).items() if gradient is None]:
        raise ValueError(f"the loss does not depend on the parameter {unused[0]}")
    steps = _NUM_WARM + _NUM_TIMED
    epochs = max(steps / num_steps_per_epoch(len(member_examples), recipe) for member_examples in examples) + 1
    recipe = replace(  # at a rate that moves nothing, so that the trial cannot diverge
        recipe, epochs=epochs, learning_rate=1e-9, schedule="constant", tolerance=None, target_loss=None
    )
    seeds, total, singles, packs = list(range(len(models))), Cost(), [], []
    for _ in range(_NUM_REPEATS):
        watch = _Watch(examples[0].device)
        result = minimize(copied(models[0]), examples[0], recipe, seed=0, on_step=watch)
        singles.append(watch.step_s)
        total += result.cost
        watch = _Watch(examples[0].device)
        try:
            results = minimize_packed(list(map(copied, models)), examples, recipe, seeds=seeds, on_step=watch)
        except (RuntimeError, NotImplementedError) as error:  # from vmap, or because memory ran out
            raise ValueError(first_line(error)[:200]) from error
        packs.append(watch.step_s)
        for member_result in results:
            if not isinstance(member_result, Exception):
                total += member_result.cost
    ratio = min(packs) / (len(models) * min(singles))
    return PackingTrial(len(models), min(singles), min(packs), ratio, ratio < PAYS, total)


class _Watch:
    """Called after each step: times the steps after the first few, and ends the run when there are enough.

    One CPU thread's work is timed by that thread's own clock. On a core that other processes used, a step of 7 ms took
    40 ms of wall time, and a pack of one seemed 1.8 times as slow as that member alone.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._num_steps, self._start_s, self.step_s = device, 0, 0.0, 0.0
        is_one_thread = device.type == "cpu" and torch.get_num_threads() == 1
        self._clock = time.thread_time if is_one_thread else time.perf_counter

    def __call__(self, _: object) -> bool:
        self._num_steps += 1
        num_timed = self._num_steps - _NUM_WARM
        if num_timed == 0:
            self._start_s = self._now()
        if num_timed < 1:
            return False
        if num_timed < _NUM_TIMED and self._clock() - self._start_s < _MOST_S:
            return False
        self.step_s = (self._now() - self._start_s) / num_timed
        return True

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._clock()
