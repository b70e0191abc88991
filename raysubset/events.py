"""What a person is told of a run, sweep or comparison, and who listens: match an event by its class."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self


@dataclass(frozen=True)
class Event:
    """Something that a person watching wants to know; each kind has what a program may want to know of it."""

    text: str  # one line

    def __str__(self) -> str:
        return self.text


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
    round: int = 0


@dataclass(frozen=True)
class Step:
    """What a stage of a run trains for, as planned."""

    stage: str
    round: int
    passes: float
    num_pieces: int  # subsets, or 1
    num_at_once: int  # of processes, if the cluster has the room that it can have


@dataclass(frozen=True)
class Planned(Event):
    """What is to come, when the cluster is known."""

    steps: tuple[Step, ...]
    num_examples: int  # of a pass


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
    running_loss: float | None = None  # of the epoch so far; `loss` is that of the last whole one
    worker: int | None = None  # of Ray Train: its rank; all of them do the attempt together


@dataclass(frozen=True)
class Waiting(Event):
    """What is waited for, until the next event: data, the start of Ray and of processes, a place for work."""


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
    validation: Mapping[str, Any] | None = None  # what it measures at
    was_there: bool = False  # found done, when the comparison was resumed


@dataclass(frozen=True)
class Row:
    """An arm of a comparison, or a trial of a sweep, as it stands."""

    name: str
    cells: tuple[str, ...]  # below the columns, as a person reads them
    state: Literal["waiting", "at work", "done", "failed"]
    passes: float  # done so far
    planned: float
    is_best: bool = False


@dataclass(frozen=True)
class Standing(Event):
    """How all arms of a comparison, or all trials of a sweep, stand; told whenever that has changed."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class TrialReport(Event):
    """A trial of a sweep has reported to Ray Tune."""

    trial: str
    report: Mapping[str, Any]


def stage_event(stage: str, text: str, round: int = 0) -> Stage:
    """The event that a stage of a run begins."""
    return Stage(f"{stage}: {text}", stage, round)
