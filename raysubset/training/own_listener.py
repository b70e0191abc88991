"""The user's own listener, actors.on_step=package.module:function: called after every step, in that step's process.

    function(step)

It receives numbers alone, so it cannot change what is minimized. Its draws from global generators do not affect the
training. Use it for a tracker, for example; each step takes longer by the time that the function takes.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from raysubset.costs import Cost
from raysubset.models import generators_restored
from raysubset.training.records import Progress
from raysubset.user_code.functions import in_a_line, load_function

_FIELD = "actors.on_step"


@dataclass(frozen=True)
class Step:
    """A step of a minimization, and the work that it belongs to."""

    run: str  # the name of the run; in a comparison, of the leg
    stage: str  # "trunk", "subsets", "fine_tuning" or "conventional"; "subsamples" for a part of a subset
    round: int
    subset: int | None  # None: the full set
    rank: int  # of the Ray Train worker; 0 in an actor
    num_workers: int
    step: int  # steps done, also before a resume
    num_steps: int
    epoch: float  # epochs done
    epoch_ended: bool
    loss: float  # mean training loss of the last complete epoch; NaN before there is one
    cost: Cost  # of this attempt so far, of all workers together


def listener_of(reference: str | None, **piece: Any) -> Callable[[Progress], None]:
    """Return a function that reports the steps of one piece of work to the user's function, if there is one.

    Whatever the user's function raises becomes a ValueError with its name and place.

    Args:
        piece: the fields of Step that name the work: run, stage, round, subset, rank and num_workers.
    """
    if reference is None:
        return lambda progress: None
    function = load_listener(reference)

    def report(progress: Progress) -> None:
        names = ("step", "num_steps", "epoch", "epoch_ended", "loss", "cost")
        step = Step(**piece, **{name: getattr(progress, name) for name in names})
        with generators_restored(), torch.random.fork_rng(devices=[]), in_a_line(_FIELD, reference):
            function(step)

    return report


def load_listener(reference: str) -> Callable[[Step], Any]:
    """Load the function by its name.

    Raises:
        ValueError: if there is none, or it does not take exactly a step.
    """
    function = load_function(_FIELD, reference)
    try:
        inspect.signature(function).bind(None)
    except TypeError as error:
        raise ValueError(f"{_FIELD} = {reference!r} is called with a step alone: {error}") from error
    except ValueError:  # some functions written in C have no signature
        pass
    return function
