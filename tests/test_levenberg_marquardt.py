"""Levenberg-Marquardt: sums against dense Jacobians, steps against least squares, minima against MINPACK's."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import least_squares
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.utils import parameters_to_vector

import raysubset.training.whole_subset.objective as objective_module
from raysubset.config import MinimizeConfig
from raysubset.data import Examples
from raysubset.tasks import Regression, SquaredError, TensorInputs
from raysubset.training import Metrics, Progress, evaluate, minimize
from raysubset.training.whole_subset import driver
from raysubset.training.whole_subset.levenberg_marquardt import MOST_PARAMETERS, LevenbergMarquardt
from raysubset.training.whole_subset.objective import Objective
from tests.tiny import SQUARED_ERROR, cnn, examples, linear, same_bits, through_a_file, weights

RECIPE = MinimizeConfig(optimizer="levenberg_marquardt", epochs=400, patience=0)


def curves(num: int = 60, *, noise: float = 0.1, seed: int = 0) -> Examples:
    """Three inputs, two outputs that bend with them, and noise."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num, 3, generator=generator)
    targets = torch.stack([inputs[:, 0] * inputs[:, 1], inputs[:, 2].sin()], dim=1)
    task = Regression(TensorInputs((3,)), ("a", "b"), (0.0, 0.0), (1.0, 1.0))
    return Examples({"inputs": inputs, "target": targets + noise * torch.randn(num, 2, generator=generator)}, task)


def dense(*, seed: int = 0, dtype: torch.dtype = torch.float64, act: type[nn.Module] = nn.Tanh) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), act(), nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 2)).to(dtype)


def in_place(*, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    model = dense(seed=seed, dtype=dtype)
    model[1] = nn.ReLU(inplace=True)  # type: ignore[index]
    return model


def frozen(*, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    model = dense(seed=seed, dtype=dtype)
    for parameter in (model[0].weight, model[4].bias):  # type: ignore[index]
        parameter.requires_grad_(False)
    return model


class Twice(nn.Module):
    """A layer that is called twice, and whose weight is used beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3).double(), nn.Linear(3, 2).double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.first(self.first(inputs).tanh()).tanh())


class Beside(Twice):
    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.first(inputs).tanh() @ self.first.weight)


class Scaled(Twice):
    """A parameter that is no dense layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.first(inputs).tanh()) * self.scale


def dense_jacobian(model: nn.Module, data: Examples) -> tuple[Tensor, Tensor]:
    """J [n·M, P] and r [n·M] by torch.func over all examples at once."""
    inputs, targets = data.batch(torch.arange(len(data)), dtype=torch.float64)
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def residuals(values: dict[str, Tensor]) -> Tensor:
        outputs = functional_call(model, values, (inputs,))
        return data.task.residuals(outputs, targets).flatten()

    parts: Any = jacrev(residuals)(parameters)
    return torch.cat([parts[name].flatten(1) for name in parameters], dim=1), residuals(parameters)


@pytest.mark.parametrize("network", [dense, in_place, frozen, Twice, Beside, Scaled])
def test_the_normal_equations_are_those_of_the_dense_jacobian(network, monkeypatch):
    monkeypatch.setattr(objective_module, "JACOBIAN_ELEMENTS", 1000)  # parts of some examples
    data, model = curves(50), network()
    objective = Objective(model, data, RECIPE)
    gradient, matrix = objective.normal_equations(2)
    jacobian, residuals = dense_jacobian(model, data)
    torch.testing.assert_close(matrix, jacobian.T @ jacobian * (2 / 50), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, jacobian.T @ residuals * (2 / 50), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, objective.evaluate().gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_of_images_classes_too(norm):
    data, model = examples(20, objective=SQUARED_ERROR), cnn(norm).double().eval()
    objective = Objective(model, data, RECIPE)
    gradient, matrix = objective.normal_equations(objective.num_residuals())
    jacobian, residuals = dense_jacobian(model, data)
    torch.testing.assert_close(matrix, jacobian.T @ jacobian / 10, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, jacobian.T @ residuals / 10, rtol=1e-9, atol=1e-12)


def damped(objective: Objective, damping: float) -> LevenbergMarquardt:
    stepper = LevenbergMarquardt(objective)
    stepper.load_state_dict({"damping": damping})
    return stepper


def test_an_undamped_step_on_a_linear_model_is_least_squares():
    data, model = examples(60, side=4, objective=SQUARED_ERROR), linear(16, dtype=torch.float64)
    objective = Objective(model, data, RECIPE)
    start = objective.evaluate()
    damped(objective, 1e-13).step(start, 100)
    images = data.batch(torch.arange(60), dtype=torch.float64)[0].flatten(1)
    design = torch.cat([images, torch.ones(60, 1, dtype=torch.float64)], dim=1)
    expected = torch.linalg.lstsq(design, torch.eye(3, dtype=torch.float64)[data.targets()]).solution
    torch.testing.assert_close(model[1].weight.detach().T, expected[:-1], rtol=0, atol=1e-6)  # type: ignore[index]
    torch.testing.assert_close(model[1].bias.detach(), expected[-1], rtol=0, atol=1e-6)  # type: ignore[index]


def test_its_minimum_is_minpacks():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 1), nn.Tanh(), nn.Linear(1, 2)).double()
    data = curves(40)
    inputs, targets = (values.double() for values in data.batch(torch.arange(40)))

    def residuals(values: np.ndarray) -> np.ndarray:
        weight, bias, other, last = np.split(values, [3, 4, 6])
        outputs = np.tanh(inputs.numpy() @ weight + bias)[:, None] * other + last
        return (outputs - targets.numpy()).ravel() / np.sqrt(2 * 40)

    start = parameters_to_vector(model.parameters()).detach().numpy()
    expected = least_squares(residuals, start, method="lm", xtol=1e-14, ftol=1e-14, gtol=1e-14)
    result = minimize(model, data, replace(RECIPE, gradient_tolerance=1e-8), seed=0)
    assert result.outcome == "gradient"
    assert result.history[-1].loss == pytest.approx(2 * expected.cost, rel=1e-9)
    found = parameters_to_vector(model.parameters()).detach()
    torch.testing.assert_close(found, torch.from_numpy(expected.x), rtol=0, atol=1e-4)


class Arctangent(nn.Module):
    """One parameter, at 2: the undamped step, 5 arctan 2 long, leads to where the loss is higher."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.place.arctan().expand(len(inputs), 2)


def test_the_damping_rises_by_four_until_the_loss_falls_and_then_falls_by_four():
    data = curves(16)
    data = replace(data, rows={**data.rows, "target": torch.zeros(16, 2)})
    objective = Objective(model := Arctangent(), data, RECIPE)
    stepper = damped(objective, 0.01)
    start = objective.evaluate()
    after = stepper.step(start, 100)  # tries 0.01, 0.04, 0.16, 0.64, the first above 5 / 4 arctan 2 − 1
    assert after.loss < start.loss
    assert model.place.item() == pytest.approx(2 - 5 * np.arctan(2) / 1.64)
    assert stepper.state_dict() == {"damping": pytest.approx(0.16)}
    assert objective.num_forward == 16 * (1 + 1 + 4)


def test_a_jacobian_counts_a_forward_pass_and_one_backward_for_each_residual():
    data = curves()
    result = minimize(dense(), data, replace(RECIPE, epochs=11), seed=0)
    num_jacobians = result.cost.num_steps - 1  # and the gradient at the start
    assert result.cost.num_backward == 60 * (2 * num_jacobians + 1)
    assert result.cost.num_forward >= 60 * (2 * num_jacobians + 1)  # each with a loss
    assert result.history[-1].epoch == pytest.approx(result.cost.passes(60))
    assert result.history[-1].epoch <= 11  # 5/3 and a loss are left for no step
    assert (result.outcome, result.history[-1].num_steps) == ("epochs", result.cost.num_steps)


@pytest.mark.parametrize("optimizer", ["levenberg_marquardt", "lbfgs"])
def test_patience_ends_it_after_the_least_validation_loss_with_those_weights(optimizer):
    """Ten noisy examples, which are fitted in the end."""
    data, validation, model = curves(10, noise=0.5), curves(31, noise=0.5, seed=1), dense()
    recipe = replace(RECIPE, optimizer=optimizer, patience=2)
    losses, seen = [evaluate(model, validation, recipe).loss], [weights(model)]

    def look(progress: Progress) -> None:
        losses.append(evaluate(model, validation, recipe).loss)
        seen.append(weights(model))

    result = minimize(model, data, recipe, seed=0, validation=validation, on_step=look)
    best = int(np.argmin(losses))
    assert (result.outcome, best) == ("validation", len(losses) - 3)
    assert same_bits(weights(model), seen[best])


def test_a_validation_loss_of_nan_at_the_start_is_worse_than_any(monkeypatch):
    losses = iter([math.nan, 3.0, 2.0, 4.0, 4.0])
    monkeypatch.setattr(driver, "evaluate", lambda *_: Metrics(next(losses), 1, {}, {}))
    model, seen = dense(), []
    recipe, validation = replace(RECIPE, patience=2), curves(31, seed=1)
    result = minimize(
        model, curves(15), recipe, seed=0, validation=validation, on_step=lambda _: seen.append(weights(model))
    )
    assert result.outcome == "validation"
    assert same_bits(weights(model), seen[1])


def test_looks_at_validation_data_are_counted_and_paid_for_out_of_the_budget():
    data, validation = curves(15), curves(40, seed=1)
    watched, plain = (
        minimize(
            dense(),
            data,
            replace(RECIPE, patience=patience, epochs=60),
            seed=0,
            validation=validation,
            on_step=lambda progress: len(progress.history) == 3,
        )
        for patience in (9, 0)
    )
    assert [r.loss for r in watched.history] == [r.loss for r in plain.history]
    assert watched.cost.num_forward == plain.cost.num_forward + 4 * 40  # at the start, and after each step
    assert watched.cost.num_backward == plain.cost.num_backward
    assert watched.history[-1].epoch == pytest.approx(watched.cost.passes(15), abs=1 / 3)


def test_without_validation_data_there_is_nothing_to_be_patient_about():
    with pytest.raises(ValueError, match=r"minimize\.patience needs validation data, and .* set it to 0"):
        minimize(dense(), curves(), replace(RECIPE, patience=None), seed=0)


def test_stopped_anywhere_and_resumed_it_ends_at_the_same_bits_and_looks():
    data, validation, unbroken, states = curves(15), curves(31, seed=1), dense(), []
    recipe = replace(RECIPE, patience=2, epochs=27)

    def keep(progress: Progress) -> None:
        states.append(through_a_file(progress.capture()))

    whole = minimize(unbroken, data, recipe, seed=0, validation=validation, on_step=keep)
    for state in states:
        model = dense(seed=9)
        again = minimize(model, data, recipe, seed=0, validation=validation, state=state)
        assert same_bits(weights(model), weights(unbroken))
        assert (again.history, again.outcome) == (whole.history, whole.outcome)


class Tokens(nn.Module):
    """What vmap cannot follow: the way depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.layer(inputs)
        return outputs if outputs.sum() > 0 else -outputs


def test_what_it_cannot_do_is_refused_with_a_way_out():
    with pytest.raises(ValueError, match=r"cross-entropy is no sum of squares: set --task\.loss squared_error, or"):
        minimize(cnn("none"), examples(), RECIPE, seed=0)
    with pytest.raises(ValueError, match="cannot take single examples' gradients of this network: use lbfgs or cg"):
        minimize(Tokens(), curves(), RECIPE, seed=0)
    wide = nn.Sequential(nn.Linear(3, 1000), nn.Tanh(), nn.Linear(1000, 2))
    with pytest.raises(
        ValueError, match=r"matrix of 6,002² numbers, 288 MB, and takes at most 5,000 .*: use gauss_newton or lbfgs"
    ):
        minimize(wide, curves(), RECIPE, seed=0)
    assert MOST_PARAMETERS == 5000
    with pytest.raises(ValueError, match="levenberg_marquardt takes that share of its full step, at most 1"):
        replace(RECIPE, learning_rate=2.0)


def test_residuals_squares_are_the_loss():
    outputs, targets = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    loss = SquaredError(is_one_hot=True)
    torch.testing.assert_close(loss.residuals(outputs, targets).square().sum(), loss.summed(outputs, targets))
    numbers = torch.randn(5, 3)
    torch.testing.assert_close(
        SquaredError().residuals(outputs, numbers).square().sum(), SquaredError().summed(outputs, numbers)
    )
