"""Find what to compare a run with: the run of the other method and the comparison on the same data and network in the
same storage path."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from raysubset.config import of_now
from raysubset.quality import quality_of
from raysubset.report.figures import Record, change_in_words, with_error
from raysubset.run_directory import COMPARISON_PATH, REPORT_PATH, RunDirectory, at_once

_MOST_DIRECTORIES = 100  # the newest ones: reading each is a request to a bucket
_OF_THE_PLACE = ("root", "download")  # data settings that say where files are, not what they hold


@dataclass(frozen=True)
class Beside:
    """The run and the comparison that a run is compared with."""

    run: Record | None = None  # report.json of a run of the other method
    comparison: Record | None = None  # comparison.json


def find_beside(record: Record) -> Beside:
    """Search the storage path of a finished run.

    Of several runs of the other method take one with the same seed, and of those the one with the closest passes in
    total; of several comparisons the one with the most seeds. If the storage cannot be listed, return neither.
    """
    learned = _learned(of_now(record["config"]))
    try:
        others = RunDirectory.at(record["uri"]).neighbours()[:_MOST_DIRECTORIES]
    except OSError:
        return Beside()
    runs, comparisons = [], []
    configs = at_once(lambda directory: _or_none(directory.read_config), others)
    for directory, config in zip(others, configs, strict=True):
        if config is None or _learned(config) != learned:
            continue
        kind = config.get("kind", "run")
        if kind == "comparison" and (comparison := _finished(directory, COMPARISON_PATH, record)):
            comparisons.append(comparison)
        elif kind == "run" and config.get("method") != record["method"]:
            runs += [run] if (run := _finished(directory, REPORT_PATH, record)) else []
    passes, seed = record["cost"]["passes"], record["config"].get("seed")
    closest = min(
        runs,
        key=lambda run: (run["config"].get("seed") != seed, abs(math.log(run["cost"]["passes"] / passes))),
        default=None,
    )
    return Beside(closest, max(comparisons, key=lambda comparison: len(comparison["seeds"]), default=None))


def _or_none(read: Callable[[], Record]) -> Record | None:
    """Return what is read; None if it is not there, or this version cannot read it."""
    try:
        return read()
    except (OSError, ValueError):
        return None


def _learned(config: Record) -> dict[str, Any]:
    """Return a config's settings of data, task and network."""
    data = {key: value for key, value in (config.get("data") or {}).items() if key not in _OF_THE_PLACE}
    return {"data": data, "task": config.get("task"), "model": config.get("model")}


def _finished(directory: RunDirectory, path: str, record: Record) -> Record | None:
    """Return the report, if it exists and is of as many examples: the files of a data set may have changed."""
    report, keys = _or_none(partial(directory.read_json, path)), ("num_train", "num_test")
    return report if report and all(report["data"].get(key) == record["data"][key] for key in keys) else None


def held_against(record: Record, beside: Beside) -> Iterator[str]:
    """Yield a sentence that compares the run with each of the run and the comparison beside it, if there."""
    quality, cost = quality_of(record), record["cost"]
    if (other := beside.run) is not None:
        change_text = change_in_words(record["test"], other["test"], quality, "better", "worse")
        total, critical = (cost[key] / other["cost"][key] for key in ("passes", "critical_path_passes"))
        yield (
            f"Against the {other['method'].replace('_', ' ')} run {other['name']} "
            f"({with_error(other['test'], quality, quality.show)} for {other['cost']['passes']:.2f} passes): "
            f"{change_text}, for {total:.2f} times its passes in total and {critical:.2f} times those on its critical "
            "path."
        )
    if (comparison := beside.comparison) is not None:
        verdicts, num_seeds = comparison["verdicts"].values(), len(comparison["seeds"])
        smoke = ", a smoke test" if any(verdict.get("is_smoke_test") for verdict in verdicts) else ""
        of_total, of_critical_path = (verdict["word"] for verdict in verdicts)
        answer = f"{of_total} of the passes in total, {of_critical_path} of the critical path"
        if of_total == of_critical_path:
            answer = f"{of_total} on both clocks"
        about = f"{comparison['name']} ({num_seeds} seeds{smoke})"
        yield f"Does a tenth of the cost do? The comparison {about} says: {answer}."
