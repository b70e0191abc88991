"""Means, choices and outer steps of weights, against torch's own and closed forms."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raysubset.aggregation import (
    Aggregate,
    Context,
    Minimum,
    barrier,
    dare,
    ensemble_outputs,
    fisher_merge,
    greedy_soup,
    mean_optimizer_state,
    outer_step,
    regmean,
    savgm,
    select_best,
    shares_start,
    shrink_perturb,
    ties,
    uniform_soup,
    weighted_soup,
)
from raysubset.aggregation.methods import combine_in
from raysubset.config import AggregationConfig
from raysubset.training import Cost, Metrics, Weights
from tests.tiny import SQUARED_ERROR, cnn, examples, metrics, same_bits, weights


def minimum(
    subset_id: int,
    own: Weights,
    *,
    loss: float = 1.0,
    num_examples: int = 10,
    start_id: str = "initial",
    predictions: Tensor | None = None,
    load: Callable[[], Weights] | None = None,
) -> Minimum:
    return Minimum(
        subset_id=subset_id,
        num_examples=num_examples,
        start_id=start_id,
        outcome="epochs",
        training=metrics(1.0, 1, 2),
        validation=metrics(10 * loss, 5, 10),
        cost=Cost(),
        load_weights=load or (lambda: own),
        load_outputs=lambda: torch.zeros(0) if predictions is None else predictions,
    )


def points(*values: float, losses: Sequence[float] | None = None, **fields: Any) -> list[Minimum]:
    """Minima of a single weight each."""
    losses = losses or [1.0] * len(values)
    return [
        minimum(i, {"w": torch.tensor([value])}, loss=loss, **fields)
        for i, (value, loss) in enumerate(zip(values, losses, strict=True))
    ]


def networks(num: int) -> list[nn.Module]:
    """Of other weights and other batch-norm counters each."""
    models = [cnn(seed=seed) for seed in range(num)]
    for seed, model in enumerate(models):
        model.block0.norm.num_batches_tracked.fill_(seed + 5)  # type: ignore[union-attr, operator]
    return models


def test_the_uniform_soup_is_torchs_averaged_model():
    models = networks(4)
    averaged = torch.optim.swa_utils.AveragedModel(models[0])
    for model in models:
        averaged.update_parameters(model)
    soup = uniform_soup([minimum(i, weights(model)) for i, model in enumerate(models)])
    for name, value in averaged.module.named_parameters():
        torch.testing.assert_close(soup.weights[name], value.detach())
    assert (soup.subset_ids, soup.coefficients, soup.shared_start) == ((0, 1, 2, 3), (0.25,) * 4, True)


def test_integer_buffers_are_the_first_members():
    soup = uniform_soup([minimum(i, weights(model)) for i, model in enumerate(networks(3))])
    assert soup.weights["block0.norm.num_batches_tracked"].item() == 5
    assert soup.weights["block0.norm.num_batches_tracked"].dtype == torch.int64


def test_a_mean_weighted_by_examples_is_the_mean_over_examples():
    minima = [
        minimum(0, {"w": torch.tensor([1.0])}, num_examples=30),
        minimum(1, {"w": torch.tensor([5.0])}, num_examples=10),
    ]
    soup = weighted_soup(minima, weight_by="examples")
    assert soup.weights["w"].item() == (30 * 1 + 10 * 5) / 40
    assert soup.coefficients == (0.75, 0.25)


def test_a_mean_weighted_by_validation_loss_trusts_the_lower_more():
    soup = weighted_soup(points(1.0, 4.0, losses=[0.5, 1.0]), weight_by="validation_loss")
    assert soup.weights["w"].item() == pytest.approx((2 * 1 + 1 * 4) / 3)
    assert soup.coefficients == pytest.approx((2 / 3, 1 / 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    values = [1.0, *[1.0 + 2 * torch.finfo(dtype).eps] * 63]
    minima = [minimum(i, {"w": torch.tensor([value], dtype=dtype)}) for i, value in enumerate(values)]
    soup = uniform_soup(minima).weights["w"]
    naive = torch.tensor([1.0], dtype=dtype)
    for i, value in enumerate(values[1:], start=2):
        naive.lerp_(torch.tensor([value], dtype=dtype), 1 / i)
    nearest = torch.tensor([sum(values) / 64], dtype=dtype)
    assert soup.dtype == dtype
    assert torch.equal(soup, nearest)
    assert not torch.equal(naive, nearest)  # a running mean in half precision falls short


@pytest.mark.parametrize("num", [1, 3, 7])
def test_identical_members_have_themselves_as_their_mean(num):
    own = weights(cnn())
    minima = [minimum(i, own, loss=i + 1) for i in range(num)]
    assert same_bits(uniform_soup(minima).weights, own)
    assert same_bits(weighted_soup(minima, weight_by="validation_loss").weights, own)


def test_the_order_of_members_only_rounds_and_the_same_order_gives_the_same_bits():
    minima = [minimum(i, weights(model)) for i, model in enumerate(networks(5))]
    forth, again, back = (uniform_soup(order).weights for order in (minima, minima, minima[::-1]))
    assert same_bits(forth, again)
    for name, value in forth.items():
        if value.is_floating_point():
            torch.testing.assert_close(back[name], value, rtol=1e-5, atol=1e-7)


def test_a_mean_changes_no_member():
    models = [weights(model) for model in networks(3)]
    before = [{k: v.clone() for k, v in own.items()} for own in models]
    soup = uniform_soup([minimum(i, own) for i, own in enumerate(models)])
    soup.weights["head.bias"].fill_(99)
    assert same_bits(models, before)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors alive that it has seen, those given left out, and the most they came to."""

    def __init__(self, *given: Weights) -> None:
        super().__init__()
        self.most = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._others = {key for key, _ in self._storages(given)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        seen = self._storages((args, kwargs, result))  # numpy's arrays are seen first as arguments
        new = {k: (StorageWeakRef(s), s.nbytes()) for k, s in seen if k not in self._others}
        self._alive = {key: own for key, own in (self._alive | new).items() if not own[0].expired()}
        self.most = max(self.most, sum(nbytes for _, nbytes in self._alive.values()))
        return result

    @staticmethod
    def _storages(tree: Any) -> list[tuple[int, torch.UntypedStorage]]:
        tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.device.type == "cpu"]
        return [(tensor.untyped_storage()._cdata, tensor.untyped_storage()) for tensor in tensors]


SIZE = 2**20
START = {"w": torch.zeros(SIZE)}
STREAMED: dict[str, tuple[Callable[[Sequence[Minimum]], Aggregate], int, float]] = {  # with reads, and sizes held
    "uniform_soup": (uniform_soup, 1, 1 + 1),
    "weighted_soup": (lambda minima: weighted_soup(minima, weight_by="examples"), 1, 1 + 1),
    "greedy_soup": (lambda minima: greedy_soup(minima, lambda _: metrics(0.0, 0, 1)), 1, 2 + 1),
    # beside a member's weights the next one's, or the statistics of both and what they weigh
    "fisher": (lambda minima: fisher_merge(minima, floor=1e-6), 1, 2 + 4),
    "regmean": (lambda minima: regmean(minima, factor=0.9), 1, 1 + 2),
    "ties": (lambda minima: ties(minima, START, density=0.5, scale=1.0, parameter_names={"w"}), 1, 2.5 + 3),
    "dare": (lambda minima: dare(minima, START, drop=0.5, scale=1.0, seed=0, parameter_names={"w"}), 1, 1 + 2),
    "savgm": (lambda minima: savgm(minima, fraction=0.5, parameter_names={"w"}), 1, 1 + 3),
}


@pytest.mark.parametrize("name", STREAMED)
def test_memory_does_not_grow_with_the_number_of_members(name):
    method, num_reads, num_held = STREAMED[name]
    loaded: list[int] = []

    def load(subset_id: int) -> Weights:
        loaded.append(subset_id)
        return {"w": torch.linspace(subset_id, -1.0, SIZE)}

    def statistics(kind: str) -> Weights:
        return {} if kind == "gram" else {"w": torch.ones(SIZE)}

    for num in (2, 5):
        loaded.clear()
        minima = [
            replace(minimum(i, {}, load=functools.partial(load, i)), load_statistics=statistics) for i in range(num)
        ]
        with LiveBytes(START) as bytes_:
            method(minima)
        assert loaded == num_reads * list(range(num))
        assert num_held - 1 < bytes_.most / (4 * SIZE) < num_held + 1  # blocks are a quarter of it


def scores(by_value: dict[float, float]) -> Callable[[Weights], Metrics]:
    return lambda own: metrics(by_value[round(own["w"].item(), 6)], 0, 1)


def test_greedy_adds_in_order_of_validation_loss_what_does_not_make_the_mean_worse():
    minima = points(0.0, 8.0, 2.0, 5.0, losses=[0.30, 0.40, 0.10, 0.20])
    # 2 alone 0.10; with 5 → 3.5: 0.12, worse; with 0 → 1: 0.05, better; with 8 → 10/3: 0.05, as good
    score = scores({3.5: 0.12, 1.0: 0.05, round(10 / 3, 6): 0.05})
    soup = greedy_soup(minima, score)
    assert soup.subset_ids == (2, 0, 1)
    assert soup.coefficients == (1 / 3,) * 3
    assert soup.weights["w"].item() == pytest.approx(10 / 3)
    assert soup.tried == (((2,), 0.10), ((2, 3), 0.12), ((2, 0), 0.05), ((2, 0, 1), 0.05))


def test_greedy_keeps_the_best_alone_where_nothing_helps():
    soup = greedy_soup(points(1.0, 3.0, losses=[0.1, 0.2]), scores({2.0: math.nan}))
    assert (soup.subset_ids, soup.coefficients) == ((0,), (1.0,))
    assert soup.weights["w"].item() == 1.0


def test_greedy_of_one_scores_nothing():
    assert greedy_soup(points(3.0), scores({})).weights["w"].item() == 3.0


def test_the_best_is_that_of_least_loss_and_losses_that_are_no_number_come_last():
    minima = points(1.0, 2.0, 3.0, 4.0, losses=[math.nan, math.inf, 0.4, 0.3])
    for order in (minima, minima[::-1]):
        best = select_best(order)
        assert (best.subset_ids, best.coefficients) == ((3,), (1.0,))
        assert best.weights["w"].item() == 4.0


def test_a_tie_goes_to_the_lower_subset_id():
    assert select_best(points(1.0, 2.0)[::-1]).subset_ids == (0,)


def test_the_best_of_independent_starts_is_labelled_and_allowed():
    minima = [replace(m, start_id=str(m.subset_id)) for m in points(1.0, 2.0)]
    assert not select_best(minima).shared_start


AVERAGES = {
    "uniform_soup": uniform_soup,
    "weighted_soup": lambda minima: weighted_soup(minima, weight_by="examples"),
    "greedy_soup": lambda minima: greedy_soup(minima, lambda _: metrics(0.0, 0, 1)),
}


@pytest.mark.parametrize("name", ["uniform_soup", "weighted_soup", "greedy_soup", "fisher", "regmean", "savgm"])
def test_a_mean_of_independent_starts_is_refused_or_labelled(name):
    minima = [replace(m, start_id=str(m.subset_id)) for m in points(1.0, 2.0)]
    statistics = {"fisher": {"w": torch.ones(1)}, "gram": {}, "subsample": {"w": torch.ones(1)}}
    minima = [replace(m, load_statistics=statistics.__getitem__) for m in minima]
    context = Context(None, frozenset({"w"}), lambda _: metrics(0.0, 0, 1), lambda _: pytest.fail("aligned"), 0)
    assert not shares_start(minima)
    with pytest.raises(ValueError, match=f"{name} averages minima that share no start, .* use subsets.start=shared"):
        combine_in(context, minima, AggregationConfig(method=name))
    soup = combine_in(context, minima, AggregationConfig(method=name, allow_independent=True, savgm_fraction=0.5))
    assert not soup.shared_start
    assert soup.weights["w"].item() == pytest.approx(2.0 if name == "savgm" else 1.5)


@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"v": torch.ones(1)}, "different architectures cannot be averaged: v is in one and not in the other"),
        ({"w": torch.ones(1), "v": torch.ones(1)}, "v is in one and not in the other"),
        ({"w": torch.ones(2)}, r"w is \(1,\) in one and \(2,\) in another"),
        ({"w": torch.tensor([math.nan])}, "the minimum of subset 1 holds NaN or infinity in w: lower minimize"),
        ({"w": torch.tensor([math.inf])}, "the minimum of subset 1 holds NaN or infinity in w: lower minimize"),
    ],
)
def test_members_that_do_not_fit_are_refused_in_one_line(name, other, message):
    with pytest.raises(ValueError, match=message) as caught:
        AVERAGES[name]([minimum(0, {"w": torch.ones(1)}), minimum(1, other)])
    assert "\n" not in str(caught.value)


def test_losses_that_are_no_numbers_are_refused_where_they_decide():
    with pytest.raises(ValueError, match="none of the 2 minima has a finite validation loss"):
        select_best(points(1.0, 2.0, losses=[math.nan, math.inf]))
    with pytest.raises(ValueError, match="no minimum to choose from"):
        select_best([])
    with pytest.raises(
        ValueError, match="subset 1 has a validation loss of nan, and weights by the inverse need finite"
    ):
        weighted_soup(points(1.0, 2.0, losses=[0.1, math.nan]), weight_by="validation_loss")
    with pytest.raises(ValueError, match=r"subset 0 has a validation loss of -0\.1, and weights by the inverse need"):
        weighted_soup(points(1.0, 2.0, 3.0, losses=[-0.1, -0.5, 2.0]), weight_by="validation_loss")


def test_a_loss_of_0_has_all_the_weight():
    soup = weighted_soup(points(1.0, 4.0, losses=[0.5, 0.0]), weight_by="validation_loss")
    assert soup.weights["w"].item() == pytest.approx(4.0)


def test_the_barrier_is_the_means_loss_less_the_mean_loss():
    assert barrier(metrics(30.0, 0, 10), points(0.0, 0.0, losses=[1.0, 2.0])) == pytest.approx(3.0 - 1.5)


def test_the_ensemble_is_the_mean_of_predictions():
    one, two = torch.tensor([[0.2, 0.8]]), torch.tensor([[0.6, 0.4]])
    logits = [minimum(0, {}, predictions=one.log() + 3), minimum(1, {}, predictions=two.log() - 5)]
    mean = torch.tensor([[0.4, 0.6]], dtype=torch.float64)
    torch.testing.assert_close(ensemble_outputs(logits, examples(1).task).exp(), mean, rtol=1e-6, atol=0)
    outputs = [minimum(0, {}, predictions=one), minimum(1, {}, predictions=two)]
    torch.testing.assert_close(
        ensemble_outputs(outputs, examples(1, objective=SQUARED_ERROR).task), mean, rtol=1e-6, atol=0
    )
    torch.testing.assert_close(one, torch.tensor([[0.2, 0.8]]))


@pytest.mark.parametrize(("learning_rate", "momentum_factor"), [(0.7, 0.9), (1.0, 0.5), (0.4, 0.0), (1.3, 0.6)])
def test_the_outer_step_is_torchs_nesterov_sgd_on_the_displacement(learning_rate, momentum_factor):
    start = {"w": torch.randn(5, generator=torch.Generator().manual_seed(0)), "count": torch.tensor(3)}
    parameter = nn.Parameter(start["w"].clone())
    sgd = torch.optim.SGD([parameter], lr=learning_rate, momentum=momentum_factor, nesterov=momentum_factor > 0)
    momentum: Weights = {}
    for round_id in range(5):
        pull = torch.randn(5, generator=torch.Generator().manual_seed(round_id + 1))
        mean = {"w": start["w"] * 0.9 + 0.1 * pull, "count": torch.tensor(round_id)}
        parameter.grad = parameter.detach() - (parameter.detach() * 0.9 + 0.1 * pull)
        sgd.step()
        start, momentum = outer_step(
            start, mean, momentum, learning_rate=learning_rate, momentum_factor=momentum_factor, parameter_names=["w"]
        )
        torch.testing.assert_close(start["w"], parameter.detach())
        assert start["count"].item() == round_id  # buffers are the mean's
        assert set(momentum) == {"w"}


def states_of(optimizer: type[torch.optim.Optimizer], num: int, **options: Any) -> list[dict[str, Any]]:
    """State dicts after a step on gradients of its own each, two for the last."""
    states = []
    for member in range(num):
        parameter = nn.Parameter(torch.zeros(3))
        steps = optimizer([parameter], lr=0.1, **options)
        for step in range(1 + (member == num - 1)):
            parameter.grad = torch.full((3,), float(member + step))
            steps.step()
        states.append(steps.state_dict())
    return states


def test_optimizer_states_are_averaged_by_moment_and_counters_stay():
    states = states_of(torch.optim.Adam, 3)
    mean = mean_optimizer_state(iter(states))
    for name in ("exp_avg", "exp_avg_sq"):
        expected = torch.stack([state["state"][0][name] for state in states]).mean(0)
        torch.testing.assert_close(mean["state"][0][name], expected)
    assert mean["state"][0]["step"].item() == 1
    assert mean["param_groups"] == states[0]["param_groups"]
    momentum = mean_optimizer_state(states_of(torch.optim.SGD, 3, momentum=0.9))["state"][0]["momentum_buffer"]
    assert momentum.tolist() == pytest.approx([(0 + 1 + (0.9 * 2 + 3)) / 3] * 3)


def test_members_that_began_anew_are_left_out_of_the_mean_of_optimizer_states():
    one, two = states_of(torch.optim.Adam, 2)
    fresh = {**one, "state": {}}
    mean = mean_optimizer_state([fresh, one, two])
    assert same_bits(mean, mean_optimizer_state([one, two]))
    assert mean_optimizer_state([fresh, fresh]) == fresh
    plain = states_of(torch.optim.SGD, 2)  # without momentum there is nothing to average
    assert mean_optimizer_state(plain) == plain[0]
    with pytest.raises(ValueError, match="no optimizer state to average"):
        mean_optimizer_state([])


def test_the_outer_step_of_rate_one_without_momentum_is_the_mean():
    start, mean = weights(cnn(seed=0)), weights(cnn(seed=1))
    names = [name for name, _ in cnn().named_parameters()]
    stepped, _ = outer_step(start, mean, {}, learning_rate=1.0, momentum_factor=0.0, parameter_names=names)
    for name, value in mean.items():
        torch.testing.assert_close(stepped[name], value, rtol=0, atol=1e-7)


def test_shrink_perturb_mixes_parameters_and_leaves_buffers():
    own, fresh = weights(cnn(seed=0)), weights(cnn(seed=1))
    own["block0.norm.running_mean"].fill_(7)
    names = {name for name, _ in cnn().named_parameters()}
    mixed = shrink_perturb(own, fresh, shrink=0.4, perturb=0.1, parameter_names=names)
    assert mixed.keys() == own.keys()
    for name, value in mixed.items():
        torch.testing.assert_close(value, 0.4 * own[name] + 0.1 * fresh[name] if name in names else own[name])
    assert mixed["block0.norm.running_mean"].tolist() == [7] * 4


def test_of_quadratics_of_equal_curvature_the_mean_of_minima_is_the_whole_sets_minimum():
    generator = torch.Generator().manual_seed(0)
    factor, minima = torch.randn(6, 6, generator=generator), torch.randn(5, 6, generator=generator)
    curvature = factor @ factor.T + torch.eye(6)

    def gradient(point: Tensor) -> Tensor:
        return sum((curvature @ (point - own) for own in minima), torch.zeros(6))

    soup = uniform_soup([minimum(i, {"w": own}) for i, own in enumerate(minima)]).weights["w"]
    assert gradient(soup).abs().max() < 1e-4
    assert gradient(minima[0]).abs().max() > 1
