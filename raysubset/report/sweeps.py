"""Report a finished sweep: its tables, its plot, the recommendation, and how its settings trained."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from raysubset.quality import quality_of
from raysubset.report.commands import command
from raysubset.report.curves import run_stages, training_plot
from raysubset.report.drawing import COLOURS, GOOD, GREY, Chart, Plot
from raysubset.report.figures import Record, formatted, loss_name
from raysubset.report.parts import Command, Section

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
    plot = sweep_plot(record)
    settings = dataclasses.replace(_settings(record), plots=(plot,) if plot else ())
    parts = [settings, *_before_and_after(record)]
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
    return Command(command({key: value for key, value in config.items() if key != "kind"} | changes, "sweep", *options))


def _settings(record: Record) -> Section:
    others, quality = [key for key in record["space"] if key not in _SIZES], quality_of(record)
    rows = tuple(
        (
            formatted(setting["subset_size"] or setting["overrides"].get("subsets.size"), "g", none="–"),
            *(f"{setting['overrides'][key]}" for key in others),
            formatted(setting["num_subsets"], "g", none="–"),
            formatted(setting["overdetermination_ratio"], ".2f", none="–"),
            _state(setting),
            _spread(setting["validation_loss"], "{:.4f}".format),
            _spread(setting[f"validation_{quality.name}"], quality.number),
            _spread(setting["passes"], "{:.2f}".format),
            _spread(setting["critical_path_passes"], "{:.2f}".format),
            "←" if number == record["recommended"] else "",
        )
        for number, setting in enumerate(record["settings"])
    )
    columns = ("subset size", *others, "subsets", "Q", "seeds", "validation loss", quality.label, "passes")
    cost = record["cost"]
    lines = (
        "Means and, with ±, their standard errors over seeds. A pass is forward and backward over as many examples as "
        "the training set has; critical path: if every subset had a device of its own.",
        f"The sweep cost {cost['passes']:.2f} passes and {cost['device_s']:.0f} device-seconds in total; a trunk that "
        "trials share is counted in each trial's passes, and once here.",
    )
    return Section(f"Sweep {record['name']}", (*columns, "critical path", ""), rows, lines)


def _before_and_after(record: Record) -> list[Section]:
    """Show each setting's losses and qualities on its own subset, before and after fine-tuning, if recorded."""
    conventional, quality = record.get("baseline"), quality_of(record)
    settings = [setting for setting in (*record["settings"], conventional or {}) if setting.get("own_loss")]
    if not settings:
        return []
    whole = conventional["passes"]["mean"] if conventional and conventional["passes"] else None
    rows = tuple(
        (
            "conventional" if setting is conventional else formatted(setting["subset_size"], "g", none="–"),
            *(_spread(setting[f"{data}_loss"], "{:.4f}".format) for data, _ in _CURVES),
            *(_spread(setting[f"{split}_{quality.name}"], quality.number) for split in ("before", "test")),
            formatted(setting["passes"]["mean"] / whole if whole else None, ".2f", none="–"),
        )
        for setting in settings
    )
    columns = ("subset size", *(f"loss, {label}" for _, label in _CURVES))
    qualities = (f"{quality.label}, before", f"{quality.label}, test")
    lines = (
        "Own: of the minima on their own subsets. Before: of the aggregate before fine-tuning, on the training set and "
        "on validation data. The last column: passes by those of the conventional run. Each run reads test data once; "
        "the recommendation does not use them.",
    )
    return [Section("Before and after fine-tuning", (*columns, *qualities, "passes, times"), rows, lines)]


def _beside_conventional(record: Record) -> list[str]:
    """Compare the recommended setting's passes with those of the conventional runs, in a sentence."""
    number, baseline = record["recommended"], record.get("baseline")
    if number is None or not baseline or not baseline["passes"] or not baseline["validation_loss"]:
        return []
    chosen, whole = record["settings"][number], baseline["passes"]["mean"]
    times = chosen["passes"]["mean"] / whole, chosen["critical_path_passes"]["mean"] / whole
    loss = _spread(baseline["validation_loss"], "{:.4f}".format)
    return [
        f"Conventional training has validation loss {loss} over {baseline['num_seeds']} seed(s) for {whole:.2f} passes"
        f": the recommended size took {times[0]:.2f} times as many, {times[1]:.2f} on the critical path. At equal cost "
        "raysubset compare sets them side by side."
    ]


def _state(setting: Record) -> str:
    """Return the number of seeds: '3', '2, 1 failed'."""
    words = [f"{setting['num_seeds']}"]
    words += [f"{num} {state}" for state in ("pruned", "failed") if (num := setting[f"num_{state}"])]
    return ", ".join(words)


def _spread(value: Record | None, show: Callable[[float], str]) -> str:
    if value is None:
        return "–"
    error = value["standard_error"]
    return show(value["mean"]) + ("" if error is None else f" ± {show(error)}")


def sweep_plot(record: Record) -> Plot | None:
    """Draw loss, quality and passes against subset size and Q, as in arXiv:2410.16523.

    Returns:
        The plot; None if trials of fewer than two sizes have a result.
    """
    settings = [setting for setting in record["settings"] if setting["validation_loss"]]
    if len({setting["subset_size"] for setting in settings}) < 2:
        return None
    num_seeds = statistics.median(setting["num_seeds"] for setting in settings)
    bars = "; bars: standard error over seeds" if num_seeds > 1 else ""
    caption = f"By subset size, n = {num_seeds:g} seeds{bars}; green: recommended; dashed passes: critical path."
    if record.get("baseline"):
        caption += " Grey: conventional training, dotted on test data."
    return Plot("sweep", caption, _draw(record, settings), is_wide=True)


def _draw(record: Record, drawn: Sequence[Record]) -> tuple[Chart, ...]:
    """Draw a line for each combination of the other swept settings; if there is one, before and after fine-tuning."""
    metric, baseline = quality_of(record), record.get("baseline")
    loss, quality, passes = charts = (
        Chart("examples per subset", "loss", log="xy", size=(400, 290)),
        Chart("examples per subset", metric.label, log="x", size=(400, 290)),
        Chart("examples per subset", "passes", log="x", size=(400, 290)),
    )
    lines: dict[str, list[Record]] = {}
    for setting in sorted(drawn, key=lambda setting: setting["subset_size"]):
        others = [f"{key}={value}" for key, value in setting["overrides"].items() if key not in _SIZES]
        lines.setdefault(", ".join(others), []).append(setting)
    curves = _CURVES if len(lines) == 1 else (("validation", "validation"),)
    for number, (label, settings) in enumerate(lines.items()):
        for shade, (data, name) in enumerate(curves):
            title = f"{label} {name}".strip() if len(lines) == 1 else label
            colour = COLOURS[(number + shade) % len(COLOURS)]
            for chart, key, scale in ((loss, "loss", 1.0), (quality, metric.name, metric.scale)):
                _line(chart, settings, f"{data}_{key}", title, colour, scale=scale)
        colour = COLOURS[number % len(COLOURS)]
        _line(passes, settings, "passes", f"{label} passes in total".strip(), colour)
        _line(passes, settings, "critical_path_passes", f"{label} on the critical path".strip(), colour, dash="5 3")
    for chart, key, scale in ((loss, "loss", 1.0), (quality, metric.name, metric.scale)):
        for split, dash in (("validation", ""), ("test", "2 4")):
            if baseline and (value := baseline[f"{split}_{key}"]):
                chart.across(scale * value["mean"], GREY, f"conventional, {split}", dash=dash)
    if baseline and baseline["passes"]:
        passes.across(baseline["passes"]["mean"], GREY, "conventional", dash="")
    if (recommended := record["recommended"]) is not None:
        for chart in charts:
            chart.upright(record["settings"][recommended]["subset_size"], GOOD, alpha=0.3, width=7, dash="")
    ratio = drawn[0]["overdetermination_ratio"] / drawn[0]["subset_size"]
    if all(math.isclose(setting["overdetermination_ratio"], ratio * setting["subset_size"]) for setting in drawn):
        for chart in charts:
            chart.above = ("Q", ratio)
    return charts


def _line(
    chart: Chart, settings: Sequence[Record], key: str, label: str, colour: str, *, scale: float = 1, dash: str = ""
) -> None:
    """Draw a line with error bars over seeds; settings without the value have no point."""
    spreads = [setting.get(key) or {"mean": math.nan, "standard_error": None} for setting in settings]
    values = [scale * spread["mean"] for spread in spreads]
    errors = [scale * (spread["standard_error"] or 0.0) for spread in spreads]
    bars = [(value - error, value + error) for value, error in zip(values, errors, strict=True)] if any(errors) else []
    points = [(setting["subset_size"], value) for setting, value in zip(settings, values, strict=True)]
    chart.line(points, colour, label, marker="o", dash=dash, bars=bars)


def training_of_settings(record: Record, reports: Mapping[str, Record]) -> Plot | None:
    """Draw the training of the settings with the least validation loss, a dozen at most; None if there is no report.

    Args:
        reports: the finished trials' own records, by the trials' names.
    """
    panels = []
    for setting in record["settings"]:
        trials = [trial["name"] for trial in record["trials"] if trial["overrides"] == setting["overrides"]]
        if seeds := [reports[name] for name in trials if name in reports]:
            title = [*(f"{key} = {value}" for key, value in setting["overrides"].items()), f"n = {len(seeds)}"]
            loss = math.inf if setting["validation_loss"] is None else setting["validation_loss"]["mean"]
            panels.append((loss, (", ".join(title), run_stages(seeds))))
    if not panels:
        return None
    limit = sorted(loss for loss, _ in panels)[:_MOST_SETTINGS][-1]
    shown = [panel for loss, panel in panels if loss <= limit][:_MOST_SETTINGS]
    what = "of each setting" if len(shown) == len(panels) else f"of the best {len(shown)} of {len(panels)} settings"
    names = {loss_name(report) for report in reports.values()}
    loss = "loss" if len(names) > 1 else names.pop()
    return training_plot("training_of_settings", what, shown, loss=loss, seeds="the n seeds that finished")
