"""An error in a line, for messages and records; many names in a few words; and a damaged file."""

from collections.abc import Sequence

from raysubset.uris import without_secrets

_MOST_CHARACTERS = 300


class CorruptFile(ValueError):
    """A file that is not as it was written, by its path in the run: what it held is to be made again."""

    def __init__(self, path: str, text: str) -> None:
        super().__init__(path, text)
        self.path = path

    def __str__(self) -> str:
        return self.args[1]


def first_line(error: BaseException) -> str:
    """What it says first; its kind where it says nothing."""
    return next(iter(_lines(error)), type(error).__name__)


def one_line(error: BaseException) -> str:
    """Its kind and what it says first; of an error that Ray brought from a task or an actor, those of its cause."""
    cause = getattr(error, "cause", None) or error
    lines = _lines(cause)
    return f"{type(cause).__name__}: {lines[0] if lines else 'no message'}"[:_MOST_CHARACTERS]


def _lines(error: BaseException) -> list[str]:
    """What it says, without empty lines, and without the secrets of URIs, which others' errors show as they are."""
    return [line.strip() for line in without_secrets(str(error)).splitlines() if line.strip()]


def listed(names: Sequence[str], *, most: int = 5) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
