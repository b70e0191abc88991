"""torch's L-BFGS with its strong-Wolfe line search, as steps of the driver."""

import math
from typing import Any

import torch

from raysubset.training.optimizers import load_optimizer_state
from raysubset.training.whole_subset.objective import Evaluation, Objective

ITERATIONS_PER_STEP = 10  # between two checks of the budget, calls of on_step and checkpoints


class _NotFinite(Exception):
    """A loss was not finite. Caught in this module."""


class LBFGS:
    """Limited-memory BFGS (Liu & Nocedal 1989): torch.optim.LBFGS with twenty pairs of changes."""

    least_thirds = 1

    def __init__(self, objective: Objective) -> None:
        recipe = objective.recipe
        least, change = 1e-7, 1e-9  # torch's defaults
        if recipe.gradient_tolerance is not None:  # with torch's `change`, a small step would end it too early
            least, change = recipe.gradient_tolerance, 0.0
        self._objective = objective
        self._optimizer = torch.optim.LBFGS(
            [p for p in objective.model.parameters() if p.requires_grad],
            lr=recipe.peak_learning_rate(),
            history_size=20,
            line_search_fn="strong_wolfe",
            tolerance_grad=least,
            tolerance_change=change,
        )

    def step(self, start: Evaluation, budget: int) -> Evaluation:
        """Make ten iterations, or fewer if the budget ends. The loss is NaN if one on the way was not finite."""
        group = self._optimizer.param_groups[0]
        # The first evaluation is at `start`, where the objective repeats it without cost; torch counts it all the same
        group["max_iter"], group["max_eval"] = ITERATIONS_PER_STEP, max(2, budget // 3 + 1)

        def closure() -> float:
            loss = self._objective.evaluate().loss
            if not math.isfinite(loss):
                raise _NotFinite  # the line search would only go further
            return loss

        try:
            self._optimizer.step(closure)
        except _NotFinite:
            return Evaluation(math.nan, start.gradient)
        return self._objective.evaluate()  # torch does not return the loss at the accepted point

    def state_dict(self) -> dict[str, Any]:
        return self._optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_optimizer_state(self._optimizer, state)
