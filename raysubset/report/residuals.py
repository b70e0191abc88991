"""How far a regression's predictions are from the truth on the test split, from test_predictions.parquet."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from raysubset.report.page import Section
from raysubset.report.plots import BAD, COLOURS, Plot, draw_plot

_MOST_OUTPUTS = 6  # that are drawn
_MOST_POINTS = 2000  # of each
_MOST_WORST = 10


def outputs_of(predictions: pa.Table) -> list[str]:
    """Suffixes of the columns target… and prediction…: "" of a single output, "_0", "_1" of several; [] of others."""
    names = predictions.column_names
    suffixes = [name.removeprefix("target") for name in names if name.startswith("target")]
    return [suffix for suffix in suffixes if f"prediction{suffix}" in names]


def residuals_plot(predictions: pa.Table, outputs: Sequence[str]) -> Plot:
    """Prediction over truth, a panel an output, with the line on which both are equal."""
    drawn = outputs[:_MOST_OUTPUTS]
    columns = min(3, len(drawn))
    shown = np.linspace(0, len(predictions) - 1, min(len(predictions), _MOST_POINTS)).astype(int)

    def draw(figure: Any) -> None:
        grid = figure.subplots(math.ceil(len(drawn) / columns), columns, squeeze=False).flat
        for suffix, axes in zip(drawn, grid, strict=False):
            target, prediction = (values[shown] for values in _pair(predictions, suffix))
            ends = [np.nanmin(target), np.nanmax(target)]
            axes.plot(ends, ends, ":", color=BAD, linewidth=1.2)
            axes.plot(target, prediction, ".", color=COLOURS[0], alpha=0.5, markersize=5)
            axes.set_xlabel(f"truth{suffix.replace('_', ' ')}")
            axes.set_ylabel("prediction")
            axes.grid(True)
        for axes in grid:  # that are left
            axes.remove()

    left_out = len(outputs) - len(drawn)
    caption = (
        f"Predictions of the final model over the truth, {len(shown):,} of {len(predictions):,} test examples; dotted: "
        f"where both are equal.{f' {left_out} further outputs are left out.' if left_out else ''}"
    )
    size = (5.2, 4.2) if columns == 1 else (3.3 * columns, 3.3 * math.ceil(len(drawn) / columns))
    return draw_plot("residuals", caption, draw, size=size, wide=columns > 1)


def worst_predictions(predictions: pa.Table, outputs: Sequence[str]) -> Section:
    """The test examples with the largest errors; of several outputs, in units of each target's standard deviation."""
    pairs = [_pair(predictions, suffix) for suffix in outputs]
    errors = np.stack([prediction - target for target, prediction in pairs], axis=1)
    spreads = np.array([np.nanstd(target) or 1.0 for target, _ in pairs]) if len(outputs) > 1 else 1.0
    sizes = np.where(np.isfinite(errors), np.abs(errors) / spreads, np.inf)
    worst = np.argsort(-sizes.max(axis=1), kind="stable")[:_MOST_WORST]
    rows = []
    for place in map(int, worst):
        output = int(sizes[place].argmax())
        target, prediction = (values[place] for values in pairs[output])
        name = (outputs[output].removeprefix("_"),) if len(outputs) > 1 else ()
        values = (f"{value:.6g}" for value in (target, prediction))
        rows.append((f"{predictions.column('row')[place]}", *name, *values, f"{errors[place, output]:+.4g}"))
    columns = ("row", *(("output",) if len(outputs) > 1 else ()), "truth", "prediction", "error")
    unit = ", in units of each output's spread" if len(outputs) > 1 else ""
    lines = (
        f"The {len(rows)} of {len(predictions):,} test examples with the largest errors{unit}, by their row in the "
        "source. Some of the truth may be wrong.",
    )
    return Section("Where it is furthest off", columns, tuple(rows), lines)


def _pair(predictions: pa.Table, suffix: str) -> tuple[np.ndarray, np.ndarray]:
    target, prediction = (predictions.column(f"{name}{suffix}").to_numpy() for name in ("target", "prediction"))
    return target.astype(float), prediction.astype(float)
