"""A finished run's record; of an unfinished one, how far it is; of a comparison's legs and a sweep's trials, what they
left."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from raysubset.config import Config
from raysubset.ledger import Ledger, Work
from raysubset.report.commands import command
from raysubset.report.figures import Record
from raysubset.run_directory import (
    COMPARISON_PATH,
    CONFIG_PATH,
    REPORT_PATH,
    SWEEP_PATH,
    CorruptFile,
    RunDirectory,
    aggregate_path,
    history_path,
    minimum_folder,
    minimum_path,
    subsample_folder,
)

_NUM_READERS = 16  # object stores answer in tens of milliseconds, many at a time
_LEGS = "legs"  # the folder of a comparison's
_TRIALS, _TRUNKS = "trials", "trunks"  # those of a sweep's
_PARTS = {"sweep": (_TRIALS, (f"/{REPORT_PATH}",)), "comparison": (_LEGS, ("/minimum.json", "/aggregate.json"))}


def at_once(read: Callable[[Any], Any], many: Iterable[Any]) -> list[Any]:
    """read() of each, many at a time."""
    with ThreadPoolExecutor(_NUM_READERS) as threads:
        return list(threads.map(read, many))


def read_report(path: str) -> dict[str, Any]:
    """report.json of a run directory, sweep.json of a sweep's, comparison.json of a comparison's; a path or a URI.

    Raises:
        ValueError: if this is no run directory, one of a newer version, or the run is not finished; then with how far
            it is and how to go on.
    """
    directory = RunDirectory.at(path)
    config = directory.read_config() if directory.exists(CONFIG_PATH) else {}
    for kept in (SWEEP_PATH, COMPARISON_PATH, REPORT_PATH):
        if directory.exists(kept):
            return directory.read_json(kept) | {"uri": directory.uri}  # it may have been moved
    if not directory.exists(CONFIG_PATH):
        what = f"it has no {CONFIG_PATH}" if directory.exists("") else "nothing is there"
        raise ValueError(f"{directory.uri} is no run directory: {what}; give the path of one")
    if (kind := config.get("kind")) in _PARTS:
        folder, files = _PARTS[kind]
        num = sum(path.endswith(files) for path in directory.list(folder, recursive=True))
        done = f"{num} {folder} are done"
        raise ValueError(f"the {kind} {directory.uri} is not finished: {done}. To resume, give the same command again")
    try:
        place = {"storage_path": directory.shown_storage_path}  # it may have been moved, or renamed
        made = Config.from_dict(config | place)
    except ValueError as error:
        raise ValueError(f"{CONFIG_PATH} in {directory.uri} cannot be used: {error}") from error
    again = command(made.to_dict() | ({} if made.run_name() == directory.name else {"name": directory.name}))
    raise ValueError(f"{directory.uri} is not finished: {_how_far(directory, made)}. To go on: {again}")


def _how_far(directory: RunDirectory, config: Config) -> str:
    """What the directory holds of each stage, in words."""
    if config.method == "conventional":
        return _training_done(directory, "conventional") or "no stage is done"
    done = []
    if config.trunk.epochs and (trunk := _training_done(directory, "trunk")):
        done.append(trunk)
    files = directory.list("rounds", recursive=True)
    for round in range(len(files)):  # a round that is begun has one
        which = f"round {round + 1} of {config.rounds.num}"
        minima = [path for path in files if path.startswith(f"rounds/{round:04d}/") and path.endswith("/minimum.json")]
        if aggregate_path(round) in files:
            if aggregate_path(round + 1) not in files:
                done.append(f"{which} done")
        elif minima:
            done.append(f"{which} has {len(minima)} minima and no aggregate")
    if tuned := _training_done(directory, "fine_tuning"):
        done.append(tuned)
    return ", ".join(done) or "no stage is done"


def _training_done(directory: RunDirectory, stage: str) -> str:
    if directory.exists(minimum_path(stage)):
        return f"{stage} done"
    history = directory.read_json_or_none(history_path(stage)) if directory.exists(history_path(stage)) else None
    return f"{stage} is {history[-1]['epoch']:g} epochs far" if history else ""


def leg_works(directory: RunDirectory) -> dict[str, list[Work]]:
    """The ledgers of a finished comparison's legs by their names, tuning's too; none where it was moved without them.

    What still claims to run was lost with a driver: nothing runs any more.
    """
    paths = [path for path in directory.list(_LEGS, recursive=True) if "/ledger/" in path]
    found: dict[str, list[Work]] = defaultdict(list)
    for path, record in _read({path: path for path in paths}, directory).items():
        found[path.split("/")[1]].append(_ended(Work.from_dict(record)))
    return dict(found)


def _read(paths: Mapping[str, str], directory: RunDirectory) -> dict[str, Any]:
    """The JSON files that are there, by the keys of their paths."""
    records = at_once(directory.read_json_or_none, paths.values())
    return {key: record for key, record in zip(paths, records, strict=True) if record is not None}


def _ended(work: Work) -> Work:
    return replace(work, outcome="lost") if work.outcome == "running" else work


def leg_records(directory: RunDirectory, legs: Record) -> dict[str, Record]:
    """What some legs of a comparison came to, by their names: minimum.json, or aggregate.json; those that are there.

    Args:
        legs: those of comparison.json's `legs` that are wanted.
    """
    return _read({key: f"{_LEGS}/{key}/{_leg_path(leg)}" for key, leg in legs.items()}, directory)


def _leg_path(leg: Record) -> str:
    if leg["kind"] == "aggregate":
        return aggregate_path(leg["round"])
    if leg["subset"] is None:
        return minimum_path(leg["stage"])
    folder = subsample_folder if leg["stage"] == "subsamples" else minimum_folder
    return minimum_path(folder(leg["round"], leg["subset"]))


def trial_records(directory: RunDirectory, names: Sequence[str]) -> dict[str, Record]:
    """The reports of a sweep's trials by their names; of those that have one."""
    return _read({name: f"{_TRIALS}/{name}/{REPORT_PATH}" for name in names}, directory)


def trial_works(directory: RunDirectory, names: Sequence[str]) -> dict[str, list[Work]]:
    """The ledgers of a finished sweep's trials and of the trunks they share, by their names; none that is not there.

    A shared trunk's work, which stands in each trial's ledger too, is the trunk's alone.
    """
    trunks = dict.fromkeys(path.split("/")[1] for path in directory.list(_TRUNKS, recursive=True))
    places = [*((_TRUNKS, name) for name in trunks), *((_TRIALS, name) for name in names)]

    def read(place: tuple[str, str]) -> list[Work]:
        folder, name = place
        try:
            return [_ended(work) for work in Ledger(RunDirectory(directory.below(folder), name)).read()]
        except CorruptFile:
            return []

    found, told = {}, set()
    for (_, name), works in zip(places, at_once(read, places), strict=True):
        if own := [work for work in works if work not in told]:
            found[name] = own
            told.update(work for work in own if work.stage == "trunk")
    return found
