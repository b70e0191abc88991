"""Statistics over seeds: paired intervals, the passes that a quality takes, and speed-ups with censoring.

Definitions: METHODS.md §4 of this project. Qualities are given as gains, so that more is better: Quality.gain(). A cost
curve is gain against passes over the budgets of one arm and one seed. It is made monotone (isotonic regression) before
it is read, for every arm alike, so that a lucky budget does not count as a crossing.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

COVERAGE = 0.95

Bound = Literal["exact", "at_least", "at_most", "unknown"]
Curve = Sequence[tuple[float, float]]  # (passes, gain), one for each budget

_BOUNDS: dict[tuple[bool, bool], Bound] = {  # by whether S may be larger, and smaller
    (False, False): "exact",
    (True, False): "at_least",
    (False, True): "at_most",
    (True, True): "unknown",
}


@dataclass(frozen=True)
class Interval:
    """A mean or median over seeds, with the interval that may hold the true one."""

    estimate: float
    low: float
    high: float
    coverage: float  # of [low, high]
    num: int  # seeds


def t_interval(values: Sequence[float], *, step: float = 0.0) -> Interval:
    """Return the mean of at least one value with Student's t interval; one alone, or not finite, gives (-inf, inf).

    Args:
        step: what one test example changes in a value. Equal values are no certainty: one of them then counts as a
            step off, as the next that could have been found.
    """
    from scipy import stats

    mean = statistics.fmean(values)
    if len(values) == 1 or not math.isfinite(mean):
        return Interval(mean, -math.inf, math.inf, COVERAGE, len(values))
    deviation = statistics.stdev(values)
    if math.isclose(min(values), max(values), rel_tol=0, abs_tol=step / 2):
        deviation = step / math.sqrt(len(values))  # the standard deviation of 0, …, 0, step
    half = stats.t.ppf((1 + COVERAGE) / 2, len(values) - 1) * deviation / math.sqrt(len(values))
    return Interval(mean, mean - float(half), mean + float(half), COVERAGE, len(values))


def range_interval(values: Sequence[float]) -> Interval:
    """Return the median with [min, max], which covers the true median with probability 1 - 2^(1-n)."""
    coverage = 1 - 2.0 ** (1 - len(values))
    return Interval(statistics.median(values), min(values), max(values), coverage, len(values))


def passes_needed(curve: Curve, target: float) -> tuple[float, Bound]:
    """Return the passes at which a cost curve reaches the target, a gain. Linear in log passes between budgets.

    Returns:
        (passes, "exact"); (the smallest budget's passes, "at_most") if that budget reaches the target already; (the
        largest budget's passes, "at_least") if no budget reaches it.
    """
    from sklearn.isotonic import isotonic_regression

    costs, gains = zip(*sorted(curve), strict=True)
    fitted = [float(value) for value in isotonic_regression(gains)]
    if fitted[0] >= target:
        return costs[0], "at_most"
    if fitted[-1] < target:
        return costs[-1], "at_least"
    above = next(i for i, value in enumerate(fitted) if value >= target)
    share = (target - fitted[above - 1]) / (fitted[above] - fitted[above - 1])
    low, high = math.log(costs[above - 1]), math.log(costs[above])
    return math.exp(low + share * (high - low)), "exact"


@dataclass(frozen=True)
class SpeedUp:
    """The passes that conventional training needs for a quality, over those that an arm needs, paired by seed."""

    per_seed: Mapping[int, float]  # 0 if the arm misses the quality at every budget, or failed; NaN if nothing is known
    bounds: Mapping[int, Bound]  # whether the value is S itself, a lower or upper bound of S, or says nothing
    interval: Interval  # the geometric mean by Student's t on log S; or the median with [min, max]


def speed_up(baseline: Mapping[int, Curve], arm: Mapping[int, Curve], target: float) -> SpeedUp:
    """Return S of an arm at a quality, given as a gain, for each seed of the baseline.

    S is 0 for a seed with which the baseline reaches the quality and the arm misses it, or has no curve. If the
    baseline misses it, or the arm reaches it at its smallest budget, the ratio of passes is a lower bound of S; if the
    baseline reaches it at its smallest budget, an upper bound; if both hold, S is unknown. With any such seed the
    interval is [min, max] with its own coverage, opened on the side that is unknown.

    A seed with which neither reaches the quality tells nothing, NaN: S may be anything, so the interval is opened on
    both sides. The estimate is the median of the other seeds, or NaN. A verdict can then be neither confirmed nor
    vacuous by this arm; refuted does not rest on S.
    """
    per_seed: dict[int, float] = {}
    bounds: dict[int, Bound] = {}
    for seed, curve in baseline.items():
        arm_curve = arm.get(seed, ())
        needed, bound = passes_needed(arm_curve, target) if arm_curve else (math.inf, "at_least")
        base, base_bound = passes_needed(curve, target)
        if bound == "at_least":
            is_told = base_bound != "at_least"
            per_seed[seed], bounds[seed] = (0.0, "exact") if is_told else (math.nan, "unknown")
            continue
        is_above, is_below = base_bound == "at_least" or bound == "at_most", base_bound == "at_most"
        per_seed[seed] = base / needed
        bounds[seed] = _BOUNDS[is_above, is_below]
    values, kinds = list(per_seed.values()), set(bounds.values())
    if kinds == {"exact"} and min(values) > 0:
        logs = t_interval([math.log(value) for value in values])
        interval = Interval(_exp(logs.estimate), _exp(logs.low), _exp(logs.high), logs.coverage, logs.num)
    else:
        told = [value for value in values if not math.isnan(value)]
        interval = replace(range_interval(values), estimate=statistics.median(told) if told else math.nan)
        if kinds & {"at_most", "unknown"}:
            interval = replace(interval, low=0.0)
        if kinds & {"at_least", "unknown"}:
            interval = replace(interval, high=math.inf)
    return SpeedUp(per_seed, bounds, interval)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def paired_difference(
    arm: Mapping[int, float], reference: Mapping[int, float], *, step: float = 0.0
) -> Interval | None:
    """Return arm minus reference over the seeds that both have; None if they share no seed. `step`: as t_interval()."""
    seeds = [seed for seed in reference if seed in arm]
    return t_interval([arm[seed] - reference[seed] for seed in seeds], step=step) if seeds else None


def cheapest_within_error(losses: Mapping[float, Sequence[float]]) -> float:
    """Return the smallest budget whose mean validation loss is within one standard error of the best budget's.

    The standard error is the best budget's over its seeds (Breiman et al. 1984); 0 for a single seed.

    Args:
        losses: validation losses by budget, one per seed. Budgets with a loss that is not finite are skipped.

    Raises:
        ValueError: if no budget has finite losses only.
    """
    means = {b: statistics.fmean(v) for b, v in losses.items() if v and all(math.isfinite(x) for x in v)}
    if not means:
        raise ValueError("no budget of the conventional run ended with a finite validation loss")
    best = min(means, key=lambda budget: means[budget])
    values = losses[best]
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return min(budget for budget, mean in means.items() if mean <= means[best] + error)
