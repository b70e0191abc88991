"""Alignment undoes permutations exactly, REPAIR restores planted statistics, and both save means of strangers."""

import itertools
from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from raysubset.aggregation import Minimum
from raysubset.aggregation.alignment import aligned_soup, trace_units
from raysubset.aggregation.alignment.matching import Match, match_activations, match_weights, merge_many
from raysubset.aggregation.alignment.repairing import layer_statistics, mean_statistics, repair
from raysubset.aggregation.alignment.tracing import permuted, random_permutations
from raysubset.config import DataConfig, MinimizeConfig, ModelConfig
from raysubset.data import Examples, load_full_set
from raysubset.models import build_model
from raysubset.tasks import Spec
from raysubset.training import Cost, Weights, evaluate, minimize
from tests.tiny import metrics, same_bits, weights

CPU = torch.device("cpu")
RECIPE = MinimizeConfig(epochs=20, batch_size=64)
NETWORKS = {
    "cnn": ModelConfig(width=8, depth=2),
    "cnn without norm": ModelConfig(width=8, depth=2, norm="none"),
    "cifar_resnet": ModelConfig(name="cifar_resnet", width=8, depth=8),
    "mlp": ModelConfig(name="mlp", width=24, depth=2),
}

DIGITS = Spec((1, 8, 8), (10,))


def network(config: ModelConfig, *, seed: int = 0, num_classes: int = 5) -> nn.Module:
    """In evaluation mode, with statistics and norms of which no two channels are alike."""
    model = build_model(config, Spec((1, 8, 8), (num_classes,)), seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if "norm" in name and value.is_floating_point():
            value.uniform_(0.5, 1.5, generator=generator)
    return model


def images(num: int = 64, *, seed: int = 5) -> Tensor:
    return torch.randn(num, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def matcher(config: ModelConfig, matching: str) -> Match:
    ours, theirs = network(config), network(config)
    structure = trace_units(ours, DIGITS)

    def by_weights(target: Weights, own: Weights) -> tuple[Tensor, ...]:
        names = [name for name, _ in ours.named_parameters()]
        return match_weights(target, own, structure, parameter_names=names, seed=3, device=CPU)

    def by_activations(target: Weights, own: Weights) -> tuple[Tensor, ...]:
        ours.load_state_dict(target)
        theirs.load_state_dict(own)
        networks = structure.network(ours), structure.network(theirs)
        return match_activations(*networks, structure.groups, images(256).split(64))

    return by_weights if matching == "weights" else by_activations


@pytest.mark.parametrize("matching", ["weights", "activations"])
@pytest.mark.parametrize("name", NETWORKS)
def test_matching_undoes_a_permutation_exactly(name, matching):
    model = network(NETWORKS[name])
    groups = trace_units(model, DIGITS).groups
    own = weights(model)
    shuffled = permuted(own, groups, random_permutations(groups, torch.Generator().manual_seed(1)))
    assert not same_bits(shuffled, own)
    found = matcher(NETWORKS[name], matching)(own, shuffled)
    assert same_bits(permuted(shuffled, groups, found), own)


def test_weight_matching_of_one_group_is_the_best_of_all_permutations():
    config = ModelConfig(name="mlp", width=5, depth=1)
    first, second = weights(network(config, seed=1)), weights(network(config, seed=2))
    groups = trace_units(network(config), DIGITS).groups

    def agreement(order: tuple[int, ...]) -> float:
        moved = permuted(second, groups, (torch.tensor(order),))
        return sum(float((first[name].double() * moved[name].double()).sum()) for name in first)

    (found,) = matcher(config, "weights")(first, second)
    assert tuple(found.tolist()) == max(itertools.permutations(range(5)), key=agreement)


def test_activation_matching_of_one_group_is_the_best_by_numpys_correlations():
    config = ModelConfig(name="mlp", width=5, depth=1)
    first, second = network(config, seed=1), network(config, seed=2)
    with torch.no_grad():
        ours, theirs = (model[:2](images(256)).numpy() for model in (first, second))
    correlation = np.corrcoef(ours.T, theirs.T)[:5, 5:]
    (found,) = matcher(config, "activations")(weights(first), weights(second))
    best = max(itertools.permutations(range(5)), key=lambda order: correlation[range(5), order].sum())
    assert tuple(found.tolist()) == best


def test_units_that_are_constant_are_matched_to_what_is_left():
    config = ModelConfig(name="mlp", width=5, depth=1)
    own = weights(network(config))
    own["hidden0.weight"][2] = 0.0
    shuffled = permuted(own, trace_units(network(config), DIGITS).groups, (torch.tensor([4, 2, 0, 1, 3]),))
    (found,) = matcher(config, "activations")(own, shuffled)
    assert found.tolist() == [2, 3, 1, 4, 0]


@pytest.mark.parametrize("matching", ["weights", "activations"])
def test_merging_permuted_copies_of_one_network_gives_that_network(matching):
    config = NETWORKS["cnn"]
    groups = (structure := trace_units(network(config), DIGITS)).groups
    own, generator = weights(network(config)), torch.Generator().manual_seed(4)
    copies = [permuted(own, groups, random_permutations(groups, generator)) for _ in range(4)]
    loaders: list[Callable[[], Weights]] = [lambda copy=copy: copy for copy in copies]
    orders, num_rounds = merge_many(loaders, structure, matcher(config, matching), most_rounds=5, seed=0)
    first, *others = (permuted(copy, groups, o) for copy, o in zip(copies, orders, strict=True))
    assert all(same_bits(first, other) for other in others)
    assert any(same_bits(first, copy) for copy in copies)  # whose order of units the others took
    assert num_rounds == 2  # the second finds nothing to do


def statistics_close(model: nn.Module, other: nn.Module, *, std_only: bool = False) -> None:
    structure = trace_units(model, DIGITS)
    batches = images().split(32)
    ours, theirs = (layer_statistics(m, structure, batches) for m in (model, other))
    assert ours
    for node, (mean, std) in ours.items():
        torch.testing.assert_close(std, theirs[node][1], rtol=1e-3, atol=1e-5)
        if not std_only:
            torch.testing.assert_close(mean, theirs[node][0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["cnn without norm", "mlp", "cifar_resnet without norm"])
def test_repair_restores_a_network_whose_activations_were_shrunk(name):
    config = NETWORKS.get(name) or ModelConfig(name="cifar_resnet", width=8, depth=8, norm="none")
    model, shrunk = network(config), network(config)
    structure = trace_units(model, DIGITS)
    for layer in structure.layers:
        module = shrunk.get_submodule(layer.module)
        module.weight.data *= 0.3
        module.bias.data += 0.1
    batches = list(images().split(32))
    repair(shrunk, structure, layer_statistics(model, structure, batches), batches)
    statistics_close(shrunk, model)
    for key, value in weights(model).items():  # what was planted is affine, so it is undone
        torch.testing.assert_close(shrunk.state_dict()[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["cnn", "cifar_resnet"])
def test_repair_of_batch_norm_resets_statistics_and_restores_its_outputs(name):
    model, shrunk = network(NETWORKS[name]), network(NETWORKS[name])
    for key, value in shrunk.state_dict().items():
        if "running" in key or key.endswith(("norm.weight", "norm0.weight", "norm1.weight")):
            value *= 0.4
    structure, batches = trace_units(model, DIGITS), list(images().split(32))
    repair(shrunk, structure, layer_statistics(model, structure, batches), batches)
    statistics_close(shrunk, model)
    norm = "block0.norm" if name == "cnn" else "norm"
    with torch.no_grad():
        conv = model.get_submodule("block0.conv" if name == "cnn" else "conv")
        outputs = conv(images())
    torch.testing.assert_close(shrunk.state_dict()[f"{norm}.running_mean"], outputs.mean((0, 2, 3)))
    torch.testing.assert_close(shrunk.state_dict()[f"{norm}.running_var"], outputs.var((0, 2, 3)))


def test_repair_of_a_layer_without_bias_restores_its_standard_deviation_only():
    def tiny() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 6, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5)).eval()

    with torch.random.fork_rng():
        model, shrunk = tiny(), tiny()
    shrunk[0].weight.data *= torch.linspace(0.2, 0.8, 6).view(-1, 1, 1, 1)
    structure, batches = trace_units(model, DIGITS), list(images().split(32))
    repair(shrunk, structure, layer_statistics(model, structure, batches), batches)
    statistics_close(shrunk, model, std_only=True)


def test_repair_leaves_the_scale_of_a_channel_that_does_not_vary():
    model = network(ModelConfig(name="mlp", width=4, depth=1))
    structure, batches = trace_units(model, DIGITS), list(images().split(32))
    targets = layer_statistics(model, structure, batches)
    model.hidden0.weight.data[1] = 0.0
    repair(model, structure, targets, batches)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    torch.testing.assert_close(model.hidden0.bias[1].item(), targets["hidden0"][0][1].item(), rtol=1e-5, atol=1e-6)


def test_repair_aims_at_the_mean_of_means_and_of_standard_deviations():
    one, two = ({"a": (torch.tensor([m]), torch.tensor([s]))} for m, s in ((1.0, 2.0), (3.0, 5.0)))
    assert mean_statistics([one, two])["a"] == (torch.tensor([2.0]), torch.tensor([3.5]))


def digits() -> Examples:
    return load_full_set(DataConfig(name="digits")).examples("train")


def minimum(subset_id: int, own: Weights) -> Minimum:
    return Minimum(
        subset_id=subset_id,
        num_examples=600,
        start_id=f"start {subset_id}",
        outcome="epochs",
        training=metrics(1.0, 1, 2),
        validation=metrics(1.0, 1, 2),
        cost=Cost(),
        load_weights=lambda: own,
        load_outputs=lambda: torch.zeros(0),
    )


Strangers = Callable[[Literal["batch", "none"]], list[Minimum]]


@pytest.fixture(scope="module")
def strangers() -> Strangers:
    """Two CNNs trained on digits from starts of their own, in 20 epochs of half the examples each."""
    found: dict[str, list[Minimum]] = {}
    data = digits()

    def train(norm: Literal["batch", "none"]) -> list[Minimum]:
        if norm not in found:
            found[norm] = []
            for k in range(2):
                half = data.select(torch.arange(k, len(data), 2))
                model = trained_model(norm, seed=k)
                minimize(model, half, RECIPE, seed=k)
                found[norm].append(minimum(k, weights(model)))
        return found[norm]

    return train


def trained_model(norm: Literal["batch", "none"], *, seed: int = 9) -> nn.Module:
    return build_model(ModelConfig(width=8, depth=2, norm=norm), Spec((1, 8, 8), (10,)), seed=seed)


@pytest.mark.parametrize(("norm", "matching"), [("batch", "weights"), ("batch", "activations"), ("none", "weights")])
def test_alignment_recovers_most_of_what_a_plain_mean_of_strangers_loses(strangers, norm, matching):
    minima, model = strangers(norm), trained_model(norm)
    made = aligned_soup(minima, model, digits(), RECIPE, matching=matching, repair=True)
    assert made.alignment is not None
    report = made.alignment
    assert report["barrier_before"] > 1.2
    assert report["barrier_after"] < 0.5 * report["barrier_before"]
    model.load_state_dict(made.weights)
    assert evaluate(model, digits(), RECIPE).accuracy > 0.65
    assert (made.method, made.subset_ids, made.coefficients) == ("aligned_soup", (0, 1), (0.5, 0.5))
    assert not made.shared_start
    assert (report["num_groups"], report["num_fixed_groups"]) == (2, 0)
    assert set(report["moved"]) == {"block0.conv", "block1.conv"}
    assert 0 < report["moved"]["block1.conv"] <= 0.5  # one of two members keeps its units' places


def test_without_norm_layers_repair_makes_the_difference(strangers):
    after = {}
    for fix in (False, True):
        minima, model = strangers("none"), trained_model("none")
        made = aligned_soup(minima, model, digits(), RECIPE, matching="weights", repair=fix)
        after[fix] = made.alignment["barrier_after"]
    assert after[True] < 0.85 * after[False]  # measured: 0.74 and 0.98


@pytest.mark.parametrize(
    ("matching", "fix", "passes"),
    [
        ("weights", False, 2 + 2 + 1 + 1),  # members, plain mean with new statistics, soup with new statistics
        ("weights", True, 2 + 2 + 1 + 2 + 1 + 1),  # and the members' statistics, and repair
        ("activations", False, 2 + 2 + 3 + 1 + 1),  # and both networks, with new statistics of the target
    ],
)
def test_all_forward_work_of_an_alignment_is_counted(strangers, matching, fix, passes):
    data = digits()
    calibration = data.select(torch.arange(300))
    model = trained_model("batch")
    report = aligned_soup(strangers("batch"), model, calibration, RECIPE, matching=matching, repair=fix).alignment
    assert report["num_forward"] == passes * 300
    assert report["seconds"] > 0


def test_an_aligned_soup_of_copies_is_the_network_they_are_copies_of(strangers):
    model = trained_model("none")
    own = strangers("none")[0].load_weights()
    groups = trace_units(model, DIGITS).groups
    shuffled = permuted(own, groups, random_permutations(groups, torch.Generator().manual_seed(1)))
    minima = [minimum(0, own), minimum(1, shuffled)]
    made = aligned_soup(minima, model, digits(), RECIPE, matching="activations", repair=False)
    report = made.alignment
    assert report["barrier_before"] > 0.1
    assert abs(report["barrier_after"]) < 1e-5
    matches = [all(torch.allclose(made.weights[k], w[k], atol=1e-6) for k in own) for w in (own, shuffled)]
    assert any(matches)


def soup_of(*members: Weights) -> None:
    minima = [minimum(k, own) for k, own in enumerate(members)]
    aligned_soup(minima, trained_model("none"), digits(), RECIPE, matching="weights", repair=True)


def test_members_that_cannot_be_aligned_are_refused_in_a_line():
    own = weights(trained_model("none"))
    with pytest.raises(ValueError, match=r"at least two minima; there are 1: use aggregation\.method=select_best"):
        soup_of(own)
    broken = {**own, "head.bias": torch.full((10,), torch.nan)}
    with pytest.raises(ValueError, match=r"the minimum of subset 1 holds NaN or infinity in head\.bias"):
        soup_of(own, broken)
    other = weights(trained_model("batch"))
    with pytest.raises(ValueError, match="minima of different architectures cannot be averaged"):
        soup_of(own, other)
