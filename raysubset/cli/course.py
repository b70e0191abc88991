"""Estimate how far a run, comparison or sweep is and how long it still takes, from its plan and its speed so far."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from raysubset.events import EpochDone, Event, MinimaFound, MinimumDone, Planned, Progress, Stage, Standing, Step

_MEASURED_S = 1.0  # seconds of work before a stage's own speed is used
_SECONDS_BELOW = 600  # shorter times show seconds beside minutes
_SMOOTH = 0.3  # weight of the newest speed in the moving mean


@dataclass
class Course:
    """Follows the progress of the work by its events. Passes are counted as planned, by stage and round.

    All stages before the one begun last count as done, whoever did them: a resumed run starts from there.
    """

    clock: Callable[[], float] = time.monotonic
    _steps: tuple[Step, ...] = ()
    _num_examples: int = 0
    _at: int = -1  # index of the current step
    _shares: dict[int | None, float] = field(default_factory=dict)  # of each piece of the step, by subset
    _paces: dict[str, tuple[float, float]] = field(default_factory=dict)  # by stage: passes heard of, and their seconds
    _heard: tuple[float, float] | None = None  # time of the step's last event, and its passes then
    _per_s: float | None = None  # examples/s of one process
    _standing: tuple[float, float] | None = None  # passes done and planned, of all rows
    _new: float = 0.0  # of them, passes that were not already done when the command began
    _began: tuple[float, float] | None = None  # time of the first Standing, and its new passes

    def hear(self, event: Event) -> None:
        """Update the estimate with an event."""
        match event:
            case Planned():
                self._steps, self._num_examples, self._at = event.steps, event.num_examples, -1
            case Stage(stage=str() as stage, round=round):
                numbers = [n for n, step in enumerate(self._steps) if (step.stage, step.round) == (stage, round)]
                if numbers:
                    self._at, self._shares, self._heard = numbers[0], {}, None
            case Progress(attempt=attempt):
                old, new = self._per_s, event.examples_per_s
                self._per_s = new if old is None else old + _SMOOTH * (new - old)
                self._note(attempt.stage, attempt.round, attempt.subset, event.epoch / event.num_epochs)
            case EpochDone(stage=stage, record=record) if self._at >= 0:
                self._note(stage, 0, None, record["epoch"] / max(self._steps[self._at].passes, record["epoch"]))
            case MinimumDone(stage=stage, record=record):
                self._note(stage, record.get("round", 0), record["subset_id"], 1.0)
            case MinimaFound(subsets=subsets) if self._is_at(event.stage, event.round):
                self._shares |= dict.fromkeys(subsets, 1.0)
                self._heard = None
            case Standing(rows=rows, found=found):
                self._standing = sum(row.passes for row in rows), sum(row.planned for row in rows)
                self._new = self._standing[0] - found
                self._began = self._began or (self.clock(), self._new)

    def _note(self, stage: str, round: int, subset: int | None, share: float) -> None:
        if not self._is_at(stage, round):
            return
        self._shares[subset] = max(share, self._shares.get(subset, 0.0))
        now, passes = self.clock(), self._passes_of_step()
        if self._heard is not None:
            done, done_s = self._paces.get(stage, (0.0, 0.0))
            self._paces[stage] = done + passes - self._heard[1], done_s + now - self._heard[0]
        self._heard = now, passes

    def _is_at(self, stage: str, round: int) -> bool:
        return self._at >= 0 and (self._steps[self._at].stage, self._steps[self._at].round) == (stage, round)

    def _passes_of_step(self) -> float:
        step = self._steps[self._at]
        return step.passes * min(1.0, sum(self._shares.values()) / step.num_pieces)

    @property
    def passes(self) -> tuple[float, float] | None:
        """Return the passes done and planned; None before the plan is known."""
        if self._standing is not None:
            return self._standing
        if not self._steps:
            return None
        total = sum(step.passes for step in self._steps)
        if self._at < 0:
            return 0.0, total
        return sum(step.passes for step in self._steps[: self._at]) + self._passes_of_step(), total

    @property
    def left_s(self) -> float | None:
        """Return the seconds to the end at the speed so far; None before any speed is known."""
        if self._standing is not None and self._began is not None:
            (passes, total), (began_at, new_before) = self._standing, self._began
            new, seconds = self._new - new_before, self.clock() - began_at
            return (total - passes) * seconds / new if new > 0 and seconds >= _MEASURED_S else None
        seconds = 0.0
        for number, step in list(enumerate(self._steps))[max(0, self._at) :]:
            passes, (done, done_s) = step.passes, self._paces.get(step.stage, (0.0, 0.0))
            if not passes:
                continue
            if number == self._at:
                passes -= self._passes_of_step()
            if done_s >= _MEASURED_S and done > 0:
                seconds += passes * done_s / done
            elif self._per_s:
                seconds += passes * self._num_examples / (self._per_s * step.num_at_once)
            else:
                return None
        return seconds if self._steps else None


def in_words(seconds: float) -> str:
    """Return '8 s', '3 min 5 s', '20 min', '2 h 5 min' or '3 days 4 h': two figures are enough."""
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    if seconds < _SECONDS_BELOW:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} day{'s' if days > 1 else ''}" + (f" {hours} h" if hours else "")
