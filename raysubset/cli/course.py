"""Estimate how far a run, comparison or sweep is and how long it still takes, from its plan and its speed so far."""

import time
from collections.abc import Callable, Sequence

from raysubset.events import EpochDone, Event, MinimaFound, MinimumDone, Planned, Progress, Stage, Standing, Step

_MEASURED_S = 1.0  # seconds of work before a time left is told


class Course:
    """Follows the progress of the work by its events. Passes are counted as planned, by stage and round.

    All stages before the one begun last count as done, whoever did them: a resumed run starts from there. The time left
    goes by what this command did, and takes passes that are done side by side as shorter.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._steps: Sequence[Step] = ()
        self._at = -1  # index of the current step
        self._shares: dict[int | None, float] = {}  # of each piece of the step, by subset
        self._standing: tuple[float, float] | None = None  # passes done and planned, of all rows
        self._heard: tuple[float, float] | None = None  # time of the last event, and the time done by then, in passes
        self._done, self._done_s = 0.0, 0.0  # what was done between events, in passes one after another and in seconds

    def hear(self, event: Event) -> None:
        """Update the estimate with an event."""
        match event:
            case Planned():
                self._steps, self._at = event.steps, -1
            case Stage(stage=str() as stage, round=round):
                numbers = [n for n, step in enumerate(self._steps) if (step.stage, step.round) == (stage, round)]
                if numbers:
                    self._at, self._shares, self._heard = numbers[0], {}, None
            case Progress(attempt=attempt):
                self._note(attempt.stage, attempt.round, attempt.subset, event.epoch / event.num_epochs)
            case EpochDone(stage=stage, record=record) if self._at >= 0:
                self._note(stage, 0, None, record["epoch"] / max(self._steps[self._at].num_epochs, record["epoch"]))
            case MinimumDone(stage=stage, record=record):
                self._note(stage, record.get("round", 0), record["subset_id"], 1.0)
            case MinimaFound(subsets=subsets) if self._is_at(event.stage, event.round):
                self._shares |= dict.fromkeys(subsets, 1.0)
                self._heard = None
            case Standing(rows=rows, found=found):
                self._standing = sum(row.passes for row in rows), sum(row.planned for row in rows)
                self._measure(self._standing[0] - found)

    def _note(self, stage: str, round: int, subset: int | None, share: float) -> None:
        if self._is_at(stage, round):
            self._shares[subset] = max(share, self._shares.get(subset, 0.0))
            self._measure(self._passes_of_step() / self._steps[self._at].num_at_once)

    def _measure(self, done: float) -> None:
        now = self._clock()
        if self._heard is not None:
            self._done_s += now - self._heard[0]
            self._done += done - self._heard[1]
        self._heard = now, done

    def _is_at(self, stage: str, round: int) -> bool:
        return self._at >= 0 and (self._steps[self._at].stage, self._steps[self._at].round) == (stage, round)

    def _passes_of_step(self) -> float:
        step = self._steps[self._at]
        return step.passes * min(1.0, sum(self._shares.values()) / step.num_pieces)

    @property
    def passes(self) -> tuple[float, float] | None:
        """Return the passes done and planned; None before the plan is known."""
        if self._standing is not None or not self._steps:
            return self._standing
        total = sum(step.passes for step in self._steps)
        if self._at < 0:
            return 0.0, total
        return sum(step.passes for step in self._steps[: self._at]) + self._passes_of_step(), total

    @property
    def left_s(self) -> float | None:
        """Return the seconds to the end at the speed so far; None before any speed is known."""
        if self._done_s < _MEASURED_S or self._done <= 0:
            return None
        if self._standing is not None:
            left = self._standing[1] - self._standing[0]
        else:
            steps = self._steps[self._at :]
            left = sum(step.passes / step.num_at_once for step in steps) - self._passes_of_step() / steps[0].num_at_once
        return left * self._done_s / self._done
