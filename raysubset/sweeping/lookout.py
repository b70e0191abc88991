"""TrialsLookout watches the processes of a sweep's trials from the driver: Tune would wait for a stopped one for ever.

lookout = TrialsLookout(tell, stall_s=300)
with trial_seen(key, "trial"): ...  # in the trial's process, with lookout.key
lookout.look(names)  # in the driver, again and again
"""

import time
import uuid
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from raysubset.cluster import kill_processes, processes_at, published
from raysubset.events import Note, OnEvent
from raysubset.pulse import Watch, beat

LOOK_S = 2.0  # between two looks


def trial_seen(key: str, name: str) -> AbstractContextManager[None]:
    """Return a context in which this process shows that it lives, to the lookout of this key."""
    return published(f"{key}/{name}", _sign_of_life)


def _sign_of_life() -> Mapping[int, Any]:
    """Count a beat each time that the pulse is published. The trial's work is that of others, which its run watches."""
    beat()
    return {}


class TrialsLookout:
    """Warns of a trial whose process shows no sign of life for stall_s, and kills it after as long again.

    Tune then reports that the trial failed. The same sweep resumes it.
    """

    def __init__(self, tell: OnEvent, *, stall_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.key = uuid.uuid4().hex  # of the trials' pulses
        self._tell, self._clock, self._looked_at = tell, clock, clock()
        self._new_watch = partial(Watch, stall_s, clock=clock)
        self._watches: dict[str, Watch] = {}

    def look(self, running: Collection[str]) -> None:
        """Check the trials that run by their names, unless that was done within LOOK_S."""
        if self._clock() - self._looked_at < LOOK_S:
            return
        self._looked_at = self._clock()
        for name, process in processes_at(f"{self.key}/").items():
            if name not in running:  # a process that was killed leaves its pulse
                continue
            watch = self._watches.setdefault(name, self._new_watch())
            watch.hear(process.pulse, process.pid)
            outcome, silence = watch.look(), f"no sign of life for {watch.silent_s:.0f} s"
            text = f"{name}: {silence} of its process {process.pid} on {process.node}"
            match outcome:
                case "stalled":
                    more = f"it is killed in {watch.limit_s:.0f} s unless it shows one (--actors.stall-s)"
                    self._tell(Note(f"{text}; {more}", is_warning=True))
                case "lost":
                    self._tell(Note(f"{text}: it is killed (actors.stall_s)", is_warning=True))
                    kill_processes([(process.node_id, process.pid)])
                    del self._watches[name]
