"""The cost of work in counts that can be added, and bytes as people read them. Imports no torch, for the reports' sake.

count_bytes(4096)     # whenever a file or an object of the object store is sent or fetched
taken_bytes()         # what this thread has moved since the last call: the bytes of the piece of work that ends
"""

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, astuple, dataclass
from operator import add
from typing import Any

from raysubset.config import MinimizeConfig, from_tree


class _Moved(threading.local):
    num_bytes = 0


_MOVED = _Moved()


def count_bytes(num: int) -> None:
    """Note that this thread has sent or fetched `num` bytes, through storage or the object store."""
    _MOVED.num_bytes += num


def moved_bytes() -> int:
    """Return the bytes that this thread has moved since the last taken_bytes()."""
    return _MOVED.num_bytes


def taken_bytes() -> int:
    """Return the bytes that this thread has moved since the last call, and start again from 0."""
    num, _MOVED.num_bytes = _MOVED.num_bytes, 0
    return num


FORWARD_SHARE = 1 / 3  # of a pass, in deep networks: a backward pass costs about twice a forward pass


@dataclass(frozen=True)
class Cost:
    """Work as counts that can be added; passes() makes the costs of methods comparable."""

    num_forward: int = 0  # examples passed forward
    num_backward: int = 0  # examples passed backward
    num_steps: int = 0  # optimizer steps
    device_s: float = 0.0  # seconds devices were held, summed over devices

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*map(add, astuple(self), astuple(other)))

    def passes(self, num_train: int, forward_share: float = FORWARD_SHARE) -> float:
        """Return the work in passes. One pass is forward and backward over as many examples as the full set has.

        Args:
            num_train: examples of the full set.
            forward_share: the forward part of a pass. training.forward_share() returns the network's own.
        """
        return (forward_share * self.num_forward + (1 - forward_share) * self.num_backward) / num_train

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Any) -> "Cost":
        """Return the cost that to_dict() wrote. Raise a ValueError if the record is not a cost."""
        return from_tree(cls, record, noun="value of a cost")


def taught_passes(passes: float, num_teachers: int, forward_share: float) -> float:
    """Return the passes of distillation's teachers while a network trains for `passes`: each passes all forward."""
    return passes * Cost(num_forward=num_teachers).passes(1, forward_share)


def works_of(stages: Mapping[str, Any]) -> Iterator[tuple[Any, int, int | None, Any]]:
    """Yield (stage, round, subset, record) of each training and aggregation in a report's stages, in their order.

    The record of an aggregation has no history.
    """
    for stage in ("conventional", "trunk"):
        if stages.get(stage):
            yield stage, 0, None, stages[stage]
    for round in stages.get("rounds") or ():
        for stage, minima in (("subsets", round["minima"]), ("subsamples", round.get("subsamples") or ())):
            for minimum in minima:
                yield stage, round["round"], minimum["subset_id"], minimum
        yield "aggregation", round["round"], None, round["aggregation"]
    if stages.get("fine_tuning"):
        yield "fine_tuning", 0, None, stages["fine_tuning"]


BATCH_NORM_EXAMPLES = 2048  # at most, of those minimized on, for the running statistics of averaged weights
PASSING_EXAMPLES = 500  # likewise, if training continues from an average: these statistics last for an epoch
_NUM_REFINEMENTS = 8  # of a run's epochs: what an epoch evaluates is at most about half of what it trains


def num_turns(recipe: MinimizeConfig) -> int:
    """Return how often an epoch, or epoch_fraction of one, ends. A last partial one counts."""
    return math.ceil(recipe.epochs / recipe.epoch_fraction)


def averaging_forward(recipe: MinimizeConfig, num_examples: int, *, has_batch_norm: bool) -> int:
    """Return the examples passed forward for running statistics of averaged weights, as in Techniques.end_epoch()."""
    if recipe.averaging.kind == "none" or not has_batch_norm:
        return 0
    num_restarts = (num_turns(recipe) - 1) * recipe.averaging.restarts()
    return num_restarts * min(PASSING_EXAMPLES, num_examples) + min(BATCH_NORM_EXAMPLES, num_examples)


def epochs_of_cost(passes: float, evaluation_of: Callable[[float], float], *, least: float) -> float:
    """Return the epochs on the full set that cost so many passes with their evaluation, but at least `least`.

    Args:
        evaluation_of: returns the passes that a run of so many epochs evaluates.
    """
    epochs = passes
    for _ in range(_NUM_REFINEMENTS):  # a run evaluates in each epoch if its recipe does
        epochs = passes - evaluation_of(max(epochs, least))
    return max(epochs, least)


def bytes_in_words(num: float) -> str:
    """Return a text such as '64 B', '538 kB' or '16 GB': three significant digits, units of a thousand."""
    for unit in ("B", "kB", "MB", "GB"):
        if num < 999.5:
            return f"{num:.3g} {unit}"
        num /= 1000
    return f"{num:.3g} TB"
