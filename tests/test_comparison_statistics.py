"""Intervals, cost curves, speed-ups and the verdict: against closed forms, scipy and planted outcomes."""

import math
from functools import partial
from unittest.mock import ANY

import numpy as np
import pytest

from raysubset.comparison.statistics import (
    Interval,
    SpeedUp,
    cheapest_within_error,
    paired_difference,
    passes_needed,
    range_interval,
    speed_up,
    t_interval,
)
from raysubset.comparison.verdict import Verdict
from raysubset.comparison.verdict import judge as judged_by
from raysubset.quality import ACCURACY

judge = partial(judged_by, quality=ACCURACY)

BUDGETS = (0.5, 1.0, 2.0, 4.0, 8.0)
SEEDS = range(5)


def curve(*, cost: float = 1.0, shift: float = 0.0, noise: float = 0.0) -> tuple[tuple[float, float], ...]:
    """Accuracy 0.9 + 0.02 log2(passes) on a scale of costs `cost` times as cheap: exactly linear in log passes."""
    return tuple((b, 0.9 + 0.02 * math.log2(b * cost) + shift + noise) for b in BUDGETS)


def test_the_t_interval_is_scipys():
    from scipy import stats

    values = [0.3, 0.7, 0.4, 0.9]
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    found = t_interval(values)
    assert (found.estimate, found.low, found.high) == pytest.approx((np.mean(values), low, high))


def test_one_seed_tells_nothing_of_the_spread():
    assert t_interval([0.5]).low == -math.inf
    assert t_interval([0.5]).high == math.inf


def test_equal_values_are_certain_to_one_test_example_only():
    """Five seeds that agree on 20 examples had an interval of width 0."""
    from scipy import stats

    one_off = [0.95, 0.95, 0.95, 0.95, 1.0]  # the next that 20 examples can give
    half = stats.sem(one_off) * stats.t.ppf(0.975, 4)
    found = t_interval([0.95] * 5, step=1 / 20)
    assert (found.estimate, found.low, found.high) == pytest.approx((0.95, 0.95 - half, 0.95 + half))
    unlike = t_interval(one_off, step=1 / 20)
    assert unlike == t_interval(one_off)
    assert unlike.high - unlike.low == pytest.approx(2 * half)
    assert paired_difference({0: 0.3, 1: 0.1 + 0.2}, {0: 0.1, 1: 0.1}, step=0.01).low == pytest.approx(  # type: ignore
        0.2 - 0.01 / 2 * stats.t.ppf(0.975, 1)
    )


def test_min_and_max_cover_the_median_as_often_as_is_said():
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(20_000, 5))
    covered = np.mean((draws.min(1) <= 0) & (draws.max(1) >= 0))
    assert range_interval([1.0, 2.0, 3.0, 4.0, 5.0]).coverage == pytest.approx(1 - 2**-4)
    assert covered == pytest.approx(1 - 2**-4, abs=0.006)


def test_a_curve_is_crossed_where_it_is_linear_in_log_passes():
    assert passes_needed(curve(), 0.9 + 0.02 * math.log2(3)) == (pytest.approx(3.0), "exact")
    assert passes_needed(curve(), 0.5) == (0.5, "at_most")
    assert passes_needed(curve(), 0.99) == (8.0, "at_least")


def test_a_lucky_budget_is_no_crossing():
    found, _ = passes_needed([(1, 0.80), (2, 0.93), (4, 0.85), (8, 0.95)], 0.92)
    assert found > 4  # the second and third budgets count as 0.89 each


def test_the_order_of_budgets_does_not_matter():
    assert passes_needed(curve()[::-1], 0.93) == passes_needed(curve(), 0.93)


def test_two_identical_arms_have_a_speed_up_of_one():
    noisy = {seed: curve(noise=0.003 * seed) for seed in SEEDS}
    found = speed_up(noisy, noisy, 0.93)
    assert found.interval.estimate == pytest.approx(1)
    assert found.interval.low <= 1 <= found.interval.high


def test_an_arm_of_half_the_cost_has_a_speed_up_of_two():
    rng = np.random.default_rng(1)
    base = {seed: curve(noise=rng.normal(0, 0.002)) for seed in SEEDS}
    arm = {seed: curve(cost=2, noise=rng.normal(0, 0.002)) for seed in SEEDS}
    found = speed_up(base, arm, 0.93)
    assert set(found.bounds.values()) == {"exact"}
    assert found.interval.low < 2 < found.interval.high
    assert found.interval.estimate == pytest.approx(2, rel=0.15)


def test_an_arm_that_misses_the_quality_has_no_speed_up():
    found = speed_up({0: curve(), 1: curve()}, {0: curve(), 1: curve(shift=-0.2)}, 0.93)
    assert found.per_seed == {0: pytest.approx(1), 1: 0.0}
    assert (found.interval.low, found.interval.high, found.interval.coverage) == (0.0, pytest.approx(1), 0.5)


def test_a_seed_that_failed_counts_as_missing_the_quality():
    assert speed_up({0: curve(), 1: curve()}, {0: curve()}, 0.93).per_seed[1] == 0.0


def test_what_the_baseline_misses_is_censored_to_the_right():
    found = speed_up({0: curve(shift=-0.05)}, {0: curve()}, 0.93)
    assert found.bounds[0] == "at_least"
    assert found.per_seed[0] == pytest.approx(8 / 2**1.5)
    assert found.interval.high == math.inf


def test_what_the_baseline_has_at_once_is_censored_to_the_left():
    found = speed_up({0: curve(shift=0.05)}, {0: curve()}, 0.93)
    assert found.bounds[0] == "at_most"
    assert found.interval.low == 0


def test_of_two_that_have_it_at_once_nothing_is_known():
    found = speed_up({0: curve(shift=0.05)}, {0: curve(cost=1.5, shift=0.05)}, 0.93)
    assert found.bounds[0] == "unknown"
    assert (found.interval.low, found.interval.high) == (0.0, math.inf)


def test_a_pair_that_both_miss_tells_nothing_and_the_others_have_the_estimate():
    missing = curve(shift=-0.2)
    base = {0: curve(), 1: curve(), 2: missing, 3: missing}
    found = speed_up(base, {0: curve(cost=1.5), 1: missing, 2: missing}, 0.93)
    assert found.per_seed == {0: pytest.approx(1.5), 1: 0.0, 2: pytest.approx(math.nan, nan_ok=True), 3: ANY}
    assert [found.bounds[seed] for seed in base] == ["exact", "exact", "unknown", "unknown"]
    assert (found.interval.estimate, found.interval.num) == (pytest.approx(0.75), 4)
    assert (found.interval.low, found.interval.high) == (0.0, math.inf)
    assert math.isnan(speed_up({2: missing}, {2: missing}, 0.93).interval.estimate)


def test_differences_are_paired_by_seed():
    found = paired_difference({0: 0.91, 1: 0.81, 9: 0.1}, {0: 0.90, 1: 0.80})
    assert found is not None
    assert (found.num, found.estimate) == (2, pytest.approx(0.01))
    assert paired_difference({}, {0: 1.0}) is None


def test_the_conventional_budget_is_the_cheapest_within_one_standard_error_of_the_best():
    # best at 8: mean 0.100, error 0.01; 4 is within it, 2 is not
    losses = {2.0: [0.12, 0.13], 4.0: [0.105, 0.107], 8.0: [0.09, 0.11]}
    assert cheapest_within_error(losses) == 4.0
    assert cheapest_within_error(losses | {16.0: [0.01, math.nan]}) == 4.0
    with pytest.raises(ValueError, match="finite"):
        cheapest_within_error({1.0: [math.nan]})


def planted(cost: float = 1.0, shift: float = 0.0, seeds: range = SEEDS) -> tuple[SpeedUp, list[tuple[str, Interval]]]:
    """The speed-up of an arm at the quality of a conventional run of 8 passes, and its points at 0.8 and less."""
    rng = np.random.default_rng(2)
    base = {seed: curve(noise=rng.normal(0, 1e-3)) for seed in seeds}
    arm = {seed: curve(cost=cost, shift=shift, noise=rng.normal(0, 1e-3)) for seed in seeds}
    target = 0.96 - 0.005
    reference = {seed: dict(base[seed])[8.0] for seed in seeds}
    difference = paired_difference({seed: dict(arm[seed])[0.5] for seed in seeds}, reference)
    assert difference is not None
    return speed_up(base, arm, target), [("G", difference)]


def verdict(cost: float = 1.0, shift: float = 0.0, seeds: range = SEEDS) -> Verdict:
    found, cheap = planted(cost, shift, seeds)
    return judge(cheap, {"G": found}, conventional_passes=8.0, margin=0.005, num_seeds=len(seeds))


def test_an_arm_twenty_times_cheaper_confirms_the_claim():
    found = verdict(cost=20)
    assert (found.word, found.arm) == ("confirmed", "G")


def test_an_equal_arm_refutes_the_claim():
    assert verdict().word == "refuted"  # at a tenth of the cost it is far behind


def test_a_worse_arm_refutes_the_claim():
    assert verdict(shift=-0.1).word == "refuted"


def test_an_arm_that_is_as_good_at_a_tenth_as_a_baseline_that_needs_no_more_is_vacuous():
    base = {seed: tuple(zip(BUDGETS, (0.90, 0.95, 0.95, 0.95, 0.95), strict=True)) for seed in SEEDS}
    arm = {seed: tuple(zip(BUDGETS, (0.949, 0.95, 0.95, 0.95, 0.95), strict=True)) for seed in SEEDS}
    difference = paired_difference(dict.fromkeys(SEEDS, 0.949), dict.fromkeys(SEEDS, 0.95))
    assert difference is not None
    found = speed_up(base, arm, 0.9495)  # needs 0.99 passes against 0.71
    cheap = [("D", difference)]
    judged = judge(cheap, {"D": found}, conventional_passes=8, margin=0.005, num_seeds=5)
    assert judged.word == "vacuous"


def test_of_arms_with_equal_speed_ups_the_one_that_may_be_the_fastest_is_named():
    base = {seed: curve() for seed in range(3)}
    worse = speed_up(base, {seed: curve(shift=-0.2) for seed in base}, 0.93)
    found = speed_up(base, {0: curve()}, 0.93)  # misses it with two seeds of three
    assert (found.interval.estimate, worse.interval.estimate) == (0.0, 0.0)
    judged = judge([], {"H": worse, "D": found}, conventional_passes=8, margin=0.005, num_seeds=5)
    assert (judged.word, judged.arm) == ("vacuous", "D")


def test_what_nobody_reached_shows_no_arm_vacuous_and_is_told():
    reached, missing = curve(), curve(shift=-0.2)
    base = {0: reached, 1: reached, 2: missing}
    all_miss = dict.fromkeys(base, missing)
    judged = judge([], {"G": speed_up(base, all_miss, 0.93)}, conventional_passes=8, margin=0.005, num_seeds=5)
    assert judged.word == "inconclusive"
    assert judged.text.endswith(
        "some seeds neither conventional training nor G reached the quality: give larger budgets."
    )
    known = dict.fromkeys(base, reached)
    judged = judge([], {"G": speed_up(known, all_miss, 0.93)}, conventional_passes=8, margin=0.005, num_seeds=5)
    assert judged.word == "vacuous"  # as ever, if conventional training reaches it with every seed
    nothing = speed_up(all_miss, all_miss, 0.93)
    both = {"G": nothing, "D": speed_up(known, all_miss, 0.93)}
    judged = judge([], both, conventional_passes=8, margin=0.005, num_seeds=5)
    assert (judged.word, judged.arm) == ("inconclusive", "D")
    judged = judge([], {"G": nothing}, conventional_passes=8, margin=0.005, num_seeds=5)
    assert "G's speed-up is unknown" in judged.text


def test_an_arm_that_never_ran_decides_nothing():
    assert judge([], {}, conventional_passes=8, margin=0.005, num_seeds=5).word == "inconclusive"


def test_without_a_cheap_run_nothing_is_refuted():
    found, _ = planted(cost=4)
    judged = judge([], {"G": found}, conventional_passes=8, margin=0.005, num_seeds=5)
    assert judged.word == "inconclusive"
    assert "no arm was run" in judged.text


def test_an_arm_that_failed_may_be_as_good_as_claimed():
    found, cheap = planted(shift=-0.1)
    judged = partial(judge, cheap, {"G": found}, conventional_passes=8, margin=0.005, num_seeds=5)
    assert judged().word == judged([("H", 0.81)]).word == "refuted"  # 0.81 passes are more than a tenth of 8
    untold = judged([("H", 0.8)])
    assert untold.word == "inconclusive"
    assert untold.text.endswith(" H failed, and may be as good.")
    without_cheap = partial(judge, [], {"G": found}, conventional_passes=8, margin=0.005, num_seeds=5)
    assert without_cheap().word == "vacuous"
    assert without_cheap([("H", 4.0)]).word == "inconclusive"
    good, as_good = planted(cost=20)
    assert (
        judge(as_good, {"G": good}, [("H", 0.5)], conventional_passes=8, margin=0.005, num_seeds=5).word == "confirmed"
    )


def test_few_seeds_are_called_a_smoke_test():
    found = verdict(seeds=range(2))
    assert found.is_smoke_test
    assert "smoke test" in found.text
    assert not verdict().is_smoke_test
