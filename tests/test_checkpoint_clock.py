"""When a checkpoint of workers that train together is due: alike for all, in time, by few exchanges."""

import pytest
import torch

from raysubset.fine_tuning import checkpoint_clock
from raysubset.fine_tuning.checkpoint_clock import CheckpointClock
from raysubset.training import Shard


class Exchanging(Shard):
    """The second of two workers, which gets what the first gave."""

    given: list[float]

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        assert value.item() == 0  # its own clock has no say
        return value + self.given[-1]


class Giving(Shard):
    given: list[float]

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        self.given.append(value.item())
        return value


@pytest.mark.parametrize("step_s", [0.01, 0.3, 7.0, 100.0])
@pytest.mark.parametrize("slow_down", [1.0, 2.0, 0.5])
def test_workers_agree_and_write_in_time_by_few_exchanges(
    monkeypatch: pytest.MonkeyPatch, step_s: float, slow_down: float
) -> None:
    now, given, limit_s = [0.0], list[float](), 60.0
    monkeypatch.setattr(checkpoint_clock.time, "perf_counter", lambda: now[0])
    first, second = Giving(0, 2), Exchanging(1, 2)
    for shard in (first, second):
        object.__setattr__(shard, "given", given)
    device = torch.device("cpu")
    now[0] = 1000.0
    clocks = [CheckpointClock(first, device, limit_s=limit_s, step=40)]
    now[0] = 0.0  # another machine's clock
    clocks.append(CheckpointClock(second, device, limit_s=limit_s, step=40))
    times, saved_at, num_before = [0.0, 0.0], 0.0, 0
    for step in range(41, 41 + int(300 / step_s) + 3):
        took_s = step_s * (slow_down if step % 2 else 1.0)
        answers = []
        for number, clock in enumerate(clocks):
            times[number] += took_s
            now[0] = times[number] + (1000.0, 0.0)[number]
            answers.append(clock.is_due(step))
        assert answers[0] == answers[1]
        passed_s = times[0] - saved_at
        if answers[0]:
            assert passed_s >= limit_s - 1e-6
            assert passed_s <= limit_s + 2 * step_s * max(1, slow_down) + 0.03 * limit_s
            assert len(given) - num_before <= 12
            saved_at, num_before = times[0], len(given)
            for number, clock in enumerate(clocks):
                now[0] = times[number] + (1000.0, 0.0)[number]
                clock.start(step)
    assert saved_at >= 300 - 2 * limit_s


def test_a_worker_alone_looks_at_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(checkpoint_clock.time, "perf_counter", lambda: now[0])
    clock = CheckpointClock(Shard(), torch.device("cpu"), limit_s=60.0, step=0)
    answers = []
    for step in range(1, 200):
        now[0] += 1.0
        answers.append(clock.is_due(step))
        if answers[-1]:
            clock.start(step)
    assert [number for number, answer in enumerate(answers, 1) if answer] == [60, 120, 180]
