"""Define a report's parts, for the terminal and the page alike: sections of tables, lines, plots and pictures."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from raysubset.events import Note
from raysubset.report.drawing import Plot

_NUMBER = re.compile(r"[-+±–…]?\d[\d.,]*\b.*|[-–…]?|not finite")
_TEXT = re.compile(r"[A-Za-z]{4,}")
_NARROW, _FEW_COLUMNS = 78, 6  # characters of a row, and columns, that fit on half a page


class Preformatted(str):
    """A text that is shown with its spaces and line breaks."""


class Command(Preformatted):
    """A command line for the user to copy."""


Line = str | Note  # a str may be Preformatted


@dataclass(frozen=True)
class Picture:
    """An image with a line below it."""

    png: bytes
    width: int  # pixels on the page
    text: str


@dataclass(frozen=True)
class Section:
    """A table, lines of text, or both; the page adds the plots and pictures."""

    title: str
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    lines: tuple[Line, ...] = ()
    plots: tuple[Plot, ...] = ()
    pictures: tuple[Picture, ...] = ()

    @cached_property  # a page reads it for each cell
    def numeric(self) -> frozenset[int]:
        """Return the columns that hold only numbers, and so are aligned right."""
        columns = enumerate(zip(*self.rows, strict=True))
        return frozenset(number for number, cells in columns if number and all(map(_is_number, cells)))

    @property
    def is_wide(self) -> bool:
        """Return True if the section needs more than half of a wide page's width."""
        widest = max((sum(min(len(cell), 30) + 2 for cell in row) for row in self.rows), default=0)
        return (
            widest > _NARROW
            or len(self.columns) > _FEW_COLUMNS
            or len(self.plots) > 1
            or any(plot.is_wide for plot in self.plots)
        )


Column = tuple[str, Callable[[Any], str]]  # its heading, and what writes an item's cell below it


def table(
    title: str,
    items: Iterable[Any],
    columns: Iterable[Column],
    lines: Iterable[Line] = (),
    plots: Iterable[Plot | None] = (),
) -> Section:
    """Return a section with a row for each item, and those plots that are not None."""
    headings, cells = zip(*columns, strict=True)
    rows = tuple(tuple(cell(item) for cell in cells) for item in items)
    return Section(title, headings, rows, tuple(lines), drawn(*plots))


def drawn(*plots: Plot | None) -> tuple[Plot, ...]:
    """Return the plots that are not None: those that have enough to show."""
    return tuple(plot for plot in plots if plot is not None)


def _is_number(cell: str) -> bool:
    return _NUMBER.fullmatch(cell.strip()) is not None and not _TEXT.search(cell)
