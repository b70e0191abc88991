"""LegRunner does legs on the cluster, each after its inputs: by subset actors, data-parallel ones by Ray Train."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from raysubset.data import refuse_changed_files
from raysubset.errors import one_line
from raysubset.events import Event, LegDone, Note, Progress, Retry, Start, Waiting
from raysubset.fine_tuning import fine_tune
from raysubset.legs.leg import Leg, closure, validation_of
from raysubset.legs.stream import Stream
from raysubset.quality import metrics_in_words
from raysubset.run_directory import CorruptFile
from raysubset.run_directory.ledger import Ledger
from raysubset.subset_actors import NUM_READERS, ActorPool, Pack
from raysubset.work import Piece, Run


class LegRunner:
    """Runs legs on actors of an ActorPool, whose docstring says what happens on deaths, drains and Ctrl-C.

    A leg that fails for good is left out with all legs that need it, and `failed` names them. If the driver dies, the
    next one finds the legs that are done.
    """

    def __init__(self, run: Run, *, num_gpus: float, then: str = "what needs it is left out") -> None:
        """Open a runner.

        Args:
            run: the comparison or sweep.
            num_gpus: of an actor.
            then: what the warning about a failed leg says of its consequence.
        """
        self._run, self._num_gpus, self._tell = run, num_gpus, run.tell
        self._quiet_run = replace(run, tell=self._pass_on)
        self._then = then
        self.failed: dict[Leg, str] = {}

    def run(self, finals: Sequence[Leg]) -> None:
        """Do the legs and all that they need, unless they are done; afterwards `failed` names those that failed.

        Raises:
            ValueError: if the files of a streamed set have changed, or no actor can ever be placed.
            TimeoutError: if no actor is placed within cluster.wait_timeout_s.
        """
        legs, damages = list(dict.fromkeys(leg for final in finals for leg in closure(final))), set[str]()
        while True:
            try:
                self._do_missing(legs)
                return
            except CorruptFile as error:
                if str(error) in damages:
                    raise
                damages.add(str(error))  # its leg is done again

    def _pass_on(self, event: Event) -> None:
        """Pass on those events of single legs that matter among hundreds: troubles, waiting, and actors' progress."""
        if isinstance(event, Retry | Waiting | Start | Progress) or (isinstance(event, Note) and event.is_warning):
            self._tell(event)

    def _do_missing(self, legs: Sequence[Leg]) -> None:
        refuse_changed_files(self._run.full_set)
        for leg in legs:  # another try may fare better
            self.failed.pop(leg, None)
        with ThreadPoolExecutor(NUM_READERS) as threads:
            records = dict(zip(legs, threads.map(_record, legs), strict=True))
        done = {leg for leg, record in records.items() if record is not None}
        for leg, record in records.items():
            if record is not None:
                self._tell(LegDone("", leg.key, validation_of(record), was_there=True))
        if done:
            self._tell(Note(f"{len(done)} of {len(legs)} legs are already there"))
        todo = [leg for leg in legs if leg not in done]
        while todo:
            blocked: set[Leg] = set()  # legs of Ray Train, and those that need them; inputs come first in `todo`
            for leg in todo:
                if leg.num_workers > 1 or not blocked.isdisjoint(leg.inputs):
                    blocked.add(leg)
            if by_actors := [leg for leg in todo if leg not in blocked]:
                self._do_by_actors(by_actors, done, num_all=len(legs))
            for leg in todo:  # Ray Train takes the whole cluster: one job at a time, after the actors have ended
                if leg.num_workers > 1 and done.issuperset(leg.inputs):
                    refuse_changed_files(self._run.full_set)
                    self._train(leg, done, num_all=len(legs))
            for leg in todo:
                if failed_input := next((needed for needed in leg.inputs if needed in self.failed), None):
                    self.failed[leg] = self.failed[failed_input]
            todo = [leg for leg in todo if leg not in done and leg not in self.failed]

    def _do_by_actors(self, legs: Sequence[Leg], done: set[Leg], *, num_all: int) -> None:
        with ActorPool(self._quiet_run, num_gpus=self._num_gpus) as pool:
            stream = Stream(pool)
            stream.add(legs)
            for leg, result in stream.results():
                if not isinstance(result, Exception):
                    self._note_done(leg, done, num_all=num_all)
                elif self.failed.keys().isdisjoint(leg.inputs):
                    self._fail(leg, one_line(result))
                else:
                    self.failed[leg] = one_line(result)

    def test(self, finals: Sequence[Leg]) -> None:
        """Evaluate legs on the test split, each once. Call it after all choices are made; it raises as run() does."""
        refuse_changed_files(self._run.full_set)
        todo = [leg for leg in dict.fromkeys(finals) if leg not in self.failed and leg.tested() is None]
        if todo:
            with ActorPool(self._quiet_run, num_gpus=self._num_gpus) as pool:
                for _ in pool.run([Pack((leg.test,)) for leg in todo], None):
                    pass

    def _note_done(self, leg: Leg, done: set[Leg], *, num_all: int) -> None:
        done.add(leg)
        metrics = leg.validation()
        text = "not measured"
        if metrics is not None:
            text = metrics_in_words(metrics, self._run.full_set.quality)
        self._tell(LegDone(f"{leg.name}: validation {text} ({len(done)} of {num_all} legs)", leg.key, metrics))

    def _fail(self, leg: Leg, reason: str) -> None:
        self.failed[leg] = reason
        self._tell(Note(f"{leg.name} failed: {reason}; {self._then}", is_warning=True))

    def _train(self, leg: Leg, done: set[Leg], *, num_all: int) -> None:
        """Do a leg of data-parallel training by Ray Train."""
        assert isinstance(leg.piece, Piece)
        try:
            fine_tune(self._quiet_run, leg.piece, num_workers=leg.num_workers, num_gpus=self._num_gpus)
        except (ValueError, RuntimeError) as error:
            self._fail(leg, one_line(error))
            return
        self._note_done(leg, done, num_all=num_all)


def _record(leg: Leg) -> dict[str, Any] | None:
    """Return a leg's record if all files that it names are whole; else None, with a warning if one is damaged.

    The record of damaged files is deleted, so that the leg is done again, and ledger entries of a dead driver are
    closed.
    """
    if (record := leg.output.record(whole=True)) is not None:
        return record
    leg.directory.delete(leg.output.record_path)
    Ledger(leg.directory).close_lost()
    return None
