"""A step along a line that satisfies the strong Wolfe conditions. Pure arithmetic on what a function returns."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

SUFFICIENT_DECREASE = 1e-4  # c1: the usual value (Nocedal & Wright 2006, section 3.1)
MAX_TRIALS = 25  # of one search; torch's L-BFGS has as many
MAX_GROWTH = 10.0  # of a step over the one before, while nothing bounds it
MARGIN = 0.1  # a trial keeps this share of the bracket from its ends
RETREAT = 0.1  # of the bracket, from the lower end, where the other end has no finite loss


@dataclass(frozen=True)
class Trial:
    """What the function is at a step along the line."""

    step: float
    loss: float
    slope: float  # derivative of the loss by the step
    gradient: Tensor  # [P]


def strong_wolfe(
    evaluate: Callable[[float], Trial],
    start: Trial,
    *,
    first_step: float,
    curvature: float,
    resolution: float = 0.0,
    max_trials: int = MAX_TRIALS,
) -> Trial:
    """Search a line downhill for a step of sufficient decrease and small slope (Nocedal & Wright 2006, 3.5 and 3.6).

    Their two algorithms are one loop here: while no upper end is known the step grows, then the bracket shrinks; both
    by cubic interpolation. A loss that is not finite counts as infinitely high.

    Args:
        evaluate: the function at a step; called at most max_trials times.
        start: the function at step 0, of negative slope.
        first_step: what to try first.
        curvature: c2, in (c1, 1): the slope is to fall to this share, without its sign; near 0 is an exact search.
        resolution: relative precision of losses. A bracket in which the slope promises less is not searched further.
        max_trials: after that many the best is taken.

    Returns:
        The step found, or else the lowest loss of sufficient decrease. Where there was none: the start, or, if no
        trial's loss was finite, the last one.
    """
    assert start.slope < 0 < first_step
    low, high, step = start, None, first_step
    for _ in range(max_trials):
        trial = evaluate(step)
        bound = start.loss + SUFFICIENT_DECREASE * step * start.slope
        lower = trial.loss <= bound and trial.loss < low.loss and math.isfinite(trial.slope)
        if not lower:  # also where it is NaN
            high = trial
        elif abs(trial.slope) <= -curvature * start.slope:
            return trial
        elif high is None and trial.slope < 0:
            step = _beyond(low, trial)
            low = trial
            continue
        else:
            if high is None or trial.slope * (high.step - low.step) >= 0:
                high = low
            low = trial
        assert high is not None
        if abs(low.slope * (high.step - low.step)) <= resolution * abs(start.loss):
            break
        step = _between(low, high)
    return low if low is not start or high is None or math.isfinite(high.loss) else high


def _beyond(behind: Trial, trial: Trial) -> float:
    """A step further than two trials that both go downhill: their cubic's minimum, if not too near or far."""
    guess = _cubic_minimum(behind, trial)
    least, most = trial.step + 0.01 * (trial.step - behind.step), MAX_GROWTH * trial.step
    return most if guess is None or guess <= trial.step else min(max(guess, least), most)


def _between(low: Trial, high: Trial) -> float:
    """A step inside a bracket, whichever of its ends is the lower step."""
    width = high.step - low.step
    if not math.isfinite(high.loss):
        return low.step + RETREAT * width
    guess = _cubic_minimum(low, high)
    share = 0.5 if guess is None else (guess - low.step) / width
    return low.step + width * min(max(share, MARGIN), 1 - MARGIN)


def _cubic_minimum(a: Trial, b: Trial) -> float | None:
    """Where the cubic through two losses and slopes has its minimum (3.59); None if it has none."""
    mean = a.slope + b.slope - 3 * (a.loss - b.loss) / (a.step - b.step)
    square = mean * mean - a.slope * b.slope
    if not square >= 0:
        return None
    root = math.copysign(math.sqrt(square), b.step - a.step)
    denominator = b.slope - a.slope + 2 * root
    return b.step - (b.step - a.step) * (b.slope + root - mean) / denominator if denominator else None
