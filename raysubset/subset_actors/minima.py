"""find_minima(): the minima of many pieces of work, those in storage and those still to be found."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from raysubset.events import MinimumDone, Note
from raysubset.quality import Quality, metrics_in_words
from raysubset.subset_actors.packs import Pack, in_packs, num_in_later_rounds
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
    """Return the pieces that have minima, in order: those in storage already, and the others as they are done.

    Arguments, errors and what happens if processes die are those of ActorPool.run(). With a quorum, fewer than all may
    be returned. An actor does up to `per_actor` pieces at once.
    """
    tell = pool.opened.tell
    folders = done_of(pieces)
    packs = in_packs(pieces, per_actor)
    missing = [tuple(p for p in pack.pieces if p.folder not in folders) for pack in packs]
    todo = [Pack(pack_pieces) for pack_pieces in missing if pack_pieces]
    if folders and todo:
        tell(Note(f"{len(folders)} of {len(pieces)} minima are already there"))
    min_done = None if quorum is None else max(0, quorum - len(folders))
    later = num_in_later_rounds(pieces[0], len(packs)) if pieces else 0
    for piece, record in pool.run(todo, start, keep=keep, min_done=min_done, num_in_later_rounds=later):
        assert isinstance(piece, Piece)
        folders.add(piece.folder)
        tell(minimum_done(piece, record, pool.opened.full_set.quality, f"{len(folders)} of {len(pieces)}"))
    return [piece for piece in pieces if piece.folder in folders]


def minimum_done(piece: Piece, record: dict[str, Any], quality: Quality, count: str) -> MinimumDone:
    """Return the event of a minimum.

    Args:
        count: how many of the round's minima there are by now, in words.
    """
    minimum = piece.minimum(record)
    loss = minimum.training.loss if minimum.training else None
    results = [] if loss is None else [f"loss {loss:.4f}" if math.isfinite(loss) else "loss not finite"]
    if record["validation"]:
        results.append(f"validation {metrics_in_words(record['validation'], quality)}")
    if minimum.outcome != "epochs":
        results.append(f"ended by {minimum.outcome}")
    text = f"{piece.label}: {', '.join([*results, f'{minimum.cost.device_s:.1f} s'])} ({count})"
    return MinimumDone(text, piece.ledger_key[0], record)


def done_of(pieces: Sequence[Piece]) -> set[str]:
    """Return the folders of the pieces that have minima."""
    if all(piece.directory.local_path for piece in pieces):
        return {piece.folder for piece in pieces if piece.record() is not None}
    with ThreadPoolExecutor(NUM_READERS) as threads:
        records = threads.map(Piece.record, pieces)
        return {piece.folder for piece, record in zip(pieces, records, strict=True) if record is not None}
