"""LegRunner does legs on the cluster, each after its inputs, and goes on without those that fail."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Self

from raysubset.data import refuse_changed_files
from raysubset.errors import one_line
from raysubset.events import Event, LegDone, Note, Progress, Retry, Start, Waiting
from raysubset.legs.leg import Leg, closure, validation_of
from raysubset.quality import metrics_in_words
from raysubset.run_directory import CorruptFile, at_once
from raysubset.run_directory.ledger import Ledger
from raysubset.subset_actors import ActorPool, Backlog, Pack, name_of
from raysubset.work import Run


class LegRunner:
    """Runs legs on actors of an ActorPool, whose docstring says what happens on deaths, drains and Ctrl-C.

    A leg that fails for good is left out with all legs that need it, and `failed` names them. If the driver dies, the
    next one finds the legs that are done. Actors stay between two calls; they end with the runner's context.
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
        self._pool: ActorPool | None = None  # whose actors stay
        self.failed: dict[Leg, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        pool, self._pool = self._pool, None
        if pool:
            pool.__exit__(*error)

    def _actors(self) -> ActorPool:
        self._pool = self._pool or ActorPool(self._quiet_run, num_gpus=self._num_gpus)
        return self._pool

    def run(self, finals: Sequence[Leg]) -> None:
        """Do the legs and all that they need, unless they are done; afterwards `failed` names those that failed.

        Args:
            finals: the last legs.

        Raises:
            ValueError: if the files of a streamed set have changed, or no actor can ever be placed.
            TimeoutError: if no actor is placed within cluster.wait_timeout_s.
        """
        legs, damages = list(closure(*finals)), set[str]()
        while True:
            try:
                self._do_missing(legs)
                return
            except CorruptFile as error:
                self.__exit__(CorruptFile, error, error.__traceback__)  # actors that are at work
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
        records = dict(zip(legs, at_once(_record, legs), strict=True))
        todo = {name_of(leg.piece): leg for leg, record in records.items() if record is None}
        num_done = len(legs) - len(todo)
        for leg, record in records.items():
            if record is not None:
                self._tell(LegDone("", leg.key, validation_of(record), was_there=True))
        if num_done:
            self._tell(Note(f"{num_done} of {len(legs)} legs are already there"))
        if not todo:
            return
        backlog = Backlog([Pack((leg.piece,)) for leg in todo.values()], needs_of(todo.values()))
        for piece, result in self._actors().results(backlog, keep=math.inf):
            leg = todo[name_of(piece)]
            if isinstance(result, Exception):
                if self.failed.keys().isdisjoint(leg.inputs):
                    self._tell(Note(f"{leg.name} failed: {one_line(result)}; {self._then}", is_warning=True))
                self.failed[leg] = one_line(result)
                continue
            num_done, metrics = num_done + 1, validation_of(result)
            text = "not measured" if metrics is None else metrics_in_words(metrics, self._run.full_set.quality)
            text = f"{leg.name}: validation {text} ({num_done} of {len(legs)} legs)"
            self._tell(LegDone(text, leg.key, metrics))

    def test(self, finals: Sequence[Leg]) -> None:
        """Evaluate legs on the test split, each once. Call it after all choices are made; it raises as run() does."""
        refuse_changed_files(self._run.full_set)
        todo = [leg for leg in dict.fromkeys(finals) if leg not in self.failed and leg.tested() is None]
        if todo:
            list(self._actors().run([Pack((leg.test,)) for leg in todo]))


def needs_of(legs: Iterable[Leg]) -> dict[str, set[str]]:
    """Return what each leg's piece needs, for a Backlog."""
    return {name_of(leg.piece): {name_of(needed.piece) for needed in (*leg.inputs, *leg.bases)} for leg in legs}


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
