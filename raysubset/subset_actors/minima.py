"""find_minima(): the minima of many pieces of work, those that are there and those still to be made."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from raysubset.events import MinimumDone, Note
from raysubset.quality import metrics_in_words
from raysubset.subset_actors.packs import Pack, in_packs
from raysubset.subset_actors.pool import ActorPool
from raysubset.training import Weights
from raysubset.work import Piece

NUM_READERS = 16  # object stores answer in tens of milliseconds, many at a time


def find_minima(
    pool: ActorPool,
    pieces: Sequence[Piece],
    start: Weights | None,
    *,
    keep: float = 0,
    quorum: int | None = None,
    per_actor: int = 1,
) -> list[Piece]:
    """The pieces whose minima are there, in their order: those that were, and the others as they are done.

    Args, raises and what happens when processes die: as ActorPool.run(). With a quorum, fewer than asked may come back.
    Up to `per_actor` pieces are done at once by an actor.
    """
    tell = pool.opened.tell
    found = done_of(pieces)
    missing = [tuple(p for p in pack.pieces if p.folder not in found) for pack in in_packs(pieces, per_actor)]
    todo = [Pack(rest) for rest in missing if rest]
    if found and todo:
        tell(Note(f"{len(found)} of {len(pieces)} minima are already there"))
    min_done = None if quorum is None else max(0, quorum - len(found))
    for piece, record in pool.run(todo, start, keep=keep, min_done=min_done):
        assert isinstance(piece, Piece)
        found.add(piece.folder)
        minimum = piece.minimum(record)
        loss = minimum.training.loss if minimum.training else None
        told = [] if loss is None else [f"loss {loss:.4f}" if math.isfinite(loss) else "loss not finite"]
        if record["validation"]:
            told.append(f"validation {metrics_in_words(record['validation'], pool.opened.full_set.quality)}")
        if minimum.outcome != "epochs":
            told.append(minimum.outcome)
        text = f"{piece.label}: {', '.join([*told, f'{minimum.cost.device_s:.1f} s'])}"
        text += f" ({len(found)} of {len(pieces)})"
        tell(MinimumDone(text, piece.ledger_key[0], record))
    return [piece for piece in pieces if piece.folder in found]


def done_of(pieces: Sequence[Piece]) -> set[str]:
    """Return the folders of the pieces whose minima are there."""
    if all(piece.directory.local_path for piece in pieces):
        return {piece.folder for piece in pieces if piece.record() is not None}
    with ThreadPoolExecutor(NUM_READERS) as threads:
        records = threads.map(Piece.record, pieces)
        return {piece.folder for piece, record in zip(pieces, records, strict=True) if record is not None}
