"""What a finished sweep tells: its table, its plot, and the recommendation."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from raysubset.quality import quality_of
from raysubset.report.figures import Record
from raysubset.report.page import Section
from raysubset.report.plots import GOOD, Plot, draw_plot, log_where_wide

_SIZES = ("subsets.size", "subsets.fraction", "subsets.num")  # told by the subset size itself


def sweep_sections(record: Record) -> list[Section]:
    """What a user reads of a sweep: a row a setting, the trials without a result, and the recommendation."""
    parts = [_settings(record)]
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
    """Loss, quality, passes and Q against subset size; None if no trial has a result."""
    drawn = [setting for setting in record["settings"] if setting["validation_loss"]]
    if not drawn:
        return None
    num_seeds = statistics.median(setting["num_seeds"] for setting in drawn)
    bars = "; bars: standard error over seeds" if num_seeds > 1 else ""
    caption = f"By subset size, n = {num_seeds:g} seeds{bars}; green: recommended; dashed passes: critical path."
    return draw_plot("sweep", caption, lambda figure: _draw(figure, record, drawn), size=(9.0, 6.4), wide=True)


def _draw(figure: Any, record: Record, drawn: Sequence[Record]) -> None:
    """A line for each combination of what else was swept."""
    axes, of = figure.subplots(2, 2, sharex=True).flat, quality_of(record)
    lines: dict[str, list[Record]] = {}
    for setting in sorted(drawn, key=lambda one: one["subset_size"]):
        others = [f"{key}={value}" for key, value in setting["overrides"].items() if key not in _SIZES]
        lines.setdefault(", ".join(others), []).append(setting)
    loss, quality, passes, ratio = axes
    for label, settings in lines.items():
        sizes = [setting["subset_size"] for setting in settings]
        _line(loss, sizes, settings, "validation_loss", label)
        _line(quality, sizes, settings, f"validation_{of.name}", label, scale=of.scale)
        total = _line(passes, sizes, settings, "passes", f"{label} total".strip())
        _line(passes, sizes, settings, "critical_path_passes", f"{label} critical path".strip(), like=total)
    ratios = {setting["subset_size"]: setting["overdetermination_ratio"] for setting in drawn}
    ratio.plot(list(ratios), list(ratios.values()), "o-")
    ratio.axhline(1, color="grey", linestyle=":", label="below, a subset does not determine the network")
    if (chosen := record["recommended"]) is not None:
        for axis in (loss, quality, passes, ratio):
            axis.axvline(record["settings"][chosen]["subset_size"], color=GOOD, alpha=0.3, linewidth=6, zorder=0)
    titles = ("validation loss", f"validation {of.label}", "passes", "Q")
    for axis, title in zip((loss, quality, passes, ratio), titles, strict=True):
        axis.set_title(title)
        axis.grid(True)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
    for axis in (passes, ratio):
        axis.set_xlabel("examples per subset")
        log_where_wide(axis, "x", list(ratios))


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
    spreads = [setting[key] or {"mean": math.nan, "standard_error": None} for setting in settings]  # of a quality
    values = [scale * spread["mean"] for spread in spreads]
    errors = [scale * (spread["standard_error"] or 0.0) for spread in spreads]
    style = {} if like is None else {"linestyle": "--", "color": like}
    line = axis.errorbar(sizes, values, errors, marker="o", capsize=3, label=label or None, **style)
    return line[0].get_color()
