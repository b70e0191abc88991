"""Draw the time line of a run, comparison or sweep from its ledgers: what each actor and worker did on which node, what
waited, and what was lost."""

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from raysubset.report.drawing import BAD, GREY, Axis, Chart, Plot, colour_of
from raysubset.report.figures import Record
from raysubset.report.parts import Section
from raysubset.run_directory.ledger import Work, total_cost

MOST_LANES = 64
_MOST_TROUBLES = 20
_LEAST_PAUSE_S = 1.0
_ENDED_BADLY = ("lost", "failed", "preempted", "interrupted")


def lanes(works: Iterable[Work]) -> list[list[Work]]:
    """Lay each node's attempts in as few lanes as possible without overlap; nodes are in order of their first work.

    A lane is an actor's work, as far as a ledger without actors' names shows.
    """
    by_node: dict[str, list[list[Work]]] = {}
    for work in sorted(works, key=lambda work: work.started_at):
        node_lanes = by_node.setdefault(work.node, [])
        lane = next((lane for lane in node_lanes if lane[-1].started_at + lane[-1].wall_s <= work.started_at), None)
        if lane is None:
            node_lanes.append(lane := [])
        lane.append(work)
    return [lane for node_lanes in by_node.values() for lane in node_lanes]


def waiting(works: Iterable[Work]) -> list[tuple[float, int]]:
    """Return (unix s, number of queued pieces from then on) whenever the queue changed."""
    waited, changes = [work for work in works if work.waited_s > 0], Counter[float]()
    changes.update(work.started_at - work.waited_s for work in waited)
    changes.subtract(work.started_at for work in waited)
    moments = sorted(changes)
    return list(zip(moments, accumulate(changes[moment] for moment in moments), strict=True))


@dataclass(frozen=True)
class Pause:
    """A time in which a driver ran and nothing was at work."""

    begun: float  # unix s
    ended: float
    is_start: bool  # the driver's start: Python, the data, Ray


def pauses(works: Iterable[Work], sessions: Iterable[Record]) -> list[Pause]:
    """Return the pauses of a second and more in a run's sessions, while Ray or its processes started or ended.

    Args:
        sessions: the records of sessions.json: started_at in unix s, startup_s until Ray was ready, wall_s.
    """
    gaps, busy = [], sorted((work.started_at, work.started_at + work.wall_s) for work in works)
    for session in sessions:
        at, end = session["started_at"], session["started_at"] + session["wall_s"]
        spans = [(at + session["startup_s"],) * 2, *((a, b) for a, b in busy if b > at and a < end), (end, end)]
        for number, (begun, ended) in enumerate(spans):
            if begun - at >= _LEAST_PAUSE_S:
                gaps.append(Pause(at, begun, is_start=number == 0))
            at = max(at, ended)
    return gaps


def time_line(works: Sequence[Work], gaps: Sequence[Pause] = ()) -> Plot:
    """Draw a Gantt chart: a bar for each attempt, a row for each actor or driver and for Ray; below it the queue.

    Args:
        gaps: what pauses() returns.
    """
    all_lanes, queue = lanes(works), waiting(works)
    drawn = all_lanes[:MOST_LANES]
    moments = [work.started_at for work in works] + [moment for moment, _ in queue] + [gap.begun for gap in gaps]
    begun = min(moments)
    ended = max([work.started_at + work.wall_s for work in works] + [gap.ended for gap in gaps])
    unit_s, unit = _unit(ended - begun)
    colours = colour_of(work.stage for work in works)
    chart = Chart(f"{unit} since the first work {'was queued' if queue else 'began'}", "", size=(960, 0))
    if gaps:
        chart.x.label = f"{unit} since the start"
    first = len(gaps) > 0
    for gap in gaps:
        label, alpha = (
            ("start of Python, data and Ray", 0.75) if gap.is_start else ("Ray's processes start and end", 0.4)
        )
        seconds = gap.ended - gap.begun
        span = ((gap.begun - begun) / unit_s, (gap.ended - begun) / unit_s)
        chart.bar(0, *span, GREY, label, alpha=alpha, tip=f"{label}\n{seconds:.1f} s", text=f"{seconds:.1f} s")
    for row, lane in enumerate(drawn, first):
        for work in lane:
            _bar(chart, row, work, begun, unit_s, colours[work.stage])
    rows = len(drawn) + first
    chart.y = Axis("", ticks=list(enumerate([*(["Ray"] if gaps else []), *_names(drawn)])), low=rows - 0.4, high=-0.6)
    chart.size = (960, 46 + 22 * max(2, rows))
    charts = [chart]
    if queue:
        below = Chart(chart.x.label, "waiting", size=(960, 110))
        chart.x.label, below.y.low, below.y.is_whole = "", 0, True
        steps = [(0.0, 0), *(((moment - begun) / unit_s, num) for moment, num in queue)]
        ends = [*(moment for moment, _ in steps[1:]), max((ended - begun) / unit_s, steps[-1][0])]
        corners = [corner for (at, num), end in zip(steps, ends, strict=True) for corner in ((at, num), (end, num))]
        below.line(corners, GREY, "pieces of work that wait", is_named=False)
        charts.append(below)
    for each in charts:
        each.x.low, each.x.high, each.left = 0.0, 1.005 * max(ended - begun, 1e-3) / unit_s, 120
    has_lost = any(work.outcome in _ENDED_BADLY for work in works)
    left_out = len(all_lanes) - len(drawn)
    caption = (
        "Time line of the ledger. Each bar is an attempt, each row an actor, worker group or driver on its node. "
        "Numbers are subsets, a prime is another attempt, ×n a group of n workers"
        f"{'; red crosses: lost or failed' if has_lost else ''}."
        f"{' Grey: nothing was at work, while Ray or its processes started or ended.' if gaps else ''}"
        f"{' Below: pieces of work that waited for room.' if queue else ''}"
        f"{f' {left_out} more rows are left out.' if left_out > 0 else ''}"
    )
    return Plot("time_line", caption, tuple(charts), is_wide=True)


def _unit(length_s: float) -> tuple[float, str]:
    """Return the seconds and the name of the unit that suits an axis of this length."""
    return (1.0, "seconds") if length_s < 900 else (60.0, "minutes") if length_s < 3 * 3600 else (3600.0, "hours")


def _bar(chart: Chart, row: int, work: Work, begun: float, unit_s: float, colour: str) -> None:
    """Draw an attempt's bar; `begun` is the time line's start in unix s."""
    start, length, name = (work.started_at - begun) / unit_s, work.wall_s / unit_s, work.stage.replace("_", " ")
    ended_badly = work.outcome in _ENDED_BADLY
    text = ("" if work.subset is None else f"{work.subset}") + "′" * work.attempt
    text += f"×{work.num_workers}" if work.num_workers > 1 else ""
    facts = [
        f"{name}{'' if work.subset is None else f' {work.subset}'}, round {work.round + 1}",
        f"{work.wall_s:.2f} s",
    ]
    facts += [f"waited {work.waited_s:.2f} s"] if work.waited_s >= 0.01 else []
    facts += [f"{work.cost.num_forward / work.wall_s:,.0f} examples/s"] if work.cost.num_forward and work.wall_s else []
    facts += [work.outcome] if work.outcome != "done" else []
    alpha = 0.35 if ended_badly else 1.0
    tip = "\n".join([*facts, work.node])
    chart.bar(row, start, start + length, colour, name, alpha=alpha, text=text, tip=tip)
    if ended_badly:
        chart.points([(start + length, row)], BAD, "lost or failed", marker="x", names=[tip.replace("\n", ", ")])


def _names(drawn: Sequence[Sequence[Work]]) -> list[str]:
    """Return each node's name at its first lane, without its domain and shortened from the left; else '·'."""
    names, last_node = [], None
    for node in (lane[0].node for lane in drawn):
        host = node if node.replace(".", "").isdigit() else node.partition(".")[0]
        short = host if len(host) <= 16 else f"…{host[-15:]}"
        names.append(short if node != last_node else "·")
        last_node = node
    return names


def troubles(ledgers: Mapping[str, Sequence[Work]], *, of: str = "leg") -> Section | None:
    """Show the attempts that were lost or failed, and how their work ended; None if there are none.

    Args:
        ledgers: those of a comparison's legs or a sweep's trials by name; for a run {"": its ledger}.
        of: what each ledger is of: "leg" or "trial".
    """
    last: dict[tuple, Work] = {}
    for leg, works in ledgers.items():
        for work in works:
            key = (leg, work.stage, work.round, work.subset)
            last[key] = max(last.get(key, work), work, key=lambda work: work.attempt)
    lost = [(leg, work) for leg, works in ledgers.items() for work in works if work.outcome in _ENDED_BADLY]
    if not lost:
        return None
    lost.sort(key=lambda item: item[1].started_at)
    rows = tuple(
        (
            *((leg,) if leg else ()),
            work.stage.replace("_", " ") + ("" if work.subset is None else f", subset {work.subset}"),
            f"{work.round + 1}",
            f"{work.attempt + 1}",
            work.node,
            work.outcome,
            f"{work.wall_s:.1f}",
            last[leg, work.stage, work.round, work.subset].outcome,
            work.error or "",
        )
        for leg, work in lost[:_MOST_TROUBLES]
    )
    lines = (f"The first {_MOST_TROUBLES} of {len(lost)}.",) if len(lost) > len(rows) else ()
    columns = ("work", "round", "attempt", "node", "outcome", "seconds", "in the end", "error")
    return Section("Lost and failed attempts", (of, *columns) if lost[0][0] else columns, rows, lines)


def work_lines(ledgers: Mapping[str, Sequence[Work]], *, of: str, more: str = "") -> Iterator[str]:
    """Say in words what a comparison's legs or a sweep's trials took together.

    Args:
        ledgers: by the names of the legs or trials.
        of: the subject of the sentence, such as "12 legs".
        more: appended to it: what the sums include and leave out.
    """
    works = [work for ledger in ledgers.values() for work in ledger]
    num_lost = sum(work.outcome in _ENDED_BADLY for work in works)
    num_nodes, waits = len({work.node for work in works}), [work.waited_s for work in works]
    yield (
        f"{of} in {len(works):,} attempts, {num_lost or 'none'} of them lost or failed, on {num_nodes} "
        f"node{'s' if num_nodes > 1 else ''}, took {total_cost(works).device_s:,.0f} device-seconds{more}."
    )
    if max(waits):
        yield f"An attempt waited {statistics.fmean(waits):.1f} s for room on average, {max(waits):.1f} s at most."
