"""Hessian-free Gauss-Newton on a whole subset: conjugate gradients on damped products, Levenberg-Marquardt damping."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from raysubset.training.whole_subset.objective import Evaluation, Objective, dot

RELATIVE_PROGRESS = 5e-4  # of a linear system; an iteration that makes less ends it (Martens 2010)
SHORTEST_WINDOW = 5  # iterations over which progress is measured; Martens has 10, for longer runs
MAX_PRODUCTS = 10  # of one linear system: 4 to 10 did best in 160 passes over digits; Martens has 250, for longer runs
FIRST_DAMPING = 1e-2  # of the curvature along the first gradient; our choice
SUFFICIENT_DECREASE = 1e-2  # of the descent that the slope predicts (Martens 2010)
MAX_HALVINGS = 5  # of a step, before the damping grows instead; our choice
MAX_REJECTED = 10  # steps in a row; our choice

PRODUCT_THIRDS = 4  # of a pass


class GaussNewton:
    """Truncated Gauss-Newton (Martens 2010) with Nielsen's damping (1999; Madsen, Nielsen & Tingleff 2004, 3.2).

    A step s minimizes gᵀs + ½ sᵀ(G + λI)s by conjugate gradients from 0, without a preconditioner, until they make
    little progress. (Martens starts from the step before; with systems this short that stalled.) It is accepted if it
    lowers the loss enough, else halved, else computed again with more damping. λ follows ρ, the loss's change divided
    by that of the undamped model at the full step. It is multiplied by max(1/3, 1 − (2ρ − 1)³) if ρ > 0, else by 2, 4,
    8, … It starts at 1/100 of the curvature along the gradient.
    """

    least_thirds = 1

    def __init__(self, objective: Objective) -> None:
        self._objective, self._scale = objective, objective.recipe.peak_learning_rate()
        self._damping: float | None = None  # λ, which the first product decides
        self._growth = 2.0

    def step(self, start: Evaluation, budget: int) -> Evaluation:
        """Make one accepted step. If ten are rejected, or the budget ends, return `start`, or a non-finite loss."""
        objective, origin, start_thirds = self._objective, self._objective.weights(), self._objective.thirds
        last_loss = start.loss
        for attempt in range(MAX_REJECTED):
            thirds_left = budget - (objective.thirds - start_thirds)
            max_products = (thirds_left - PRODUCT_THIRDS) // PRODUCT_THIRDS  # a loss and a gradient cost as much
            if attempt and max_products < 1:
                break
            step, slope, curvature = self._solve(start.gradient, max(1, min(MAX_PRODUCTS, max_products)))
            predicted = self._scale * slope + self._scale**2 * curvature / 2
            if not predicted < -objective.resolution * abs(start.loss):
                break  # the remaining gain is rounding error
            is_accepted, first_loss, last_loss = self._search(start.loss, origin, step, slope)
            self._adapt((first_loss - start.loss) / predicted)
            if is_accepted:
                return objective.evaluate()
            objective.move_to(origin)
        return start if math.isfinite(last_loss) else Evaluation(last_loss, start.gradient)

    def state_dict(self) -> dict[str, Any]:
        return {"damping": self._damping, "growth": self._growth}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._damping, self._growth = state["damping"], state["growth"]

    def _solve(self, gradient: Tensor, max_products: int) -> tuple[Tensor, float, float]:
        """Return a step s [P], gᵀs and sᵀGs."""

        def damped(vector: Tensor) -> Tensor:
            product = self._objective.gauss_newton_product(vector)
            if self._damping is None:
                self._damping = FIRST_DAMPING * dot(vector, product) / dot(vector, vector)
            return product + self._damping * vector

        step, residual = conjugate_gradients(
            damped, -gradient, max_products=max_products, relative_progress=RELATIVE_PROGRESS
        )
        slope = dot(gradient, step)
        assert self._damping is not None
        return step, slope, -slope - dot(residual, step) - self._damping * dot(step, step)

    def _search(self, loss: float, origin: Tensor, step: Tensor, slope: float) -> tuple[bool, float, float]:
        """Halve the step until it lowers the loss enough: return whether it did, and the first and last loss tried."""
        losses = []
        for halvings in range(MAX_HALVINGS + 1):
            scale = self._scale / 2**halvings
            self._objective.move_to(origin + scale * step)
            losses.append(self._objective.loss())
            if losses[-1] <= loss + SUFFICIENT_DECREASE * scale * slope:
                return True, losses[0], losses[-1]
        return False, losses[0], losses[-1]

    def _adapt(self, ratio: float) -> None:
        assert self._damping is not None
        if ratio > 0:
            self._damping *= max(1 / 3, 1 - (2 * ratio - 1) ** 3)
            self._growth = 2.0
        else:  # including a loss that was not finite
            self._damping *= self._growth
            self._growth *= 2


def conjugate_gradients(
    multiply: Callable[[Tensor], Tensor], target: Tensor, *, max_products: int, relative_progress: float
) -> tuple[Tensor, Tensor]:
    """Solve A s = b approximately, from 0, for a symmetric positive semi-definite A (Hestenes & Stiefel 1952).

    Iteration i ends it if over the last k = max(5, i/10) iterations the value q(s) = ½ sᵀAs − bᵀs fell by less than k
    times `relative_progress` of itself (Martens 2010, section 4.4). It also ends if the residual is rounding error, or
    if there is no curvature along the direction.

    Returns:
        s and the residual b − A s, both [P].
    """
    solution, residual, direction = torch.zeros_like(target), target.clone(), target.clone()
    square = first_square = dot(target, target)
    values = [0.0]
    for number in range(1, max_products + 1):
        product = multiply(direction)
        curvature = dot(direction, product)
        if not curvature > 0:
            break
        rate = square / curvature
        solution += rate * direction
        residual -= rate * product
        last_square, square = square, dot(residual, residual)
        values.append(-(dot(solution, target) + dot(solution, residual)) / 2)
        window = max(SHORTEST_WINDOW, number // 10)
        if number > window and values[-1] - values[-1 - window] > window * relative_progress * values[-1]:
            break
        if square <= torch.finfo(target.dtype).eps ** 2 * first_square:
            break
        direction = residual + (square / last_square) * direction
    return solution, residual
