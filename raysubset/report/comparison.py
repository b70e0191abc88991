"""Report a finished comparison: its verdicts, their basis, and the result and cost of each arm."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from operator import itemgetter

from raysubset.costs import bytes_in_words
from raysubset.events import Note
from raysubset.quality import Quality, quality_of
from raysubset.report.commands import above_command, command, exactly
from raysubset.report.curves import arm_stages, needed_legs, training_plot
from raysubset.report.drawing import COLOURS, GREY, Chart, Plot
from raysubset.report.figures import Record, finite, formatted, loss_name
from raysubset.report.parts import Command, Line, Section, table

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
_MOST_OF_BUDGET = 1.2  # an arm that costs more of its budget of passes is named
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
        lines = ("The same command tries them again.",)
        yield Section("Failed, and left out", ("leg", ""), tuple(record["failed"].items()), lines)
    if "sentence" in record["regime"]:
        yield _regime(record)


def _regime(record: Record) -> Section:
    """Report which way takes the least wall time to the quality, at each bandwidth."""

    def seconds(way: str, row: Record) -> str:
        fastest = row["ways"].get(way)
        if fastest is None:
            return "–"
        bound = "at most " * fastest.get("is_upper_bound", False)  # not of earlier versions
        return f"{bound}{fastest['seconds']:.3g} s ({arm_name(fastest['arm'])})"

    ways = ("one device", "data-parallel training", "subset pretraining")
    columns = (
        ("Gbit/s a worker", lambda row: f"{row['gbit_per_s']:g}"),
        *((way, partial(seconds, way)) for way in ways),
        ("the least", lambda row: " or ".join(row["fastest"]) or "–"),
    )
    lines = (
        "Seconds to the quality that counts as good, computed like the table of networks: for each way its fastest arm "
        "that reaches it with every seed. A way is the least if its interval, paired by seed, lies wholly below the "
        "others'; else all that cannot be told apart are named, those that reach it with some seeds only, and those "
        "that reach it at an arm's smallest budget already: they may take less (at most).",
        _with_names(record["regime"]["sentence"], record),
    )
    return table("Regime", record["regime"]["by_bandwidth"], columns, lines)


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
    budgets = sorted({point["budget"] for arm in record["arms"] for point in arm["points"]})
    yield (
        f"Found for {data['name']}, {data['num_train']} training examples, {regime['num_parameters']} parameters, Q = "
        f"{ratio['full_set']:.3g} (subsets {min(ratio['subsets']):.3g}), {regime['num_subsets']} subsets, budgets "
        f"{', '.join(f'{budget:g}' for budget in budgets)} passes, n = {len(record['seeds'])} seeds."
    )
    yield (
        f"The conventional run for comparison trains for {conventional['budget']:g} passes, the cheapest within one "
        f"standard error of the best validation loss: {reached} on test. As good means worse than that by at most "
        f"{quality.show(record['margin'])}: {target}."
    )
    if at_edge := record["tuning"].get("at_edge"):  # not of earlier versions
        text = f"the learning rate of {', '.join(map(arm_name, at_edge))} is at the edge of the grid: a rate beyond it"
        yield Note(f"{text} may do better (--learning-rates).", is_warning=True)
    if dear := list(_beyond_budget(record["arms"])):
        text = f"some arms cost more than {_MOST_OF_BUDGET:g} times their budget of training"
        more = "Evaluation and whole steps come on top. Verdicts and speed-ups go by passes, not by budgets."
        yield Note(f"{text}: {'; '.join(dear)}. {more}", is_warning=True)
    if len(record["seeds"]) < _FEWEST_SEEDS:
        yield f"{len(record['seeds'])} seeds give no useful interval: it is shown from {_FEWEST_SEEDS} seeds on."
    yield above_command("compare", record["seeds"])
    yield Command(_command(record))


def _beyond_budget(arms: Iterable[Record]) -> Iterator[str]:
    """Yield each arm that cost much more than its budget, with the passes of the budget that it exceeded most."""
    for arm in arms:
        points = [(point["mean"]["passes"], point["budget"]) for point in arm["points"] if point["mean"]]
        passes, budget = max(points, key=lambda point: point[0] / point[1], default=(0.0, 1.0))
        if passes > _MOST_OF_BUDGET * budget:
            yield f"{arm_name(arm['key'])} {passes:.2f} passes for {budget:g}"


def _command(record: Record) -> str:
    """Return `raysubset compare` with the options that the record holds."""
    config, seeds, tuning, regime = record["config"], record["seeds"], record["tuning"], record["regime"]
    (settings,) = (arm["settings"] for arm in record["arms"] if arm["key"] == "B")  # of a grid of one, which is not run
    options = ["--seeds", str(len(seeds)), "--arms", *(arm["key"] for arm in record["arms"]), "--budgets"]
    budgets = {point["budget"] for arm in record["arms"] if arm["key"][0] != "A" for point in arm["points"]}
    options += map(exactly, sorted(budgets))
    if not tuning.get("goes_beyond", not tuning["tried"]):  # not of earlier versions
        rates = {trial["learning_rate"] for trial in tuning["tried"]} or {settings["learning_rate"]}
        options += ["--learning-rates", *map(exactly, sorted(rates))]
    sizes = {trial["batch_size"] for trial in tuning["tried"]} or {settings["batch_size"]}
    if sizes != {config["minimize"]["batch_size"]}:
        options += ["--batch-sizes", *map(str, sorted(sizes))]
    options += ["--margin", exactly(record["margin"])]
    if any(arm["key"].startswith("I") for arm in record["arms"]):
        options += ["--num-workers", str(regime["num_workers"])]
    if speed := regime.get("gbit_per_s"):  # records of earlier versions have none
        options += ["--bandwidth", exactly(speed)]
    return command(config | {"seed": min(seeds)}, "compare", *options)


def _points(record: Record) -> Section:
    quality = quality_of(record)
    points = [point | {"arm": arm["key"]} for arm in record["arms"] for point in arm["points"]]
    is_streamed = any(point["mean"].get("storage_reads") for point in points if point["mean"])

    def of_mean(show: Callable[[Record], str]) -> Callable[[Record], str]:
        return lambda point: "–" if point["mean"] is None else show(point["mean"])

    def reached(mean: Record) -> str:
        value, half = mean_and_half(mean, quality)
        return quality.number(value) + (quality.error(half) if math.isfinite(half) else "")

    columns = [
        ("arm", lambda point: arm_name(point["arm"])),
        ("budget", lambda point: f"{point['budget']:g}"),
        ("seeds", of_mean(lambda mean: f"{mean['num_seeds']}")),
        ("passes", of_mean(lambda mean: f"{mean['passes']:.2f}")),
        ("critical path", of_mean(lambda mean: f"{mean['critical_path_passes']:.2f}")),
        ("device s", of_mean(lambda mean: f"{mean['device_s']:.1f}")),
        *([("reads", of_mean(lambda mean: f"{mean['storage_reads']:.2f}"))] if is_streamed else []),
        (f"test {quality.label}", of_mean(reached)),
        ("validation loss", of_mean(lambda mean: formatted(mean["validation_loss"]))),
        (f"against conventional, {quality.change_label}", lambda point: _compared(point, quality)),
    ]
    lines = [
        "Budgets are passes of training; passes count evaluation too, and all work of each arm, even if arms shared "
        "it. From three seeds on, ± and brackets are 95 % intervals by Student's t, differences paired by seed."
        f"{'' if quality.higher_is_better else f' Of {quality.name}, less is better.'}"
    ]
    if is_streamed:
        lines.append("Reads: rows read from storage, divided by the training files' rows; a row group is read whole.")
    for arm in record["arms"]:
        name = f"{arm_name(arm['key'])} ({arm['key']} of --arms)"
        lines.append(f"{name}: {arm['title']}; {_settings(arm)}")
    return table("Arms", points, columns, lines, [_quality_plot(record, clock) for clock in CLOCKS])


def _settings(arm: Record) -> str:
    """Return the learning rate and batch size that an arm trained with, and those that were tuned if they differ."""
    tuned = "learning rate {learning_rate:g}, batch {batch_size}".format_map(arm["settings"])
    if (settings := arm.get("trained")) is None:
        return f"tuned: {tuned}"  # of earlier versions, which did not record the multiples of data-parallel training
    trained = "learning rate {learning_rate:g}, batch {batch_size}".format_map(settings)
    return trained if trained == tuned else f"{trained} of all workers together (tuned: {tuned})"


def mean_and_half(mean: Record, quality: Quality) -> tuple[float, float]:
    """Return the mean test quality and half the width of its interval; NaN if it has no end or too few seeds."""
    interval = mean[f"test_{quality.name}_interval"]
    half = finite(interval["high"]) - finite(interval["estimate"])
    return finite(mean[f"test_{quality.name}"]), half if mean["num_seeds"] >= _FEWEST_SEEDS else math.nan


def _compared(point: Record, quality: Quality) -> str:
    if (difference := point["difference"]) is None:
        return "–" if point["mean"] else "failed"
    estimate, low, high = (quality.number(difference[key], sign="+") for key in ("estimate", "low", "high"))
    span = "" if "-" in (low, high) or difference["num"] < _FEWEST_SEEDS else f" [{low}, {high}]"
    return f"{estimate}{span}{' as good' if point['is_non_inferior'] else ''}"


def _speed_ups(record: Record) -> Section:
    ups = record["speed_ups"]
    columns = (
        ("arm", lambda arm: arm_name(arm["key"])),
        ("total", lambda arm: _speed_up(ups["total"][arm["key"]]["interval"])),
        ("critical path", lambda arm: _speed_up(ups["critical_path"][arm["key"]]["interval"])),
        ("role", lambda arm: arm["role"]),
    )
    lines = (
        "S: passes that conventional training needs for the quality above, divided by those the arm needs; 0 if it "
        "alone never reaches it. Geometric mean with Student's t interval on log S; if a seed is missing or beyond the "
        "budgets, the median with the least and largest, and the coverage of that. A seed with which neither reaches "
        "it tells nothing, so that S may be anything.",
    )
    arms = [arm for arm in record["arms"] if arm["key"] in ups["total"]]
    return table("Speed-up at equal quality", arms, columns, lines)


def _speed_up(interval: Record) -> str:
    estimate = formatted(interval["estimate"], ".2f", none="–")
    if interval["num"] < _FEWEST_SEEDS:
        return estimate
    span = f"[{interval['low'] or 0.0:.2f}, {formatted(interval['high'], '.2f', none='…')}]"
    return f"{estimate} {span} {interval['coverage']:.0%}"


def _network(record: Record) -> Section:
    network, quality = record["network"], quality_of(record)
    largest = {row["arm"]: row for row in sorted(network["rows"], key=itemgetter("budget"))}
    columns = (
        ("arm", lambda row: arm_name(row["arm"])),
        ("budget", lambda row: f"{row['budget']:g}"),
        (f"test {quality.label}", lambda row: quality.number(row[f"test_{quality.name}"])),
        *_sent_and_seconds(f"{speed:g}" for speed in network["bandwidths"]),
    )
    workers, step = record["regime"]["num_workers"], bytes_in_words(network["data_parallel_bytes_a_step"])
    lines = (
        f"Computed, not measured on a network: critical-path passes × {network['s_per_pass']:.3g} s + bytes × 8 / "
        "bandwidth, if every subset had a device as fast as this one. Left out are latency, once an exchange, and "
        "checkpoints. Bytes: what a member and the aggregating actor fetch and send; data-parallel training of "
        f"{workers} workers sends {step} per step and worker (ring all-reduce of float32, half of it in bfloat16), "
        "with nothing overlapped.",
    )
    rows = [row for row in network["rows"] if row is largest[row["arm"]]]
    return table("Wall time by network, largest budget", rows, columns, lines)


def _sent_and_seconds(speeds: Iterable[str]) -> list[tuple[str, Callable[[Record], str]]]:
    """Return the columns of exchanges, bytes, and wall seconds at each bandwidth."""
    exchanges = ("exchanges", lambda row: f"{row['num_exchanges']:,}")
    sent = ("sent", lambda row: bytes_in_words(row["num_bytes"]))
    return [exchanges, sent, *((f"{s} Gbit/s", lambda row, speed=s: f"{row['wall_s'][speed]:.4g}") for s in speeds)]


def _tuning(record: Record) -> Section:
    settings = {arm["key"]: arm["settings"] for arm in record["arms"]}

    def choice(row: Record) -> str:
        is_chosen = settings.get(row["arm"]) == {key: row[key] for key in ("learning_rate", "batch_size")}
        return "chosen" if is_chosen else ""

    columns = (
        ("arm", lambda row: arm_name(row["arm"])),
        ("learning rate", lambda row: f"{row['learning_rate']:g}"),
        ("batch", lambda row: f"{row['batch_size']}"),
        ("validation loss", lambda row: formatted(row["validation_loss"], none="diverged")),
        ("", choice),
    )
    cost = f"Tuning cost {record['tuning']['passes']:.2f} passes, in no figure above, and has a seed of its own."
    return table("Tuning", record["tuning"]["tried"], columns, (cost,))


# Plots


def _quality_plot(record: Record, clock: str) -> Plot:
    """Draw each arm's test quality over passes, in total or on the critical path."""
    quality, scale, num = quality_of(record), quality_of(record).scale, len(COLOURS)
    chart = Chart(CLOCKS[clock], f"test {quality.label}", log="x", size=(440, 320))
    for number, arm in enumerate(record["arms"]):
        means = sorted((point["mean"] for point in arm["points"] if point["mean"]), key=itemgetter(_COST[clock]))
        values = [mean_and_half(mean, quality) for mean in means]
        has_bars = all(math.isfinite(half) for _, half in values)
        bars = [(scale * (value - half), scale * (value + half)) for value, half in values] if has_bars else []
        points = [(mean[_COST[clock]], scale * value) for mean, (value, _) in zip(means, values, strict=True)]
        dash, marker = "" if arm["role"] == "candidate" else "5 3", "osD"[number // num % 3]  # a colour may repeat
        chart.line(points, COLOURS[number % num], arm_name(arm["key"]), marker=marker, dash=dash, bars=bars)
    if quality.is_share:
        chart.y.values = [value for value in chart.y.values if -2 <= value <= 102]
    chart.across(scale * record["conventional"][f"target_{quality.name}"], GREY, "as good")
    caption = (
        f"Test {quality.name} over {CLOCKS[clock]}, a curve an arm, n = {len(record['seeds'])} seeds; bars, from "
        f"{_FEWEST_SEEDS} seeds on: 95 % intervals by Student's t, cut at the plot's edge; dashed: baselines and "
        "controls; dotted: what counts as good as the long conventional run."
    )
    return Plot(caption, (chart,))


def training_of_arms(record: Record, read: Callable[[Record], Mapping[str, Record]]) -> Plot | None:
    """Draw a chart for each arm at its largest budget; None if no arm's legs exist. `read` is as leg_records()."""
    num_train, legs, largest = record["data"]["num_train"], record["legs"], []
    for arm in record["arms"]:
        if points := [point for point in arm["points"] if point["mean"] is not None]:
            point = max(points, key=itemgetter("budget"))
            runs = [run for run in point["runs"] if run["error"] is None]
            largest.append((f"{arm_name(arm['key'])}, {point['budget']:g} passes", runs))
    last_legs = [run["leg"] for _, runs in largest for run in runs]
    records = read({key: legs[key] for last in last_legs for key in needed_legs(last, legs)})
    panels = [(title, arm_stages(runs, legs, records, num_train=num_train)) for title, runs in largest]
    panels = [(title, stages) for title, stages in panels if stages]
    what, seeds = "at each arm's largest budget", f"n = {len(record['seeds'])} seeds"
    return training_plot(what, panels, loss=loss_name(record), seeds=seeds)


# Advice


def advice_sections(record: Record) -> list[Section]:
    """Return the sections of advice before a run, from Advice.to_dict()."""
    forecasts = record["forecasts"]
    columns = (
        ("", lambda forecast: forecast["name"]),
        ("passes, one after the other", lambda forecast: f"{forecast['passes']:.2f}"),
        *_sent_and_seconds(forecasts[0]["wall_s"]),
    )
    lines = (
        f"Seconds for {record['passes']:.2f} passes of training in total: passes one after the other × "
        f"{record['s_per_pass']:.3g} s (measured on this machine, one device) + bytes sent one after the other × 8 / "
        "bandwidth. Evaluation, start-up, and sending while computing are left out for all.",
    )
    return [table("Forecast", forecasts, columns, lines), Section("What follows", lines=tuple(record["lines"]))]
