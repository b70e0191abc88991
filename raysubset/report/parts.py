"""Define a report's parts, for the terminal and the page alike: sections of tables, lines, plots and pictures; and the
page, one HTML file that needs no network."""

import base64
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from raysubset.events import Note
from raysubset.report.drawing import Plot

_NUMBER = re.compile(r"[-+±–…]?\d[\d.,]*\b((?![A-Za-z]{4}).)*|[-–…]?|not finite")  # words are at most of three letters
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
        return frozenset(number for number, cells in columns if number and all(map(_NUMBER.fullmatch, cells)))

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


@dataclass(frozen=True)
class Page:
    """A whole report."""

    title: str
    verdict: tuple[Line, ...]  # the result in a sentence or two, on top
    sections: Sequence[Section]
    story: Section | None = None  # beside the verdict: the findings and the most important plot
    facts: tuple[tuple[str, str], ...] = ()  # names and values: method, data, time, versions


def write_file(page: Page, path: str) -> str:
    """Write a page to a local file; return its path."""
    target = Path(path).expanduser()
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(to_html(page), encoding="utf-8")
    return str(target)


def to_html(page: Page) -> str:
    """Return the page as HTML, with its style, plots and pictures inside and every text escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.tests["preformatted"] = lambda line: isinstance(line, Preformatted)
    environment.tests["warning"] = lambda line: isinstance(line, Note) and line.is_warning
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return environment.get_template("page.html").render(page=page)
