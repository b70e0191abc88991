"""ActorPool: keeps actors in work, however the cluster grows or shrinks, and gives lost work to others."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Self

import ray
import torch
from ray.exceptions import GetTimeoutError, RayTaskError

from raysubset.cluster import (
    OUTSIDE_GROUPS,
    STOP_GRACE_S,
    SYSTEM_ERRORS,
    WAIT_NOTICE_S,
    autoscaler_activity,
    describe,
    draining_nodes,
    free_resources,
    num_slots,
    preferably_on,
    put_once,
    refuse_unplaceable,
    workplace,
)
from raysubset.errors import one_line
from raysubset.events import Attempt, Note, Progress, Retry, Start, Waiting
from raysubset.ledger import Ledger, Work
from raysubset.pulse import Watch
from raysubset.run_directory import CorruptFile, checkpoint_path
from raysubset.subset_actors.actor import SubsetActor
from raysubset.subset_actors.cards import memory_warning
from raysubset.subset_actors.packs import Backlog, Pack
from raysubset.training import Cost, Weights
from raysubset.work import AnyPiece, Piece, Report, Run

MOST_UNPLACED = 32  # actors, until more than that are up
WAIT_S = 0.25  # at most, between two looks at everything
ANSWER_S = 5.0  # for an actor that is up and idle to report
POLL_S = 1.0  # between two questions to each actor about its progress
FIRST_BACKOFF_S, MOST_BACKOFF_S = 1.0, 30.0  # before a lost piece is tried again: doubled with each attempt
MOST_START_S = 900.0  # an actor that has not come up is asked for anew: it may be stuck, or still wait for a place
PLACE_ERRORS = (OSError, torch.AcceleratorError)  # of work that failed: storage and devices may do better elsewhere


Result = dict[str, Any] | Exception | None  # a record; why it failed for good; None: it is to be done again


class StalledError(RuntimeError):
    """An actor got no further for longer than actors.stall_s allows; the message says how long."""


class SubsetFailed(RuntimeError):
    """A piece of work has failed for good; the message names it, its node and the cause."""


@dataclass(eq=False)
class _Slot:
    """One actor, as the pool sees it."""

    actor: Any
    where_ref: ray.ObjectRef
    made_at: float
    place: int | None  # which of the preferred nodes it was asked for on
    where: Mapping[str, Any] | None = None  # None: not placed yet
    speed: float | None = None  # of its node, where it is known and matters
    pack: Pack | None = None
    attempts: Sequence[int] = ()  # of its pieces
    result_ref: ray.ObjectRef | None = None
    report_ref: ray.ObjectRef | None = None
    asked_at: float = 0.0  # for the last report
    reports: Mapping[int, Report] = field(default_factory=dict)  # the last, by place in the pack
    watch: Watch | None = None  # of its work
    is_leaving: bool = False  # it was asked to write a checkpoint and stop
    submitted_at: float = 0.0

    @property
    def ip(self) -> str:
        return self.where["ip"] if self.where else "?"


class ActorPool:
    """Actors that take pieces of work as they come free.

    One actor is asked for a piece, up to actors.max_num; Ray places as many as fit now and the rest as room appears, so
    pieces start on the first free slot however the cluster grows or shrinks. When a process or node dies, or storage
    or GPU fail it, or it makes no step for longer than actors.stall_s allows and is killed, the piece is given to
    another actor, unless its minimum was left already: up to actors.max_attempts times in a row that leave no further
    checkpoint. From nodes that are being drained, pieces move with a checkpoint,
    which counts as no attempt. Pieces may come in packs, which an actor does at once: they are lost and tried again
    together, while each ends on its own. Left with an exception, the pool lets its actors write a checkpoint first. If
    the driver dies its actors end with it, and the next driver goes on from their checkpoints.
    """

    def __init__(
        self,
        run: Run,
        *,
        num_gpus: float,
        speed_of_node: Callable[[str], float | None] | None = None,
        preferred_nodes: Sequence[str] = (),
        actor_bytes: int | None = None,
    ) -> None:
        """An actor takes first what was sized for a node as fast as its own, but never waits for it.

        Args:
            speed_of_node: by node id; None: pieces are given out in their order.
            preferred_nodes: ids of nodes, each as often as it is to have an actor while there is room.
            actor_bytes: what an actor's tensors are estimated to take on its card; None: it is not looked at.

        Raises:
            ValueError: if no node has, or could be started with, room for one actor.
        """
        self.opened, self._config, self._num_gpus, self._tell = run, run.config, num_gpus, run.tell
        self._speed_of_node, self._preferred_nodes, self._actor_bytes = speed_of_node, preferred_nodes, actor_bytes
        self._nodes_told_of: set[str] = set()
        self.request = {"CPU": run.config.actors.num_cpus, "GPU": num_gpus}
        refuse_unplaceable(self.request, "subset actors")
        # retries are the pool's: Ray's own would be spent in the seconds before it notices that a node has died
        self._actor_class: Any = ray.remote(SubsetActor)
        self._workplace = workplace()
        self._options = {
            "max_restarts": 0,
            "max_task_retries": 0,
            "max_concurrency": 2,
            "num_cpus": run.config.actors.num_cpus,
            "num_gpus": num_gpus,
        }
        self._slots: list[_Slot] = []
        self._num_failed_starts = 0  # since an actor last came up; of actors asked for together one counts
        self._start_after = -math.inf
        self._idle_since = self._noticed_at = time.monotonic()
        self._waits_told: set[int] = set()  # numbers of actors up with which it was said that others wait
        self._looked_for_drains_at = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        busy = [slot for slot in self._slots if slot.result_ref is not None]
        try:
            if kind is not None and busy:
                for slot in busy:
                    slot.actor.request_stop.remote()
                ray.wait([slot.result_ref for slot in busy], num_returns=len(busy), timeout=STOP_GRACE_S)
        finally:  # also when a second Ctrl-C cuts the grace short
            for slot in list(self._slots):
                self._release(slot)

    def run(
        self,
        packs: Sequence[Pack],
        start: Weights | None,
        *,
        keep: float = 0,
        min_done: int | None = None,
    ) -> Iterator[tuple[AnyPiece, dict[str, Any]]]:
        """Do the pieces, in any order, and yield each with its record as it is done.

        Args:
            packs: what to do.
            start: the weights all of them start from; None: their seeded initialisations.
            keep: so many actors stay for the next call; others are handed back as soon as no pack is left for them.
            min_done: go on without pieces that failed for good as long as this many can still be done; default: all.

        Raises:
            SubsetFailed: if too many pieces failed for good.
            ValueError: if a piece's own work refused its input; the message names the piece.
            TimeoutError: if no actor could be placed in cluster.wait_timeout_s.
        """
        start_ref = None if start is None else put_once(start)
        num_left = sum(len(pack.pieces) for pack in packs)
        for piece, result in self.results(Backlog(packs), start_ref, keep=keep):
            if not isinstance(result, Exception):
                yield piece, result
                continue
            num_left -= 1
            if min_done is None or num_left < min_done:
                raise result
            self._tell(Note(f"going on without {piece.label}: {result}", is_warning=True))

    def try_packing(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Have the first actor that comes up time these pieces' steps, packed and one by one; it stays for run().

        Returns:
            The trial's record and its device, or {"refused": why packing cannot be, "device": …}.

        Raises:
            SubsetFailed, ValueError, TimeoutError: as run(). A trial whose actor dies is tried again likewise.
        """
        ((_, result),) = self.results(Backlog([Pack(tuple(pieces), is_trial=True)]), keep=math.inf)
        if isinstance(result, Exception):
            raise result
        return result

    def results(
        self, backlog: Backlog, start_ref: Sequence[ray.ObjectRef] | None = None, *, keep: float = 0
    ) -> Iterator[tuple[AnyPiece, dict[str, Any] | Exception]]:
        """Do what the backlog holds; each piece with its record, or with why it, or what it needs, failed for good.

        Of a trial, the first piece with the trial's record.

        Raises:
            TimeoutError: as run().
            CorruptFile: if a file that a piece needs is damaged.
        """
        for pack, results in self._results(backlog, start_ref, keep=keep):
            ended = [(p, result) for p, result in zip(pack.pieces, results, strict=False) if result is not None]
            for piece, result in sorted(ended, key=lambda item: isinstance(item[1], Exception)):  # failures last
                yield piece, result
                if not isinstance(result, Exception):
                    backlog.note_done(piece)
                    continue
                for dependent in backlog.drop_dependents(piece):
                    yield dependent, result

    def _results(
        self, backlog: Backlog, start_ref: Sequence[ray.ObjectRef] | None, *, keep: float
    ) -> Iterator[tuple[Pack, list[Result]]]:
        """Each pack with a result for each of its pieces, or of its trial; pieces put back have None for the time."""
        self._idle_since = self._noticed_at = time.monotonic()
        self._waits_told.clear()
        if backlog and not any(slot.where for slot in self._slots):
            self._tell(Waiting(f"actors of {describe(self.request)} each start"))
        while backlog or any(slot.pack for slot in self._slots):
            self._ask_for_actors(len(backlog), keep=backlog.num_waiting + keep)
            self._assign(backlog, start_ref)
            ready = self._wait()
            for slot in list(self._slots):
                pack = slot.pack
                if slot.where is None:
                    self._welcome(slot, is_up=slot.where_ref in ready)
                elif pack is not None and slot.result_ref in ready:
                    yield pack, self._collect(slot, backlog)
                elif pack is not None and (stalled := self._stalled(slot)):
                    yield pack, self._put_back_lost(slot, backlog, stalled)
            self._hear_reports()
            self._leave_draining_nodes()
            self._tell_of_waiting(len(backlog))
        self._ask_for_actors(0, keep=keep)  # what comes next may want the last one's GPU

    def _ask_for_actors(self, num_queued: int, *, keep: float) -> None:
        """As many actors as there are packs, given out or not; those beyond are handed back, unplaced ones first.

        Of those that are up so many are kept. No more wait for a place than are up, or MOST_UNPLACED: of a thousand
        packs on two cores each look at the others would cost more than a small subset.
        """
        num_up = sum(1 for slot in self._slots if slot.where)
        wanted = sum(1 for slot in self._slots if slot.pack) + num_queued
        wanted = min(wanted, self._config.actors.max_num or wanted, num_up + max(num_up, MOST_UNPLACED))
        while len(self._slots) < wanted and time.monotonic() >= self._start_after:
            taken = {slot.place for slot in self._slots}
            place = next((place for place in range(len(self._preferred_nodes)) if place not in taken), None)
            strategy = OUTSIDE_GROUPS if place is None else preferably_on(self._preferred_nodes[place])
            actor_class = self._actor_class.options(**self._options, scheduling_strategy=strategy)
            actor = actor_class.remote(self.opened.full_set_ref, self._num_gpus, self._workplace)
            self._slots.append(_Slot(actor, actor.where.remote(), time.monotonic(), place))
        unplaced = [slot for slot in self._slots if slot.where is None]
        idle = [slot for slot in self._slots if slot.where is not None and slot.pack is None]
        spare = unplaced + idle[int(min(keep, len(idle))) :]
        for slot in spare[: max(0, len(self._slots) - wanted)]:
            self._release(slot)

    def _assign(self, backlog: Backlog, start_ref: Sequence[ray.ObjectRef] | None) -> None:
        for slot in self._slots:
            if slot.where is None or slot.pack is not None or (due := backlog.take(slot.speed)) is None:
                continue
            pack, waited_s = due
            slot.pack, slot.reports, slot.watch = pack, {}, Watch(self._config.actors.stall_s)
            slot.submitted_at, slot.asked_at = time.time(), time.monotonic()
            ledger = Ledger(pack.pieces[0].directory)
            slot.attempts = [ledger.next_attempt(*key) for key in pack.keys]
            if pack.is_trial:
                slot.result_ref = slot.actor.try_packing.remote(pack.pieces, attempt=slot.attempts[0])
                continue
            call = slot.actor.do.remote
            slot.result_ref = call(pack.pieces, start_ref, attempts=slot.attempts, waited_s=waited_s)
            for place, piece in enumerate(pack.pieces):
                self._tell(Start(f"{piece.label} starts on {slot.ip}", self._attempt(slot, place)))

    def _wait(self) -> set[ray.ObjectRef]:
        """Until an actor is up or a piece is done, or for a moment; what has come of all that is waited for."""
        refs = [slot.result_ref or slot.where_ref for slot in self._slots if slot.result_ref or not slot.where]
        if not refs:
            time.sleep(WAIT_S / 5)  # all that is left waits for its next attempt
            return set()
        ray.wait(refs, num_returns=1, timeout=WAIT_S)
        return set(ray.wait(refs, num_returns=len(refs), timeout=0)[0])

    def _welcome(self, slot: _Slot, *, is_up: bool) -> None:
        """Note where a new actor came up; one that could not is replaced by the next _ask_for_actors()."""
        if not is_up:
            if time.monotonic() - slot.made_at > MOST_START_S:
                self._release(slot)
            return
        try:
            slot.where = where = ray.get(slot.where_ref)
            self._num_failed_starts = 0
            slot.speed = self._speed_of_node(where["node"]) if self._speed_of_node else None
            self._warn_of_memory(where)
        except SYSTEM_ERRORS as error:
            self._release(slot)
            if slot.made_at >= self._start_after:
                self._start_after = time.monotonic() + _backoff_s(self._num_failed_starts)
                self._num_failed_starts += 1
            if self._num_failed_starts >= self._config.actors.max_attempts:
                cause = str(error).strip().splitlines()[-1]  # Ray's own words come first
                raise SubsetFailed(f"actors do not come up: {cause}") from error

    def _warn_of_memory(self, where: Mapping[str, Any]) -> None:
        """Say once a node if the actors that may share one of its cards are not likely to fit."""
        if self._actor_bytes is None or where["card_bytes"] is None or where["node"] in self._nodes_told_of:
            return
        warning = memory_warning(
            self._actor_bytes, where["card_bytes"], num_gpus=self._num_gpus, most_actors=len(self._slots)
        )
        if warning:
            self._nodes_told_of.add(where["node"])
            self._tell(Note(f"node {where['ip']}: {warning}", is_warning=True))

    def _collect(self, slot: _Slot, backlog: Backlog) -> list[Result]:
        """What a finished call gave each piece; pieces to be done again are put back."""
        pack, result_ref = slot.pack, slot.result_ref
        assert pack is not None
        assert result_ref is not None
        try:
            results: list[Result] = ray.get(result_ref)
            self._hear(slot, slot.actor.report.remote())
        except SYSTEM_ERRORS as error:
            return self._put_back_lost(slot, backlog, error)
        except RayTaskError as error:
            if isinstance(error.cause, CorruptFile):  # what it was to begin with
                raise error.cause from None
            if isinstance(error.cause, PLACE_ERRORS):
                return self._put_back_lost(slot, backlog, error)
            self._release(slot)  # its own work failed: another attempt would too
            kind = ValueError if isinstance(error.cause, ValueError) else SubsetFailed
            failure = _caused(kind(f"{pack.label} on node {slot.ip}: {one_line(error)}"), error)
            return [failure if record is None else record for record in self._left(pack)]
        results = [
            ValueError(f"{piece.label} on node {slot.ip}: {one_line(result)}")
            if isinstance(result, Exception)
            else result
            for piece, result in zip(pack.pieces, results, strict=False)  # a trial has one result
        ]
        again = tuple(piece for piece, result in zip(pack.pieces, results, strict=False) if result is None)
        if again:  # it was asked to stop, by us or by a signal: no failure, but not to be asked again
            stopped = Pack(again)
            self._tell(Retry(f"{stopped.label} left node {slot.ip} with a checkpoint written", self._attempt(slot)))
            self._release(slot)
            backlog.put_back(stopped)
        slot.pack = slot.result_ref = slot.report_ref = None
        return results

    def _stalled(self, slot: _Slot) -> StalledError | None:
        """Why the actor is to be given up: it stands still, and was said to for as long as it had time."""
        watch = slot.watch
        assert slot.pack is not None
        assert watch is not None
        match watch.look():
            case "lost":
                return StalledError(f"{watch.in_words()}: it was killed (actors.stall_s)")
            case "stalled":
                text = f"{slot.pack.label} on node {slot.ip} stands still: {watch.in_words()}"
                more = f"it is killed in {watch.limit_s:.0f} s unless it makes one (--actors.stall-s)"
                self._tell(Note(f"{text}; {more}", is_warning=True))
        return None

    def _put_back_lost(self, slot: _Slot, backlog: Backlog, error: Exception) -> list[Result]:
        """What a pack has left although its actor was lost; the rest is put back, or has failed for good."""
        pack = slot.pack
        assert pack is not None
        got_further = self._write_lost(slot, error)
        self._release(slot)
        records = self._left(pack)
        if None not in records:
            return records
        rest = pack
        if not pack.is_trial:
            rest = Pack(tuple(p for p, record in zip(pack.pieces, records, strict=True) if record is None))
        num_lost, most = backlog.count_lost(rest, got_further=got_further), self._config.actors.max_attempts
        if num_lost >= most:
            text = f"{rest.label} was lost {num_lost} times in a row, last on node {slot.ip}: {one_line(error)}"
            failure = _caused(SubsetFailed(text), error)
            return [failure if record is None else record for record in records]
        wait_s = _backoff_s(num_lost - 1)
        backlog.put_back(rest, in_s=wait_s)
        count = "" if got_further else f", {num_lost} of {most} times"
        text = f"{rest.label} was lost on node {slot.ip} ({one_line(error)}){count}"
        self._tell(Retry(f"{text}; it starts from its last checkpoint in {wait_s:g} s", self._attempt(slot)))
        return records

    def _left(self, pack: Pack) -> list[Result]:
        """The records of the minima that an actor has left although its call failed; None where there is none."""
        if pack.is_trial:
            return [None]
        return [piece.record() for piece in pack.pieces]

    def _leave_draining_nodes(self) -> None:
        """Have actors on nodes that will go write a checkpoint, so that their pieces move in time."""
        now = time.monotonic()
        if now - self._looked_for_drains_at < POLL_S or not self._slots:
            return
        self._looked_for_drains_at = now
        draining = draining_nodes()
        for slot in [slot for slot in self._slots if slot.where and slot.where["node"] in draining]:
            if slot.pack is None:
                self._release(slot)
            elif not slot.is_leaving:
                slot.is_leaving = True
                slot.actor.request_stop.remote(preempted=True)
                self._tell(Retry(f"node {slot.ip} will go: {slot.pack.label} is to leave it", self._attempt(slot)))

    def _write_lost(self, slot: _Slot, error: Exception) -> bool:
        """Close the ledger entries of a pack whose actor cannot do it any more, with the work it was known to do.

        Returns:
            Whether it left a checkpoint.
        """
        pack = slot.pack
        assert pack is not None
        got_further, ledger = False, Ledger(pack.pieces[0].directory)
        for place, (key, attempt) in enumerate(zip(pack.keys, slot.attempts, strict=True)):
            begun = Work(*key, attempt, slot.ip, device="?", started_at=slot.submitted_at)
            entry = ledger.latest(begun)  # as it began, if it died before it could say so
            if entry.outcome != "running":  # closed by the actor itself
                continue
            if not pack.is_trial:
                piece = pack.pieces[place]
                got_further |= piece.directory.exists(checkpoint_path(piece.folder, attempt))
            told = slot.reports[place].cost if place in slot.reports else Cost()
            cost = max(entry.cost, told, key=lambda cost: cost.num_forward)
            ledger.write(replace(entry, outcome="lost", ended_at=time.time(), cost=cost, error=one_line(error)))
        return got_further

    def _release(self, slot: _Slot) -> None:
        ray.kill(slot.actor)
        self._slots.remove(slot)

    def _hear_reports(self) -> None:
        """Ask each busy actor how far it is every POLL_S, and tell what has been answered meanwhile."""
        now = time.monotonic()
        for slot in self._slots:
            if slot.pack is None:
                continue
            if slot.report_ref is None:
                if now - slot.asked_at >= POLL_S:
                    slot.report_ref, slot.asked_at = slot.actor.report.remote(), now
            elif ray.wait([slot.report_ref], timeout=0)[0]:
                report_ref, slot.report_ref = slot.report_ref, None
                self._hear(slot, report_ref)
                for place, report in slot.reports.items():
                    epochs = f"epoch {report.epoch:.1f} of {report.num_epochs:g}"
                    losses = (report.loss, report.running_loss)
                    loss, running = (number if math.isfinite(number) else None for number in losses)
                    told = "" if running is None else f", loss {running:.4f}"
                    text = f"{slot.pack.pieces[place].label}: {epochs}{told}, {report.examples_per_s:,.0f} examples/s"
                    numbers = (report.epoch, report.num_epochs, loss, report.examples_per_s, running)
                    self._tell(Progress(text, self._attempt(slot, place), *numbers))

    def _hear(self, slot: _Slot, report_ref: ray.ObjectRef) -> None:
        """Take in a report; of an actor that was lost there is none, and the call for its work will tell."""
        with suppress(*SYSTEM_ERRORS, GetTimeoutError):
            pulse, slot.reports, damages = ray.get(report_ref, timeout=ANSWER_S)
            assert slot.watch is not None
            slot.watch.hear(pulse)
            for text in damages:
                self._tell(Note(f"on node {slot.ip}, {text}", is_warning=True))

    def _attempt(self, slot: _Slot, place: int = 0) -> Attempt:
        """The attempt at a piece of the slot's pack."""
        assert slot.pack is not None
        assert slot.where is not None
        where = slot.where
        return Attempt(*slot.pack.keys[place], slot.attempts[place], where["node"], where["ip"], where["pid"])

    def _tell_of_waiting(self, num_queued: int) -> None:
        """Say every few seconds what is waited for, while no actor that was asked for has a place.

        While some have one, work goes on: it is said once that others wait, and only if they may ever find one beside.

        Raises:
            TimeoutError: if none has had a place for cluster.wait_timeout_s.
        """
        now, num_up = time.monotonic(), sum(1 for slot in self._slots if slot.where)
        if num_up:
            self._idle_since = now
        if not num_queued or num_up == len(self._slots):
            self._noticed_at = now
        if now - self._noticed_at < WAIT_NOTICE_S:
            return
        self._noticed_at = now
        num_down, each = len(self._slots) - num_up, describe(self.request)
        waiting = f"{num_down} actors of {each} each wait" if num_down > 1 else f"an actor of {each} waits"
        waiting += " for a place"
        free = f"free are {free_resources(self.request)}{autoscaler_activity()}"
        if (waited_s := now - self._idle_since) > self._config.cluster.wait_timeout_s:
            raise TimeoutError(f"{waiting}, for {waited_s:.0f} s now (cluster.wait_timeout_s); {free}")
        if num_up:
            if num_up in self._waits_told or num_up >= num_slots(self.request, startable=True):
                return
            self._waits_told.add(num_up)
        text = f"{waiting}; work not begun: {num_queued}, actors up: {num_up}, {free}"
        self._tell(Waiting(text))


def _backoff_s(num_before: int) -> float:
    """How long to wait after a failure that had so many before it."""
    return min(FIRST_BACKOFF_S * 2 ** max(0, num_before), MOST_BACKOFF_S)


def _caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error
