"""The methods by name, including the user's own, and the choice among them by auto."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from raysubset.aggregation.curvature import fisher_merge, regmean
from raysubset.aggregation.records import Aggregate, Context, Method, Minimum, Needs
from raysubset.aggregation.scorer import Scorer
from raysubset.aggregation.soups import greedy_soup, select_best, uniform_soup, weighted_soup
from raysubset.aggregation.streaming import load_member, refuse_not_finite, refuse_other_architecture, shares_start
from raysubset.aggregation.task_vectors import dare, savgm, ties
from raysubset.config import AggregationConfig, Config
from raysubset.training import Metrics, Weights
from raysubset.user_code.functions import call_function, load_function

_FIELD = "aggregation.method"


def methods(config: AggregationConfig) -> dict[str, Method]:
    """Return all built-in methods, with the config's settings."""

    def differences(context: Context) -> dict[str, Any]:
        if context.start is None:
            raise ValueError(f"{config.method} needs the weights that the minima started from")
        return {"start": context.start, "scale": config.task_scale, "parameter_names": context.parameter_names}

    by_loss = Needs(validation=config.weight_by == "validation_loss")
    greedy = Needs(validation=True, forward=lambda num, sizes: num * (sizes.refreshing + sizes.validation))
    best = Needs(shared_start=False, validation=True, forward=lambda num, sizes: sizes.validation)
    aligned = Needs(
        shared_start=False, forward=lambda num, sizes: 2 * num * sizes.calibration + sizes.refreshing + sizes.validation
    )
    statistics = "statistics_examples"
    return {
        "uniform_soup": Method(lambda minima, _: uniform_soup(minima)),
        "weighted_soup": Method(
            lambda minima, _: weighted_soup(minima, weight_by=config.weight_by), by_loss, ("weight_by",)
        ),
        "greedy_soup": Method(lambda minima, context: greedy_soup(minima, context.score), greedy),
        "select_best": Method(lambda minima, _: select_best(minima), best),
        "fisher": Method(
            lambda minima, _: fisher_merge(minima), Needs(statistics=("fisher",)), (statistics, "fisher_labels")
        ),
        "regmean": Method(
            lambda minima, _: regmean(minima, factor=config.regmean_factor),
            Needs(statistics=("gram",)),
            (statistics, "regmean_factor"),
        ),
        "ties": Method(
            lambda minima, context: ties(minima, density=config.ties_density, **differences(context)),
            settings=("ties_density", "task_scale"),
        ),
        "dare": Method(
            lambda minima, context: dare(minima, drop=config.dare_drop, seed=context.seed, **differences(context)),
            settings=("dare_drop", "task_scale"),
        ),
        "savgm": Method(
            lambda minima, context: savgm(
                minima, fraction=config.savgm_fraction, parameter_names=context.parameter_names
            ),
            Needs(parts=True),
            ("savgm_fraction",),
        ),
        "aligned_soup": Method(lambda minima, context: context.align(minima), aligned, ("matching", "repair")),
        "auto": Method(_refuse_unmeasured, Needs(shared_start=False, validation=True)),
    }


def method_of(config: AggregationConfig) -> Method:
    """Return the config's method.

    Raises:
        ValueError: if it is the user's and cannot be loaded.
    """
    return _users(config) if ":" in config.method else methods(config)[config.method]


def methods_tried(config: Config) -> dict[str, Method]:
    """Return the config's method by its name, or the methods that auto tries; of equal results auto takes the first.

    auto does not try savgm, whose second minimization of every subset costs more than it is likely to gain. It tries
    aligned_soup only if plain means are useless: after a shared start units correspond as they are.
    """
    if config.aggregation.method == "auto":
        all_methods = methods(config.aggregation)
        return {name: all_methods[name] for name in candidates_of_auto(shared_start=config.subsets.start == "shared")}
    return {config.aggregation.method: method_of(config.aggregation)}


def candidates_of_auto(*, shared_start: bool) -> tuple[str, ...]:
    """Return the names of the methods that auto tries: see methods_tried()."""
    if not shared_start:
        return ("select_best", "aligned_soup")
    return ("uniform_soup", "weighted_soup", "greedy_soup", "select_best", "fisher", "regmean", "ties", "dare")


def statistics_of(config: Config) -> tuple[str, ...]:
    """Return the kinds of statistics that actors leave with a minimum, for the config's method or those of auto."""
    return tuple(dict.fromkeys(kind for method in methods_tried(config).values() for kind in method.needs.statistics))


def refuse_contradictions(config: Config) -> None:
    """Raise a ValueError if the config's method cannot have what it needs."""
    name, needs = config.aggregation.method, method_of(config.aggregation).needs
    _refuse_independent(config.aggregation, shared_start=config.subsets.start == "shared")
    if config.rounds.overlaps and (needs.validation or needs.statistics or needs.parts):
        raise ValueError(
            f"aggregation.method={name} goes by measurements where minima ended, and rounds.overlap moves minima "
            "before they are aggregated: use uniform_soup, ties or dare, or leave rounds.overlap out"
        )
    if config.rounds.num > 1 and config.rounds.evaluate_every > 1 and needs.validation:
        raise ValueError(
            f"aggregation.method={name} chooses by validation in every round: set rounds.evaluate_every to 1"
        )


def _refuse_independent(config: AggregationConfig, *, shared_start: bool) -> None:
    if method_of(config).needs.shared_start and not (shared_start or config.allow_independent):
        raise ValueError(
            f"{config.method} averages minima that share no start, which gives a useless mean: use "
            "subsets.start=shared, aggregation.method=aligned_soup or select_best, or aggregation.allow_independent to "
            "average them anyway"
        )


def combine_and_score(
    minima: Sequence[Minimum], config: AggregationConfig, scorer: Scorer, *, start: Weights | None, seed: int
) -> tuple[Aggregate, Metrics]:
    """Return combine() with correct batch-norm statistics, and its validation metrics."""
    aggregate = combine(minima, config, scorer, start=start, seed=seed)
    # a single member's statistics are its own, and REPAIR has set the statistics of an aligned soup
    if len(aggregate.subset_ids) > 1 and not (aggregate.alignment and config.repair):
        aggregate = replace(aggregate, weights=scorer.refreshed(aggregate.weights))
    return aggregate, scorer.score_as_is(aggregate.weights)


def combine(
    minima: Sequence[Minimum], config: AggregationConfig, scorer: Scorer, *, start: Weights | None, seed: int
) -> Aggregate:
    """Return the aggregate by the config's method, any but auto. A single minimum is its own aggregate.

    Batch-norm statistics are what the method computes from the members' own. Arguments and errors are aggregate()'s.
    """
    if len(minima) == 1:
        return replace(uniform_soup(minima), method=config.method)
    return combine_in(scorer.context(config, start=start, seed=seed), minima, config)


def combine_in(context: Context, minima: Sequence[Minimum], config: AggregationConfig) -> Aggregate:
    """Return the aggregate by the config's method. It is refused if the method averages and minima share no start.

    Tied weights have one value, their last name's: a state dict that is loaded leaves it. By the method they may have
    two, as dare draws for each name, and regmean solves for layers but not for embeddings.
    """
    _refuse_independent(config, shared_start=shares_start(minima))
    aggregate = method_of(config).combine(minima, context)
    last = {name: aggregate.weights[group[-1]] for group in context.tied for name in group}
    return replace(aggregate, weights=aggregate.weights | last)


def _refuse_unmeasured(minima: Sequence[Minimum], context: Context) -> Aggregate:
    raise ValueError("auto chooses by validation: it cannot be used without measuring")


def _users(config: AggregationConfig) -> Method:
    """Return the user's function of minima and Context, which returns weights. Its attribute `needs` is a Needs."""
    name = config.method
    needs = getattr(load_function(_FIELD, name), "needs", Needs())
    if not isinstance(needs, Needs):
        raise ValueError(f"{_FIELD} = {name!r}: its attribute needs should be raysubset.aggregation.Needs(…)")

    def combine(minima: Sequence[Minimum], context: Context) -> Aggregate:
        start = context.start and _copies_of(context.start)
        copies = [
            replace(m, load_weights=_copied(m.load_weights), load_statistics=_copied(m.load_statistics)) for m in minima
        ]
        weights = call_function(_FIELD, name, copies, replace(context, start=start))
        if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
            raise ValueError(
                f"{_FIELD} = {name!r} should return weights, tensors by name, not {type(weights).__name__}"
            )
        first_weights = load_member(minima[0])
        refuse_other_architecture(first_weights, weights)
        weights = {key: weights[key].detach().to("cpu", value.dtype) for key, value in first_weights.items()}
        refuse_not_finite(weights, minima)
        return Aggregate(name, weights, tuple(minimum.subset_id for minimum in minima), (), shares_start(minima))

    return Method(combine, needs)


def _copied(load: Callable[..., Weights]) -> Callable[..., Weights]:
    return lambda *kind: _copies_of(load(*kind))


def _copies_of(weights: Weights) -> Weights:
    """Return copies, into which the user's code may write: members share frozen weights in memory."""
    return {key: tensor.clone() for key, tensor in weights.items()}
