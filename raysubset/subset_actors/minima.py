"""The event of a minimum that is found."""

import math
from typing import Any

from raysubset.events import MinimumDone
from raysubset.quality import Quality, metrics_in_words
from raysubset.work import Piece


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
