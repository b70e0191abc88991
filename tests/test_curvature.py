"""Fisher merging and RegMean: of quadratic losses they hit the whole set's minimum exactly."""

import functools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from raysubset.aggregation import Minimum, fisher_merge, regmean, uniform_soup
from raysubset.config import MinimizeConfig
from raysubset.data import Examples
from raysubset.training import Weights, diagonal_fisher, gram_matrices
from tests.test_aggregation import minimum, networks
from tests.tiny import cnn, examples, image_examples, same_bits, weights

RECIPE = MinimizeConfig()
FLOOR = 1e-30


def with_statistics(one: Minimum, **statistics: Weights) -> Minimum:
    return replace(one, load_statistics=lambda kind: statistics[kind])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quadratics(num: int = 4) -> tuple[list[Minimum], Tensor, Tensor]:
    """Minima θ_i of ½(θ-θ_i)ᵀH_i(θ-θ_i) with diagonal H_i, the minima [N, 5], and the diagonals [N, 5]."""
    points = torch.randn(num, 5, generator=generator(), dtype=torch.float64)
    curvatures = torch.rand(num, 5, generator=generator(1), dtype=torch.float64) * 10 ** torch.arange(-2.0, 3)
    minima = [
        with_statistics(minimum(i, {"w": own}), fisher={"w": curvature})
        for i, (own, curvature) in enumerate(zip(points, curvatures, strict=True))
    ]
    return minima, points, curvatures


def test_of_diagonal_quadratics_the_unnormalised_fisher_mean_is_the_minimum_of_the_sum():
    minima, points, curvatures = quadratics()
    exact = (curvatures * points).sum(0) / curvatures.sum(0)
    merged = fisher_merge(minima, floor=FLOOR, normalised=False)
    torch.testing.assert_close(merged.weights["w"], exact, rtol=1e-12, atol=0)
    assert not torch.allclose(uniform_soup(minima).weights["w"], exact, rtol=1e-2)
    assert (merged.method, merged.subset_ids, merged.coefficients) == ("fisher", (0, 1, 2, 3), (0.25,) * 4)


def test_members_count_by_their_subsets_sizes():
    minima, points, curvatures = quadratics(2)
    minima[1] = replace(minima[1], num_examples=30)
    merged = fisher_merge(minima, floor=FLOOR, normalised=False)
    weighted = curvatures * torch.tensor([[10.0], [30.0]])
    torch.testing.assert_close(merged.weights["w"], (weighted * points).sum(0) / weighted.sum(0))
    assert merged.coefficients == (0.25, 0.75)


def test_normalised_fishers_do_not_care_how_well_a_member_has_fitted():
    minima, _, curvatures = quadratics(2)
    before = fisher_merge(minima, floor=FLOOR).weights["w"]
    scaled = [minima[0], with_statistics(minima[1], fisher={"w": 1e-6 * curvatures[1]})]
    torch.testing.assert_close(fisher_merge(scaled, floor=FLOOR).weights["w"], before)
    unnormalised = fisher_merge(scaled, floor=FLOOR, normalised=False).weights["w"]
    assert (unnormalised - minima[0].load_weights()["w"]).abs().max() < 1e-2


def test_where_no_member_has_curvature_the_floor_makes_it_the_mean():
    flat = {"w": torch.tensor([0.0, 0.0])}
    minima = [with_statistics(minimum(i, {"w": torch.tensor([i, 3.0 * i])}), fisher=flat) for i in range(3)]
    for normalised in (True, False):
        merged = fisher_merge(minima, floor=1e-6, normalised=normalised)
        torch.testing.assert_close(merged.weights["w"], torch.tensor([1.0, 3.0]))


def regression(seed: int, num: int, side: int = 3) -> tuple[Examples, Tensor]:
    """Random pixels, and targets of their own for a least-squares problem."""
    images = torch.randint(256, (num, side, side, 1), dtype=torch.uint8, generator=generator(seed))
    data = image_examples(images, torch.zeros(num, dtype=torch.int64), 0.5, 0.5)
    return data, torch.randn(num, 2, generator=generator(seed + 100), dtype=torch.float64)


def solved(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares with a bias: weight [outputs, inputs] and bias [outputs]."""
    rows = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1)
    solution = torch.linalg.lstsq(rows, targets).solution
    return solution[:-1].T.contiguous(), solution[-1].contiguous()


def inputs_of(data: Examples) -> Tensor:
    return data.batch(torch.arange(len(data)), dtype=torch.float64)[0].flatten(1)


def test_of_linear_regressions_on_subsets_regmean_of_factor_one_is_the_regression_on_all():
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 2)).double()
    minima, parts = [], []
    for subset_id, num in enumerate((20, 40, 15)):
        data, targets = regression(subset_id, num)
        weight, bias = solved(inputs_of(data), targets)
        grams, _ = gram_matrices(model, data, RECIPE)
        own = {"1.weight": weight, "1.bias": bias}
        minima.append(with_statistics(minimum(subset_id, own, num_examples=num), gram=grams))
        parts.append((inputs_of(data), targets))
    weight, bias = solved(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))
    merged = regmean(minima, factor=1.0).weights
    torch.testing.assert_close(merged["1.weight"], weight, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(merged["1.bias"], bias, rtol=1e-9, atol=1e-10)
    plain = uniform_soup(minima).weights["1.weight"]
    assert (plain - weight).abs().max() > 1e-2
    between = regmean(minima, factor=0.9).weights["1.weight"]
    assert 1e-4 < (between - weight).abs().max() < (plain - weight).abs().max()


def test_a_frozen_bias_stays_and_weights_are_regressed_given_it():
    model, bias = nn.Sequential(nn.Flatten(), nn.Linear(9, 2)).double(), torch.tensor([3.0, -1.0]).double()
    minima, parts = [], []
    for subset_id, num in enumerate((20, 40)):
        data, targets = regression(subset_id, num)
        weight = torch.linalg.lstsq(inputs_of(data), targets - bias).solution.T
        grams, _ = gram_matrices(model, data, RECIPE)
        own = {"1.weight": weight, "1.bias": bias}
        minima.append(with_statistics(minimum(subset_id, own, num_examples=num), gram=grams))
        parts.append((inputs_of(data), targets - bias))
    merged = regmean(minima, factor=1.0).weights
    weight = torch.linalg.lstsq(*(torch.cat(each) for each in zip(*parts, strict=True))).solution.T
    torch.testing.assert_close(merged["1.weight"], weight, rtol=1e-9, atol=1e-10)
    assert torch.equal(merged["1.bias"], bias)


def test_a_layer_that_gets_its_input_by_name_has_the_same_gram_matrix():
    class ByName(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            return self[1](input=self[0](input))

    layers, data = (nn.Flatten(), nn.Linear(9, 2)), regression(0, 5)[0]
    grams = [gram_matrices(kind(*layers), data, RECIPE)[0] for kind in (nn.Sequential, ByName)]
    assert same_bits(*grams)


def test_layers_whose_weight_is_computed_from_others_have_no_gram_matrix_and_are_averaged():
    for norm in (nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm):
        model = nn.Sequential(nn.Flatten(), norm(nn.Linear(9, 4)), nn.Linear(4, 2))
        grams, _ = gram_matrices(model, regression(0, 5)[0], RECIPE)
        assert set(grams) == {"2"}
        minima = [with_statistics(minimum(i, weights(model)), gram=grams) for i in range(2)]
        assert same_bits(regmean(minima, factor=0.9).weights, weights(model))


def test_regmean_of_factor_zero_weighs_each_input_by_its_own_square():
    grams = [torch.tensor([[[3.0, 9.0], [9.0, 1.0]]]), torch.tensor([[[1.0, -9.0], [-9.0, 1.0]]])]
    minima = [
        with_statistics(minimum(i, {"a.weight": torch.tensor([[4.0 * i, 8.0 * i]])}), gram={"a": gram})
        for i, gram in enumerate(grams)
    ]
    torch.testing.assert_close(regmean(minima, factor=0.0).weights["a.weight"], torch.tensor([[1.0, 4.0]]))


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 4, 3, groups=2), nn.Conv2d(2, 4, 3, groups=2, bias=False)]
)
def test_for_convolutions_it_is_the_least_squares_fit_to_all_members_outputs(layer):
    layer, generated = layer.double(), generator()
    model = nn.Sequential(layer)
    minima, data = [], []
    for subset_id in range(2):
        own = {key: torch.randn(v.shape, generator=generated, dtype=v.dtype) for key, v in model.state_dict().items()}
        images = torch.randint(256, (12, 5, 5, 2), dtype=torch.uint8, generator=generated)
        part = image_examples(images, torch.zeros(12).long(), 1.0, 1.0)
        grams, _ = gram_matrices(model, part, RECIPE)
        minima.append(with_statistics(minimum(subset_id, own), gram=grams))
        data.append((part.batch(torch.arange(12), dtype=torch.float64)[0], own))
    model.load_state_dict(regmean(minima, factor=1.0).weights)
    loss = torch.zeros((), dtype=torch.float64)
    for images, own in data:
        targets = torch.func.functional_call(model, own, (images,)).detach()
        loss = loss + (model(images) - targets).square().sum()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert loss > 1
    assert max(gradient.abs().max() for gradient in gradients) < 1e-6 * loss.item()


def test_inputs_that_no_member_ever_saw_keep_the_mean():
    gram = torch.zeros(1, 3, 3)
    gram[0, :2, :2] = torch.tensor([[2.0, 2.0], [2.0, 2.0]])  # the first two inputs are always equal, the last zero
    minima = [
        with_statistics(minimum(i, {"a.weight": torch.tensor([[1.0 + i, 3.0 + i, 5.0 + 2 * i]])}), gram={"a": gram})
        for i in range(2)
    ]
    torch.testing.assert_close(regmean(minima, factor=1.0).weights["a.weight"], torch.tensor([[1.5, 3.5, 6.0]]))
    nothing = [with_statistics(one, gram={"a": torch.zeros(1, 3, 3)}) for one in minima]
    torch.testing.assert_close(regmean(nothing, factor=0.9).weights["a.weight"], torch.tensor([[1.5, 3.5, 6.0]]))


@functools.cache
def of_networks(num: int) -> tuple[Minimum, ...]:
    """Minima of small CNNs with both kinds of statistics."""
    minima = []
    for subset_id, model in enumerate(networks(num)):
        data, recipe = examples(20, seed=subset_id), MinimizeConfig()
        fisher, grams = diagonal_fisher(model, data, recipe)[0], gram_matrices(model, data, recipe)[0]
        minima.append(with_statistics(minimum(subset_id, weights(model)), fisher=fisher, gram=grams))
    return tuple(minima)


MERGES = {
    "fisher": fisher_merge,
    "regmean": lambda minima: regmean(minima, factor=0.9),
}


@pytest.mark.parametrize("name", MERGES)
def test_identical_members_have_themselves_as_their_merge(name):
    (one,) = of_networks(1)
    merged = MERGES[name]([one, replace(one, subset_id=1), replace(one, subset_id=2)]).weights
    for key, value in one.load_weights().items():
        torch.testing.assert_close(merged[key], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", MERGES)
def test_what_has_no_statistics_is_averaged_and_integer_buffers_are_the_first_members(name):
    minima = of_networks(3)
    merged, mean = MERGES[name](minima).weights, uniform_soup(minima).weights
    assert merged.keys() == mean.keys()
    assert torch.equal(merged["block0.norm.running_var"], mean["block0.norm.running_var"])
    assert merged["block0.norm.num_batches_tracked"].item() == 5
    assert not torch.allclose(merged["head.weight"], mean["head.weight"], atol=1e-4)
    assert torch.equal(merged["block0.norm.weight"], mean["block0.norm.weight"])  # all ones
    cnn().load_state_dict(merged)


@pytest.mark.parametrize("name", MERGES)
def test_half_precision_members_are_merged_in_float32_and_returned_in_their_own(name):
    minima = of_networks(2)
    halves = [
        replace(
            one,
            load_weights=lambda own=one.load_weights(): {  # noqa: B008
                k: v.bfloat16() if v.is_floating_point() else v for k, v in own.items()
            },
        )
        for one in minima
    ]
    merged, exact = MERGES[name](halves).weights, MERGES[name](minima).weights
    assert merged["head.weight"].dtype == torch.bfloat16
    torch.testing.assert_close(merged["head.weight"].float(), exact["head.weight"], rtol=0.05, atol=0.01)


@pytest.mark.parametrize("name", MERGES)
def test_bad_members_are_refused_in_one_line(name):
    one, two = of_networks(2)
    kind = {"fisher": "fisher", "regmean": "gram"}[name]
    own, statistics = two.load_weights(), two.load_statistics(kind)
    key = next(iter(statistics))
    bad = [
        (replace(two, load_statistics=minimum(1, own).load_statistics), f"no {kind} statistics"),
        (with_statistics(two, **{kind: {**statistics, key: statistics[key] * math.nan}}), "hold NaN or infinity"),
        (with_statistics(two, **{kind: {k: v for k, v in statistics.items() if k != key}}), f"differ .* in {key}"),
        (replace(two, load_weights=lambda: own | {"head.bias": own["head.bias"] * math.inf}), "subset 1 holds NaN"),
        (replace(two, load_weights=lambda: weights(cnn("none"))), "different architectures"),
    ]
    for other, message in bad:
        with pytest.raises(ValueError, match=message) as caught:
            MERGES[name]([one, other])
        assert "\n" not in str(caught.value)


def test_the_same_members_give_the_same_bits():
    minima = of_networks(3)
    for merge in MERGES.values():
        assert same_bits(merge(minima).weights, merge(minima).weights)
