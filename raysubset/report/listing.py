"""List the runs, sweeps and comparisons in a storage path, with their results and costs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal

from raysubset.errors import first_line
from raysubset.quality import quality_of
from raysubset.report.figures import Record
from raysubset.report.parts import Section, table
from raysubset.report.reading import sessions_of
from raysubset.run_directory import (
    COMPARISON_PATH,
    CONFIG_PATH,
    REPORT_PATH,
    SWEEP_PATH,
    CorruptFile,
    Lease,
    RunDirectory,
    at_once,
)

_KINDS = {REPORT_PATH: "run", SWEEP_PATH: "sweep", COMPARISON_PATH: "comparison"}
State = Literal["done", "at work", "stopped", "damaged"]


@dataclass(frozen=True)
class Entry:
    """A run, sweep or comparison in a storage path."""

    name: str
    uri: str
    kind: str  # "run", "sweep", "comparison"; "?": it cannot be read
    state: State
    result: str = ""  # a run's quality on the test split, a sweep's best on validation data, a comparison's verdicts
    passes: float | None = None  # in total
    wall_s: float | None = None
    began_at: float | None = None  # start of its first driver, unix s
    flaw: str = ""  # why it is damaged


def list_runs(storage_path: str) -> tuple[list[Entry], int]:
    """Return the entries of a storage path, the newest last, and the number of other folders. Nothing is changed.

    One or two files of each directory are read, many at a time. A directory that cannot be read is a damaged entry.

    Raises:
        ValueError: if the folder does not exist or cannot be read.
    """
    shown = RunDirectory(storage_path, "").shown_storage_path
    try:
        directories = RunDirectory.all_of(storage_path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"{shown} is no folder: give a storage path that holds run directories") from error
    except OSError as error:
        raise ValueError(f"cannot read {shown}: {first_line(error)}; give a storage path that you may read") from error
    entries = [entry for entry in at_once(_entry, directories) if entry is not None]
    entries.sort(key=lambda entry: (entry.began_at is not None, entry.began_at or 0.0, entry.name))
    return entries, len(directories) - len(entries)


def _entry(directory: RunDirectory) -> Entry | None:
    """Return the directory's entry; None if raysubset did not write it."""
    kind, about = "?", (directory.name, directory.uri)
    try:
        files = set(directory.list())
        path = next((path for path in _KINDS if path in files), None)
        if path is not None:
            kind = _KINDS[path]
            entry = _done(about, kind, directory.read_json(path))
            return entry if kind == "run" else replace(entry, began_at=_began_at(sessions_of(directory)))
        if CONFIG_PATH not in files:
            return None
        config = directory.read_config()
        kind = config.get("kind", "run")
        is_held = Lease(directory).is_held()
        sessions = sessions_of(directory)
        wall_s = sum(session["wall_s"] for session in sessions) if sessions else None
        state: State = "at work" if is_held else "stopped"
        return Entry(*about, kind, state, wall_s=wall_s, began_at=_began_at(sessions))
    except (CorruptFile, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return Entry(*about, kind, "damaged", flaw=first_line(error))


def _began_at(sessions: Sequence[Record]) -> float | None:
    return sessions[0]["started_at"] if sessions else None


def _done(about: tuple[str, str], kind: str, record: Record) -> Entry:
    passes, seconds = record.get("cost", {}).get("passes"), record.get("seconds", {}).get("wall")
    began_at = (record.get("environment") or {}).get("started_at")
    quality = quality_of(record)
    if kind == "run":
        result = f"test {quality.phrase(record['test'][quality.name])}"
    elif kind == "sweep":
        swept = [trial for trial in record["trials"] if trial["overrides"].keys() >= record["space"].keys()]
        values = [trial.get(f"validation_{quality.name}") for trial in swept]  # not the conventional baseline's
        best = max((value for value in values if value is not None), key=quality.gain, default=None)
        result = f"best of {len(values)}: validation {quality.phrase(best)}"
    else:
        result = ", ".join(f"{clock.replace('_', ' ')}: {v['word']}" for clock, v in record["verdicts"].items())
    return Entry(*about, kind, "done", result, passes, seconds, began_at)


def listing_section(storage_path: str, entries: Sequence[Entry], num_others: int) -> Section:
    """Return the table that `raysubset ls` prints."""
    lines = []
    if any(entry.state == "stopped" for entry in entries):
        lines.append("The command that raysubset report DIRECTORY shows resumes what has stopped.")
    if num_others:
        lines.append(f"{num_others} other folders are not raysubset's.")
    if not entries:
        return Section(f"{storage_path} holds no run", lines=tuple(lines))
    columns = (
        ("name", lambda entry: entry.name),
        ("", lambda entry: entry.kind),
        ("state", lambda entry: entry.state),
        ("result", lambda entry: entry.result or entry.flaw),
        ("passes", lambda entry: "" if entry.passes is None else f"{entry.passes:.2f}"),
        ("wall s", lambda entry: "" if entry.wall_s is None else f"{entry.wall_s:.0f}"),
        (
            "begun",
            lambda entry: "" if entry.began_at is None else f"{datetime.fromtimestamp(entry.began_at):%Y-%m-%d %H:%M}",
        ),
    )
    return table(f"In {storage_path}", entries, columns, lines)
