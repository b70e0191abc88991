"""The verdict on the claim "equal results at a tenth of the cost", by a rule that is fixed beforehand."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from raysubset.comparison.statistics import Interval, SpeedUp
from raysubset.quality import Quality

TENTH = 0.1  # of the conventional run's cost: the claim
VACUOUS_BELOW = 2.0  # an arm whose speed-up cannot reach this is cheap only against an over-long baseline
CLAIMED = 10.0  # the speed-up that a tenth of the cost means
FEWEST_SEEDS = 5  # for a verdict; with fewer seeds it is called a smoke test

Word = Literal["confirmed", "vacuous", "refuted", "inconclusive"]


@dataclass(frozen=True)
class Verdict:
    """The verdict on the claim, on one clock."""

    word: Word
    text: str  # one sentence with the numbers that it rests on
    arm: str | None  # the arm that decided
    speed_up: Interval | None  # the S of that arm
    is_smoke_test: bool


def judge(
    cheap: Sequence[tuple[str, Interval]],
    speed_ups: Mapping[str, SpeedUp],
    failed: Sequence[tuple[str, float]] = (),
    *,
    conventional_passes: float,
    margin: float,
    quality: Quality,
    num_seeds: int,
) -> Verdict:
    """Apply the rule of METHODS.md §4, in its order.

    1. Refuted: every arm at no more than a tenth of the conventional cost is inferior, that is, the whole interval of
       its gain lies below minus the margin.
    2. Vacuous: no arm's speed-up can reach 2.
    3. Confirmed: an arm is non-inferior at no more than a tenth, and the whole interval of its speed-up is at least 10.
    4. Otherwise inconclusive.

    An arm that failed, with all seeds of a budget and for another reason than a loss that diverged, may be as good: if
    that budget may be a tenth, the claim is not refuted, and at any budget not vacuous.

    If neither an arm nor the conventional runs reach the quality with some seed, the arm's speed-up may be anything. It
    is then neither vacuous nor confirmed.

    Args:
        cheap: arms of subset pretraining at budgets of no more than a tenth of the conventional cost, each with its
            gain: test quality minus the conventional run's, paired by seed, so that more is better.
        speed_ups: of the arms of subset pretraining that finished with any seed. A seed that failed has S = 0.
        failed: arms of subset pretraining that failed at a budget, with the fewest passes that this may have cost.
        conventional_passes: C_conv, of the cheapest conventional run within one standard error of the best.
        margin: of non-inferiority, in the quality's units.
        quality: the metric by which arms are judged.
        num_seeds: of the comparison.
    """
    is_smoke_test = num_seeds < FEWEST_SEEDS
    prefix = f"With {num_seeds} seeds, a smoke test: " if is_smoke_test else ""
    if not speed_ups:
        return Verdict("inconclusive", f"{prefix}no arm of subset pretraining finished.", None, None, is_smoke_test)

    def standing(arm: str) -> tuple[float, float, str]:
        interval = speed_ups[arm].interval
        return -1.0 if math.isnan(interval.estimate) else interval.estimate, interval.high, arm

    best = max(speed_ups, key=standing)
    limit = f"{TENTH:g} of the conventional cost ({TENTH * conventional_passes:.3g} passes)"
    of_best = f"{best}'s speed-up is {describe_speed_up(speed_ups[best].interval)}"
    good = {arm for arm, gain in cheap if gain.low > -margin}
    claimants = [arm for arm in sorted(good & speed_ups.keys()) if speed_ups[arm].interval.low >= CLAIMED]
    arm, word = best, "inconclusive"
    has_cheap_failed = any(passes <= TENTH * conventional_passes for _, passes in failed)
    if cheap and not has_cheap_failed and all(gain.high < -margin for _, gain in cheap):
        names = ", ".join(sorted({name for name, _ in cheap}))
        short = f"{names} fall short by more than {quality.show(margin)}"
        word, text = "refuted", f"no arm is as good at {limit}: {short}; {of_best}."
    elif not failed and all(speed_up.interval.high < VACUOUS_BELOW for speed_up in speed_ups.values()):
        word, text = "vacuous", f"no arm's speed-up reaches {VACUOUS_BELOW:g}: {of_best}."
    elif claimants:
        arm, word = max(claimants, key=lambda name: speed_ups[name].interval.estimate), "confirmed"
        of_arm = describe_speed_up(speed_ups[arm].interval)
        text = f"{arm} is as good at {limit}, and its speed-up is {of_arm}."
    else:
        why = "" if cheap else f" no arm was run at {limit};"
        text = f"neither shown nor refuted:{why} {of_best}."
        if untold := sorted(arm for arm in speed_ups if any(map(math.isnan, speed_ups[arm].per_seed.values()))):
            names = ", ".join(untold)
            text += (
                f" With some seeds neither conventional training nor {names} reached the quality: give larger budgets."
            )
        if failed:
            text += f" {', '.join(sorted({name for name, _ in failed}))} failed, and may be as good."
    return Verdict(word, prefix + text, arm, speed_ups[arm].interval, is_smoke_test)


def describe_speed_up(interval: Interval) -> str:
    """Return '1.30 (95% interval 0.90 to 1.80)'; 'unknown' if no seed tells anything."""
    if math.isnan(interval.estimate):
        return "unknown"
    high = "any" if math.isinf(interval.high) else f"{interval.high:.2f}"
    return f"{interval.estimate:.2f} ({interval.coverage:.0%} interval {max(interval.low, 0):.2f} to {high})"
