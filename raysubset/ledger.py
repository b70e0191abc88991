"""The record of work: who did what, where, for how long and how it ended; all costs are sums over it.

    ledger = Ledger(run)
    attempt = ledger.next_attempt("subsets", 0, 7)
    ledger.write(Work("subsets", 0, 7, attempt, node=…, device=…, started_at=time.time(), cost=so_far))   # and again
    ledger.write(replace(work, outcome="done", ended_at=time.time(), cost=cost))
    total_cost(ledger.read()).passes(num_train, forward_share)

Each piece of work is one small file that its own process writes, so that nobody waits for anybody; written again as a
heartbeat while it runs, so that what a dead process had done is counted.
"""

import logging
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import pyarrow as pa

from raysubset.config import from_tree
from raysubset.costs import Cost, taken_bytes
from raysubset.errors import one_line

logger = logging.getLogger(__name__)

Stage = Literal["measuring", "trunk", "subsets", "subsamples", "aggregation", "fine_tuning", "conventional", "test"]
Outcome = Literal["running", "done", "lost", "preempted", "failed", "interrupted"]
Key = tuple[Stage, int, int | None]
"""Stage, round and subset of a piece of work; None: not of one subset."""

_FOLDER = "ledger"
_TABLE_PATH = "ledger.parquet"
_ENTRY = re.compile(rf"{_FOLDER}/(\w+)-(\d+)-(all|\d+)-(\d+)\.json")  # Work.path
_HEARTBEAT_S, _REMOTE_HEARTBEAT_S = 2.0, 10.0  # between two of the same work: a request to a bucket costs money
_NUM_AT_ONCE = 16  # object stores answer in tens of milliseconds, many at a time


class Storage(Protocol):
    """What a ledger needs of a run directory."""

    @property
    def local_path(self) -> Path | None: ...

    def exists(self, path: str) -> bool: ...
    def list(self, path: str) -> Sequence[str]: ...
    def delete(self, path: str) -> None: ...
    def write_json(self, path: str, record: Any, *, is_durable: bool = ..., indent: int | None = ...) -> object: ...
    def read_json_or_none(self, path: str) -> Any: ...
    def write_table(self, path: str, table: pa.Table) -> object: ...
    def read_table(self, path: str) -> pa.Table: ...


@dataclass(frozen=True)
class Work:
    """One attempt at one piece of work."""

    stage: Stage
    round: int
    subset: int | None  # None: not of one subset
    attempt: int  # from 0
    node: str  # its address, as Ray has it
    device: str
    started_at: float  # unix s
    ended_at: float | None = None  # unix s; None while running, and for ever if lost
    outcome: Outcome = "running"
    cost: Cost = field(default_factory=Cost)  # of all workers together
    waited_s: float = 0.0  # queued before the start
    error: str | None = None
    num_workers: int = 1
    num_network_bytes: int = 0
    """What its processes have sent or fetched, each transfer once, as if each had a node of its own: files of weights,
    optimizer states, statistics and checkpoints, whatever the storage; from the object store the full set and start
    weights; and gradients. Records (some kB of JSON), and a streamed set's reads, are not in it."""

    @property
    def path(self) -> str:
        """Where its entry lies in the run directory."""
        return f"{_prefix(self.stage, self.round, self.subset)}-{self.attempt:02d}.json"

    @property
    def wall_s(self) -> float:
        """Seconds from the start to the end, or as far as the last heartbeat counted."""
        return self.cost.device_s / self.num_workers if self.ended_at is None else self.ended_at - self.started_at

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"cost": self.cost.to_dict()}

    @classmethod
    def from_dict(cls, record: Any) -> "Work":
        """The inverse of to_dict().

        Raises:
            ValueError: for what is no entry, or no whole one.
        """
        work = from_tree(cls, record, noun="value of a ledger entry")
        if work.to_dict() != record:  # which would count as nothing
            raise ValueError("values of a ledger entry are missing")
        return work


def _prefix(stage: Stage, round: int, subset: int | None) -> str:
    return f"{_FOLDER}/{stage}-{round:04d}-{'all' if subset is None else format(subset, '04d')}"


class Ledger:
    """The entries in one run directory. Pickles if its storage does, so that actors write their own."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    @property
    def heartbeat_s(self) -> float:
        """Seconds between two times that work in hand writes its entry again."""
        return _HEARTBEAT_S if self._storage.local_path else _REMOTE_HEARTBEAT_S

    def write(self, work: Work) -> None:
        """Add an entry, or replace that of the same attempt, in one step."""
        self._storage.write_json(work.path, work.to_dict(), is_durable=work.outcome != "running", indent=None)

    @contextmanager
    def recorded(
        self, stage: Stage, round: int, *, device: str, node: str, waited_s: float = 0.0
    ) -> Iterator[Callable[[Cost], None]]:
        """The entry of work of no single subset that this block does; what it gives closes it as done, at that cost.

        To be called before the result is left, without which all would be done again. A block that an exception leaves
        before has failed; one that is stopped, by Ctrl-C say, was interrupted.
        """
        attempt = self.next_attempt(stage, round, None)
        work = Work(stage, round, None, attempt, node, device, started_at=time.time(), waited_s=waited_s)
        self.write(work)
        closed = []

        def close(cost: Cost, outcome: Outcome = "done", error: str | None = None) -> None:
            closed.append(outcome)
            ended = replace(work, cost=cost, outcome=outcome, ended_at=time.time(), error=error)
            self.write(replace(ended, num_network_bytes=taken_bytes()))

        try:
            yield close
        except BaseException as error:
            if not closed:
                stopped = not isinstance(error, Exception)
                held = Cost(device_s=time.time() - work.started_at)
                close(held, "interrupted" if stopped else "failed", None if stopped else one_line(error))
            raise

    def latest(self, work: Work) -> Work:
        """What the file of the same attempt says now; the work itself where there is none."""
        return self._read(work.path) or work

    def read(self) -> list[Work]:
        """All entries by their start; files that cannot be read are left out with a warning."""
        return _by_start({work.path: work for work in self._read_table()} | dict(self._read_files()))

    def next_attempt(self, stage: Stage, round: int, subset: int | None = None) -> int:
        """One more than the greatest attempt there was, be its entry readable or not."""
        return self.next_attempts().get((stage, round, subset), 0)

    def next_attempts(self) -> dict[Key, int]:
        """next_attempt() of all work that has an entry, by one listing."""
        paths, following = {*self._storage.list(_FOLDER), *(work.path for work in self._read_table())}, {}
        for match in filter(None, map(_ENTRY.fullmatch, paths)):
            key: Any = (match[1], int(match[2]), None if match[3] == "all" else int(match[3]))
            following[key] = max(following.get(key, 0), 1 + int(match[4]))
        return following

    def lacking(self, done: Iterable[Key]) -> list[str]:
        """The entries that are damaged or gone: those that cannot be read, and of work that is done and in none.

        Args:
            done: stage, round and subset of what is known to be done.
        """
        works = self.read()
        read = {work.path for work in works}
        named = {(work.stage, work.round, work.subset) for work in works if work.outcome == "done"}
        earlier = {replace(work, attempt=attempt).path for work in works for attempt in range(work.attempt)}
        unread = {path for path in self._storage.list(_FOLDER) if path not in read} | (earlier - read)
        return sorted(unread | {f"{_prefix(*key)}-…" for key in done if key not in named})

    def close_lost(self) -> list[Work]:
        """Mark as lost what still claims to run, and return it. For a driver that resumes: nobody else is at work."""
        lost = [replace(work, outcome="lost") for work in self.read() if work.outcome == "running"]
        for work in lost:
            self.write(work)
        return lost

    def compact(self) -> None:
        """Gather all entries in ledger.parquet, then delete their files.

        A driver that dies in between leaves entries in both, which are the same. Unreadable files are kept.
        """
        files = dict(self._read_files())
        if files:
            entries = {work.path: work for work in self._read_table()} | files
            self._storage.write_table(_TABLE_PATH, pa.Table.from_pylist([w.to_dict() for w in _by_start(entries)]))
        with ThreadPoolExecutor(_NUM_AT_ONCE) as threads:
            list(threads.map(self._storage.delete, files))

    def _read_files(self) -> Iterable[tuple[str, Work]]:
        paths = self._storage.list(_FOLDER)
        with ThreadPoolExecutor(_NUM_AT_ONCE) as pool:
            works = pool.map(self._read, paths)
            return [(path, work) for path, work in zip(paths, works, strict=True) if work]

    def _read(self, path: str) -> Work | None:
        record = self._storage.read_json_or_none(path)
        try:
            return None if record is None else Work.from_dict(record)
        except ValueError as error:
            logger.warning("%s is damaged: %s; going on as if it were not there", path, error)
            return None

    def _read_table(self) -> list[Work]:
        if not self._storage.exists(_TABLE_PATH):
            return []
        try:
            return [Work.from_dict(record) for record in self._storage.read_table(_TABLE_PATH).to_pylist()]
        except ValueError as error:
            logger.warning("%s; going on as if it were not there", error)
            return []


def _by_start(entries: Mapping[str, Work]) -> list[Work]:
    """Return the entries, given by path, in the order in which their work began."""
    return sorted(entries.values(), key=lambda work: (work.started_at, work.path))


def total_cost(works: Iterable[Work]) -> Cost:
    """Of every attempt, whatever became of it."""
    return sum((work.cost for work in works), Cost())


def lost_cost(works: Iterable[Work]) -> Cost:
    """The part of total_cost() in attempts that did not end well, though their checkpoints may have served others."""
    return total_cost(work for work in works if work.outcome in ("lost", "preempted", "failed"))


def by_stage(works: Iterable[Work]) -> dict[Stage, list[Work]]:
    """The entries of each stage, in the order in which stages began."""
    stages: dict[Stage, list[Work]] = defaultdict(list)
    for work in sorted(works, key=lambda work: work.started_at):
        stages[work.stage].append(work)
    return dict(stages)


def critical_path_passes(works: Iterable[Work], num_train: int, forward_share: float) -> float:
    """Passes one after the other if every subset had a device of its own; each of n workers makes 1/n of a stage's."""
    return _critical_path(works, lambda work: work.cost.passes(num_train, forward_share) / work.num_workers)


def critical_path_s(works: Iterable[Work]) -> float:
    """Seconds of work one after the other if every subset had a device of its own; waiting is left out."""
    return _critical_path(works, lambda work: work.wall_s)


def _critical_path(works: Iterable[Work], length: Callable[[Work], float]) -> float:
    """Sum over stages and rounds, of the subsets in a round only the longest; attempts follow one another.

    So do a subset's minimum and that on its subsample.
    """
    sequential = 0.0
    parallel: dict[int, dict[int | None, float]] = defaultdict(lambda: defaultdict(float))
    for work in works:
        if work.stage in ("subsets", "subsamples"):
            parallel[work.round][work.subset] += length(work)
        else:
            sequential += length(work)
    return sequential + sum(max(subsets.values()) for subsets in parallel.values())
