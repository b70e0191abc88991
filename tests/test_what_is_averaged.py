"""What a mean of weights leaves alone: frozen parameters, masks, statistics and vectors that no mean is right for."""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm

from raysubset.aggregation import (
    Minimum,
    RunningMean,
    aggregate,
    combine_and_score,
    merge,
    outer_step,
    select_best,
    uniform_soup,
)
from raysubset.aggregation.scorer import Scorer
from raysubset.config import AggregationConfig, MinimizeConfig, ModelConfig
from raysubset.models import averaged_names, build_model, has_batch_norm, trainable_names
from raysubset.quality import ACCURACY
from raysubset.tasks import Spec
from raysubset.training import Weights, diagonal_fisher, gram_matrices, minimize, predict, recompute_batch_norm
from tests.test_aggregation import minimum
from tests.tiny import examples, same_bits, weights

RECIPE = MinimizeConfig(batch_size=10, epochs=2.0, channels_last=False)


class Partly(nn.Module):
    """A frozen convolution with frozen batch norm, a mask of -inf, a codebook kept by hand, and a head that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.back = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.learning = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))
        self.register_buffer("unset", torch.full((2,), math.nan))
        self.register_buffer("codes", torch.zeros(4))
        with torch.no_grad():
            assert self.norm.running_mean is not None
            self.norm.running_mean.fill_(0.25)
        self.back.requires_grad_(False)
        self.norm.requires_grad_(False)

    def train(self, mode: bool = True) -> "Partly":
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        features = self.conv(torch.tanh(self.norm(self.back(images)))).relu()
        features = self.learning(features).mean((2, 3))
        if self.training:
            with torch.no_grad():
                self.codes.lerp_(features.mean(0), 0.5)
        return self.head(features + self.mask.softmax(0)[1])


UNCHANGED = ("back.weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "mask", "unset")


def partly(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Partly()


def minima_of(start: nn.Module, num: int = 3) -> list[Minimum]:
    """Minima on subsets of their own, measured, with all statistics."""
    members = []
    for k in range(num):
        model, subset = copy.deepcopy(start), examples(seed=k)
        minimize(model, subset, RECIPE, seed=k)
        outputs = predict(model, examples(seed=9), RECIPE)
        with_statistics = {
            "fisher": diagonal_fisher(model, subset, RECIPE)[0],
            "gram": gram_matrices(model, subset, RECIPE)[0],
            "subsample": weights(start),
        }
        member = minimum(k, weights(model), loss=1.0 + k, predictions=outputs)
        members.append(replace(member, load_statistics=with_statistics.__getitem__, averaged=averaged_names(start)))
    return members


def scorer_of(model: nn.Module) -> Scorer:
    return Scorer(model, calibration=examples(seed=8), validation=examples(seed=9), minimize=RECIPE)


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


@pytest.fixture(scope="module")
def start() -> nn.Module:
    return partly()


@pytest.fixture(scope="module")
def minima(start: nn.Module) -> list[Minimum]:
    return minima_of(start)


METHODS = ["select_best", "uniform_soup", "weighted_soup", "greedy_soup", "fisher", "regmean", "ties", "dare", "savgm"]


@pytest.mark.parametrize("method", [*METHODS, "auto"])
def test_no_method_changes_what_no_member_changed(method: str, start: nn.Module, minima: list[Minimum]):
    config = AggregationConfig(method=method)  # type: ignore[arg-type]
    made = aggregate(minima, config, scorer_of(copy.deepcopy(start)), start=weights(start), quality=ACCURACY)
    for name in UNCHANGED:
        assert same(made.aggregate.weights[name], weights(start)[name]), name
    assert not torch.equal(made.aggregate.weights["conv.weight"], weights(start)["conv.weight"])
    assert math.isfinite(made.validation.loss)


def test_a_codebook_is_the_first_members_and_the_aggregate_says_so(start: nn.Module, minima: list[Minimum]):
    soup = uniform_soup(minima)
    assert soup.of_first == ("codes",)
    assert torch.equal(soup.weights["codes"], minima[0].load_weights()["codes"])
    assert soup.to_dict()["of_first"] == ["codes"]


def test_the_means_of_the_rest_are_those_of_its_parameters(minima: list[Minimum]):
    soup = uniform_soup(minima).weights
    for name in ("conv.weight", "head.bias", "learning.running_var"):
        expected = torch.stack([member.load_weights()[name] for member in minima]).mean(0)
        torch.testing.assert_close(soup[name], expected)


def test_statistics_that_training_changes_are_recomputed_and_others_stay(start: nn.Module):
    model = copy.deepcopy(start)
    before = weights(model)
    assert recompute_batch_norm(model, examples(seed=3), RECIPE) == 30
    after = weights(model)
    assert [n for n in before if not same(before[n], after[n])] == ["learning.running_mean", "learning.running_var"]


def frozen_in_forward() -> nn.Module:
    class Net(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            self[1].eval()
            return super().forward(input)

    return Net(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.Flatten())


def test_batch_norm_that_forward_puts_in_evaluation_mode_keeps_its_statistics():
    model = frozen_in_forward()
    model[1].running_mean.fill_(0.5)  # type: ignore[union-attr, operator]
    before = weights(model)
    recompute_batch_norm(model, examples(), RECIPE)
    after = weights(model)
    assert torch.equal(before["1.running_mean"], after["1.running_mean"])
    assert not torch.equal(before["3.running_mean"], after["3.running_mean"])


def test_batch_norm_of_momentum_0_is_left_alone():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, momentum=0.0), nn.Flatten())
    assert not has_batch_norm(model)
    before = weights(model)
    assert recompute_batch_norm(model, examples(), RECIPE) == 0
    assert torch.equal(before["1.running_mean"], weights(model)["1.running_mean"])


def test_statistics_that_diverged_are_recomputed_all_the_same():
    model, other = (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten()) for _ in range(2))
    other.load_state_dict(model.state_dict())
    model[1].running_mean.fill_(math.nan)  # type: ignore[union-attr, operator]
    for each in (model, other):
        recompute_batch_norm(each, examples(), RECIPE)
    assert torch.equal(weights(model)["1.running_mean"], weights(other)["1.running_mean"])


def spectral(form: str) -> nn.Module:
    norm = parametrizations.spectral_norm if form == "parametrization" else spectral_norm
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Flatten(), norm(nn.Linear(64, 16)), nn.ReLU(), norm(nn.Linear(16, 3)))


@pytest.mark.parametrize("form", ["parametrization", "hook"])
@pytest.mark.parametrize("known", ["keys known", "keys unknown"])
def test_an_aggregates_spectral_norms_are_one(form: str, known: str):
    start = spectral(form)
    mean = RunningMean(averaged_names(start) if known == "keys known" else None)
    for k in range(4):
        model = copy.deepcopy(start)
        minimize(model, examples(seed=k), replace(RECIPE, epochs=20.0), seed=k)
        mean.add(weights(model))
    model = copy.deepcopy(start)
    model.load_state_dict(scorer_of(model).refreshed(mean.weights()))
    model.eval()(torch.zeros(1, 1, 8, 8))  # the hook computes the weight before a forward pass
    for number in (1, 3):
        largest = torch.linalg.matrix_norm(model[number].weight.detach(), 2)  # type: ignore[union-attr, arg-type]
        assert largest.item() == pytest.approx(1.0, abs=2e-3)


def test_an_average_along_the_way_has_spectral_norms_of_one():
    from raysubset.config import AveragingConfig

    model = spectral("parametrization")
    minimize(model, examples(), replace(RECIPE, epochs=20.0, averaging=AveragingConfig(kind="ema", decay=0.9)), seed=0)
    largest = torch.linalg.matrix_norm(model.eval()[1].weight.detach(), 2)  # type: ignore[index, union-attr]
    assert largest.item() == pytest.approx(1.0, abs=2e-3)


def test_frozen_parameters_are_not_among_the_trainable_ones_and_tied_ones_have_all_names():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight
            self.c.requires_grad_(False)

    assert trainable_names(Tied()) == {"a.weight", "a.bias", "b.weight", "b.bias"}


def test_an_outer_step_leaves_what_is_frozen(start: nn.Module, minima: list[Minimum]):
    soup, names = uniform_soup(minima).weights, trainable_names(start)
    options = {"learning_rate": 0.7, "momentum_factor": 0.9, "parameter_names": names}
    stepped, momentum = outer_step(weights(start), soup, {}, **options)  # type: ignore[arg-type]
    assert all(same(stepped[name], weights(start)[name]) for name in UNCHANGED)
    assert momentum.keys() == names


def diverged(members: Sequence[Minimum], name: str) -> list[Minimum]:
    def load() -> Weights:
        return members[1].load_weights() | {name: torch.full_like(members[1].load_weights()[name], -math.inf)}

    return [members[0], replace(members[1], load_weights=load), members[2]]


@pytest.mark.parametrize("name", ["conv.bias", "learning.running_var"])
def test_a_member_whose_parameters_or_statistics_diverged_is_still_refused(name: str, minima: list[Minimum]):
    with pytest.raises(ValueError, match=f"subset 1 holds NaN or infinity in {name}"):
        uniform_soup(diverged(minima, name))
    with pytest.raises(ValueError, match=f"subset 1 holds NaN or infinity in {name}"):
        select_best(diverged(minima, name)[1:2])


@pytest.mark.parametrize("method", ["uniform_soup", "weighted_soup"])
def test_without_a_network_a_mask_is_no_divergence_and_nan_is(method: str):
    mask = {"mask": torch.tensor([0.0, -math.inf])}
    members = [{"w": torch.tensor([0.0, value]), **mask} for value in (1.0, 3.0)]
    assert same_bits(merge(members, method), {"w": torch.tensor([0.0, 2.0]), **mask})
    for values in ([0.0, math.nan], [0.0, math.inf], [-math.inf, -math.inf]):
        with pytest.raises(ValueError, match="holds NaN or infinity in w"):
            merge([*members, {"w": torch.tensor(values), **mask}], method)
    diverged = {"w": torch.tensor([0.0, -math.inf]), **mask}  # beside a finite value, and first, but no other's
    with pytest.raises(ValueError, match="subset 0 holds NaN or infinity in w"):
        merge([diverged, *members], method)


def test_aligned_soup_keeps_frozen_layers_in_place_and_as_they_are():
    def network(seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            back = nn.Conv2d(1, 6, 3, padding=1).requires_grad_(False)
            torch.manual_seed(seed)
            rest = (nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
            return nn.Sequential(back, nn.ReLU(), *rest)

    members = []
    for k in range(2):
        model = network(k + 1)
        minimize(model, examples(seed=k), RECIPE, seed=k)
        outputs = predict(model, examples(seed=9), RECIPE)
        member = minimum(k, weights(model), start_id=str(k), predictions=outputs)
        members.append(replace(member, averaged=averaged_names(model)))
    config = AggregationConfig(method="aligned_soup")
    made, _ = combine_and_score(members, config, scorer_of(network(1)), start=None, seed=0)
    for name in ("0.weight", "0.bias"):
        assert torch.equal(made.weights[name], members[0].load_weights()[name])
    assert made.alignment is not None
    assert list(made.alignment["moved"]) == ["2"]


def a_complex_network(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 5, dtype=torch.cfloat))
            self.head = nn.Linear(64, num_classes)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(torch.fft.irfft2(torch.fft.rfft2(images) * self.w, s=images.shape[-2:]).flatten(1))

    return Net()


def a_network_with_a_complex_buffer(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    class Net(nn.Linear):
        def __init__(self) -> None:
            super().__init__(64, num_classes)
            self.register_buffer("phase", torch.tensor([1 + 2j]))

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input.flatten(1)) * self.phase.abs()

    return Net()


def test_complex_parameters_are_refused_and_complex_buffers_kept():
    here = "tests.test_what_is_averaged"
    spec = Spec((1, 8, 8), (3,))
    with pytest.raises(ValueError, match=r"parameter w is complex.*view_as_complex"):
        build_model(ModelConfig(name=f"{here}:a_complex_network"), spec, seed=0)
    model = build_model(ModelConfig(name=f"{here}:a_network_with_a_complex_buffer"), spec, seed=0)
    assert weights(model)["phase"].item() == 1 + 2j


def a_network_with_extra_state(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    class Net(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"num_calls": 0}

        def set_extra_state(self, state: dict[str, int]) -> None: ...

    return nn.Sequential(nn.Flatten(), Net(64, num_classes))


def test_a_state_that_is_no_tensor_is_refused_by_name():
    with pytest.raises(ValueError, match=r"1\._extra_state of the state dict is no tensor"):
        build_model(
            ModelConfig(name="tests.test_what_is_averaged:a_network_with_extra_state"), Spec((1, 8, 8), (3,)), seed=0
        )
