"""Packs: the pieces of work that one actor does at once, and those that are not given out yet."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from raysubset.data import even_sizes
from raysubset.ledger import Stage
from raysubset.work import Piece


@dataclass(frozen=True)
class Pack:
    """Pieces for one actor at a time: usually one, several where packing was decided on."""

    pieces: tuple[Piece, ...]
    is_trial: bool = False  # their steps are to be timed, packed and one by one, and nothing else

    @property
    def keys(self) -> list[tuple[Stage, int, int | None]]:
        """Stage, round and subset of each ledger entry that it makes."""
        if self.is_trial:
            return [("measuring", 0, None)]
        return [(piece.ledger_stage, piece.round, piece.subset_id) for piece in self.pieces]

    @property
    def node_speed(self) -> float | None:
        """Of the node its first piece is sized for, where sizes are by speed."""
        return self.pieces[0].node_speed

    @property
    def label(self) -> str:
        if self.is_trial:
            return f"packing trial of {len(self.pieces)} subsets"
        if len(self.pieces) == 1:
            return self.pieces[0].label
        return f"subsets {', '.join(str(piece.subset_id) for piece in self.pieces)}"


def in_packs(pieces: Sequence[Piece], most: int) -> list[Pack]:
    """Packs of at most that many pieces, all but equal in size, in order: the same whatever is already done."""
    rest = list(pieces)
    sizes = even_sizes(len(pieces), -(-len(pieces) // most)) if pieces else []
    return [Pack(tuple(rest.pop(0) for _ in range(size))) for size in sizes]


class Backlog:
    """Packs not given out yet, each with the moment it is due, and how often each piece was lost."""

    def __init__(self, packs: Sequence[Pack]) -> None:
        now = time.monotonic()
        self._due: deque[tuple[float, Pack]] = deque((now, pack) for pack in packs)
        self._num_lost: dict[Piece, int] = {}

    def __len__(self) -> int:
        return len(self._due)

    def take(self, speed: float | None = None) -> tuple[Pack, float] | None:
        """The first pack that is due, and the seconds it has been; None if none is.

        For a node of known speed, the first of those that were sized for the speed nearest to it.
        """
        now = time.monotonic()
        due = [entry for entry in self._due if entry[0] <= now]
        if not due:
            return None
        entry = due[0]
        if speed is not None:
            entry = min(due, key=lambda entry: abs((entry[1].node_speed or speed) - speed))
        self._due.remove(entry)
        return entry[1], now - entry[0]

    def put_back(self, pack: Pack, *, in_s: float = 0.0) -> None:
        self._due.append((time.monotonic() + in_s, pack))

    def count_lost(self, pack: Pack, *, got_further: bool = False) -> int:
        """How often in a row the pieces have been lost now, the most of them; one that got further counts anew, from 0.

        As a piece gets further only so often, one that always dies is given up in the end.
        """
        for piece in pack.pieces:
            self._num_lost[piece] = 0 if got_further else self._num_lost.get(piece, 0) + 1
        return max(self._num_lost[piece] for piece in pack.pieces)
