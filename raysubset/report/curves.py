"""Draw training as curves over sequential passes: of a run, of a comparison's arms, of a sweep's settings."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from statistics import fmean
from typing import Any

from raysubset.costs import works_of
from raysubset.report.drawing import COLOURS, Chart, Plot
from raysubset.report.figures import Record, finite, passes_by_epoch

VALIDATION = COLOURS[1]  # colour of losses on validation data, in every plot
STAGE_COLOURS = {
    "conventional": COLOURS[0],
    "trunk": COLOURS[4],
    "subsets": COLOURS[2],
    "subsamples": COLOURS[7],
    "aggregation": VALIDATION,
    "fine_tuning": COLOURS[3],
}
MARKERS = {"aggregation": "D"}  # of what was validated; others have squares
Point = tuple[float, float, float, float]  # passes so far; then the mean, the least and the greatest value
Curve = Sequence[tuple[float, ...]]  # Points, or (passes, value) of one work
Measure = Callable[[Record], float]  # of a metrics record
Piece = tuple[str, int, int | None, Record]  # what works_of() yields


@dataclass(frozen=True)
class Stage:
    """A stage in one round, over sequential passes of training: means over its members, or over seeds."""

    name: str
    training: tuple[Point, ...]  # the loss of each epoch while training; () for an aggregation
    validation: tuple[Point, ...]  # wherever it was measured


def _loss(metrics: Record) -> float:
    return finite(metrics["loss"])


def run_stages(records: Sequence[Record], measure: Measure = _loss) -> list[Stage]:
    """Average the training of finished runs, one for each seed; rounds that not all of them have are left out.
    `measure` is what is taken of validation metrics."""
    return _over_seeds([_placed(works_of(r["stages"]), r["data"]["num_train"], measure) for r in records])


def arm_stages(
    runs: Sequence[Record], legs: Mapping[str, Record], records: Mapping[str, Record], *, num_train: int
) -> list[Stage]:
    """Average the training of one arm at one budget over the members of each round, then over seeds.

    Args:
        runs: the arm's runs, one for each seed; each `leg` names its last leg.
        legs: comparison.json's `legs`: what each leg is and needs, inputs first.
        records: the legs' records by name; runs that miss one are left out.
    """
    seeds = []
    for keys in (needed_legs(run["leg"], legs) for run in runs):
        if all(key in records for key in keys):
            works = sorted((_of_leg(legs[key], records[key]) for key in keys), key=_order)
            seeds.append(_placed(works, num_train, _loss))
    return _over_seeds(seeds)


def _of_leg(leg: Record, record: Record) -> Piece:
    if leg["kind"] == "aggregate":
        return "aggregation", leg["round"], None, record["aggregation"]
    return leg["stage"], leg["round"], leg["subset"], {**record, "num_workers": leg["num_workers"]}


def _order(work: Piece) -> tuple[bool, int, int]:
    stage, round, *_ = work
    return stage == "fine_tuning", round, list(STAGE_COLOURS).index(stage)


def needed_legs(last: str, legs: Mapping[str, Record]) -> list[str]:
    """Return the leg and all legs that it needs, inputs first."""
    keys, todo = set(), [last]
    while todo:
        key = todo.pop()
        if key not in keys:
            keys.add(key)
            todo += legs[key]["inputs"]
    return [key for key in legs if key in keys]


def _placed(works: Iterable[Piece], num_train: int, measure: Measure) -> dict[tuple[str, int], Stage]:
    """Average the members of each stage and round. A stage starts where the longest member of the one before ends."""
    members: dict[tuple[str, int], list[Record]] = {}
    for stage, round, _, work in works:
        members.setdefault((stage, round), []).append(work)
    stages, start = {}, 0.0
    for place, of_stage in members.items():
        ends, curves = [start], []
        for work in of_stage:
            passes = [start + p / work.get("num_workers", 1) for p in passes_by_epoch(work, num_train)]
            ends += passes
            curves.append(_curves(work, passes or [start], measure))
        stages[place], start = _averaged(place[0], curves), max(ends)
    return stages


def _curves(work: Record, passes: Sequence[float], measure: Measure) -> tuple[Curve, Curve]:
    """Return (passes, loss while training) of each epoch, and (passes, value) wherever the work was validated."""
    epochs = list(zip(passes, work.get("history", ()), strict=False))
    measured = [(at, epoch["validation"]) for at, epoch in epochs if epoch.get("validation")]
    if work["validation"]:  # of the stage's result, which may be an earlier epoch's weights
        measured = [*((at, metrics) for at, metrics in measured if at < passes[-1]), (passes[-1], work["validation"])]
    return [(at, finite(epoch["loss"])) for at, epoch in epochs], [(at, measure(metrics)) for at, metrics in measured]


def _averaged(name: str, members: Iterable[tuple[Curve, Curve]]) -> Stage:
    """Average one stage of several members or seeds, epoch by epoch, each epoch over those that have it."""

    def mean(curves: Sequence[Curve]) -> Iterator[Point]:
        for points in zip_longest(*curves):
            passes, values, *_ = zip(*filter(None, points), strict=True)
            yield fmean(passes), fmean(values), min(values), max(values)

    return Stage(name, *(tuple(mean(curves)) for curves in zip(*members, strict=True)))


def _over_seeds(seeds: Sequence[Mapping[tuple[str, int], Stage]]) -> list[Stage]:
    if len(seeds) < 2:
        return [stage for seed in seeds for stage in seed.values()]
    places = [place for place in seeds[0] if all(place in seed for seed in seeds)]
    return [_averaged(place[0], [(seed[place].training, seed[place].validation) for seed in seeds]) for place in places]


def training_plot(
    what: str, panels: Sequence[tuple[str, Sequence[Stage]]], *, loss: str, seeds: str = ""
) -> Plot | None:
    """Draw a chart for each panel (title, stages); None if there are fewer than three values to draw.

    Args:
        what: what is drawn, for the caption.
        seeds: over which seeds, for the caption; "" for one run.
    """
    charts = tuple(_panel(title, stages, loss) for title, stages in panels)
    if sum(len(chart.x.values) for chart in charts) < 3:
        return None
    values = [value for chart in charts for value in chart.y.values if math.isfinite(value)]
    for chart in charts:
        chart.y.values = values  # one scale for all
    over, spread = (f" and over {seeds}", "seeds (of one seed: of its members)") if seeds else ("", "members")
    caption = (
        f"Loss {what} over sequential passes of training. Lines: the epochs' losses while training, averaged over a "
        f"round's members{over}; bars: the least and greatest of the {spread}; squares: validation loss; diamonds: "
        f"that of the aggregate.{' All charts have one scale.' if len(charts) > 1 else ''}"
    )
    return Plot(caption, charts)


def _panel(title: str, stages: Sequence[Stage], loss: str) -> Chart:
    chart = Chart("passes, one after the other", loss, title=title, log="y", size=(340, 230))
    chart.x.low = 0
    for stage in stages:
        marker = "." if len(stage.training) < 3 else ""
        draw_curve(chart, stage.training, STAGE_COLOURS[stage.name], stage.name.replace("_", " "), marker=marker)
    for stage in stages:
        label = "validation of the aggregate" if stage.name == "aggregation" else "validation"
        draw_curve(chart, stage.validation, VALIDATION, label, marker=MARKERS.get(stage.name, "s"), width=1, dash="2 3")
    return chart


def draw_curve(chart: Chart, curve: Sequence[Point], colour: str, label: str, **style: Any) -> None:
    """Draw a curve, with bars from the least to the greatest if there are several; the style is that of line()."""
    bars = [point[2:] for point in curve]
    has_bars = any(least < most for least, most in bars)
    chart.line([point[:2] for point in curve], colour, label, bars=bars if has_bars else (), **style)
