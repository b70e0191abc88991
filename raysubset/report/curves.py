"""Draw training as curves over sequential passes: of a run, of a comparison's arms, of a sweep's settings."""

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from raysubset.report.drawing import COLOURS, Chart, Plot
from raysubset.report.figures import Record, finite, in_order, passes_by_epoch

VALIDATION = COLOURS[1]  # colour of losses on validation data, in every plot
STAGE_COLOURS = {
    "conventional": COLOURS[0],
    "trunk": COLOURS[4],
    "subsets": COLOURS[2],
    "subsamples": COLOURS[7],
    "fine_tuning": COLOURS[3],
}


@dataclass(frozen=True)
class Stage:
    """A stage of an arm in one round, over sequential passes of training."""

    name: str  # "aggregation" has no training: its losses are empty
    passes: tuple[float, ...]  # at the end of each epoch; for an aggregation, when it happens
    losses: tuple[tuple[float, float, float], ...]  # while training, by epoch: mean, least and greatest of the seeds
    validation: tuple[float, float, float] | None  # loss at its end, likewise; None: not measured


def arm_stages(
    runs: Sequence[Record], legs: Mapping[str, Record], records: Mapping[str, Record], *, num_train: int
) -> list[Stage]:
    """Average the training of one arm at one budget over the members of each round, then over seeds.

    Args:
        runs: the arm's runs, one for each seed; each `leg` names its last leg.
        legs: comparison.json's `legs`: what each leg is and needs, inputs first.
        records: the legs' records by name; runs that miss one are left out.
    """
    keys_of_runs = [needed_legs(run["leg"], legs) for run in runs]
    return _over_seeds(
        _of_legs(keys, legs, records, num_train) for keys in keys_of_runs if all(key in records for key in keys)
    )


def run_stages(records: Sequence[Record]) -> list[Stage]:
    """Average the training of finished runs, one for each seed; rounds that not all of them have are left out."""
    return _over_seeds(map(_of_run, records))


def _over_seeds(runs: Iterable[Iterable[tuple[tuple[str, int], "_Training"]]]) -> list[Stage]:
    """Average the members of each round, then the seeds; each run yields its trainings with (stage, round)."""
    seeds: list[dict[tuple[str, int], _Training]] = []
    for run in runs:
        members: dict[tuple[str, int], list[_Training]] = {}
        for place, training in run:
            members.setdefault(place, []).append(training)
        seeds.append({place: _mean_of(trainings) for place, trainings in members.items()})
    stages = []
    for name, round in (place for place in seeds[0] if all(place in seed for seed in seeds)) if seeds else ():
        trainings = [seed[name, round] for seed in seeds]
        mean = _mean_of(trainings)
        spans = zip(mean.losses, *(training.losses for training in trainings), strict=False)
        losses = tuple((average, min(values), max(values)) for average, *values in spans)
        ends = [training.validation for training in trainings if training.validation is not None]
        validation = None if mean.validation is None else (mean.validation, min(ends), max(ends))
        stages.append(Stage(name, mean.passes, losses, validation))
    return stages


def needed_legs(last: str, legs: Mapping[str, Record]) -> list[str]:
    """Return the leg and all legs that it needs, inputs first."""
    keys, todo = set(), [last]
    while todo:
        key = todo.pop()
        if key not in keys:
            keys.add(key)
            todo += legs[key]["inputs"]
    return [key for key in legs if key in keys]


@dataclass(frozen=True)
class _Training:
    passes: tuple[float, ...]
    losses: tuple[float, ...]
    validation: float | None  # loss; None: not measured


def _of_legs(
    keys: Sequence[str], legs: Mapping[str, Record], records: Mapping[str, Record], num_train: int
) -> Iterator[tuple[tuple[str, int], _Training]]:
    """Yield each leg's training with (stage, round); it starts where the last of its inputs ends."""
    ends: dict[str, float] = {}
    for key in keys:
        leg, record = legs[key], records[key]
        start = max((ends[name] for name in leg["inputs"]), default=0.0)
        if leg["kind"] == "aggregate":
            ends[key] = start
            yield ("aggregation", leg["round"]), _Training((start,), (), _validation_loss(record["aggregation"]))
            continue
        passes = [start + epoch_passes / leg["num_workers"] for epoch_passes in passes_by_epoch(record, num_train)]
        ends[key] = passes[-1] if passes else start
        yield (leg["stage"], leg["round"]), _training(record, passes)


def _of_run(record: Record) -> Iterator[tuple[tuple[str, int], _Training]]:
    """Yield each training of a finished run, and each aggregation at its round's end, with (stage, round)."""
    for stage, round, works, end, passes in in_order(record):
        yield from (((stage, round), _training(*training)) for training in zip(works, passes, strict=True))
        round_record = record["stages"]["rounds"][round] if stage in ("subsets", "subsamples") else {}
        if round_record and stage == ("subsamples" if round_record.get("subsamples") else "subsets"):
            yield ("aggregation", round), _Training((end,), (), _validation_loss(round_record["aggregation"]))


def _training(record: Record, passes: Sequence[float]) -> _Training:
    losses = tuple(finite(epoch["loss"]) for epoch in record["history"])
    return _Training(tuple(passes), losses, _validation_loss(record))


def _validation_loss(record: Record) -> float | None:
    return None if record["validation"] is None else finite(record["validation"]["loss"])


def _mean_of(trainings: Sequence[_Training]) -> _Training:
    """Average trainings over the epochs that all of them have."""
    passes, losses = (
        tuple(map(statistics.fmean, zip(*rows, strict=False)))
        for rows in ([training.passes for training in trainings], [training.losses for training in trainings])
    )
    validation = [training.validation for training in trainings if training.validation is not None]
    return _Training(passes, losses, statistics.fmean(validation) if validation else None)


def training_plot(
    name: str, what: str, seeds: str, panels: Sequence[tuple[str, Sequence[Stage]]], *, loss: str
) -> Plot:
    """Draw a chart for each panel (title, stages), of which there is at least one.

    Args:
        what: what is drawn, for the caption.
        seeds: over which seeds, for the caption.
    """
    charts = tuple(_panel(title, stages, loss) for title, stages in panels)
    values = [value for chart in charts for value in chart.y.values if math.isfinite(value)]
    for chart in charts:
        chart.y.values = values  # one scale for all
    caption = (
        f"Loss {what} over sequential passes of training. Lines: the epochs' losses, averaged over a round's members "
        f"and over {seeds}; bands: the least and greatest of the seeds; squares: validation loss at a stage's end, "
        "averaged over members; diamonds: that of their aggregate. All charts have one scale."
    )
    return Plot(name, caption, charts, is_wide=len(charts) > 1)


def _panel(title: str, stages: Sequence[Stage], loss: str) -> Chart:
    chart = Chart("passes, one after the other", loss, title=title, log="y", size=(340, 230))
    chart.x.low = 0
    for stage in (stage for stage in stages if stage.passes):
        if stage.losses:
            means, lows, highs = zip(*stage.losses, strict=True)
            colour = STAGE_COLOURS[stage.name]
            chart.band(stage.passes, lows, highs, colour)
            label, marker = stage.name.replace("_", " "), "." if len(means) < 3 else ""
            chart.line(zip(stage.passes, means, strict=True), colour, label, marker=marker)
    for stage in stages:
        if stage.validation is not None and stage.passes:
            end, least, most = stage.validation
            is_mean = stage.name == "aggregation"
            label, marker = ("validation of the aggregate", "D") if is_mean else ("validation", "s")
            bars = [(least, most)] if least < most else []
            chart.points([(stage.passes[-1], end)], VALIDATION, label, marker=marker, bars=bars)
    return chart
