"""SubsetActor: one process on one device that does one piece of work after another."""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import ray
import torch

from raysubset.cluster import get_shared, own_address
from raysubset.costs import count_bytes, taken_bytes
from raysubset.errors import note_place
from raysubset.fine_tuning.streaming import minimizer_on
from raysubset.pulse import Pulse, begin, pulse
from raysubset.run_directory import RunDirectory
from raysubset.training import DivergedError, Shard, Weights, card_bytes
from raysubset.user_code.source_files import Workplace
from raysubset.work import (
    AggregatePiece,
    AnyPiece,
    Piece,
    Report,
    TestPiece,
    TrialPiece,
    leave_aggregate,
    leave_test,
)


class _Damages(logging.Handler):
    """Collects the run directory's warnings in this process, whose log nobody reads."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []
        logging.getLogger(RunDirectory.__module__).addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


class SubsetActor:
    """Does pieces of work of any run on one full set, on the device that Ray gave this process.

    If its process or node dies, the pool notices at its pending call and gives the work to another actor, which resumes
    from the last checkpoints. A second thread answers report() and request_stop() meanwhile.
    """

    def __init__(self, full_set_ref: Sequence[ray.ObjectRef], num_gpus: float, workplace: Workplace) -> None:
        """Enter the driver's workplace and load nothing yet."""
        workplace.enter()
        self._num_gpus = num_gpus
        self._start_id = ""  # of the start weights that this process fetched last
        self._minimizer = minimizer_on(full_set_ref, num_gpus=num_gpus, shard=Shard())
        self._damages = _Damages()
        signal.signal(signal.SIGTERM, self._heed_signal)

    def place(self) -> dict[str, Any]:
        """Return node and process, once the actor is up, and the memory of its card in bytes, if any."""
        node, card = ray.get_runtime_context().get_node_id(), card_bytes(num_gpus=self._num_gpus)
        return {"node": node, "ip": own_address(), "pid": os.getpid(), "card_bytes": card}

    def report(self) -> tuple[Pulse, dict[int, Report]]:
        """Return the pulse, and by place in the pack the report of each piece that has made a step."""
        return pulse(), self._minimizer.reports()

    def request_stop(self, *, preempted: bool = False) -> None:
        """Write a checkpoint after the current step, and return. An actor that was stopped does no further work."""
        self._minimizer.request_stop(preempted=preempted)

    def _heed_signal(self, number: int, frame: object) -> None:
        """Handle SIGTERM, because the machine will go: stop at work like request_stop(), else end the process."""
        if self._minimizer.is_busy:
            self.request_stop(preempted=True)
        else:
            sys.exit(128 + number)

    def do(
        self,
        pieces: Sequence[AnyPiece],
        start_ref: Sequence[ray.ObjectRef] | None,
        *,
        attempts: Sequence[int],
        waited_s: float,
    ) -> tuple[list[dict[str, Any] | DivergedError | None], list[str]]:
        """Do Minimizer.minimize() with the start weights in the object store, or do pieces of another kind.

        Nothing is done again that is there: an actor that was given up may have outlived its node's raylet and finished
        later, with its checkpoints deleted.

        Returns:
            The results, and the files that were found damaged.
        """
        self._damages.texts = []
        try:
            records: list[Any] = [piece.record() for piece in pieces] if any(attempts) else [None]
            if all(records):
                return records, self._damages.texts
            return self._do(pieces, self._start(start_ref), attempts, waited_s), self._damages.texts
        except Exception as error:
            note_place(error)
            raise
        finally:  # no local of the work refers to its tensors any more
            torch.cuda.empty_cache()  # other actors may share the card; without one it does nothing

    def _start(self, start_ref: Sequence[ray.ObjectRef] | None) -> Weights | None:
        """Return the start weights, whose bytes are counted with this piece if they are not those of the last one."""
        taken_bytes()  # drops those of an earlier piece without a ledger entry
        if start_ref is None:
            return None
        start: Weights = get_shared(start_ref)
        if start_ref[0].hex() != self._start_id:
            self._start_id = start_ref[0].hex()
            count_bytes(sum(tensor.nbytes for tensor in start.values()))
        return start

    def _do(
        self, pieces: Sequence[AnyPiece], start: Weights | None, attempts: Sequence[int], waited_s: float
    ) -> list[dict[str, Any] | DivergedError | None]:
        minimizations = [piece for piece in pieces if isinstance(piece, Piece)]
        if minimizations:
            minimize = partial(self._minimizer.minimize, minimizations, start, attempts=attempts, waited_s=waited_s)
            if minimizations[0].by_train:
                from raysubset.fine_tuning.local_mode import in_local_mode  # Ray Train takes two seconds of a CPU

                return in_local_mode(minimize)
            return minimize()
        (piece,), (attempt,) = pieces, attempts
        if isinstance(piece, TrialPiece):
            return [self._minimizer.try_packing(piece, attempt=attempt)]
        begin()
        full_set = self._minimizer.load_full_set()
        place = {"node": own_address(), "waited_s": waited_s, "attempt": attempt}
        if isinstance(piece, AggregatePiece):
            networks = self._minimizer.networks
            return [leave_aggregate(full_set, self._num_gpus, piece, start, networks=networks, **place)[1]]
        assert isinstance(piece, TestPiece)
        return [leave_test(full_set, self._num_gpus, piece, **place)]
