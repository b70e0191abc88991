"""Stream: the minima and aggregates of rounds that overlap, each done by a pool as soon as it can be."""

import math
from collections.abc import Sequence
from typing import Any

from raysubset.events import Note
from raysubset.subset_actors import ActorPool, Backlog, Pack, done_of, in_packs, minimum_done, name_of
from raysubset.training import Weights
from raysubset.work import AggregatePiece, AnyPiece, Piece


class Stream:
    """Gives a pool the work on a round and on the members of the next one at once.

    If an actor dies, its pool does the piece again. If the driver dies, the next one finds what is in storage: at most
    two rounds have begun and are not aggregated, since members of a round need the aggregate before the last.
    """

    def __init__(self, pool: ActorPool, start: Weights | None, *, per_actor: int) -> None:
        """Take the weights that pieces start from which name no start, and the minimizations an actor does at once."""
        self._pool, self._per_actor, self._tell = pool, per_actor, pool.opened.tell
        self._backlog = Backlog(())
        self._results = pool.results(self._backlog, start, keep=math.inf)
        self._asked: set[str] = set()  # names of added pieces
        self._found: set[str] = set()  # names of those that were in storage
        self._done: set[str] = set()
        self._untold: list[tuple[AnyPiece, dict[str, Any]]] = []

    def add(self, pieces: Sequence[Piece]) -> None:
        """Ask for a round's minima that are neither in storage nor asked for, each once its predecessor's is done."""
        if name_of(pieces[0]) in self._asked:
            return
        there, packs, needs = done_of(pieces), [], {}
        found = {name_of(piece) for piece in pieces if piece.folder in there}
        self._asked |= {name_of(piece) for piece in pieces}
        self._found |= found
        self._done |= found
        for pack in in_packs(pieces, self._per_actor):
            rest = tuple(piece for piece in pack.pieces if isinstance(piece, Piece) and piece.folder not in there)
            if rest:
                packs.append(Pack(rest))
                needs[name_of(rest[0])] = {piece.predecessor or "" for piece in rest} & (self._asked - self._done)
        self._backlog.add(packs, needs)

    def find(self, pieces: Sequence[Piece]) -> None:
        """Wait for all minima of a round that was added, and tell of them.

        Raises:
            SubsetFailed, ValueError: if a piece of either round failed for good.
            TimeoutError, CorruptFile: as ActorPool.results() does.
        """
        names, quality = {name_of(piece) for piece in pieces}, self._pool.opened.full_set.quality
        num = len(names & self._found)
        if 0 < num < len(pieces):
            self._tell(Note(f"{num} of {len(pieces)} minima are already there"))
        untold, self._untold = self._untold, []
        while True:
            for piece, record in untold:
                if name_of(piece) in names:
                    assert isinstance(piece, Piece)
                    num += 1
                    self._tell(minimum_done(piece, record, quality, f"{num} of {len(pieces)}"))
                else:
                    self._untold.append((piece, record))  # until its round is the current one
            if num == len(pieces):
                return
            untold = [self._take()]

    def aggregate(self, aggregation: AggregatePiece) -> dict[str, Any]:
        """Have a round aggregated before other pieces that are due, and return the record. Raises as find() does."""
        self._backlog.put_first(Pack((aggregation,)))
        while True:
            piece, record = self._take()
            if isinstance(piece, AggregatePiece):
                return record
            self._untold.append((piece, record))

    def close(self) -> None:
        """End the pool's work, all of which is done; its actors stay."""
        assert next(self._results, None) is None

    def _take(self) -> tuple[AnyPiece, dict[str, Any]]:
        piece, result = next(self._results)
        if isinstance(result, Exception):
            raise result
        self._done.add(name_of(piece))
        return piece, result
