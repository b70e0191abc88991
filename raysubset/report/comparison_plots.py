"""The plots of a comparison: quality against cost, speed-ups, wall time by network; training curves of its arms, and
of a sweep's settings."""

import itertools
import math
import statistics
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raysubset.quality import quality_of
from raysubset.report.comparisons import CLOCKS, largest_rows, mean_and_half
from raysubset.report.figures import Record, finite, loss_name, passes_by_epoch, trainings
from raysubset.report.plots import COLOURS, Plot, colour_of, draw_plot, legend_outside, log_where_wide
from raysubset.report.run_plots import VALIDATION

_MARKERS = "os^"
_COST = {"total": "passes", "critical_path": "critical_path_passes"}


def quality_against_cost(record: Record) -> list[Plot]:
    """Test quality over passes, a curve an arm: in total, and on the critical path."""
    return [_quality(record, clock) for clock in CLOCKS]


def _quality(record: Record, clock: str) -> Plot:
    quality = quality_of(record)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        styles = _styles(record)
        costs, reached = [], []
        for arm in record["arms"]:
            points = sorted((point["mean"][_COST[clock]], point["mean"]) for point in arm["points"] if point["mean"])
            if not points:
                continue
            costs += [cost for cost, _ in points]
            measured = [[quality.scale * value for value in mean_and_half(mean, quality)] for _, mean in points]
            values, halves = zip(*measured, strict=True)
            halves = [half if math.isfinite(half) else 0.0 for half in halves]
            reached += [value for value in values if math.isfinite(value)]
            style = styles[arm["key"]] | {"ls": "-" if arm["role"] == "candidate" else "--"}
            axes.errorbar([c for c, _ in points], values, halves, label=arm["key"], capsize=2, elinewidth=0.8, **style)
        target = quality.scale * record["conventional"][f"target_{quality.name}"]
        axes.axhline(target, linestyle=":", linewidth=1, color="grey", label="as good")
        log_where_wide(axes, "x", costs)
        low, high = min(reached, default=0), max(reached, default=1)
        more, least, most = (1, -2, 102) if quality.is_share else (0.05 * (high - low or 1), -math.inf, math.inf)
        axes.set_ylim(max(least, low - 0.15 * (high - low) - more), min(most, high + 0.25 * (high - low) + more))
        axes.set_xlabel(CLOCKS[clock])
        axes.set_ylabel(f"test {quality.label}")
        axes.grid(True)
        legend_outside(figure, axes, columns=6)

    caption = (
        f"Test {quality.name} over {CLOCKS[clock]}, a curve an arm, n = {len(record['seeds'])} seeds; bars: 95 % "
        "intervals by Student's t, cut at the plot's edge; dashed: baselines and controls; dotted: what counts as good "
        "as the long conventional run."
    )
    return draw_plot(f"quality_{clock}", caption, draw, size=(5.2, 3.9))


def _styles(record: Record) -> dict[str, dict[str, Any]]:
    """Of each arm's line: a colour, and where these begin again another marker."""
    colours = colour_of(arm["key"] for arm in record["arms"])
    return {
        key: {"color": colour, "marker": _MARKERS[number // len(COLOURS) % len(_MARKERS)], "markersize": 4}
        for number, (key, colour) in enumerate(colours.items())
    }


def speed_ups(record: Record) -> Plot | None:
    """Each arm's speed-up with its interval, on both clocks; None where no arm has one."""
    arms = [arm["key"] for arm in record["arms"] if arm["key"] in record["speed_ups"]["total"]]
    if not arms:
        return None

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        colours = colour_of(CLOCKS)
        intervals = {(c, arm): record["speed_ups"][c][arm]["interval"] for c in CLOCKS for arm in arms}
        ends = [one[end] for one in intervals.values() for end in ("estimate", "high") if one[end] is not None]
        for (clock, arm), interval in intervals.items():
            y = arms.index(arm) + (-0.15 if clock == "total" else 0.15)
            low, high, colour = interval["low"] or 0.0, interval["high"], colours[clock]
            end = 1.15 * max(*ends, 1.0) if high is None else high
            axes.plot([low, end], [y, y], color=colour, linewidth=2.5, alpha=0.6)
            if high is None:
                axes.plot([end], [y], ">", color=colour)
            label = CLOCKS[clock] if arm == arms[0] else None
            axes.plot([interval["estimate"]], [y], "o", color=colour, label=label)
        axes.axvline(1, color="grey", linestyle=":", linewidth=1)
        axes.set_yticks(range(len(arms)), arms)
        axes.set_ylim(len(arms) - 0.5, -0.5)
        axes.set_xlim(left=-0.03 * axes.get_xlim()[1])
        axes.set_xlabel("speed-up S at equal quality")
        axes.set_ylabel("arm")
        axes.grid(True, axis="x")
        legend_outside(figure, axes, columns=2)

    caption = (
        "Speed-up over conventional training at equal quality, with the intervals of the table, an arrow where one has "
        "no end; dotted: S = 1."
    )
    return draw_plot("speed_ups", caption, draw, size=(5.2, 1.7 + 0.38 * len(arms)))


def wall_by_network(record: Record) -> Plot:
    """Seconds over bandwidth at each arm's largest budget."""
    network = record["network"]
    rows = largest_rows(network)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        styles, shown = _styles(record), []
        for row in rows:
            seconds = [finite(row["wall_s"][f"{speed:g}"]) for speed in network["bandwidths"]]
            shown += seconds
            axes.plot(network["bandwidths"], seconds, label=row["arm"], **styles[row["arm"]])
        log_where_wide(axes, "x", network["bandwidths"])
        log_where_wide(axes, "y", shown)
        if axes.get_yscale() == "linear":
            axes.set_ylim(bottom=0)
        axes.set_xlabel("bandwidth, Gbit/s")
        axes.set_ylabel("computed wall time, s")
        axes.grid(True)
        legend_outside(figure, axes, columns=6)

    caption = "Computed seconds at each arm's largest budget if every subset had a device of its own, over bandwidth."
    return draw_plot("wall_by_network", caption, draw, size=(5.2, 3.9))


# Training curves

_STAGE_COLOURS = {
    "conventional": COLOURS[0],
    "trunk": COLOURS[4],
    "subsets": COLOURS[2],
    "subsamples": COLOURS[7],
    "fine_tuning": COLOURS[3],
}
_COLUMNS = 3  # panels side by side
_MOST_SETTINGS = 12  # a panel each
_TITLE = 38  # characters that fit above a panel


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
    needed = [_needed_legs(run["leg"], legs) for run in runs]
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


def _needed_legs(last: str, legs: Mapping[str, Record]) -> list[str]:
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
        training = _training(record, begun, num_train, leg["num_workers"])
        ends[key] = training.passes[-1] if training.passes else begun
        yield (leg["stage"], leg["round"]), training


def _of_run(record: Record) -> Iterator[tuple[tuple[str, int], _Training]]:
    """Each training of a finished run, begun where the last of the stage before it ended; and each aggregation."""
    num_train, begun = record["data"]["num_train"], 0.0
    for (stage, round), works in itertools.groupby(trainings(record), key=lambda one: one[:2]):
        own = [_training(work, begun, num_train, work.get("num_workers", 1)) for *_, work in works]
        yield from (((stage, round), training) for training in own)
        begun = max((training.passes[-1] for training in own if training.passes), default=begun)
        made = record["stages"]["rounds"][round] if stage in ("subsets", "subsamples") else {}
        if made and stage == ("subsamples" if made.get("subsamples") else "subsets"):
            yield ("aggregation", round), _Training((begun,), (), _validation_loss(made["aggregation"]))


def _training(record: Record, begun: float, num_train: int, num_workers: int) -> _Training:
    passes = tuple(begun + done / num_workers for done in passes_by_epoch(record, num_train))
    losses = tuple(finite(epoch["loss"]) for epoch in record["history"])
    return _Training(passes, losses, _validation_loss(record))


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


def training_of_arms(record: Record, read: Callable[[Record], Mapping[str, Record]]) -> Plot | None:
    """A panel an arm at its largest budget; None where no arm's legs are there.

    Args:
        read: what legs came to, by name, of a part of comparison.json's `legs`.
    """
    num_train, legs, largest = record["data"]["num_train"], record["legs"], list(_largest_runs(record))
    lasts = [run["leg"] for *_, runs in largest for run in runs]
    found = read({key: legs[key] for last in lasts for key in _needed_legs(last, legs)})
    panels = [
        (_titled(key, budget), stages)
        for key, budget, runs in largest
        if (stages := arm_stages(runs, legs, found, num_train=num_train))
    ]
    if not panels:
        return None
    told = ("at each arm's largest budget", f"n = {len(record['seeds'])} seeds")
    return _draw_training("training_of_arms", *told, panels, loss=loss_name(record))


def training_of_settings(record: Record, found: Mapping[str, Record]) -> Plot | None:
    """A panel a setting of a sweep, at most a dozen: those of the least validation loss; None where no run is there.

    Args:
        found: the finished trials' own records, by the trials' names.
    """
    panels = []
    for setting in record["settings"]:
        trials = [trial["name"] for trial in record["trials"] if trial["overrides"] == setting["overrides"]]
        if own := [found[name] for name in trials if name in found]:
            told = [*(f"{key} = {value}" for key, value in setting["overrides"].items()), f"n = {len(own)}"]
            loss = math.inf if setting["validation_loss"] is None else setting["validation_loss"]["mean"]
            panels.append((loss, (textwrap.fill(", ".join(told), _TITLE), run_stages(own))))
    if not panels:
        return None
    limit = sorted(loss for loss, _ in panels)[:_MOST_SETTINGS][-1]
    shown = [panel for loss, panel in panels if loss <= limit][:_MOST_SETTINGS]
    what = "of each setting" if len(shown) == len(panels) else f"of the best {len(shown)} of {len(panels)} settings"
    names = {loss_name(one) for one in found.values()}
    told = (what, "the n seeds that finished")
    return _draw_training("training_of_settings", *told, shown, loss="loss" if len(names) > 1 else names.pop())


def _titled(key: str, budget: float) -> str:
    """An arm's key as far as it fits above a panel, with the budget where there is room."""
    title = key if len(key) <= _TITLE else f"{key[: _TITLE - 1]}…"
    return f"{title}, {budget:g} passes" if len(title) < _TITLE - 12 else title


def _draw_training(
    name: str, what: str, seeds: str, panels: Sequence[tuple[str, Sequence[Stage]]], *, loss: str
) -> Plot:
    """Titles and stages, at least one, in a panel each; what is drawn and over which seeds is for the caption."""
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)

    def draw(figure: Any) -> None:
        grid = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
        told: dict[str, Any] = {}
        shown: list[float] = []
        for axes, (title, stages) in zip(grid, panels, strict=False):
            shown += _panel(axes, stages, told)
            axes.set_title(title)
            axes.grid(True)
            axes.set_xlim(left=0)
        log_where_wide(grid[0], "y", shown)
        for number, axes in enumerate(grid):
            if number >= len(panels):
                axes.remove()
                continue
            axes.tick_params(labelleft=number % columns == 0)
            if number % columns == 0:
                axes.set_ylabel(loss)
            if number + columns >= len(panels):
                axes.set_xlabel("passes, one after the other")
        figure.legend(told.values(), told.keys(), loc="outside lower center", ncols=min(7, len(told)))

    caption = (
        f"Loss {what} over the passes of training that lie one after the other: lines the mean of the epochs' losses "
        f"over {seeds}, of a round's members their mean, bands the least and greatest of the seeds; squares validation "
        "loss at a stage's end, of members their mean, diamonds that of their aggregate. One scale for all panels."
    )
    return draw_plot(name, caption, draw, size=(10.0, 1.0 + 2.3 * rows), wide=True)


def _largest_runs(record: Record) -> Iterator[tuple[str, float, list[Record]]]:
    """(key, budget, runs) of each arm at the largest budget at which any run came to its end: those that did."""
    for arm in record["arms"]:
        if points := [point for point in arm["points"] if point["mean"] is not None]:
            point = max(points, key=lambda point: point["budget"])
            yield arm["key"], point["budget"], [run for run in point["runs"] if run["error"] is None]


def _panel(axes: Any, stages: Sequence[Stage], told: dict[str, Any]) -> list[float]:
    """Draw an arm; `told` takes a line for each label. The losses drawn."""
    shown: list[float] = []
    for stage in (stage for stage in stages if stage.passes):
        if stage.losses:
            means, lows, highs = zip(*stage.losses, strict=True)
            shown += means
            colour, marker = _STAGE_COLOURS[stage.name], "." if len(means) < 3 else None
            axes.fill_between(stage.passes, lows, highs, color=colour, alpha=0.2, linewidth=0)
            (line,) = axes.plot(stage.passes, means, color=colour, marker=marker)
            told.setdefault(stage.name.replace("_", " "), line)
        if stage.validation is None:
            continue
        end, least, most = stage.validation
        shown.append(end)
        is_mean = stage.name == "aggregation"
        style = {"fmt": "D" if is_mean else "s", "markersize": 4, "elinewidth": 0.8, "capsize": 2, "zorder": 3}
        bars = [[end - least], [most - end]]
        marks = axes.errorbar([stage.passes[-1]], [end], bars, color=VALIDATION, **style)
        told.setdefault("validation of the aggregate" if is_mean else "validation", marks)
    return shown
