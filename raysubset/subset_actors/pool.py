"""ActorPool: gives pieces of work to actors, and lost work to others, however the cluster grows or shrinks.

Ray Train jobs of several workers are pieces of work too. They take the whole cluster, so each has it to itself.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Self

import ray
import torch
from ray.exceptions import RayTaskError

from raysubset.cluster import STOP_GRACE_S, SYSTEM_ERRORS, describe, draining_nodes, kill_processes, put_once
from raysubset.costs import Cost
from raysubset.errors import ChangedFile, one_line
from raysubset.events import Attempt, Note, Retry, Start, Waiting
from raysubset.fine_tuning import FineTuningFailed, fine_tune
from raysubset.pulse import Watch
from raysubset.run_directory import CorruptFile, checkpoint_path, is_unusable
from raysubset.run_directory.ledger import Key, Ledger, Work
from raysubset.subset_actors.crew import Crew, Slot, SubsetFailed, backoff_s
from raysubset.subset_actors.packs import Backlog, Pack
from raysubset.training import Weights
from raysubset.work import AnyPiece, Piece, Run, TestPiece

WAIT_S = 0.25  # at most, between two looks at results
POLL_S = 1.0  # between two looks at actors' progress, draining nodes and actors without a place
MOST_REPORTS_PER_S = 50  # of all actors together: each costs the driver 1 ms of CPU time
PLACE_ERRORS = (OSError, torch.AcceleratorError)  # of failed work: storage and devices may do better elsewhere
FILE_ERRORS = (CorruptFile, ChangedFile)  # they end all work: the caller has it done again, or the user is told

Outcome = dict[str, Any] | Exception  # a record, or why the work failed for good
Done = tuple[AnyPiece, Outcome]


class ActorPool:
    """Actors that take pieces of work as they become free.

    One actor is requested per piece, up to actors.max_num and to a few more than the cluster can hold. Ray places as
    many as fit now and the others as room appears, so pieces start on the first free slot however the cluster grows or
    shrinks.

    A piece is lost if its process or node dies, if storage or GPU fail it, or if it makes no step for longer than
    actors.stall_s allows and is killed. It is then given to another actor, unless its minimum is in storage already: up
    to actors.max_attempts times in a row without a new checkpoint. From draining nodes, pieces move with a checkpoint,
    which does not count as an attempt.

    Pieces may come in packs, which an actor does at once. They are lost and tried again together, while each ends on
    its own. If the pool is left with an exception, its actors write a checkpoint first. If the driver dies its actors
    end with it, and the next driver resumes from their checkpoints.

    A piece of several workers is a Ray Train job (fine_tune()). It begins when no other piece can be done, after all
    actors have been released. One job is done at a time.
    """

    def __init__(self, run: Run, *, num_gpus: float, **of_crew: Any) -> None:
        """Create the pool with the actors of Crew(), which documents the arguments and errors.

        An actor first takes what was sized for a node as fast as its own, but never waits for it.
        """
        self.opened, self._config, self._tell = run, run.config, run.tell
        self._num_gpus = num_gpus
        self._crew = Crew(run, num_gpus=num_gpus, **of_crew)
        self._next_attempts: dict[str, dict[Key, int]] = {}  # by run directory
        self._looked_at = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        crew = self._crew
        try:
            if kind is not None and crew.busy:
                for slot in crew.busy.values():
                    slot.actor.request_stop.remote()
                ray.wait(list(crew.busy), num_returns=len(crew.busy), timeout=STOP_GRACE_S)
        finally:  # also if a second Ctrl-C cuts the grace period short
            crew.release_all()

    def run(self, packs: Sequence[Pack], *, keep: float = 0) -> Iterator[tuple[AnyPiece, dict[str, Any]]]:
        """Do the pieces, in any order, and yield each with its record as it is done.

        Args:
            keep: so many actors stay for the next call; others are handed back as soon as no pack is left for them.

        Raises:
            SubsetFailed, FineTuningFailed: if a piece failed for good; OSError as results().
            ValueError: if a piece's own work refused its input; the message names the piece.
            TimeoutError: if no actor, or not all workers, could be placed in cluster.wait_timeout_s.
        """
        for piece, result in self.results(Backlog(packs), keep=keep):
            if isinstance(result, Exception):
                raise result
            yield piece, result

    def results(self, backlog: Backlog, start: Weights | None = None, *, keep: float = 0) -> Iterator[Done]:
        """Do the backlog's pieces. Yield each with its record, or the error for which it, or a piece it needs, failed.

        More may be added to the backlog between two results. What a result made due may have started by then.

        Args:
            start: the weights that pieces start from which name no start.
            keep: as run().

        Raises:
            TimeoutError: as run().
            OSError: if storage that is full, read-only or silent failed a piece for good.
            CorruptFile, ChangedFile: if a file that a piece needs is damaged, or of the user's and another one now.
        """
        start_ref = None if start is None else put_once(start)
        while True:
            for results in self._results(backlog, start_ref, keep=keep):
                outcomes = [outcome for piece, result in results for outcome in _outcomes(backlog, piece, result)]
                self._assign(backlog, start_ref)  # actors need not wait while the caller takes the results in
                yield from sorted(outcomes, key=lambda outcome: isinstance(outcome[1], Exception))  # failures last
            if not (jobs := backlog.take_jobs()):
                return
            self._crew.release_all()
            for job in jobs:
                yield from _outcomes(backlog, job, self._train(job))

    def _train(self, job: Piece) -> Outcome:
        try:
            return fine_tune(self.opened, job, num_gpus=self._num_gpus)
        except FILE_ERRORS:
            raise
        except (ValueError, FineTuningFailed) as error:
            return error

    def _results(
        self, backlog: Backlog, start_ref: Sequence[ray.ObjectRef] | None, *, keep: float
    ) -> Iterator[list[Done]]:
        """Yield the outcomes of each pack's pieces, but for those that are put back."""
        crew = self._crew
        crew.begin()
        self._next_attempts.clear()
        if backlog and not crew.num_up:
            self._tell(Waiting(f"actors of {describe(crew.request)} each start"))
        while backlog or crew.busy:
            crew.ask(len(backlog), keep=backlog.num_later + keep, num_later=backlog.num_later)
            self._assign(backlog, start_ref)
            for ref in self._wait():
                if slot := crew.unplaced.get(ref):
                    crew.welcome(slot)
                elif slot := crew.busy.get(ref):
                    yield self._collect(slot, backlog)
            if time.monotonic() - self._looked_at >= POLL_S:
                for slot in list(crew.busy.values()):
                    if (stall := self._stall_error(slot)) is not None:
                        kill_processes([(slot.place["node"], slot.place["pid"])])  # or it would keep its place
                        yield self._put_back_lost(slot, backlog, stall)
                self._hear_reports()
                self._leave_draining_nodes()
                crew.release_stuck()
                crew.tell_of_waiting(len(backlog))
                self._looked_at = time.monotonic()
        later = backlog.num_in_later_rounds
        crew.ask(0, keep=later + keep, num_later=later)  # later work may need the last one's GPU

    def _wait(self) -> list[ray.ObjectRef]:
        """Wait until an actor is up or a piece is done, or for a moment; return all references that are ready."""
        refs = [*self._crew.busy, *self._crew.unplaced]
        if not refs:
            time.sleep(WAIT_S / 5)  # all remaining work waits for its next attempt
        elif ray.wait(refs, num_returns=1, timeout=WAIT_S)[0]:
            return ray.wait(refs, num_returns=len(refs), timeout=0)[0]
        return []

    def _assign(self, backlog: Backlog, start_ref: Sequence[ray.ObjectRef] | None) -> None:
        """Give idle actors packs that are due."""
        for slot in sorted(self._crew.idle, key=lambda slot: slot.requested_at):  # each gets its last subset again
            if (due := backlog.take(slot.speed)) is None:
                return
            pack, waited_s = due
            slot.pack, slot.reports, slot.watch = pack, {}, Watch(self._config.actors.stall_s)
            slot.submitted_at, slot.report_requested_at = time.time(), time.monotonic()
            slot.attempts = self._number_attempts(pack)
            given = None if pack.names_start else start_ref
            for place, piece in enumerate(pack.pieces):  # before it does, as it does not if the lease is lost
                self._tell(Start(f"{piece.label} starts on {slot.ip}", _attempt(slot, place)))
            result_ref = slot.actor.do.remote(pack.pieces, given, attempts=slot.attempts, waited_s=waited_s)
            self._crew.set_busy(slot, result_ref)

    def _number_attempts(self, pack: Pack) -> list[int]:
        """Return the next attempt at each piece, by one listing of a ledger to which only this pool's actors add."""
        directory = pack.pieces[0].directory
        if directory.uri not in self._next_attempts:
            self._next_attempts[directory.uri] = Ledger(directory).next_attempts()
        numbers, keys = self._next_attempts[directory.uri], [piece.ledger_key for piece in pack.pieces]
        attempts = [numbers.get(key, 0) for key in keys]
        numbers |= {key: attempt + 1 for key, attempt in zip(keys, attempts, strict=True)}
        return attempts

    def _collect(self, slot: Slot, backlog: Backlog) -> list[Done]:
        """Return the outcomes of a finished call; pieces to do again are put back."""
        pack = slot.pack
        try:
            results, damages = ray.get(slot.result_ref)
        except SYSTEM_ERRORS as error:
            return self._put_back_lost(slot, backlog, error)
        except RayTaskError as error:
            if isinstance(error.cause, FILE_ERRORS):  # ours to begin with, which Ray wrapped
                raise error.cause from None
            if isinstance(error.cause, PLACE_ERRORS):
                return self._put_back_lost(slot, backlog, error)
            self._crew.release(slot)  # its own work failed, and would fail again
            kind = ValueError if isinstance(error.cause, ValueError) else SubsetFailed
            failure = _caused(kind(f"{pack.label} on node {slot.ip}: {one_line(error)}"), error)
            return [(piece, piece.record() or failure) for piece in pack.pieces]
        for text in damages:
            self._tell(Note(f"on node {slot.ip}, {text}", is_warning=True))
        outcomes, unfinished = list[Done](), list[AnyPiece]()
        for piece, result in zip(pack.pieces, results, strict=True):
            if result is None:
                unfinished.append(piece)
            elif isinstance(result, Exception):
                outcomes.append((piece, ValueError(f"{piece.label} on node {slot.ip}: {one_line(result)}")))
            else:
                outcomes.append((piece, result))
        if unfinished:  # stopped by us or by a signal: not a failure, but this actor gets no more work
            stopped_pack = Pack(tuple(unfinished))
            self._tell(Retry(f"{stopped_pack.label} left node {slot.ip} with a checkpoint written", _attempt(slot)))
            backlog.put_back(stopped_pack)
        if unfinished or slot.is_leaving:
            self._crew.release(slot)
        else:
            self._crew.set_idle(slot)
        return outcomes

    def _stall_error(self, slot: Slot) -> TimeoutError | None:
        """Return why to release an actor, or None: it still stalls after a warning and as long again."""
        watch = slot.watch
        match watch.look():
            case "lost":
                return TimeoutError(f"{watch.in_words()}: it was killed (actors.stall_s)")
            case "stalled":
                text = f"{slot.pack.label} on node {slot.ip} stands still: {watch.in_words()}"
                more = f"it is killed in {watch.limit_s:.0f} s unless it makes one (--actors.stall-s)"
                self._tell(Note(f"{text}; {more}", is_warning=True))
        return None

    def _put_back_lost(self, slot: Slot, backlog: Backlog, error: Exception) -> list[Done]:
        """Return the records that a lost actor has left; pieces without one are put back, or failed for good."""
        got_further = _write_lost(slot, error)
        self._crew.release(slot)
        records = [(piece, piece.record()) for piece in slot.pack.pieces]
        done: list[Done] = [(piece, record) for piece, record in records if record is not None]
        lost_pack = Pack(tuple(piece for piece, record in records if record is None))
        if not lost_pack.pieces:
            return done
        num_lost, most = backlog.count_lost(lost_pack, got_further=got_further), self._config.actors.max_attempts
        if num_lost >= most:
            if isinstance(error, RayTaskError) and is_unusable(error.cause):
                raise error.cause from None  # it is no failure of this piece, without which others could go on
            text = f"{lost_pack.label} was lost {num_lost} times in a row, last on node {slot.ip}: {one_line(error)}"
            failure = _caused(SubsetFailed(text), error)
            return [*done, *((piece, failure) for piece in lost_pack.pieces)]
        wait_s = backoff_s(num_lost - 1)
        backlog.put_back(lost_pack, in_s=wait_s)
        count = "" if got_further else f", {num_lost} of {most} times"
        text = f"{lost_pack.label} was lost on node {slot.ip} ({one_line(error)}){count}"
        self._tell(Retry(f"{text}; it starts from its last checkpoint in {wait_s:g} s", _attempt(slot)))
        return done

    def _leave_draining_nodes(self) -> None:
        """Let actors on draining nodes write a checkpoint, so that their pieces move in time."""
        crew, draining = self._crew, draining_nodes()
        for slot in [slot for slot in crew.idle if slot.place["node"] in draining]:
            crew.release(slot)
        for slot in crew.busy.values():
            if slot.place["node"] in draining and not slot.is_leaving:
                slot.is_leaving = True
                slot.actor.request_stop.remote(preempted=True)
                text = f"node {slot.ip} will go: {slot.pack.label} is to leave it"
                self._tell(Retry(text, _attempt(slot)))

    def _hear_reports(self) -> None:
        """Request a report of each busy actor every POLL_S, of many actors more rarely; take in those that came."""
        now, busy = time.monotonic(), list(self._crew.busy.values())
        every_s = max(POLL_S, min(len(busy) / MOST_REPORTS_PER_S, self._config.actors.stall_s / 4))
        for slot in busy:
            if slot.report_ref is None and now - slot.report_requested_at >= every_s:
                slot.report_ref, slot.report_requested_at = slot.actor.report.remote(), now
        slots = {slot.report_ref: slot for slot in busy if slot.report_ref}
        for report_ref in ray.wait(list(slots), num_returns=len(slots), timeout=0)[0] if slots else ():
            self._hear(slots[report_ref], report_ref)

    def _hear(self, slot: Slot, report_ref: ray.ObjectRef) -> None:
        """Take in a report and pass it on. An actor that was lost, or whose card fails, gives none.

        The call for its work will say so.
        """
        slot.report_ref = None
        try:
            pulse, slot.reports = ray.get(report_ref)
        except (*SYSTEM_ERRORS, RayTaskError):
            return
        slot.watch.hear(pulse)
        for place, report in slot.reports.items():
            self._tell(report.event(_attempt(slot, place), measured=pulse.measured))
        if pulse.measured and not slot.reports:  # an aggregate, or the run's end
            num_done, num = pulse.measured
            self._tell(Waiting(f"{slot.pack.label} is measured; {num_done} of {num} examples"))


def _outcomes(backlog: Backlog, piece: AnyPiece, result: Outcome) -> list[Done]:
    """Tell the backlog of a piece's result. Return it, and if the piece failed, those that need it as failed too."""
    if isinstance(result, Exception):
        return [(failed, result) for failed in (piece, *backlog.drop_dependents(piece))]
    backlog.note_done(piece)
    return [(piece, result)]


def _attempt(slot: Slot, place: int = 0) -> Attempt:
    """Return the attempt at a piece of the slot's pack."""
    node, ip, pid = (slot.place[key] for key in ("node", "ip", "pid"))
    piece = slot.pack.pieces[place]
    return Attempt(*piece.ledger_key, slot.attempts[place], node, ip, pid, piece.directory.name, piece.label)


def _write_lost(slot: Slot, error: Exception) -> bool:
    """Close the ledger entries of a pack whose actor was lost, with the work that it is known to have done.

    Returns:
        Whether it wrote a checkpoint.
    """
    pieces, got_further = slot.pack.pieces, False
    ledger = Ledger(pieces[0].directory)
    for place, (piece, attempt) in enumerate(zip(pieces, slot.attempts, strict=True)):
        if isinstance(piece, TestPiece) and not piece.is_final:
            continue  # it has no entry when it is done
        opening = Work(*piece.ledger_key, attempt, slot.ip, device="?", started_at=slot.submitted_at)
        entry = ledger.latest(opening)  # as it began, if it died before it wrote more
        if entry.outcome != "running":  # closed by the actor itself
            continue
        got_further |= piece.directory.exists(checkpoint_path(piece.folder, attempt))
        known_cost = slot.reports[place].cost if place in slot.reports else Cost()
        cost = max(entry.cost, known_cost, key=lambda cost: cost.num_forward)
        ended_at = max(entry.started_at, time.time())  # by the clocks of two nodes
        ledger.write(replace(entry, outcome="lost", ended_at=ended_at, cost=cost, error=one_line(error)))
    return got_further


def _caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error
