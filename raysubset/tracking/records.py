"""What trackers are told: points of curves as events bring them, and the numbers of a finished record."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from raysubset.config import Config
from raysubset.events import AggregateDone, EpochDone, Event, MinimumDone, Progress
from raysubset.quality import Quality, quality_of

Record = Mapping[str, Any]
Outcome = Literal["finished", "failed", "stopped"]


@dataclass(frozen=True)
class Point:
    """Numbers of one curve at one step."""

    series: str  # "subset_0003", "fine_tuning", "aggregate": as TensorBoard's events name them
    step: int  # epochs of that series over all rounds; rounds, of aggregates; 0 where there is but one
    values: Mapping[str, float]


@dataclass(frozen=True)
class Header:
    """What a tracker's run is called and made of; nothing in it is secret."""

    name: str
    project: str
    group: str | None
    parameters: Mapping[str, Any]  # the config by dotted names
    tags: Mapping[str, str]
    folder: str | None  # local, for what a tracker keeps itself; None: wherever it does by itself


@dataclass(frozen=True)
class Result:
    """What is known when a tracker's run ends."""

    outcome: Outcome
    summary: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()  # local paths


class Curves:
    """Makes points of a run's events. Of progress, which comes every second, one an epoch."""

    def __init__(self, config: Config, quality: Quality) -> None:
        self._epochs_a_round, self._quality = math.ceil(config.minimize.epochs), quality
        self._told: dict[str, int] = {}

    def points(self, event: Event) -> Iterator[Point]:
        """Those that the event brings; what has been told before a run was resumed comes in no event."""
        match event:
            case Progress(attempt=attempt, loss=float()):
                name = _series(attempt.stage, attempt.subset)
                step = self._step(attempt.stage, attempt.round, int(event.epoch))
                if step > self._told.get(name, 0):
                    self._told[name] = step
                    yield _point(name, step, running_loss=event.loss, examples_per_s=event.examples_per_s)
            case MinimumDone(stage=stage, record=record):
                name, last = _series(stage, record["subset_id"]), 0
                for last, epoch in enumerate(record["history"], 1):
                    step = self._step(stage, record["round"], last)
                    yield _point(name, step, loss=epoch["loss"], learning_rate=epoch["learning_rate"])
                yield from self._validated(name, self._step(stage, record["round"], last), record["validation"])
            case EpochDone(stage=stage, record=record):
                step = math.ceil(record["epoch"])
                yield _point(stage, step, loss=record["loss"], learning_rate=record["learning_rate"])
                yield from self._validated(stage, step, record["validation"])
            case AggregateDone(record=record):
                step = event.round + 1
                yield from self._validated("aggregate", step, record["validation"])
                if record["validation"] is not None:
                    yield _point("aggregate", step, barrier=record["barrier"])

    def _step(self, stage: str, round: int, epoch: int) -> int:
        return epoch + (round * self._epochs_a_round if stage in ("subsets", "subsamples") else 0)

    def _validated(self, series: str, step: int, metrics: Record | None) -> Iterator[Point]:
        if metrics is not None:
            yield _point(series, step, **_measured(metrics, "validation", self._quality))


def _series(stage: str, subset: int | None) -> str:
    kind = {"subsets": "subset", "subsamples": "subsample"}.get(stage)
    return stage if kind is None else f"{kind}_{subset:04d}"


def _point(series: str, step: int, **values: float | None) -> Point:
    return Point(series, step, _known(values))


def _measured(metrics: Record, split: str, quality: Quality) -> dict[str, float | None]:
    """Loss and quality by the names trackers have them under: validation_loss, validation_accuracy."""
    return {f"{split}_{_plain(key)}": metrics[key] for key in ("loss", quality.name)}


def _known(values: Mapping[str, float | None]) -> dict[str, float]:
    """Without what JSON has null for: a loss that was not finite."""
    return {key: value for key, value in values.items() if value is not None}


def run_summary(record: Record) -> dict[str, float]:
    """The numbers of report.json that runs are compared by."""
    cost = record["cost"]
    values: dict[str, float | None] = {
        f"result/{key}": value
        for split in ("validation", "test")
        for key, value in _measured(record[split], split, quality_of(record)).items()
    }
    for key in ("passes", "critical_path_passes", "lost_passes", "device_s", "num_network_bytes"):
        values[f"cost/{key}"] = cost[key]
    values["cost/wall_s"] = record["seconds"]["wall"]
    values["overdetermination_ratio"] = record["overdetermination_ratio"]["full_set"]
    return _known(values)


def comparison_points(record: Record) -> Iterator[Point]:
    """Each arm's means over seeds at each budget, budgets counted from 1."""
    keys = (f"test_{quality_of(record).name}", "validation_loss", *("passes", "critical_path_passes", "device_s"))
    for arm in record["arms"]:
        for step, point in enumerate(arm["points"], 1):
            mean = point["mean"]
            if mean is not None:
                means = {_plain(key): mean[key] for key in keys}
                yield _point(f"arm_{_plain(arm['key'])}", step, budget=point["budget"], **means)


def comparison_summary(record: Record) -> tuple[dict[str, float], dict[str, str]]:
    """Speed-ups by clock, and the verdicts in words."""
    summary: dict[str, float | None] = {}
    for clock, of_arms in record["speed_ups"].items():
        for key, found in of_arms.items():
            summary[f"speed_up/{clock}/{_plain(key)}"] = found["interval"]["estimate"]
    tags = {}
    for clock, verdict in record["verdicts"].items():
        tags |= {f"verdict.{clock}": verdict["word"], f"verdict.{clock}.text": verdict["text"]}
    return _known(summary), tags


def _plain(key: str) -> str:
    """A name without what names of metrics may not hold, as an arm's key has: G:aggregation.method=fisher."""
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in key)
