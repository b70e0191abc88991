"""The methods by name, the user's own among them, and which of them auto chooses among."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from raysubset.aggregation.curvature import curvature_methods
from raysubset.aggregation.records import Aggregate, Context, Method, Minimum, Needs
from raysubset.aggregation.scorer import Scorer
from raysubset.aggregation.soups import soup_methods, uniform_soup
from raysubset.aggregation.streaming import check_start, load_member, refuse_not_finite, refuse_other_architecture
from raysubset.aggregation.task_vectors import task_vector_methods
from raysubset.config import AggregationConfig, Config
from raysubset.training import Metrics, Weights
from raysubset.user_functions import call_function, load_function

_FIELD = "aggregation.method"


def methods(config: AggregationConfig) -> dict[str, Method]:
    """All that are built in, as the config has them."""
    chooses = Needs(shared_start=False, validation=True)
    aligned = Needs(
        shared_start=False, forward=lambda num, one: 2 * num * one.calibration + one.refreshing + one.validation
    )
    return {
        **soup_methods(config),
        **curvature_methods(config),
        **task_vector_methods(config),
        "aligned_soup": Method(lambda minima, context: context.align(minima), aligned),
        "auto": Method(_refuse_unmeasured, chooses),
    }


def method_of(config: AggregationConfig) -> Method:
    """The config's method.

    Raises:
        ValueError: if it is the user's and cannot be loaded.
    """
    return _users(config) if ":" in config.method else methods(config)[config.method]


def methods_tried(config: Config) -> dict[str, Method]:
    """The config's method by its name; those that auto tries, of equal ones the first is taken.

    Not savgm, whose second minimization of every subset costs more than it is likely to gain; and aligned_soup only
    where plain means are useless: after a shared start units correspond as they stand.
    """
    if config.aggregation.method == "auto":
        known = methods(config.aggregation)
        return {name: known[name] for name in candidates_of_auto(shared_start=config.subsets.start == "shared")}
    return {config.aggregation.method: method_of(config.aggregation)}


def candidates_of_auto(*, shared_start: bool) -> tuple[str, ...]:
    """Names of the methods that auto tries: see methods_tried()."""
    if not shared_start:
        return ("select_best", "aligned_soup")
    return ("uniform_soup", "weighted_soup", "greedy_soup", "select_best", "fisher", "regmean", "ties", "dare")


def statistics_of(config: Config) -> tuple[str, ...]:
    """Kinds of statistics that actors leave beside a minimum for the config's method, or for one that auto tries."""
    return tuple(dict.fromkeys(kind for method in methods_tried(config).values() for kind in method.needs.statistics))


def refuse_contradictions(config: Config) -> None:
    """Raises ValueError: if the config's method cannot have what it needs."""
    name, needs = config.aggregation.method, method_of(config.aggregation).needs
    if config.subsets.start == "independent" and needs.shared_start and not config.aggregation.allow_independent:
        raise ValueError(
            f"aggregation.method={name} averages minima that share no start, which gives a useless mean: use "
            "subsets.start=shared, aggregation.method=aligned_soup or select_best, or aggregation.allow_independent to "
            "do it all the same"
        )
    if config.rounds.num > 1 and config.rounds.evaluate_every > 1 and needs.validation:
        raise ValueError(
            f"aggregation.method={name} chooses by validation in every round: set rounds.evaluate_every to 1"
        )


def make(
    minima: Sequence[Minimum], config: AggregationConfig, scorer: Scorer, *, start: Weights | None, seed: int
) -> tuple[Aggregate, Metrics]:
    """combine(), with the right batch-norm statistics, and what it validates at."""
    made = combine(minima, config, scorer, start=start, seed=seed)
    # a single member's statistics are its own, and those that were repaired are right
    if len(made.subset_ids) > 1 and not (made.alignment and config.repair):
        made = replace(made, weights=scorer.refreshed(made.weights))
    return made, scorer.score_as_is(made.weights)


def combine(
    minima: Sequence[Minimum], config: AggregationConfig, scorer: Scorer, *, start: Weights | None, seed: int
) -> Aggregate:
    """The aggregate by the config's method, any but auto; of a single minimum that minimum.

    Batch-norm statistics are what the method makes of the members' own. Arguments and errors are aggregate()'s.
    """
    if len(minima) == 1:
        return replace(uniform_soup(minima), method=config.method)
    return method_of(config).combine(minima, scorer.context(config, start=start, seed=seed))


def _refuse_unmeasured(minima: Sequence[Minimum], context: Context) -> Aggregate:
    raise ValueError("auto chooses by validation: its aggregate cannot go unmeasured")


def _users(config: AggregationConfig) -> Method:
    """The user's function of minima and Context, which returns weights; its attribute `needs` says what it needs."""
    name = config.method
    needs = getattr(load_function(_FIELD, name), "needs", Needs())
    if not isinstance(needs, Needs):
        raise ValueError(f"{_FIELD} = {name!r}: its attribute needs should be raysubset.aggregation.Needs(…)")

    def combine(minima: Sequence[Minimum], context: Context) -> Aggregate:
        independent = config.allow_independent or not needs.shared_start
        shared = check_start(name, minima, allow_independent=independent)
        weights = call_function(_FIELD, name, minima, context)
        if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
            raise ValueError(
                f"{_FIELD} = {name!r} should return weights, tensors by name, not {type(weights).__name__}"
            )
        like = load_member(minima[0])
        refuse_other_architecture(like, weights)
        weights = {key: weights[key].detach().to("cpu", value.dtype) for key, value in like.items()}
        refuse_not_finite(weights, minima)
        return Aggregate(name, weights, tuple(minimum.subset_id for minimum in minima), (), shared)

    return Method(combine, needs)
