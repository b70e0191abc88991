"""The page at the end of a run: tables of what was measured and paid, and what they tell."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from raysubset.config import Config
from raysubset.costs import bytes_in_words
from raysubset.errors import listed
from raysubset.events import Note
from raysubset.quality import Quality, quality_of
from raysubset.report.figures import (
    Record,
    finite,
    is_least_squares,
    mean_metrics,
    standard_error,
    trained_passes,
    with_error,
)
from raysubset.report.findings import findings, next_commands

MOST_ROWS = 12  # minima or rounds that get a row each

_NUMBER = re.compile(r"[-+±–…]?\d[\d.,]*\b.*|[-–…]?|not finite")
_TEXT = re.compile(r"[A-Za-z]{4,}")

Line = str | Note  # a str may be Preformatted


@dataclass(frozen=True)
class Section:
    """A table, lines of text, or a table with lines below it."""

    title: str
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    lines: tuple[Line, ...] = ()
    subject: str = ""  # what it is about, by which a page puts plots beside it; a title may carry numbers

    @property
    def numeric(self) -> frozenset[int]:
        """The columns that hold numbers alone, and so are set flush right."""
        columns = enumerate(zip(*self.rows, strict=True))
        return frozenset(number for number, cells in columns if number and all(map(_is_number, cells)))


def _is_number(cell: str) -> bool:
    return _NUMBER.fullmatch(cell.strip()) is not None and not _TEXT.search(cell)


def sections(record: Record) -> list[Section]:
    """What a user reads of a finished run: the result, what each stage reached and cost, and what this tells."""
    parts = [_result(record), _final_model(record), _stages(record)]
    rounds = record["stages"].get("rounds") or []
    if rounds:
        if len(rounds) > 1:
            parts.append(_rounds(rounds, quality_of(record)))
        parts += [_minima(record, rounds), _aggregation(record, rounds[-1])]
        if rounds[-1]["aggregation"]["candidates"]:
            parts.append(_candidates(rounds[-1]["aggregation"], quality_of(record)))
    parts.append(_costs(record))
    parts.append(Section("What this tells", lines=tuple(findings(record))))
    parts.append(Section("Next", lines=tuple(next_commands(record))))
    return parts


def _result(record: Record) -> Section:
    test, cost, model = record["test"], record["cost"], record["model"]
    sentence = (
        f"Test {_counted(test, quality_of(record))}, loss {_number(test['loss'])}, with {model['name']} of "
        f"{model['num_parameters']:,} parameters, for {cost['passes']:.2f} passes over the training set in total, "
        f"{cost['critical_path_passes']:.2f} of them on the critical path."
    )
    return Section(record["name"], lines=(sentence,))


def _final_model(record: Record) -> Section:
    quality = quality_of(record)
    rows = tuple(
        (name, f"{metrics['num_examples']:,}", _number(metrics["loss"]), _counted(metrics, quality, quality.cell))
        for name, metrics in (
            ("test, read once at the end", record["test"]),
            ("validation, read for every choice", record["validation"]),
        )
    )
    lines = list(map(Note.from_json, record["data"]["notes"]))
    if others := list(_other_values(record["test"], quality)):
        lines.insert(0, Note(f"On test data also: {', '.join(others)}."))
    error = "" if standard_error(record["test"], quality) is None else " ± standard error"
    columns = ("on", "examples", "loss", f"{quality.heading}{error}")
    return Section("Final model", columns, rows, tuple(lines), "final_model")


def _other_values(metrics: Record, quality: Quality) -> Iterator[str]:
    """What the metrics tell beside loss, quality, sums and errors: 'rmse 53.2'."""
    for key, value in metrics.items():
        is_known = key in ("loss", quality.name) or key.startswith("num_") or key.endswith(("_sum", "_error"))
        if isinstance(value, int | float) and not is_known:
            yield f"{key.replace('_', ' ')} {value:.4g}"


def _stages(record: Record) -> Section:
    stages, rounds, quality = record["stages"], record["stages"].get("rounds") or [], quality_of(record)
    cost = {row["stage"]: row for row in record["cost"]["stages"]}
    rows: list[tuple[str, ...]] = []
    measured = ("loss", quality.name)

    def add(name: str, training: Any, validation: Any, costs: str | None = None) -> None:
        paid = ("",) * 4
        if costs in cost:
            row = cost[costs]
            paid = tuple(f"{row[key]:.2f}" for key in ("passes", "critical_path_passes"))
            paid += tuple(f"{row[key]:.1f}" for key in ("device_s", "wall_s"))
        rows.append((name, *_pair(training, quality), *_pair(validation, quality), *paid))

    for stage in ("conventional", "trunk"):
        if work := stages.get(stage):
            add(stage, work["training"], work["validation"], stage)
    if rounds:
        minima, made = rounds[-1]["minima"], rounds[-1]["aggregation"]
        count = "" if len(minima) == 1 else f", mean of {len(minima)}"
        splits = [[minimum[split] for minimum in minima] for split in ("training", "validation")]
        training, validation = (mean_metrics(own, quality) for own in splits)
        add(f"subsets{count}", training, validation, "subsets")
        if len(minima) > 1:
            for name, pick in (("least", min), ("greatest", max)):
                training, validation = ({k: pick(finite(one[k]) for one in own) for k in measured} for own in splits)
                add(f"  {name}", training, validation)
        add(f"aggregate, {made['method']}", made["training"], made["validation"], "aggregation")
        if len(minima) > 1:
            add("  ensemble, for reference", None, made["ensemble"])
    if work := stages.get("fine_tuning"):
        add("fine_tuning", work["training"], work["validation"], "fine_tuning")
    add("test", None, None, "test")
    if "measuring" in cost:
        add("measuring of speeds", None, None, "measuring")
    lines = [
        "A pass is forward and backward over as many examples as the training set has, forward alone "
        f"{record['model']['forward_share']:.2f} of one in this network. "
        "Critical path: if every subset had a device of its own; of n workers each makes 1/n."
    ]
    if rounds:
        lines.append(
            "Training columns: subsets on their own examples, the others on the training set or a sample of it; all "
            "without augmentation."
        )
    if len(rounds) > 1:
        lines.insert(0, f"Costs are of all rounds, what was measured is of round {len(rounds)}.")
    columns = ("stage", "training loss", quality.heading, "validation loss", quality.heading, "passes", "critical path")
    return Section("Stages", (*columns, "device s", "wall s"), tuple(rows), tuple(lines), "stages")


def _rounds(rounds: Sequence[Record], quality: Quality) -> Section:
    rows = []
    measured = [round for round in rounds if round["aggregation"]["validation"]]
    for round in measured[-MOST_ROWS:]:
        made = round["aggregation"]
        rows.append(
            (
                f"{round['round'] + 1}",
                _number(made["mean_member_loss"]),
                quality.cell(made[f"mean_member_{quality.name}"]),
                *_pair(made["ensemble"], quality),
                *_pair(made["validation"], quality),
                _number(made["barrier"], "+.4f"),
            )
        )
    lines = []
    if left_out := len(measured) - len(rows):
        lines.append(f"The first {left_out} of the rounds that were measured are in report.json.")
    if unmeasured := len(rounds) - len(measured):
        lines.append(f"{unmeasured} of {len(rounds)} rounds were not measured, as rounds.evaluate_every asked.")
    names = [name for of in ("mean member", "ensemble", "aggregate") for name in (of, quality.heading)]
    title = f"Rounds, validation loss and {quality.name}"
    return Section(title, ("round", *names, "barrier"), tuple(rows), tuple(lines), "rounds")


def _minima(record: Record, rounds: Sequence[Record]) -> Section:
    minima, quality = rounds[-1]["minima"], quality_of(record)
    squared = is_least_squares(record)
    columns = ("subset", "Q", "examples", "own loss", "validation loss", "gap", quality.heading, "ended by")
    if squared:
        columns += ("validation / own loss", "(Q+1)/(Q-1)")
    if len(minima) <= MOST_ROWS:
        rows = [_minimum_row(f"{m['subset_id']}", _figures(m, quality), squared, quality) for m in minima]
        for index, minimum in enumerate(minima):
            rows[index] = (*rows[index][:7], minimum["outcome"], *rows[index][7:])
    else:
        figures = [_figures(minimum, quality) for minimum in minima]
        outcomes = ", ".join(f"{num} × {name}" for name, num in Counter(m["outcome"] for m in minima).items())
        rows = []
        for name, pick in (("mean", fmean), ("least", min), ("greatest", max)):
            picked = [pick(values) for values in zip(*figures, strict=True)]
            row = _minimum_row(f"{name} of {len(minima)}", picked, squared, quality)
            rows.append((*row[:7], outcomes if name == "mean" else "", *row[7:]))
    title = "Minima" if len(rounds) == 1 else f"Minima of round {len(rounds)}"
    lines = [
        "The gap is validation loss less the loss on the minimum's own subset, both measured without augmentation."
    ]
    if slots := record["decisions"].get("slots"):
        speeds = ", ".join(
            f"{kind} {speed:.4g}" for kind, speed in {slot["kind"]: slot["speed"] for slot in slots}.items()
        )
        lines.append(
            f"Sizes are by the speed of the nodes ({speeds}), so that all finish together; the critical path counts "
            "passes, as if all were equally fast."
        )
    if squared:
        lines.append(
            "(Q+1)/(Q-1) is what least squares at its exact minimum and fixed inputs would give for the ratio; "
            "a network stopped before its minimum need not."
        )
    return Section(title, columns, tuple(rows), tuple(lines), "minima")


def _figures(minimum: Record, quality: Quality) -> list[float]:
    """Q, examples, own loss, validation loss, gap, quality, ratio of the losses, what least squares would give."""
    own, held_out = finite(minimum["training"]["loss"]), finite(minimum["validation"]["loss"])
    q = minimum["overdetermination_ratio"]
    ratio = held_out / own if own else float("inf")
    law = (q + 1) / (q - 1) if q > 1 else float("inf")
    reached = finite(minimum["validation"][quality.name])
    return [q, minimum["num_examples"], own, held_out, held_out - own, reached, ratio, law]


def _minimum_row(name: str, figures: Sequence[float], squared: bool, quality: Quality) -> tuple[str, ...]:
    q, num, own, held_out, gap, reached, ratio, law = figures
    row = (name, f"{q:.2f}", f"{num:.0f}", f"{own:.4f}", f"{held_out:.4f}", f"{gap:+.4f}", quality.cell(reached))
    return (*row, f"{ratio:.2f}", f"{law:.2f}" if law != float("inf") else "none: Q ≤ 1") if squared else row


def _aggregation(record: Record, last: Record) -> Section:
    made, minima, quality = last["aggregation"], last["minima"], quality_of(record)
    has_outer_step = Config.from_dict(record["config"]).rounds.has_outer_step()
    rows = [
        ("best member", *_pair(made["best_member"], quality)),
        ("mean member", _number(made["mean_member_loss"]), quality.cell(made[f"mean_member_{quality.name}"])),
        ("ensemble of predictions", *_pair(made["ensemble"], quality)),
    ]
    if made["method"] != "uniform_soup" or has_outer_step:
        rows.append(("plain mean of all", *_pair(made["uniform_mean"], quality)))
    step = ", then the outer step" if has_outer_step else ""
    rows.append((f"aggregate: {made['method']}{step}", *_pair(made["validation"], quality)))
    members = ", ".join(map(str, made["subset_ids"]))
    used = f"Members: {members} ({len(made['subset_ids'])} of {len(minima)})"
    if len(set(made["coefficients"])) > 1:
        used += ", weighted " + ", ".join(f"{share:.3f}" for share in made["coefficients"])
    if made["tried"]:
        used += f"; {len(made['tried'])} candidates were scored on validation data"
    barrier = f"Barrier (loss of the plain mean less mean loss): {_number(made['barrier'], '+.4f')}."
    lines: list[Line] = [f"{used}. {barrier}"]
    if aligned := made["alignment"]:
        before, after = (_number(aligned[key], "+.4f") for key in ("barrier_before", "barrier_after"))
        lines.append(f"Barrier before the members' units were aligned {before}, after it {after}.")
    if made["of_first"]:
        lines.append(f"Not averaged, from subset {made['subset_ids'][0]}: {listed(made['of_first'])}.")
    if not made["shared_start"]:
        text = "the members share no start, so that a plain mean of them need not make sense."
        lines.append(Note(text, is_warning=True))
    title = "Aggregation" if not last["round"] else f"Aggregation of round {last['round'] + 1}"
    return Section(title, ("on validation data", "loss", quality.heading), tuple(rows), tuple(lines), "aggregation")


def _candidates(made: Record, quality: Quality) -> Section:
    """What auto tried."""
    rows = []
    for one in made["candidates"]:
        cost = (f"{one['cost']['num_forward']:,}", f"{one['cost']['device_s']:.1f}")
        measured = ("refused", "") if one["validation"] is None else _pair(one["validation"], quality)
        rows.append((f"{one['method']}, taken" if one["method"] == made["method"] else one["method"], *measured, *cost))
    lines = (
        *(f"{one['method']} was refused: {one['error']}" for one in made["candidates"] if one["error"]),
        "Forward examples and seconds are of making and scoring a candidate; the statistics that fisher and regmean "
        "need were taken by the subsets' actors and are counted there.",
    )
    columns = ("tried by auto", "validation loss", quality.heading, "forward examples", "seconds")
    return Section("Candidates", columns, tuple(rows), lines)


def _costs(record: Record) -> Section:
    cost, seconds = record["cost"], record["seconds"]
    trained, total = trained_passes(record), cost["passes"]
    rows = [
        ("passes in total", f"{total:.2f}", "every attempt, evaluation and candidate"),
        ("  on the critical path", f"{cost['critical_path_passes']:.2f}", ""),
        ("  training that led to the result", f"{trained:.2f}", f"planned: up to {record['planned_passes']:.2f}"),
        ("  the rest", f"{total - trained:.2f}", "evaluation, batch-norm statistics, candidates, repeated work"),
    ]
    attempts = sum(row["num_attempts"] for row in cost["stages"])
    lost = sum(row["num_lost"] for row in cost["stages"])
    if lost:
        text = f"{lost} of {attempts} attempts were lost or failed; their checkpoints may have served the next"
        rows.append(("  in lost attempts", f"{cost['lost_passes']:.2f}", text))
    rows += [
        ("optimizer steps", f"{cost['num_steps']:,}", "of all devices together"),
        ("device-seconds", f"{cost['device_s']:.1f}", "devices held while at work"),
        ("seconds on the critical path", f"{cost['critical_path_s']:.1f}", "if every subset had a device of its own"),
        ("bytes sent", bytes_in_words(cost["num_network_bytes"]), "weights and gradients; the data set apart"),
        ("wall seconds", f"{seconds['wall']:.1f}", f"of which {seconds['startup']:.1f} before the first stage"),
    ]
    lines = []
    if lacking := cost.get("lacking"):
        entries = f"{len(lacking)} damaged entries" if len(lacking) > 1 else "a damaged entry"
        lines.append(f"The ledger has {entries}, so costs are a lower bound: {', '.join(lacking[:3])}.")
    if seconds["num_sessions"] > 1:
        told = f"wall seconds are those of its {seconds['num_sessions']} sessions, those of stages count the pauses."
        lines.append(f"This run was resumed: {told}")
    return Section("Costs", ("", "amount", ""), tuple(rows), tuple(lines), "costs")


def _counted(metrics: Record, quality: Quality, show: Callable[[float | None], str] | None = None) -> str:
    """The quality with its error, and of an accuracy how many are right: 'accuracy 90.00% ± 3.00 (90 of 100)'."""
    text = with_error(metrics, quality, show or quality.phrase)
    is_count = quality.name == "accuracy" and "num_correct" in metrics
    return f"{text} ({metrics['num_correct']} of {metrics['num_examples']})" if is_count else text


def _pair(metrics: Record | None, quality: Quality) -> tuple[str, str]:
    """Loss and quality."""
    return ("", "") if metrics is None else (_number(metrics["loss"]), quality.cell(metrics[quality.name]))


def _number(value: float | None, form: str = ".4f") -> str:
    return "not finite" if value is None or not math.isfinite(value) else format(value, form)  # JSON has no NaN
