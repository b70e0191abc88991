"""The plots of a run: its minima, what was made of them, its training curves and where passes and seconds went."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from raysubset.report.figures import Record, finite, is_least_squares, loss_name, passes_by_epoch, trainings
from raysubset.report.plots import BAD, COLOURS, GOOD, Plot, draw_plot, legend_outside, log_where_wide

TRAINING, VALIDATION = COLOURS[0], COLOURS[1]  # of losses on either, in every plot


def minima_losses(record: Record) -> Plot:
    """Of the last round's minima and their aggregate: the loss on what each was trained on, and on validation."""
    last = record["stages"]["rounds"][-1]
    minima, made = last["minima"], last["aggregation"]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        places, end = range(len(minima)), len(minima) + 0.5
        own = [finite(minimum["training"]["loss"]) for minimum in minima]
        held_out = [finite(minimum["validation"]["loss"]) for minimum in minima]
        size = 6 if len(minima) <= 40 else 3
        for place, low, high in zip(places, own, held_out, strict=True):
            axes.plot([place, place], [low, high], color="grey", linewidth=0.8, alpha=0.6, zorder=0)
        axes.plot(places, own, "o", markersize=size, color=TRAINING, label="own subset")
        axes.plot(places, held_out, "s", markersize=size, color=VALIDATION, label="validation")
        whole, aggregate = finite(made["training"]["loss"]), finite(made["validation"]["loss"])
        axes.plot([end], [whole], "D", markersize=6, color=GOOD, label="full set")
        axes.plot([end], [aggregate], "s", markersize=6, color=VALIDATION)
        axes.axhline(aggregate, color=VALIDATION, linestyle=":", linewidth=1)
        ids = [minimum["subset_id"] for minimum in minima]
        step = max(1, round(len(ids) / 8))
        axes.set_xticks([*places[::step], end], [*map(str, ids[::step]), "aggregate"])
        axes.set_xlim(-0.7, end + 0.9)
        log_where_wide(axes, "y", [*own, *held_out, whole, aggregate])
        axes.set_xlabel("subset")
        axes.set_ylabel(loss_name(record))
        axes.grid(True, axis="y")
        legend_outside(figure, axes)

    caption = (
        f"{loss_of_minima(record)} on its own subset and on validation data, and the aggregate's on the training set "
        "(or a sample of it) and on validation data (dotted)."
    )
    return draw_plot("minima", caption, draw)


def _validation_label(record: Record) -> str:
    return "validation loss" if (name := loss_name(record)) == "loss" else f"validation loss, {name}"


def loss_of_minima(record: Record) -> str:
    rounds = record["stages"]["rounds"]
    return "Loss of each subset's minimum" + (f" of round {len(rounds)}" if len(rounds) > 1 else "")


def gap_over_q(record: Record) -> Plot:
    """Of all minima measured: validation loss over own loss against Q; (Q+1)/(Q−1) where the loss is squared error."""
    minima = [minimum for round in record["stages"]["rounds"] for minimum in round["minima"]]
    squared = is_least_squares(record)
    points = [
        (minimum["overdetermination_ratio"], finite(minimum["validation"]["loss"]) / minimum["training"]["loss"])
        for minimum in minima
        if minimum["training"] and minimum["training"]["loss"]
    ]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot([q for q, _ in points], [r for _, r in points], "o", color=TRAINING, alpha=0.7, label="minimum")
        ratios = [q for q, _ in points] or [1.0]
        low, high = 0.7 * min(ratios), 1.4 * max(ratios)
        if squared:
            qs = [max(1.02, low) * (max(1.1, high) / max(1.02, low)) ** (n / 99) for n in range(100)]
            axes.plot(qs, [(q + 1) / (q - 1) for q in qs], color=VALIDATION, label="(Q+1)/(Q−1)")
            axes.set_ylim(0, 1.3 * max([ratio for _, ratio in points] + [(q + 1) / (q - 1) for q in qs if q > 1.2]))
        else:
            axes.set_ylim(0, 1.1 * max([1.0, *(ratio for _, ratio in points)]))
        axes.axhline(1, color="grey", linestyle=":", linewidth=1)
        axes.set_xlim(low, high)
        axes.set_xlabel("Q = examples × outputs / parameters")
        axes.set_ylabel("validation loss / own loss")
        axes.grid(True)
        legend_outside(figure, axes)

    law = (
        " The line is what least squares at its exact minimum and fixed inputs would give: (Q+1)/(Q−1)."
        if squared
        else f" For {loss_name(record).partition(',')[0]} there is no law to draw: (Q+1)/(Q−1) is of least squares."
    )
    what = f"Validation loss of each of {len(points)} minima over the loss on its own subset, by Q; dotted: no gap."
    return draw_plot("gap", what + law, draw)


def aggregation_losses(record: Record) -> Plot:
    """Validation losses of the members, of what was made of them, and of each candidate."""
    made = record["stages"]["rounds"][-1]["aggregation"]
    bars = [
        ("mean member", made["mean_member_loss"], "grey"),
        ("best member", made["best_member"]["loss"], "grey"),
        ("ensemble", made["ensemble"]["loss"], "grey"),
        ("plain mean", made["uniform_mean"]["loss"], COLOURS[0]),
    ]
    bars += [
        (one["method"], one["validation"]["loss"], COLOURS[0])
        for one in made["candidates"]
        if one["validation"] and one["method"] not in (made["method"], "uniform_soup")
    ]
    bars.append((f"taken: {made['method']}", made["validation"]["loss"], GOOD))

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        values = [finite(value) for _, value, _ in bars]
        for place, (value, (*_, colour)) in enumerate(zip(values, bars, strict=True)):
            axes.plot([value], [place], "o", markersize=8, color=colour)
            if math.isfinite(value):
                axes.text(value, place, f"   {value:.4g}", va="center", fontsize=9)
        axes.set_yticks(range(len(bars)), [name for name, *_ in bars])
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.margins(x=0.25)
        axes.set_xlabel(_validation_label(record))
        axes.grid(True)

    caption = (
        "Validation loss of the members and their ensemble (grey), of each way to make one network of them (blue) and "
        f"of the one taken (green). Barrier: {made['barrier']:+.4f}."
        if made["barrier"] is not None
        else "Validation losses of members, ensemble and what was made of them; the plain mean's is not finite."
    )
    return draw_plot("aggregation", caption, draw, size=(5.2, 1.1 + 0.32 * len(bars)))


def rounds_losses(record: Record) -> Plot:
    """Validation loss after each round that was measured."""
    rounds = [round for round in record["stages"]["rounds"] if round["aggregation"]["validation"]]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        numbers = [round["round"] + 1 for round in rounds]
        drawn = [("mean_member_loss", "mean member", COLOURS[7]), ("ensemble", "ensemble", COLOURS[2])]
        for key, label, colour in [*drawn, ("validation", "aggregate", VALIDATION)]:
            values = [round["aggregation"][key] for round in rounds]
            values = [finite(value["loss"] if isinstance(value, dict) else value) for value in values]
            axes.plot(numbers, values, "o-", markersize=4, color=colour, label=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("round")
        axes.set_ylabel(_validation_label(record))
        axes.grid(True)
        legend_outside(figure, axes)

    return draw_plot("rounds", "Validation loss after each round: members, their ensemble, their aggregate.", draw)


def training_curves(record: Record) -> Plot:
    """Loss while training over the passes that lie one after the other: members of a round begin together."""
    num_train = record["data"]["num_train"]
    works = list(trainings(record))
    stages = dict.fromkeys(stage for stage, *_ in works)
    colours = dict(zip(stages, (COLOURS[0], COLOURS[2], COLOURS[3], COLOURS[4]), strict=False))

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        begun, told, losses = 0.0, set(), []
        for (stage, _), group in itertools.groupby(works, key=lambda one: one[:2]):
            ends = [begun]
            many = len(works) > 6 and stage in ("subsets", "subsamples")
            style = {"linewidth": 0.9, "alpha": 0.6} if many else {}
            for *_, work in group:
                passes = [begun + done / work.get("num_workers", 1) for done in passes_by_epoch(work, num_train)]
                values = [finite(epoch["loss"]) for epoch in work["history"]]
                label = None if stage in told else stage.replace("_", " ")
                marker = "." if len(values) < 3 else None
                axes.plot(passes, values, color=colours[stage], label=label, marker=marker, **style)
                measured = [
                    (p, e["validation"]) for p, e in zip(passes, work["history"], strict=True) if e.get("validation")
                ]
                measured = measured or [(p, work["validation"]) for p in passes[-1:] if work["validation"]]
                held_out = [finite(validation["loss"]) for _, validation in measured]
                label = None if "validation" in told else "validation"
                places = [place for place, _ in measured]
                axes.plot(places, held_out, "s:", markersize=3, linewidth=1, color=VALIDATION, label=label)
                told |= {stage, "validation"}
                losses += values + held_out
                ends += passes[-1:]
            begun = max(ends)
        log_where_wide(axes, "y", losses)
        axes.set_xlabel("passes of training, one after the other")
        axes.set_ylabel(loss_name(record))
        axes.grid(True)
        legend_outside(figure, axes)

    caption = (
        "Mean loss of each epoch while training, as the recipe has it (with augmentation and smoothing where set), and "
        "validation loss (squares) where it was measured; the minima of a round run beside one another."
    )
    return draw_plot("training", caption, draw, size=(5.2, 3.9))


def costs_by_stage(record: Record) -> Plot:
    """Passes and device-seconds of each stage."""
    rows = record["cost"]["stages"]
    names = [row["stage"].replace("_", " ") for row in rows]

    def draw(figure: Any) -> None:
        passes, seconds = figure.subplots(1, 2, sharey=True)
        places = range(len(rows))
        bars = [("in total", "passes", COLOURS[0], -0.2), ("critical path", "critical_path_passes", COLOURS[1], 0.2)]
        for label, key, colour, shift in bars:
            passes.barh([p + shift for p in places], [row[key] for row in rows], 0.38, color=colour, label=label)
        seconds.barh(
            [p - 0.2 for p in places], [row["device_s"] for row in rows], 0.38, color=COLOURS[4], label="device"
        )
        seconds.barh([p + 0.2 for p in places], [row["wall_s"] for row in rows], 0.38, color=COLOURS[6], label="wall")
        passes.set_yticks(places, names)
        passes.invert_yaxis()
        for axes, unit in ((passes, "passes"), (seconds, "seconds")):
            axes.set_xlabel(unit)
            axes.grid(True, axis="x")
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, columnspacing=1, handlelength=1)

    caption = "Where the passes and the seconds went: each stage's passes on both clocks, its device and wall seconds."
    return draw_plot("costs", caption, draw, size=(5.2, 1.6 + 0.42 * len(rows)))


def line_plot(record: Record, line: Sequence[Record], subset_ids: Sequence[int]) -> Plot:
    """The loss along the straight line between two minima: line_between_minima()."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        shares, losses = [point["share"] for point in line], [finite(point["loss"]) for point in line]
        axes.plot(shares, losses, "s-", markersize=4, color=VALIDATION, label="on the line")
        axes.plot([0, 1], [losses[0], losses[-1]], ":", color="grey", label="no barrier")
        axes.axvline(0.5, color=BAD, linewidth=0.8, alpha=0.5)
        axes.set_xticks([0, 0.5, 1], [f"subset {subset_ids[0]}", "halfway", f"subset {subset_ids[1]}"])
        axes.set_xlim(-0.15, 1.15)
        axes.set_ylabel(_validation_label(record))
        axes.grid(True)
        legend_outside(figure, axes)

    caption = (
        f"Loss on {line[0]['num_examples']:,} validation examples along the straight line between two minima of the "
        "last round; batch-norm statistics recomputed at each point. A hump is a barrier: their mean lies on it."
    )
    return draw_plot("line", caption, draw)
