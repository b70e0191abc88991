"""Turn a run's events into points of curves, and finished records into summaries, for trackers."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

from raysubset.config import Config
from raysubset.events import AggregateDone, EpochDone, Event, MinimumDone, Progress
from raysubset.quality import Quality, quality_of
from raysubset.work import round_spans

Record = Mapping[str, Any]
Outcome = Literal["finished", "failed", "stopped"]


@dataclass(frozen=True)
class Point:
    """Numbers of one curve at one step."""

    series: str  # "subset_0003", "fine_tuning", "aggregate": the names that TensorBoard's events use
    step: int  # epochs of that series over all rounds; for aggregates the round, from 1; 0 if there is one point
    values: Mapping[str, float]


@dataclass(frozen=True)
class Header:
    """The name and the settings of a tracker's run; nothing in it is secret."""

    name: str
    project: str
    group: str | None
    parameters: Mapping[str, Any]  # the config by dotted names
    tags: Mapping[str, str]
    folder: str | None  # local folder for a tracker's own files; None: the tracker's default


@dataclass(frozen=True)
class Result:
    """The outcome of a tracker's run and its final numbers."""

    outcome: Outcome
    summary: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()  # local paths


class Curves:
    """Turns a run's events into points. Progress comes every second, and becomes one point per epoch."""

    def __init__(self, config: Config, quality: Quality) -> None:
        num, self._quality = config.rounds.num, quality
        epochs = (config.minimize.epochs * num * (end - begin) for begin, end in round_spans(config, num))
        self._earlier_steps = [0, *accumulate(math.ceil(round(each, 6)) for each in epochs)]  # by round
        self._last_steps: dict[str, int] = {}  # of progress, by series

    def points(self, event: Event) -> Iterator[Point]:
        """Yield the event's points; a resumed run has no events for what was done before."""
        match event:
            case Progress(attempt=attempt, loss=float()):
                name = _series(attempt.stage, attempt.subset)
                step = self._step(attempt.stage, attempt.round, int(event.epoch))
                if step > self._last_steps.get(name, 0):
                    self._last_steps[name] = step
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
        return epoch + (self._earlier_steps[round] if stage in ("subsets", "subsamples") else 0)

    def _validated(self, series: str, step: int, metrics: Record | None) -> Iterator[Point]:
        if metrics is not None:
            yield _point(series, step, **_measured(metrics, "validation", self._quality))


def _series(stage: str, subset: int | None) -> str:
    kind = {"subsets": "subset", "subsamples": "subsample"}.get(stage)
    return stage if kind is None else f"{kind}_{subset:04d}"


def _point(series: str, step: int, **values: float | None) -> Point:
    return Point(series, step, _known(values))


def _measured(metrics: Record, split: str, quality: Quality) -> dict[str, float | None]:
    """Return loss and quality under trackers' names: validation_loss, validation_accuracy."""
    return {f"{split}_{_plain(key)}": metrics[key] for key in ("loss", quality.name)}


def _known(values: Mapping[str, float | None]) -> dict[str, float]:
    """Leave out None, which stands for a loss that was not finite."""
    return {key: value for key, value in values.items() if value is not None}


def run_summary(record: Record) -> dict[str, float]:
    """Return the numbers of report.json by which runs are compared."""
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
    """Yield each arm's means over seeds at each budget; steps count the budgets from 1."""
    keys = (f"test_{quality_of(record).name}", "validation_loss", *("passes", "critical_path_passes", "device_s"))
    for arm in record["arms"]:
        for step, point in enumerate(arm["points"], 1):
            mean = point["mean"]
            if mean is not None:
                means = {_plain(key): mean[key] for key in keys}
                yield _point(f"arm_{_plain(arm['key'])}", step, budget=point["budget"], **means)


def comparison_summary(record: Record) -> tuple[dict[str, float], dict[str, str]]:
    """Return the speed-ups by clock, and the verdicts in words."""
    summary: dict[str, float | None] = {}
    for clock, speed_ups in record["speed_ups"].items():
        for key, speed_up in speed_ups.items():
            summary[f"speed_up/{clock}/{_plain(key)}"] = speed_up["interval"]["estimate"]
    tags = {}
    for clock, verdict in record["verdicts"].items():
        tags |= {f"verdict.{clock}": verdict["word"], f"verdict.{clock}.text": verdict["text"]}
    return _known(summary), tags


def _plain(key: str) -> str:
    """Replace characters that metrics' names may not have, such as those of the arm G:aggregation.method=fisher."""
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in key)
