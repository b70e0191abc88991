"""rate_range(): losses at rising learning rates, for a first guess of the rate (Smith 2015, arXiv:1506.01186)."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from torch import nn

from raysubset.config import AveragingConfig, MinimizeConfig, SkippingConfig, derive_seed
from raysubset.costs import Cost
from raysubset.data import Batches, even_sizes
from raysubset.training.loop import minimize
from raysubset.training.records import DivergedError, num_steps_per_epoch

_DECADES = (-3.0, 2.0)  # range of the rates, relative to the recipe's
_PER_DECADE = 8
_MOST_STEPS = 10  # at one rate
_PER_EPOCH = 20  # rates in an epoch, as long as each has a step
_WORSE = 4.0  # the search ends at this many times the least loss


@dataclass(frozen=True)
class RateRange:
    """Losses from the lowest rate up. Each rate continued from the weights that the one before had reached."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]  # mean while training at each rate
    steps_a_rate: int
    ended_at: float | None  # the rate at which the loss rose or was not finite; None: all were tried
    cost: Cost

    @property
    def least_at(self) -> float:
        """The rate with the least loss, each loss averaged with its neighbours'."""
        smooth = _smoothed(self.losses)
        return self.rates[smooth.index(min(smooth))]

    @property
    def fastest_at(self) -> float:
        """The rate below least_at at which the loss fell fastest per decade."""
        smooth = _smoothed(self.losses)
        falls = [next_loss - loss for loss, next_loss in itertools.pairwise(smooth)] or [0.0]
        falls = falls[: max(1, self.rates.index(self.least_at))]
        return self.rates[falls.index(min(falls))]

    @property
    def suggested(self) -> float:
        """A peak rate to begin a search with, to one digit: the geometric mean of fastest_at and least_at."""
        middle = math.sqrt(self.fastest_at * self.least_at)
        return float(f"{middle:.0e}")


def rate_range(model: nn.Module, examples: Batches, recipe: MinimizeConfig, *, seed: int) -> RateRange:
    """Minimize for a few steps at each of many rates, one after the other; the model is changed.

    Args:
        model: on the examples' device, with the weights that the stage would start from.
        recipe: its batches and optimizer are used. Averaging, skipping, and all that ends a minimization are left out.
            Precision float16 becomes auto, because the scale of float16's loss is found by skipping steps, again at
            each rate.

    Raises:
        DivergedError: if the loss is not finite at the lowest rate.
    """
    steps_per_epoch, peak = num_steps_per_epoch(len(examples), recipe), recipe.peak_learning_rate()
    num_steps = max(1, min(_MOST_STEPS, steps_per_epoch // _PER_EPOCH))
    low, high = (round(_PER_DECADE * decade) for decade in _DECADES)
    recipe = replace(
        recipe,
        epochs=num_steps / steps_per_epoch,
        epoch_fraction=1.0,
        schedule="constant",
        averaging=AveragingConfig(),
        skipping=SkippingConfig(),
        tolerance=None,
        target_loss=None,
        patience=0,
        validate_every=None,
        precision="auto" if recipe.precision == "float16" else recipe.precision,
    )
    rates, losses, cost, state, ended_at = list[float](), list[float](), Cost(), None, None
    for number in range(low, high + 1):
        rate = peak * 10 ** (number / _PER_DECADE)
        trial = replace(recipe, learning_rate=rate)
        try:
            result = minimize(model, examples, trial, seed=derive_seed(seed, "rate", number), optimizer_state=state)
        except DivergedError:
            if not losses:
                raise
            num = sum(even_sizes(len(examples), steps_per_epoch)[:num_steps])
            cost, ended_at = cost + Cost(num, num, num_steps), rate
            break
        rates.append(rate)
        losses.append(result.history[-1].loss)
        cost, state = cost + result.cost, result.optimizer
        least = min(losses)
        if losses[-1] > least + (_WORSE - 1) * abs(least):
            ended_at = rate
            break
    return RateRange(tuple(rates), tuple(losses), num_steps, ended_at, cost)


def _smoothed(losses: Sequence[float]) -> list[float]:
    """Average each loss with its neighbours."""
    return [fmean(losses[max(0, number - 1) : number + 2]) for number in range(len(losses))]
