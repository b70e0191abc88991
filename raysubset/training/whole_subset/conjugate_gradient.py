"""Nonlinear conjugate gradients on a whole subset: Polak-Ribière+ with restarts and a strong-Wolfe line search."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from raysubset.training.whole_subset.objective import Evaluation, Objective, dot

CURVATURE = 0.1  # c2 of the line search: the usual value for conjugate gradients (Nocedal & Wright 2006, section 3.1)
POWELL = 0.5  # restart if successive gradients overlap by more; our choice: Powell's 0.2 was slower on digits
DESCENT = 0.01  # least descent along a direction, relative to that along the gradient (Gilbert & Nocedal 1992)

# Constants of the line search
SUFFICIENT_DECREASE = 1e-4  # c1: the usual value (Nocedal & Wright 2006, section 3.1)
MAX_TRIALS = 25  # of one search; torch's L-BFGS has as many
MAX_GROWTH = 10.0  # of a step over the one before, while the bracket has no upper end
MARGIN = 0.1  # a trial stays this share of the bracket away from its ends
RETREAT = 0.1  # of the bracket, from its lower end, if the loss at the other end is not finite


class ConjugateGradient:
    """Polak-Ribière+ (Gilbert & Nocedal 1992): d = −g + max(0, gᵀ(g − g₀) / g₀ᵀg₀) d₀, with the last step's g₀ and d₀.

    It restarts from −g if β would be negative, if successive gradients are far from orthogonal (Powell 1977), if d
    descends too little, and if a line search finds nothing lower. A search first tries the step that would lower the
    loss as much as the last one did (Nocedal & Wright 2006, 3.60); the very first tries 1 / |g|₁.
    """

    least_thirds = 1

    def __init__(self, objective: Objective, *, curvature: float = CURVATURE) -> None:
        """Begin without a direction. `curvature` is c2 of the line search; near 0 the search is exact."""
        self._objective, self._curvature = objective, curvature
        self._previous: dict[str, Any] = {}  # loss, gradient and direction of the step before

    def step(self, start: Evaluation, budget: int) -> Evaluation:
        """Make one line search, or two if the first finds nothing lower; return `start` if neither does."""
        start_thirds = self._objective.thirds
        direction = self._direction(start)
        best = self._search(start, direction, budget)
        if not best.loss < start.loss and direction is not None:
            self._previous = {}
            best = self._search(start, None, budget - (self._objective.thirds - start_thirds))
        return best

    def state_dict(self) -> dict[str, Any]:
        return {"previous": self._previous}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self._objective.device
        self._previous = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in state["previous"].items()}

    def _direction(self, start: Evaluation) -> Tensor | None:
        """Return the conjugate direction, or None to restart from the gradient."""
        if not self._previous:
            return None
        previous, square = self._previous["gradient"], dot(start.gradient, start.gradient)
        overlap = dot(start.gradient, previous)
        beta = (square - overlap) / dot(previous, previous)
        if beta <= 0 or abs(overlap) >= POWELL * square:
            return None
        direction = beta * self._previous["direction"] - start.gradient
        return direction if dot(direction, start.gradient) <= -DESCENT * square else None

    def _search(self, start: Evaluation, direction: Tensor | None, budget: int) -> Evaluation:
        objective, origin = self._objective, self._objective.weights()
        direction = -start.gradient if direction is None else direction

        def evaluate(step: float) -> Trial:
            objective.move_to(origin + step * direction)
            evaluation = objective.evaluate()
            return Trial(step, evaluation.loss, dot(evaluation.gradient, direction), evaluation.gradient)

        slope = dot(start.gradient, direction)
        first_step = objective.recipe.peak_learning_rate() * min(1.0, 1.0 / start.gradient.abs().sum().item())
        if self._previous:
            first_step = 2 * (start.loss - self._previous["loss"]) / slope
        best = strong_wolfe(
            evaluate,
            Trial(0.0, start.loss, slope, start.gradient),
            first_step=max(first_step, sys.float_info.min),  # it is 0 where a sum of slopes is infinite
            curvature=self._curvature,
            resolution=objective.resolution,
            max_trials=min(MAX_TRIALS, max(1, budget // 3)),
        )
        if best.loss < start.loss:
            objective.move_to(origin + best.step * direction)
            self._previous = {"loss": start.loss, "gradient": start.gradient, "direction": direction}
        else:
            objective.move_to(origin)
        return Evaluation(best.loss, best.gradient)


@dataclass(frozen=True)
class Trial:
    """The function's values at a step along the line."""

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

    Their two algorithms are one loop here. The step grows while no upper end is known, then the bracket shrinks; both
    by cubic interpolation. A loss that is not finite counts as infinitely high.

    Args:
        evaluate: the function at a step; called at most max_trials times, then the best is taken.
        start: the function at step 0, of negative slope.
        curvature: c2, in (c1, 1): the slope must fall to this share in absolute value; near 0 the search is exact.
        resolution: relative precision of losses. A bracket in which the slope promises less is not searched further.

    Returns:
        The step found, or else the lowest loss of sufficient decrease. If there was none: the start, or, if no trial's
        loss was finite, the last trial.
    """
    assert start.slope < 0 < first_step
    low, high, step = start, None, first_step
    for _ in range(max_trials):
        trial = evaluate(step)
        bound = start.loss + SUFFICIENT_DECREASE * step * start.slope
        is_lower = trial.loss <= bound and trial.loss < low.loss and math.isfinite(trial.slope)
        if not is_lower:  # including a NaN loss
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
    """Return a step beyond two trials that both go downhill: their cubic's minimum, unless that is too near or far."""
    guess = _cubic_minimum(behind, trial)
    least, most = trial.step + 0.01 * (trial.step - behind.step), MAX_GROWTH * trial.step
    return most if guess is None or guess <= trial.step else min(max(guess, least), most)


def _between(low: Trial, high: Trial) -> float:
    """Return a step inside a bracket, whichever of its ends is the lower step."""
    width = high.step - low.step
    if not math.isfinite(high.loss):
        return low.step + RETREAT * width
    guess = _cubic_minimum(low, high)
    share = 0.5 if guess is None else (guess - low.step) / width
    return low.step + width * min(max(share, MARGIN), 1 - MARGIN)


def _cubic_minimum(a: Trial, b: Trial) -> float | None:
    """Return the minimum of the cubic through two losses and slopes (3.59), or None if it has none."""
    mean = a.slope + b.slope - 3 * (a.loss - b.loss) / (a.step - b.step)
    square = mean * mean - a.slope * b.slope
    if not square >= 0:
        return None
    root = math.copysign(math.sqrt(square), b.step - a.step)
    denominator = b.slope - a.slope + 2 * root
    return b.step - (b.step - a.step) * (b.slope + root - mean) / denominator if denominator else None
