"""Build the page of a run, comparison or sweep: its report's sections, and more from files in its directory."""

import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from raysubset.report.beside import find_beside
from raysubset.report.commands import above_command
from raysubset.report.comparison import comparison_parts, training_of_arms, verdicts
from raysubset.report.figures import Record
from raysubset.report.line import line_between_minima
from raysubset.report.parts import Page, Section, drawn, to_html
from raysubset.report.predictions import prediction_sections
from raysubset.report.reading import leg_records, read_works, sessions_of, trial_records
from raysubset.report.run import measured, result, what_follows
from raysubset.report.run_plots import line_plot
from raysubset.report.sweeps import sweep_command, sweep_sections, training_of_settings
from raysubset.report.timeline import pauses, time_line, troubles, work_in_words
from raysubset.run_directory import ENVIRONMENT_PATH, RunDirectory
from raysubset.run_directory.ledger import Ledger, Work
from raysubset.uris import shown

PAGE_PATH = "report/report.html"


def write_page(directory: RunDirectory, record: Record) -> str:
    """Write report/report.html into a finished run's, sweep's or comparison's directory.

    Returns:
        The page's path or URI.
    """
    build = {"sweep": _sweep_page, "comparison": _comparison_page}.get(record.get("kind", ""), _run_page)
    directory.write_bytes(PAGE_PATH, to_html(build(directory, record)).encode())
    return shown(directory.below(PAGE_PATH))


def _run_page(directory: RunDirectory, record: Record) -> Page:
    beside = find_beside(record)
    top, (findings, next_steps) = result(record, beside), what_follows(record, beside)
    parts = [next_steps, *measured(record), *_line(directory, record), *prediction_sections(directory)]
    if works := Ledger(directory).read():
        parts += _work(directory, {"": works})
    story = dataclasses.replace(findings, plots=top.plots)
    facts = (*_run_facts(record), *_facts(directory, record))
    return Page(f"Run {record['name']}", top.lines, parts, story, facts)


def _line(directory: RunDirectory, record: Record) -> Iterator[Section]:
    """Show the loss on the line between two minima, or the reason why it was not measured."""
    rounds = record["stages"].get("rounds")
    if not rounds or len(minima := rounds[-1]["minima"]) < 2:
        return
    try:
        line = line_between_minima(directory, record)
    except ValueError as error:
        text = f"The straight line between two minima was not measured: {error}."
        yield Section("Between two minima", lines=(text,))
    else:
        plot = line_plot(record, line, [minimum["subset_id"] for minimum in minima[:2]])
        yield Section("Between two minima", plots=(plot,))


def _work(
    directory: RunDirectory, ledgers: Mapping[str, Sequence[Work]], lines: Iterable[str] = (), *, of: str = ""
) -> Iterator[Section]:
    """Show what was done when and where, the times in which Ray or its processes started and ended, and what was lost.

    Args:
        ledgers: those of legs or trials by name, with some work; for a run {"": its ledger}.
        of: what each ledger is of: "leg" or "trial".
    """
    works = [work for ledger in ledgers.values() for work in ledger]
    sessions = sessions_of(directory)
    words = list(work_in_words(works, of=of and f"{len(ledgers):,} {of}s in "))
    if gaps := pauses(works, sessions):
        wall, idle = sum(session["wall_s"] for session in sessions), sum(gap.ended - gap.begun for gap in gaps)
        text = f"Of {wall:.1f} s, nothing was at work in {idle:.1f}: Python, Ray and its processes started or ended."
        words.append(text)
    yield Section("Time line", lines=(*words, *lines), plots=(time_line(works, gaps),))
    if section := troubles(ledgers, of=of):
        yield section


def _run_facts(record: Record) -> Iterator[tuple[str, str]]:
    data, model = record["data"], record["model"]
    yield "method", record["method"].replace("_", " ")
    yield "model", f"{model['name']}, {model['num_parameters']:,} parameters"
    splits = [f"{data[f'num_{split}']:,} {split}" for split in ("train", "validation", "test")]
    yield "data", f"{data['name']}: {', '.join(splits)}"


def _facts(directory: RunDirectory, record: Record) -> Iterator[tuple[str, str]]:
    """Yield the directory, the start, the duration and the versions."""
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


def _comparison_page(directory: RunDirectory, record: Record) -> Page:
    data = record["data"]
    facts = (
        ("data", f"{data['name']}: {data['num_train']:,} train, {data['num_test']:,} test"),
        ("model", f"{record['config']['model']['name']}, {record['model']['num_parameters']:,} parameters"),
        ("seeds", ", ".join(map(str, record["seeds"]))),
        *_facts(directory, record),
    )
    basis, arms, *rest = comparison_parts(record)
    story = dataclasses.replace(basis, plots=arms.plots[:1])
    arms = dataclasses.replace(arms, plots=arms.plots[1:])
    parts = (arms, *rest, *_legs(directory, record))
    return Page(f"Comparison {record['name']}", tuple(verdicts(record)), parts, story, facts)


def _legs(directory: RunDirectory, record: Record) -> Iterator[Section]:
    """Show how the arms trained, and what was done when and where; legs that were not kept are left out."""
    if plot := training_of_arms(record, partial(leg_records, directory)):
        yield Section("Training", plots=(plot,))
    if ledgers := read_works(directory):
        line = "Tuning is there too, and arms that are no longer compared; reading the test split is not."
        yield from _work(directory, ledgers, (line,), of="leg")


def _sweep_page(directory: RunDirectory, record: Record) -> Page:
    table, *others, verdict = sweep_sections(record)
    varied = (f"{key}: {', '.join(map(str, values))}" for key, values in record["space"].items())
    settings = dataclasses.replace(table, title="Settings")
    again = [above_command("sweep", record["seeds"]), sweep_command(record, directory.read_config())]
    if (num := math.prod(map(len, record["space"].values()))) > len(record["settings"]):
        again.append(f"It runs all {num} combinations of values that were drawn together in Python (num_samples).")
    parts = (settings, *others, *_trials(directory, record), Section("Recipe", lines=tuple(again)))
    facts = (("varied", "; ".join(varied)), *_facts(directory, record))
    return Page(table.title, verdict.lines, parts, facts=facts)


def _trials(directory: RunDirectory, record: Record) -> Iterator[Section]:
    """Show how the settings trained, and what was done when and where; name the trials of which that is not known."""
    states = {trial["name"]: trial["state"] for trial in record["trials"]}
    records, ledgers = trial_records(directory, list(states)), read_works(directory, list(states))
    plot = training_of_settings(record, records)
    reasons = {name: "no report" if state == "done" else state for name, state in states.items()}
    left_out = ", ".join(f"{name} ({reason})" for name, reason in reasons.items() if name not in records)
    yield Section("Training", lines=(f"Left out: {left_out}.",) if left_out else (), plots=drawn(plot))
    without = ", ".join(name for name in states if name not in ledgers)
    lines = ["Trunks that trials share count as trials."] if ledgers.keys() - states.keys() else []
    lines += [f"No work is recorded for {without}."] if without else []
    if ledgers:
        yield from _work(directory, ledgers, lines, of="trial")
    else:
        yield Section("Time line", lines=tuple(lines))
