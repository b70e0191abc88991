"""Draw the plots of a run: its story, minima, aggregates and costs."""

import math
from collections.abc import Sequence

from raysubset.quality import quality_of
from raysubset.report.curves import MARKERS, STAGE_COLOURS, VALIDATION, draw_curve, run_stages
from raysubset.report.drawing import COLOURS, GREY, Axis, Chart, Plot
from raysubset.report.figures import Record, finite, is_least_squares, loss_name

TRAINING = COLOURS[0]  # colour of losses on training data, in every plot


def story(record: Record, rival: Record | None = None) -> Plot | None:
    """Draw validation quality from the trunk to the final model, over sequential passes, with a rival run's end.

    Return None if fewer than two models were measured.
    """
    quality = quality_of(record)
    chart = Chart("passes of training, one after the other", f"validation {quality.label}", size=(440, 280))
    stages = run_stages([record], lambda metrics: quality.scale * finite(metrics[quality.name]))
    stages = [stage for stage in stages if stage.name != "subsamples"]
    points = [point[:2] for stage in stages for point in stage.validation if math.isfinite(point[1])]
    if len(points) < 2:
        return None
    chart.line(points, GREY, width=1.2, dash="3 3")
    for stage in stages:
        label = {"subsets": "mean of the minima", "aggregation": "aggregate"}.get(stage.name, stage.name)
        marker = MARKERS.get(stage.name, "s")
        draw_curve(chart, stage.validation, STAGE_COLOURS[stage.name], label.replace("_", " "), marker=marker)
    if rival is not None:
        label = f"{rival['method'].replace('_', ' ')} run, {rival['cost']['passes']:.3g} passes"
        value = quality.scale * finite(rival["validation"][quality.name])
        chart.across(value, COLOURS[0], label, dash="7 4", width=2)
    chart.x.low = 0
    caption = f"Validation {quality.name} wherever it was measured; bars: the least and the greatest of the minima."
    return Plot(caption, (chart,))


def minima_losses(record: Record) -> Plot | None:
    """Draw the losses of the last round's minima and their aggregate, on their training and on validation data."""
    rounds = record["stages"]["rounds"]
    minima, aggregation = rounds[-1]["minima"], rounds[-1]["aggregation"]
    if len(minima) < 2:
        return None
    chart, num = Chart("subset", loss_name(record), log="y"), len(minima)
    places, names = [*range(num), 1.025 * num + 0.5], [*(f"{minimum['subset_id']}" for minimum in minima), "aggregate"]
    for split, colour, label in (("training", TRAINING, "own data"), ("validation", VALIDATION, "validation")):
        losses = [finite(work[split]["loss"]) for work in (*minima, aggregation)]
        marker = "o" if num <= 40 else "."
        chart.line(zip(places, losses, strict=True), colour, label, marker=marker, width=0, names=names)
        chart.across(losses[-1], colour)
    step = max(1, round(num / 6))
    ticks = list(zip(places, names, strict=True))
    chart.x = Axis("subset", ticks=[*ticks[:num:step], (places[-1], "all")], low=-0.7, high=places[-1] + 0.7)
    caption = (
        f"Loss of each minimum of round {len(rounds)} on its own subset and on validation data; at the right and "
        "dotted the aggregate's, on the training set (or a sample of it) and on validation data."
    )
    return Plot(caption, (chart,))


def gap_over_q(record: Record) -> Plot | None:
    """Draw validation loss over own loss against Q for all measured minima; for squared error also (Q+1)/(Q−1).

    Return None if all minima have one Q and there is no law to compare them with.
    """
    points = [
        (minimum["overdetermination_ratio"], minimum["validation"]["loss"] / minimum["training"]["loss"])
        for round in record["stages"]["rounds"]
        for minimum in round["minima"]
        if minimum["training"] and minimum["training"]["loss"] and minimum["validation"]["loss"] is not None
    ]
    ratios, has_law = [q for q, _ in points], is_least_squares(record)
    if len(points) < 2 or (max(ratios) < 1.02 * min(ratios) and not has_law):
        return None
    chart = Chart("Q = examples × outputs / parameters", "validation loss / own loss")
    chart.line(points, TRAINING, "minimum", marker="o", width=0, alpha=0.7)
    chart.across(1)
    low, high = 0.7 * min(ratios), 1.4 * max(ratios)
    chart.x.low, chart.x.high, chart.y.low = low, high, 0
    about_law = f" For {loss_name(record).partition(',')[0]} there is no law to draw: (Q+1)/(Q−1) is for least squares."
    if has_law:
        low, high = max(1.2, low), max(1.3, high)
        qs = [low * (high / low) ** (n / 99) for n in range(100)]
        chart.line([(q, (q + 1) / (q - 1)) for q in qs], VALIDATION, "(Q+1)/(Q−1)")
        about_law = " The line is the ratio of least squares at its exact minimum and with fixed inputs: (Q+1)/(Q−1)."
    caption = f"Validation loss of each of {len(points)} minima over the loss on its own subset, by Q; dotted: no gap."
    return Plot(caption + about_law, (chart,))


def line_plot(record: Record, line: Sequence[Record], subset_ids: Sequence[int]) -> Plot:
    """Draw the loss along the straight line between two minima, which line_between_minima() measured."""
    loss = loss_name(record)
    chart = Chart("", "validation loss" if loss == "loss" else f"validation loss, {loss}", log="y")
    losses = [(point["share"], finite(point["loss"])) for point in line]
    chart.line([losses[0], losses[-1]], GREY, "no barrier", dash="2 4")
    names = [f"{share:.0%} of subset {subset_ids[1]}" for share, _ in losses]
    chart.line(losses, VALIDATION, "on the line", marker="s", names=names)
    ticks = [(0, f"subset {subset_ids[0]}"), (0.5, "halfway"), (1, f"subset {subset_ids[1]}")]
    chart.x = Axis("", ticks=ticks, low=-0.12, high=1.12)
    caption = (
        f"Loss on {line[0]['num_examples']:,} validation examples along the straight line between two minima of the "
        "last round; batch-norm statistics recomputed at each point. A hump is a barrier: their mean lies on it."
    )
    return Plot(caption, (chart,))
