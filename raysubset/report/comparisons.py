"""What a finished comparison tells: the verdicts first, then what each arm reached and paid, and what it rests on."""

import math
from collections.abc import Iterator

from raysubset.costs import bytes_in_words
from raysubset.quality import Quality, quality_of
from raysubset.report.figures import Record, finite
from raysubset.report.page import Section

CLOCKS = {"total": "passes in total", "critical_path": "passes on the critical path"}


def comparison_sections(record: Record) -> list[Section]:
    """What a user reads of a comparison."""
    parts = [
        Section(f"Comparison {record['name']}", lines=tuple(_verdicts(record))),
        _points(record),
        _speed_ups(record),
        _network(record),
    ]
    if record["tuning"]["tried"]:
        parts.append(_tuning(record))
    if record["failed"]:
        rows = tuple((leg, reason) for leg, reason in record["failed"].items())
        lines = ("The same command again tries these once more.",)
        parts.append(Section("Failed, and left out", ("leg", ""), rows, lines))
    if "text" in record["regime"]:
        parts.append(_regime(record))
    return parts


def _regime(record: Record) -> Section:
    """Which way takes the least wall time to the quality, at each bandwidth."""
    ways = ("one device", "data-parallel training", "subset pretraining")

    def seconds(one: Record, way: str) -> str:
        found = one["ways"].get(way)
        return "–" if found is None else f"{found['seconds']:.3g} s ({found['arm']})"

    rows = tuple(
        (f"{one['gbit_per_s']:g}", *(seconds(one, way) for way in ways), " or ".join(one["fastest"]) or "–")
        for one in record["regime"]["by_bandwidth"]
    )
    lines = (
        "Seconds to the quality that counts as good, computed as the table of networks is: of each way its fastest arm "
        "that gets there with every seed. One is the least where its interval, paired by seed, is wholly below the "
        "others'; else all that are not told apart are named.",
        record["regime"]["text"],
    )
    return Section("Regime", ("Gbit/s a worker", *ways, "the least"), rows, lines)


def _verdicts(record: Record) -> Iterator[str]:
    for clock, words in CLOCKS.items():
        verdict = record["verdicts"][clock]
        yield f"A tenth of the cost, counting {words}: {verdict['word']}. {verdict['text']}"
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
        f"The conventional run it is held against trains for {conventional['budget']:g} passes, the cheapest within "
        f"one standard error of the best validation loss: {reached} on test. As good means no worse than that by "
        f"{quality.show(record['margin'])}: {target}."
    )


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
                rows.append((arm["key"], f"{point['budget']:g}", *["–"] * (6 + is_streamed), "failed"))
                continue
            reached, half = mean_and_half(mean, quality)
            rows.append(
                (
                    arm["key"],
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
        f"{arm['key']}: {arm['title']}; learning rate {_settings(arm)}{_edge(record, arm['key'], arm['settings'])}"
        for arm in record["arms"]
    )
    columns = ("arm", "budget", "seeds", "passes", "critical path", "device s")
    columns += (*(("reads",) if is_streamed else ()), f"test {quality.label}")
    columns += ("validation loss", f"against conventional, {quality.change_label}")
    less = "" if quality.higher_is_better else f" Of {quality.name}, less is better."
    explained = (
        "Budgets are passes of training; passes count evaluation too, each arm's own work in full also where it was "
        f"shared. ± and the brackets: 95 % intervals by Student's t, differences paired by seed.{less}",
    )
    if is_streamed:
        reads = "Reads: how often as many rows as the training files have come from storage; a row group is read whole."
        explained = (*explained, reads)
    return Section("Arms", columns, tuple(rows), explained + lines, "arms")


def mean_and_half(mean: Record, quality: Quality) -> tuple[float, float]:
    """The mean test quality, and half the width of its interval, NaN where that has no end."""
    interval = mean[f"test_{quality.name}_interval"]
    return finite(mean[f"test_{quality.name}"]), finite(interval["high"]) - finite(interval["estimate"])


def _compared(difference: Record | None, is_non_inferior: bool | None, quality: Quality) -> str:
    if difference is None:
        return "–"
    estimate, low, high = (quality.number(difference[key], sign="+") for key in ("estimate", "low", "high"))
    span = "" if "-" in (low, high) else f" [{low}, {high}]"
    return f"{estimate}{span}{' as good' if is_non_inferior else ''}"


def _settings(arm: Record) -> str:
    return f"{arm['settings']['learning_rate']:g}, batch {arm['settings']['batch_size']}"


def _edge(record: Record, key: str, settings: Record) -> str:
    """', at the edge of the grid …' where a rate that was not tried, beyond the arm's, may be better; A takes B's."""
    tried = {one["learning_rate"] for one in record["tuning"]["tried"] if one["arm"] == ("B" if key == "A" else key)}
    if len(tried) < 2 or settings["learning_rate"] not in (min(tried), max(tried)):
        return ""
    return ", at the edge of the grid: a rate beyond it may do better (--learning-rates)"


def _speed_ups(record: Record) -> Section:
    rows = []
    for arm in record["arms"]:
        if arm["key"] not in record["speed_ups"]["total"]:
            continue
        found = [_speed_up(record["speed_ups"][clock][arm["key"]]) for clock in CLOCKS]
        rows.append((arm["key"], *found, arm["role"]))
    lines = (
        "S: passes that conventional training needs for the quality above, over those the arm needs; 0 where it never "
        "gets there. Geometric mean with Student's t interval on log S; where a seed is missing or beyond the budgets, "
        "the median with the least and largest, and what that covers.",
    )
    return Section(
        "Speed-up at equal quality", ("arm", "total", "critical path", "role"), tuple(rows), lines, "speed_ups"
    )


def _speed_up(one: Record) -> str:
    interval = one["interval"]
    low, high = interval["low"] or 0.0, interval["high"]
    end = "…" if high is None or math.isinf(high) else f"{high:.2f}"
    return f"{interval['estimate']:.2f} [{low:.2f}, {end}] {interval['coverage']:.0%}"


def largest_rows(network: Record) -> list[Record]:
    """Of each arm the row of the largest budget at which it came to an end."""
    largest = {row["arm"]: row for row in sorted(network["rows"], key=lambda row: row["budget"])}
    return [row for row in network["rows"] if row is largest[row["arm"]]]


def _network(record: Record) -> Section:
    network, quality = record["network"], quality_of(record)
    names = [f"{speed:g} Gbit/s" for speed in network["bandwidths"]]
    rows = tuple(
        (
            row["arm"],
            f"{row['budget']:g}",
            quality.number(row[f"test_{quality.name}"]),
            f"{row['num_exchanges']:,}",
            bytes_in_words(row["num_bytes"]),
            *(f"{row['wall_s'][f'{speed:g}']:.4g}" for speed in network["bandwidths"]),
        )
        for row in largest_rows(network)
    )
    workers, each = record["regime"]["num_workers"], bytes_in_words(network["data_parallel_bytes_a_step"])
    lines = (
        "Seconds if every subset had a device as fast as this one: critical-path passes × "
        f"{network['s_per_pass']:.3g} s + bytes × 8 / bandwidth; latency is left out: add it times the exchanges. "
        "Computed from what was measured here, not measured on a network. Bytes: weights out and in of all members "
        f"through one link; data-parallel training of {workers} workers sends {each} a step and worker (ring "
        "all-reduce of float32, half of it in bfloat16), nothing overlapped.",
    )
    columns = ("arm", "budget", f"test {quality.label}", "exchanges", "sent", *names)
    return Section("Wall time by network, largest budget", columns, rows, lines, "network")


def _tuning(record: Record) -> Section:
    chosen = {arm["key"]: arm["settings"] for arm in record["arms"]}

    def choice(one: Record) -> str:
        own = chosen.get(one["arm"])
        if own != {"learning_rate": one["learning_rate"], "batch_size": one["batch_size"]}:
            return ""
        return f"chosen{_edge(record, one['arm'], chosen[one['arm']])}".partition(":")[0]

    rows = tuple(
        (
            one["arm"],
            f"{one['learning_rate']:g}",
            f"{one['batch_size']}",
            "diverged" if one["validation_loss"] is None else f"{one['validation_loss']:.4f}",
            choice(one),
        )
        for one in record["tuning"]["tried"]
    )
    cost = f"{record['tuning']['passes']:.2f} passes, in none of the figures above; with a seed of its own."
    return Section("Tuning", ("arm", "learning rate", "batch", "validation loss", ""), rows, (cost,))


def advice_sections(record: Record) -> list[Section]:
    """What a user reads of advice before a run: Advice.to_dict()."""
    forecasts = record["forecasts"]
    speeds = list(forecasts[0]["wall_s"])
    rows = tuple(
        (
            one["name"],
            f"{one['passes']:.2f}",
            f"{one['num_exchanges']:,}",
            bytes_in_words(one["num_bytes"]),
            *(f"{one['wall_s'][speed]:.4g}" for speed in speeds),
        )
        for one in forecasts
    )
    lines = (
        f"Seconds for {record['passes']:.2f} passes of training in total: passes one after the other × "
        f"{record['s_per_pass']:.3g} s (measured on this machine, one device) + bytes each device or link sends × 8 / "
        "bandwidth. Evaluation, start-up, and sending while computing are left out for all.",
    )
    columns = ("", "passes, one after the other", "exchanges", "sent", *(f"{speed} Gbit/s" for speed in speeds))
    return [Section("Forecast", columns, rows, lines), Section("What follows", lines=tuple(record["lines"]))]
