import io
import math
import os
import pty
import re
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from raysubset.cli.course import Course
from raysubset.cli.live import LiveView, PlainLines, telling
from raysubset.config import Config
from raysubset.costs import Cost
from raysubset.data import load_full_set
from raysubset.events import (
    Attempt,
    EpochDone,
    Event,
    LegDone,
    MinimaFound,
    MinimumDone,
    Note,
    Planned,
    Progress,
    Retry,
    Row,
    Stage,
    Standing,
    Start,
    Step,
    Waiting,
    stage_event,
)
from raysubset.planning import make_plan, planned_steps
from raysubset.work.reports import Report
from tests.work_shown import AT_WORK, PLAN, an_attempt, done, progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# How far it is


def test_passes_done_are_those_of_stages_before_and_of_pieces_of_this_one():
    course = Course(Clock())
    assert course.passes is None
    course.hear(PLAN)
    assert course.passes == (0.0, 11.0)
    course.hear(stage_event("subsets", "4 × 250"))  # whoever did the trunk, and when
    assert course.passes == (1.0, 11.0)
    course.hear(progress(0, 4.0))
    course.hear(progress(1, 2.0))
    assert course.passes == (1.0 + 8.0 * (0.5 + 0.25) / 4, 11.0)
    course.hear(progress(0, 3.0))  # resumed from a checkpoint before: what was done is not undone on the bar
    course.hear(done(1))
    assert course.passes == (1.0 + 8.0 * (0.5 + 1.0) / 4, 11.0)
    course.hear(stage_event("aggregation", "mean of 4"))  # no training, so no step
    course.hear(stage_event("fine_tuning", "2 epochs"))
    assert course.passes == (9.0, 11.0)
    course.hear(EpochDone("", "fine_tuning", {"epoch": 1}))  # which may be all that is heard of a quick one
    assert course.passes == (10.0, 11.0)


def test_epochs_of_a_stage_that_is_taught_are_shares_of_it_with_its_teachers_passes():
    config = Config().with_overrides({"fine_tuning.distillation": 0.5})
    full_set = load_full_set(config.data)
    plan, num_train = make_plan(config, full_set), len(full_set.train)
    course, steps = Course(Clock()), tuple(planned_steps(config, plan, num_train, 2))
    course.hear(Planned("", steps, num_train))
    tuning = 2 * (1 + 4 * plan.forward_share)  # of two epochs and four teachers
    assert course.passes == (0.0, pytest.approx(plan.passes))
    course.hear(stage_event("fine_tuning", "2 epochs"))
    course.hear(EpochDone("", "fine_tuning", {"epoch": 1}))
    assert course.passes == (pytest.approx(plan.passes - tuning / 2), pytest.approx(plan.passes))


def test_time_left_is_by_the_speed_shown_of_passes_that_are_done_side_by_side():
    clock = Clock()
    course = Course(clock)
    course.hear(PLAN)
    assert course.left_s is None
    course.hear(stage_event("subsets", ""))
    course.hear(progress(0, 0.0, per_s=500.0))
    assert course.left_s is None
    clock.now += 10
    course.hear(progress(0, 8.0, per_s=500.0))  # a quarter of the stage in ten seconds, whatever the actors say
    # 6 of its 8 passes by two actors, and then 2 by two workers
    assert course.left_s == pytest.approx(30.0 + 10.0)


def test_rounds_go_on_with_the_speed_of_rounds_before():
    clock = Clock()
    course = Course(clock)
    course.hear(Planned("", tuple(Step("subsets", n, 1.0, 1, 1, 1.0) for n in range(3)), 1000))
    for round in range(2):
        course.hear(stage_event("subsets", "", round))
        course.hear(Progress("", an_attempt(0, round=round), 0.0, 1.0, None, 1.0))
        clock.now += 5
        course.hear(MinimumDone("", "subsets", {"subset_id": 0, "round": round}))
    assert course.passes == (2.0, 3.0)
    assert course.left_s == pytest.approx(5.0)


def test_of_a_comparison_it_goes_by_the_passes_of_its_arms():
    clock = Clock()
    course = Course(clock)
    rows = [Row("B", (), "at work", done, 10.0) for done in (2.0, 4.0)]  # two had been made before
    course.hear(Standing("", (), (rows[0],)))
    clock.now += 4
    course.hear(Standing("", (), (rows[1],)))
    assert (course.passes, course.left_s) == ((4.0, 10.0), pytest.approx(12.0))
    clock.now += 1
    course.hear(Standing("", (), (Row("B", (), "at work", 9.0, 10.0),), found=4.0))  # one more, and four found
    assert (course.passes, course.left_s) == ((9.0, 10.0), pytest.approx(5.0 / 3.0))


def test_minima_that_are_there_count_as_done_and_not_as_speed():
    clock = Clock()
    course = Course(clock)
    course.hear(Planned("", (Step("subsets", 0, 8.0, 4, 1, 8.0),), 1000))
    course.hear(stage_event("subsets", ""))
    course.hear(MinimaFound("", "subsets", 0, (0, 1)))
    assert course.passes == (4.0, 8.0)
    course.hear(progress(2, 0.0))
    clock.now += 6
    course.hear(done(2))
    assert (course.passes, course.left_s) == ((6.0, 8.0), pytest.approx(6.0))


# Plain lines


def lines_of(tell: Callable[[PlainLines, Clock], None], capsys: pytest.CaptureFixture[str]) -> list[str]:
    clock = Clock()
    tell(PlainLines(clock), clock)
    return [line.partition(" ")[2] for line in capsys.readouterr().err.splitlines()]


def test_a_log_marks_warnings_and_has_no_line_of_each_second(capsys: pytest.CaptureFixture[str]):
    def tell(plain: PlainLines, clock: Clock) -> None:
        plain(Note("few examples", is_warning=True))
        plain(Start("subset 3 starts", an_attempt(3)))
        plain(progress(3, 1.0))
        plain(done(3))

    assert lines_of(tell, capsys) == ["warning: few examples", "subset 3: loss 0.1"]


def test_a_log_sums_up_what_is_at_work_at_a_pace_that_it_can_bear(capsys: pytest.CaptureFixture[str]):
    def tell(plain: PlainLines, clock: Clock) -> None:
        plain(PLAN)
        plain(stage_event("subsets", "4"))
        for second in range(3600):
            clock.now += 1
            for subset in range(4):
                plain(progress(subset, 8 * second / 3600))

    lines = lines_of(tell, capsys)[2:]
    assert 20 < len(lines) < 60  # an hour, after the first minutes every two minutes
    assert lines[0].endswith("4 at work, mean loss 0.2500, 400 examples/s")
    assert re.match(r"9% of 11 planned passes, about .+ of training left; ", lines[0]), lines[0]


def test_a_log_counts_no_work_that_has_ended_since_its_last_line(capsys: pytest.CaptureFixture[str]):
    legs = {n: replace(an_attempt(None, "conventional", directory=f"leg-{n}"), pid=n) for n in range(6)}

    def tell(plain: PlainLines, clock: Clock) -> None:
        for n in range(3):
            plain(Progress("", legs[n], 1.0, 8.0, None, 100.0, 0.25))
        plain(LegDone("", "leg-0"))  # at any epoch, as one that stops early
        plain(Retry("", legs[1]))
        plain(Start("", replace(legs[3], pid=2)))  # the process of the third begins another
        plain(Progress("", legs[4], 1.0, 8.0, None, 100.0, 0.25))
        plain(Retry("", replace(legs[4], node="another")))  # where a process has the same id
        clock.now += 60
        plain(Progress("", legs[5], 1.0, 8.0, None, 100.0, 0.25))

    assert lines_of(tell, capsys)[-1] == "2 at work, mean loss 0.2500, 200 examples/s"


def test_a_log_says_once_what_is_waited_for_and_again_after_ever_longer(capsys: pytest.CaptureFixture[str]):
    def tell(plain: PlainLines, clock: Clock) -> None:
        for second in range(600):
            clock.now += 1
            plain(Waiting(f"an actor waits for a place; free are {second}"))

    assert 3 < len(lines_of(tell, capsys)) < 10


def test_a_thousand_minima_in_a_minute_are_no_thousand_lines(capsys: pytest.CaptureFixture[str]):
    def tell(plain: PlainLines, clock: Clock) -> None:
        for subset in range(1000):
            clock.now += 0.06
            plain(done(subset))

    lines = lines_of(tell, capsys)
    assert 30 <= len(lines) <= 50
    more = sum(int(found) for line in lines for found in re.findall(r"and (\d+) more since", line))
    last = int(re.findall(r"subset (\d+)", lines[-1])[0])
    assert len(lines) + more == last + 1  # none is forgotten


# The live view


def screen_of(told: list[Event], *, width: int, height: int = 24, each_s: float = 0.0) -> list[str]:
    """The lines of the view after some events."""
    clock = Clock()
    stream = io.StringIO()
    view = LiveView(Console(file=io.StringIO(), width=width, height=height, force_terminal=True), clock)
    for event in told:
        view(event)
        clock.now += each_s
    clock.now += 3
    Console(file=stream, width=width, height=height, color_system=None).print(view)
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def test_the_view_has_a_row_an_actor_and_a_bar_with_the_time_left():
    lines = screen_of(AT_WORK, width=80, each_s=0.5)
    assert lines[0].split() == ["at", "work", "epoch", "loss", "examples/s", "node"]
    assert lines[2].split() == ["subset", "0", "2.0", "/", "8", "0.2500", "100", "10.0.0.7"]
    assert "subsets: 4 × 250 examples, 8 epochs each" in lines[-2]
    assert lines[-2].endswith("0:00:05")  # since the stage began: five events and three seconds
    assert re.search(r"41% of 11 planned passes, about 0:00:\d\d of training left", lines[-1]), lines[-1]


@pytest.mark.parametrize("width", [80, 40])
def test_no_line_of_the_view_is_wider_than_the_terminal(width: int):
    lines = screen_of([*AT_WORK, STANDING], width=width)
    assert all(len(line) <= width for line in lines)
    assert any("subset 3" in line and "0.2500" in line for line in lines)


def test_what_is_waited_for_is_on_the_screen_in_one_place_until_work_begins():
    waiting = [Waiting(f"an actor waits for a place; free are {n}") for n in (1, 2)]
    lines = screen_of([stage_event("subsets", "4"), *waiting], width=80)
    assert ["an actor waits for a place; free are 2" in line for line in lines] == [True]
    assert lines[0].endswith("0:00:03")
    assert "waits" not in screen_of([*waiting, *AT_WORK], width=80)[-2]


def test_rows_of_a_comparison_say_which_leg_is_at_work():
    label = "B at rate 0.1, tuning"
    attempt = replace(an_attempt(None, "conventional", directory="leg"), label=label)
    at_work = Progress("", attempt, 1.0, 8.0, None, 100.0, 0.25)
    assert any(line.startswith(label) for line in screen_of([at_work], width=80))
    assert not any(label in line for line in screen_of([at_work, LegDone("", "leg")], width=80))


def test_more_actors_than_lines_are_counted():
    told: list[Event] = [stage_event("subsets", "64"), *(progress(n, 1.0) for n in range(64))]
    lines = screen_of(told, width=80)
    assert len(lines) <= 21
    assert lines[-2] == "and 47 more at work"


def test_what_has_ended_has_no_row():
    text = "\n".join(screen_of([*AT_WORK, done(1), done(2)], width=80))
    assert [f"subset {n}" in text for n in range(4)] == [True, False, False, True]
    assert "at work" not in "\n".join(screen_of([*AT_WORK, stage_event("aggregation", "mean")], width=80))


def test_a_process_that_begins_anew_has_no_row_of_what_it_did_before():
    clock = Clock()
    view = LiveView(Console(file=io.StringIO(), width=80, force_terminal=True), clock)
    for seconds in (0.0, 0.01, 5.0):  # two at once, as a pack is, and then another
        clock.now = 100 + seconds
        view(Start("", Attempt("subsets", 0, int(10 * seconds) + round(100 * seconds) % 2, 0, "node", "ip", 7)))
        if seconds == 0.01:
            assert len(view._at_work.since(0)) == 2
    assert [event.attempt.subset for event in view._at_work.since(0)] == [50]


def test_long_measurements_and_slow_networks_have_numbers(capsys: pytest.CaptureFixture[str]):
    report = Report(epoch=8.0, num_epochs=8.0, loss=0.2, running_loss=math.nan, examples_per_s=0.0234, cost=Cost())
    training, measured = (report.event(an_attempt(1), measured=measured) for measured in (None, (40, 3370)))
    assert training.text == "subset 1: epoch 8.0 of 8, 0.023 examples/s"
    assert measured.text == "subset 1 is measured; 40 of 3370 examples"
    lines = screen_of([PLAN, stage_event("subsets", ""), progress(0, 2.0), measured], width=80, each_s=0.5)
    assert lines[2].split() == ["subset", "0", "2.0", "/", "8", "0.2500", "100", "10.0.0.7"]
    assert lines[3].split() == ["subset", "1", "measured", "40", "of", "3,370", "0.023", "10.0.0.7"]

    def tell(plain: PlainLines, clock: Clock) -> None:
        for event in (PLAN, progress(0, 2.0)):
            plain(event)
        clock.now += 10
        plain(measured)

    assert lines_of(tell, capsys)[-1].endswith("2 at work, mean loss 0.2500, 1 of them measured, 100 examples/s")


def test_workers_of_ray_train_have_a_row_each_within_the_epoch():
    attempt = an_attempt(None, "fine_tuning")
    told = [Progress("", attempt, 0.4, 2.0, None, 50.0, running_loss=0.5, worker=rank) for rank in (0, 1)]
    workers = [Progress("", Attempt("fine_tuning", 0, None, 0, "n", "10.0.0.8", 9), 0.4, 2.0, None, 50.0, 0.5, 1)]
    lines = screen_of([stage_event("fine_tuning", ""), told[0], *workers], width=80)
    assert [line.split()[:2] for line in lines[2:4]] == [["fine_tuning", "0"], ["fine_tuning", "1"]]
    assert lines[3].split()[2:5] == ["0.4", "/", "2"]


STANDING = Standing(
    "2 of 6 results",
    ("learning rate", "1 passes", "2 passes", "4 passes"),
    (
        Row("B", ("0.1", "91.00%", "92.00% (1/2)", ""), "at work", 3.0, 14.0),
        Row("G:aggregation.method=fisher", ("", "90.00%", "93.00%", "94.00%"), "done", 14.0, 14.0, is_best=True),
        *(Row(f"arm {n}", ("", "", "", ""), "waiting", 0.0, 14.0) for n in range(60)),
    ),
)


def test_arms_stand_in_a_table_with_the_best_marked_and_the_last_columns_where_it_is_narrow():
    lines = screen_of([STANDING], width=100)
    assert len(lines) <= 24
    assert lines[0].split() == ["learning", "rate", "1", "passes", "2", "passes", "4", "passes"]
    assert any(line.startswith("G:aggregation.method=fisher *") and line.endswith("94.00%") for line in lines)
    assert any("and 45 more" in line for line in lines)
    narrow = screen_of([STANDING], width=40)
    assert "4 passes" in narrow[0]
    assert "learning rate" not in narrow[0]
    assert any("94.00%" in line for line in narrow)


def test_nothing_that_has_no_number_yet_is_shown_as_nan():
    told: list[Event] = [Progress("", an_attempt(0), 0.5, 8.0, None, 1.0), Start("", an_attempt(1)), LegDone("", "k")]
    assert "nan" not in "\n".join(screen_of([Stage("legs"), *told], width=80)).lower()


# A real terminal

SCRIPT = """
import sys, time
from raysubset.cli.live import telling
from tests.work_shown import AT_WORK, done
with telling("raysubset starts") as tell:
    time.sleep(0.3)
    for event in AT_WORK:
        tell(event)
    time.sleep(0.5)
    tell(done(0))
    print("SHOWN", flush=True)
    sys.stdin.readline()
print("result", flush=True)
"""


def screen_after(data: str, width: int) -> list[str]:
    """What a terminal shows: of its codes, those that rich's Live writes."""
    lines, row, column = [""], 0, 0
    for code, char in re.findall(r"(\x1b\[[0-9;?]*[a-zA-Z])|([^\x1b])", data):
        if code.endswith("A"):
            row = max(0, row - int(code[2:-1] or 1))
        elif code == "\x1b[2K":
            lines[row] = ""
        elif char == "\r":
            column = 0
        elif char == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif char:
            if column == width:
                row, column = row + 1, 0
                lines += [""] * (row + 1 - len(lines))
            lines[row] = lines[row].ljust(column)[:column] + char + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


def terminal_session(width: int, **environment: str) -> tuple[list[str], list[str], str]:
    """The screen while work goes on, that at the end, and all that was written."""
    master, slave = pty.openpty()
    modes = termios.tcgetattr(slave)
    modes[3] &= ~termios.ECHO
    termios.tcsetattr(slave, termios.TCSANOW, modes)
    usual = {"COLUMNS": str(width), "LINES": "24", "TERM": "xterm-256color"}
    usual |= {"PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdin=slave, stdout=slave, stderr=slave, env=os.environ | usual | environment
    )
    os.close(slave)
    written: list[bytes] = []

    def read() -> None:
        try:
            while data := os.read(master, 4096):
                written.append(data)
        except OSError:  # the end, on Linux
            pass

    reader = threading.Thread(target=read)
    reader.start()
    deadline = time.monotonic() + 60
    while b"SHOWN" not in b"".join(written) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    during = b"".join(written).decode()
    os.write(master, b"\n")
    process.wait(60)
    reader.join(5)
    os.close(master)
    text = b"".join(written).decode()
    return screen_after(during, width), screen_after(text, width), text


@pytest.mark.parametrize("width", [80, 40])
def test_a_terminal_shows_the_view_and_keeps_the_lines_alone(width: int):  # two interpreters with rich: seconds
    during, after, _ = terminal_session(width)
    assert any("subset 3" in line for line in during), during
    assert any("passes" in line for line in during[-3:]), during
    assert all(len(line) <= width for line in during)
    kept = [line for line in after if line]
    assert "result" in kept[-1]
    assert "subset 0: loss 0.1" in kept
    assert not any("at work" in line or "left" in line for line in kept), kept


def test_a_dumb_terminal_has_plain_lines_and_no_color_has_no_colours():
    _, after, text = terminal_session(80, TERM="dumb")
    assert "\x1b" not in text
    assert any(line.endswith("raysubset starts") for line in after)
    _, _, text = terminal_session(80, NO_COLOR="1")
    assert not re.search(r"\x1b\[(\d+;)*(3|4|9|10)[0-7]m|38;5", text)


def test_the_first_word_comes_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]):
    with telling("raysubset starts"):
        assert "raysubset starts" in capsys.readouterr().err
