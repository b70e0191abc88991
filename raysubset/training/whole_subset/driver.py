"""minimize_whole(): the loop around whole-subset steppers: budget, history, best weights, stopping and resuming."""

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from raysubset.config import MinimizeConfig
from raysubset.costs import Cost
from raysubset.data import Examples
from raysubset.models import has_dropout
from raysubset.training.devices import full_precision
from raysubset.training.evaluation import evaluate, evaluation_mode, recompute_batch_norm
from raysubset.training.records import DivergedError, EpochRecord, MinimizeResult, OnStep, Progress
from raysubset.training.whole_subset.conjugate_gradient import ConjugateGradient
from raysubset.training.whole_subset.gauss_newton import GaussNewton
from raysubset.training.whole_subset.lbfgs import LBFGS
from raysubset.training.whole_subset.levenberg_marquardt import LevenbergMarquardt
from raysubset.training.whole_subset.objective import Evaluation, Objective

LEAST_DECREASE = 1e-9  # a step that lowers the loss by relatively less has stalled, if no tolerance is given
LEAST_SLOPE = 1e-150  # of the gradient's largest element, as a smaller one's square is 0 in float64


class Stepper(Protocol):
    """A method that moves from one point to a lower one."""

    least_thirds: int  # thirds of a pass that a step takes; with fewer left no step begins

    def step(self, start: Evaluation, budget: int) -> Evaluation:
        """Move the objective's weights for at most about `budget` thirds of a pass; return the evaluation there.

        If the loss is no lower, or not finite, the weights may be anywhere, and this is the last step.
        """
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


_STEPPERS: dict[str, Callable[[Objective], Stepper]] = {
    "lbfgs": LBFGS,
    "cg": ConjugateGradient,
    "gauss_newton": GaussNewton,
    "levenberg_marquardt": LevenbergMarquardt,
}


def minimize_whole(
    model: nn.Module,
    examples: Examples,
    recipe: MinimizeConfig,
    *,
    validation: Examples | None = None,
    state: dict[str, Any] | None = None,
    on_step: OnStep | None = None,
) -> MinimizeResult:
    """Do as minimize(), but with all examples in every step; Progress counts thirds of passes over them.

    A loss costs a third of a pass, a gradient one, a Gauss-Newton product 4/3. The budget `epochs` bounds them all,
    including those of line searches, linear solvers and validation; the last of them may exceed it a little. A Jacobian
    of M residuals is a forward pass and M backward ones, and begins only if the budget allows all of them. History has
    an entry for each iteration, of lbfgs for every ten; `tolerance` and `patience` apply to these. As for sgd,
    num_steps counts gradients. The learning rate scales the first step that cg tries, the first step of each line
    search of lbfgs, and the full step of gauss_newton and levenberg_marquardt.

    Batch-norm statistics are computed from the subset once and then held fixed. If each chunk had its own statistics,
    the function would differ from the one that is reported. The weights are left in the default memory layout, because
    they become flat vectors. On a card nothing is rounded to TF32, because line searches compare losses. lbfgs holds
    some 50 vectors of the weights' size, cg and gauss_newton some 10.

    Returns:
        The outcome. Among others it may be "gradient" if the gradient's largest element is within gradient_tolerance,
        and "validation" if patience ran out. The weights are those of the least loss, with patience of the least
        validation loss.

    Raises:
        ValueError: if dropout or augmentation is active, because every method here needs the loss as a function of the
            weights; if patience has no validation data; if gauss_newton meets an operation without forward-mode
            derivative; or if levenberg_marquardt meets a loss that is no sum of squares or too many parameters.
        DivergedError: if the loss at the start or its gradient is not finite.
    """
    if has_dropout(model):
        raise ValueError(
            f"{recipe.optimizer} needs a loss without noise, but the network has dropout: use sgd, adam or adamw"
        )
    if examples.is_augmented:
        raise ValueError(f"{recipe.optimizer} needs a loss without noise: set --data.augmentation=none")
    if recipe.patience_or_default() and validation is None:
        raise ValueError("minimize.patience needs validation data, and minimize() was given none: set it to 0")
    model.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    with evaluation_mode(model), full_precision(examples.device):
        for module in model.modules():
            if isinstance(module, nn.RNNBase):  # cuDNN has its backward pass in training mode alone; no dropout
                module.train()
        return _minimize(model, examples, recipe, validation, state, on_step)


def _minimize(
    model: nn.Module,
    examples: Examples,
    recipe: MinimizeConfig,
    validation: Examples | None,
    state: dict[str, Any] | None,
    on_step: OnStep | None,
) -> MinimizeResult:
    start_s = time.perf_counter()
    if state is not None:
        model.load_state_dict(state["model"])
    objective = Objective(model, examples, recipe)
    stepper = _STEPPERS[recipe.optimizer](objective)
    progress = Progress(max(1, round(3 * recipe.epochs)), 3, epoch_ended=True)
    first_gradient = 0  # the number of gradients before this call
    outcome, patience = None, recipe.patience_or_default()

    def validated() -> dict[str, Any]:
        """Return the validation loss at the current weights, with these weights."""
        assert validation is not None
        objective.num_forward += len(validation)
        progress.validation = evaluate(model, validation, recipe)
        return {"loss": progress.validation.compared_loss, "weights": objective.weights(), "since": 0}

    if state is None:
        objective.num_forward += recompute_batch_norm(model, examples, recipe)
        current = objective.evaluate()
        if not current.is_finite:
            raise DivergedError(
                f"the loss at the start is {current.loss:g}, its gradient's largest element "
                f"{current.largest_slope:g}: the start weights are not finite, or too large"
            )
        best = {"loss": current.loss, "weights": objective.weights()}
        best_validated = validated() if patience else {}
    else:
        stepper.load_state_dict(state["optimizer"])
        objective.worked_before = state.get("worked", state["position"][1] * len(examples))
        progress.load_state_dict(state)
        first_gradient = progress.history[-1].num_steps
        current, best, outcome = objective.recall(state["loss"], state["gradient"]), state["best"], state["outcome"]
        best_validated = state.get("validates_best", {})
    progress.step = objective.thirds

    def cost() -> Cost:
        device_s = time.perf_counter() - start_s
        return Cost(objective.num_forward, objective.num_backward, objective.num_gradients, device_s)

    def capture() -> dict[str, Any]:
        return {
            **progress.state_dict(),
            "worked": objective.worked,
            "model": model.state_dict(),
            "optimizer": stepper.state_dict(),
            "loss": current.loss,
            "gradient": current.gradient,
            "best": best,
            "validates_best": best_validated,
            "outcome": outcome,
        }

    smallest = max(recipe.gradient_tolerance or 0.0, LEAST_SLOPE)
    least = recipe.tolerance or (LEAST_DECREASE if recipe.gradient_tolerance is None else 0.0)
    while outcome is None and (progress.step + stepper.least_thirds <= progress.num_steps or not progress.history):
        if current.largest_slope > smallest:
            current = stepper.step(current, progress.num_steps - progress.step)
        decrease = (best["loss"] - current.loss) / max(abs(best["loss"]), 1e-30)
        if decrease >= 0 and current.is_finite:
            best = {"loss": current.loss, "weights": objective.weights()}
            if patience:
                candidate = validated()
                is_better = candidate["loss"] < best_validated["loss"]
                best_validated = candidate if is_better else {**best_validated, "since": best_validated["since"] + 1}
        else:
            objective.move_to(best["weights"])
        progress.step = objective.thirds
        num_gradients = first_gradient + objective.num_gradients
        progress.history.append(EpochRecord(progress.epoch, current.loss, recipe.peak_learning_rate(), num_gradients))
        if not current.is_finite:
            outcome = "diverged"
        elif recipe.target_loss is not None and current.loss <= recipe.target_loss:
            outcome = "target"
        elif decrease >= 0 and current.largest_slope <= smallest:
            outcome = "gradient"
        elif patience and best_validated["since"] >= patience:
            outcome = "validation"
        elif (decrease < least or decrease <= 0) and progress.step < progress.num_steps:
            outcome = "tolerance"
        progress.cost = cost()
        if on_step is not None and (request := on_step(progress.with_capture(capture))) and outcome is None:
            outcome = request if isinstance(request, str) else "stopped"
    model.zero_grad()
    if patience:
        objective.move_to(best_validated["weights"])
    return MinimizeResult(outcome or "epochs", tuple(progress.history), cost(), stepper.state_dict())
