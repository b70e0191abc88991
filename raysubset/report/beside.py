"""What a run is held against: the run of the other method and the comparison on the same data and network that lie in
its storage path."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from raysubset.config import of_now
from raysubset.quality import quality_of
from raysubset.report.figures import Record, difference, with_error
from raysubset.report.reading import at_once
from raysubset.run_directory import COMPARISON_PATH, REPORT_PATH, RunDirectory

_MOST_LOOKED_AT = 100  # directories, the newest: each is a request to a bucket
_OF_THE_PLACE = ("root", "download")  # of data: where files lie, not what they hold


@dataclass(frozen=True)
class Beside:
    """What lies beside a run."""

    run: Record | None = None  # report.json of a run of the other method
    comparison: Record | None = None  # comparison.json


def find_beside(record: Record) -> Beside:
    """Look through the storage path of a finished run.

    Of several runs of the other method the one with this one's seed counts, and of those the one whose passes in total
    are closest; of several comparisons the one with the most seeds. Storage that cannot be listed has none.
    """
    own, learned = RunDirectory.at(record["uri"]), _learned(of_now(record["config"]))
    try:
        others = own.neighbours()[:_MOST_LOOKED_AT]
    except OSError:
        return Beside()
    runs, comparisons = [], []
    for directory, config in zip(others, at_once(_config, others), strict=True):
        if config is None or _learned(config) != learned:
            continue
        kind = config.get("kind", "run")
        if kind == "comparison" and (found := _finished(directory, COMPARISON_PATH, record)):
            comparisons.append(found)
        elif kind == "run" and config.get("method") != record["method"]:
            runs += [found] if (found := _finished(directory, REPORT_PATH, record)) else []
    passes, seed = record["cost"]["passes"], record["config"].get("seed")
    run = min(
        runs,
        key=lambda one: (one["config"].get("seed") != seed, abs(math.log(one["cost"]["passes"] / passes))),
        default=None,
    )
    return Beside(run, max(comparisons, key=lambda one: len(one["seeds"]), default=None))


def _config(directory: RunDirectory) -> Record | None:
    """What was run there; None where nothing was, or nothing that this version reads."""
    try:
        return directory.read_config()
    except (OSError, ValueError):
        return None


def _learned(config: Record) -> dict[str, Any]:
    """What a config says of data, task and network."""
    data = {key: value for key, value in (config.get("data") or {}).items() if key not in _OF_THE_PLACE}
    return {"data": data, "task": config.get("task"), "model": config.get("model")}


def _finished(directory: RunDirectory, path: str, record: Record) -> Record | None:
    """The report, if it is there and on as many examples: files of one name may have changed."""
    try:
        found = directory.read_json(path)
    except (OSError, ValueError):
        return None
    same = all(found["data"].get(key) == record["data"][key] for key in ("num_train", "num_test"))
    return found if same else None


def held_against(record: Record, beside: Beside) -> Iterator[str]:
    """A sentence on the run and one on the comparison that lie beside a run; none of what does not."""
    quality, cost = quality_of(record), record["cost"]
    if (other := beside.run) is not None:
        change = difference(record["test"], other["test"], quality)
        error = "" if change.error is None else quality.error(change.error)
        verdict = "within the noise" if change.is_noise else "better" if quality.gain(change.value) > 0 else "worse"
        if change.error is None:
            verdict += ", by one run of each"
        total, critical = (cost[key] / other["cost"][key] for key in ("passes", "critical_path_passes"))
        yield (
            f"Against the {other['method'].replace('_', ' ')} run {other['name']} "
            f"({with_error(other['test'], quality, quality.show)} for {other['cost']['passes']:.2f} passes): "
            f"{quality.change(change.value)}{error} ({verdict}), for {total:.2f} times its passes in total and "
            f"{critical:.2f} times those on its critical path."
        )
    if (found := beside.comparison) is not None:
        words = [verdict["word"] for verdict in found["verdicts"].values()]
        told = f"{words[0]} on both clocks" if len(set(words)) == 1 else " of the passes in total, ".join(words)
        smoke = ", a smoke test" if any(verdict.get("is_smoke_test") for verdict in found["verdicts"].values()) else ""
        yield (
            f"Does a tenth of the cost do? The comparison {found['name']} ({len(found['seeds'])} seeds{smoke}) says: "
            f"{told}{'' if len(set(words)) == 1 else ' of the critical path'}."
        )
