"""Report a finished comparison: its verdicts, their basis, and the result and cost of each arm."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from raysubset.costs import bytes_in_words
from raysubset.events import Note
from raysubset.quality import Quality, quality_of
from raysubset.report.commands import command
from raysubset.report.curves import arm_stages, needed_legs, training_plot
from raysubset.report.drawing import COLOURS, GREY, Axis, Chart, Plot, colour_of
from raysubset.report.figures import Record, finite, loss_name
from raysubset.report.parts import Command, Line, Section

_NAMES = {  # arms by their letters in --arms
    "A": "conventional, long",
    "B": "conventional",
    "C": "RS2",
    "D": "one subset",
    "E": "one subset, shrink-perturb",
    "F": "one subset, fresh weights",
    "G": "aggregate",
    "H": "trunk and aggregate",
    "I": "data-parallel",
}
_FEWEST_SEEDS = 3  # for an interval: that of two seeds is wider than the axis
_MARKERS = "osD"
_COST = {"total": "passes", "critical_path": "critical_path_passes"}
CLOCKS = {"total": "passes in total", "critical_path": "passes on the critical path"}


def arm_name(key: str) -> str:
    """Return an arm's name by its key: 'aggregate, aggregation.method=fisher' for G:aggregation.method=fisher."""
    letter, _, more = key.partition(":")
    return ", ".join(filter(None, (_NAMES.get(letter, letter), more.replace(",", ", "))))


def comparison_sections(record: Record) -> list[Section]:
    """Return the sections of a comparison's report."""
    return [Section(f"Comparison {record['name']}", lines=tuple(verdicts(record))), *comparison_parts(record)]


def comparison_parts(record: Record) -> Iterator[Section]:
    """Yield the sections that follow the verdicts."""
    yield Section("What it rests on", lines=tuple(_basis(record)))
    yield _points(record)
    if record["speed_ups"]["total"]:
        yield _speed_ups(record)
    yield _network(record)
    if record["tuning"]["tried"]:
        yield _tuning(record)
    if record["failed"]:
        rows = tuple((leg, reason) for leg, reason in record["failed"].items())
        lines = ("The same command tries them again.",)
        yield Section("Failed, and left out", ("leg", ""), rows, lines)
    if "sentence" in record["regime"]:
        yield _regime(record)


def _regime(record: Record) -> Section:
    """Report which way takes the least wall time to the quality, at each bandwidth."""
    ways = ("one device", "data-parallel training", "subset pretraining")

    def seconds(row: Record, way: str) -> str:
        fastest = row["ways"].get(way)
        return "–" if fastest is None else f"{fastest['seconds']:.3g} s ({arm_name(fastest['arm'])})"

    rows = tuple(
        (f"{row['gbit_per_s']:g}", *(seconds(row, way) for way in ways), " or ".join(row["fastest"]) or "–")
        for row in record["regime"]["by_bandwidth"]
    )
    lines = (
        "Seconds to the quality that counts as good, computed like the table of networks: for each way its fastest arm "
        "that reaches it with every seed. A way is the least if its interval, paired by seed, lies wholly below the "
        "others'; else all that cannot be told apart are named, and those that reach it with some seeds only.",
        _with_names(record["regime"]["sentence"], record),
    )
    return Section("Regime", ("Gbit/s a worker", *ways, "the least"), rows, lines)


def verdicts(record: Record) -> Iterator[str]:
    """Yield the verdict on each clock in a sentence, with the arms' names."""
    for clock, words in CLOCKS.items():
        verdict, text = record["verdicts"][clock], record["verdicts"][clock]["text"]
        if len(record["seeds"]) < _FEWEST_SEEDS:
            text = re.sub(r" \(\d+ ?% interval [^)]*\)", "", text)
        yield f"A tenth of the cost, counting {words}: {verdict['word']}. {_with_names(text, record)}"


def _with_names(text: str, record: Record) -> str:
    """Replace the arms' keys in a text of the record by their names."""
    keys = sorted((arm["key"] for arm in record["arms"]), key=len, reverse=True)
    pattern = "|".join(rf"(?<![\w:.=-]){re.escape(key)}(?![\w:=])" for key in keys) or "(?!)"
    return re.sub(pattern, lambda match: arm_name(match[0]), text)


def _basis(record: Record) -> Iterator[Line]:
    regime, data, conventional = record["regime"], record["data"], record["conventional"]
    quality = quality_of(record)
    reached, target = (quality.show(conventional[f"{of}_{quality.name}"]) for of in ("test", "target"))
    ratio = regime["overdetermination_ratio"]
    yield (
        f"Found for {data['name']}, {data['num_train']} training examples, {regime['num_parameters']} parameters, Q = "
        f"{ratio['full_set']:.3g} (subsets {min(ratio['subsets']):.3g}), {regime['num_subsets']} subsets, budgets "
        f"{', '.join(f'{budget:g}' for budget in _budgets(record))} passes, n = {len(record['seeds'])} seeds."
    )
    yield (
        f"The conventional run for comparison trains for {conventional['budget']:g} passes, the cheapest within one "
        f"standard error of the best validation loss: {reached} on test. As good means worse than that by at most "
        f"{quality.show(record['margin'])}: {target}."
    )
    at_edge = [arm_name(arm["key"]) for arm in record["arms"] if _edge(record, arm["key"], arm["settings"])]
    if at_edge:
        text = f"the learning rate of {', '.join(at_edge)} is at the edge of the grid: a rate beyond it may do better"
        yield Note(f"{text} (--learning-rates).", is_warning=True)
    if len(record["seeds"]) < _FEWEST_SEEDS:
        yield f"{len(record['seeds'])} seeds give no useful interval: it is shown from {_FEWEST_SEEDS} seeds on."
    yield "The command:"
    yield Command(_command(record))


def _command(record: Record) -> str:
    """Return `raysubset compare` with the options that the record holds."""
    config, seeds, tried, regime = record["config"], record["seeds"], record["tuning"]["tried"], record["regime"]
    options = ["--seeds", str(len(seeds)), "--arms", *(arm["key"] for arm in record["arms"]), "--budgets"]
    options += [f"{b:g}" for b in sorted({p["budget"] for a in record["arms"] if a["key"] != "A" for p in a["points"]})]
    if rates := sorted({trial["learning_rate"] for trial in tried}):
        options += ["--learning-rates", *(f"{rate:.6g}" for rate in rates)]
    if len(sizes := sorted({trial["batch_size"] for trial in tried})) > 1:
        options += ["--batch-sizes", *map(str, sizes)]
    options += ["--margin", f"{record['margin']:g}"]
    if any(arm["key"].startswith("I") for arm in record["arms"]):
        options += ["--num-workers", str(regime["num_workers"])]
    if speed := regime.get("gbit_per_s"):  # records of earlier versions have none
        options += ["--bandwidth", f"{speed:g}"]
    config = {key: value for key, value in config.items() if key != "kind"} | {"seed": min(seeds)}
    return command(config, "compare", *options)


def _budgets(record: Record) -> list[float]:
    return sorted({point["budget"] for arm in record["arms"] for point in arm["points"]})


def _points(record: Record) -> Section:
    rows, quality = [], quality_of(record)
    means = [point["mean"] for arm in record["arms"] for point in arm["points"] if point["mean"]]
    is_streamed = any(mean.get("storage_reads") for mean in means)
    for arm in record["arms"]:
        for point in arm["points"]:
            mean, difference = point["mean"], point["difference"]
            if mean is None:
                rows.append((arm_name(arm["key"]), f"{point['budget']:g}", *["–"] * (6 + is_streamed), "failed"))
                continue
            reached, half = mean_and_half(mean, quality)
            rows.append(
                (
                    arm_name(arm["key"]),
                    f"{point['budget']:g}",
                    f"{mean['num_seeds']}",
                    f"{mean['passes']:.2f}",
                    f"{mean['critical_path_passes']:.2f}",
                    f"{mean['device_s']:.1f}",
                    *([f"{mean['storage_reads']:.2f}"] if is_streamed else []),
                    quality.number(reached) + (quality.error(half) if math.isfinite(half) else ""),
                    "not finite" if mean["validation_loss"] is None else f"{mean['validation_loss']:.4f}",
                    _compared(difference, point["is_non_inferior"], quality),
                )
            )
    lines = tuple(
        f"{arm_name(arm['key'])} ({arm['key']} of --arms): {arm['title']}; learning rate {_settings(arm)}"
        f"{_edge(record, arm['key'], arm['settings'])}"
        for arm in record["arms"]
    )
    columns = ("arm", "budget", "seeds", "passes", "critical path", "device s")
    columns += (*(("reads",) if is_streamed else ()), f"test {quality.label}")
    columns += ("validation loss", f"against conventional, {quality.change_label}")
    less = "" if quality.higher_is_better else f" Of {quality.name}, less is better."
    intervals = " ± and the brackets: 95 % intervals by Student's t, differences paired by seed."
    explained = (
        "Budgets are passes of training; passes count evaluation too, and all work of each arm, even if arms shared "
        f"it.{intervals if len(record['seeds']) >= _FEWEST_SEEDS else ''}{less}",
    )
    if is_streamed:
        reads = "Reads: rows read from storage, divided by the training files' rows; a row group is read whole."
        explained = (*explained, reads)
    plots = tuple(plot for clock in CLOCKS if (plot := _quality_plot(record, clock)))
    return Section("Arms", columns, tuple(rows), explained + lines, plots)


def mean_and_half(mean: Record, quality: Quality) -> tuple[float, float]:
    """Return the mean test quality and half the width of its interval; NaN if it has no end or too few seeds."""
    interval = mean[f"test_{quality.name}_interval"]
    if mean["num_seeds"] < _FEWEST_SEEDS:
        return finite(mean[f"test_{quality.name}"]), math.nan
    return finite(mean[f"test_{quality.name}"]), finite(interval["high"]) - finite(interval["estimate"])


def _compared(difference: Record | None, is_non_inferior: bool | None, quality: Quality) -> str:
    if difference is None:
        return "–"
    estimate, low, high = (quality.number(difference[key], sign="+") for key in ("estimate", "low", "high"))
    span = "" if "-" in (low, high) or difference["num"] < _FEWEST_SEEDS else f" [{low}, {high}]"
    return f"{estimate}{span}{' as good' if is_non_inferior else ''}"


def _settings(arm: Record) -> str:
    return f"{arm['settings']['learning_rate']:g}, batch {arm['settings']['batch_size']}"


def _edge(record: Record, key: str, settings: Record) -> str:
    """Return ', at the edge of the grid …' if an untried rate beyond the arm's may be better; A uses B's rates."""
    rates = {row["learning_rate"] for row in record["tuning"]["tried"] if row["arm"] == ("B" if key == "A" else key)}
    if len(rates) < 2 or settings["learning_rate"] not in (min(rates), max(rates)):
        return ""
    return ", at the edge of the grid: a rate beyond it may do better (--learning-rates)"


def _speed_ups(record: Record) -> Section:
    rows = []
    for arm in record["arms"]:
        if arm["key"] not in record["speed_ups"]["total"]:
            continue
        speed_ups = [_speed_up(record["speed_ups"][clock][arm["key"]]) for clock in CLOCKS]
        rows.append((arm_name(arm["key"]), *speed_ups, arm["role"]))
    lines = (
        "S: passes that conventional training needs for the quality above, divided by those the arm needs; 0 if it "
        "never reaches it. Geometric mean with Student's t interval on log S; if a seed is missing or beyond the "
        "budgets, the median with the least and largest, and the coverage of that.",
    )
    columns = ("arm", "total", "critical path", "role")
    return Section("Speed-up at equal quality", columns, tuple(rows), lines, (_speed_ups_plot(record),))


def _speed_up(record: Record) -> str:
    interval = record["interval"]
    low, high = interval["low"] or 0.0, interval["high"]
    end = "…" if high is None or math.isinf(high) else f"{high:.2f}"
    if interval["num"] < _FEWEST_SEEDS:
        return f"{interval['estimate']:.2f}"
    return f"{interval['estimate']:.2f} [{low:.2f}, {end}] {interval['coverage']:.0%}"


def largest_rows(network: Record) -> list[Record]:
    """Return each arm's row of the largest budget that it finished."""
    largest = {row["arm"]: row for row in sorted(network["rows"], key=lambda row: row["budget"])}
    return [row for row in network["rows"] if row is largest[row["arm"]]]


def _network(record: Record) -> Section:
    network, quality = record["network"], quality_of(record)
    names = [f"{speed:g} Gbit/s" for speed in network["bandwidths"]]
    rows = tuple(
        (
            arm_name(row["arm"]),
            f"{row['budget']:g}",
            quality.number(row[f"test_{quality.name}"]),
            f"{row['num_exchanges']:,}",
            bytes_in_words(row["num_bytes"]),
            *(f"{row['wall_s'][f'{speed:g}']:.4g}" for speed in network["bandwidths"]),
        )
        for row in largest_rows(network)
    )
    workers, step = record["regime"]["num_workers"], bytes_in_words(network["data_parallel_bytes_a_step"])
    lines = (
        "Seconds if every subset had a device as fast as this one: critical-path passes × "
        f"{network['s_per_pass']:.3g} s + bytes × 8 / bandwidth. Left out are latency (add it for each exchange) and "
        "checkpoints. Computed from what was measured here, not measured on a network. Bytes: what a member and the "
        f"aggregating actor fetch and send; data-parallel training of {workers} workers sends {step} per step and "
        "worker (ring all-reduce of float32, half of it in bfloat16), with nothing overlapped.",
    )
    columns = ("arm", "budget", f"test {quality.label}", "exchanges", "sent", *names)
    return Section("Wall time by network, largest budget", columns, rows, lines, _wall_plots(record))


def _tuning(record: Record) -> Section:
    settings = {arm["key"]: arm["settings"] for arm in record["arms"]}

    def choice(row: Record) -> str:
        if settings.get(row["arm"]) != {"learning_rate": row["learning_rate"], "batch_size": row["batch_size"]}:
            return ""
        return f"chosen{_edge(record, row['arm'], settings[row['arm']])}".partition(":")[0]

    rows = tuple(
        (
            arm_name(row["arm"]),
            f"{row['learning_rate']:g}",
            f"{row['batch_size']}",
            "diverged" if row["validation_loss"] is None else f"{row['validation_loss']:.4f}",
            choice(row),
        )
        for row in record["tuning"]["tried"]
    )
    cost = f"Tuning cost {record['tuning']['passes']:.2f} passes, in no figure above, and has a seed of its own."
    return Section("Tuning", ("arm", "learning rate", "batch", "validation loss", ""), rows, (cost,))


# Plots


def _quality_plot(record: Record, clock: str) -> Plot | None:
    """Draw each arm's test quality over passes, in total or on the critical path; None if there is one cost only."""
    quality = quality_of(record)
    chart = Chart(CLOCKS[clock], f"test {quality.label}", log="x", size=(440, 320))
    styles = _styles(record)
    costs, has_bars = set(), False
    for arm in record["arms"]:
        points = sorted((point["mean"][_COST[clock]], point["mean"]) for point in arm["points"] if point["mean"])
        if not points:
            continue
        costs.update(cost for cost, _ in points)
        measured = [[quality.scale * value for value in mean_and_half(mean, quality)] for _, mean in points]
        has_ends = all(math.isfinite(half) for _, half in measured)
        bars = [(value - half, value + half) for value, half in measured] if has_ends else []
        has_bars = has_bars or has_ends
        dash, style = "" if arm["role"] == "candidate" else "5 3", styles[arm["key"]]
        shown = [(cost, value) for (cost, _), (value, _) in zip(points, measured, strict=True)]
        chart.line(shown, label=arm_name(arm["key"]), dash=dash, bars=bars, **style)
        chart.y.values = [value for value in chart.y.values if not quality.is_share or -2 <= value <= 102]
    if len(costs) < 2:
        return None
    target = quality.scale * record["conventional"][f"target_{quality.name}"]
    chart.across(target, GREY, "as good")
    bars = "; bars: 95 % intervals by Student's t, cut at the plot's edge" if has_bars else ""
    caption = (
        f"Test {quality.name} over {CLOCKS[clock]}, a curve an arm, n = {len(record['seeds'])} seeds{bars}; dashed: "
        "baselines and controls; dotted: what counts as good as the long conventional run."
    )
    return Plot(f"quality_{clock}", caption, (chart,))


def _styles(record: Record) -> dict[str, dict[str, Any]]:
    """Return a colour and a marker for each arm's line; the marker changes when the colours repeat."""
    colours = colour_of(arm["key"] for arm in record["arms"])
    return {
        key: {"colour": colour, "marker": _MARKERS[number // len(COLOURS) % len(_MARKERS)]}
        for number, (key, colour) in enumerate(colours.items())
    }


def _speed_ups_plot(record: Record) -> Plot:
    """Draw each arm's speed-up on both clocks, with its interval if there are three seeds or more."""
    arms = [arm["key"] for arm in record["arms"] if arm["key"] in record["speed_ups"]["total"]]
    chart = Chart("speed-up S at equal quality", "", size=(440, 60 + 30 * len(arms)))
    intervals = {(c, arm): record["speed_ups"][c][arm]["interval"] for c in CLOCKS for arm in arms}
    ends = [i[end] for i in intervals.values() for end in ("estimate", "high") if i[end] is not None]
    has_bars = False
    for (clock, arm), interval in intervals.items():
        y, colour = arms.index(arm) + (-0.15 if clock == "total" else 0.15), COLOURS[list(CLOCKS).index(clock)]
        if interval["num"] >= _FEWEST_SEEDS:
            has_bars = True
            high = interval["high"]
            end = 1.15 * max(*ends, 1.0) if high is None else high
            chart.line([(interval["low"] or 0.0, y), (end, y)], colour, alpha=0.6, width=3, is_named=False)
            if high is None:
                chart.points([(end, y)], colour, marker=">", is_named=False)
        chart.points([(interval["estimate"], y)], colour, CLOCKS[clock])
    chart.upright(1)
    chart.y = Axis("", ticks=[(n, arm_name(arm)) for n, arm in enumerate(arms)], low=len(arms) - 0.5, high=-0.5)
    chart.x.values += [0.0, 1.1]
    bars = ", with the intervals of the table, an arrow where one has no end" if has_bars else ""
    caption = f"Speed-up over conventional training at equal quality{bars}; dotted: S = 1."
    return Plot("speed_ups", caption, (chart,))


def _wall_plots(record: Record) -> tuple[Plot, ...]:
    """Draw the seconds over bandwidth at each arm's largest budget; no plot if there is a single bandwidth."""
    network, styles = record["network"], _styles(record)
    if len(network["bandwidths"]) < 2:
        return ()
    chart = Chart("bandwidth, Gbit/s", "computed wall time, s", log="xy", size=(440, 300))
    for row in largest_rows(network):
        seconds = [(speed, finite(row["wall_s"][f"{speed:g}"])) for speed in network["bandwidths"]]
        chart.line(seconds, label=arm_name(row["arm"]), **styles[row["arm"]])
    caption = "Computed seconds at each arm's largest budget if every subset had a device of its own, over bandwidth."
    return (Plot("wall_by_network", caption, (chart,)),)


def training_of_arms(record: Record, read: Callable[[Record], Mapping[str, Record]]) -> Plot | None:
    """Draw a chart for each arm at its largest budget; None if no arm's legs exist.

    Args:
        read: returns the records of the given part of comparison.json's `legs`, by name.
    """
    num_train, legs, largest = record["data"]["num_train"], record["legs"], list(_largest_runs(record))
    last_legs = [run["leg"] for *_, runs in largest for run in runs]
    records = read({key: legs[key] for last in last_legs for key in needed_legs(last, legs)})
    panels = [
        (f"{arm_name(key)}, {budget:g} passes", stages)
        for key, budget, runs in largest
        if (stages := arm_stages(runs, legs, records, num_train=num_train))
    ]
    if not panels:
        return None
    words = ("at each arm's largest budget", f"n = {len(record['seeds'])} seeds")
    return training_plot("training_of_arms", *words, panels, loss=loss_name(record))


def _largest_runs(record: Record) -> Iterator[tuple[str, float, list[Record]]]:
    """Yield each arm's key, the largest budget at which any of its runs finished, and the runs that did."""
    for arm in record["arms"]:
        if points := [point for point in arm["points"] if point["mean"] is not None]:
            point = max(points, key=lambda point: point["budget"])
            yield arm["key"], point["budget"], [run for run in point["runs"] if run["error"] is None]


# Advice


def advice_sections(record: Record) -> list[Section]:
    """Return the sections of advice before a run, from Advice.to_dict()."""
    forecasts = record["forecasts"]
    speeds = list(forecasts[0]["wall_s"])
    rows = tuple(
        (
            forecast["name"],
            f"{forecast['passes']:.2f}",
            f"{forecast['num_exchanges']:,}",
            bytes_in_words(forecast["num_bytes"]),
            *(f"{forecast['wall_s'][speed]:.4g}" for speed in speeds),
        )
        for forecast in forecasts
    )
    lines = (
        f"Seconds for {record['passes']:.2f} passes of training in total: passes one after the other × "
        f"{record['s_per_pass']:.3g} s (measured on this machine, one device) + bytes sent one after the other × 8 / "
        "bandwidth. Evaluation, start-up, and sending while computing are left out for all.",
    )
    columns = ("", "passes, one after the other", "exchanges", "sent", *(f"{speed} Gbit/s" for speed in speeds))
    return [Section("Forecast", columns, rows, lines), Section("What follows", lines=tuple(record["lines"]))]
