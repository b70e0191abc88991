"""Report a finished sweep: its tables, its plot, the recommendation, and how its settings trained."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import itemgetter

from raysubset.errors import counted
from raysubset.quality import quality_of
from raysubset.report.commands import command
from raysubset.report.curves import run_stages, training_plot
from raysubset.report.drawing import COLOURS, GREY, Chart, Plot
from raysubset.report.figures import Record, formatted, loss_name
from raysubset.report.parts import Column, Command, Section, table

_MOST_SETTINGS = 12  # with a chart of their training each

# The data of losses and qualities in the order of training, and their names
_CURVES = (
    ("own", "own subset"),
    ("full_set", "training set, before"),
    ("before", "validation, before"),
    ("validation", "validation, after"),
    ("test", "test, after"),
)
_SIZES = ("subsets.size", "subsets.fraction", "subsets.num")  # the column of subset sizes shows them


def sweep_sections(record: Record) -> list[Section]:
    """Return the sections of a sweep: the settings, the effect of fine-tuning, failed trials, the recommendation."""
    parts = [_settings(record), *_before_and_after(record)]
    if lost := [trial for trial in record["trials"] if trial["state"] != "done"]:
        rows = tuple((trial["name"], trial["state"], trial.get("error", "fell behind others")) for trial in lost)
        parts.append(Section("Trials without a result", ("trial", "state", ""), rows))
    parts.append(Section("What this tells", lines=(record["recommendation"], *_beside_conventional(record))))
    return parts


def sweep_command(record: Record, config: Record) -> Command:
    """Return `raysubset sweep` with the record's space and number of seeds, and its directory's config."""
    options, space = ["--seeds", str(len(record["seeds"]))], dict(record["space"])
    if sizes := space.pop("subsets.size", None):
        options += ["--sizes", *map(str, sizes)]
    if space:
        options += ["--space", *(f"{key}={','.join(map(str, values))}" for key, values in space.items())]
    options += ["--baseline"] if record.get("baseline") else []
    options += ["--prune"] if any(trial["state"] == "pruned" for trial in record["trials"]) else []
    tracking = config["tracking"]
    if tracking["group"] == record["name"]:  # sweep() has set it
        tracking = tracking | {"group": None}
    changes = {"seed": min(record["seeds"]), "tracking": tracking}
    return Command(command({**config, **changes}, "sweep", *options))


def _settings(record: Record) -> Section:
    quality, cost = quality_of(record), record["cost"]
    others = [key for key in record["space"] if key not in _SIZES]
    recommended = None if record["recommended"] is None else record["settings"][record["recommended"]]
    columns = (
        ("subset size", lambda s: formatted(s["subset_size"] or s["overrides"].get("subsets.size"), "g", none="–")),
        *((key, lambda setting, key=key: f"{setting['overrides'][key]}") for key in others),
        ("subsets", lambda setting: formatted(setting["num_subsets"], "g", none="–")),
        ("Q", lambda setting: formatted(setting["overdetermination_ratio"], ".2f", none="–")),
        ("seeds", _seeds),
        _spread("validation loss", "validation_loss", "{:.4f}".format),
        _spread(quality.label, f"validation_{quality.name}", quality.number),
        _spread("passes", "passes", "{:.2f}".format),
        _spread("critical path", "critical_path_passes", "{:.2f}".format),
        ("", lambda setting: "←" if setting is recommended else ""),
    )
    lines = (
        "Means and, with ±, their standard errors over seeds. A pass is forward and backward over as many examples as "
        "the training set has; critical path: if every subset had a device of its own.",
        f"The sweep cost {cost['passes']:.2f} passes and {cost['device_s']:.0f} device-seconds in total; a trunk that "
        "trials share is counted in each trial's passes, and once here.",
    )
    return table(f"Sweep {record['name']}", record["settings"], columns, lines, [sweep_plot(record)])


def _before_and_after(record: Record) -> Iterator[Section]:
    """Show each setting's losses and qualities on its own subset, before and after fine-tuning, if recorded."""
    conventional, quality = record.get("baseline") or {}, quality_of(record)
    whole = conventional["passes"]["mean"] if conventional.get("passes") else math.nan
    columns = (
        ("subset size", lambda s: "conventional" if s is conventional else formatted(s["subset_size"], "g", none="–")),
        *(_spread(f"loss, {label}", f"{data}_loss", "{:.4f}".format) for data, label in _CURVES),
        _spread(f"{quality.label}, before", f"before_{quality.name}", quality.number),
        _spread(f"{quality.label}, test", f"test_{quality.name}", quality.number),
        ("passes, times", lambda setting: formatted(setting["passes"]["mean"] / whole, ".2f", none="–")),
    )
    lines = (
        "Own: of the minima on their own subsets. Before: of the aggregate before fine-tuning, on the training set and "
        "on validation data. The last column: passes by those of the conventional run. Each run reads test data once; "
        "the recommendation does not use them.",
    )
    if settings := [setting for setting in (*record["settings"], conventional) if setting.get("own_loss")]:
        yield table("Before and after fine-tuning", settings, columns, lines)


def _beside_conventional(record: Record) -> list[str]:
    """Compare the recommended setting's passes with those of the conventional runs, in a sentence."""
    number, baseline = record["recommended"], record.get("baseline")
    if number is None or not baseline or not baseline["passes"] or not baseline["validation_loss"]:
        return []
    chosen, whole = record["settings"][number], baseline["passes"]["mean"]
    times = chosen["passes"]["mean"] / whole, chosen["critical_path_passes"]["mean"] / whole
    _, loss = _spread("", "validation_loss", "{:.4f}".format)
    return [
        f"Conventional training has validation loss {loss(baseline)} over {counted(baseline['num_seeds'], 'seed')} for "
        f"{whole:.2f} passes: the recommended size took {times[0]:.2f} times as many, {times[1]:.2f} on the critical "
        "path. At equal cost raysubset compare sets them side by side."
    ]


def _seeds(setting: Record) -> str:
    """Return the number of seeds: '3', '2, 1 failed'."""
    words = [f"{setting['num_seeds']}"]
    words += [f"{num} {state}" for state in ("pruned", "failed") if (num := setting[f"num_{state}"])]
    return ", ".join(words)


def _spread(heading: str, key: str, show: Callable[[float], str]) -> Column:
    """Return the column of a setting's mean under this key, with its standard error."""

    def cell(setting: Record) -> str:
        if (value := setting[key]) is None:
            return "–"
        error = value["standard_error"]
        return show(value["mean"]) + ("" if error is None else f" ± {show(error)}")

    return heading, cell


def sweep_plot(record: Record) -> Plot | None:
    """Draw loss, quality and passes against subset size, with Q at each point, as in arXiv:2410.16523.

    There is a line for each combination of the other swept settings. If there is one combination, lines are of losses
    and qualities before and after fine-tuning. Return None if trials of fewer than two sizes have a result.
    """
    drawn = [setting for setting in record["settings"] if setting["validation_loss"]]
    if len({setting["subset_size"] for setting in drawn}) < 2:
        return None
    metric, baseline, combinations = quality_of(record), record.get("baseline") or {}, dict[str, list[Record]]()
    loss, quality, passes = charts = tuple(
        Chart("examples per subset", label, log=log, size=(400, 290))
        for label, log in (("loss", "xy"), (metric.label, "x"), ("passes", "x"))
    )
    measured = ((loss, "loss", 1.0), (quality, metric.name, metric.scale))
    for setting in sorted(drawn, key=lambda setting: setting["subset_size"]):
        others = [f"{key}={value}" for key, value in setting["overrides"].items() if key not in _SIZES]
        combinations.setdefault(", ".join(others), []).append(setting)
    curves = _CURVES if len(combinations) == 1 else (("validation", ""),)
    for number, (label, settings) in enumerate(combinations.items()):
        for shade, (data, name) in enumerate(curves):
            colour = COLOURS[(number + shade) % len(COLOURS)]
            for chart, key, scale in measured:
                _line(chart, settings, f"{data}_{key}", f"{label} {name}".strip(), colour, scale=scale)
        colour = COLOURS[number % len(COLOURS)]
        _line(passes, settings, "passes", f"{label} passes in total".strip(), colour)
        _line(passes, settings, "critical_path_passes", f"{label} on the critical path".strip(), colour, dash="5 3")
    conventional = [(chart, f"validation_{key}", scale, "") for chart, key, scale in measured]
    conventional += [(chart, f"test_{key}", scale, "2 4") for chart, key, scale in measured]
    for chart, key, scale, dash in (*conventional, (passes, "passes", 1.0, "")):
        if value := baseline.get(key):
            chart.across(scale * value["mean"], GREY, f"conventional, {key.partition('_')[0]}", dash=dash)
    num_seeds = statistics.median(setting["num_seeds"] for setting in drawn)
    caption = (
        f"By subset size, n = {num_seeds:g} seeds, bars: standard error over seeds; dashed passes: critical path; "
        "grey: conventional training, if it was run, dotted on test data."
    )
    return Plot(caption, charts)


def _line(
    chart: Chart, settings: Sequence[Record], key: str, label: str, colour: str, *, scale: float = 1, dash: str = ""
) -> None:
    """Draw a line with error bars over seeds through the settings that have the value."""
    drawn = [setting for setting in settings if setting.get(key)]
    spreads = [(setting["subset_size"], setting[key]) for setting in drawn]
    values = [(size, scale * spread["mean"], scale * (spread["standard_error"] or 0.0)) for size, spread in spreads]
    names = [f"{s['subset_size']:g} (Q = {formatted(s['overdetermination_ratio'], '.3g')})" for s in drawn]
    bars = [(value - error, value + error) for _, value, error in values]
    has_bars = any(error for *_, error in values)
    points, bars = [value[:2] for value in values], bars if has_bars else ()
    chart.line(points, colour, label, marker="o", dash=dash, bars=bars, names=names)


def training_of_settings(record: Record, reports: Mapping[str, Record]) -> Plot | None:
    """Draw the training of the settings, that with the least validation loss first, a dozen at most; None if there is
    none of trial_records()."""
    panels = []
    for setting in record["settings"]:
        trials = [trial["name"] for trial in record["trials"] if trial["overrides"] == setting["overrides"]]
        if seeds := [reports[name] for name in trials if name in reports]:
            title = [*(f"{key} = {value}" for key, value in setting["overrides"].items()), f"n = {len(seeds)}"]
            loss = math.inf if setting["validation_loss"] is None else setting["validation_loss"]["mean"]
            panels.append((loss, (", ".join(title), run_stages(seeds))))
    panels = [panel for _, panel in sorted(panels, key=itemgetter(0))]
    names, num = {loss_name(report) for report in reports.values()}, len(panels)
    return training_plot(
        f"of the best {_MOST_SETTINGS} of {num} settings"
        if num > _MOST_SETTINGS
        else "of each setting (the best first)",
        panels[:_MOST_SETTINGS],
        loss=names.pop() if len(names) == 1 else "loss",
        seeds="the n seeds that finished",
    )
