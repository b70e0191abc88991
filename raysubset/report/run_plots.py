"""Draw the plots of a run: its story, training curves, minima, aggregates and costs."""

import math
from collections.abc import Sequence
from typing import Any

from raysubset.quality import Quality, quality_of
from raysubset.report.curves import STAGE_COLOURS, VALIDATION
from raysubset.report.drawing import COLOURS, GOOD, GREY, Axis, Chart, Plot
from raysubset.report.figures import Record, finite, in_order, is_least_squares, loss_name

TRAINING = COLOURS[0]  # colour of losses on training data, in every plot
_MOST_MEMBERS = 40  # members that get a mark each in the story


def story(record: Record, rival: Record | None = None) -> Plot | None:
    """Draw validation quality from the trunk to the final model, over sequential passes.

    Args:
        rival: the record of the run to compare with, whose end is drawn as a line.

    Returns:
        The plot; None if fewer than two models were measured.
    """
    quality = quality_of(record)
    chart = Chart("passes of training, one after the other", f"validation {quality.label}", size=(440, 280))
    ends, members = _draw_stages(chart, record, quality)
    if chart.num_values < 2:
        return None
    if len(ends) > 1:
        chart.line(ends, GREY, width=1.2, dash="3 3", is_named=False)
    if rival is not None:
        value = finite(rival["validation"][quality.name])
        chart.across(quality.scale * value, COLOURS[0], _rival_label(rival), dash="7 4", width=2)
    if quality.is_share:
        chart.y.high = min(100.0, chart.y.settled().high)
    chart.x.low = 0
    caption = f"Validation {quality.name} wherever it was measured{f'; dots: {members}' if members else ''}."
    return Plot("story", caption, (chart,))


def _rival_label(rival: Record) -> str:
    return f"{rival['method'].replace('_', ' ')} run, {rival['cost']['passes']:.3g} passes"


def _draw_stages(chart: Chart, record: Record, quality: Quality) -> tuple[list[tuple[float, float]], str]:
    """Draw the measured values; return the points at the stages' ends, and in words what a round's dots are."""
    ends: list[tuple[float, float]] = []
    members = ""
    for stage, round, works, end, passes in in_order(record):
        if stage in ("subsets", "subsamples"):
            if stage == "subsamples" or works[0]["validation"] is None:
                continue
            values = [quality.scale * finite(work["validation"][quality.name]) for work in works]
            mean = sum(values) / len(values)
            if len(works) <= _MOST_MEMBERS:
                members = "each minimum of a round"
                names = [f"subset {work['subset_id']}, round {round + 1}" for work in works]
                places = [(epochs[-1] if epochs else end, value) for epochs, value in zip(passes, values, strict=True)]
                chart.points(places, STAGE_COLOURS["subsets"], "minima", names=names, alpha=0.8)
            else:
                members = "the mean of a round's minima, with the least and the greatest"
                chart.points([(end, mean)], STAGE_COLOURS["subsets"], "minima", bars=[(min(values), max(values))])
            aggregation = record["stages"]["rounds"][round]["aggregation"]
            value = quality.scale * finite((aggregation["validation"] or {}).get(quality.name))
            if len(works) > 1:
                chart.points([(end, value)], VALIDATION, f"aggregate, {aggregation['method']}", marker="D")
            ends += [(end, mean), (end, value)]
            continue
        (work,), (epochs,) = works, passes
        points = [
            (at, quality.scale * finite(epoch["validation"][quality.name]))
            for at, epoch in zip(epochs, work["history"], strict=True)
            if epoch.get("validation")
        ]
        if work["validation"]:  # of the stage's result, which may be an earlier epoch's weights
            points = [point for point in points if point[0] < end]
            points.append((end, quality.scale * finite(work["validation"][quality.name])))
        if points:
            chart.line(points, STAGE_COLOURS[stage], stage.replace("_", " "), marker="s")
            ends += points
    return [point for point in ends if math.isfinite(point[1])], members


def training_curves(record: Record) -> Plot | None:
    """Draw the loss while training over sequential passes; the members of a round begin together."""
    stages = list(in_order(record))
    has_many = sum(len(works) for _, _, works, *_ in stages) > 6
    chart = Chart("passes of training, one after the other", loss_name(record), log="y", size=(400, 270))
    for stage, round, works, _, passes in stages:
        trainings = list(zip(works, passes, strict=True))[:: max(1, len(works) // _MOST_MEMBERS)]
        style: dict[str, Any] = {"width": 1, "alpha": 0.6} if has_many and stage in ("subsets", "subsamples") else {}
        for work, ends in trainings:
            values = [finite(epoch["loss"]) for epoch in work["history"]]
            is_member = "subset_id" in work and len(trainings) > 1
            name = f", subset {work['subset_id']}, round {round + 1}" if is_member else ""
            names = [f"{at:.4g}{name}" for at in ends]
            marker = "." if len(values) < 3 else ""
            label, curve = stage.replace("_", " "), zip(ends, values, strict=True)
            chart.line(curve, STAGE_COLOURS[stage], label, marker=marker, names=names, **style)
            epochs = zip(ends, work["history"], strict=True)
            measured = [(at, epoch["validation"]) for at, epoch in epochs if epoch.get("validation")]
            measured = measured or [(at, work["validation"]) for at in ends[-1:] if work["validation"]]
            losses = [(at, finite(validation["loss"])) for at, validation in measured]
            names = [f"{at:.4g}{name}" for at, _ in measured]
            chart.line(losses, VALIDATION, "validation", marker="s", width=1, dash="2 3", names=names)
    if chart.num_values < 3:
        return None
    caption = (
        "Mean loss of each epoch while training, with the recipe's augmentation and smoothing, and validation loss "
        "(squares) where it was measured; the minima of a round run beside one another."
    )
    return Plot("training", caption, (chart,))


def minima_losses(record: Record) -> Plot | None:
    """Draw the losses of the last round's minima and their aggregate, on their training and on validation data."""
    last = record["stages"]["rounds"][-1]
    minima, aggregation = last["minima"], last["aggregation"]
    if len(minima) < 2:
        return None
    chart = Chart("subset", loss_name(record), log="y")
    places, end = list(range(len(minima))), len(minima) + max(0.5, len(minima) / 40)
    training, validation = (
        [finite(minimum[split]["loss"]) for minimum in minima] for split in ("training", "validation")
    )
    names = [f"{minimum['subset_id']}" for minimum in minima]
    marker = ("o", "s") if len(minima) <= _MOST_MEMBERS else (".", ".")
    chart.points(enumerate(training), TRAINING, "own subset", marker=marker[0], names=names)
    chart.points(enumerate(validation), VALIDATION, "validation", marker=marker[1], names=names)
    loss, validation_loss = (finite(aggregation[split]["loss"]) for split in ("training", "validation"))
    chart.points([(end, loss)], GOOD, "aggregate on the full set", marker="D", names=[""])
    chart.points([(end, validation_loss)], VALIDATION, "validation", marker="s", names=["aggregate"])
    chart.across(validation_loss, VALIDATION)
    step = max(1, round(len(minima) / 6))
    shown = places[::step] if len(minima) <= 8 else places[: -step or None : step]
    chart.x = Axis("subset", ticks=[*((at, names[at]) for at in shown), (end, "mean")], low=-0.7, high=end + 0.7)
    caption = (
        f"{_loss_of_minima(record)} on its own subset and on validation data, and at the right the aggregate's on the "
        "training set (or a sample of it) and on validation data (dotted)."
    )
    return Plot("minima", caption, (chart,))


def _validation_label(record: Record) -> str:
    return "validation loss" if (name := loss_name(record)) == "loss" else f"validation loss, {name}"


def _loss_of_minima(record: Record) -> str:
    rounds = record["stages"]["rounds"]
    return "Loss of each subset's minimum" + (f" of round {len(rounds)}" if len(rounds) > 1 else "")


def gap_over_q(record: Record) -> Plot | None:
    """Draw validation loss over own loss against Q for all measured minima; for squared error also (Q+1)/(Q−1).

    Returns:
        The plot; None if all minima have one Q and there is no law to compare them with.
    """
    minima = [minimum for round in record["stages"]["rounds"] for minimum in round["minima"]]
    has_law = is_least_squares(record)
    points = [
        (minimum["overdetermination_ratio"], minimum["validation"]["loss"] / minimum["training"]["loss"])
        for minimum in minima
        if minimum["training"] and minimum["training"]["loss"] and minimum["validation"]["loss"] is not None
    ]
    ratios = [q for q, _ in points]
    if len(points) < 2 or (max(ratios) < 1.02 * min(ratios) and not has_law):
        return None
    chart = Chart("Q = examples × outputs / parameters", "validation loss / own loss")
    chart.points(points, TRAINING, "minimum", alpha=0.7)
    low, high = 0.7 * min(ratios), 1.4 * max(ratios)
    if has_law:
        qs = [max(1.02, low) * (max(1.1, high) / max(1.02, low)) ** (n / 99) for n in range(100)]
        law = [(q + 1) / (q - 1) for q in qs]
        most = 1.3 * max([ratio for _, ratio in points] + [value for q, value in zip(qs, law, strict=True) if q > 1.2])
        shown = [(q, value) for q, value in zip(qs, law, strict=True) if value <= most]
        chart.line(shown, VALIDATION, "(Q+1)/(Q−1)")
    chart.across(1)
    chart.x.low, chart.x.high, chart.y.low = low, high, 0
    about_law = (
        " The line is the ratio of least squares at its exact minimum and with fixed inputs: (Q+1)/(Q−1)."
        if has_law
        else f" For {loss_name(record).partition(',')[0]} there is no law to draw: (Q+1)/(Q−1) is for least squares."
    )
    caption = f"Validation loss of each of {len(points)} minima over the loss on its own subset, by Q; dotted: no gap."
    return Plot("gap", caption + about_law, (chart,))


def aggregation_losses(record: Record) -> Plot:
    """Draw the validation losses of the members, of their ensemble, of each candidate and of the aggregate."""
    aggregation = record["stages"]["rounds"][-1]["aggregation"]
    method = aggregation["method"]
    rows = [
        ("mean member", aggregation["mean_member_loss"], GREY),
        ("best member", aggregation["best_member"]["loss"], GREY),
        ("ensemble", aggregation["ensemble"]["loss"], GREY),
        ("plain mean", aggregation["uniform_mean"]["loss"], COLOURS[0]),
    ]
    rows += [
        (candidate["method"], candidate["validation"]["loss"], COLOURS[0])
        for candidate in aggregation["candidates"]
        if candidate["validation"] and candidate["method"] not in (method, "uniform_soup")
    ]
    rows.append((f"taken: {method}", aggregation["validation"]["loss"], GOOD))
    chart = Chart(_validation_label(record), "", size=(400, 50 + 22 * len(rows)))
    for place, (name, value, colour) in enumerate(rows):
        chart.points([(finite(value), place)], colour, name, is_named=False)
        if value is not None and math.isfinite(value):
            chart.text(value, place, f"{value:.4g}")
    ticks = [(place, name) for place, (name, *_) in enumerate(rows)]
    chart.y = Axis("", ticks=ticks, low=len(rows) - 0.5, high=-0.5)
    if ends := [value for _, value, _ in rows if value is not None and math.isfinite(value)]:
        chart.x.high = max(ends) + 0.25 * (max(ends) - min(ends) or max(ends))
    caption = (
        "Validation loss of the members and their ensemble (grey), of each way to aggregate them (blue) and of the one "
        f"taken (green). Barrier: {aggregation['barrier']:+.4f}."
        if aggregation["barrier"] is not None
        else "Validation losses of members, ensemble and aggregates; the plain mean's is not finite."
    )
    return Plot("aggregation", caption, (chart,))


def rounds_losses(record: Record) -> Plot | None:
    """Draw the validation loss after each measured round; None if fewer than two were measured."""
    rounds = [round for round in record["stages"]["rounds"] if round["aggregation"]["validation"]]
    if len(rounds) < 2:
        return None
    chart = Chart("round", _validation_label(record), log="y")
    chart.x.is_whole = True
    numbers = [round["round"] + 1 for round in rounds]
    members = [("mean_member_loss", "mean member", GREY), ("ensemble", "ensemble", COLOURS[2])]
    for key, label, colour in [*members, ("validation", "aggregate", VALIDATION)]:
        values = [round["aggregation"][key] for round in rounds]
        losses = [finite(value["loss"] if isinstance(value, dict) else value) for value in values]
        chart.line(zip(numbers, losses, strict=True), colour, label, marker="o" if len(numbers) < 30 else "")
    return Plot("rounds", "Validation loss after each round: members, their ensemble, their aggregate.", (chart,))


def costs_by_stage(record: Record) -> Plot | None:
    """Draw the passes and seconds of each stage; None if there is a single stage."""
    rows = record["cost"]["stages"]
    if len(rows) < 2:
        return None
    ticks = [(place, row["stage"].replace("_", " ")) for place, row in enumerate(rows)]
    charts = []
    of_passes = (("passes in total", "passes"), ("passes on the critical path", "critical_path_passes"))
    for unit, pair, colours in (
        ("passes", of_passes, COLOURS[:2]),
        ("seconds", (("device seconds", "device_s"), ("wall seconds", "wall_s")), (COLOURS[4], COLOURS[6])),
    ):
        chart = Chart(unit, "", size=(300, 46 + 30 * len(rows)))
        for (label, key), colour, shift in zip(pair, colours, (-0.2, 0.2), strict=True):
            for place, row in enumerate(rows):
                tip = f"{ticks[place][1]}\n{label}: {row[key]:.4g}"
                chart.bar(place + shift, 0, row[key], colour, label, height=0.36, tip=tip)
        chart.x.low = 0
        chart.y = Axis("", ticks=ticks, low=len(rows) - 0.5, high=-0.5)
        charts.append(chart)
    caption = "Where the passes and the seconds went: each stage's passes on both clocks, its device and wall seconds."
    return Plot("costs", caption, tuple(charts))


def line_plot(record: Record, line: Sequence[Record], subset_ids: Sequence[int]) -> Plot:
    """Draw the loss along the straight line between two minima, which line_between_minima() measured."""
    chart = Chart("", _validation_label(record), log="y")
    shares, losses = [point["share"] for point in line], [finite(point["loss"]) for point in line]
    chart.line([(0, losses[0]), (1, losses[-1])], GREY, "no barrier", dash="2 4")
    names = [f"{share:.0%} of subset {subset_ids[1]}" for share in shares]
    chart.line(zip(shares, losses, strict=True), VALIDATION, "on the line", marker="s", names=names)
    ticks = [(0, f"subset {subset_ids[0]}"), (0.5, "halfway"), (1, f"subset {subset_ids[1]}")]
    chart.x = Axis("", ticks=ticks, low=-0.12, high=1.12)
    caption = (
        f"Loss on {line[0]['num_examples']:,} validation examples along the straight line between two minima of the "
        "last round; batch-norm statistics recomputed at each point. A hump is a barrier: their mean lies on it."
    )
    return Plot("line", caption, (chart,))
