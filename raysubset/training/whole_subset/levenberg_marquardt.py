"""Levenberg-Marquardt on a whole subset: exact damped Gauss-Newton steps of small networks under squared error."""

import math
from typing import Any

import torch

from raysubset.training.whole_subset.objective import Evaluation, Objective

FIRST_DAMPING = 0.1  # of the curvature's mean; 1e-3 did as well
FACTOR = 4.0  # the damping is divided by it if a step lowers the loss, and multiplied by it if not
LEAST_DAMPING = 1e-14
MAX_REJECTED = 12  # steps in a row; our choice
MOST_PARAMETERS = 5000  # their matrix of float64 takes 200 MB, and three copies are held


class LevenbergMarquardt:
    """Levenberg (1944), with a damping that falls and rises by one factor (Marquardt 1963).

    A step δ solves (G + λ s I) δ = g, with g the gradient, G the Gauss-Newton matrix and s the mean of its diagonal. It
    is accepted if it lowers the loss. (With Marquardt's diag(G) for s I, as in MINPACK, it ended at 1.1 to 2 times the
    validation loss on arm kinematics.)
    """

    def __init__(self, objective: Objective) -> None:
        """Begin with the first damping λ.

        Raises:
            ValueError: if there are more than MOST_PARAMETERS.
        """
        num = objective.weights().numel()
        if num > MOST_PARAMETERS:
            raise ValueError(
                f"levenberg_marquardt solves with a matrix of {num:,}² numbers, {8e-6 * num**2:,.0f} MB, and takes at "
                f"most {MOST_PARAMETERS:,} parameters: use gauss_newton or lbfgs, or a smaller network"
            )
        self._objective, self._scale, self._damping = objective, objective.recipe.peak_learning_rate(), FIRST_DAMPING
        self._num_residuals = objective.num_residuals()
        self.least_thirds = 2 + 2 * self._num_residuals  # a Jacobian, and a loss

    def step(self, start: Evaluation, budget: int) -> Evaluation:
        """Make one accepted step and return its loss, with the gradient at its start.

        If the budget ends, or twelve steps in a row are rejected, return `start`, or the last loss if it is not finite.
        """
        objective, origin, start_thirds = self._objective, self._objective.weights(), self._objective.thirds
        gradient, matrix = objective.normal_equations(self._num_residuals)
        current = Evaluation(start.loss, gradient.to(origin.dtype))
        if current.largest_slope <= (objective.recipe.gradient_tolerance or 0.0):
            return current
        unit, loss = matrix.diagonal().mean().item(), start.loss
        for attempt in range(MAX_REJECTED):
            if attempt and objective.thirds - start_thirds >= budget:
                break
            damped = matrix.clone()
            damped.diagonal().add_(self._damping * unit)
            factor, has_failed = torch.linalg.cholesky_ex(damped)
            if not has_failed:
                step = torch.cholesky_solve(gradient.unsqueeze(1), factor).squeeze(1)
                objective.move_to(origin - self._scale * step.to(origin.dtype))
                loss = objective.loss()
                if loss < start.loss:
                    self._damping = max(self._damping / FACTOR, LEAST_DAMPING)
                    return Evaluation(loss, current.gradient)
            self._damping *= FACTOR
        objective.move_to(origin)
        return current if math.isfinite(loss) else Evaluation(loss, current.gradient)

    def state_dict(self) -> dict[str, Any]:
        return {"damping": self._damping}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._damping = state["damping"]
