"""The HTML report of a run, comparison or sweep: which sections and plots it has, from its directory and record."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pyarrow as pa

from raysubset.ledger import Ledger
from raysubset.report.commands import Preformatted, command
from raysubset.report.comparison_plots import (
    quality_against_cost,
    speed_ups,
    training_of_arms,
    training_of_settings,
    wall_by_network,
)
from raysubset.report.comparisons import comparison_sections
from raysubset.report.figures import Record
from raysubset.report.html import PAGE_PATH, Page, Part, to_html
from raysubset.report.line import line_between_minima
from raysubset.report.mistakes import MOST_CLASSES, confused_pairs, confusion, confusion_plot, masks, pictures
from raysubset.report.page import Section, sections
from raysubset.report.plots import Plot
from raysubset.report.reading import leg_records, leg_works, trial_records, trial_works
from raysubset.report.residuals import outputs_of, residuals_plot, worst_predictions
from raysubset.report.run_plots import (
    aggregation_losses,
    costs_by_stage,
    gap_over_q,
    line_plot,
    minima_losses,
    rounds_losses,
    training_curves,
)
from raysubset.report.sweeps import sweep_plot, sweep_sections
from raysubset.report.timeline import time_line, troubles, work_lines
from raysubset.run_directory import (
    ENVIRONMENT_PATH,
    MISTAKES_PATH,
    MODEL_RECORD_PATH,
    PREDICTIONS_PATH,
    SAMPLES_PATH,
    RunDirectory,
)


def write_page(directory: RunDirectory, record: Record) -> str:
    """Write report/report.html and its plots as PNGs into a finished run's, sweep's or comparison's directory.

    Returns:
        The page's path or URI.
    """
    make = {"sweep": _sweep_page, "comparison": _comparison_page}.get(record.get("kind", ""), _run_page)
    page = make(directory, record)
    for plot in page.plots:
        directory.write_bytes(plot.path, plot.png)
    directory.write_bytes(PAGE_PATH, to_html(page).encode())
    return _below(directory, PAGE_PATH)


def _below(directory: RunDirectory, path: str) -> str:
    address, mark, query = directory.uri.partition("?") if directory.local_path is None else (directory.uri, "", "")
    return f"{address}/{path}{mark}{query}"


def _run_page(directory: RunDirectory, record: Record) -> Page:
    result, *rest = sections(record)
    works = Ledger(directory).read()
    rounds = record["stages"].get("rounds")
    plots: dict[str, list[Plot]] = {
        "stages": [training_curves(record)],
        "costs": [costs_by_stage(record)] + ([time_line(works)] if works else []),
    }
    notes: dict[str, tuple[str, ...]] = {}
    if rounds:
        plots["minima"] = [minima_losses(record), gap_over_q(record)]
        plots["rounds"] = [rounds_losses(record)]
        plots["aggregation"] = [aggregation_losses(record)]
        if len(rounds[-1]["minima"]) > 1:
            try:
                line = line_between_minima(directory, record)
            except ValueError as error:
                notes["aggregation"] = (f"The straight line between two minima was not measured: {error}.",)
            else:
                ids = [minimum["subset_id"] for minimum in rounds[-1]["minima"][:2]]
                plots["aggregation"].append(line_plot(record, line, ids))
    parts = []
    for section in rest:
        found = dataclasses.replace(section, lines=(*section.lines, *notes.get(section.subject, ())))
        parts.append(Part(found, tuple(plots.get(section.subject, ()))))
        if section.subject == "final_model":
            parts += _mistakes(directory)
        if section.subject == "costs" and (bad := troubles({"": works})):
            parts.append(Part(bad))
    return Page(f"Run {record['name']}", result.lines, (*_run_facts(record), *_facts(directory, record)), tuple(parts))


def _mistakes(directory: RunDirectory) -> Iterator[Part]:
    """What the final model makes of test examples, by what its task left of them."""
    predictions, mistakes = (
        directory.read_table(path) if directory.exists(path) else pa.table({})
        for path in (PREDICTIONS_PATH, MISTAKES_PATH)
    )
    model = directory.read_json(MODEL_RECORD_PATH) if directory.exists(MODEL_RECORD_PATH) else {}
    if {"label", "predicted"}.issubset(predictions.column_names) and (names := _class_names(model)):
        yield from _mistaken_classes(names, model.get("image_shape"), predictions, mistakes)
    if (outputs := outputs_of(predictions)) and len(predictions):
        yield Part(worst_predictions(predictions, outputs), (residuals_plot(predictions, outputs),))
    if "mask" in mistakes.column_names and len(mistakes) and model:
        lines = ("The image, its mask and the predicted one; grey is not counted.",)
        drawn = masks(mistakes, model["task"]["inputs"]["image_shape"])
        yield Part(Section("Masks it gets wrong", lines=lines), pictures=tuple(drawn))
    if samples := directory.read_json_or_none(SAMPLES_PATH):
        texts = (Preformatted(f"{sample['prompt']}│{sample['text']}") for sample in samples)
        lines = ("The final model goes on from what stands before │.", *texts)
        yield Part(Section("What it writes", lines=lines))


def _class_names(model: Record) -> Sequence[str]:
    """Those of a classifier, by what model.json says."""
    return model.get("class_names") or model.get("task", {}).get("class_names") or ()


def _mistaken_classes(
    names: Sequence[str], image_shape: Sequence[int] | None, predictions: pa.Table, mistakes: pa.Table
) -> Iterator[Part]:
    counts = confusion(predictions, len(names))
    wrong = int(counts.sum() - counts.trace())
    section = Section("What it gets wrong", lines=(f"{wrong:,} of {int(counts.sum()):,} test examples are wrong.",))
    plots: tuple[Plot, ...] = ()
    if len(names) <= MOST_CLASSES:
        plots = (confusion_plot(counts, names),)
    elif wrong:
        section = confused_pairs(counts, names)
    yield Part(section, plots)
    if image_shape and "image" in mistakes.column_names and (shown := pictures(mistakes, image_shape, names)):
        lines = (
            f"{len(shown)} of {wrong:,}: those where the predicted class's output exceeds the label's by most. Some "
            "labels may be wrong.",
        )
        yield Part(Section("Examples it gets wrong", lines=lines), pictures=tuple(shown))


def _run_facts(record: Record) -> Iterator[tuple[str, str]]:
    data, model = record["data"], record["model"]
    yield "method", record["method"].replace("_", " ")
    yield "model", f"{model['name']}, {model['num_parameters']:,} parameters"
    if record["stages"].get("rounds"):
        ratios = record["overdetermination_ratio"]["subsets"]
        rounds = len(record["stages"]["rounds"])
        yield "subsets", f"{len(ratios)}, Q {min(ratios):.3g}, {rounds} round{'s' if rounds > 1 else ''}"
    splits = [f"{data[f'num_{split}']:,} {split}" for split in ("train", "validation", "test")]
    yield "data", f"{data['name']}: {', '.join(splits)}"


def _facts(directory: RunDirectory, record: Record) -> Iterator[tuple[str, str]]:
    """Where it lies, when it ran, by which versions and command."""
    yield "directory", record["uri"]
    environment: dict[str, Any] = record.get("environment") or directory.read_json_or_none(ENVIRONMENT_PATH) or {}
    if "started_at" in environment:
        yield "begun", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(environment["started_at"]))
    if wall := (seconds := record.get("seconds") or {}).get("wall"):
        yield "took", f"{wall:.1f} s" + (f" in {num} sessions" if (num := seconds.get("num_sessions", 1)) > 1 else "")
    if packages := environment.get("packages"):
        versions = [f"{name} {version}" for name, version in packages.items() if version]
        commit = f"; commit {environment['commit']}" if environment.get("commit") else ""
        yield "versions", ", ".join([*versions, f"Python {environment['python']}"]) + commit
        yield "driver", f"{environment['platform']}, {environment['num_cpus']} CPUs"
    if "method" in record:
        yield "command", command(record["config"])


def _comparison_page(directory: RunDirectory, record: Record) -> Page:
    result, *rest = comparison_sections(record)
    plots: dict[str, list[Plot]] = {"arms": quality_against_cost(record), "network": [wall_by_network(record)]}
    if found := speed_ups(record):
        plots["speed_ups"] = [found]
    data = record["data"]
    facts = (
        ("data", f"{data['name']}: {data['num_train']:,} train, {data['num_test']:,} test"),
        ("model", f"{record['config']['model']['name']}, {record['model']['num_parameters']:,} parameters"),
        ("seeds", ", ".join(map(str, record["seeds"]))),
        *_facts(directory, record),
    )
    num_verdicts = len(record["verdicts"])
    parts: list[Part] = []
    for section in rest:
        parts.append(Part(section, tuple(plots.get(section.subject, ()))))
        if section.subject == "network":
            parts += _legs(directory, record)
    basis = Part(Section("What it rests on", lines=result.lines[num_verdicts:]))
    return Page(result.title, result.lines[:num_verdicts], facts, (basis, *parts))


def _legs(directory: RunDirectory, record: Record) -> Iterator[Part]:
    """How the arms trained, and what was done when and where; nothing of legs that were not kept."""
    if "legs" not in record:
        line = "Made by a version that did not note which legs an arm consists of: the same command again adds that."
        yield Part(Section("Training", lines=(line,)))
    elif drawn := training_of_arms(record, partial(leg_records, directory)):
        yield Part(Section("Training"), (drawn,))
    if ledgers := leg_works(directory):
        works = [work for own in ledgers.values() for work in own]
        more = ": tuning too, and arms that are compared no more. Reading the test split is not shown"
        lines = tuple(work_lines(ledgers, of=f"{len(ledgers):,} legs", more=more))
        yield Part(Section("Time line", lines=lines), (time_line(works),))
        if bad := troubles(ledgers):
            yield Part(bad)


def _sweep_page(directory: RunDirectory, record: Record) -> Page:
    table, *others, verdict = sweep_sections(record)
    drawn = sweep_plot(record)
    settings = dataclasses.replace(table, title="Settings")
    parts = (Part(settings, (drawn,) if drawn else ()), *map(Part, others), *_trials(directory, record))
    facts = (("varied", "; ".join(f"{key}: {_values(values)}" for key, values in record["space"].items())),)
    return Page(table.title, verdict.lines, (*facts, *_facts(directory, record)), parts)


def _trials(directory: RunDirectory, record: Record) -> Iterator[Part]:
    """How the settings trained, and what was done when and where; with the trials of which that is not known."""
    names = {trial["name"]: trial["state"] for trial in record["trials"]}
    found, ledgers = trial_records(directory, list(names)), trial_works(directory, list(names))
    drawn = training_of_settings(record, found)
    states = {name: f"{name} ({'no report' if state == 'done' else state})" for name, state in names.items()}
    without = ", ".join(told for name, told in states.items() if name not in found)
    lines = (f"Left out: {without}.",) if without else ()
    yield Part(Section("Training", lines=lines), (drawn,) if drawn else ())
    works = [work for own in ledgers.values() for work in own]
    num = sum(name in ledgers for name in names)
    of = f"{num:,} trial{'s' * (num != 1)}" + (" and the trunks they share" if len(ledgers) > num else "")
    lines = tuple(work_lines(ledgers, of=of)) if works else ()
    if without := ", ".join(name for name in names if name not in ledgers):
        lines = (*lines, f"No work is noted of {without}.")
    yield Part(Section("Time line", lines=lines), (time_line(works),) if works else ())
    if bad := troubles(ledgers, of="trial"):
        yield Part(bad)


def _values(values: Any) -> str:
    return ", ".join(map(str, values))
