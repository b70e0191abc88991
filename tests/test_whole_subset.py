"""Whole subsets: least squares in closed form, torch's L-BFGS by hand, what all methods share, and the law of Q."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from raysubset.config import WHOLE_SUBSET, Config, DataConfig, MinimizeConfig
from raysubset.data import Examples
from raysubset.subsets import overdetermination_ratio
from raysubset.tasks import SquaredError
from raysubset.training import DivergedError, Progress, evaluate, minimize, recompute_batch_norm
from raysubset.training.whole_subset.lbfgs import ITERATIONS_PER_STEP
from raysubset.training.whole_subset.objective import Objective
from tests.tiny import (
    SQUARED_ERROR,
    cnn,
    examples,
    linear,
    noisy_network,
    same_bits,
    through_a_file,
    weights,
    with_labels,
    zero,
)

RECIPE = MinimizeConfig(optimizer="lbfgs", epochs=60, patience=0)
LONG = replace(RECIPE, epochs=200)


def examples_for(optimizer: str, num: int = 30) -> Examples:
    """Under cross-entropy where the optimizer can minimize it."""
    return examples(num, objective=SQUARED_ERROR if optimizer == "levenberg_marquardt" else None)


def design(data: Examples) -> Tensor:
    """Float64 [N, pixels + 1]: the inputs of a linear model, with a constant."""
    images = data.batch(torch.arange(len(data)), dtype=torch.float64)[0].flatten(1)
    return torch.cat([images, torch.ones(len(data), 1, dtype=torch.float64)], dim=1)


def least_squares(data: Examples, num_classes: int = 3) -> Tensor:
    """Float64 [pixels + 1, M]: the closed form of what a linear model ends at."""
    targets = torch.eye(num_classes, dtype=torch.float64)[data.targets()]
    return torch.linalg.lstsq(design(data), targets).solution


@pytest.mark.parametrize("batch_size", [1, 64])  # four chunks of 16 examples, or one
def test_a_linear_models_minimum_is_the_closed_form_of_least_squares(batch_size):
    data, model = examples(60, side=4, objective=SQUARED_ERROR), linear(16, dtype=torch.float64)
    result = minimize(model, data, replace(LONG, batch_size=batch_size), seed=0)
    expected = least_squares(data)
    torch.testing.assert_close(model[1].weight.detach().T, expected[:-1], rtol=0, atol=1e-4)  # type: ignore[index]
    torch.testing.assert_close(model[1].bias.detach(), expected[-1], rtol=0, atol=1e-4)  # type: ignore[index]
    residuals = design(data) @ expected - torch.eye(3, dtype=torch.float64)[data.targets()]
    assert result.history[-1].loss == pytest.approx(residuals.square().mean().item(), rel=1e-8)
    assert result.outcome == "tolerance"


def test_lbfgs_equals_torchs_run_by_hand_to_the_last_bit():
    data, ours = examples(30), cnn("none")
    by_hand = cnn("none").to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    result = minimize(ours, data, replace(RECIPE, epochs=40), seed=0)
    optimizer = torch.optim.LBFGS(by_hand.parameters(), lr=1, history_size=20, line_search_fn="strong_wolfe")
    images, labels = data.batch(torch.arange(30))
    seen: list[dict[str, Tensor]] = []  # the same weights twice in a row cost nothing again

    def closure() -> Tensor:
        if not (seen and same_bits(seen[-1], weights(by_hand))):
            seen.append(weights(by_hand))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(by_hand(images), labels, reduction="sum") / 30
        loss.backward()
        return loss

    closure()
    while len(seen) < 40:
        group = optimizer.param_groups[0]
        group["max_iter"], group["max_eval"] = ITERATIONS_PER_STEP, 40 - len(seen) + 1
        optimizer.step(closure)  # type: ignore[arg-type]
        closure()
    assert same_bits(weights(ours), weights(by_hand))
    assert result.cost.num_steps == len(seen)


@pytest.mark.parametrize("tolerance", [1e-6, 1e-8, 1e-9])
def test_lbfgs_goes_on_until_the_gradient_is_within_its_tolerance(tolerance: float):
    """torch's tolerance_change ended it at a gradient of 1e-5, whatever was asked for."""
    model = linear(64, dtype=torch.float64)
    recipe = replace(RECIPE, epochs=3000, gradient_tolerance=tolerance, channels_last=False)
    data = examples(200, objective=SQUARED_ERROR)
    result = minimize(model, data, recipe, seed=0)
    assert result.outcome == "gradient"
    assert Objective(model, data, recipe).evaluate().largest_slope <= tolerance


@pytest.mark.parametrize("optimizer", ["lbfgs", "cg", "gauss_newton"])
def test_every_loss_gradient_and_product_is_counted(optimizer):
    data, model, calls = examples(30), cnn("none"), []
    model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    result = minimize(model, data, replace(RECIPE, optimizer=optimizer, epochs=25), seed=0)
    num_gradients, num_losses = result.cost.num_steps, calls.count(False)
    num_products = calls.count(True) - num_gradients
    assert result.cost.num_forward == 30 * (num_losses + num_gradients + 2 * num_products)
    assert result.cost.num_backward == 30 * (num_gradients + num_products)
    passes = num_losses / 3 + num_gradients + 4 / 3 * num_products
    assert result.cost.passes(30) == pytest.approx(passes)
    assert result.history[-1].epoch == pytest.approx(passes)
    assert result.history[-1].num_steps == num_gradients
    assert (num_losses > 0, num_products > 0) == ((True, True) if optimizer == "gauss_newton" else (False, False))
    assert result.outcome == "epochs"
    assert 25 <= passes <= 27 + (optimizer == "gauss_newton") * 2  # losses of a last search by halving


@pytest.mark.parametrize("optimizer", WHOLE_SUBSET)
@pytest.mark.parametrize("network", [cnn, lambda seed=0: linear(64, seed=seed)])
def test_stopped_anywhere_and_resumed_from_a_file_it_ends_at_the_same_bits(network, optimizer):
    data, unbroken, states = examples_for(optimizer, 40), network(), []
    recipe = replace(RECIPE, optimizer=optimizer)

    def keep(progress: Progress) -> None:
        states.append(through_a_file(progress.capture()) | {"num_steps": progress.cost.num_steps})

    whole = minimize(unbroken, data, recipe, seed=0, on_step=keep)
    assert len(states) > 2
    for state in (states[0], states[len(states) // 2], states[-2], states[-1]):
        model = network(seed=9)
        again = minimize(model, data, recipe, seed=0, state=state)
        assert same_bits(weights(model), weights(unbroken))
        assert (again.history, again.outcome) == (whole.history, whole.outcome)
        assert again.cost.num_steps == whole.cost.num_steps - state["num_steps"]
        assert again.cost.passes(40) == pytest.approx(whole.cost.passes(40) - state["position"][1] / 3)


def test_a_stop_is_obeyed_and_called_so():
    result = minimize(cnn("none"), examples(), RECIPE, seed=0, on_step=lambda progress: True)
    assert (result.outcome, len(result.history)) == ("stopped", 1)


@pytest.mark.parametrize("optimizer", WHOLE_SUBSET)
def test_a_target_stops_it(optimizer):
    recipe = replace(RECIPE, optimizer=optimizer)
    losses = [r.loss for r in minimize(cnn("none"), examples_for(optimizer), recipe, seed=0).history]
    result = minimize(cnn("none"), examples_for(optimizer), replace(recipe, target_loss=losses[1]), seed=0)
    assert result.outcome == "target"
    assert [r.loss for r in result.history] == losses[:2]


@pytest.mark.parametrize("optimizer", ["cg", "gauss_newton", "levenberg_marquardt"])
def test_a_small_relative_decrease_stops_it(optimizer):
    recipe = replace(LONG, optimizer=optimizer, tolerance=0.02)
    result = minimize(linear(16), examples(60, side=4, objective=SQUARED_ERROR), recipe, seed=0)
    losses = [r.loss for r in result.history]
    decreases = [1 - after / before for before, after in pairwise(losses)]
    assert result.outcome == "tolerance"
    assert decreases[-1] < 0.02
    assert all(decrease >= 0.02 for decrease in decreases[:-1])


class BelowZero(SquaredError):
    """As a likelihood's may be."""

    def summed(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().summed(outputs, targets) - 2 * len(outputs)


@pytest.mark.parametrize("optimizer", ["cg", "gauss_newton"])
def test_a_small_decrease_stops_it_below_zero_too(optimizer):
    recipe = replace(LONG, optimizer=optimizer, tolerance=0.001)
    result = minimize(linear(16), examples(60, side=4, objective=BelowZero(is_one_hot=True)), recipe, seed=0)
    decreases = [(before.loss - after.loss) / -before.loss for before, after in pairwise(result.history)]
    assert result.outcome == "tolerance"
    assert result.history[0].loss < 0
    assert decreases[-1] < 0.001
    assert all(decrease >= 0.001 for decrease in decreases[:-1])


@pytest.mark.parametrize("optimizer", WHOLE_SUBSET)
def test_a_small_gradient_stops_it(optimizer):
    data, model = examples(60, side=4, objective=SQUARED_ERROR), linear(16, dtype=torch.float64)
    recipe = replace(LONG, optimizer=optimizer, gradient_tolerance=1e-3)
    result = minimize(model, data, recipe, seed=0)
    assert result.outcome == "gradient"
    loss = nn.functional.mse_loss(
        model(data.batch(torch.arange(60), dtype=torch.float64)[0]), torch.eye(3, dtype=torch.float64)[data.targets()]
    )
    slopes = torch.autograd.grad(loss, list(model.parameters()))
    assert max(slope.abs().max().item() for slope in slopes) <= 1e-3
    again = minimize(model, data, recipe, seed=0)  # from there
    assert (again.outcome, len(again.history), again.cost.num_steps) == ("gradient", 1, 1)
    assert again.history[0].loss == result.history[-1].loss


@pytest.mark.parametrize("optimizer", WHOLE_SUBSET)
def test_batch_norm_statistics_are_taken_once_and_then_fixed(optimizer):
    data, model, reference = examples_for(optimizer, 40), cnn(), cnn()
    recipe = replace(RECIPE, optimizer=optimizer, epochs=20)
    result = minimize(model, data, recipe, seed=0)
    recompute_batch_norm(reference, data, recipe)
    for name, value in weights(reference).items():
        if "running" in name or "tracked" in name:
            assert torch.equal(weights(model)[name], value)
    assert evaluate(model, data, recipe).loss == pytest.approx(result.history[-1].loss, rel=1e-5)
    assert result.history[-1].epoch == pytest.approx(result.cost.passes(40))
    assert optimizer not in ("lbfgs", "cg") or result.cost.num_forward == result.cost.num_backward + 40
    assert model.training


@pytest.mark.parametrize("optimizer", WHOLE_SUBSET)
def test_dropout_augmentation_and_bfloat16_are_refused(optimizer):
    recipe = replace(RECIPE, optimizer=optimizer)
    with pytest.raises(ValueError, match=f"{optimizer} needs a loss without noise, but the network has dropout"):
        minimize(noisy_network(), examples(), recipe, seed=0)
    with pytest.raises(ValueError, match=r"set --data\.augmentation=none"):
        minimize(cnn(), examples(augmentation="crop_flip"), recipe, seed=0)
    with pytest.raises(ValueError, match=r"set --minimize\.precision=float32"):
        replace(recipe, precision="bfloat16")


@pytest.mark.parametrize("optimizer", WHOLE_SUBSET)
@pytest.mark.parametrize("data", [{"augmentation": "crop_flip"}, {"name": "cifar10"}])
def test_augmentation_is_refused_before_anything_is_run(data, optimizer):
    with pytest.raises(ValueError, match=r"set --data\.augmentation=none"):
        Config(data=DataConfig(**data), minimize=MinimizeConfig(optimizer=optimizer))
    Config(data=DataConfig(**data | {"augmentation": "none"}), minimize=MinimizeConfig(optimizer=optimizer))


@pytest.mark.parametrize("optimizer", WHOLE_SUBSET)
def test_a_start_without_a_finite_loss_is_refused(optimizer):
    model = linear(64)
    nn.init.constant_(model[1].weight, math.nan)  # type: ignore[index]
    with pytest.raises(DivergedError, match="the loss at the start is nan"):
        minimize(model, examples_for(optimizer), replace(RECIPE, optimizer=optimizer), seed=0)


class Cliff(nn.Module):
    """Fine as far as its offset is small, and without a number beyond."""

    def __init__(self, edge: float) -> None:
        super().__init__()
        self.offset, self.edge = nn.Parameter(torch.zeros(3)), edge

    def forward(self, images: Tensor) -> Tensor:
        outputs = self.offset.expand(len(images), 3)
        return torch.where(self.offset.abs().max() <= self.edge, outputs, math.nan)


class Scaled(nn.Module):
    """A linear layer of zeros whose outputs are so many times as large."""

    def __init__(self, scale: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.scale = zero(64).to(dtype), scale

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images) * self.scale


@pytest.mark.parametrize("optimizer", WHOLE_SUBSET)
def test_gradients_whose_sums_or_squares_have_no_number_end_it_in_words(optimizer):
    """Float32 has no number for the sum of the first's slopes, float64 none for the squares of the second's."""
    data, recipe = examples(30, objective=SQUARED_ERROR), replace(RECIPE, optimizer=optimizer)
    steep, flat = Scaled(2e38, torch.float32), Scaled(1e-170, torch.float64)
    assert minimize(steep, data, recipe, seed=0).outcome in ("tolerance", "epochs")
    assert minimize(flat, data, recipe, seed=0).outcome == "gradient"
    assert all(model(torch.zeros(1, 64)).isfinite().all() for model in (steep, flat.float()))


@pytest.mark.parametrize("optimizer", WHOLE_SUBSET)
def test_divergence_gives_the_start_back(optimizer):
    model = Cliff(0.0)
    result = minimize(model, examples_for(optimizer, 31), replace(RECIPE, optimizer=optimizer), seed=0)
    assert result.outcome == "diverged"
    assert torch.equal(model.offset, torch.zeros(3))


@pytest.mark.parametrize("optimizer", WHOLE_SUBSET)
def test_at_the_edge_of_the_void_the_best_weights_are_kept(optimizer):
    """The minimum, each class's share of a third, lies beyond the edge of what has a number."""
    data, model = examples(31, objective=SQUARED_ERROR), Cliff(0.3)
    start = evaluate(model, data, LONG).loss
    result = minimize(model, data, replace(LONG, optimizer=optimizer, epochs=60), seed=0)
    end = evaluate(model, data, LONG).loss
    assert model.offset.abs().max() <= 0.3
    if optimizer == "lbfgs":  # torch's line search does not shorten steps that end without a number
        assert (result.outcome, end) == ("diverged", start)
    else:
        losses = [record.loss for record in result.history if math.isfinite(record.loss)]
        assert end == pytest.approx(min(losses), rel=1e-6)
        assert end < 0.8 * start


def test_one_example_has_a_minimum():
    result = minimize(linear(64, dtype=torch.float64), examples(1, objective=SQUARED_ERROR), LONG, seed=0)
    assert result.history[-1].loss == pytest.approx(0, abs=1e-10)


def law(ratio: float) -> float:
    """Loss on fresh noise over the subset's own, at fixed inputs."""
    return (ratio + 1) / (ratio - 1)


def standard_errors_off(own: np.ndarray, fresh: np.ndarray, ratio: float) -> float:
    """How far the mean of fresh - law * own is from 0, in its standard errors."""
    off = fresh - law(ratio) * own
    return abs(off.mean()) / (off.std(ddof=1) / math.sqrt(len(off)))


@pytest.mark.parametrize("ratio", [1.5, 4, 16])
def test_fresh_noise_costs_least_squares_what_the_overdetermination_ratio_says(ratio):
    """METHODS §1, in closed form: Gaussian inputs held fixed, Gaussian noise, one output."""
    generator, num_parameters, num_draws = np.random.default_rng(0), 8, 4000
    num = int(ratio * num_parameters)
    assert overdetermination_ratio(num, 1, num_parameters) == ratio
    inputs = generator.normal(size=(num, num_parameters))
    hat = inputs @ np.linalg.pinv(inputs)
    own, fresh = generator.normal(size=(2, num, num_draws))
    losses = ((own - hat @ own) ** 2).mean(0), ((fresh - hat @ own) ** 2).mean(0)
    assert standard_errors_off(*losses, ratio) < 4
    assert losses[1].mean() / losses[0].mean() == pytest.approx(law(ratio), rel=0.05)


def test_minima_of_the_loop_obey_the_law_of_overdetermination():
    """Random labels are noise: the minimum of one draw is scored on another at the same inputs."""
    data, losses = examples(48, side=3, objective=SQUARED_ERROR, seed=7), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        draws = torch.randint(0, 3, (2, 48), generator=generator)
        own, fresh = (with_labels(data, labels) for labels in draws)
        model = linear(9, dtype=torch.float64)
        minimize(model, own, LONG, seed=0)
        losses.append([evaluate(model, part, LONG).loss for part in (own, fresh)])
    own, fresh = np.array(losses).T
    ratio = overdetermination_ratio(48, 3, 10 * 3)
    assert ratio == 4.8
    assert standard_errors_off(own, fresh, ratio) < 4
    assert standard_errors_off(own, fresh, 1.5 * ratio) > 4  # and not that of another ratio
