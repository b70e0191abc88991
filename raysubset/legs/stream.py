"""Stream has a pool do legs, each once those that it needs are done. Legs may be added meanwhile."""

from collections.abc import Iterator, Sequence

from raysubset.legs.leg import Leg
from raysubset.subset_actors import ActorPool, Backlog, Outcome, Pack, name_of
from raysubset.training import Weights


class Stream:
    """Gives legs to a pool. What happens if processes die is said there."""

    def __init__(self, pool: ActorPool, start: Weights | None = None, *, keep: float = 0) -> None:
        """Open a stream without legs.

        Args:
            start: the weights of legs that start from fresh ones; None: each makes them from its seed.
            keep: so many idle actors stay when nothing is left.
        """
        self._pool, self._start, self._keep = pool, start, keep
        self._backlog = Backlog(())
        self._results = pool.results(self._backlog, start, keep=keep)
        self._unfinished: dict[str, Leg] = {}  # by the names of their pieces
        self._held: dict[str, tuple[Leg, Outcome]] = {}  # done, and not waited for yet

    def add(self, legs: Sequence[Leg], packs: Sequence[Pack] | None = None, *, num_later: int | None = None) -> None:
        """Add legs that are not done. What they need is done, was added before, or is among them.

        Args:
            packs: their pieces; by default each leg's own piece, alone.
            num_later: so many packs will be added later, as far as is known: actors stay for them. None: as before.
        """
        by_name = {name_of(leg.piece): leg for leg in legs}
        self._unfinished |= by_name
        packs = [Pack((leg.piece,)) for leg in legs] if packs is None else packs
        needs: dict[str, set[str]] = {}
        for pack in packs:
            inputs = (needed for piece in pack.pieces for needed in by_name[name_of(piece)].inputs)
            needs[name_of(pack.pieces[0])] = {name_of(needed.piece) for needed in inputs}
        if num_later is not None:
            self._backlog.num_in_later_rounds = num_later
        self._backlog.add(packs, needs)

    def results(self) -> Iterator[tuple[Leg, Outcome]]:
        """Yield all legs as they are done.

        Raises:
            TimeoutError, CorruptFile: as ActorPool.results() does.
        """
        while self._unfinished:
            yield self._next()

    def wait(self, legs: Sequence[Leg]) -> Iterator[tuple[Leg, Outcome]]:
        """Yield these legs, which were added, as they are done. Others that are done meanwhile are held until then.

        Raises:
            TimeoutError, CorruptFile: as ActorPool.results() does.
        """
        names = {name_of(leg.piece) for leg in legs}
        for name in [name for name in self._held if name in names]:
            names.remove(name)
            yield self._held.pop(name)
        while names:
            leg, outcome = self._next()
            if (name := name_of(leg.piece)) in names:
                names.remove(name)
                yield leg, outcome
            else:
                self._held[name] = leg, outcome

    def _next(self) -> tuple[Leg, Outcome]:
        result = next(self._results, None)
        if result is None:  # all was done before more was added
            self._results = self._pool.results(self._backlog, self._start, keep=self._keep)
            result = next(self._results)
        piece, outcome = result
        return self._unfinished.pop(name_of(piece)), outcome
