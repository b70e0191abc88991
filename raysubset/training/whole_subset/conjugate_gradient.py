"""Nonlinear conjugate gradients on a whole subset: Polak-Ribière+ with restarts and torch's strong-Wolfe search."""

import sys
from typing import Any

import torch
from torch import Tensor
from torch.optim.lbfgs import _strong_wolfe

from raysubset.training.devices import widest_dtype
from raysubset.training.whole_subset.objective import Evaluation, Objective, dot

CURVATURE = 0.1  # c2 of the line search: the usual value for conjugate gradients (Nocedal & Wright 2006, section 3.1)
POWELL = 0.5  # restart if successive gradients overlap by more; our choice: Powell's 0.2 was slower on digits
DESCENT = 0.01  # least descent along a direction, relative to that along the gradient (Gilbert & Nocedal 1992)
MAX_TRIALS = 25  # of one line search; torch's L-BFGS has as many


class ConjugateGradient:
    """Polak-Ribière+ (Gilbert & Nocedal 1992): d = −g + max(0, gᵀ(g − g₀) / g₀ᵀg₀) d₀, with the last step's g₀ and d₀.

    It restarts from −g if β would be negative, if successive gradients are far from orthogonal (Powell 1977), if d
    descends too little, and if a line search finds nothing lower. A search first tries the step that would lower the
    loss as much as the last one did (Nocedal & Wright 2006, 3.60); the very first tries 1 / |g|₁.
    """

    least_thirds = 1

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
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
        """Search a line; move to the lowest point of sufficient decrease, or back to the start if there is none.

        Return what was found there, or the last trial if it was not finite and nothing lower was found.
        """
        objective, origin = self._objective, self._objective.weights()
        direction = -start.gradient if direction is None else direction
        wide = widest_dtype(objective.device)  # of sums: in float32 they round, and may be infinite
        slope, trial = start.gradient.to(wide).dot(direction.to(wide)), start

        def evaluate(origin: Tensor, step: float, wide_direction: Tensor) -> tuple[float, Tensor]:
            nonlocal trial
            objective.move_to(origin + step * direction)
            trial = objective.evaluate()
            if trial.is_finite:
                return trial.loss, trial.gradient.to(wide)
            # The cubic through the start and this height has its minimum at a tenth of the step
            return start.loss - 1.5 * float(step * slope), torch.zeros_like(wide_direction)

        first_step = objective.recipe.peak_learning_rate() * min(1.0, 1.0 / start.gradient.abs().sum().item())
        if self._previous:
            first_step = 2 * (start.loss - self._previous["loss"]) / slope.item()
        shortest = objective.resolution * abs(start.loss) / -slope.item()  # what promises less decrease is rounding
        loss, gradient, step, _ = _strong_wolfe(
            evaluate,
            origin,
            max(first_step, sys.float_info.min),  # it is 0 where a sum of slopes is infinite
            direction.to(wide),
            start.loss,
            start.gradient.to(wide),
            slope,
            c2=CURVATURE,
            tolerance_change=shortest * direction.abs().max().item(),
            max_ls=min(MAX_TRIALS, max(1, budget // 3)) - 1,
        )
        if loss < start.loss:
            objective.move_to(origin + step * direction)
            self._previous = {"loss": start.loss, "gradient": start.gradient, "direction": direction}
            return Evaluation(loss, gradient.to(direction.dtype))
        objective.move_to(origin)
        return start if trial.is_finite else trial
