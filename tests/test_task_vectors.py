"""TIES, DARE and SAVGM on weights small enough to work out by hand."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from raysubset.aggregation import Aggregate, Minimum, dare, savgm, ties, uniform_soup
from raysubset.aggregation.task_vectors import BLOCK, _draws
from raysubset.training import Weights
from tests.test_aggregation import minimum, networks
from tests.tiny import cnn, same_bits, weights

START = torch.tensor([10.0, 10.0, 10.0, 10.0])


def moved(*displacements: list[float]) -> list[Minimum]:
    """Minima at START plus the displacements."""
    return [minimum(i, {"w": START + torch.tensor(own)}) for i, own in enumerate(displacements)]


def by_ties(minima: list[Minimum], *, density: float, scale: float = 1.0) -> Tensor:
    return ties(minima, {"w": START}, density=density, scale=scale, parameter_names={"w"}).weights["w"] - START


def test_ties_keeps_the_largest_elects_a_sign_and_averages_those_that_agree():
    minima = moved([4.0, -3.0, 0.5, 0.1], [1.0, 5.0, -2.0, 0.2], [3.0, -1.0, -4.0, 0.3])
    # half of each: [4, -3, 0, 0], [0, 5, -2, 0], [3, 0, -4, 0]; their sums 7, 2, -6, 0
    assert by_ties(minima, density=0.5).tolist() == pytest.approx([(4 + 3) / 2, 5.0, (-2 - 4) / 2, 0.0])
    assert by_ties(minima, density=0.5, scale=0.5).tolist() == pytest.approx([1.75, 2.5, -1.5, 0.0])
    # all of it: sums 8, 1, -5.5, 0.6
    assert by_ties(minima, density=1.0).tolist() == pytest.approx([8 / 3, 5.0, -3.0, 0.2])


def test_ties_leaves_the_start_where_signs_cancel():
    assert by_ties(moved([2.0, 1.0, 0.0, 0.0], [-2.0, 3.0, 0.0, 0.0]), density=1.0).tolist() == [0, 2, 0, 0]


def test_ties_trims_over_all_parameters_together_and_keeps_at_least_one_element():
    start = {"a": torch.zeros(2, 2), "b": torch.zeros(6)}
    own = {"a": torch.tensor([[9.0, -8.0], [7.0, 6.0]]), "b": torch.arange(6.0)}
    for density, kept in ((0.3, 3), (0.01, 1)):
        merged = ties([minimum(0, own)], start, density=density, scale=1.0, parameter_names=own).weights
        assert int(merged["a"].count_nonzero()) == kept
        assert not merged["b"].any()


def test_ties_of_agreeing_members_without_trimming_is_their_mean():
    generator = torch.Generator().manual_seed(0)
    minima = moved(*[torch.rand(4, generator=generator).tolist() for _ in range(5)])
    torch.testing.assert_close(by_ties(minima, density=1.0) + START, uniform_soup(minima).weights["w"])


def trimmed(vector: Tensor, density: float) -> Tensor:
    """As ties() defines it, by sorting."""
    magnitudes = vector.abs().sort(descending=True).values
    return vector.where(vector.abs() >= magnitudes[max(1, round(density * len(vector))) - 1], 0)


def signed(magnitudes: Tensor) -> Tensor:
    return magnitudes * torch.randint(2, magnitudes.shape, generator=torch.Generator().manual_seed(1)).mul(2).sub(1)


VECTORS: dict[str, Callable[[Tensor], Tensor]] = {  # of normal numbers
    "normal": lambda z: z,
    "heavy tails": lambda z: z**5,
    "few magnitudes": lambda z: z.round(),
    "most have not moved": lambda z: z * (z > 1.5),
    "all of one magnitude": lambda z: signed(torch.full_like(z, 0.25)),
    "none has moved": torch.zeros_like,
    "sorted": lambda z: z.sort().values,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", VECTORS)
def test_ties_trims_as_if_it_had_sorted(name, dtype):
    for num in (1, 2, 50, BLOCK + 1000):
        z = torch.randn(num, generator=torch.Generator().manual_seed(num))
        start = {
            "a": torch.rand(num, generator=torch.Generator().manual_seed(0)).to(dtype),
            "b": torch.ones(3).to(dtype),
        }
        own = {"a": (start["a"] + VECTORS[name](z)).to(dtype), "b": torch.tensor([1.5, 0.0, 1.0]).to(dtype)}
        wide = torch.promote_types(dtype, torch.float32)
        origin = torch.cat([value.to(wide) for value in start.values()])
        vector = torch.cat([value.to(wide) for value in own.values()]) - origin
        for density in (1e-9, 0.2, 0.5) if num < BLOCK else (0.2,):
            merged = ties([minimum(0, own)], start, density=density, scale=1.0, parameter_names=own).weights
            expected = (origin + trimmed(vector, density)).to(dtype).split([num, 3])
            assert all(map(torch.equal, merged.values(), expected)), (num, density)


@pytest.mark.parametrize("num", [5, 300])
def test_ties_is_its_three_steps_on_whole_vectors(num):
    vectors = torch.randn(num, 1000, generator=torch.Generator().manual_seed(0)).double()
    kept = torch.stack([trimmed(own, 0.3) for own in vectors])
    agree = kept.sign() == kept.sum(0).sign()
    expected = torch.where(agree, kept, 0).sum(0) / agree.sum(0).clamp_min(1)
    start = {"w": torch.zeros(1000, dtype=torch.float64)}
    minima = [minimum(i, {"w": own}) for i, own in enumerate(vectors)]
    merged = ties(minima, start, density=0.3, scale=1.0, parameter_names={"w"}).weights["w"]
    torch.testing.assert_close(merged, expected, rtol=1e-12, atol=1e-12)


def by_dare(minima: list[Minimum], start: Weights, *, drop: float, scale: float = 1.0, seed: int = 0) -> Weights:
    return dare(minima, start, drop=drop, scale=scale, seed=seed, parameter_names={"w"}).weights


def test_dare_that_drops_nothing_is_the_mean():
    minima = moved([4.0, -3.0, 0.5, 0.0], [1.0, 5.0, -2.0, 0.0])
    assert by_dare(minima, {"w": START}, drop=0.0)["w"].tolist() == pytest.approx([12.5, 11.0, 9.25, 10.0])
    assert by_dare(minima, {"w": START}, drop=0.0, scale=2.0)["w"].tolist() == pytest.approx([15, 12, 8.5, 10])


def test_dare_drops_a_share_at_random_and_keeps_the_expectation():
    num, drop = 100_000, 0.75
    start = {"w": torch.zeros(num)}
    (one,) = [minimum(0, {"w": torch.ones(num)})]
    dropped = by_dare([one], start, drop=drop)["w"]
    assert set(dropped.tolist()) == {0.0, 4.0}
    share, error = dropped.count_nonzero().item() / num, math.sqrt(drop * (1 - drop) / num)
    assert share == pytest.approx(1 - drop, abs=5 * error)
    pair = by_dare([one, replace(one, subset_id=1)], start, drop=drop)["w"]
    both = (pair == 4.0).float().mean().item()
    assert both == pytest.approx((1 - drop) ** 2, abs=0.01)  # drawn for each member apart
    assert torch.equal(by_dare([one], start, drop=drop)["w"], dropped)
    assert not torch.equal(by_dare([one], start, drop=drop, seed=1)["w"], dropped)


@pytest.mark.parametrize("drop", [0.0, 1e-5, 0.1, 0.5, 0.9, 0.99999])
def test_dare_keeps_the_expectation_at_the_probability_it_rounds_to(drop):
    """Of all draws of 16 bits just those that are to be dropped are, and what is left makes up for it."""
    num = 2**16
    num_dropped = min(round(drop * num), num - 1)
    digits = iter(range(16 - len(f"{num_dropped:016b}".rstrip("0")), 16))  # from the last that is set

    def words(_: int) -> np.ndarray:
        return np.packbits(np.arange(num) >> next(digits) & 1, bitorder="little").view("<u8")

    kept = _draws(words, num, num_dropped)
    assert kept.tolist() == [0] * num_dropped + [1] * (num - num_dropped)
    made = by_dare([minimum(0, {"w": torch.ones(num)})], {"w": torch.zeros(num)}, drop=drop)["w"]
    torch.testing.assert_close(made, made.sign() * (num / (num - num_dropped)), rtol=1e-6, atol=0)


def test_dare_draws_the_same_on_every_machine():
    for drop, kept in ((0.5, "00111110000110101100111000100011"), (0.3, "11011000101111111111110111111101")):
        drawn = by_dare([minimum(0, {"w": torch.ones(32)})], {"w": torch.zeros(32)}, drop=drop)["w"]
        assert "".join(str(int(value > 0)) for value in drawn) == kept


def with_part(one: Minimum, part: Weights) -> Minimum:
    return replace(one, load_statistics={"subsample": part}.__getitem__)


def test_savgm_removes_a_bias_that_falls_with_the_number_of_examples():
    truth, slope, r, n = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 5.0]), 0.25, 40
    noise = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    noise -= noise.mean(0)
    minima = [
        with_part(minimum(i, {"w": truth + slope / n + own}), {"w": truth + slope / (r * n) + own})
        for i, own in enumerate(noise)
    ]
    corrected = savgm(minima, fraction=r, parameter_names={"w"}).weights["w"]
    torch.testing.assert_close(corrected, truth, rtol=0, atol=1e-6)
    assert (uniform_soup(minima).weights["w"] - truth).abs().max() > 0.05


def test_savgm_is_the_means_formula():
    models = [weights(model) for model in networks(6)]
    minima = [
        with_part(minimum(i, own), part) for i, (own, part) in enumerate(zip(models[:3], models[3:], strict=True))
    ]
    names = {name for name, _ in cnn().named_parameters()}
    corrected = savgm(minima, fraction=0.2, parameter_names=names).weights
    whole, parts = (uniform_soup([minimum(i, own) for i, own in enumerate(some)]) for some in (models[:3], models[3:]))
    for name, value in corrected.items():
        mean = whole.weights[name]
        torch.testing.assert_close(value, (mean - 0.2 * parts.weights[name]) / 0.8 if name in names else mean)


NAMES = frozenset(name for name, _ in cnn().named_parameters())
METHODS: dict[str, Callable[..., Aggregate]] = {
    "ties": lambda minima, start: ties(minima, start, density=0.5, scale=1.0, parameter_names=NAMES),
    "dare": lambda minima, start: dare(minima, start, drop=0.5, scale=1.0, seed=0, parameter_names=NAMES),
    "savgm": lambda minima, start: savgm(
        [with_part(one, start) for one in minima], fraction=0.5, parameter_names=NAMES
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_buffers_take_no_part_in_the_arithmetic(name):
    minima = [minimum(i, weights(model)) for i, model in enumerate(networks(3))]
    start = weights(cnn(seed=9))
    start["block0.norm.running_var"].fill_(1000)
    made = METHODS[name](minima, start)
    mean = uniform_soup(minima).weights
    assert made.weights.keys() == mean.keys()
    for key in mean.keys() - NAMES:
        assert same_bits(made.weights[key], mean[key]), key
    assert made.weights["block0.norm.num_batches_tracked"].item() == 5
    assert not torch.allclose(made.weights["head.weight"], mean["head.weight"], atol=1e-3)
    assert (made.method, made.subset_ids, made.coefficients) == (name, (0, 1, 2), (1 / 3,) * 3)


@pytest.mark.parametrize("name", METHODS)
def test_neither_members_nor_start_are_changed(name):
    models, start = [weights(model) for model in networks(3)], weights(cnn(seed=9))
    before = [{k: v.clone() for k, v in own.items()} for own in [*models, start]]
    made = METHODS[name]([minimum(i, own) for i, own in enumerate(models)], start)
    made.weights["head.bias"].fill_(99)
    assert same_bits([*models, start], before)


@pytest.mark.parametrize("name", METHODS)
def test_half_precision_is_accumulated_in_float32_and_returned_as_it_was(name):
    def halved(own: Weights) -> Weights:
        return {k: v.bfloat16() if v.is_floating_point() else v for k, v in own.items()}

    models, start = [halved(weights(model)) for model in networks(3)], halved(weights(cnn(seed=9)))
    made = METHODS[name]([minimum(i, own) for i, own in enumerate(models)], start).weights
    wide = [{k: v.float() if v.is_floating_point() else v for k, v in own.items()} for own in [*models, start]]
    exact = METHODS[name]([minimum(i, own) for i, own in enumerate(wide[:3])], wide[3]).weights
    for key, value in made.items():
        assert same_bits(value, exact[key].to(models[0][key].dtype)), key


@pytest.mark.parametrize("name", METHODS)
def test_bad_members_are_refused_in_one_line(name):
    one, two = (minimum(i, weights(model)) for i, model in enumerate(networks(2)))
    own, start = two.load_weights(), weights(cnn(seed=9))
    bad = [
        ([one, replace(two, load_weights=lambda: own | {"head.bias": own["head.bias"] * math.nan})], "subset 1 holds"),
        ([one, replace(two, load_weights=lambda: weights(cnn("none")))], "different architectures cannot be averaged"),
    ]
    if name != "savgm":  # a mean, which methods.combine_in() refuses or lets pass
        bad.append(([one, replace(two, start_id="another")], f"{name} .* share none"))
    for minima, message in bad:
        with pytest.raises(ValueError, match=message) as caught:
            METHODS[name](minima, start)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="NaN or infinity in head"):
        METHODS[name]([one, two], start | {"head.bias": start["head.bias"] * math.nan})
    with pytest.raises(ValueError, match="different architectures"):
        METHODS[name]([one, two], weights(cnn("none")))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["ties", "dare"])
def test_one_element_that_is_not_finite_is_refused_kept_or_not(name, value):
    for place in range(4):
        minima = moved([1.0, -2.0, 3.0, -4.0], [4.0, 3.0, -2.0, 1.0])
        minima[1].load_weights()["w"][place] = value
        with pytest.raises(ValueError, match="subset 1 holds NaN or infinity in w"):
            by_ties(minima, density=0.25) if name == "ties" else by_dare(minima, {"w": START}, drop=0.9)


def test_savgm_needs_the_minima_on_parts():
    with pytest.raises(ValueError, match="no subsample statistics"):
        savgm(moved([1.0] * 4), fraction=0.5, parameter_names={"w"})
