"""One-line texts of errors for messages and records, short lists of names, and the error for a damaged file."""

from collections.abc import Sequence

from raysubset.uris import without_secrets

_MOST_CHARACTERS = 300


class CorruptFile(ValueError):
    """A file that differs from what was written. `path` is its path in the run; its content is computed again."""

    def __init__(self, path: str, text: str) -> None:
        super().__init__(path, text)
        self.path = path

    def __str__(self) -> str:
        return self.args[1]


def first_line(error: BaseException) -> str:
    """Return the first line of the error's message, or the name of its type if the message is empty."""
    return next(iter(_lines(error)), type(error).__name__)


def one_line(error: BaseException) -> str:
    """Return the error's type and first line. If Ray brought the error from a task or actor, describe its cause."""
    cause = getattr(error, "cause", None) or error
    lines = _lines(cause)
    return f"{type(cause).__name__}: {lines[0] if lines else 'no message'}"[:_MOST_CHARACTERS]


def _lines(error: BaseException) -> list[str]:
    """Return the non-empty lines of the message, without the secrets of URIs, which other libraries' errors show."""
    return [line.strip() for line in without_secrets(str(error)).splitlines() if line.strip()]


def listed(names: Sequence[str], *, most: int = 5) -> str:
    """Return the first names, separated by commas, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
