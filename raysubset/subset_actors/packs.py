"""Packs: the pieces of work that one actor does at once, and the backlog of packs not given out yet."""

import time
from collections import defaultdict, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from raysubset.data import even_sizes
from raysubset.work import AggregatePiece, AnyPiece, Piece


def name_of(piece: AnyPiece) -> str:
    """Return a text that tells a piece from all others."""
    return f"{piece.directory.name}/{piece.folder}"


@dataclass(frozen=True)
class Pack:
    """Pieces for one actor at a time: usually one, several if packing was decided."""

    pieces: tuple[AnyPiece, ...]

    @property
    def node_speed(self) -> float | None:
        """The speed of the node that its first piece is sized for, if sizes follow speeds."""
        first = self.pieces[0]
        return first.node_speed if isinstance(first, Piece) else None

    @property
    def names_start(self) -> bool:
        """Return True if its pieces read their start from storage, or make their own. Else the start is passed."""
        first = self.pieces[0]
        if isinstance(first, Piece) and first.start_id != "initial":
            return True
        return not isinstance(first, Piece | AggregatePiece) or first.start is not None

    @property
    def label(self) -> str:
        if len(self.pieces) == 1:
            return self.pieces[0].label
        return f"subsets {', '.join(str(piece.ledger_key[2]) for piece in self.pieces)}"


def in_packs(pieces: Sequence[Piece], most: int) -> list[Pack]:
    """Return packs of at most that many pieces, nearly equal in size, in order, whatever is already done."""
    remaining = iter(pieces)
    sizes = even_sizes(len(pieces), -(-len(pieces) // most)) if pieces else []
    return [Pack(tuple(islice(remaining, size))) for size in sizes]


class Backlog:
    """Packs not given out yet, with the time when each is due or the pieces it waits for. It also counts losses.

    Ray Train jobs are held apart: they have the cluster to themselves once no pack is left for actors.
    """

    def __init__(self, packs: Sequence[Pack], needs: Mapping[str, Collection[str]] | None = None) -> None:
        """Hold the packs; see add()."""
        self.num_in_later_rounds = 0  # packs that will be added, as far as is known
        self._due: deque[tuple[float, Pack]] = deque()
        self._jobs: list[Piece] = []  # of Ray Train, which wait for no other piece
        self._num_lost: dict[str, int] = {}
        self._waiting: dict[str, Pack] = {}
        self._unfinished: set[str] = set()  # names of pieces
        self._num_missing: dict[str, int] = {}
        self._dependents: dict[str, list[str]] = defaultdict(list)
        self.add(packs, needs or {})

    def add(self, packs: Sequence[Pack], needs: Mapping[str, Collection[str]]) -> None:
        """Add packs, each due once the pieces are done that it needs.

        Args:
            needs: by name of a piece, the names of those that it needs. Those that were never added are done.
        """
        self._unfinished |= {name_of(piece) for pack in packs for piece in pack.pieces}
        for pack in packs:
            name = name_of(pack.pieces[0])
            needed = {needed for piece in pack.pieces for needed in needs.get(name_of(piece), ())}
            if missing := self._unfinished & needed:
                self._waiting[name], self._num_missing[name] = pack, len(missing)
                for needed_name in missing:
                    self._dependents[needed_name].append(name)
            else:
                self._make_due(pack)

    def __len__(self) -> int:
        """Return how many packs could be given out now, or after a pause."""
        return len(self._due)

    def take_jobs(self) -> list[Piece]:
        """Return the Ray Train jobs that wait for no other piece; they are the caller's to do."""
        jobs, self._jobs = self._jobs, []
        return jobs

    @property
    def num_later(self) -> int:
        """The number of packs that wait for other pieces, or will be added in later rounds."""
        return len(self._waiting) + self.num_in_later_rounds

    def note_done(self, piece: AnyPiece) -> None:
        """Let packs become due that waited for this piece alone; aggregations, for which others wait, come first."""
        self._unfinished.discard(name_of(piece))
        for name in self._dependents.pop(name_of(piece), ()):
            self._num_missing[name] -= 1
            if not self._num_missing[name] and name in self._waiting:
                self._make_due(self._waiting.pop(name))

    def _make_due(self, pack: Pack) -> None:
        first = pack.pieces[0]
        if isinstance(first, Piece) and first.num_workers:
            self._jobs.append(first)
        elif isinstance(first, AggregatePiece):
            self._due.appendleft((time.monotonic(), pack))
        else:
            self.put_back(pack)

    def drop_dependents(self, piece: AnyPiece) -> list[AnyPiece]:
        """Give up the pieces that need this piece, directly or not, and return them in the order of need."""
        dropped: list[AnyPiece] = []
        names = deque([name_of(piece)])
        while names:
            for name in self._dependents.pop(names.popleft(), ()):
                if pack := self._waiting.pop(name, None):
                    dropped += pack.pieces
                    names.append(name)
        return dropped

    def take(self, speed: float | None = None) -> tuple[Pack, float] | None:
        """Return the first pack that is due, and for how many seconds it has been; None if none is due.

        For a node of known speed, take the first of the packs that were sized for the nearest speed.
        """
        now = time.monotonic()
        due = (entry for entry in self._due if entry[0] <= now)
        if speed is None:
            entry = next(due, None)
        else:
            entry = min(due, key=lambda entry: abs((entry[1].node_speed or speed) - speed), default=None)
        if entry is None:
            return None
        self._due.remove(entry)
        return entry[1], now - entry[0]

    def put_back(self, pack: Pack, *, in_s: float = 0.0) -> None:
        self._due.append((time.monotonic() + in_s, pack))

    def count_lost(self, pack: Pack, *, got_further: bool = False) -> int:
        """Count one more loss, and return the highest number of losses in a row among the pieces.

        A piece that got further, by a new checkpoint, is reset to 0. A piece gets further only so often, so one that
        always dies is given up in the end.
        """
        names = [name_of(piece) for piece in pack.pieces]
        for name in names:
            self._num_lost[name] = 0 if got_further else self._num_lost.get(name, 0) + 1
        return max(self._num_lost[name] for name in names)
