"""The pulse of a working process: each batch and each file is a beat. A watcher tells slow work from stuck work by it.

pulse.begin()  # in the process that works; data and run directory call pulse.beat()
watch = Watch(stall_s)  # in the process that watches
watch.hear(Pulse(...))  # whenever the working process has answered
watch.look()  # "", "stalled" (once), "lost"
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

USUAL_TIMES = 10.0  # a beat may take this many times the usual interval, if that is more than stall_s
MEASURING_S = 10.0  # a measurement that has lasted so long is told
FIRST_TIMES = 4.0  # the first beats may take this many times stall_s: they compile, start CUDA and open files
_MOST_BETWEEN_LOOKS_S = 10.0  # a longer gap between looks counts as this: the watcher itself was stopped meanwhile


@dataclass(frozen=True)
class Pulse:
    """How far a process has got with its current work."""

    num_beats: int = 0
    usual_s: float | None = None  # mean time between two beats without the first interval; None before the third
    measured: tuple[int, int] | None = None  # examples of a long measurement: those that are done, and all


# Of this process, which does one piece of work at a time: the number of beats, and when the second and the last came.
# Other threads read it, so each beat replaces it
_beats: tuple[int, float, float] = (0, 0.0, 0.0)
_measured: tuple[int, int] | None = None  # as in Pulse, from the first example on
_measuring_at = 0.0


def begin() -> None:
    """Start counting beats for a new piece of work."""
    global _beats, _measured
    _beats, _measured = (0, 0.0, 0.0), None


def beat() -> None:
    """Count one more batch or file."""
    global _beats
    num, second_at, _ = _beats
    now = time.monotonic()
    _beats = (num + 1, now if num < 2 else second_at, now)


def measuring(num_done: int, num: int) -> None:
    """Note that of `num` examples so many are measured; the measurement begins at none and ends at all."""
    global _measured, _measuring_at
    if not num_done:
        _measuring_at = time.monotonic()
    _measured = (num_done, num) if num_done < num else None


def pulse() -> Pulse:
    """Return this process's pulse."""
    num, second_at, last_at = _beats
    measured = _measured if time.monotonic() - _measuring_at >= MEASURING_S else None
    return Pulse(num, (last_at - second_at) / (num - 2) if num > 2 else None, measured)


class Watch:
    """Measures for how long a process has made no progress. Only time in which somebody looked counts.

    look() reports a stall once, and a loss when the silence has lasted for twice the limit.
    """

    def __init__(self, stall_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stall_s, self._clock = stall_s, clock
        self._heard: Any = None
        self._usual_s: float | None = None
        self.silent_s, self._looked_at, self._is_told = 0.0, clock(), False

    def hear(self, pulse: Pulse, who: Any = None) -> None:
        """Note a pulse. A new count of beats, or another process (`who`), is progress."""
        if (who, pulse.num_beats) != self._heard:
            self._heard, self.silent_s, self._is_told = (who, pulse.num_beats), 0.0, False
        self._usual_s = pulse.usual_s

    @property
    def limit_s(self) -> float:
        """Seconds without progress after which the work counts as stalled."""
        if self._usual_s is None:
            return FIRST_TIMES * self._stall_s
        return max(self._stall_s, USUAL_TIMES * self._usual_s)

    def look(self) -> Literal["", "stalled", "lost"]:
        """Return "stalled" when the work is first seen to stand still, "lost" after twice that time, else ""."""
        now = self._clock()
        self.silent_s += min(now - self._looked_at, _MOST_BETWEEN_LOOKS_S)
        self._looked_at = now
        if self.silent_s < self.limit_s:
            return ""
        if self._is_told:
            return "lost" if self.silent_s >= 2 * self.limit_s else ""
        self._is_told = True
        return "stalled"

    def in_words(self) -> str:
        """Return the silence as a text: 'no step for 301 s (usually 0.2 s)'."""
        usual = "" if self._usual_s is None else f" (usually {self._usual_s:.2g} s)"
        return f"no step for {self.silent_s:.0f} s{usual}"
