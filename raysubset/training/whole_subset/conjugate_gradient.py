"""Nonlinear conjugate gradients on a whole subset: Polak-Ribière+ with restarts and a strong-Wolfe line search."""

from typing import Any

from torch import Tensor

from raysubset.training.whole_subset.line_search import MAX_TRIALS, Trial, strong_wolfe
from raysubset.training.whole_subset.objective import Evaluation, Objective, dot

CURVATURE = 0.1  # c2 of the line search: the usual value for conjugate gradients (Nocedal & Wright 2006, section 3.1)
POWELL = 0.5  # gradients less orthogonal than that start anew; our choice: Powell's 0.2 was slower on digits
DESCENT = 0.01  # least descent along a direction, of that along the gradient (Gilbert & Nocedal 1992)


class ConjugateGradient:
    """Polak-Ribière+ (Gilbert & Nocedal 1992): d = −g + max(0, gᵀ(g − g₀) / g₀ᵀg₀) d₀, g₀ and d₀ those before.

    It starts anew from −g where β would be negative, where successive gradients are far from orthogonal (Powell 1977),
    where d is not enough of a descent, and where a line search finds nothing lower. A search first tries the step that
    would lower the loss as much as the last one did (Nocedal & Wright 2006, 3.60); the very first tries 1 / |g|₁.
    """

    least_thirds = 1

    def __init__(self, objective: Objective, *, first_scale: float = 1.0, curvature: float = CURVATURE) -> None:
        """Begin without a direction.

        Args:
            objective: what to minimize, from where it stands.
            first_scale: what the very first trial step is multiplied by.
            curvature: c2 of the line search; near 0 it is exact.
        """
        self._objective, self._first_scale, self._curvature = objective, first_scale, curvature
        self._previous: dict[str, Any] = {}  # loss, gradient and direction of the step before

    def step(self, at: Evaluation, budget: int) -> Evaluation:
        """One line search, or two where the first finds nothing lower; `at` itself where neither does."""
        spent = self._objective.thirds
        direction = self._direction(at)
        found = self._search(at, direction, budget)
        if not found.loss < at.loss and direction is not None:
            self._previous = {}
            found = self._search(at, None, budget - (self._objective.thirds - spent))
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"previous": self._previous}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self._objective.device
        self._previous = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in state["previous"].items()}

    def _direction(self, at: Evaluation) -> Tensor | None:
        """The conjugate direction; None where it is to start anew."""
        if not self._previous:
            return None
        before, squared = self._previous["gradient"], dot(at.gradient, at.gradient)
        overlap = dot(at.gradient, before)
        beta = (squared - overlap) / dot(before, before)
        if beta <= 0 or abs(overlap) >= POWELL * squared:
            return None
        direction = beta * self._previous["direction"] - at.gradient
        return direction if dot(direction, at.gradient) <= -DESCENT * squared else None

    def _search(self, at: Evaluation, direction: Tensor | None, budget: int) -> Evaluation:
        objective, origin = self._objective, self._objective.weights()
        direction = -at.gradient if direction is None else direction

        def evaluate(step: float) -> Trial:
            objective.move_to(origin + step * direction)
            there = objective.evaluate()
            return Trial(step, there.loss, dot(there.gradient, direction), there.gradient)

        slope = dot(at.gradient, direction)
        first_step = self._first_scale * min(1.0, 1.0 / at.gradient.abs().sum().item())
        if self._previous:
            first_step = 2 * (at.loss - self._previous["loss"]) / slope
        found = strong_wolfe(
            evaluate,
            Trial(0.0, at.loss, slope, at.gradient),
            first_step=first_step,
            curvature=self._curvature,
            resolution=objective.resolution,
            max_trials=min(MAX_TRIALS, max(1, budget // 3)),
        )
        if found.loss < at.loss:
            objective.move_to(origin + found.step * direction)
            self._previous = {"loss": at.loss, "gradient": at.gradient, "direction": direction}
        else:
            objective.move_to(origin)
        return Evaluation(found.loss, found.gradient)
