"""When work stands still, by a clock that the test turns."""

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from ray.exceptions import RpcError

from raysubset import pulse as pulse_module
from raysubset.cluster import pulses
from raysubset.pulse import Pulse, Watch, beat, begin, pulse
from tests.tiny import between_instructions, image_examples


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def looks(watch: Watch, clock: Clock, *, seconds: int) -> dict[str, list[int]]:
    """What a look each second says, with the seconds at which it said it."""
    said: dict[str, list[int]] = {"stalled": [], "lost": []}
    for second in range(1, seconds + 1):
        clock.now += 1
        if word := watch.look():
            said[word].append(second)
    return said


@pytest.mark.parametrize(("usual_s", "limit"), [(None, 120.0), (0.1, 30.0), (3.0, 30.0), (60.0, 600.0)])
def test_a_step_may_take_ten_times_the_usual_and_stall_s_and_a_first_one_four_times_that(
    usual_s: float | None, limit: float
) -> None:
    watch = Watch(30.0)
    watch.hear(Pulse(3, usual_s))
    assert watch.limit_s == limit


def test_what_stands_still_is_told_of_once_and_lost_after_as_long_again() -> None:
    clock = Clock()
    watch = Watch(30.0, clock=clock)
    watch.hear(Pulse(7, 0.5))
    assert looks(watch, clock, seconds=61) == {"stalled": [30], "lost": [60, 61]}
    assert watch.in_words() == "no step for 61 s (usually 0.5 s)"


def test_a_first_step_is_given_longer() -> None:
    clock = Clock()
    watch = Watch(30.0, clock=clock)
    assert looks(watch, clock, seconds=240) == {"stalled": [120], "lost": [240]}
    watch.hear(Pulse(2, None))
    assert looks(watch, clock, seconds=119) == {"stalled": [], "lost": []}


def test_progress_and_another_process_begin_anew_and_an_answer_without_progress_does_not() -> None:
    clock = Clock()
    watch = Watch(30.0, clock=clock)
    watch.hear(Pulse(7, 0.5))
    assert looks(watch, clock, seconds=29) == {"stalled": [], "lost": []}
    watch.hear(Pulse(7, 0.5))
    assert looks(watch, clock, seconds=1) == {"stalled": [1], "lost": []}
    watch.hear(Pulse(8, 0.5))
    assert looks(watch, clock, seconds=30) == {"stalled": [30], "lost": []}
    watch.hear(Pulse(8, 0.5), who="the next attempt")
    assert looks(watch, clock, seconds=29) == {"stalled": [], "lost": []}


def test_a_watcher_that_was_stopped_itself_takes_nobody_for_lost() -> None:
    clock = Clock()
    watch = Watch(30.0, clock=clock)
    watch.hear(Pulse(7, 0.5))
    clock.now += 10_000  # a laptop that slept, a driver that was stopped
    assert looks(watch, clock, seconds=10) == {"stalled": [], "lost": []}


def test_the_usual_time_between_beats_leaves_out_the_first_and_each_piece_of_work_counts_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr(pulse_module.time, "monotonic", clock)
    begin()
    for second in (0, 50, 1, 3):  # the first step compiles
        clock.now += second
        beat()
    assert pulse() == Pulse(4, 2.0)
    begin()
    assert pulse() == Pulse(0, None)


def test_each_batch_of_training_and_of_evaluation_is_a_beat() -> None:
    images, labels = torch.zeros(10, 2, 2, 1, dtype=torch.uint8), torch.zeros(10, dtype=torch.int64)
    examples = image_examples(images, labels)
    begin()
    list(examples.epoch(order_seed=0, augmentation_seed=0, batch_sizes=[4, 4, 2]))
    list(examples.in_order([5, 5]))
    assert pulse().num_beats == 5


def test_a_pulse_is_of_one_moment_whatever_the_work_does_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five beats a second apart; before one of the instructions of pulse() a sixth, or four of a slower next piece."""
    clock = Clock()
    monkeypatch.setattr(pulse_module, "time", SimpleNamespace(monotonic=clock))

    def beats(num: int, every_s: float) -> None:
        for _ in range(num):
            clock.now += every_s
            beat()

    def answers(act: Callable[[], object]) -> set[tuple[int, float | None]]:
        def question() -> tuple[int, float | None]:
            begin()
            beats(5, 1.0)
            heard = pulse()
            return heard.num_beats, heard.usual_s

        return set(between_instructions(question, pulse, act))

    def next_piece() -> None:
        begin()
        beats(4, 10.0)

    assert answers(lambda: beats(1, 1.0)) == {(5, 1.0), (6, 1.0)}
    assert answers(next_piece) == {(5, 1.0), (4, 10.0)}


class _Store:
    """Ray's control store, as far as request_stop() uses it. Looking a key up raises the error."""

    def __init__(self, error: BaseException) -> None:
        self.keys, self.error = set[str](), error

    def _internal_kv_put(self, key: str, value: bytes, *, namespace: str) -> None:
        self.keys.add(key)

    def _internal_kv_del(self, key: str, *, namespace: str) -> None:
        self.keys.remove(key)

    def _internal_kv_exists(self, key: str, *, namespace: str) -> bool:
        raise self.error


@pytest.mark.parametrize(("error", "raises"), [(RpcError("unavailable"), False), (KeyboardInterrupt(), True)])
def test_a_request_to_stop_does_not_outlive_its_wait_nor_replace_the_ctrl_c_that_made_it(
    error: BaseException, raises: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = _Store(error)
    monkeypatch.setattr(pulses, "internal_kv", store)
    with pytest.raises(KeyboardInterrupt) if raises else nullcontext():
        pulses.request_stop("job/00000", timeout_s=60.0)
    assert not store.keys
