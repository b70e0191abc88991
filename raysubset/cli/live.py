"""Show progress on stderr: a live view on a terminal, plain lines elsewhere."""

import functools
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from statistics import fmean
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from raysubset import events
from raysubset.cli.course import Course
from raysubset.cli.screen import console_of, visible
from raysubset.errors import per_second

_STALE_S = 10.0  # an actor without events for so long is hidden
_PACK_S = 0.1  # the pieces of a pack begin within this time
_PER_S = 4  # drawings of the view per second
_BELOW = 4  # screen lines that the tables leave free: for lines above them, the status and the bar
_GAP = 3  # between columns
_ROOMY = 60  # columns from which the nodes' addresses are shown
_SUM = "what is at work"  # the subject of lines that sum up progress


@contextmanager
def telling(first: str = "") -> Iterator[events.OnEvent]:
    """Yield a listener that draws a live view on a terminal, or writes plain lines elsewhere; show `first` at once."""
    console = console_of(sys.stderr)
    tell = LiveView(console) if console.is_terminal and not console.is_dumb_terminal else PlainLines()
    if first:
        tell(events.Waiting(first))
    is_live = isinstance(tell, LiveView)
    with Live(tell, console=console, refresh_per_second=_PER_S, transient=True) if is_live else nullcontext():
        yield tell


def shown(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap run(), sweep() or compare() so that it shows progress on stderr if the caller gives no `on_event`."""

    @functools.wraps(verb)
    def as_the_command(*args: Any, **options: Any) -> Any:
        if "on_event" in options:
            return verb(*args, **options)
        with telling() as tell:
            return verb(*args, on_event=tell, **options)

    return as_the_command


class _AtWork:
    """Keeps the last events of the actors and workers that are at work."""

    def __init__(self) -> None:
        self._rows: dict[Any, tuple[events.Start | events.Progress, float]] = {}  # and when they were heard

    def hear(self, event: events.Event, now: float) -> None:
        """Note a start or progress, or leave out what has ended."""
        match event:
            case events.Start(attempt=new):  # the earlier work of its process has ended, but for that of its pack
                self._keep(lambda a, at: (a.node, a.pid) != (new.node, new.pid) or now - at < _PACK_S)
            case events.MinimumDone(stage=stage, record=record):
                self._keep(lambda attempt, at: (attempt.stage, attempt.subset) != (stage, record["subset_id"]))
            case events.LegDone(leg=leg):
                self._keep(lambda attempt, at: attempt.directory != leg)
            case events.Retry(attempt=events.Attempt() as lost):
                self._keep(lambda attempt, at: (attempt.node, attempt.pid) != (lost.node, lost.pid))
            case events.Stage():
                self._rows.clear()
        if isinstance(event, events.Start | events.Progress):
            attempt = event.attempt  # a process does one piece at a time, or a pack of subsets
            self._rows[attempt.node, attempt.pid, attempt.stage, attempt.round, attempt.subset] = event, now

    def _keep(self, is_at_work: Callable[[events.Attempt, float], bool]) -> None:
        self._rows = {key: (row, at) for key, (row, at) in self._rows.items() if is_at_work(row.attempt, at)}

    def since(self, then: float) -> list[events.Start | events.Progress]:
        """Return the last events of those heard since then, in order of subsets and ranks."""
        return sorted((event for event, at in self._rows.values() if at >= then), key=_order)


# Plain lines


class PlainLines:
    """Writes lines that do not flood a job's log: frequent events are summed up at growing intervals."""

    FIRST_S, MOST_S = 10.0, 120.0  # between two lines of progress, or of one thing that is waited for
    BURST, EACH_S = 20, 3.0  # lines for single minima, legs and reports: so many at once, then one each so many seconds

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._course = clock, Course(clock)
        self._summed_at = clock()
        self._paces = {_SUM: (clock(), self.FIRST_S)}  # by subject: when a line was written, and seconds to the next
        self._room, self._room_at, self._num_left_out = float(self.BURST), clock(), 0
        self._at_work = _AtWork()

    def __call__(self, event: events.Event) -> None:
        """Write a line for the event, or count it for a later line."""
        now = self._clock()
        self._course.hear(event)
        self._at_work.hear(event, now)
        match event:
            case events.Progress():
                if self._is_due(_SUM, now):
                    self._sum_up(now)
            case events.Standing():
                if all(row.state in ("done", "failed") for row in event.rows) or self._is_due(_SUM, now):
                    self._sum_up(now, event.text)
            case events.Start() | events.LegDone(was_there=True) | events.LegDone(validation=None):
                pass
            case events.Waiting():
                if self._is_due(event.text.partition(";")[0], now):
                    self._line(event)
            case events.MinimumDone() | events.LegDone() | events.TrialReport() | events.EpochDone():
                self._room = min(self.BURST, self._room + (now - self._room_at) / self.EACH_S)
                self._room_at = now
                if self._room >= 1:
                    self._room -= 1
                    more, self._num_left_out = self._num_left_out, 0
                    self._line(event, f" (and {more} more since)" if more else "")
                else:
                    self._num_left_out += 1
            case _:
                self._line(event)

    def _is_due(self, subject: str, now: float) -> bool:
        """Return True if it is time for a line of the subject; each is twice as late as the one before."""
        at, for_s = self._paces.get(subject, (-math.inf, self.FIRST_S))
        if now - at < for_s:
            return False
        self._paces[subject] = now, min(2 * for_s, self.MOST_S)
        return True

    def _sum_up(self, now: float, text: str = "") -> None:
        rows = [row for row in self._at_work.since(self._summed_at) if isinstance(row, events.Progress)]
        self._summed_at = now
        at_work = rows[0].text if rows else ""
        if len(rows) > 1:
            losses = [row.running_loss for row in rows if row.running_loss is not None]
            at_work = f"{len(rows)} at work" + (f", mean loss {fmean(losses):.4f}" if losses else "")
            if num_measured := sum(row.measured is not None for row in rows):
                at_work += f", {num_measured} of them measured"
            at_work += f", {per_second(sum(row.examples_per_s for row in rows))} examples/s"
        self._line("; ".join(part for part in (_how_far(self._course), text, at_work) if part))

    def _line(self, event: events.Event | str, more: str = "") -> None:
        print(f"{time.strftime('%H:%M:%S')} {visible(str(event))}{more}", file=sys.stderr, flush=True)


def _how_far(course: Course) -> str:
    """Return '34% of 11 planned passes, about 0:03:05 of training left'; '' before the plan is known."""
    if (passes := course.passes) is None or not passes[1]:
        return ""
    (done, total), left_s = passes, course.left_s
    time_left = "" if left_s is None or left_s < 1 else f", about {timedelta(seconds=round(left_s))} of training left"
    return f"{done / total:.0%} of {f'{total:,.0f}' if total >= 100 else f'{total:.3g}'} planned passes{time_left}"


# The live view


class LiveView:
    """Prints a line above for what is done; below it draws the tables, the current activity and its time, and a bar."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock, self._course = console, clock, Course(clock)
        self._lock = threading.RLock()  # another thread draws the view
        self._at_work = _AtWork()
        self._standing: events.Standing | None = None
        self._stage, self._waiting, self._since = "", "", clock()
        self._spinner = Spinner("dots")

    def __call__(self, event: events.Event) -> None:
        """Show an event."""
        with self._lock:
            self._course.hear(event)
            self._take(event)
        style = {events.Retry: "yellow", events.Stage: "bold", events.Planned: "dim"}.get(type(event))
        if isinstance(event, events.Note) and event.is_warning:
            style = "yellow"
        # the tables show these
        silent = events.Start | events.Progress | events.Waiting | events.Standing | events.TrialReport | events.LegDone
        if not isinstance(event, silent) and event.text:
            self._console.print(visible(event.text), style=style)

    def _take(self, event: events.Event) -> None:
        now = self._clock()
        self._at_work.hear(event, now)
        match event:
            case events.Start() | events.Progress():
                self._set_waiting("")
            case events.Stage():
                self._stage, self._waiting, self._since = event.text, "", now
            case events.Standing():
                self._standing = event
            case events.Waiting():
                self._set_waiting(event.text)

    def _set_waiting(self, text: str) -> None:
        """Set what the run waits for, or ""; its seconds are counted from the first event that says so."""
        if text.partition(";")[0] != self._waiting.partition(";")[0]:
            self._since = self._clock()
        self._waiting = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the current view."""
        with self._lock:
            room = max(0, options.size.height - _BELOW)
            parts: list[RenderableType] = []
            if self._standing is not None:
                of_table = room // 2 if self._at_work.since(0.0) else room
                parts.append(self._arms_or_trials(self._standing, options.max_width, of_table))
                room -= room // 2
            parts += self._actors(options.max_width, room)
            parts.append(self._status())
            if bar := self._bar():
                parts.append(bar)
        yield Group(*parts)

    def _status(self) -> Table:
        """Return the line with the current activity and its seconds."""
        line = Table.grid(padding=(0, 1, 0, 0), expand=True)
        line.add_column()
        line.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        line.add_column(justify="right", no_wrap=True)
        seconds = self._clock() - self._since
        text = Text(visible(self._waiting or self._stage))
        line.add_row(self._spinner, text, Text(str(timedelta(seconds=int(seconds))), "dim"))
        return line

    def _bar(self) -> Table | None:
        if (passes := self._course.passes) is None or not passes[1]:
            return None
        line = Table.grid(padding=(0, 1, 0, 0))
        line.add_column(max_width=40)
        line.add_column(no_wrap=True, overflow="ellipsis")
        line.add_row(ProgressBar(total=passes[1], completed=passes[0]), _how_far(self._course))
        return line

    def _actors(self, width: int, room: int) -> list[RenderableType]:
        """Return a row for each actor or worker at work, as many as there is room for."""
        rows = self._at_work.since(self._clock() - _STALE_S)
        if not rows or room < 3:
            return []
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
        for column in ("at work", "epoch", "loss", "examples/s", *(("node",) if width >= _ROOMY else ())):
            table.add_column(column, justify="left" if column in ("at work", "node") else "right", no_wrap=True)
        most = room - 2 if len(rows) <= room - 2 else room - 3
        for event in rows[:most]:
            table.add_row(*_cells(event)[: len(table.columns)])
        more = len(rows) - most
        return [table, Text(f"and {more} more at work", "dim")] if more > 0 else [table]

    def _arms_or_trials(self, standing: events.Standing, width: int, room: int) -> Table:
        """Return the most important rows and the last columns, as many as there is room for."""
        columns = zip(standing.columns, *(row.cells for row in standing.rows), strict=True)
        widths = [max(map(len, column)) + _GAP for column in columns]
        first = min(max(len(row.name) for row in standing.rows) + 2 + _GAP, width // 2)
        num = len(widths)
        while num > 1 and first + sum(widths[-num:]) > width:
            num -= 1
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
        table.add_column("", no_wrap=True, overflow="ellipsis", max_width=first - _GAP)
        for heading in standing.columns[-num:]:
            table.add_column(heading, justify="right", no_wrap=True)
        rows = standing.rows
        if len(rows) > (most := max(1, room - 3)):
            order = ("at work", "failed", "done", "waiting")
            ranked = sorted(range(len(rows)), key=lambda n: (not rows[n].is_best, order.index(rows[n].state)))
            rows = [rows[n] for n in sorted(ranked[:most])]
        for row in rows:
            style = "bold green" if row.is_best else {"waiting": "dim", "failed": "red"}.get(row.state, "")
            table.add_row(visible(row.name) + " *" * row.is_best, *row.cells[-num:], style=style)
        if more := len(standing.rows) - len(rows):
            table.caption, table.caption_justify = f"and {more} more", "left"
        return table


def _order(event: events.Start | events.Progress) -> tuple[str, int, int]:
    attempt = event.attempt
    worker = event.worker if isinstance(event, events.Progress) else None
    return attempt.stage, -1 if attempt.subset is None else attempt.subset, -1 if worker is None else worker


def _cells(event: events.Start | events.Progress) -> tuple[str, ...]:
    attempt = event.attempt
    name = attempt.label or attempt.stage
    if isinstance(event, events.Start):
        return name, "starting", "", "", attempt.ip
    if event.worker is not None:
        name = f"{name} {event.worker}"
    loss = event.loss if event.running_loss is None else event.running_loss
    numbers = (f"{event.epoch:.1f} / {event.num_epochs:g}", "" if loss is None else f"{loss:.4f}")
    if event.measured is not None:
        numbers = ("measured", "{:,} of {:,}".format(*event.measured))
    return name, *numbers, per_second(event.examples_per_s), attempt.ip
