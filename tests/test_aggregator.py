"""aggregate() with a real network: what it reports is what was measured, and all of it is counted."""

import math
import sys
from dataclasses import fields, replace
from functools import partial
from types import ModuleType
from typing import get_args, get_type_hints

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from raysubset.aggregation import (
    Aggregate,
    Minimum,
    Scorer,
    aggregate,
    aggregate_round,
    candidates_of_auto,
    methods,
    outer_step,
    select_best,
    ties,
    uniform_soup,
)
from raysubset.aggregation.methods import combine
from raysubset.config import AGGREGATIONS, AggregationConfig, Config, MinimizeConfig, RoundsConfig
from raysubset.data import Examples
from raysubset.quality import ACCURACY
from raysubset.training import (
    Metrics,
    Weights,
    diagonal_fisher,
    evaluate,
    gram_matrices,
    metrics_of_outputs,
    minimize,
    predict,
    recompute_batch_norm,
)
from tests.tiny import cnn, examples, metrics, same_bits, weights

aggregate = partial(aggregate, quality=ACCURACY)
aggregate_round = partial(aggregate_round, quality=ACCURACY)

RECIPE = MinimizeConfig(epochs=6, batch_size=16, learning_rate=0.05)
VALIDATION, CALIBRATION = examples(90, seed=1), examples(120, seed=2)
NUM_CALIBRATION, NUM_VALIDATION = 120, 90


def minimum_of(model: nn.Module, subset_id: int, *, start_id: str = "initial", num_examples: int = 60) -> Minimum:
    own, predictions = weights(model), predict(model, VALIDATION, RECIPE)
    return Minimum(
        subset_id=subset_id,
        num_examples=num_examples,
        start_id=start_id,
        outcome="epochs",
        training=metrics(1.0, 1, 2),
        validation=metrics_of_outputs(predictions, VALIDATION.targets(), VALIDATION.task),
        cost=minimize(cnn(), examples(2), replace(RECIPE, epochs=0.1), seed=0).cost,
        load_weights=lambda: own,
        load_outputs=lambda: predictions,
    )


@pytest.fixture(scope="module")
def minima() -> list[Minimum]:
    """Three, of subsets of their own, from one start."""
    found = []
    for subset_id in range(3):
        model = cnn(seed=0)
        minimize(model, examples(60, seed=10 + subset_id), RECIPE, seed=subset_id)
        found.append(minimum_of(model, subset_id))
    return found


def scorer() -> Scorer:
    return Scorer(cnn(seed=8), calibration=CALIBRATION, validation=VALIDATION, minimize=RECIPE)


def refreshed(own: Weights) -> nn.Module:
    model = cnn()
    model.load_state_dict(own)
    recompute_batch_norm(model, CALIBRATION, RECIPE)
    return model


def measured(own: Weights, data: Examples = VALIDATION) -> Metrics:
    model = cnn()
    model.load_state_dict(own)
    return evaluate(model, data, RECIPE)


def test_a_uniform_soup_is_reported_beside_its_members(minima):
    made = aggregate(minima, AggregationConfig(), scorer())
    model = refreshed(uniform_soup(minima).weights)
    assert same_bits(made.aggregate.weights, weights(model))
    assert made.validation == made.uniform_mean == evaluate(model, VALIDATION, RECIPE)
    assert made.training == evaluate(model, CALIBRATION, RECIPE)
    losses = [m.validation.loss for m in minima]
    assert made.mean_member["loss"] == pytest.approx(sum(losses) / 3)
    assert made.to_dict()["mean_member_accuracy"] == pytest.approx(sum(m.validation.accuracy for m in minima) / 3)
    assert made.best_member.loss == min(losses)
    assert made.barrier == pytest.approx(made.validation.loss - sum(losses) / 3)
    probabilities = torch.stack([m.load_outputs().softmax(1) for m in minima]).mean(0)
    expected = F.nll_loss(probabilities.log(), VALIDATION.targets(), reduction="sum").item()
    assert made.ensemble.loss_sum == pytest.approx(expected, rel=1e-5)
    assert made.ensemble.sums["num_correct"] == (probabilities.argmax(1) == VALIDATION.targets()).sum()


@pytest.mark.parametrize(
    ("method", "num_refreshed", "num_scored"),
    [
        ("uniform_soup", 1, 1),
        ("weighted_soup", 2, 2),  # and the uniform mean beside it
        ("select_best", 1, 2),
    ],
)
def test_all_forward_work_is_counted(minima, method, num_refreshed, num_scored):
    cost = aggregate(minima, AggregationConfig(method=method), scorer()).cost
    # once more over the calibration examples, for the training loss
    assert cost.num_forward == (num_refreshed + 1) * NUM_CALIBRATION + num_scored * NUM_VALIDATION
    assert (cost.num_backward, cost.num_steps) == (0, 0)
    assert cost.device_s > 0


def test_greedy_work_is_counted_for_every_candidate(minima):
    made = aggregate(minima, AggregationConfig(method="greedy_soup"), scorer())
    assert len(made.aggregate.tried) == 3
    num_scored = 2 + 1 + 1  # two candidates, the soup, the uniform mean
    num_refreshed = 2 + (len(made.aggregate.subset_ids) > 1) + 1
    assert made.cost.num_forward == (num_refreshed + 1) * NUM_CALIBRATION + num_scored * NUM_VALIDATION
    assert made.validation.loss <= made.best_member.loss + 1e-6


def test_greedy_scores_means_with_statistics_of_their_own(minima):
    made = aggregate(minima, AggregationConfig(method="greedy_soup"), scorer())
    (ids, loss) = made.aggregate.tried[1]
    by_id = {m.subset_id: m for m in minima}
    pair = uniform_soup([by_id[i] for i in ids])
    assert loss == evaluate(refreshed(pair.weights), VALIDATION, RECIPE).loss


def test_the_best_member_keeps_its_own_statistics(minima):
    made = aggregate(minima, AggregationConfig(method="select_best"), scorer())
    best = min(minima, key=lambda m: m.validation.loss)
    assert same_bits(made.aggregate.weights, best.load_weights())
    assert made.validation == measured(best.load_weights())
    assert made.uniform_mean == evaluate(refreshed(uniform_soup(minima).weights), VALIDATION, RECIPE)


METHODS = [m for m in get_args(get_type_hints(AggregationConfig)["method"]) if m != "auto"]


@pytest.mark.parametrize("method", [*METHODS, "auto"])
def test_the_aggregate_of_one_minimum_is_that_minimum(minima, method):
    made = aggregate(minima[:1], AggregationConfig(method=method), scorer())
    assert same_bits(made.aggregate.weights, minima[0].load_weights())
    assert made.barrier == pytest.approx(0, abs=1e-6)
    assert made.ensemble.loss == pytest.approx(made.validation.loss, rel=1e-5)


def test_a_member_whose_loss_is_no_number_is_never_the_best(minima):
    lost = replace(minima[0], validation=metrics(math.nan, 0, NUM_VALIDATION))
    made = aggregate([lost, *minima[1:]], AggregationConfig(), scorer())
    assert made.best_member == min((m.validation for m in minima[1:]), key=lambda m: m.loss)


@pytest.mark.parametrize("method", ["select_best", "auto"])
def test_beside_a_member_that_holds_nan_the_best_can_be_taken_and_the_plain_mean_is_reported_as_nan(minima, method):
    spoilt = {k: v * math.nan if v.is_floating_point() else v for k, v in minima[0].load_weights().items()}
    lost = replace(minima[0], validation=metrics(math.nan, 0, NUM_VALIDATION), load_weights=lambda: spoilt)
    made = aggregate([lost, *minima[1:]], AggregationConfig(method=method), scorer(), start=START)
    assert made.aggregate.method == "select_best"
    best = min(minima[1:], key=lambda m: m.validation.loss)
    assert made.validation == measured(best.load_weights())
    assert math.isnan(made.uniform_mean.loss)
    assert math.isnan(made.barrier)
    assert all("subset 0 holds NaN" in str(one.error) for one in made.candidates if one.method.endswith("uniform_soup"))


def test_the_report_is_json_without_weights(minima):
    record = aggregate(minima, AggregationConfig(method="greedy_soup"), scorer()).to_dict()
    assert "weights" not in record
    assert record["tried"][0]["validation_loss"] == min(m.validation.loss for m in minima)


@pytest.fixture(scope="module")
def informed(minima: list[Minimum]) -> list[Minimum]:
    """The minima with all that actors can leave beside them."""
    found = []
    for minimum in minima:
        model, own = cnn(), examples(20, seed=10 + minimum.subset_id)
        model.load_state_dict(minimum.load_weights())
        part = cnn(seed=0)
        minimize(part, own, RECIPE, seed=minimum.subset_id)
        left = {
            "fisher": diagonal_fisher(model, own, RECIPE)[0],
            "gram": gram_matrices(model, own, RECIPE)[0],
            "subsample": weights(part),
        }
        found.append(replace(minimum, load_statistics=left.__getitem__))
    return found


START = weights(cnn(seed=0))


@pytest.mark.parametrize("method", ["fisher", "regmean", "ties", "dare", "savgm"])
def test_every_method_is_dispatched_refreshed_and_counted(informed, method):
    config = AggregationConfig(method=method)
    made = aggregate(informed, config, scorer(), start=START, seed=4)
    assert made.aggregate.method == method
    assert not same_bits(made.aggregate.weights, aggregate(informed, AggregationConfig(), scorer()).aggregate.weights)
    model = refreshed(made.aggregate.weights)
    assert made.validation == evaluate(model, VALIDATION, RECIPE)
    assert made.cost.num_forward == 3 * NUM_CALIBRATION + 2 * NUM_VALIDATION  # as the weighted soup


def test_the_settings_reach_the_methods(informed):
    config = AggregationConfig(method="ties", ties_density=0.3, task_scale=0.5)
    made = aggregate(informed, config, scorer(), start=START)
    by_hand = ties(informed, START, density=0.3, scale=0.5, parameter_names=PARAMETERS)
    assert same_bits(made.aggregate.weights, weights(refreshed(by_hand.weights)))
    dropped = [
        aggregate(informed, AggregationConfig(method="dare"), scorer(), start=START, seed=seed).aggregate.weights
        for seed in (1, 1, 2)
    ]
    assert same_bits(dropped[0], dropped[1])
    assert not same_bits(dropped[0], dropped[2])


OTHER_SETTINGS = {
    "weight_by": "validation_loss",
    "regmean_factor": 0.1,
    "ties_density": 0.9,
    "dare_drop": 0.9,
    "task_scale": 0.3,
    "savgm_fraction": 0.6,
    "matching": "activations",
    "repair": False,
}
OF_STATISTICS = {"statistics_examples", "fisher_labels"}  # which members take with these settings


@pytest.mark.parametrize("name", sorted(set(AGGREGATIONS) - {"auto", "aligned_soup"}))
def test_a_method_uses_the_settings_that_it_names_and_no_others(informed, name):
    names = {field.name for field in fields(AggregationConfig)} - {"method", "allow_independent"}
    assert OTHER_SETTINGS.keys() == names - OF_STATISTICS

    def aggregated(**settings: object) -> Weights:
        return combine(informed, AggregationConfig(method=name, **settings), scorer(), start=START, seed=4).weights

    usual = aggregated()
    used = {key for key, value in OTHER_SETTINGS.items() if not same_bits(aggregated(**{key: value}), usual)}
    method = methods(AggregationConfig())[name]
    assert used == set(method.settings) - OF_STATISTICS
    assert bool(method.needs.statistics) is not OF_STATISTICS.isdisjoint(method.settings)


def test_auto_takes_the_candidate_of_least_validation_loss_and_records_all(informed):
    judge = scorer()
    made = aggregate(informed, AggregationConfig(method="auto"), judge, start=START)
    assert [one.method for one in made.candidates] == list(candidates_of_auto(shared_start=True))
    for one in made.candidates:
        alone = aggregate(informed, AggregationConfig(method=one.method), scorer(), start=START)
        assert one.validation == alone.validation
        assert one.cost.num_forward > 0
        assert one.cost.device_s > 0
    best = min(made.candidates, key=lambda one: one.validation.loss)
    assert (made.aggregate.method, made.validation) == (best.method, best.validation)
    assert made.validation == measured(made.aggregate.weights)
    # beside the candidates only the training loss of the one taken: the plain mean is among them
    assert made.cost.num_forward == sum(one.cost.num_forward for one in made.candidates) + NUM_CALIBRATION
    uniform = made.candidates[0]
    assert (uniform.method, made.uniform_mean) == ("uniform_soup", uniform.validation)
    record = made.to_dict()["candidates"]
    assert [one["method"] for one in record] == [one.method for one in made.candidates]


def test_a_candidate_that_is_refused_is_recorded_with_the_reason(minima):
    made = aggregate(minima, AggregationConfig(method="auto"), scorer())
    refused = {one.method: one.error for one in made.candidates if one.validation is None}
    assert set(refused) == {"fisher", "regmean", "ties", "dare"}
    assert "no fisher statistics" in refused["fisher"]
    assert "needs the weights that the minima started from" in refused["ties"]
    assert made.validation.loss == min(one.validation.loss for one in made.candidates if one.validation)


@pytest.fixture
def fake_alignment(monkeypatch):
    """aligned_soup() of the agreed signature: the best member, for 77 examples of work."""

    def aligned_soup(minima, model, examples, minimize, *, matching, repair) -> Aggregate:
        assert (matching, len(examples)) == ("weights", NUM_CALIBRATION)
        ids = tuple(minimum.subset_id for minimum in minima)
        report = {"barrier_before": 2.0, "barrier_after": 0.5, "num_forward": 77}
        made = replace(select_best(minima), method="aligned_soup", subset_ids=ids, coefficients=(1 / 3,) * 3)
        return replace(made, alignment=report)

    module = ModuleType("raysubset.aggregation.alignment")
    module.aligned_soup = aligned_soup  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "raysubset.aggregation.alignment", module)


@pytest.mark.parametrize(("repair", "num_refreshed"), [(True, 0), (False, 1)])
def test_an_aligned_soup_comes_repaired_or_is_refreshed_and_its_work_is_counted(
    minima, fake_alignment, repair, num_refreshed
):
    apart = [replace(minimum, start_id=str(minimum.subset_id)) for minimum in minima]
    config = AggregationConfig(method="aligned_soup", matching="weights", repair=repair)
    made = aggregate(apart, config, scorer())
    assert made.aggregate.alignment == {"barrier_before": 2.0, "barrier_after": 0.5, "num_forward": 77}
    best = select_best(minima).weights
    assert same_bits(made.aggregate.weights, weights(refreshed(best)) if num_refreshed else best)
    num_refreshed += 2  # of the plain mean beside it; and for the training loss
    assert made.cost.num_forward == 77 + num_refreshed * NUM_CALIBRATION + 2 * NUM_VALIDATION


def test_auto_looks_only_at_what_independent_starts_allow(minima, fake_alignment):
    apart = [replace(minimum, start_id=str(minimum.subset_id)) for minimum in minima]
    made = aggregate(apart, AggregationConfig(method="auto", matching="weights"), scorer())
    assert [one.method for one in made.candidates] == ["select_best", "aligned_soup"]
    assert made.aggregate.method == "select_best"  # of equal ones the first
    assert made.aggregate.alignment is None


def test_auto_without_any_usable_candidate_says_why(minima):
    bad = [replace(m, load_weights=lambda: {"w": torch.tensor([math.nan])}) for m in minima]
    with pytest.raises(ValueError, match=r"none of auto's candidates can be used: uniform_soup: .* holds NaN"):
        aggregate(bad, AggregationConfig(method="auto"), scorer())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ties_density", 0.0),
        ("ties_density", 1.1),
        ("dare_drop", 1.0),
        ("dare_drop", -0.1),
        ("task_scale", 0.0),
        ("savgm_fraction", 1.0),
        ("regmean_factor", 1.5),
        ("statistics_examples", 0),
    ],
)
def test_settings_out_of_range_are_refused_with_their_value(field, value):
    with pytest.raises(ValueError, match=f"aggregation.{field} = {value} must be"):
        AggregationConfig(**{field: value})


PARAMETERS = frozenset(name for name, _ in cnn().named_parameters())


def test_a_round_without_outer_step_is_its_aggregate(minima):
    config = Config(minimize=RECIPE)
    made, momentum = aggregate_round(minima, config, scorer(), start=weights(cnn(seed=0)), momentum={})
    plain = aggregate(minima, config.aggregation, scorer())
    assert same_bits(made.aggregate.weights, plain.aggregate.weights)
    assert momentum == {}


def test_an_outer_step_is_refreshed_measured_and_counted(minima):
    config = Config(minimize=RECIPE, rounds=RoundsConfig(num=2, outer_learning_rate=0.7, outer_momentum=0.5))
    start, before = weights(cnn(seed=0)), {name: torch.full_like(p, 0.01) for name, p in cnn().named_parameters()}
    before = {name: value.detach() for name, value in before.items()}
    made, momentum = aggregate_round(minima, config, scorer(), start=start, momentum=before)
    plain = aggregate(minima, config.aggregation, scorer())
    stepped, expected = outer_step(
        start, plain.aggregate.weights, before, learning_rate=0.7, momentum_factor=0.5, parameter_names=PARAMETERS
    )
    model = refreshed(stepped)
    assert same_bits(momentum, expected)
    assert same_bits(made.aggregate.weights, weights(model))
    assert made.validation == evaluate(model, VALIDATION, RECIPE)
    assert made.training == evaluate(model, CALIBRATION, RECIPE)
    assert (made.uniform_mean, made.barrier) == (plain.uniform_mean, plain.barrier)
    assert made.cost.num_forward == plain.cost.num_forward + NUM_CALIBRATION + NUM_VALIDATION  # refreshed and scored


@pytest.mark.parametrize("rates", [{}, {"outer_learning_rate": 0.7, "outer_momentum": 0.5}])
def test_a_round_that_is_not_measured_has_the_same_parameters_and_no_forward_work(minima, rates):
    config = Config(minimize=RECIPE, rounds=RoundsConfig(num=4, evaluate_every=2, **rates))
    unmeasured = [replace(minimum, validation=None) for minimum in minima]
    judge, given = scorer(), {"start": weights(cnn(seed=0)), "momentum": {}}
    made, momentum = aggregate_round(unmeasured, config, judge, **given, measures=())
    measured, expected = aggregate_round(minima, config, scorer(), **given)
    assert same_bits(momentum, expected)
    for name in PARAMETERS:
        assert torch.equal(made.aggregate.weights[name], measured.aggregate.weights[name])
    assert made.cost.num_forward == judge.cost().num_forward == 0
    record = made.to_dict()
    assert record.keys() == measured.to_dict().keys()
    assert record["validation"] is record["barrier"] is record["training"] is None
    with pytest.raises(ValueError, match="was not measured"):
        aggregate_round(unmeasured, config, judge, **given)
    auto = replace(config, rounds=RoundsConfig(), aggregation=AggregationConfig(method="auto"))
    with pytest.raises(ValueError, match="auto chooses by validation"):
        aggregate_round(minima, auto, judge, **given, measures=())


def permuted(model: nn.Module) -> nn.Module:
    """The same function, with the units of both blocks in another order."""
    own, other = weights(model), cnn()
    first, second = torch.tensor([2, 3, 1, 0]), torch.tensor([5, 7, 6, 0, 1, 4, 2, 3])
    for name, value in own.items():
        if name.startswith("block0") and value.ndim:
            own[name] = value[first]
        if name.startswith("block1") and value.ndim:
            own[name] = own[name][second]
    own["block1.conv.weight"] = own["block1.conv.weight"][:, first]
    own["head.weight"] = own["head.weight"][:, second]
    other.load_state_dict(own)
    return other


def test_minima_that_differ_by_the_order_of_their_units_have_a_useless_mean_that_is_flagged():
    model = cnn(seed=0)
    minimize(model, examples(400, seed=3), replace(RECIPE, epochs=40), seed=0)
    pair = [minimum_of(model, 0, start_id="a"), minimum_of(permuted(model), 1, start_id="b")]
    assert pair[1].validation.loss == pytest.approx(pair[0].validation.loss, rel=1e-5)
    with pytest.raises(ValueError, match="share no start"):
        aggregate(pair, AggregationConfig(), scorer())
    made = aggregate(pair, AggregationConfig(allow_independent=True), scorer())
    assert not made.aggregate.shared_start
    assert made.barrier > 0.2
    assert made.validation.accuracy < made.best_member.accuracy - 0.1
    assert made.ensemble.loss == pytest.approx(pair[0].validation.loss, rel=1e-5)
