"""Legs done on the cluster, each when its inputs are: by subset actors, and data-parallel ones by Ray Train."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from raysubset.data import refuse_changed_files
from raysubset.errors import one_line
from raysubset.events import Event, LegDone, Note, Progress, Retry, Start, Waiting
from raysubset.fine_tuning import fine_tune
from raysubset.ledger import Ledger
from raysubset.legs.leg import Leg, closure, validation_of
from raysubset.quality import metrics_in_words
from raysubset.run_directory import CorruptFile
from raysubset.subset_actors import NUM_READERS, ActorPool, Backlog, Pack, name_of
from raysubset.work import Piece, Run


class LegRunner:
    """Runs legs where the cluster has room, as an ActorPool does: what it says of deaths, drains and Ctrl-C holds here.

    What fails for good, and what needs it, is left out and named. If the driver dies, the next one finds what is done.
    """

    def __init__(self, run: Run, *, num_gpus: float, then: str = "what needs it is left out") -> None:
        """`run` is the comparison or sweep; num_gpus of an actor; `then` says what comes of a leg that failed."""
        self._run, self._num_gpus, self._tell = run, num_gpus, run.tell
        self._of_legs = replace(run, tell=self._hear)
        self._then = then
        self.failed: dict[Leg, str] = {}

    def run(self, finals: Sequence[Leg]) -> None:
        """Do all that the legs need and is not done yet; afterwards `failed` names what could not be.

        Raises:
            ValueError: where the files of a streamed set have changed, or no actor can ever be placed.
            TimeoutError: if none is for cluster.wait_timeout_s.
        """
        legs, damaged = list(dict.fromkeys(leg for final in finals for leg in closure(final))), set[str]()
        while True:
            try:
                self._do_missing(legs)
                return
            except CorruptFile as error:
                if str(error) in damaged:
                    raise
                damaged.add(str(error))  # whose leg is not done, then

    def _hear(self, event: Event) -> None:
        """Tell what is told of one leg among hundreds: troubles, what is waited for, and how far actors are."""
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
            blocked: set[Leg] = set()  # by what Ray Train has to do first; inputs come before what needs them
            for leg in todo:
                if leg.num_workers > 1 or not blocked.isdisjoint(leg.inputs):
                    blocked.add(leg)
            if by_actors := [leg for leg in todo if leg not in blocked]:
                self._do_by_actors(by_actors, done, num_all=len(legs))
            for leg in todo:  # Ray Train takes the whole cluster: one job after the other, when the actors are gone
                if leg.num_workers > 1 and done.issuperset(leg.inputs):
                    refuse_changed_files(self._run.full_set)
                    self._train(leg, done, num_all=len(legs))
            for leg in todo:
                if failed := next((one for one in leg.inputs if one in self.failed), None):
                    self.failed[leg] = self.failed[failed]
            todo = [leg for leg in todo if leg not in done and leg not in self.failed]

    def _do_by_actors(self, legs: Sequence[Leg], done: set[Leg], *, num_all: int) -> None:
        by_name = {name_of(leg.piece): leg for leg in legs}
        needs = {name: [name_of(one.piece) for one in leg.inputs if one not in done] for name, leg in by_name.items()}
        backlog = Backlog([Pack((leg.piece,)) for leg in legs], needs)
        with ActorPool(self._of_legs, num_gpus=self._num_gpus) as pool:
            for piece, result in pool.results(backlog):
                leg = by_name[name_of(piece)]
                if not isinstance(result, Exception):
                    self._note_done(leg, done, num_all=num_all)
                elif self.failed.keys().isdisjoint(leg.inputs):
                    self._fail(leg, one_line(result))
                else:
                    self.failed[leg] = one_line(result)

    def test(self, finals: Sequence[Leg]) -> None:
        """Read the test split, once for each leg: to be called when every choice is made; raises as run() does."""
        refuse_changed_files(self._run.full_set)
        todo = [leg for leg in dict.fromkeys(finals) if leg not in self.failed and leg.tested() is None]
        if todo:
            with ActorPool(self._of_legs, num_gpus=self._num_gpus) as pool:
                for _ in pool.run([Pack((leg.test,)) for leg in todo], None):
                    pass

    def _note_done(self, leg: Leg, done: set[Leg], *, num_all: int) -> None:
        done.add(leg)
        metrics = leg.validation()
        text = "not measured"
        if metrics is not None:
            text = metrics_in_words(metrics, self._run.full_set.quality)
        self._tell(LegDone(f"{leg.key}: validation {text} ({len(done)} of {num_all} legs)", leg.key, metrics))

    def _fail(self, leg: Leg, reason: str) -> None:
        self.failed[leg] = reason
        self._tell(Note(f"{leg.key} failed: {reason}; {self._then}", is_warning=True))

    def _train(self, leg: Leg, done: set[Leg], *, num_all: int) -> None:
        """Data-parallel training by Ray Train."""
        assert isinstance(leg.piece, Piece)
        try:
            fine_tune(self._of_legs, leg.piece, num_workers=leg.num_workers, num_gpus=self._num_gpus)
        except (ValueError, RuntimeError) as error:
            self._fail(leg, one_line(error))
            return
        self._note_done(leg, done, num_all=num_all)


def _record(leg: Leg) -> dict[str, Any] | None:
    """Its record, if it is there with all that it names, as it was written (else None, with a warning where something
    is damaged); what a driver that died left is closed.

    A record that stands for damaged files is deleted: the leg is made again.
    """
    if (record := leg.output.record(whole=True)) is not None:
        return record
    leg.directory.delete(leg.output.record_path)
    Ledger(leg.directory).close_lost()
    return None
