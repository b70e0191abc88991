"""How far a run, comparison or sweep is, and how long it still takes: by what is planned and the speed it has shown."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from raysubset.events import EpochDone, Event, MinimumDone, Planned, Progress, Stage, Standing, Step

_MEASURED_S = 1.0  # that a stage has been at work for before its own speed is believed
_SECONDS_BELOW = 600  # are told beside minutes
_SMOOTH = 0.3  # what the newest speed of a process counts in their mean


@dataclass
class _Pace:
    """Passes made in the stages of one name, and the seconds they took from the first that was heard of."""

    passes: float = 0.0
    seconds: float = 0.0


@dataclass
class Course:
    """What events say of how far the work is. A run's passes are counted as its plan has them, by stage and round.

    Stages before the one that was last begun are done, whoever did them and when: a resumed run begins where it is.
    """

    clock: Callable[[], float] = time.monotonic
    _steps: tuple[Step, ...] = ()
    _num_examples: int = 0
    _at: int = -1  # which of the steps
    _shares: dict[int | None, float] = field(default_factory=dict)  # done of each piece of the step, by subset
    _paces: dict[str, _Pace] = field(default_factory=dict)
    _heard: tuple[float, float] | None = None  # when the step was last heard of, and its passes then
    _per_s: float | None = None  # examples, of one process
    _standing: tuple[float, float] | None = None  # passes done and planned, of all rows
    _began: tuple[float, float] | None = None  # when the first standing came, and the passes done then

    def hear(self, event: Event) -> None:
        """Take in an event."""
        match event:
            case Planned():
                self._steps, self._num_examples, self._at = event.steps, event.num_examples, -1
            case Stage(stage=str() as stage, round=round):
                found = [n for n, step in enumerate(self._steps) if (step.stage, step.round) == (stage, round)]
                if found:
                    self._at, self._shares, self._heard = found[0], {}, None
            case Progress(attempt=attempt):
                old, new = self._per_s, event.examples_per_s
                self._per_s = new if old is None else old + _SMOOTH * (new - old)
                self._note(attempt.stage, attempt.round, attempt.subset, event.epoch / event.num_epochs)
            case EpochDone(stage=stage, record=record) if self._at >= 0:
                self._note(stage, 0, None, record["epoch"] / max(self._steps[self._at].passes, record["epoch"]))
            case MinimumDone(stage=stage, record=record):
                self._note(stage, record.get("round", 0), record["subset_id"], 1.0)
            case Standing(rows=rows):
                self._standing = sum(row.passes for row in rows), sum(row.planned for row in rows)
                self._began = self._began or (self.clock(), self._standing[0])

    def _note(self, stage: str, round: int, subset: int | None, share: float) -> None:
        if self._at < 0 or (self._steps[self._at].stage, self._steps[self._at].round) != (stage, round):
            return
        self._shares[subset] = max(share, self._shares.get(subset, 0.0))
        now, passes = self.clock(), self._passes_of_step()
        if self._heard is not None:
            pace = self._paces.setdefault(stage, _Pace())
            pace.passes += passes - self._heard[1]
            pace.seconds += now - self._heard[0]
        self._heard = now, passes

    def _passes_of_step(self) -> float:
        step = self._steps[self._at]
        return step.passes * min(1.0, sum(self._shares.values()) / step.num_pieces)

    @property
    def passes(self) -> tuple[float, float] | None:
        """Done and planned; None before that is known."""
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
        """Seconds to the end, if all goes on as fast as it has; None before any speed is known."""
        if self._standing is not None and self._began is not None:
            (done, total), (began_at, done_before) = self._standing, self._began
            new, seconds = done - done_before, self.clock() - began_at
            return (total - done) * seconds / new if new > 0 and seconds >= _MEASURED_S else None
        seconds = 0.0
        for number, step in enumerate(self._steps):
            if number < self._at:
                continue
            passes, pace = step.passes, self._paces.get(step.stage, _Pace())
            if not passes:
                continue
            if number == self._at:
                passes -= self._passes_of_step()
            if pace.seconds >= _MEASURED_S and pace.passes > 0:
                seconds += passes * pace.seconds / pace.passes
            elif self._per_s:
                seconds += passes * self._num_examples / (self._per_s * step.num_at_once)
            else:
                return None
        return seconds if self._steps else None


def in_words(seconds: float) -> str:
    """'8 s', '3 min 5 s', '20 min', '2 h 5 min', '3 days 4 h': two figures are enough."""
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
