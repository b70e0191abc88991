"""One-line texts of errors for messages and records, short lists of names, and errors of damaged and changed files."""

import os
import traceback
from collections.abc import Sequence
from pathlib import Path

from raysubset.uris import without_secrets

_MOST_CHARACTERS = 300
_FOREIGN = (
    "site-packages",
    "dist-packages",
    "<frozen",
    *(os.path.join(os.path.dirname(f), "") for f in (os.__file__, __file__)),
)
_FULL_CARD = (
    "the card is full: give a smaller minimize.batch_size, a larger minimize.accumulation, or an actor more of a "
    "card (actors.num_gpus)"
)
_NOTE = "see "  # what note_place() adds begins so


class CorruptFile(ValueError):
    """A file that differs from what was written. `path` is its path in the run; its content is computed again."""

    def __init__(self, path: str, text: str) -> None:
        super().__init__(path, text)
        self.path = path

    def __str__(self) -> str:
        return self.args[1]


class ChangedFile(ValueError):
    """A file of the user's that is no longer what it was when the command began. No other work may read it."""


def first_line(error: BaseException) -> str:
    """Return the first line of the error's message, or the name of its type if the message is empty."""
    return next(iter(_lines(error)), type(error).__name__)


def one_line(error: BaseException) -> str:
    """Return the error's type, first line and place_of(), and the way out if a card's memory did not suffice. If Ray
    brought the error from a task or actor, describe its cause."""
    cause = getattr(error, "cause", None) or error
    lines, place = _lines(cause), place_of(cause)
    is_full = is_of_full_card(cause)
    text = lines[0] if lines else "no message"
    text = lines[-1] if "error raised in its creation task" in text else text  # Ray's: what was raised stands last
    text = text.partition(" Including")[0] if is_full else text  # what follows is about torch's allocator
    line = f"{type(cause).__name__}: {text}"[:_MOST_CHARACTERS]
    line = line if not place or _NOTE in line else f"{line}; {place}"
    return f"{line}; {_FULL_CARD}" if is_full else line


def counted(number: float, noun: str) -> str:
    """Return '1 epoch', '2 epochs', '0.5 epochs'."""
    shown = f"{number:.4g}" if isinstance(number, float) else f"{number}"
    return f"{shown} {noun}{'' if number == 1 else 's'}"


def per_second(num: float) -> str:
    """Return '12,345', or '0.023' of a large network's examples in a second."""
    return f"{num:,.0f}" if num >= 10 else f"{num:.2g}"


def with_article(value: object) -> str:
    """Return the name of the value's type with its article: 'an int', 'a dict'."""
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' or name == 'ndarray' else 'a'} {name}"


def is_of_full_card(error: BaseException) -> bool:
    """Return True for torch's error if a card's memory does not suffice. This module does not import torch."""
    return (type(error).__module__, type(error).__name__) == ("torch", "OutOfMemoryError")


def place_of(error: BaseException) -> str:
    """Return 'see net.py, line 3, in make', the innermost line of the user's code in the error's traceback, or "".

    Files of Python, of installed packages and of this package are not the user's.
    """
    if noted := [note for note in getattr(error, "__notes__", ()) if note.startswith(_NOTE)]:
        return noted[0]
    if isinstance(error, SyntaxError) and error.filename:
        return f"{_NOTE}{Path(error.filename).name}, line {error.lineno}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not any(part in frame.filename for part in _FOREIGN):
            return f"{_NOTE}{Path(frame.filename).name}, line {frame.lineno}, in {frame.name}"
    return ""


def note_place(error: BaseException) -> None:
    """Attach place_of() to an error that is sent to another process: a traceback is not sent with it."""
    if place := place_of(error):
        error.add_note(place)


def _lines(error: BaseException) -> list[str]:
    """Return the non-empty lines of the message, without the secrets of URIs, which other libraries' errors show."""
    return [line.strip() for line in without_secrets(str(error)).splitlines() if line.strip()]


def listed(names: Sequence[str], *, most: int = 5) -> str:
    """Return the first names, separated by commas, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
