"""What a person watching a run, sweep or comparison is told, and who listens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Event:
    """Something a person watching the run wants to know."""

    kind: str  # "stage", "progress", "waiting", "retry", "minimum", "epoch", "note", "warning", "result"
    text: str  # one line
    data: Mapping[str, Any] = field(default_factory=dict)


_WARNING = "warning: "

OnEvent = Callable[[Event], None]


def line_event(line: str) -> Event:
    """What a line of advice, or a data set's note, is told as: "warning: " at its beginning makes it a warning."""
    return Event("warning", line[len(_WARNING) :]) if line.startswith(_WARNING) else Event("note", line)


def stage_event(stage: str, text: str) -> Event:
    """That a stage begins."""
    return Event("stage", f"{stage}: {text}", {"stage": stage})
