"""Events that a run, sweep or comparison reports to listeners: match an event by its class."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, dataclass_transform


@dataclass_transform(frozen_default=True)
@dataclass(frozen=True)
class Event:
    """Something that a person watching wants to know; the fields of each kind, a frozen dataclass, are for programs."""

    text: str  # one line

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True)(cls)

    def __str__(self) -> str:
        return self.text


OnEvent = Callable[[Event], None]


class Note(Event):
    """A decision made for the user, or a warning; reports hold the notes of the plan."""

    is_warning: bool = False

    def __str__(self) -> str:
        return f"warning: {self.text}" if self.is_warning else self.text

    def to_dict(self) -> dict[str, Any]:
        """Return the note as report.json holds it."""
        return {"text": self.text, "is_warning": self.is_warning}


class Stage(Event):
    """A stage begins, or the run, sweep or comparison itself."""

    stage: str | None = None  # of a run: "trunk", "subsets", "aggregation"…
    round: int = 0


@dataclass(frozen=True)
class Step:
    """The training that a stage of a run plans."""

    stage: str
    round: int
    passes: float  # with those of teachers
    num_pieces: int  # subsets, or 1
    num_at_once: int  # processes at a time, if the cluster has all the room that it can have
    num_epochs: float  # of each piece, over its examples


class Planned(Event):
    """The plan of a run, once the cluster is known."""

    steps: tuple[Step, ...]
    num_examples: int  # in a pass


@dataclass(frozen=True)
class Attempt:
    """One attempt at minimizing on a subset or on the full set, or at an aggregate, and its process."""

    stage: str
    round: int
    subset: int | None  # None: the full set, or a round's aggregate
    number: int
    node: str  # Ray's id
    ip: str
    pid: int
    directory: str = ""  # its name: in a comparison the leg's key, otherwise the run's name
    label: str = ""  # what the work is called in messages


class Start(Event):
    """An actor begins an attempt."""

    attempt: Attempt


class Progress(Event):
    """How far an attempt is, about every second."""

    attempt: Attempt
    epoch: float
    num_epochs: float
    loss: float | None  # of the last whole epoch; None: there is none yet, or it is not finite
    examples_per_s: float
    running_loss: float | None = None  # of the epoch so far
    worker: int | None = None  # rank of a Ray Train worker: all workers share the attempt
    measured: tuple[int, int] | None = None  # if it measures since long: the examples that are done, and all


class Waiting(Event):
    """What the run waits for until the next event: data, the start of Ray and of processes, a place for work."""


class Retry(Event):
    """Work was lost, or leaves its node, and is done again."""

    attempt: Attempt | None = None  # if an actor did it


class MinimumDone(Event):
    """An actor has written a minimum."""

    stage: str
    record: Mapping[str, Any]  # minimum.json


class MinimaFound(Event):
    """Some minima of a round are already there when the run is resumed."""

    stage: str
    round: int
    subsets: tuple[int, ...]


class EpochDone(Event):
    """Ray Train workers have finished an epoch."""

    stage: str
    record: Mapping[str, Any]  # its entry in history.json


class AggregateDone(Event):
    """A round has its aggregate."""

    round: int
    record: Mapping[str, Any]  # the aggregation's, in aggregate.json


class LegDone(Event):
    """A leg of a comparison is done."""

    leg: str  # its key
    validation: Mapping[str, Any] | None = None  # its metrics on validation data
    was_there: bool = False  # it was already done when the comparison was resumed


@dataclass(frozen=True)
class Row:
    """The current state of an arm of a comparison, or of a trial of a sweep."""

    name: str
    cells: tuple[str, ...]  # texts, one for each column of Standing
    state: Literal["waiting", "at work", "done", "failed"]
    passes: float  # done so far
    planned: float
    is_best: bool = False


class Standing(Event):
    """The state of all arms of a comparison, or of all trials of a sweep, whenever it has changed."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    found: float = 0.0  # of all passes done, those that were already done when this command began


class TrialReport(Event):
    """A trial of a sweep has reported to Ray Tune."""

    trial: str
    report: Mapping[str, Any]


def stage_event(stage: str, text: str, round: int = 0) -> Stage:
    """Return the event that a stage of a run begins."""
    return Stage(f"{stage}: {text}", stage, round)
