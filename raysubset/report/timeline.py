"""Draw the time line of a run, comparison or sweep from its ledgers: what each actor and worker did on which node, and
what was lost."""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

from raysubset.errors import per_second
from raysubset.report.drawing import BAD, COLOURS, GREY, Chart, Plot
from raysubset.report.figures import Record
from raysubset.report.parts import Section, table
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
    """Draw a Gantt chart: a bar for each attempt and each of pauses(), a row for each actor or driver and for Ray."""
    all_lanes = lanes(works)
    drawn = all_lanes[:MOST_LANES]
    begun = min([work.started_at for work in works] + [gap.begun for gap in gaps])
    ended = max([work.started_at + work.wall_s for work in works] + [gap.ended for gap in gaps])
    colours = dict(zip(dict.fromkeys(work.stage for work in works), cycle(COLOURS), strict=False))
    rows = [*(["Ray"] if gaps else []), *_names(drawn)]
    chart = Chart("seconds since the start", "", size=(960, 46 + 22 * max(2, len(rows))))
    chart.name_rows(rows)
    for gap in gaps:
        label, alpha = "Ray's processes start and end", 0.4
        if gap.is_start:
            label, alpha = "start of Python, data and Ray", 0.75
        text = f"{gap.ended - gap.begun:.1f} s"
        chart.bar(0, gap.begun - begun, gap.ended - begun, GREY, label, alpha=alpha, tip=f"{label}\n{text}", text=text)
    for row, lane in enumerate(drawn, len(rows) - len(drawn)):
        for work in lane:
            _bar(chart, row, work, begun, colours[work.stage])
    chart.x.low, chart.x.high = 0.0, 1.005 * max(ended - begun, 1e-3)
    left_out = len(all_lanes) - len(drawn)
    caption = (
        "Time line of the ledger. Each bar is an attempt, each row an actor, worker group or driver on its node. "
        "Numbers are subsets, a prime is another attempt, ×n a group of n workers, a red cross a lost or failed "
        "attempt. Grey: nothing was at work, while Ray or its processes started or ended."
        f"{f' {left_out} more rows are left out.' if left_out > 0 else ''}"
    )
    return Plot(caption, (chart,))


def _bar(chart: Chart, row: int, work: Work, begun: float, colour: str) -> None:
    """Draw an attempt's bar; `begun` is the time line's start in unix s."""
    start, end, name = work.started_at - begun, work.started_at - begun + work.wall_s, work.stage.replace("_", " ")
    subset = "" if work.subset is None else f"{work.subset}"
    text = subset + "′" * work.attempt + (f"×{work.num_workers}" if work.num_workers > 1 else "")
    facts = [f"{name} {subset}".rstrip() + f", round {work.round + 1}", f"{work.wall_s:.2f} s"]
    facts += [f"waited {work.waited_s:.2f} s"] if work.waited_s >= 0.01 else []
    if work.cost.num_forward and work.wall_s:
        facts.append(f"{per_second(work.cost.num_forward / work.wall_s)} examples/s")
    facts += [work.node] if work.outcome == "done" else [work.outcome, work.node]
    ended_badly = work.outcome in _ENDED_BADLY
    chart.bar(row, start, end, colour, name, alpha=0.35 if ended_badly else 1.0, text=text, tip="\n".join(facts))
    if ended_badly:
        chart.line([(end, row)], BAD, "lost or failed", marker="x", width=0, names=[", ".join(facts)])


def _names(drawn: Sequence[Sequence[Work]]) -> list[str]:
    """Return each node's name at its first lane, without its domain and shortened from the left; else '·'."""
    names, last_node = [], None
    for node in (lane[0].node for lane in drawn):
        host = node if node.replace(".", "").isdigit() else node.partition(".")[0]
        names.append("·" if node == last_node else host if len(host) <= 16 else f"…{host[-15:]}")
        last_node = node
    return names


def troubles(ledgers: Mapping[str, Sequence[Work]], *, of: str = "leg") -> Section | None:
    """Show the attempts that were lost or failed, and how their work ended; None if there are none.

    Args:
        ledgers: those of a comparison's legs or a sweep's trials by name; for a run {"": its ledger}.
        of: what each ledger is of: "leg" or "trial".
    """
    attempts = [(leg, work) for leg, works in ledgers.items() for work in works]
    attempts.sort(key=lambda item: item[1].attempt)
    ends = {(leg, work.stage, work.round, work.subset): work.outcome for leg, work in attempts}  # the last one stays
    lost = sorted((item for item in attempts if item[1].outcome in _ENDED_BADLY), key=lambda item: item[1].started_at)
    if not lost:
        return None
    columns = (
        *(((of, lambda item: item[0]),) if lost[0][0] else ()),
        ("work", lambda item: item[1].stage.replace("_", " ")),
        ("subset", lambda item: "" if item[1].subset is None else f"{item[1].subset}"),
        ("round", lambda item: f"{item[1].round + 1}"),
        ("attempt", lambda item: f"{item[1].attempt + 1}"),
        ("node", lambda item: item[1].node),
        ("outcome", lambda item: item[1].outcome),
        ("seconds", lambda item: f"{item[1].wall_s:.1f}"),
        ("in the end", lambda item: ends[item[0], item[1].stage, item[1].round, item[1].subset]),
        ("error", lambda item: item[1].error or ""),
    )
    lines = [f"The first {_MOST_TROUBLES} of {len(lost)}."] if len(lost) > _MOST_TROUBLES else []
    return table("Lost and failed attempts", lost[:_MOST_TROUBLES], columns, lines)


def work_in_words(works: Sequence[Work], *, of: str = "") -> Iterator[str]:
    """Yield sentences on what the work took together; `of` is what it is of, such as "12 legs in "."""
    num_lost, num_nodes = sum(work.outcome in _ENDED_BADLY for work in works), len({work.node for work in works})
    yield (
        f"{of}{len(works):,} attempts, {num_lost or 'none'} of them lost or failed, on {num_nodes} "
        f"node{'s' if num_nodes > 1 else ''}, took {total_cost(works).device_s:,.0f} device-seconds."
    )
    if max(waits := [work.waited_s for work in works]):
        yield f"An attempt waited {statistics.fmean(waits):.1f} s for room on average, {max(waits):.1f} s at most."
