"""Minima: which are in storage already, and the event of each that is found."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from raysubset.events import MinimumDone
from raysubset.quality import Quality, metrics_in_words
from raysubset.work import Piece

NUM_READERS = 16  # object stores answer in tens of milliseconds, many at a time


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
