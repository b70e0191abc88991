"""What a person sees of work in hand, on stderr: a live view on a terminal, plain lines elsewhere."""

import functools
import inspect
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from raysubset import events
from raysubset.cli.course import Course, in_words
from raysubset.cli.screen import console_of, visible

_STALE_S = 10.0  # after which an actor that is not heard of is not shown
_PACK_S = 0.1  # within which the pieces of a pack are begun
_PER_S = 4  # times the view is drawn
_BELOW = 4  # lines of the screen that the tables leave: for what goes by above them, the status and the bar
_GAP = 3  # between columns
_ROOMY = 60  # columns from which there is room for the nodes' addresses


@contextmanager
def telling(first: str = "") -> Iterator[events.OnEvent]:
    """A listener that draws a live view on a terminal, and writes plain lines elsewhere, from the first word on."""
    console = console_of(sys.stderr)
    if not console.is_terminal or console.is_dumb_terminal:
        tell = PlainLines()
        if first:
            tell(events.Waiting(first))
        yield tell
        return
    view = LiveView(console)
    if first:
        view(events.Waiting(first))
    with Live(view, console=console, refresh_per_second=_PER_S, transient=True):
        yield view


class _AsTheCommand:
    """Stands for the listener that a caller has not given."""

    def __repr__(self) -> str:
        return "<shown as the command does>"


def shown(verb: Callable[..., Any]) -> Callable[..., Any]:
    """run(), sweep() or compare(), with a view of what happens on stderr where the caller gives no `on_event`."""
    unless_given, signature = _AsTheCommand(), inspect.signature(verb)

    @functools.wraps(verb)
    def as_the_command(*given: Any, on_event: Any = unless_given, **options: Any) -> Any:
        if on_event is not unless_given:
            return verb(*given, on_event=on_event, **options)
        with telling() as tell:
            return verb(*given, on_event=tell, **options)

    parameters = signature.parameters | {"on_event": signature.parameters["on_event"].replace(default=unless_given)}
    as_the_command.__signature__ = signature.replace(parameters=list(parameters.values()))  # pyright: ignore[reportAttributeAccessIssue]
    return as_the_command


# Plain lines


class PlainLines:
    """Lines at a pace that a job's log can bear: what comes often is summed up, each time after a longer while."""

    FIRST_S, MOST_S = 10.0, 120.0  # between two lines on how far it is: half as long again each time
    BURST, EACH_S = 20, 3.0  # lines on single minima, legs and reports at once, and until there may be one more

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._course = clock, Course(clock)
        self._summed_at, self._every_s = clock(), self.FIRST_S
        self._waited: dict[str, tuple[float, float]] = {}  # when each thing was last said to be waited for; how long
        self._room, self._room_at, self._num_left_out = float(self.BURST), clock(), 0
        self._rows: dict[Any, events.Progress] = {}

    def __call__(self, event: events.Event) -> None:
        """Write a line, or leave it to a later one."""
        now = self._clock()
        self._course.hear(event)
        match event:
            case events.Progress():
                self._rows[_key(event)] = event
                if now - self._summed_at >= self._every_s:
                    self._sum_up(now)
            case events.Standing():
                if now - self._summed_at >= self._every_s or all(row.state in ("done", "failed") for row in event.rows):
                    self._sum_up(now, event.text)
            case events.Start() | events.LegDone(was_there=True):
                pass
            case events.Waiting():
                subject = event.text.partition(";")[0]
                at, for_s = self._waited.get(subject, (-math.inf, self.FIRST_S))
                if now - at >= for_s:
                    self._waited[subject] = now, min(2 * for_s, self.MOST_S)
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
                if isinstance(event, events.Stage):
                    self._rows.clear()
                self._line(event)

    def _sum_up(self, now: float, text: str = "") -> None:
        self._summed_at, self._every_s = now, min(1.5 * self._every_s, self.MOST_S)
        rows = list(self._rows.values())
        self._rows.clear()
        words = [_how_far(self._course), text]
        if rows:
            losses = [row.running_loss for row in rows if row.running_loss is not None]
            each = f"{rows[0].text}" if len(rows) == 1 else f"{len(rows)} at work"
            if len(rows) > 1:
                each += f", mean loss {sum(losses) / len(losses):.4f}" if losses else ""
                each += f", {sum(row.examples_per_s for row in rows):,.0f} examples/s"
            words.append(each)
        self._line("; ".join(word for word in words if word))

    def _line(self, event: events.Event | str, more: str = "") -> None:
        print(f"{time.strftime('%H:%M:%S')} {visible(str(event))}{more}", file=sys.stderr, flush=True)


def _how_far(course: Course) -> str:
    """'34% of 11 passes, about 3 min of training left'; '' before that is known."""
    if (passes := course.passes) is None or not passes[1]:
        return ""
    done, total = passes
    left = course.left_s
    rest = "" if left is None or left < 1 else f", about {in_words(left)} of training left"
    return f"{done / total:.0%} of {f'{total:,.0f}' if total >= 100 else f'{total:.3g}'} passes{rest}"


# The live view


@dataclass
class _Working:
    """An actor or worker, as it was last heard of."""

    event: events.Start | events.Progress
    heard_at: float


class LiveView:
    """Lines for what is done go by above; below are the tables, what goes on now and for how long, and the bar."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock, self._course = console, clock, Course(clock)
        self._lock = threading.RLock()  # the view is drawn by another thread
        self._rows: dict[Any, _Working] = {}
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
        # what a table shows as it comes
        silent = events.Start | events.Progress | events.Waiting | events.Standing | events.TrialReport | events.LegDone
        if not isinstance(event, silent) and event.text:
            self._console.print(visible(event.text), style=style)

    def _take(self, event: events.Event) -> None:
        now = self._clock()
        match event:
            case events.Start(attempt=attempt):  # what its process did before has ended
                process = attempt.node, attempt.pid
                self._rows = {
                    key: row for key, row in self._rows.items() if key[:2] != process or now - row.heard_at < _PACK_S
                }
                self._rows[_key(event)] = _Working(event, now)
                self._now_is("")
            case events.Progress():
                self._rows[_key(event)] = _Working(event, now)
                self._now_is("")
            case events.MinimumDone(stage=stage, record=record):
                place = (stage, record["subset_id"])
                self._rows = {key: row for key, row in self._rows.items() if _place(row.event) != place}
            case events.LegDone():
                ended = {key for key, row in self._rows.items() if _share(row.event) >= 1}
                self._rows = {key: row for key, row in self._rows.items() if key not in ended}
            case events.Retry(attempt=events.Attempt() as attempt):
                self._rows = {key: row for key, row in self._rows.items() if row.event.attempt.pid != attempt.pid}
            case events.Stage():
                self._rows.clear()
                self._stage, self._waiting, self._since = event.text, "", now
            case events.Standing():
                self._standing = event
            case events.Waiting():
                self._now_is(event.text)

    def _now_is(self, text: str) -> None:
        """What is waited for, or nothing: the seconds are counted from when that was first said."""
        if text.partition(";")[0] != self._waiting.partition(";")[0]:
            self._since = self._clock()
        self._waiting = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The view as it is now."""
        with self._lock:
            room = max(0, options.size.height - _BELOW)
            parts: list[RenderableType] = []
            if self._standing is not None:
                parts.append(self._arms_or_trials(self._standing, options.max_width, room // 2 if self._rows else room))
            parts += self._at_work(options.max_width, room - (room // 2 if self._standing is not None else 0))
            parts.append(self._status())
            if bar := self._bar(options.max_width):
                parts.append(bar)
        yield Group(*parts)

    def _status(self) -> Table:
        """What goes on, and for how long, in a line."""
        line = Table.grid(padding=(0, 1, 0, 0), expand=True)
        line.add_column()
        line.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        line.add_column(justify="right", no_wrap=True)
        seconds = self._clock() - self._since
        text = Text(visible(self._waiting or self._stage))
        line.add_row(self._spinner, text, Text(in_words(seconds) if seconds >= 1 else "", "dim"))
        return line

    def _bar(self, width: int) -> Table | None:
        passes = self._course.passes
        if passes is None or not passes[1]:
            return None
        words = _how_far(self._course)
        line = Table.grid(padding=(0, 1, 0, 0))
        line.add_column()
        line.add_column(no_wrap=True)
        if (room := width - len(words) - 3) < 8:
            line.add_row(Text(words, overflow="ellipsis", no_wrap=True))
        else:
            line.add_row(ProgressBar(total=passes[1], completed=passes[0], width=min(room, 40)), words)
        return line

    def _at_work(self, width: int, room: int) -> list[RenderableType]:
        """A row for each actor or worker at work, as many as there is room for."""
        now = self._clock()
        rows = {key: row for key, row in self._rows.items() if now - row.heard_at < _STALE_S}
        if not rows or room < 3:
            return []
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
        for column in ("at work", "epoch", "loss", "examples/s", *(("node",) if width >= _ROOMY else ())):
            table.add_column(column, justify="left" if column in ("at work", "node") else "right", no_wrap=True)
        shown = sorted(rows, key=lambda key: _order(rows[key].event))
        most = room - 2 if len(shown) <= room - 2 else room - 3
        for key in shown[:most]:
            table.add_row(*_cells(rows[key].event)[: len(table.columns)])
        more = len(shown) - most
        return [table, Text(f"and {more} more at work", "dim")] if more > 0 else [table]

    def _arms_or_trials(self, standing: events.Standing, width: int, room: int) -> Table:
        """The rows that tell most, as many as there is room for, with the last columns that fit."""
        widths = [
            max(len(text) for text in (heading, *(row.cells[n] for row in standing.rows))) + _GAP
            for n, heading in enumerate(standing.columns)
        ]
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
            telling_most = sorted(range(len(rows)), key=lambda n: (not rows[n].is_best, order.index(rows[n].state)))
            rows = [rows[n] for n in sorted(telling_most[:most])]
        styles = {"waiting": "dim", "at work": "", "done": "", "failed": "red"}
        for row in rows:
            name = f"{visible(row.name)} *" if row.is_best else visible(row.name)
            table.add_row(name, *row.cells[-num:], style="bold green" if row.is_best else styles[row.state])
        if more := len(standing.rows) - len(rows):
            table.caption, table.caption_justify = f"and {more} more", "left"
        return table


def _key(event: events.Start | events.Progress) -> Any:
    """Tells the rows apart: a process does one piece at a time, or a pack of subsets."""
    attempt = event.attempt
    return attempt.node, attempt.pid, attempt.stage, attempt.round, attempt.subset


def _place(event: events.Start | events.Progress) -> tuple[str, int | None]:
    return event.attempt.stage, event.attempt.subset


def _share(event: events.Start | events.Progress) -> float:
    return event.epoch / event.num_epochs if isinstance(event, events.Progress) else 0.0


def _order(event: events.Start | events.Progress) -> tuple[str, int, int]:
    attempt = event.attempt
    worker = event.worker if isinstance(event, events.Progress) else None
    return attempt.stage, -1 if attempt.subset is None else attempt.subset, -1 if worker is None else worker


def _cells(event: events.Start | events.Progress) -> tuple[str, ...]:
    attempt = event.attempt
    name = attempt.stage if attempt.subset is None else f"subset {attempt.subset}"
    if isinstance(event, events.Start):
        return name, "starting", "", "", attempt.ip
    if event.worker is not None:
        name = f"{attempt.stage} {event.worker}"
    loss = event.loss if event.running_loss is None else event.running_loss
    numbers = (f"{event.epoch:.1f} / {event.num_epochs:g}", "" if loss is None else f"{loss:.4f}")
    return name, *numbers, f"{event.examples_per_s:,.0f}", attempt.ip
