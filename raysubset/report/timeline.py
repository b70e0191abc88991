"""The time line of a run, comparison or sweep, from its ledgers: what each actor and worker did on which node, what
waited, what was lost."""

import heapq
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raysubset.ledger import Work, total_cost
from raysubset.report.page import Section
from raysubset.report.plots import BAD, Plot, colour_of, draw_plot

MOST_LANES = 64
_MOST_TROUBLES = 20
_ENDED_BADLY = ("lost", "failed", "preempted", "interrupted")


@dataclass(frozen=True)
class Lane:
    """One after another on one node: what an actor did, as far as a ledger without actors' names tells."""

    node: str
    works: tuple[Work, ...]


def lanes(works: Iterable[Work]) -> list[Lane]:
    """The least number of lanes a node in which no two attempts overlap, the nodes in order of their first work."""
    by_node: dict[str, list[list[Work]]] = {}
    free: dict[str, list[tuple[float, int]]] = {}  # (until when it is taken, which) of a node's lanes
    for work in sorted(works, key=lambda work: work.started_at):
        own, ends = by_node.setdefault(work.node, []), free.setdefault(work.node, [])
        if ends and ends[0][0] <= work.started_at:
            _, number = heapq.heappop(ends)
        else:
            number = len(own)
            own.append([])
        own[number].append(work)
        heapq.heappush(ends, (work.started_at + work.wall_s, number))
    return [Lane(node, tuple(lane)) for node, own in by_node.items() for lane in own]


def waiting(works: Iterable[Work]) -> list[tuple[float, int]]:
    """How many pieces were queued, from each of these unix seconds on."""
    changes: dict[float, int] = {}
    for work in works:
        if work.waited_s > 0:
            begun = work.started_at - work.waited_s
            changes[begun] = changes.get(begun, 0) + 1
            changes[work.started_at] = changes.get(work.started_at, 0) - 1
    steps, num = [], 0
    for moment in sorted(changes):
        num += changes[moment]
        steps.append((moment, num))
    return steps


def time_line(works: Sequence[Work]) -> Plot:
    """A Gantt chart: a bar an attempt, a row an actor or the driver; and the queue below it."""
    drawn, queue = lanes(works)[:MOST_LANES], waiting(works)
    begun = min([work.started_at for work in works] + [moment for moment, _ in queue])
    ended = max(work.started_at + work.wall_s for work in works)
    colours = colour_of(work.stage for work in works)
    bad = any(work.outcome in _ENDED_BADLY for work in works)
    unit_s, unit = _unit(ended - begun)

    def draw(figure: Any) -> None:
        if queue:
            chart, below = figure.subplots(2, 1, sharex=True, height_ratios=(max(3, len(drawn)), 2))
        else:
            chart = below = figure.subplots()
        told = set()
        for row, lane in enumerate(drawn):
            for work in lane.works:
                _bar(chart, row, work, begun, ended - begun, unit_s, colours[work.stage], told)
        if bad:
            chart.plot([], [], "x", color=BAD, label="lost or failed")
        chart.set_yticks(range(len(drawn)), _names(drawn))
        chart.set_ylim(len(drawn) - 0.4, -0.6)
        chart.set_xlim(0, 1.01 * max(ended - begun, 1e-3) / unit_s)
        chart.grid(True, axis="x")
        if queue:
            moments = [0.0, *((moment - begun) / unit_s for moment, _ in queue), (ended - begun) / unit_s]
            below.step(moments, [0, *(num for _, num in queue), 0], where="post", color="grey")
            below.set_ylim(bottom=0)
            below.yaxis.get_major_locator().set_params(integer=True)
            below.set_ylabel("waiting")
            below.grid(True, axis="x")
        below.set_xlabel(f"{unit} since the first work {'was queued' if queue else 'began'}")
        handles, labels = chart.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(6, max(1, len(handles))))

    left_out = len(lanes(works)) - len(drawn)
    caption = (
        "Time line of the ledger: a bar an attempt, a row an actor, worker group or the driver by its node; numbers "
        "are subsets, a prime an attempt after the first, ×n a group of n workers"
        f"{'; red crosses: lost or failed' if bad else ''}."
        f"{' Below: pieces of work that waited for room.' if queue else ''}"
        f"{f' {left_out} further rows are left out.' if left_out > 0 else ''}"
    )
    size = (10.0, 1.5 + 0.3 * max(3, len(drawn)) + (0.8 if queue else 0))
    return draw_plot("time_line", caption, draw, size=size, wide=True)


def _unit(length_s: float) -> tuple[float, str]:
    """The unit that an axis of so many seconds reads best in: its seconds and its name."""
    return (1.0, "seconds") if length_s < 900 else (60.0, "minutes") if length_s < 3 * 3600 else (3600.0, "hours")


def _bar(
    axes: Any, row: int, work: Work, begun: float, whole: float, unit_s: float, colour: str, told: set[str]
) -> None:
    """begun and whole: of the time line, in seconds."""
    start, length, whole = (work.started_at - begun) / unit_s, work.wall_s / unit_s, whole / unit_s
    label = None if work.stage in told else work.stage.replace("_", " ")
    told.add(work.stage)
    ended_badly = work.outcome in _ENDED_BADLY
    alpha, gap = 0.35 if ended_badly else 1.0, whole / 600  # so that bars in a row can be told apart
    axes.barh(row, max(length - gap, gap), 0.7, left=start, color=colour, alpha=alpha, label=label)
    if ended_badly:
        axes.plot([start + length], [row], "x", color=BAD, markersize=7, markeredgewidth=2)
    text = ("" if work.subset is None else f"{work.subset}") + "′" * work.attempt
    text += f"×{work.num_workers}" if work.num_workers > 1 else ""
    if text and length > whole * 0.012 * len(text):
        style = {} if ended_badly else {"color": "white"}
        axes.text(start + length / 2, row, text, ha="center", va="center", fontsize=8, **style)


def _names(drawn: Sequence[Lane]) -> list[str]:
    """The node, without its domain and shortened from the left, at its first lane."""
    names, before = [], None
    for lane in drawn:
        host = lane.node if lane.node.replace(".", "").isdigit() else lane.node.partition(".")[0]
        short = host if len(host) <= 16 else f"…{host[-15:]}"
        names.append(short if lane.node != before else "·")
        before = lane.node
    return names


def troubles(ledgers: Mapping[str, Sequence[Work]], *, of: str = "leg") -> Section | None:
    """The attempts that did not end well, and whether another followed; None if all did.

    Args:
        ledgers: of the legs of a comparison or the trials of a sweep by their names; of a run, {"": its own}.
        of: what each ledger is of.
    """
    last: dict[tuple, Work] = {}
    for leg, works in ledgers.items():
        for work in works:
            key = (leg, work.stage, work.round, work.subset)
            last[key] = max(last.get(key, work), work, key=lambda one: one.attempt)
    bad = [(leg, work) for leg, works in ledgers.items() for work in works if work.outcome in _ENDED_BADLY]
    if not bad:
        return None
    bad.sort(key=lambda one: one[1].started_at)
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
        for leg, work in bad[:_MOST_TROUBLES]
    )
    lines = (f"The first {_MOST_TROUBLES} of {len(bad)}.",) if len(bad) > len(rows) else ()
    columns = ("work", "round", "attempt", "node", "outcome", "seconds", "in the end", "error")
    named = (of, *columns) if bad[0][0] else columns
    return Section("Lost and failed attempts", named, rows, lines)


def work_lines(ledgers: Mapping[str, Sequence[Work]], *, of: str, more: str = "") -> Iterator[str]:
    """What the legs of a comparison or the trials of a sweep took all together, in words.

    Args:
        ledgers: by their names.
        of: what they are of and how many.
        more: what is in it and what is not.
    """
    works = [work for own in ledgers.values() for work in own]
    num_bad = sum(work.outcome in _ENDED_BADLY for work in works)
    num_nodes, waits = len({work.node for work in works}), [work.waited_s for work in works]
    yield (
        f"{of} in {len(works):,} attempts, {num_bad or 'none'} of them lost or failed, on {num_nodes} "
        f"node{'s' if num_nodes > 1 else ''}, took {total_cost(works).device_s:,.0f} device-seconds{more}."
    )
    if max(waits):
        yield f"An attempt waited {statistics.fmean(waits):.1f} s for room in the mean, {max(waits):.1f} s at most."
