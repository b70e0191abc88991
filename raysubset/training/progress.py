"""Progress: where a minimization stands, and what its losses call for."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from raysubset.config import MinimizeConfig
from raysubset.costs import Cost
from raysubset.training.records import DivergedError, EpochRecord

DIVERGENCE = 10.0  # an epoch's loss this many times the first epoch's is given up on


@dataclass
class Progress:
    """Where a minimization stands; on_step sees it after every step and must not change it."""

    num_steps: int  # of the whole minimization
    num_steps_per_epoch: int
    step: int = 0  # steps done, also before a resume
    cost: Cost = field(default_factory=Cost)  # of this call so far, of all shards together
    epoch_ended: bool = False  # whether this step closed an epoch, a turn of epoch_fraction, or the last part of one
    history: list[EpochRecord] = field(default_factory=list)
    running_loss: Callable[[], float] = lambda: math.nan
    """Mean training loss of the epoch so far, roughly; NaN before its first step. Any thread may call it."""
    capture: Callable[[], dict[str, Any]] = dict
    """Everything a later call needs as `state`: tensors and plain values, not copied, so write them down at once.

    With several shards any one worker's will do for all, the weights being the same, if the others are given their own
    "own" in it where that is not empty. Within an epoch its part of the loss so far stands for all parts, so the
    history of a job resumed there may differ in that one number.
    """

    @property
    def epoch(self) -> float:
        """Epochs done."""
        return self.step / self.num_steps_per_epoch

    @property
    def loss(self) -> float:
        """Mean training loss of the last whole epoch; NaN before."""
        return self.history[-1].loss if self.history else math.nan


OnStep = Callable[[Progress], bool | str | None]


def num_steps_per_epoch(num_examples: int, recipe: MinimizeConfig) -> int:
    """Batches an epoch is cut into: all but equal in size, so that none is too small for batch normalisation."""
    return math.ceil(num_examples / recipe.batch_size)


def reached(recipe: MinimizeConfig, progress: Progress) -> str | None:
    """The outcome that the last epoch's loss calls for, if any."""
    losses = [record.loss for record in progress.history]
    if not math.isfinite(losses[-1]) or losses[-1] > DIVERGENCE * max(losses[0], 1e-12):
        return "diverged"
    if recipe.target_loss is not None and losses[-1] <= recipe.target_loss:
        return "target"
    if recipe.tolerance is not None and len(losses) > 1 and losses[-2] - losses[-1] < recipe.tolerance * losses[-2]:
        return "tolerance"
    return None


def diverged_at_once(loss: float, recipe: MinimizeConfig) -> DivergedError:
    """What there is to say when there are no weights to go back to."""
    return DivergedError(
        f"the loss became {loss:g} in epoch 1 with a peak learning rate of {recipe.peak_learning_rate():g}: lower "
        "the learning rate, or use --minimize.schedule=warmup_linear"
    )
