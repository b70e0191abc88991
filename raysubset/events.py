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


OnEvent = Callable[[Event], None]


def stage_event(stage: str, text: str) -> Event:
    """That a stage begins."""
    return Event("stage", f"{stage}: {text}", {"stage": stage})
