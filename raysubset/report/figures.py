"""What a report computes of a run's record: training passes, errors of measurement, differences and their noise."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from raysubset.training import Metrics

Record = Mapping[str, Any]

NOISE_ERRORS = 2.0  # a difference of fewer standard errors than this is called noise


def standard_error(metrics: Metrics) -> float:
    """Of an accuracy, binomial; where none or all are right, as if one example were otherwise."""
    num = metrics.num_examples
    share = min(max(metrics.num_correct, 1), max(num - 1, 1)) / num
    return math.sqrt(share * (1 - share) / num)


@dataclass(frozen=True)
class Difference:
    """Of two accuracies measured on the same examples."""

    value: float
    error: float  # standard error

    @property
    def is_noise(self) -> bool:
        return abs(self.value) < NOISE_ERRORS * self.error


def difference(new: Metrics, old: Metrics) -> Difference:
    """New minus old accuracy. Its error is that of independent samples: if anything too large on the same examples."""
    error = math.hypot(standard_error(new), standard_error(old))
    return Difference(new.accuracy - old.accuracy, error)


def mean_metrics(parts: list[Metrics]) -> Metrics:
    """The mean of several models' metrics on the same examples; the number of right ones is rounded."""
    num = len(parts)
    loss_sum, num_correct = sum(m.loss_sum for m in parts) / num, round(sum(m.num_correct for m in parts) / num)
    return Metrics(loss_sum, num_correct, parts[0].num_examples)


def trained_passes(record: Record) -> float:
    """Passes of the training that led to the result: without evaluation, and without what was lost and done again."""
    num_train = record["data"]["num_train"]
    return sum(
        work["history"][-1]["epoch"] * work.get("num_examples", num_train) / num_train
        for *_, work in trainings(record)
        if work["history"]
    )


def trainings(record: Record) -> Iterator[tuple[str, int, int | None, Record]]:
    """(stage, round, subset, its record with its history) of each training in the order of the method."""
    stages = record["stages"]
    if stages.get("conventional"):
        yield "conventional", 0, None, stages["conventional"]
    if stages.get("trunk"):
        yield "trunk", 0, None, stages["trunk"]
    for round in stages.get("rounds", ()):
        for minimum in round["minima"]:
            yield "subsets", round["round"], minimum["subset_id"], minimum
        for minimum in round.get("subsamples", ()):
            yield "subsamples", round["round"], minimum["subset_id"], minimum
    if stages.get("fine_tuning"):
        yield "fine_tuning", 0, None, stages["fine_tuning"]
