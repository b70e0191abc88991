"""Nonlinear conjugate gradients: linear ones on quadratics, scipy's minimum, and restarts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from raysubset.config import MinimizeConfig
from raysubset.data import Examples
from raysubset.training import minimize
from raysubset.training.whole_subset import conjugate_gradient
from raysubset.training.whole_subset.conjugate_gradient import ConjugateGradient
from raysubset.training.whole_subset.objective import Objective
from tests.tiny import SQUARED_ERROR, examples, linear, with_labels

RECIPE = MinimizeConfig(optimizer="cg", epochs=500)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def quadratic(model: nn.Module, data: Examples) -> tuple[Tensor, Tensor]:
    """Hessian [P, P] and gradient [P], at these weights, of the mean squared error of a linear model."""
    images, labels = data.batch(torch.arange(len(data)), dtype=torch.float64)
    targets, named = torch.eye(3, dtype=torch.float64)[labels], dict(model.named_parameters())

    def loss(weights: Tensor) -> Tensor:
        parts = weights.split([p.numel() for p in named.values()])
        values = {name: part.view_as(p) for (name, p), part in zip(named.items(), parts, strict=True)}
        return (torch.func.functional_call(model, values, (images,)) - targets).square().mean()

    return torch.func.hessian(loss)(flat(model)), torch.func.grad(loss)(flat(model))


@pytest.fixture
def exact_searches(monkeypatch):
    monkeypatch.setattr(conjugate_gradient, "CURVATURE", 1e-10)


def test_with_exact_searches_it_is_linear_conjugate_gradients_step_for_step(exact_searches):
    data, model = examples(60, side=3, objective=SQUARED_ERROR), linear(9, dtype=torch.float64)
    hessian, gradient = quadratic(model, data)
    weights, residual, direction = flat(model), -gradient, -gradient
    objective = Objective(model.eval(), data, RECIPE)
    stepper, at = ConjugateGradient(objective), objective.evaluate()
    for _ in range(12):
        at = stepper.step(at, 10**6)
        rate = residual @ residual / (direction @ hessian @ direction)
        weights = weights + rate * direction
        after = residual - rate * (hessian @ direction)
        direction, residual = after + (after @ after) / (residual @ residual) * direction, after
        torch.testing.assert_close(flat(model), weights, rtol=0, atol=1e-7)


def test_a_quadratic_of_d_parameters_takes_about_d_steps(exact_searches):
    """30 parameters, whose Hessian has ten values three times each: the same minimum in some ten steps."""
    data, model = examples(60, side=3, objective=SQUARED_ERROR), linear(9, dtype=torch.float64)
    hessian, gradient = quadratic(model, data)
    closed_form = flat(model) - torch.linalg.solve(hessian, gradient)
    objective = Objective(model.eval(), data, RECIPE)
    stepper, at = ConjugateGradient(objective), objective.evaluate()
    for _ in range(10 + 3):
        at = stepper.step(at, 10**6)
    torch.testing.assert_close(flat(model), closed_form, rtol=0, atol=1e-6)


def test_scipys_conjugate_gradients_end_at_the_same_minimum():
    """Logistic regression; its minimum is finite, as each image stands there with two labels."""
    from scipy import optimize

    data, model = examples(20, side=3), linear(9, dtype=torch.float64)
    labels = torch.cat([data.targets(), data.targets(), (data.targets() + 1) % 3])
    data = with_labels(data.select(torch.arange(20).repeat(3)), labels)
    images = data.batch(torch.arange(60), dtype=torch.float64)[0]

    def loss_and_gradient(weights: np.ndarray) -> tuple[float, np.ndarray]:
        their = linear(9, dtype=torch.float64)
        nn.utils.vector_to_parameters(torch.from_numpy(weights), their.parameters())
        loss = nn.functional.cross_entropy(their(images), labels)
        return loss.item(), torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss, list(their.parameters()))]
        ).numpy()

    theirs = optimize.minimize(loss_and_gradient, flat(model).numpy(), jac=True, method="CG", options={"gtol": 1e-7})
    recipe = replace(RECIPE, gradient_tolerance=1e-7)
    result = minimize(model, data, recipe, seed=0)
    assert result.outcome == "gradient"
    assert result.history[-1].loss == pytest.approx(theirs.fun, rel=1e-9)


class Rosenbrock(nn.Module):
    """Outputs whose squared error against a class of 0 is Rosenbrock's function over 2: a bent valley."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))

    def forward(self, images: Tensor) -> Tensor:
        x, y = self.place
        return torch.stack([2 - x, 10 * (y - x * x)]).expand(len(images), 2)


def test_a_bent_valley_is_followed_to_its_end():
    data = with_labels(examples(4, objective=SQUARED_ERROR), torch.zeros(4, dtype=torch.long))
    model = Rosenbrock()
    result = minimize(model, data, replace(RECIPE, gradient_tolerance=1e-8), seed=0)
    assert result.outcome == "gradient"
    torch.testing.assert_close(model.place.detach(), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-6)
    assert result.cost.num_steps < 300


def test_a_direction_uphill_is_left_for_the_gradients():
    data, model = examples(60, side=3, objective=SQUARED_ERROR), linear(9, dtype=torch.float64)
    objective = Objective(model.eval(), data, RECIPE)
    stepper, at = ConjugateGradient(objective), objective.evaluate()
    second = stepper.step(at, 10**6)
    uphill = {"loss": at.loss, "gradient": at.gradient, "direction": 1e3 * second.gradient}
    stepper.load_state_dict({"previous": uphill})
    stepper.step(second, 10**6)
    torch.testing.assert_close(stepper.state_dict()["previous"]["direction"], -second.gradient)


class Cliff(nn.Module):
    """One parameter x with the loss (x - 3)² / 2 from `low` to `high`, and no number beyond; it begins at 0."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high
        self.place = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, images: Tensor) -> Tensor:
        is_known = (self.low <= self.place) & (self.place <= self.high)
        first = torch.where(is_known, self.place - 2, torch.nan)  # the target of class 0 is 1
        return torch.cat([first, 0 * first]).expand(len(images), 2)


def test_a_search_comes_back_from_where_the_loss_is_no_number():
    data = with_labels(examples(4, objective=SQUARED_ERROR), torch.zeros(4, dtype=torch.long))
    model = Cliff(-1.0, 4.0)
    result = minimize(model, data, replace(RECIPE, learning_rate=1e6, gradient_tolerance=1e-8), seed=0)
    assert result.outcome == "gradient"
    assert model.place.item() == pytest.approx(3)
    model = Cliff(-1e-30, 1e-30)  # nothing is found, and the start is kept
    result = minimize(model, data, replace(RECIPE, learning_rate=1e6, epochs=60), seed=0)
    assert (result.outcome, model.place.item()) == ("diverged", 0.0)
