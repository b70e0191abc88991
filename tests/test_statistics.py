"""Fisher and Gram matrices against autograd, one example at a time, and against closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import raysubset.training.statistics as statistics_module
from raysubset.config import MinimizeConfig
from raysubset.data import Examples
from raysubset.tasks import EXACT_OUTPUTS, SAMPLED_TERMS, CrossEntropy, SquaredError
from raysubset.tasks import losses as losses_module
from raysubset.training import diagonal_fisher, fisher_cost, gram_matrices
from tests.tiny import SQUARED_ERROR, cnn, examples, image_examples, linear, noisy_network, same_bits, weights

RECIPE, CROSS_ENTROPY = MinimizeConfig(), CrossEntropy()


def network(seed: int = 0) -> nn.Module:
    """Two linear layers with batch-norm between, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)
        return nn.Sequential(*layers).double()


def by_example(model: nn.Module, data: Examples, loss) -> dict[str, Tensor]:
    """Mean over examples of the sum of squared gradients of the losses that `loss` yields of an example's outputs."""
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    model.eval()
    dtype = next(model.parameters()).dtype
    for index in range(len(data)):
        images, labels = data.batch(torch.tensor([index]), dtype=dtype)
        for share, value in loss(model(images)[0], labels[0]):
            gradients = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
            for name, gradient in zip(sums, gradients, strict=True):
                sums[name] += share * gradient**2
    return {name: value / len(data) for name, value in sums.items()}


def under_the_model(outputs: Tensor, label: Tensor):
    logs = outputs.log_softmax(0)
    return [(p.detach(), log) for p, log in zip(logs.exp(), logs, strict=True)]


def at_the_true_label(outputs: Tensor, label: Tensor):
    return [(1.0, outputs.log_softmax(0)[label])]


def of_outputs(outputs: Tensor, label: Tensor):
    return [(2 / len(outputs), output) for output in outputs]


@pytest.mark.parametrize(
    ("objective", "labels", "loss"),
    [
        (CROSS_ENTROPY, "model", under_the_model),
        (CROSS_ENTROPY, "true", at_the_true_label),
        (SQUARED_ERROR, "model", of_outputs),
    ],
)
def test_the_fisher_is_the_mean_of_each_examples_squared_gradients(objective, labels, loss):
    model, data = network(), examples(40, objective=objective)
    fisher, cost = diagonal_fisher(model, data, RECIPE, labels=labels)
    expected = by_example(model, data, loss)
    assert fisher.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(fisher[name], value, rtol=1e-6, atol=1e-12)
    num_terms = 1 if labels == "true" else 3
    assert (cost.num_forward, cost.num_backward, cost.num_steps) == (2 * 40, num_terms * 40, 0)
    assert cost.device_s > 0


def test_the_fisher_of_convolutions_and_batch_norm_too():
    model, data = cnn(seed=1), examples(6)
    fisher, _ = diagonal_fisher(model, data, RECIPE)
    for name, value in by_example(model, data, under_the_model).items():
        torch.testing.assert_close(fisher[name], value, rtol=1e-4, atol=1e-7)


def test_under_squared_error_it_is_the_diagonal_of_a_linear_models_hessian():
    model, data = linear(64, dtype=torch.float64), examples(30, objective=SQUARED_ERROR)
    fisher, _ = diagonal_fisher(model, data, RECIPE)
    images, labels = data.batch(torch.arange(30), dtype=torch.float64)
    targets = F.one_hot(labels, 3).double()

    def mean_loss(weight: Tensor) -> Tensor:
        return F.mse_loss(F.linear(images.flatten(1), weight, model[1].bias), targets)  # pyright: ignore

    hessian = torch.autograd.functional.hessian(mean_loss, model[1].weight.detach())  # pyright: ignore
    diagonal = hessian.reshape(192, 192).diagonal().reshape(3, 64)  # pyright: ignore
    torch.testing.assert_close(fisher["1.weight"], diagonal)


def test_a_network_that_has_fitted_its_subset_has_no_empirical_fisher_left():
    model, data = linear(64, dtype=torch.float64), examples(10)
    images, labels = data.batch(torch.arange(10), dtype=torch.float64)
    targets = F.one_hot(labels, 3).double() * 40 - 20
    with torch.no_grad():
        model[1].bias.zero_()  # pyright: ignore
        model[1].weight.copy_((torch.linalg.pinv(images.flatten(1)) @ targets).T)  # pyright: ignore
    fisher, _ = diagonal_fisher(model, data, RECIPE, labels="true")
    assert max(value.max() for value in fisher.values()) < 1e-12


@pytest.mark.parametrize("objective", [CROSS_ENTROPY, SQUARED_ERROR])
def test_memory_is_bounded_by_blocks_of_examples_and_terms_that_change_only_the_counted_work(objective, monkeypatch):
    model, data = network(), examples(20, objective=objective)
    whole, cost = diagonal_fisher(model, data, RECIPE)
    num_parameters = sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(statistics_module, "MOST_ELEMENTS", 2 * num_parameters)  # two gradients at a time
    blocks, more = diagonal_fisher(model, data, RECIPE)
    for name, value in whole.items():
        torch.testing.assert_close(blocks[name], value)
    assert (cost.num_forward, more.num_forward) == (20 * 2, 20 * 3)
    assert cost.num_backward == more.num_backward == 20 * 3


@pytest.mark.parametrize("objective", [CROSS_ENTROPY, SQUARED_ERROR])
def test_with_many_outputs_it_is_estimated_without_bias(objective, monkeypatch):
    model, data = network(), examples(30, objective=objective)
    exact, _ = diagonal_fisher(model, data, RECIPE)
    monkeypatch.setattr(losses_module, "EXACT_OUTPUTS", 2)
    monkeypatch.setattr(losses_module, "SAMPLED_TERMS", 500)
    estimate, cost = diagonal_fisher(model, data, RECIPE, seed=3)
    assert cost.num_backward == 500 * 30
    for name, value in exact.items():
        if value.sum() > 1e-12:
            assert (estimate[name].sum() / value.sum()).item() == pytest.approx(1, abs=0.05)
    assert same_bits(diagonal_fisher(model, data, RECIPE, seed=3)[0], estimate)
    assert not same_bits(diagonal_fisher(model, data, RECIPE, seed=4)[0], estimate)


def test_work_is_known_beforehand():
    def num_backward(objective: CrossEntropy | SquaredError, num_classes: int, labels: str) -> int:
        task = image_examples(
            torch.zeros(1, 8, 8, 1), torch.zeros(1), objective=objective, num_classes=num_classes
        ).task
        return fisher_cost(50, 1000, task, labels=labels).num_backward

    assert num_backward(CROSS_ENTROPY, 10, "model") == 500
    assert num_backward(CROSS_ENTROPY, 10, "true") == 50
    assert num_backward(SQUARED_ERROR, 10, "true") == 500
    assert num_backward(CROSS_ENTROPY, EXACT_OUTPUTS + 1, "model") == 50 * SAMPLED_TERMS
    assert num_backward(SQUARED_ERROR, EXACT_OUTPUTS + 1, "model") == 50 * SAMPLED_TERMS


@pytest.mark.parametrize("take", [diagonal_fisher, gram_matrices])
def test_a_sample_is_a_mean_over_a_part_and_the_model_stays_as_it_was(take):
    model, data = cnn().train(), examples(30)
    before = weights(model)
    taken, cost = take(model, data, RECIPE, num_examples=7, seed=5)
    assert cost.num_forward in (7, 14)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(5))[:7]
    part = data.select(order)
    again, _ = take(model, part, RECIPE)
    for name, value in taken.items():
        torch.testing.assert_close(value, again[name])
    assert same_bits(weights(model), before)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_the_fisher_refuses_noise():
    with pytest.raises(ValueError, match="the network has dropout"):
        diagonal_fisher(noisy_network(), examples(), RECIPE)
    with pytest.raises(ValueError, match="the examples are augmented"):
        diagonal_fisher(cnn(), examples(augmentation="crop_flip"), RECIPE)


class Tied(nn.Module):
    """One layer under two names, used twice, and one that forward() passes by."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.again = self.first
        self.head = nn.Linear(64, 3)
        self.unused = nn.Linear(64, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.again(self.first(images.flatten(1)).tanh()).tanh())


def test_tied_layers_stand_under_each_of_their_names():
    model, data = Tied(), examples(10)
    fisher, _ = diagonal_fisher(model, data, RECIPE)
    assert set(fisher) == {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert torch.equal(fisher["first.weight"], fisher["again.weight"])
    assert not fisher["unused.weight"].any()
    grams, _ = gram_matrices(model, data, RECIPE)
    assert set(grams) == {"first", "again", "head"}
    assert grams["first"][0, -1, -1] == 2  # the constant input's square, of two calls an example


def test_a_linear_layers_gram_is_that_of_its_inputs_and_a_constant():
    data = examples(30)
    grams, cost = gram_matrices(linear(64, dtype=torch.float64), data, RECIPE)
    inputs = data.batch(torch.arange(30), dtype=torch.float64)[0].flatten(1)
    inputs = torch.cat([inputs, torch.ones(30, 1)], dim=1)
    torch.testing.assert_close(grams["1"], (inputs.T @ inputs / 30).unsqueeze(0))
    assert (cost.num_forward, cost.num_backward) == (30, 0)


@pytest.mark.parametrize("most_elements", [2**24, 1])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 1), dilation=2, bias=False),
        nn.Conv2d(4, 6, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, padding="same", groups=4, bias=False),
        nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"),
    ],
)
def test_a_convolutions_gram_gives_the_sum_of_squares_of_its_outputs(layer, most_elements, monkeypatch):
    monkeypatch.setattr(statistics_module, "MOST_ELEMENTS", most_elements)
    layer = layer.double()
    data = image_examples(torch.randint(256, (9, 8, 8, 4), dtype=torch.uint8), torch.zeros(9).long(), 1.0, 1.0)
    model = nn.Sequential(layer)
    (gram,) = gram_matrices(model, data, RECIPE)[0].values()
    rows = layer.weight.flatten(1)
    rows = rows if layer.bias is None else torch.cat([rows, layer.bias[:, None]], dim=1)
    rows = rows.unflatten(0, (layer.groups, -1))
    outputs = model(data.batch(torch.arange(9), dtype=torch.float64)[0])
    expected = outputs.square().sum((0, 2, 3)) / 9
    torch.testing.assert_close(((rows @ gram) * rows).sum(2).flatten(), expected)


def test_hooks_are_gone_afterwards():
    model = cnn()
    gram_matrices(model, examples(), RECIPE)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert math.isfinite(model(torch.zeros(1, 1, 8, 8)).sum().item())
