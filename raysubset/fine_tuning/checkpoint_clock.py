"""CheckpointClock: when the next checkpoint of workers that train together is due by time."""

import time

import torch

from raysubset.training import Shard


class CheckpointClock:
    """Asked by all workers at each step, it answers all alike, by the first worker's clock.

    The clock is compared at few steps, each an exchange of one number: at the first, then before the time that the
    steps so far foretell, and at most after three times as many.
    """

    def __init__(self, shard: Shard, device: torch.device, *, limit_s: float, step: int) -> None:
        """Start the time, with `step` as the last checkpoint's step."""
        self._shard, self._device, self._limit_s = shard, device, limit_s
        self.start(step)

    def start(self, step: int) -> None:
        """Start the time anew: a checkpoint was written after this step."""
        self._saved_at, self._saved_step, self._next_step = time.perf_counter(), step, step + 1

    def is_due(self, step: int) -> bool:
        """Return True if the time since the last checkpoint is up."""
        left_s = self._limit_s - (time.perf_counter() - self._saved_at)
        if self._shard.num == 1:
            return left_s <= 0
        if step < self._next_step:
            return False
        num_done = step - self._saved_step
        step_s = max(self._limit_s - left_s, 1e-9) / num_done
        num_left = min(max(1, int(left_s / step_s)), 2 * num_done) if left_s > 0 else 0
        agreed = torch.tensor(float(num_left if self._shard.rank == 0 else 0), device=self._device)
        num_left = int(self._shard.sum(agreed).item())
        self._next_step = step + num_left
        return num_left == 0
