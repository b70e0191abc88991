"""Stream has a pool find the minima and aggregates of overlapping rounds, each as soon as it can be."""

import math
from collections.abc import Sequence
from typing import Any

from raysubset.events import Note
from raysubset.subset_actors import (
    ActorPool,
    Backlog,
    Pack,
    done_of,
    in_packs,
    minimum_done,
    name_of,
    num_in_later_rounds,
)
from raysubset.training import Weights
from raysubset.work import AggregatePiece, AnyPiece, Piece


class Stream:
    """Gives a pool the work on a round and on the members of the next one at once.

    If an actor dies, its pool does the piece again. If the driver dies, the next one finds what is in storage: at most
    two rounds have begun and are not aggregated, since members of a round need the aggregate before the last.
    """

    def __init__(self, pool: ActorPool, start: Weights | None, *, per_actor: int) -> None:
        """Open a stream without pieces.

        Args:
            start: the weights of pieces that name no start.
            per_actor: how many minimizations an actor does at once.
        """
        self._pool, self._per_actor, self._tell = pool, per_actor, pool.opened.tell
        self._backlog = Backlog(())
        self._results = pool.results(self._backlog, start, keep=math.inf)
        self._names: set[str] = set()  # of all pieces
        self._names_stored: set[str] = set()  # of those that were done before
        self._names_done: set[str] = set()
        self._unreported: list[tuple[AnyPiece, dict[str, Any]]] = []

    def add(self, pieces: Sequence[Piece]) -> None:
        """Add a round's minimizations unless they were added. Those in storage count as done; each of the others is
        due once its predecessor is done."""
        if name_of(pieces[0]) in self._names:
            return
        folders, packs, needs = done_of(pieces), [], {}
        stored = {name_of(piece) for piece in pieces if piece.folder in folders}
        self._names |= {name_of(piece) for piece in pieces}
        self._names_stored |= stored
        self._names_done |= stored
        all_packs = in_packs(pieces, self._per_actor)
        self._backlog.num_in_later_rounds = num_in_later_rounds(pieces[0], len(all_packs))
        for pack in all_packs:
            todo = tuple(piece for piece in pack.pieces if isinstance(piece, Piece) and piece.folder not in folders)
            if todo:
                packs.append(Pack(todo))
                predecessors = {piece.predecessor or "" for piece in todo}
                needs[name_of(todo[0])] = predecessors & (self._names - self._names_done)
        self._backlog.add(packs, needs)

    def find(self, pieces: Sequence[Piece]) -> None:
        """Wait for all minima of a round that was added, and report them.

        Raises:
            SubsetFailed, ValueError: if a piece of either round failed for good.
            TimeoutError, CorruptFile: as ActorPool.results() does.
        """
        names, quality = {name_of(piece) for piece in pieces}, self._pool.opened.full_set.quality
        num = len(names & self._names_stored)
        if 0 < num < len(pieces):
            self._tell(Note(f"{num} of {len(pieces)} minima are already there"))
        results, self._unreported = self._unreported, []
        while True:
            for piece, record in results:
                if name_of(piece) in names:
                    assert isinstance(piece, Piece)
                    num += 1
                    self._tell(minimum_done(piece, record, quality, f"{num} of {len(pieces)}"))
                else:
                    self._unreported.append((piece, record))  # until its round is the current one
            if num == len(pieces):
                return
            results = [self._next()]

    def aggregate(self, aggregation: AggregatePiece) -> dict[str, Any]:
        """Have a round aggregated before all other pieces that are due, and return the record. Raises as find()."""
        self._backlog.put_first(Pack((aggregation,)))
        while True:
            piece, record = self._next()
            if isinstance(piece, AggregatePiece):
                return record
            self._unreported.append((piece, record))

    def close(self) -> None:
        """End the stream, all of whose pieces are done. The pool keeps its actors."""
        assert next(self._results, None) is None

    def _next(self) -> tuple[AnyPiece, dict[str, Any]]:
        piece, result = next(self._results)
        if isinstance(result, Exception):
            raise result
        self._names_done.add(name_of(piece))
        return piece, result
