"""What a person is told of a run, sweep or comparison, and who listens: match an event by its class."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Event:
    """Something that a person watching wants to know; each kind has what a program may want to know of it."""

    text: str  # one line

    def __str__(self) -> str:
        return self.text

    @property
    def kind(self) -> str:
        """The kind in a word, for logs."""
        return type(self).__name__.lower()


OnEvent = Callable[[Event], None]


@dataclass(frozen=True)
class Note(Event):
    """What was decided for the user, or, as a warning, what they should beware of; reports hold those of the plan."""

    is_warning: bool = False

    def __str__(self) -> str:
        return f"warning: {self.text}" if self.is_warning else self.text

    def to_dict(self) -> dict[str, Any]:
        """The note in report.json."""
        return {"text": self.text, "is_warning": self.is_warning}

    @classmethod
    def from_json(cls, value: Mapping[str, Any] | str) -> Self:
        """The inverse of to_dict(). Reports of earlier versions hold a note as a person reads it."""
        if not isinstance(value, str):
            return cls(**value)
        text = value.removeprefix("warning: ")
        return cls(text, is_warning=text != value)


@dataclass(frozen=True)
class Stage(Event):
    """A stage begins, or the run, sweep or comparison itself."""

    stage: str | None = None  # "trunk", "subsets", "aggregation"…: those of a run


@dataclass(frozen=True)
class Attempt:
    """One attempt at minimizing on a subset or on the full set, or at an aggregate, and the process that makes it."""

    stage: str
    round: int
    subset: int | None  # None: the full set, or a round's aggregate
    number: int
    node: str  # Ray's id
    ip: str
    pid: int


@dataclass(frozen=True)
class Start(Event):
    """An actor begins an attempt."""

    attempt: Attempt


@dataclass(frozen=True)
class Progress(Event):
    """How far an attempt is, about every second."""

    attempt: Attempt
    epoch: float
    num_epochs: float
    loss: float | None  # None: there is none yet, or it is not finite
    examples_per_s: float


@dataclass(frozen=True)
class Waiting(Event):
    """Work waits for a place."""


@dataclass(frozen=True)
class Retry(Event):
    """Work was lost, or leaves its node, and is done again."""

    attempt: Attempt | None = None  # an actor's


@dataclass(frozen=True)
class MinimumDone(Event):
    """An actor has left a minimum."""

    stage: str
    record: Mapping[str, Any]  # minimum.json


@dataclass(frozen=True)
class EpochDone(Event):
    """Workers of Ray Train have done an epoch."""

    stage: str
    record: Mapping[str, Any]  # its entry in history.json


@dataclass(frozen=True)
class AggregateDone(Event):
    """A round has its aggregate."""

    round: int
    record: Mapping[str, Any]  # of the aggregation, in aggregate.json


@dataclass(frozen=True)
class LegDone(Event):
    """A leg of a comparison is done."""

    leg: str  # its key


@dataclass(frozen=True)
class TrialReport(Event):
    """A trial of a sweep has reported to Ray Tune."""

    trial: str
    report: Mapping[str, Any]


def stage_event(stage: str, text: str) -> Stage:
    """The event that a stage of a run begins."""
    return Stage(f"{stage}: {text}", stage)
