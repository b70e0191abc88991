"""The plots of a comparison: quality against cost, speed-ups, wall time by network."""

from typing import Any

from raysubset.report.comparisons import CLOCKS
from raysubset.report.figures import Record
from raysubset.report.plots import Plot, colour_of, draw_plot, finite, legend_outside, log_where_wide

_COST = {"total": "passes", "critical_path": "critical_path_passes"}


def quality_against_cost(record: Record) -> list[Plot]:
    """Test accuracy over passes, a curve an arm: in total, and on the critical path."""
    return [_quality(record, clock) for clock in CLOCKS]


def _quality(record: Record, clock: str) -> Plot:
    def draw(figure: Any) -> None:
        axes = figure.subplots()
        colours = colour_of(arm["key"] for arm in record["arms"])
        costs = []
        for arm in record["arms"]:
            points = sorted((point["mean"][_COST[clock]], point["mean"]) for point in arm["points"] if point["mean"])
            if not points:
                continue
            costs += [cost for cost, _ in points]
            values = [100 * mean["test_accuracy"] for _, mean in points]
            halves = [100 * _half(mean["test_accuracy_interval"]) for _, mean in points]
            colour = colours[arm["key"]]
            style = {"marker": "o", "markersize": 4, "capsize": 2, "elinewidth": 0.8}
            is_control = arm["role"] != "candidate"
            line = "--" if is_control else "-"
            axes.errorbar([c for c, _ in points], values, halves, color=colour, label=arm["key"], ls=line, **style)
        target = 100 * record["conventional"]["target_accuracy"]
        axes.axhline(target, linestyle=":", linewidth=1, color="grey", label="as good")
        log_where_wide(axes, "x", costs)
        means = [p["mean"]["test_accuracy"] for arm in record["arms"] for p in arm["points"] if p["mean"]]
        low, high = 100 * min(means), 100 * max(means)
        axes.set_ylim(max(-2, low - 0.15 * (high - low) - 1), min(102, high + 0.25 * (high - low) + 1))
        axes.set_xlabel(CLOCKS[clock])
        axes.set_ylabel("test accuracy, %")
        axes.grid(True)
        legend_outside(figure, axes, columns=6)

    caption = (
        f"Test accuracy over {CLOCKS[clock]}, a curve an arm, n = {len(record['seeds'])} seeds; bars: 95 % intervals "
        "by Student's t, cut at the plot's edge; dashed: baselines and controls; dotted: what counts as good as the "
        "long conventional run."
    )
    return draw_plot(f"quality_{clock}", caption, draw, size=(5.2, 3.9))


def _half(interval: Record) -> float:
    return 0.0 if interval["high"] is None else interval["high"] - interval["estimate"]


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
    largest = {arm["key"]: max(point["budget"] for point in arm["points"]) for arm in record["arms"]}

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        colours, shown = colour_of(largest), []
        for row in network["rows"]:
            if row["budget"] == largest[row["arm"]]:
                seconds = [finite(row["wall_s"][f"{speed:g}"]) for speed in network["bandwidths"]]
                shown += seconds
                style = {"color": colours[row["arm"]], "markersize": 4}
                axes.plot(network["bandwidths"], seconds, "o-", label=row["arm"], **style)
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
