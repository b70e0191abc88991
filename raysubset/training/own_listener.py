"""The user's own listener, actors.on_step=package.module:function: told of every step by the process that made it.

    function(step)

It has numbers alone, so it cannot change what is minimized; what it draws from global generators is drawn by nobody
else. It is for a tracker of the user's own, say, and costs every step what it takes.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from raysubset.costs import Cost
from raysubset.models import generators_restored
from raysubset.training.records import Progress
from raysubset.user_functions import in_a_line, load_function

_FIELD = "actors.on_step"


@dataclass(frozen=True)
class Step:
    """A step that was made, and whose it is."""

    run: str  # the name of the run; of a comparison's piece of work, that of its leg
    stage: str  # "trunk", "subsets", "fine_tuning" or "conventional"; "subsamples" of a part of a subset
    round: int
    subset: int | None  # None: the full set
    rank: int  # of the Ray Train worker; 0 in an actor
    num_workers: int
    step: int  # steps done, also before a resume
    num_steps: int
    epoch: float  # epochs done
    epoch_ended: bool
    loss: float  # mean training loss of the last whole epoch; NaN before
    cost: Cost  # of this attempt so far, of all workers together


def listener_of(reference: str | None, **piece: Any) -> Callable[[Progress], None]:
    """What tells the user's function of the steps of one piece of work; nobody where none is named.

    Whatever the function raises becomes a ValueError with its name and place.

    Args:
        piece: what a Step says of whose it is.
    """
    if reference is None:
        return lambda progress: None
    function = load_listener(reference)

    def tell(progress: Progress) -> None:
        of_progress = ("step", "num_steps", "epoch", "epoch_ended", "loss", "cost")
        step = Step(**piece, **{name: getattr(progress, name) for name in of_progress})
        with generators_restored(), torch.random.fork_rng(devices=[]), in_a_line(_FIELD, reference):
            function(step)

    return tell


def load_listener(reference: str) -> Callable[[Step], Any]:
    """The function by its name.

    Raises:
        ValueError: if there is none, or it does not take a step alone.
    """
    function = load_function(_FIELD, reference)
    try:
        inspect.signature(function).bind(None)
    except TypeError as error:
        raise ValueError(f"{_FIELD} = {reference!r} is called with a step alone: {error}") from error
    except ValueError:  # some that are written in C tell no parameters
        pass
    return function
