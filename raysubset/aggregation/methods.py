"""The methods by name, and which of them auto chooses among."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from raysubset.aggregation.curvature import FISHER_FLOOR, fisher_merge, regmean
from raysubset.aggregation.records import Aggregate, Minimum
from raysubset.aggregation.scorer import Scorer
from raysubset.aggregation.soups import greedy_soup, select_best, uniform_soup, weighted_soup
from raysubset.aggregation.task_vectors import dare, savgm, ties
from raysubset.config import AggregationConfig
from raysubset.training import Metrics, Weights


@dataclass(frozen=True)
class Made:
    """An aggregate with the right batch-norm statistics, and what it is worth."""

    aggregate: Aggregate
    validation: Metrics
    alignment: dict[str, Any] | None = None  # aligned_soup's report


def make(
    method: str,
    minima: Sequence[Minimum],
    config: AggregationConfig,
    scorer: Scorer,
    *,
    start: Weights | None,
    seed: int,
) -> Made:
    """combine(), refreshed and scored."""
    made, alignment = combine(method, minima, config, scorer, start=start, seed=seed)
    # a single member's statistics are its own, and those that were repaired are right
    if len(made.subset_ids) > 1 and not (alignment and config.repair):
        made = replace(made, weights=scorer.refreshed(made.weights))
    return Made(made, scorer.score_as_is(made.weights), alignment)


def combine(
    method: str,
    minima: Sequence[Minimum],
    config: AggregationConfig,
    scorer: Scorer,
    *,
    start: Weights | None,
    seed: int,
) -> tuple[Aggregate, dict[str, Any] | None]:
    """The aggregate by one method, any but auto, and aligned_soup's report; of a single minimum that minimum.

    Batch-norm statistics are what the method makes of the members' own.

    Args:
        start: the weights the minima started from, where they share them.
        seed: of what a method draws at random.

    Raises:
        ValueError: as the method does; see uniform_soup().
    """
    if len(minima) == 1:
        return replace(uniform_soup(minima), method=method), None
    if method in ("ties", "dare") and start is None:
        raise ValueError(f"{method} needs the weights that the minima started from")
    independent, names, scale = config.allow_independent, scorer.parameter_names, config.task_scale
    match method:
        case "select_best":
            made = select_best(minima)
        case "uniform_soup":
            made = uniform_soup(minima, allow_independent=independent)
        case "weighted_soup":
            made = weighted_soup(minima, weight_by=config.weight_by, allow_independent=independent)
        case "greedy_soup":
            made = greedy_soup(minima, scorer.score, allow_independent=independent)
        case "fisher":
            made = fisher_merge(minima, floor=FISHER_FLOOR, allow_independent=independent)
        case "regmean":
            made = regmean(minima, factor=config.regmean_factor, allow_independent=independent)
        case "ties":
            made = ties(minima, start or {}, density=config.ties_density, scale=scale, parameter_names=names)
        case "dare":
            made = dare(minima, start or {}, drop=config.dare_drop, scale=scale, seed=seed, parameter_names=names)
        case "savgm":
            fraction = config.savgm_fraction
            made = savgm(minima, fraction=fraction, parameter_names=names, allow_independent=independent)
        case "aligned_soup":
            return scorer.aligned_soup(minima, matching=config.matching, repair=config.repair)
        case _:
            raise ValueError(f"{method} chooses by validation: its aggregate cannot go unmeasured")
    return made, None


def candidates_of_auto(*, shared_start: bool) -> tuple[str, ...]:
    """The methods that auto tries, of equal ones the first is taken.

    Not savgm, whose second minimization of every subset costs more than it is likely to gain; and aligned_soup only
    where plain means are useless: after a shared start units correspond as they stand.
    """
    if not shared_start:
        return ("select_best", "aligned_soup")
    return ("uniform_soup", "weighted_soup", "greedy_soup", "select_best", "fisher", "regmean", "ties", "dare")
