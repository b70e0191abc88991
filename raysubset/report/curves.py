"""Training as curves over the passes that lie one after the other: of a run, of a comparison's arms, of a sweep's
settings."""

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from raysubset.report.drawing import COLOURS, Chart, Plot
from raysubset.report.figures import Record, finite, in_order, passes_by_epoch

VALIDATION = COLOURS[1]  # of losses on validation data, in every plot
STAGE_COLOURS = {
    "conventional": COLOURS[0],
    "trunk": COLOURS[4],
    "subsets": COLOURS[2],
    "subsamples": COLOURS[7],
    "fine_tuning": COLOURS[3],
}


@dataclass(frozen=True)
class Stage:
    """A stage of an arm in one round, over the passes of training that lie one after the other."""

    name: str  # "aggregation" trains on nothing: its losses are empty
    passes: tuple[float, ...]  # at the end of each epoch; of an aggregation, where it happens
    losses: tuple[tuple[float, float, float], ...]  # while training, by epoch: mean, least and greatest of the seeds
    validation: tuple[float, float, float] | None  # loss at its end, likewise, where it was measured


def arm_stages(
    runs: Sequence[Record], legs: Mapping[str, Record], found: Mapping[str, Record], *, num_train: int
) -> list[Stage]:
    """The training of one arm at one budget: members of a round are averaged, then seeds.

    Args:
        runs: of the arm, one a seed; each `leg` names its last.
        legs: comparison.json's: what each leg is and needs, inputs first.
        found: what the legs came to, by name; runs of which any is missing are left out.
    """
    needed = [needed_legs(run["leg"], legs) for run in runs]
    return _over_seeds(_of_legs(keys, legs, found, num_train) for keys in needed if all(key in found for key in keys))


def run_stages(records: Sequence[Record]) -> list[Stage]:
    """arm_stages() of whole runs, a finished one's record a seed; a round that not all of them came to is left out."""
    return _over_seeds(map(_of_run, records))


def _over_seeds(runs: Iterable[Iterable[tuple[tuple[str, int], "_Training"]]]) -> list[Stage]:
    """Members of a round are averaged, then seeds; each run's trainings by stage and round."""
    seeds: list[dict[tuple[str, int], _Training]] = []
    for run in runs:
        members: dict[tuple[str, int], list[_Training]] = {}
        for place, one in run:
            members.setdefault(place, []).append(one)
        seeds.append({place: _mean_of(own) for place, own in members.items()})
    stages = []
    for name, round in (place for place in seeds[0] if all(place in seed for seed in seeds)) if seeds else ():
        own = [seed[name, round] for seed in seeds]
        mean = _mean_of(own)
        spans = zip(mean.losses, *(one.losses for one in own), strict=False)
        losses = tuple((average, min(values), max(values)) for average, *values in spans)
        ends = [one.validation for one in own if one.validation is not None]
        validation = None if mean.validation is None else (mean.validation, min(ends), max(ends))
        stages.append(Stage(name, mean.passes, losses, validation))
    return stages


def needed_legs(last: str, legs: Mapping[str, Record]) -> list[str]:
    """The leg and all it needs, inputs first."""
    wanted, todo = set(), [last]
    while todo:
        key = todo.pop()
        if key not in wanted:
            wanted.add(key)
            todo += legs[key]["inputs"]
    return [key for key in legs if key in wanted]


@dataclass(frozen=True)
class _Training:
    passes: tuple[float, ...]
    losses: tuple[float, ...]
    validation: float | None  # loss; None: not measured


def _of_legs(
    needed: Sequence[str], legs: Mapping[str, Record], found: Mapping[str, Record], num_train: int
) -> Iterator[tuple[tuple[str, int], _Training]]:
    """Each leg's training, by stage and round, begun where the last of its inputs ended."""
    ends: dict[str, float] = {}
    for key in needed:
        leg, record = legs[key], found[key]
        begun = max((ends[before] for before in leg["inputs"]), default=0.0)
        if leg["kind"] == "aggregate":
            ends[key] = begun
            yield ("aggregation", leg["round"]), _Training((begun,), (), _validation_loss(record["aggregation"]))
            continue
        passes = [begun + done / leg["num_workers"] for done in passes_by_epoch(record, num_train)]
        ends[key] = passes[-1] if passes else begun
        yield (leg["stage"], leg["round"]), _training(record, passes)


def _of_run(record: Record) -> Iterator[tuple[tuple[str, int], _Training]]:
    """Each training of a finished run, and each aggregation where its round ends."""
    for stage, round, works, end, passes in in_order(record):
        yield from (((stage, round), _training(*one)) for one in zip(works, passes, strict=True))
        made = record["stages"]["rounds"][round] if stage in ("subsets", "subsamples") else {}
        if made and stage == ("subsamples" if made.get("subsamples") else "subsets"):
            yield ("aggregation", round), _Training((end,), (), _validation_loss(made["aggregation"]))


def _training(record: Record, passes: Sequence[float]) -> _Training:
    losses = tuple(finite(epoch["loss"]) for epoch in record["history"])
    return _Training(tuple(passes), losses, _validation_loss(record))


def _validation_loss(record: Record) -> float | None:
    return None if record["validation"] is None else finite(record["validation"]["loss"])


def _mean_of(trainings: Sequence[_Training]) -> _Training:
    """The mean of trainings that belong together, as far as all of them went."""
    passes, losses = (
        tuple(map(statistics.fmean, zip(*rows, strict=False)))
        for rows in ([one.passes for one in trainings], [one.losses for one in trainings])
    )
    measured = [one.validation for one in trainings if one.validation is not None]
    return _Training(passes, losses, statistics.fmean(measured) if measured else None)


def training_plot(
    name: str, what: str, seeds: str, panels: Sequence[tuple[str, Sequence[Stage]]], *, loss: str
) -> Plot:
    """Titles and stages, at least one, in a chart each; what is drawn and over which seeds is for the caption."""
    charts = tuple(_panel(title, stages, loss) for title, stages in panels)
    values = [value for chart in charts for value in chart.y.values if math.isfinite(value)]
    for chart in charts:
        chart.y.values = values  # one scale for all
    caption = (
        f"Loss {what} over the passes of training that lie one after the other: lines the mean of the epochs' losses "
        f"over {seeds}, of a round's members their mean, bands the least and greatest of the seeds; squares validation "
        "loss at a stage's end, of members their mean, diamonds that of their aggregate. One scale for all."
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
