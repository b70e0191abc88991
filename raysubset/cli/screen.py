"""Print the sections of a report to stdout."""

import dataclasses
import io
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, TextIO

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from raysubset.report import Section


_GAP = 2  # between columns
_NARROW = 24  # least columns at which text is wrapped
_NARROWEST = 40  # least columns assumed for a terminal; COLUMNS=0 gives no width


def open_screen() -> None:
    """Make stdout and stderr escape characters that their encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def console_of(stream: TextIO, **options: Any) -> Console:
    """Return a console that prints texts literally: brackets are not markup, and colons not emoji."""
    console = Console(file=stream, highlight=False, markup=False, emoji=False, **options)
    if console.width < _NARROWEST:
        console.width = _NARROWEST
    return console


def visible(text: str) -> str:
    """Escape line breaks and other control characters in the text: a name may hold any."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda match: repr(match[0])[1:-1], text)


def sections_of(record: Mapping[str, Any]) -> "Sequence[Section]":
    """Return the sections of the report of a run, a sweep or a comparison."""
    from raysubset import report

    kinds = {"sweep": report.sweep_sections, "comparison": report.comparison_sections}
    if "kind" in record:
        return kinds[record["kind"]](record)
    return report.sections(record, report.find_beside(record))


def print_report(record: Mapping[str, Any]) -> None:
    """Print the report of a run, a sweep or a comparison, as print_sections() does; a notebook shows its HTML."""
    if not Console().is_jupyter:
        print_sections(sections_of(record))
        return
    notebook = import_module("IPython.display")
    notebook.display(notebook.HTML(html_of(record)))


def html_of(record: Mapping[str, Any]) -> str:
    """Return the report as HTML for a notebook: tables are text, and names are never markup."""
    console = console_of(io.StringIO(), width=110, record=True, force_jupyter=False)
    _print(sections_of(record), console, is_terminal=True)
    return console.export_html(inline_styles=True, code_format='<pre style="line-height: 1.2">{code}</pre>')


def print_sections(parts: "Sequence[Section]") -> None:
    """Print sections to stdout, as wide as a terminal; elsewhere tables have 140 columns and lines are not wrapped."""
    is_terminal = sys.stdout.isatty()
    _print(parts, console_of(sys.stdout, width=None if is_terminal else 140), is_terminal=is_terminal)


def _print(parts: "Sequence[Section]", console: Console, *, is_terminal: bool) -> None:
    from raysubset.report import Command

    for part in map(_visible_section, parts):
        console.print()
        console.print(part.title, style="bold")
        for number, table in enumerate(_tables(part, console.width)):
            if number:
                console.print()
            console.print(table)
        for line in part.lines:
            is_command = isinstance(line, Command)  # a user copies it: we add no line breaks
            words = f"  {visible(line)}" if is_command else visible(str(line))
            console.print(words, soft_wrap=is_command or not is_terminal)


def _visible_section(part: "Section") -> "Section":
    return dataclasses.replace(
        part,
        title=visible(part.title),
        columns=tuple(map(visible, part.columns)),
        rows=tuple(tuple(map(visible, row)) for row in part.rows),
    )


def _tables(part: "Section", width: int) -> Iterator[Table]:
    """Yield the section's table, or if it is too wide, pieces of it with the first column each: no number is cut."""
    widths = [_widths(part, number, width) for number in range(len(part.columns))]
    others = range(1, len(widths))

    def spare_of(piece: Sequence[int]) -> int:
        return width - sum(widths[number][0] + _GAP for number in (0, *piece)) + _GAP

    pieces: list[Sequence[int]] = []
    for size in (math.ceil(len(others) / num) for num in range(1, len(others) + 1)):
        pieces = [others[start : start + size] for start in range(0, len(others), size)]
        if all(spare_of(piece) >= 0 for piece in pieces):
            break
    for piece in pieces:
        numbers, spare = (0, *piece), spare_of(piece)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, _GAP - 1, 0, 0))
        for number in numbers:
            least, natural = widths[number]
            more = min(natural - least, max(0, spare))
            spare -= more
            justify = "right" if number in part.numeric else "left"
            table.add_column(part.columns[number], justify=justify, width=least + more, overflow="fold")
        for row in part.rows:
            table.add_row(*(row[number] for number in numbers))
        yield table


def _widths(part: "Section", number: int, width: int) -> tuple[int, int]:
    """Return a column's least and natural width: headings and text may be wrapped, numbers and names may not."""
    heading, cells = part.columns[number], [cell_len(row[number]) for row in part.rows]
    widest = max(cells, default=0)
    if number == 0:
        widest = min(widest, width // 2)
    least = widest if number == 0 or number in part.numeric else min(widest, _NARROW)
    word = max(map(cell_len, heading.split()), default=0)
    return max(least, min(word, _NARROW)), max(widest, cell_len(heading))
