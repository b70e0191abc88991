"""Report a finished run: the result, its recipe, the results and costs of each stage, and the findings."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from raysubset.config import Config, MinimizeConfig, TrainingStage, flatten
from raysubset.costs import bytes_in_words, works_of
from raysubset.errors import listed, per_second
from raysubset.events import Note
from raysubset.quality import Quality, quality_of
from raysubset.report.beside import Beside, held_against
from raysubset.report.commands import command
from raysubset.report.curves import run_stages, training_plot
from raysubset.report.figures import (
    Record,
    compares_examples,
    finite,
    formatted,
    is_least_squares,
    loss_name,
    mean_metrics,
    standard_error,
    trained_passes,
    with_error,
)
from raysubset.report.findings import findings, next_commands
from raysubset.report.parts import Column, Command, Line, Section, drawn, table
from raysubset.report.run_plots import gap_over_q, minima_losses, story

MOST_ROWS = 12  # minima or rounds that get a row each


def sections(record: Record, beside: Beside | None = None) -> list[Section]:
    """Return the sections of a finished run's report, compared with what find_beside() found in its storage path."""
    beside = beside or Beside()
    return [result(record, beside), *measured(record), *what_follows(record, beside)]


def what_follows(record: Record, beside: Beside) -> tuple[Section, Section]:
    """Return the sections of the findings and of the commands to run next."""
    what_it_tells = Section("What this tells", lines=tuple(findings(record)))
    return what_it_tells, Section("Next", lines=tuple(next_commands(record, beside)))


def measured(record: Record) -> Iterator[Section]:
    """Yield the tables, each with its plots, in the order of the stages."""
    rounds = record["stages"].get("rounds") or []
    yield recipe(record)
    yield _final_model(record)
    yield _stages(record)
    if rounds:
        if len(rounds) > 1:
            yield _rounds(rounds, quality_of(record))
        yield _minima(record, rounds)
        yield _aggregation(record, rounds[-1])
        if rounds[-1]["aggregation"]["candidates"]:
            yield _candidates(rounds[-1]["aggregation"], quality_of(record))
    yield _costs(record)


# Rows of the recipe's table that every stage has, and those of a user's own loop, which reads what it likes
_OF_A_STAGE, _OF_A_LOOP = (
    ("optimizer", "epochs", "batch_size", "schedule", "weight_decay"),
    ("loop", "epochs", "batch_size"),
)


def recipe(record: Record) -> Section:
    """Show how each stage minimized, and the command that does it again."""
    if (config := _config(record)) is None:
        text = "this version cannot read the config, so the stages' recipes are not shown."
        return Section("Recipe", lines=(Note(text, is_warning=True),))
    stages = record["stages"]
    rounds = stages.get("rounds") or []
    recipes: dict[TrainingStage, MinimizeConfig] = {}
    all_stages: tuple[TrainingStage, ...] = ("conventional", "trunk", "subsets", "fine_tuning")
    for stage in all_stages:
        if work := stages.get("rounds" if stage == "subsets" else stage):
            history = work["history"] if stage == "conventional" else ()
            recipes[stage] = config.stage(stage, epochs=history[-1]["epoch"] if history else None)
    settings = [flatten(asdict(recipe)) for recipe in recipes.values()]
    keys = list(_OF_A_STAGE if config.minimize.loop is None else _OF_A_LOOP)
    for key, default in flatten(asdict(MinimizeConfig())).items():
        is_usual = key in (*_OF_A_STAGE, "learning_rate", "loop") or all(values[key] == default for values in settings)
        keys += [] if is_usual else [key]
    rows = [(key.replace("_", " "), *(_setting(values[key]) for values in settings)) for key in keys]
    if config.minimize.loop is None:
        rows.insert(1, ("learning rate, peak", *map(_rate, recipes.values())))
    minima = rounds[-1]["minima"] if rounds else []
    sizes = sorted({minimum["num_examples"] for minimum in minima})
    of_subsets = " to ".join(f"{size:,}" for size in dict.fromkeys([*sizes[:1], *sizes[-1:]]))
    size, workers = f"{record['data']['num_train']:,}", (stages.get("fine_tuning") or {}).get("num_workers", 1)
    of_stages = {  # examples, workers, rounds
        "conventional": (size, f"{config.conventional.num_workers}", "1"),
        "trunk": (size, f"{config.trunk.num_workers}", "1"),
        "subsets": (of_subsets, f"{len(minima)} subsets", f"{len(rounds)}"),
        "fine_tuning": (size, f"{workers}", "1"),
    }
    names = ("examples", "workers", "rounds") if len(rounds) > 1 else ("examples", "workers")
    rows += zip(names, *(of_stages[stage] for stage in recipes), strict=False)
    line = f"Seed {config.seed}; splits drawn with seed {config.data.split_seed}. The command (--fresh starts over):"
    columns = ("", *(stage.replace("_", " ") for stage in recipes))
    return Section("Recipe", columns, tuple(rows), (line, Command(command(record["config"]))))


def _config(record: Record) -> Config | None:
    """Return the run's config; None if this version cannot read it: the rest of the report does not need it."""
    try:
        return Config.from_dict(record["config"])
    except ValueError:
        return None


def _rate(recipe: MinimizeConfig) -> str:
    is_own = recipe.has_own_optimizer and not recipe.learning_rate
    return "its own" if is_own else f"{recipe.peak_learning_rate():g}"


def _setting(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def result(record: Record, beside: Beside) -> Section:
    """State the result in a sentence, compare it with what lies beside the run, and draw its story."""
    test, cost, model = record["test"], record["cost"], record["model"]
    sentence = (
        f"Test {_counted(test, quality_of(record))}, loss {formatted(test['loss'])}, with {model['name']} of "
        f"{model['num_parameters']:,} parameters, for {cost['passes']:.2f} passes over the training set in total, "
        f"{cost['critical_path_passes']:.2f} of them on the critical path."
    )
    lines = (sentence, *held_against(record, beside))
    return Section(record["name"], lines=lines, plots=drawn(story(record, beside.run)))


def _final_model(record: Record) -> Section:
    quality = quality_of(record)
    lines = [Note(**note) for note in record["data"]["notes"]]
    names = record["data"].get("targets", ())
    if values := list(_other_values(record["test"], quality, {str(k): name for k, name in enumerate(names)})):
        lines.insert(0, Note(f"On test data also: {', '.join(values)}."))
    error = "" if standard_error(record["test"], quality) is None else " ± standard error"
    columns = (
        ("on", lambda row: row[0]),
        ("examples", lambda row: f"{row[1]['num_examples']:,}"),
        ("loss", lambda row: formatted(row[1]["loss"])),
        (f"{quality.heading}{error}", lambda row: _counted(row[1], quality, quality.cell)),
    )
    names = {"test": "test, read once at the end", "validation": "validation, read for every choice"}
    return table("Final model", [(name, record[split]) for split, name in names.items()], columns, lines)


def _other_values(metrics: Record, quality: Quality, targets: Mapping[str, str]) -> Iterator[str]:
    """Yield the metrics other than loss, quality, sums and errors: 'rmse 53.2'; those of a target by its number, too.

    Args:
        targets: the targets' names by number: mae_1 is shown as 'mae of price 53.2'.
    """
    for key, value in metrics.items():
        is_known = key in ("loss", quality.name) or key.startswith("num_") or key.endswith(("_sum", "_error"))
        if isinstance(value, int | float) and not is_known:
            name, _, number = key.rpartition("_")
            noun = f"{name} of {targets[number]}" if name in metrics and number in targets else key.replace("_", " ")
            yield f"{noun} {value:.4g}"


def _loss_and_quality(heading: str, quality: Quality, metrics_of: Callable[[Any], Record | None]) -> list[Column]:
    """Return the columns of an item's loss and quality, empty if it has no metrics."""

    def cell(show: Callable[[Record], str]) -> Callable[[Any], str]:
        return lambda item: show(metrics) if (metrics := metrics_of(item)) else ""

    loss = cell(lambda metrics: formatted(metrics["loss"]))
    return [(heading, loss), (quality.heading, cell(lambda metrics: quality.cell(metrics[quality.name])))]


def _stages(record: Record) -> Section:
    stages, rounds, quality = record["stages"], record["stages"].get("rounds") or [], quality_of(record)
    costs = {row["stage"]: row for row in record["cost"]["stages"]}
    rows: list[tuple[str, str, Any]] = [(stage, stage, stages.get(stage)) for stage in ("conventional", "trunk")]
    if rounds:
        minima, aggregation = rounds[-1]["minima"], rounds[-1]["aggregation"]
        splits = ("training", "validation")
        means = {split: mean_metrics([minimum[split] for minimum in minima], quality) for split in splits}
        rows.append((f"subsets{f', mean of {len(minima)}' if len(minima) > 1 else ''}", "subsets", means))
        rows.append((f"aggregate, {aggregation['method']}", "aggregation", aggregation))
    rows = [row for row in (*rows, ("fine_tuning", "fine_tuning", stages.get("fine_tuning"))) if row[2]]
    rows += [(name, stage, {}) for name, stage in _WITHOUT_TRAINING.items() if stage in costs]

    def of_cost(show: Callable[[Record], str]) -> Callable[[Any], str]:
        return lambda row: show(costs[row[1]]) if row[1] in costs else ""

    def examples_per_s(cost: Record) -> str:
        num = cost["passes"] * record["data"]["num_train"]
        return per_second(num / cost["device_s"]) if cost["device_s"] else ""

    columns = (
        ("stage", lambda row: row[0]),
        *_loss_and_quality("training loss", quality, lambda row: row[2].get("training")),
        *_loss_and_quality("validation loss", quality, lambda row: row[2].get("validation")),
        ("passes", of_cost(lambda cost: f"{cost['passes']:.2f}")),
        ("critical path", of_cost(lambda cost: f"{cost['critical_path_passes']:.2f}")),
        ("device s", of_cost(lambda cost: f"{cost['device_s']:.1f}")),
        ("wall s", of_cost(lambda cost: f"{cost['wall_s']:.1f}")),
        ("examples/s", of_cost(examples_per_s)),
    )
    lines = [
        f"{f'Losses and qualities are of round {len(rounds)}, costs of all rounds. ' if len(rounds) > 1 else ''}"
        "A pass is forward and backward over as many examples as the training set has, forward alone "
        f"{record['model']['forward_share']:.2f} of one in this network. Critical path: if every subset had a device "
        "of its own; of n workers each does 1/n. Examples/s: of a device, with the start of its processes. Training: "
        "without augmentation, subsets on their own examples, others on the training set or a sample of it."
    ]
    curves = training_plot("of each stage", [("", run_stages([record]))], loss=loss_name(record))
    return table("Stages", rows, columns, lines, [curves])


_WITHOUT_TRAINING = {"test": "test", "measuring of speeds": "measuring"}  # rows of stages that only cost


def _rounds(rounds: Sequence[Record], quality: Quality) -> Section:
    measured_rounds = [round for round in rounds if round["aggregation"]["validation"]]
    shown = measured_rounds[-MOST_ROWS:]
    columns = (
        ("round", lambda round: f"{round['round'] + 1}"),
        *_loss_and_quality("mean member", quality, lambda round: _mean_member(round["aggregation"], quality)),
        *_loss_and_quality("ensemble", quality, lambda round: round["aggregation"]["ensemble"]),
        *_loss_and_quality("aggregate", quality, lambda round: round["aggregation"]["validation"]),
        ("barrier", lambda round: formatted(round["aggregation"]["barrier"], "+.4f")),
    )
    lines = []
    if left_out := len(measured_rounds) - len(shown):
        lines.append(f"The first {left_out} of the measured rounds are in report.json.")
    if unmeasured := len(rounds) - len(measured_rounds):
        lines.append(f"{unmeasured} of {len(rounds)} rounds were not measured (rounds.evaluate_every).")
    return table(f"Rounds, validation loss and {quality.name}", shown, columns, lines)


def _mean_member(aggregation: Record, quality: Quality) -> Record:
    return {name: aggregation[f"mean_member_{name}"] for name in ("loss", quality.name)}


def _minima(record: Record, rounds: Sequence[Record]) -> Section:
    minima, quality, has_law = rounds[-1]["minima"], quality_of(record), is_least_squares(record)

    def ratio(minimum: Record) -> float:
        own_loss = finite(minimum["training"]["loss"])
        return finite(minimum["validation"]["loss"]) / own_loss if own_loss else math.inf

    def law(minimum: Record) -> float:
        q = minimum["overdetermination_ratio"]
        return (q + 1) / (q - 1) if q > 1 else math.inf

    def column(heading: str, value: Callable[[Record], float], show: Callable[[float], str]) -> Column:
        return heading, lambda row: show(row[1](map(value, row[2])))

    columns = [
        ("subset", lambda row: row[0]),
        column("Q", lambda m: m["overdetermination_ratio"], "{:.2f}".format),
        column("examples", lambda m: m["num_examples"], "{:.0f}".format),
        column("own loss", lambda m: finite(m["training"]["loss"]), "{:.4f}".format),
        column("validation loss", lambda m: finite(m["validation"]["loss"]), "{:.4f}".format),
        column("gap", lambda m: finite(m["validation"]["loss"]) - finite(m["training"]["loss"]), "{:+.4f}".format),
        column(quality.heading, lambda m: finite(m["validation"][quality.name]), quality.cell),
        ("ended by", lambda row: row[3]),
    ]
    if has_law:
        columns.append(column("validation / own loss", ratio, "{:.2f}".format))
        columns.append(column("(Q+1)/(Q-1)", law, lambda value: formatted(value, ".2f", none="none: Q ≤ 1")))
    if len(minima) <= MOST_ROWS:
        rows = [(f"{minimum['subset_id']}", max, [minimum], minimum["outcome"]) for minimum in minima]
    else:
        outcomes = ", ".join(f"{num} × {name}" for name, num in Counter(m["outcome"] for m in minima).items())
        picks = (("mean", fmean, outcomes), ("least", min, ""), ("greatest", max, ""))
        rows = [(f"{name} of {len(minima)}", pick, minima, outcome) for name, pick, outcome in picks]
    lines = ["The gap is validation loss less own loss, that on the minimum's subset, both without augmentation."]
    if compares_examples(record):
        columns = [each for each in columns if each[0] != "gap"]
        lines = [
            "The loss depends on how many examples a batch has: subsets and validation data have no gap to compare."
        ]
    if slots := record["decisions"].get("slots"):
        speeds = ", ".join(f"{kind} {speed:.4g}" for kind, speed in {s["kind"]: s["speed"] for s in slots}.items())
        lines.append(
            f"Sizes follow the speed of the nodes ({speeds}), so that all finish together; the critical path counts "
            "passes, as if all were equally fast."
        )
    if has_law:
        lines.append(
            "(Q+1)/(Q-1) is the ratio of least squares at its exact minimum and with fixed inputs; others may differ."
        )
    title = "Minima" if len(rounds) == 1 else f"Minima of round {len(rounds)}"
    return table(title, rows, columns, lines, [minima_losses(record), gap_over_q(record)])


def _aggregation(record: Record, last: Record) -> Section:
    aggregation, quality, config = last["aggregation"], quality_of(record), _config(record)
    has_outer_step = config is not None and config.rounds.has_outer_step()
    num, of = (aggregation[name]["num_examples"] for name in ("ensemble", "best_member"))
    models = {
        "best member": aggregation["best_member"],
        "mean member": _mean_member(aggregation, quality),
        f"ensemble of predictions{'' if num == of else f' on {num:,} of {of:,} examples'}": aggregation["ensemble"],
    }
    if aggregation["method"] != "uniform_soup" or has_outer_step:
        models["plain mean of all"] = aggregation["uniform_mean"]
    step = ", then the outer step" if has_outer_step else ""
    models[f"aggregate: {aggregation['method']}{step}"] = aggregation["validation"]
    subset_ids, coefficients = aggregation["subset_ids"], aggregation["coefficients"]
    members = listed([f"{subset}" for subset in subset_ids], most=MOST_ROWS)
    text = f"Members: {members} ({len(subset_ids)} of {len(last['minima'])})"
    if len(set(coefficients)) > 1:
        text += ", weighted " + listed([f"{share:.3f}" for share in coefficients], most=MOST_ROWS)
    if aggregation["tried"]:
        text += f"; {len(aggregation['tried'])} candidates were scored on validation data"
    barrier = f"Barrier (loss of the plain mean less mean loss): {formatted(aggregation['barrier'], '+.4f')}."
    lines: list[Line] = [f"{text}. {barrier}"]
    if alignment := aggregation["alignment"]:
        before, after = (formatted(alignment[key], "+.4f") for key in ("barrier_before", "barrier_after"))
        lines.append(f"Barrier before the members' units were aligned {before}, after it {after}.")
    if aggregation["of_first"]:
        lines.append(f"Not averaged, from subset {subset_ids[0]}: {listed(aggregation['of_first'])}.")
    if not aggregation["shared_start"]:
        text = "the members do not share a start, so their plain mean may be meaningless."
        lines.append(Note(text, is_warning=True))
    title = "Aggregation" if not last["round"] else f"Aggregation of round {last['round'] + 1}"
    columns = [("on validation data", lambda row: row[0]), *_loss_and_quality("loss", quality, lambda row: row[1])]
    return table(title, models.items(), columns, lines)


def _candidates(aggregation: Record, quality: Quality) -> Section:
    """Show the candidates that auto tried."""
    candidates, taken = aggregation["candidates"], aggregation["method"]
    loss, value = _loss_and_quality("validation loss", quality, lambda candidate: candidate["validation"])
    columns = (
        ("tried by auto", lambda candidate: f"{candidate['method']}{', taken' * (candidate['method'] == taken)}"),
        (loss[0], lambda candidate: loss[1](candidate) or "refused"),
        value,
        ("forward examples", lambda candidate: f"{candidate['cost']['num_forward']:,}"),
        ("seconds", lambda candidate: f"{candidate['cost']['device_s']:.1f}"),
    )
    lines = (
        *(f"{candidate['method']} was refused: {candidate['error']}" for candidate in candidates if candidate["error"]),
        "Costs are of building and scoring a candidate; statistics for fisher and regmean are the subsets' work.",
    )
    return table("Candidates", candidates, columns, lines)


def _costs(record: Record) -> Section:
    cost, seconds = record["cost"], record["seconds"]
    training, total = trained_passes(record), cost["passes"]
    rest = "evaluation, batch-norm statistics, candidates, repeated work"
    if (config := _config(record)) and config.minimize.skipping.kind != "none":
        rest += ", less the weights' gradients that training skipped"
    rows = [
        ("passes in total", f"{total:.2f}", "every attempt, evaluation and candidate"),
        ("  on the critical path", f"{cost['critical_path_passes']:.2f}", ""),
        ("  training that led to the result", f"{training:.2f}", f"planned: up to {record['planned_passes']:.2f}"),
        ("  the rest", f"{total - training:.2f}", rest),
    ]
    attempts, lost = (sum(row[key] for row in cost["stages"]) for key in ("num_attempts", "num_lost"))
    if lost:
        text = f"{lost} of {attempts} attempts were lost or failed; the next may have resumed from their checkpoints"
        rows.append(("  in lost attempts", f"{cost['lost_passes']:.2f}", text))
    rows += [
        ("optimizer steps", f"{cost['num_steps']:,}", "of all devices together"),
        ("device-seconds", f"{cost['device_s']:.1f}", "devices held while at work"),
        ("seconds on the critical path", f"{cost['critical_path_s']:.1f}", "if every subset had a device of its own"),
        ("bytes sent", bytes_in_words(cost["num_network_bytes"]), "files, gradients, start weights, the data set"),
    ]
    works = [work for *_, work in works_of(record["stages"])]
    peaks = [work["peak_bytes"] for work in works if "peak_bytes" in work]  # not of earlier versions
    for place, of in (("host", "resident, with all that it read of the object store"), ("card", "allocated by torch")):
        if most := max((peak[place] for peak in peaks if place in peak), default=0):
            text = f"of the training process with the most; {of}"
            rows.append((f"peak memory, {place}", bytes_in_words(most), text))
    rows.append(("wall seconds", f"{seconds['wall']:.1f}", f"of which {seconds['startup']:.1f} before the first stage"))
    lines = []
    if lacking := cost.get("lacking"):
        entries = f"{len(lacking)} damaged entries" if len(lacking) > 1 else "a damaged entry"
        lines.append(f"The ledger has {entries}, so costs are a lower bound: {', '.join(lacking[:3])}.")
    if traces := record.get("traces"):
        lines.append(f"Traces of some steps, for Perfetto, in this run's directory: {', '.join(traces)}.")
    if (num := seconds["num_sessions"]) > 1:
        lines.append(f"This run was resumed: wall seconds are of its {num} sessions; those of stages count the pauses.")
    return Section("Costs", ("", "amount", ""), tuple(rows), tuple(lines))


def _counted(metrics: Record, quality: Quality, show: Callable[[float | None], str] | None = None) -> str:
    """Return the quality with its error, and for accuracy the count: 'accuracy 90.00% ± 3.00 (90 of 100)'."""
    text = with_error(metrics, quality, show or quality.phrase)
    is_count = quality.name == "accuracy" and "num_correct" in metrics
    return f"{text} ({metrics['num_correct']} of {metrics['num_examples']})" if is_count else text
