"""Gauss-Newton: products against dense matrices, steps against least squares, damping by its rule."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

from raysubset.config import MinimizeConfig
from raysubset.tasks import CrossEntropy
from raysubset.training import minimize
from raysubset.training.whole_subset import gauss_newton
from raysubset.training.whole_subset.gauss_newton import GaussNewton, conjugate_gradients
from raysubset.training.whole_subset.objective import Objective
from tests.tiny import SQUARED_ERROR, cnn, examples, linear, with_labels

RECIPE = MinimizeConfig(optimizer="gauss_newton", epochs=200)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def dense(model: nn.Module, images: Tensor, labels: Tensor, loss) -> Tensor:
    """JᵀHJ [P, P] by torch's reverse mode alone, an example at a time."""
    named = {name: p.detach() for name, p in model.named_parameters()}
    total = torch.zeros(len(flat(model)), len(flat(model)), dtype=torch.float64)
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        rows = jacrev(lambda w, image=image: functional_call(model, w, (image,))[0])(named)
        jacobian = torch.cat([row.flatten(1) for row in rows.values()], dim=1)
        outputs = model(image).detach()
        curvature = hessian(lambda o, label=label: loss(o, label))(outputs)[0, :, 0]
        total += jacobian.T @ curvature @ jacobian
    return total / len(images)


LOSSES = {
    "cross_entropy": (CrossEntropy(), lambda o, y: nn.functional.cross_entropy(o, y)),
    "smoothed": (
        CrossEntropy(label_smoothing=0.2),
        lambda o, y: nn.functional.cross_entropy(o, y, label_smoothing=0.2),
    ),
    "squared_error": (SQUARED_ERROR, lambda o, y: (o - nn.functional.one_hot(y, 3)).square().mean()),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("norm", ["none", "batch", "group"])
def test_products_are_those_of_the_dense_matrix_and_never_negative(loss, norm):
    minimized, of_outputs = LOSSES[loss]
    data, model = examples(20, objective=minimized), cnn(norm).double().eval()
    model.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]  # as minimize() does
    recipe = replace(RECIPE, batch_size=1, channels_last=norm != "group")  # torch 2.10 cannot do both
    objective = Objective(model, data, recipe)  # chunks of 16 and 4
    matrix = dense(model, *data.batch(torch.arange(20), dtype=torch.float64), of_outputs)
    for seed in range(3):
        vector = torch.randn(len(matrix), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        product = objective.gauss_newton_product(vector)
        torch.testing.assert_close(product, matrix @ vector, rtol=1e-9, atol=1e-12)
        assert vector @ product >= 0
    assert (objective.num_forward, objective.num_backward, objective.thirds) == (3 * 2 * 20, 3 * 20, 3 * 4)


def test_a_derivative_that_takes_the_default_layout_alone_is_refused_with_the_way_out(monkeypatch):
    def jvp_of_group_norm(*_: object) -> None:  # torch 2.10's
        raise RuntimeError("view size is not compatible with input tensor's size and stride (at least one …)")

    monkeypatch.setattr("raysubset.training.whole_subset.objective.jvp", jvp_of_group_norm)
    model, data = cnn("group").eval(), examples(20)
    vector = torch.ones(len(flat(model)))
    with pytest.raises(ValueError, match=r"gauss_newton cannot .*: set --minimize.channels-last=false \(view size is"):
        Objective(model, data, RECIPE).gauss_newton_product(vector)
    with pytest.raises(RuntimeError, match=r"^view size"):  # where that is no way out
        Objective(model, data, replace(RECIPE, channels_last=False)).gauss_newton_product(vector)


class Attention(nn.Module):
    """Attention of an image's rows to those above them, by torch's own function."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head = nn.Linear(8, 3 * 2), linear(16)

    def forward(self, images: Tensor) -> Tensor:
        query, key, value = self.heads(images[:, 0]).unsqueeze(1).chunk(3, -1)
        return self.head(nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).flatten(1))


def test_products_go_through_attention():
    torch.manual_seed(0)
    data, model = examples(8), Attention().double().eval()
    _, of_outputs = LOSSES["cross_entropy"]
    matrix = dense(model, *data.batch(torch.arange(8), dtype=torch.float64), of_outputs)
    vector = torch.ones(len(matrix), dtype=torch.float64)
    product = Objective(model, data, RECIPE).gauss_newton_product(vector)
    torch.testing.assert_close(product, matrix @ vector, rtol=1e-9, atol=1e-12)


def test_frozen_parameters_have_no_part_in_it():
    data, model = examples(20), cnn("none").double().eval()
    whole = Objective(model, data, RECIPE).gauss_newton_product(torch.ones(len(flat(model)), dtype=torch.float64))
    head = [p.numel() for p in model.parameters()][-2:]
    for parameter in list(model.parameters())[:-2]:
        parameter.requires_grad_(False)
    frozen = Objective(model, data, RECIPE)
    assert len(frozen.weights()) == sum(head)
    alone = torch.cat([torch.zeros(len(whole) - sum(head)), torch.ones(sum(head))]).double()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    part = Objective(model, data, RECIPE).gauss_newton_product(alone)[-sum(head) :]
    torch.testing.assert_close(frozen.gauss_newton_product(torch.ones(sum(head), dtype=torch.float64)), part)


def damped(objective: Objective, damping: float) -> GaussNewton:
    stepper = GaussNewton(objective)
    stepper.load_state_dict({"damping": damping, "growth": 2.0})
    return stepper


@pytest.fixture
def exact_solves(monkeypatch):
    monkeypatch.setattr(gauss_newton, "MAX_PRODUCTS", 500)
    monkeypatch.setattr(gauss_newton, "RELATIVE_PROGRESS", 0.0)


def test_one_undamped_step_on_a_linear_model_is_least_squares(exact_solves):
    data, model = examples(60, side=4, objective=SQUARED_ERROR), linear(16, dtype=torch.float64)
    images, labels = data.batch(torch.arange(60), dtype=torch.float64)
    inputs = np.hstack([images.flatten(1).numpy(), np.ones((60, 1))])
    expected = np.linalg.lstsq(inputs, np.eye(3)[labels], rcond=None)[0]
    objective = Objective(model.eval(), data, RECIPE)
    damped(objective, 0.0).step(objective.evaluate(), 10**6)
    np.testing.assert_allclose(model[1].weight.detach().numpy().T, expected[:-1], atol=1e-6)  # type: ignore[index]
    np.testing.assert_allclose(model[1].bias.detach().numpy(), expected[-1], atol=1e-6)  # type: ignore[index]
    assert objective.num_gradients == 2


def test_damping_shortens_the_step_as_the_dense_system_says(exact_solves):
    data, model = examples(20), cnn("none").double().eval()
    objective = Objective(model, data, RECIPE)
    at, origin = objective.evaluate(), flat(model)
    matrix = dense(model, *data.batch(torch.arange(20), dtype=torch.float64), LOSSES["cross_entropy"][1])
    damped(objective, 10.0).step(at, 10**6)
    identity = torch.eye(len(matrix), dtype=torch.float64)
    torch.testing.assert_close(flat(model) - origin, -torch.linalg.solve(matrix + 10 * identity, at.gradient))


class Arctangent(nn.Module):
    """Outputs whose squared error against a class of 0 is arctan² / 2; a full step from 3 ends at -9.5."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([1 + self.place.atan(), torch.zeros(1)]).expand(len(images), 2)


def test_a_step_that_leads_up_is_halved_and_the_damping_doubled():
    data = with_labels(examples(4, objective=SQUARED_ERROR), torch.zeros(4, dtype=torch.long))
    objective = Objective(model := Arctangent(), data, RECIPE)
    stepper, at = damped(objective, 1e-9), objective.evaluate()
    below = stepper.step(at, 10**6)
    assert model.place.item() == pytest.approx(
        3 - 10 * math.atan(3) / 4, rel=1e-5
    )  # the quarter step is the first lower
    assert stepper.state_dict() == {"damping": pytest.approx(2e-9), "growth": 4.0}
    assert below.loss == pytest.approx(model.place.atan().item() ** 2 / 2)
    assert objective.thirds == 3 + 4 + 3 * 1 + 3  # gradient, product, three losses, gradient


def test_where_the_model_is_right_the_damping_falls_to_a_third():
    data, model = examples(60, side=4, objective=SQUARED_ERROR), linear(16, dtype=torch.float64)
    objective = Objective(model.eval(), data, RECIPE)
    stepper = damped(objective, 0.3)
    stepper.step(objective.evaluate(), 10**6)  # a quadratic: ρ = 1
    assert stepper.state_dict() == {"damping": pytest.approx(0.1), "growth": 2.0}


def test_the_linear_solver_is_exact_after_as_many_products_as_unknowns_and_stops_where_progress_ends():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    matrix, target = root @ root.T + torch.eye(8), torch.randn(8, generator=generator, dtype=torch.float64)
    solution, residual = conjugate_gradients(lambda v: matrix @ v, target, max_products=12, relative_progress=0.0)
    torch.testing.assert_close(solution, torch.linalg.solve(matrix, target), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(residual, target - matrix @ solution, rtol=0, atol=1e-10)
    calls: list[Tensor] = []
    spectrum = torch.logspace(0, 4, 400, dtype=torch.float64)
    ones = torch.ones(400, dtype=torch.float64)
    conjugate_gradients(lambda v: calls.append(v) or spectrum * v, ones, max_products=400, relative_progress=1e-2)
    assert 6 <= len(calls) < 200


def test_no_curvature_is_no_step():
    solution, residual = conjugate_gradients(torch.zeros_like, torch.ones(3), max_products=5, relative_progress=0.0)
    assert torch.equal(solution, torch.zeros(3))
    assert torch.equal(residual, torch.ones(3))


class _Rounded(torch.autograd.Function):
    """The identity, with a reverse-mode derivative only."""

    @staticmethod
    def forward(outputs: Tensor) -> Tensor:
        return outputs.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


class Rounded(nn.Module):
    def forward(self, outputs: Tensor) -> Tensor:
        return _Rounded.apply(outputs)  # type: ignore[return-value]


def test_a_network_without_forward_mode_derivatives_is_refused_with_a_way_out():
    model = nn.Sequential(linear(64), Rounded())
    with pytest.raises(ValueError, match="gauss_newton cannot differentiate this network: use lbfgs or cg"):
        minimize(model, examples(), RECIPE, seed=0)
    assert minimize(model, examples(), replace(RECIPE, optimizer="cg", epochs=5), seed=0).outcome == "epochs"
