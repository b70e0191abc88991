"""The record of work: who did what, where, for how long and how it ended. All costs are sums over it.

    ledger = Ledger(run)
    attempt = ledger.next_attempt("subsets", 0, 7)
    ledger.write(Work("subsets", 0, 7, attempt, node=…, device=…, started_at=time.time(), cost=so_far))   # and again
    ledger.write(replace(work, outcome="done", ended_at=time.time(), cost=cost))
    total_cost(ledger.read()).passes(num_train, forward_share)

Each piece of work has one small file that its own process writes, so that no process waits for another. The process
writes the file again as a heartbeat, so that the cost of a process that dies is counted.
"""

import logging
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import pyarrow as pa

from raysubset.config import from_tree
from raysubset.costs import Cost, taken_bytes
from raysubset.errors import one_line
from raysubset.run_directory.directory import RunDirectory, at_once

logger = logging.getLogger(__name__)

Stage = Literal["measuring", "trunk", "subsets", "subsamples", "aggregation", "fine_tuning", "conventional", "test"]
Outcome = Literal["running", "done", "lost", "preempted", "failed", "interrupted"]
LOST = ("lost", "preempted", "failed")  # outcomes of attempts whose checkpoints may have served others
Key = tuple[Stage, int, int | None]
"""Stage, round and subset of a piece of work. The subset is None for work on no single subset."""

_FOLDER = "ledger"
_TABLE_PATH = "ledger.parquet"
_ENTRY = re.compile(rf"{_FOLDER}/(\w+)-(\d+)-(all|\d+)-(\d+)\.json")  # Work.path
WRITE_BACK_S = 30.0  # files of shorter work wait for no local disk: in so long a system writes them back by itself
_HEARTBEAT_S, _REMOTE_HEARTBEAT_S = 2.0, 10.0  # between two heartbeats: a request to a bucket costs money


@dataclass(frozen=True)
class Work:
    """One attempt at one piece of work."""

    stage: Stage
    round: int
    subset: int | None  # None: work on no single subset
    attempt: int  # from 0
    node: str  # its address, as Ray reports it
    device: str
    started_at: float  # unix s
    ended_at: float | None = None  # unix s; None while running, and for good if lost
    outcome: Outcome = "running"
    cost: Cost = field(default_factory=Cost)  # of all workers together
    waited_s: float = 0.0  # in the queue, before the start
    error: str | None = None
    num_workers: int = 1
    num_lone_forward: int = 0  # of cost.num_forward, what one of several workers passed alone: it measures the result
    num_network_bytes: int = 0
    """Bytes that the work's processes have sent or fetched, each transfer once, as if each process had its own node.

    They are those of files of weights, optimizer states, statistics and checkpoints on any storage; of the full set and
    start weights in the object store; and of gradients. Records (some kB of JSON) and a streamed set's reads are left
    out."""

    @property
    def path(self) -> str:
        """The entry's path in the run directory."""
        return f"{_prefix(self.stage, self.round, self.subset)}-{self.attempt:02d}.json"

    @property
    def wall_s(self) -> float:
        """Seconds from the start to the end; without an end, to the last heartbeat."""
        return self.cost.device_s / self.num_workers if self.ended_at is None else self.ended_at - self.started_at

    def critical_passes(self, num_train: int, forward_share: float) -> float:
        """Return its passes on the critical path: workers share its work, but not what one of them does alone."""
        alone = Cost(num_forward=self.num_lone_forward).passes(num_train, forward_share)
        return alone + (self.cost.passes(num_train, forward_share) - alone) / self.num_workers

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Any) -> "Work":
        """Return the entry that to_dict() wrote.

        Raises:
            ValueError: if the record is not an entry, or lacks a value.
        """
        work = from_tree(cls, record, noun="value of a ledger entry")
        # from_tree() fills in what is missing, so that its cost would count as 0. Older entries have no lone work
        if work.to_dict() != {"num_lone_forward": 0} | record:
            raise ValueError("values of a ledger entry are missing")
        return work


def _prefix(stage: Stage, round: int, subset: int | None) -> str:
    return f"{_FOLDER}/{stage}-{round:04d}-{'all' if subset is None else format(subset, '04d')}"


class Ledger:
    """The entries in one run directory. Pickles if its storage does, so that actors write their own entries."""

    def __init__(self, storage: RunDirectory) -> None:
        self._storage = storage

    @property
    def heartbeat_s(self) -> float:
        """Seconds between two heartbeats of running work."""
        return _HEARTBEAT_S if self._storage.local_path else _REMOTE_HEARTBEAT_S

    def write(self, work: Work) -> None:
        """Add an entry, or replace the one of the same attempt, atomically."""
        is_durable = work.outcome != "running" and work.cost.device_s > WRITE_BACK_S
        self._storage.write_json(work.path, work.to_dict(), is_durable=is_durable, indent=None)

    def begin(self, work: Work) -> None:
        """Write the first entry of an attempt. Mark earlier ones of the same work that were done as lost.

        The process of such a one died before it wrote the record, or a file that the record names was damaged. Only
        measuring is done several times, once for each kind of node.
        """
        numbers = range(0 if work.stage == "measuring" else work.attempt)
        paths = {replace(work, attempt=attempt).path for attempt in numbers}
        for entry in self._joined({path: entry for path in paths if (entry := self._read(path))}) if paths else ():
            if entry.path in paths and entry.outcome == "done":
                self.write(replace(entry, outcome="lost", error="it left no record, or a damaged one"))
        self.write(work)

    @contextmanager
    def recorded(
        self, stage: Stage, round: int, *, device: str, node: str, waited_s: float = 0.0, attempt: int | None = None
    ) -> Iterator[Callable[[Cost], None]]:
        """Record the block as one piece of work on no single subset. Yield a function that closes the entry as done.

        Call the function with the cost before you write the result: a result without a closed entry is computed again.
        If an exception leaves the block first, the entry is closed as failed, or as interrupted for Ctrl-C and the
        like. If the process dies, the entry stays at "running" until close_lost().
        """
        attempt = self.next_attempt(stage, round, None) if attempt is None else attempt
        work = Work(stage, round, None, attempt, node, device, started_at=time.time(), waited_s=waited_s)
        self.begin(work)
        began, closed = time.perf_counter(), []

        def close(cost: Cost, outcome: Outcome = "done", error: str | None = None) -> None:
            closed.append(outcome)
            ended_at = work.started_at + time.perf_counter() - began  # a clock that is set must not change a duration
            ended = replace(work, cost=cost, outcome=outcome, ended_at=ended_at, error=error)
            self.write(replace(ended, num_network_bytes=taken_bytes()))

        try:
            yield close
        except BaseException as error:
            if not closed:
                stopped = not isinstance(error, Exception)
                cost = Cost(device_s=time.perf_counter() - began)
                close(cost, "interrupted" if stopped else "failed", None if stopped else one_line(error))
            raise

    def latest(self, work: Work) -> Work:
        """Return the attempt's entry as its file has it now; the given one if there is no file."""
        return self._read(work.path) or work

    def read(self) -> list[Work]:
        """Return all entries in order of their start. Files that cannot be read are left out with a warning."""
        return self._joined(self._read_files())

    def next_attempt(self, stage: Stage, round: int, subset: int | None = None) -> int:
        """Return one more than the greatest attempt so far. Unreadable entries count too."""
        return self.next_attempts().get((stage, round, subset), 0)

    def next_attempts(self) -> dict[Key, int]:
        """Return next_attempt() of all work that has an entry, from one listing of the folder."""
        paths, following = {*self._storage.list(_FOLDER), *(work.path for work in self._read_table())}, {}
        for match in filter(None, map(_ENTRY.fullmatch, paths)):
            key: Any = (match[1], int(match[2]), None if match[3] == "all" else int(match[3]))
            following[key] = max(following.get(key, 0), 1 + int(match[4]))
        return following

    def lacking(self, done: Iterable[Key]) -> list[str]:
        """Return the damaged and missing entries: the unreadable ones, and those of finished work without an entry.

        Args:
            done: stage, round and subset of the work that is known to be finished.
        """
        works = self.read()
        read = {work.path for work in works}
        named = {(work.stage, work.round, work.subset) for work in works if work.outcome == "done"}
        earlier = {replace(work, attempt=attempt).path for work in works for attempt in range(work.attempt)}
        unread = {path for path in self._storage.list(_FOLDER) if path not in read} | (earlier - read)
        return sorted(unread | {f"{_prefix(*key)}-…" for key in done if key not in named})

    def close_lost(self) -> list[Work]:
        """Mark entries that still say "running" as lost. Return all entries. Only for a driver that is alone here.

        Call it when nothing runs: before work is resumed, and before costs are summed. An actor that was given up may
        have written a heartbeat after its entry was closed as lost, if it outlived its node's raylet.
        """
        works = self.read()
        for number, work in enumerate(works):
            if work.outcome == "running":
                works[number] = replace(work, outcome="lost")
                self.write(works[number])
        return works

    def compact(self) -> None:
        """Gather all entries in ledger.parquet, then delete their files.

        If the driver dies in between, some entries are in both places, with the same content. Unreadable files stay.
        """
        if files := self._read_files():
            table = pa.Table.from_pylist([work.to_dict() for work in self._joined(files)])
            self._storage.write_table(_TABLE_PATH, table)
        at_once(self._storage.delete, files)

    def _joined(self, files: dict[str, Work]) -> list[Work]:
        """Return the entries of the table and of these files, in order of their start."""
        entries = {work.path: work for work in self._read_table()} | files
        return sorted(entries.values(), key=lambda work: (work.started_at, work.path))

    def _read_files(self) -> dict[str, Work]:
        paths = self._storage.list(_FOLDER)
        return {path: work for path, work in zip(paths, at_once(self._read, paths), strict=True) if work}

    def _read(self, path: str) -> Work | None:
        record = self._storage.read_json_or_none(path)
        try:
            return None if record is None else Work.from_dict(record)
        except ValueError as error:
            logger.warning("%s is damaged: %s; continuing without it", path, error)
            return None

    def _read_table(self) -> list[Work]:
        if not self._storage.exists(_TABLE_PATH):
            return []
        try:
            return [Work.from_dict(record) for record in self._storage.read_table(_TABLE_PATH).to_pylist()]
        except ValueError as error:
            logger.warning("%s; continuing without it", error)
            return []


def total_cost(works: Iterable[Work]) -> Cost:
    """Return the cost of all attempts, whatever their outcome."""
    return sum((work.cost for work in works), Cost())


def by_stage(works: Iterable[Work]) -> dict[Stage, list[Work]]:
    """Return the entries of each stage, in the order in which the stages began."""
    stages: dict[Stage, list[Work]] = defaultdict(list)
    for work in sorted(works, key=lambda work: work.started_at):
        stages[work.stage].append(work)
    return dict(stages)


def critical_path(works: Iterable[Work], length: Callable[[Work], float], *, overlap: bool = False) -> float:
    """Return the sum of lengths over stages and rounds, as if every subset had its own device. Waiting is left out.

    Of a round's subsets only the longest counts. Attempts of one subset add up, and so do its minimum and the minimum
    on its subsample. If rounds overlap (rounds.overlap), a member waits for its own minimum of the round before and for
    the aggregate before the last, and an aggregate for its members and for the aggregate before it.
    """
    alone = 0.0
    members: dict[int, dict[int | None, float]] = defaultdict(lambda: defaultdict(float))
    aggregates: dict[int, float] = defaultdict(float)
    for work in works:
        if work.stage in ("subsets", "subsamples"):
            members[work.round][work.subset] += length(work)
        elif overlap and work.stage == "aggregation":
            aggregates[work.round] += length(work)
        else:
            alone += length(work)
    if not overlap:
        return alone + sum(max(subsets.values()) for subsets in members.values())
    ends, before, last = dict[int | None, float](), 0.0, 0.0  # of members, and of the two newest aggregates
    for round in sorted(members.keys() | aggregates.keys()):
        ends |= {subset: s + max(ends.get(subset, 0.0), before) for subset, s in members[round].items()}
        before, last = last, aggregates[round] + max(last, *ends.values(), 0.0)
    return alone + last
