"""What a person is told of a run, sweep or comparison: notes beforehand, events as they happen; and who listens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self


@dataclass(frozen=True)
class Note:
    """A line on what was decided for the user, or, as a warning, on what they should beware of."""

    text: str
    is_warning: bool = False

    def __str__(self) -> str:
        return f"warning: {self.text}" if self.is_warning else self.text

    def to_dict(self) -> dict[str, Any]:
        """The note in report.json."""
        return {"text": self.text, "is_warning": self.is_warning}

    @classmethod
    def from_json(cls, value: Mapping[str, Any] | str) -> Self:
        """The inverse of to_dict(). Reports of earlier versions hold a note as a person reads it."""
        if isinstance(value, str):
            text = value.removeprefix("warning: ")
            return cls(text, is_warning=text != value)
        return cls(value["text"], value["is_warning"])


@dataclass(frozen=True)
class Event:
    """Something a person watching the run wants to know."""

    kind: str  # "stage", "progress", "waiting", "retry", "minimum", "epoch", "note", "warning", "result"
    text: str  # one line
    data: Mapping[str, Any] = field(default_factory=dict)


OnEvent = Callable[[Event], None]


def note_event(note: Note) -> Event:
    """The event that tells of a note."""
    return Event("warning" if note.is_warning else "note", note.text)


def stage_event(stage: str, text: str) -> Event:
    """That a stage begins."""
    return Event("stage", f"{stage}: {text}", {"stage": stage})
