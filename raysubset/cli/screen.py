"""What a person sees: sections of a report on stdout, progress on stderr."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

if TYPE_CHECKING:
    from raysubset.cluster import Event, OnEvent
    from raysubset.report import Section


def print_sections(parts: "Sequence[Section]") -> None:
    """Results, to stdout."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    for part in parts:
        console.print()
        console.print(part.title, style="bold", markup=False)
        if part.columns:
            table = Table(box=box.SIMPLE, pad_edge=False)
            for number, column in enumerate(part.columns):
                is_text = number == 0 or not column
                table.add_column(column, justify="left" if is_text else "right", no_wrap=number == 0)
            for row in part.rows:
                table.add_row(*row)
            console.print(table)
        for line in part.lines:
            console.print(line, markup=False, soft_wrap=not sys.stdout.isatty())


# Progress


@contextmanager
def listener() -> "Iterator[OnEvent]":
    """A listener that draws live progress on a terminal, and writes plain lines elsewhere; both to stderr."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield _PlainLines()
        return
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        yield _LiveTable(console, live)


class _PlainLines:
    """Every event a line; of progress, a line for each subset every so often."""

    EVERY_S = 10.0

    def __init__(self) -> None:
        self._told: dict[Any, float] = {}

    def __call__(self, event: "Event") -> None:
        if event.kind == "start":
            return
        if event.kind in ("progress", "leg"):
            key, now = (event.data.get("stage"), event.data.get("subset")), time.monotonic()
            if now - self._told.setdefault(key, now) < self.EVERY_S:
                return
            self._told[key] = now
        mark = "warning: " if event.kind == "warning" else ""
        print(f"{time.strftime('%H:%M:%S')} {mark}{event.text}", file=sys.stderr, flush=True)


class _LiveTable:
    """Lines for what is done, and a table of the actors at work below them."""

    def __init__(self, console: Console, live: Live) -> None:
        self._console, self._live = console, live
        self._rows: dict[Any, tuple[str, ...]] = {}

    def __call__(self, event: "Event") -> None:
        data = event.data
        key = (data.get("stage"), data.get("subset"))
        if event.kind in ("start", "progress"):
            name = data["stage"] if data["subset"] is None else f"subset {data['subset']}"
            epochs = f"{data['epoch']:.1f} / {data['num_epochs']:g}" if data["num_epochs"] else "starting"
            loss = "" if data["loss"] is None else f"{data['loss']:.4f}"
            speed = "" if data["examples_per_s"] is None else f"{data['examples_per_s']:,.0f}"
            self._rows[key] = (name, epochs, loss, speed, data.get("ip", ""))
        else:
            if event.kind == "minimum":
                self._rows.pop((data["stage"], data["record"]["subset_id"]), None)
            elif event.kind == "retry":
                self._rows.pop(key, None)
            elif event.kind == "stage":
                self._rows.clear()
            style = {"warning": "yellow", "retry": "yellow", "stage": "bold", "waiting": "dim"}.get(event.kind)
            self._console.print(event.text, style=style, markup=False)
        self._live.update(self._table() if self._rows else "")

    def _table(self) -> Table:
        table = Table(box=box.SIMPLE)
        for column in ("", "epoch", "loss", "examples/s", "node"):
            table.add_column(column, justify="right")
        for key in sorted(self._rows, key=lambda key: (key[0], -1 if key[1] is None else key[1])):
            table.add_row(*self._rows[key])
        return table
