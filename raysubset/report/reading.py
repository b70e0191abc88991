"""Read the records of finished runs, comparisons' legs and sweeps' trials, or say how far an unfinished run is."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from raysubset.config import Config
from raysubset.report.commands import command
from raysubset.report.figures import Record
from raysubset.run_directory import (
    COMPARISON_PATH,
    CONFIG_PATH,
    REPORT_PATH,
    SESSIONS_PATH,
    SWEEP_PATH,
    RunDirectory,
    aggregate_path,
    at_once,
    minima_folder,
    minimum_folder,
    minimum_path,
    subsample_folder,
)
from raysubset.run_directory.ledger import Ledger, Work

_LEGS = "legs"  # a comparison's folder
_TRIALS, _TRUNKS = "trials", "trunks"  # a sweep's folders
_PARTS = {"sweep": (_TRIALS, (f"/{REPORT_PATH}",)), "comparison": (_LEGS, ("/minimum.json", "/aggregate.json"))}


def read_report(path: str) -> dict[str, Any]:
    """Read a run's report.json, a sweep's sweep.json or a comparison's comparison.json; `path` may be a URI.

    Raises:
        ValueError: if this is no run directory, or one of a newer version; or if the run is not finished, with how far
            it is and how to resume it.
    """
    directory = RunDirectory.at(path)
    config = directory.read_config() if directory.exists(CONFIG_PATH) else None
    for record_path in (SWEEP_PATH, COMPARISON_PATH, REPORT_PATH):
        if directory.exists(record_path):
            return directory.read_json(record_path) | {"uri": directory.uri}  # it may have been moved
    if config is None:
        if not directory.exists(""):
            raise ValueError(f"{directory.uri} is no run directory: nothing is there; give the path of one")
        text = f"{directory.uri} is no run directory: it has no {CONFIG_PATH}; give the path of one, as listed by"
        raise ValueError(f"{text} raysubset ls {shlex.quote(directory.uri)}")
    if (kind := config.get("kind")) in _PARTS:
        folder, files = _PARTS[kind]
        num = sum(path.endswith(files) for path in directory.list(folder, recursive=True))
        far = f"{num} {folder} are done"
        raise ValueError(f"the {kind} {directory.uri} is not finished: {far}. To resume, give the same command again")
    try:
        place = {"storage_path": directory.shown_storage_path}  # it may have been moved, or renamed
        run_config = Config.from_dict(config | place)
    except ValueError as error:
        raise ValueError(f"{CONFIG_PATH} in {directory.uri} cannot be used: {error}") from error
    name = {} if run_config.run_name() == directory.name else {"name": directory.name}
    resume = command(run_config.to_dict() | name)
    raise ValueError(f"{directory.uri} is not finished: {_how_far(directory, run_config)}. To resume: {resume}")


def _how_far(directory: RunDirectory, config: Config) -> str:
    """Say in words what the directory holds of each stage."""
    done = [path for path in directory.list(recursive=True) if path.endswith(("/minimum.json", "/aggregate.json"))]
    words = [f"{stage} done" for stage in ("conventional", "trunk") if minimum_path(stage) in done]
    if any(path.startswith("rounds/") for path in done):
        num_done = sum(path.endswith("/aggregate.json") for path in done)
        num_minima = sum(path.startswith(minima_folder(num_done)) for path in done)
        words.append(f"{num_done} of {config.rounds.num} rounds done, the next round has {num_minima} minima")
    return ", ".join(words) or "no stage is done"


def _read(paths: Mapping[str, str], directory: RunDirectory) -> dict[str, Any]:
    """Read the JSON files that exist, by the keys of their paths."""
    records = at_once(directory.read_json_or_none, paths.values())
    return {key: record for key, record in zip(paths, records, strict=True) if record is not None}


def leg_records(directory: RunDirectory, legs: Record) -> dict[str, Record]:
    """Read the existing records of a part of comparison.json's `legs` by name: minimum.json or aggregate.json."""
    return _read({key: f"{_LEGS}/{key}/{_leg_path(leg)}" for key, leg in legs.items()}, directory)


def _leg_path(leg: Record) -> str:
    if leg["kind"] == "aggregate":
        return aggregate_path(leg["round"])
    if leg["subset"] is None:
        return minimum_path(leg["stage"])
    folder = subsample_folder if leg["stage"] == "subsamples" else minimum_folder
    return minimum_path(folder(leg["round"], leg["subset"]))


def sessions_of(directory: RunDirectory) -> Sequence[Record]:
    """Read the records of the drivers that worked in a directory, the first one first."""
    return (directory.read_json_or_none(SESSIONS_PATH) or {}).get("sessions") or ()


def trial_records(directory: RunDirectory, names: Sequence[str]) -> dict[str, Record]:
    """Read the existing reports of a sweep's trials, by name."""
    return _read({name: f"{_TRIALS}/{name}/{REPORT_PATH}" for name in names}, directory)


def read_works(directory: RunDirectory, trials: Sequence[str] = ()) -> dict[str, list[Work]]:
    """Return by name the existing ledgers of a comparison's legs, or of a sweep's trials and the trunks they share.

    A shared trunk's work is also in each trial's ledger; it is returned for the trunk only. Work recorded as running
    was lost with a driver: nothing runs any more.
    """
    paths = [path for folder in (_LEGS, _TRUNKS) for path in directory.list(folder, recursive=True)]
    folders = dict.fromkeys("/".join(path.split("/")[:2]) for path in paths)
    places = [folder.split("/") for folder in folders] + [[_TRIALS, name] for name in trials]
    all_ledgers = [Ledger(RunDirectory(directory.below(folder), name)) for folder, name in places]
    ledgers, trunk_works = {}, set()
    for (_, name), works in zip(places, at_once(Ledger.read, all_ledgers), strict=True):
        if own_works := [work for work in works if work not in trunk_works]:
            ledgers[name] = [replace(w, outcome="lost") if w.outcome == "running" else w for w in own_works]
            trunk_works.update(work for work in own_works if work.stage == "trunk")
    return ledgers
