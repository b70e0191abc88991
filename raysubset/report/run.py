"""Report a finished run: the result, its recipe, the results and costs of each stage, and the findings."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from raysubset.config import Config, MinimizeConfig, TrainingStage, flatten
from raysubset.costs import bytes_in_words
from raysubset.errors import listed
from raysubset.events import Note
from raysubset.quality import Quality, quality_of
from raysubset.report.beside import Beside, held_against
from raysubset.report.commands import command
from raysubset.report.drawing import Plot
from raysubset.report.figures import (
    Record,
    finite,
    formatted,
    is_least_squares,
    mean_metrics,
    standard_error,
    trained_passes,
    trainings,
    with_error,
)
from raysubset.report.findings import findings, next_commands
from raysubset.report.parts import Command, Line, Section, table
from raysubset.report.run_plots import (
    aggregation_losses,
    costs_by_stage,
    gap_over_q,
    minima_losses,
    rounds_losses,
    story,
    training_curves,
)

MOST_ROWS = 12  # minima or rounds that get a row each


def sections(record: Record, beside: Beside | None = None) -> list[Section]:
    """Return the sections of a finished run's report.

    Args:
        beside: what find_beside() found in the same storage path, to compare the run with.
    """
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
            yield _rounds(record, rounds)
        yield _minima(record, rounds)
        yield _aggregation(record, rounds[-1])
        if rounds[-1]["aggregation"]["candidates"]:
            yield _candidates(rounds[-1]["aggregation"], quality_of(record))
    yield _costs(record)


def _drawn(*plots: Plot | None) -> tuple[Plot, ...]:
    return tuple(plot for plot in plots if plot is not None)


_OF_A_STAGE = {  # rows of the recipe's table that every stage has, by the fields of its MinimizeConfig
    "optimizer": "optimizer",
    "epochs": "epochs",
    "batch_size": "batch size",
    "schedule": "schedule",
    "weight_decay": "weight decay",
}
_OF_A_LOOP = {"loop": "loop", "epochs": "epochs", "batch_size": "batch size"}  # of a user's own: it reads what it likes


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
    of_a_stage = _OF_A_STAGE if config.minimize.loop is None else _OF_A_LOOP
    rows = [(name, *(_setting(values[key]) for values in settings)) for key, name in of_a_stage.items()]
    if of_a_stage is _OF_A_STAGE:
        is_known = [recipe.learning_rate or not recipe.has_own_optimizer for recipe in recipes.values()]
        rates = zip(recipes.values(), is_known, strict=True)
        shown = (f"{recipe.peak_learning_rate():g}" if known else "its own" for recipe, known in rates)
        rows.insert(1, ("learning rate, peak", *shown))
    for key, default in flatten(asdict(MinimizeConfig())).items():
        values = [setting[key] for setting in settings]
        if key not in (*_OF_A_STAGE, "learning_rate", "loop") and any(value != default for value in values):
            rows.append((key.replace("_", " "), *map(_setting, values)))
    minima = rounds[-1]["minima"] if rounds else []
    sizes = sorted({minimum["num_examples"] for minimum in minima}) or [0]
    of_subsets = f"{sizes[0]:,}" if sizes[0] == sizes[-1] else f"{sizes[0]:,} to {sizes[-1]:,}"
    of_others = f"{record['data']['num_train']:,}"
    rows.append(("examples", *(of_subsets if stage == "subsets" else of_others for stage in recipes)))
    workers = {
        "subsets": f"{len(minima)} subsets",
        "fine_tuning": str((stages.get("fine_tuning") or {}).get("num_workers", 1)),
        "trunk": str(config.trunk.num_workers),
        "conventional": str(config.conventional.num_workers),
    }
    rows.append(("workers", *(workers[stage] for stage in recipes)))
    if len(rounds) > 1:
        rows.append(("rounds", *(str(len(rounds)) if stage == "subsets" else "1" for stage in recipes)))
    line = f"Seed {config.seed}; splits drawn with seed {config.data.split_seed}. The command (--fresh starts over):"
    columns = ("", *(stage.replace("_", " ") for stage in recipes))
    return Section("Recipe", columns, tuple(rows), (line, Command(command(record["config"]))))


def _config(record: Record) -> Config | None:
    """Return the run's config; None if this version cannot read it: the rest of the report does not need it."""
    try:
        return Config.from_dict(record["config"])
    except ValueError:
        return None


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
    return Section(record["name"], lines=lines, plots=_drawn(story(record, beside.run)))


def _final_model(record: Record) -> Section:
    quality = quality_of(record)
    lines = list(map(Note.from_json, record["data"]["notes"]))
    if values := list(_other_values(record["test"], quality)):
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


def _other_values(metrics: Record, quality: Quality) -> Iterator[str]:
    """Yield the metrics other than loss, quality, sums and errors: 'rmse 53.2'."""
    for key, value in metrics.items():
        is_known = key in ("loss", quality.name) or key.startswith("num_") or key.endswith(("_sum", "_error"))
        if isinstance(value, int | float) and not is_known:
            yield f"{key.replace('_', ' ')} {value:.4g}"


def _stages(record: Record) -> Section:
    stages, rounds, quality = record["stages"], record["stages"].get("rounds") or [], quality_of(record)
    cost = {row["stage"]: row for row in record["cost"]["stages"]}
    rows: list[tuple[str, ...]] = []
    keys = ("loss", quality.name)

    def add(name: str, training: Any, validation: Any, stage: str | None = None) -> None:
        costs = ("",) * 5
        if stage in cost:
            row = cost[stage]
            costs = tuple(f"{row[key]:.2f}" for key in ("passes", "critical_path_passes"))
            costs += tuple(f"{row[key]:.1f}" for key in ("device_s", "wall_s"))
            costs += (
                f"{row['passes'] * record['data']['num_train'] / row['device_s']:,.0f}" if row["device_s"] else "",
            )
        rows.append((name, *_pair(training, quality), *_pair(validation, quality), *costs))

    for stage in ("conventional", "trunk"):
        if work := stages.get(stage):
            add(stage, work["training"], work["validation"], stage)
    if rounds:
        minima, aggregation = rounds[-1]["minima"], rounds[-1]["aggregation"]
        count = "" if len(minima) == 1 else f", mean of {len(minima)}"
        splits = [[minimum[split] for minimum in minima] for split in ("training", "validation")]
        training, validation = (mean_metrics(metrics, quality) for metrics in splits)
        add(f"subsets{count}", training, validation, "subsets")
        if len(minima) > 1:
            for name, pick in (("least", min), ("greatest", max)):
                training, validation = ({k: pick(finite(m[k]) for m in metrics) for k in keys} for metrics in splits)
                add(f"  {name}", training, validation)
        add(f"aggregate, {aggregation['method']}", aggregation["training"], aggregation["validation"], "aggregation")
        if len(minima) > 1:
            add(f"  ensemble{_sample(aggregation)}, for reference", None, aggregation["ensemble"])
    if work := stages.get("fine_tuning"):
        add("fine_tuning", work["training"], work["validation"], "fine_tuning")
    add("test", None, None, "test")
    if "measuring" in cost:
        add("measuring of speeds", None, None, "measuring")
    lines = [
        "A pass is forward and backward over as many examples as the training set has, forward alone "
        f"{record['model']['forward_share']:.2f} of one in this network. "
        "Critical path: if every subset had a device of its own; of n workers each does 1/n. Examples/s: of a device, "
        "forward and backward, evaluation counted by its share, start-up of a stage's processes included."
    ]
    if rounds:
        lines.append(
            "Training columns: subsets on their own examples, the others on the training set or a sample of it; all "
            "without augmentation."
        )
    if len(rounds) > 1:
        lines.insert(0, f"Costs are of all rounds, losses and qualities of round {len(rounds)}.")
    columns = ("stage", "training loss", quality.heading, "validation loss", quality.heading, "passes", "critical path")
    columns += ("device s", "wall s", "examples/s")
    return Section("Stages", columns, tuple(rows), tuple(lines), _drawn(training_curves(record)))


def _rounds(record: Record, rounds: Sequence[Record]) -> Section:
    rows, quality = [], quality_of(record)
    measured_rounds = [round for round in rounds if round["aggregation"]["validation"]]
    for round in measured_rounds[-MOST_ROWS:]:
        aggregation = round["aggregation"]
        rows.append(
            (
                f"{round['round'] + 1}",
                formatted(aggregation["mean_member_loss"]),
                quality.cell(aggregation[f"mean_member_{quality.name}"]),
                *_pair(aggregation["ensemble"], quality),
                *_pair(aggregation["validation"], quality),
                formatted(aggregation["barrier"], "+.4f"),
            )
        )
    lines = []
    if left_out := len(measured_rounds) - len(rows):
        lines.append(f"The first {left_out} of the measured rounds are in report.json.")
    if unmeasured := len(rounds) - len(measured_rounds):
        lines.append(f"{unmeasured} of {len(rounds)} rounds were not measured (rounds.evaluate_every).")
    names = [name for of in ("mean member", "ensemble", "aggregate") for name in (of, quality.heading)]
    title = f"Rounds, validation loss and {quality.name}"
    return Section(title, ("round", *names, "barrier"), tuple(rows), tuple(lines), _drawn(rounds_losses(record)))


def _sample(aggregation: Record) -> str:
    """Return on how many examples the ensemble was measured; "" if on all."""
    num, of = (aggregation[name]["num_examples"] for name in ("ensemble", "best_member"))
    return "" if num == of else f" on {num:,} of {of:,} examples"


def _minima(record: Record, rounds: Sequence[Record]) -> Section:
    minima, quality = rounds[-1]["minima"], quality_of(record)
    has_law = is_least_squares(record)
    columns = ("subset", "Q", "examples", "own loss", "validation loss", "gap", quality.heading, "ended by")
    if has_law:
        columns += ("validation / own loss", "(Q+1)/(Q-1)")
    if len(minima) <= MOST_ROWS:
        rows = [_minimum_row(f"{m['subset_id']}", _figures(m, quality), m["outcome"], has_law, quality) for m in minima]
    else:
        figures = [_figures(minimum, quality) for minimum in minima]
        outcomes = ", ".join(f"{num} × {name}" for name, num in Counter(m["outcome"] for m in minima).items())
        rows = []
        for name, pick in (("mean", fmean), ("least", min), ("greatest", max)):
            picked = [pick(values) for values in zip(*figures, strict=True)]
            outcome = outcomes if name == "mean" else ""
            rows.append(_minimum_row(f"{name} of {len(minima)}", picked, outcome, has_law, quality))
    title = "Minima" if len(rounds) == 1 else f"Minima of round {len(rounds)}"
    lines = [
        "The gap is validation loss less the loss on the minimum's own subset, both measured without augmentation."
    ]
    if slots := record["decisions"].get("slots"):
        speeds = ", ".join(
            f"{kind} {speed:.4g}" for kind, speed in {slot["kind"]: slot["speed"] for slot in slots}.items()
        )
        lines.append(
            f"Sizes follow the speed of the nodes ({speeds}), so that all finish together; the critical path counts "
            "passes, as if all were equally fast."
        )
    if has_law:
        lines.append(
            "(Q+1)/(Q-1) is the ratio that least squares has at its exact minimum and with fixed inputs; a network "
            "that stopped before its minimum may have another."
        )
    return Section(title, columns, tuple(rows), tuple(lines), _drawn(minima_losses(record), gap_over_q(record)))


def _figures(minimum: Record, quality: Quality) -> list[float]:
    """Return Q, examples, own loss, validation loss, gap, quality, ratio of the losses, and the ratio by the law."""
    training, validation = finite(minimum["training"]["loss"]), finite(minimum["validation"]["loss"])
    q = minimum["overdetermination_ratio"]
    ratio = validation / training if training else float("inf")
    law = (q + 1) / (q - 1) if q > 1 else float("inf")
    value = finite(minimum["validation"][quality.name])
    return [q, minimum["num_examples"], training, validation, validation - training, value, ratio, law]


def _minimum_row(name: str, figures: Sequence[float], outcome: str, has_law: bool, quality: Quality) -> tuple[str, ...]:
    q, num, training, validation, gap, value, ratio, law = figures
    row = (name, f"{q:.2f}", f"{num:.0f}", f"{training:.4f}", f"{validation:.4f}", f"{gap:+.4f}")
    row += (quality.cell(value), outcome)
    return (*row, f"{ratio:.2f}", f"{law:.2f}" if law != float("inf") else "none: Q ≤ 1") if has_law else row


def _aggregation(record: Record, last: Record) -> Section:
    aggregation, minima, quality = last["aggregation"], last["minima"], quality_of(record)
    config = _config(record)
    has_outer_step = config is not None and config.rounds.has_outer_step()
    mean_member = {name: aggregation[f"mean_member_{name}"] for name in ("loss", quality.name)}
    models = {
        "best member": aggregation["best_member"],
        "mean member": mean_member,
        f"ensemble of predictions{_sample(aggregation)}": aggregation["ensemble"],
    }
    if aggregation["method"] != "uniform_soup" or has_outer_step:
        models["plain mean of all"] = aggregation["uniform_mean"]
    step = ", then the outer step" if has_outer_step else ""
    models[f"aggregate: {aggregation['method']}{step}"] = aggregation["validation"]
    subset_ids, coefficients = aggregation["subset_ids"], aggregation["coefficients"]
    members = listed([f"{subset}" for subset in subset_ids], most=MOST_ROWS)
    text = f"Members: {members} ({len(subset_ids)} of {len(minima)})"
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
    columns, plots = ("on validation data", "loss", quality.heading), _drawn(aggregation_losses(record))
    rows = tuple((name, *_pair(metrics, quality)) for name, metrics in models.items())
    return Section(title, columns, rows, tuple(lines), plots if len(minima) > 1 else ())


def _candidates(aggregation: Record, quality: Quality) -> Section:
    """Show the candidates that auto tried."""
    rows, candidates = [], aggregation["candidates"]
    for candidate in candidates:
        method, validation = candidate["method"], candidate["validation"]
        cost = (f"{candidate['cost']['num_forward']:,}", f"{candidate['cost']['device_s']:.1f}")
        metrics = ("refused", "") if validation is None else _pair(validation, quality)
        rows.append((f"{method}, taken" if method == aggregation["method"] else method, *metrics, *cost))
    lines = (
        *(f"{candidate['method']} was refused: {candidate['error']}" for candidate in candidates if candidate["error"]),
        "Forward examples and seconds are of building and scoring a candidate; the subsets' actors computed the "
        "statistics that fisher and regmean need, which are counted there.",
    )
    columns = ("tried by auto", "validation loss", quality.heading, "forward examples", "seconds")
    return Section("Candidates", columns, tuple(rows), lines)


def _costs(record: Record) -> Section:
    cost, seconds = record["cost"], record["seconds"]
    training, total = trained_passes(record), cost["passes"]
    rows = [
        ("passes in total", f"{total:.2f}", "every attempt, evaluation and candidate"),
        ("  on the critical path", f"{cost['critical_path_passes']:.2f}", ""),
        ("  training that led to the result", f"{training:.2f}", f"planned: up to {record['planned_passes']:.2f}"),
        ("  the rest", f"{total - training:.2f}", "evaluation, batch-norm statistics, candidates, repeated work"),
    ]
    attempts = sum(row["num_attempts"] for row in cost["stages"])
    lost = sum(row["num_lost"] for row in cost["stages"])
    if lost:
        text = f"{lost} of {attempts} attempts were lost or failed; the next may have resumed from their checkpoints"
        rows.append(("  in lost attempts", f"{cost['lost_passes']:.2f}", text))
    rows += [
        ("optimizer steps", f"{cost['num_steps']:,}", "of all devices together"),
        ("device-seconds", f"{cost['device_s']:.1f}", "devices held while at work"),
        ("seconds on the critical path", f"{cost['critical_path_s']:.1f}", "if every subset had a device of its own"),
        ("bytes sent", bytes_in_words(cost["num_network_bytes"]), "files, gradients, start weights, the data set"),
        *_peak_memory(record),
        ("wall seconds", f"{seconds['wall']:.1f}", f"of which {seconds['startup']:.1f} before the first stage"),
    ]
    lines = []
    if lacking := cost.get("lacking"):
        entries = f"{len(lacking)} damaged entries" if len(lacking) > 1 else "a damaged entry"
        lines.append(f"The ledger has {entries}, so costs are a lower bound: {', '.join(lacking[:3])}.")
    if traces := record.get("traces"):
        lines.append(f"Traces of some steps, for Perfetto, in this run's directory: {', '.join(traces)}.")
    if seconds["num_sessions"] > 1:
        num = seconds["num_sessions"]
        lines.append(f"This run was resumed: wall seconds are of its {num} sessions; those of stages count the pauses.")
    return Section("Costs", ("", "amount", ""), tuple(rows), tuple(lines), _drawn(costs_by_stage(record)))


def _peak_memory(record: Record) -> Iterator[tuple[str, str, str]]:
    """Yield rows with the most memory that a training process has had; records of earlier versions may have none."""
    peaks = [work["peak_bytes"] for *_, work in trainings(record) if "peak_bytes" in work]
    for place, text in (
        ("host", "resident, with all that it read of the object store"),
        ("card", "allocated by torch"),
    ):
        if most := max((peak[place] for peak in peaks if place in peak), default=0):
            yield f"peak memory, {place}", bytes_in_words(most), f"of the training process with the most; {text}"


def _counted(metrics: Record, quality: Quality, show: Callable[[float | None], str] | None = None) -> str:
    """Return the quality with its error, and for accuracy the count: 'accuracy 90.00% ± 3.00 (90 of 100)'."""
    text = with_error(metrics, quality, show or quality.phrase)
    is_count = quality.name == "accuracy" and "num_correct" in metrics
    return f"{text} ({metrics['num_correct']} of {metrics['num_examples']})" if is_count else text


def _pair(metrics: Record | None, quality: Quality) -> tuple[str, str]:
    """Return loss and quality as two cells."""
    return ("", "") if metrics is None else (formatted(metrics["loss"]), quality.cell(metrics[quality.name]))
