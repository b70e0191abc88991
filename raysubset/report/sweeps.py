"""What a finished sweep tells: its table, its plot, and the recommendation."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from raysubset.quality import quality_of
from raysubset.report.figures import Record
from raysubset.report.page import Section
from raysubset.report.plots import GOOD, Plot, draw_plot, legend_outside, log_where_wide

# What losses and qualities are of, in the order of training, and what it is called
_CURVES = (
    ("own", "own subset"),
    ("full_set", "training set, before"),
    ("before", "validation, before"),
    ("validation", "validation, after"),
    ("test", "test, after"),
)
_SIZES = ("subsets.size", "subsets.fraction", "subsets.num")  # told by the subset size itself


def sweep_sections(record: Record) -> list[Section]:
    """What a user reads of a sweep: a row a setting, what fine-tuning did, trials without a result, and the
    recommendation."""
    parts = [_settings(record), *_before_and_after(record)]
    if lost := [trial for trial in record["trials"] if trial["state"] != "done"]:
        rows = tuple((trial["name"], trial["state"], trial.get("error", "fell behind others")) for trial in lost)
        parts.append(Section("Trials without a result", ("trial", "state", ""), rows))
    parts.append(Section("What this tells", lines=(record["recommendation"],)))
    return parts


def _settings(record: Record) -> Section:
    others, quality = [key for key in record["space"] if key not in _SIZES], quality_of(record)
    rows = tuple(
        (
            _number(setting["subset_size"] or setting["overrides"].get("subsets.size"), "g"),
            *(f"{setting['overrides'][key]}" for key in others),
            _number(setting["num_subsets"], "g"),
            _number(setting["overdetermination_ratio"], ".2f"),
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
    """Losses and qualities of each setting on its own subset, before and after fine-tuning; nothing where a sweep of
    before has none."""
    settings, quality = [one for one in _with_baseline(record) if one.get("own_loss")], quality_of(record)
    if not settings:
        return []
    conventional = record.get("baseline")
    whole = conventional["passes"]["mean"] if conventional and conventional["passes"] else None
    rows = tuple(
        (
            "conventional" if setting is conventional else _number(setting["subset_size"], "g"),
            *(_spread(setting[f"{where}_loss"], "{:.4f}".format) for where, _ in _CURVES),
            *(_spread(setting[f"{where}_{quality.name}"], quality.number) for where in ("before", "test")),
            _number(setting["passes"]["mean"] / whole if whole else None, ".2f"),
        )
        for setting in settings
    )
    columns = ("subset size", *(f"loss, {label}" for _, label in _CURVES))
    qualities = (f"{quality.label}, before", f"{quality.label}, test")
    lines = (
        "Own: of the minima on their subsets, over the last epoch. Before: the aggregate before fine-tuning, on the "
        "training set and on validation data. Share: of the conventional run's passes. Test data are read once a run; "
        "the recommendation does not read them.",
    )
    return [Section("Before and after fine-tuning", (*columns, *qualities, "share of passes"), rows, lines)]


def _with_baseline(record: Record) -> list[Record]:
    """The settings that have a result, and the conventional run where there is one."""
    baseline = record.get("baseline")
    return [*record["settings"], *([baseline] if baseline else [])]


def _state(setting: Record) -> str:
    """'3', '2, 1 failed'."""
    words = [f"{setting['num_seeds']}"]
    words += [f"{num} {state}" for state in ("pruned", "failed") if (num := setting[f"num_{state}"])]
    return ", ".join(words)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _spread(value: Record | None, show: Callable[[float], str]) -> str:
    if value is None:
        return "–"
    error = value["standard_error"]
    return show(value["mean"]) + ("" if error is None else f" ± {show(error)}")


def sweep_plot(record: Record) -> Plot | None:
    """Loss, quality and passes against subset size and Q, as in arXiv:2410.16523; None if no trial has a result."""
    drawn = [setting for setting in record["settings"] if setting["validation_loss"]]
    if not drawn:
        return None
    num_seeds = statistics.median(setting["num_seeds"] for setting in drawn)
    bars = "; bars: standard error over seeds" if num_seeds > 1 else ""
    caption = f"By subset size, n = {num_seeds:g} seeds{bars}; green: recommended; dashed passes: critical path."
    if record.get("baseline"):
        caption += " Grey: conventional training, dotted on test data."
    return draw_plot("sweep", caption, lambda figure: _draw(figure, record, drawn), size=(9.0, 3.8), wide=True)


def _draw(figure: Any, record: Record, drawn: Sequence[Record]) -> None:
    """A line for each combination of what else was swept; of a single one, before and after fine-tuning."""
    loss, quality, passes = panels = figure.subplots(1, 3)
    of, baseline = quality_of(record), record.get("baseline")
    lines: dict[str, list[Record]] = {}
    for setting in sorted(drawn, key=lambda one: one["subset_size"]):
        others = [f"{key}={value}" for key, value in setting["overrides"].items() if key not in _SIZES]
        lines.setdefault(", ".join(others), []).append(setting)
    curves = _CURVES if len(lines) == 1 else (("validation", "validation"),)
    for label, settings in lines.items():
        sizes = [setting["subset_size"] for setting in settings]
        for where, name in curves:
            title = f"{label} {name}".strip() if len(lines) == 1 else label
            for axis, key, scale in ((loss, "loss", 1.0), (quality, of.name, of.scale)):
                if any(setting.get(f"{where}_{key}") for setting in settings):
                    _line(axis, sizes, settings, f"{where}_{key}", title, scale=scale)
        total = _line(passes, sizes, settings, "passes", f"{label} total".strip())
        _line(passes, sizes, settings, "critical_path_passes", f"{label} critical path".strip(), like=total)
    for axis, key, scale in ((loss, "loss", 1.0), (quality, of.name, of.scale)):
        for where, style in (("validation", "-"), ("test", ":")):
            if baseline and (value := baseline[f"{where}_{key}"]):
                axis.axhline(scale * value["mean"], color="grey", linestyle=style)
    if baseline and baseline["passes"]:
        passes.axhline(baseline["passes"]["mean"], color="grey", label="conventional")
    if (chosen := record["recommended"]) is not None:
        for axis in panels:
            axis.axvline(record["settings"][chosen]["subset_size"], color=GOOD, alpha=0.3, linewidth=6, zorder=0)
    ratio = drawn[0]["overdetermination_ratio"] / drawn[0]["subset_size"]
    one_ratio = all(math.isclose(one["overdetermination_ratio"], ratio * one["subset_size"]) for one in drawn)
    sizes = [setting["subset_size"] for setting in drawn]
    for axis, title in zip(panels, ("loss", of.label, "passes"), strict=True):
        axis.set_title(title)
        axis.grid(True)
        axis.set_xlabel("examples per subset")
        log_where_wide(axis, "x", sizes)
        if one_ratio:
            above = axis.secondary_xaxis("top", functions=(lambda size: size * ratio, lambda q: q / ratio))
            above.set_xlabel("Q")
            log_where_wide(above, "x", [size * ratio for size in sizes])
    log_where_wide(loss, "y", [value for where, _ in curves for value in _values(drawn, f"{where}_loss")])
    legend_outside(figure, loss, columns=5)
    passes.legend(fontsize="small")


def _values(settings: Sequence[Record], key: str) -> list[float]:
    return [setting[key]["mean"] for setting in settings if setting.get(key)]


def _line(
    axis: Any,
    sizes: Sequence[float],
    settings: Sequence[Record],
    key: str,
    label: str,
    *,
    scale: float = 1,
    like: Any = None,
) -> Any:
    """A line with error bars; dashed and in the colour of another where it belongs to that."""
    spreads = [setting.get(key) or {"mean": math.nan, "standard_error": None} for setting in settings]  # of a quality
    values = [scale * spread["mean"] for spread in spreads]
    errors = [scale * (spread["standard_error"] or 0.0) for spread in spreads]
    style = {} if like is None else {"linestyle": "--", "color": like}
    line = axis.errorbar(sizes, values, errors, marker="o", capsize=3, label=label or None, **style)
    return line[0].get_color()
