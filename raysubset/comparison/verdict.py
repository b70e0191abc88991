"""The verdict on the claim "equal results at a tenth of the cost", by a rule that is fixed beforehand."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from raysubset.comparison.statistics import Interval, SpeedUp
from raysubset.quality import Quality

TENTH = 0.1  # of the conventional run's cost: the claim
VACUOUS_BELOW = 2.0  # a speed-up that cannot reach this is cheap only against an over-long baseline
CLAIMED = 10.0  # the speed-up that a tenth of the cost means
FEWEST_SEEDS = 5  # for a verdict; with fewer it is called a smoke test

Word = Literal["confirmed", "vacuous", "refuted", "inconclusive"]


@dataclass(frozen=True)
class CheapPoint:
    """One arm at one budget of at most a tenth of the conventional cost."""

    arm: str
    passes: float  # mean over seeds
    gain: Interval  # of its test quality over the conventional run's, paired by seed: more is better


@dataclass(frozen=True)
class Verdict:
    """What the comparison says of the claim on one clock."""

    word: Word
    text: str  # one sentence with the numbers it rests on
    arm: str | None  # the arm that decided
    speed_up: Interval | None  # its S
    is_smoke_test: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def judge(
    cheap: Sequence[CheapPoint],
    speed_ups: Mapping[str, SpeedUp],
    *,
    conventional_passes: float,
    margin: float,
    quality: Quality,
    num_seeds: int,
) -> Verdict:
    """The rule of METHODS.md §4, in its order.

    1. Every arm tried at no more than a tenth of the conventional cost is inferior, the interval of its gain wholly
       below the margin: refuted.
    2. No arm's speed-up can reach 2: vacuous.
    3. An arm is non-inferior at no more than a tenth, and its speed-up with its whole interval at least 10: confirmed.
    4. Else: inconclusive.

    Args:
        cheap: arms of subset pretraining at budgets of at most a tenth of the conventional cost.
        speed_ups: of the arms of subset pretraining that finished with any seed; a seed that failed has S = 0.
        conventional_passes: C_conv: of the cheapest conventional run within one standard error of the best.
        margin: of non-inferiority, in the quality's units.
        quality: what arms are judged by.
        num_seeds: of the comparison.
    """
    smoke = num_seeds < FEWEST_SEEDS
    prefix = f"With {num_seeds} seeds, a smoke test: " if smoke else ""
    if not speed_ups:
        return Verdict("inconclusive", f"{prefix}no arm of subset pretraining finished.", None, None, smoke)
    best = max(speed_ups, key=lambda arm: (speed_ups[arm].interval.estimate, speed_ups[arm].interval.high, arm))
    interval = speed_ups[best].interval
    limit = f"{TENTH:g} of the conventional cost ({TENTH * conventional_passes:.3g} passes)"
    of_best = f"{best}'s speed-up is {describe_speed_up(interval)}"

    def verdict(word: Word, text: str, arm: str | None) -> Verdict:
        found = speed_ups[arm].interval if arm is not None else None
        return Verdict(word, prefix + text, arm, found, smoke)

    if cheap and all(point.gain.high < -margin for point in cheap):
        names = ", ".join(sorted({point.arm for point in cheap}))
        short = f"{names} fall short by more than {quality.show(margin)}"
        return verdict("refuted", f"no arm is as good at {limit}: {short}; {of_best}.", best)
    if all(one.interval.high < VACUOUS_BELOW for one in speed_ups.values()):
        return verdict("vacuous", f"no arm's speed-up reaches {VACUOUS_BELOW:g}: {of_best}.", best)
    good = {point.arm for point in cheap if point.gain.low > -margin}
    able = [arm for arm in sorted(good & speed_ups.keys()) if speed_ups[arm].interval.low >= CLAIMED]
    if able:
        arm = max(able, key=lambda name: speed_ups[name].interval.estimate)
        found = describe_speed_up(speed_ups[arm].interval)
        return verdict("confirmed", f"{arm} is as good at {limit}, and its speed-up is {found}.", arm)
    why = "" if cheap else f" no arm was run at {limit};"
    return verdict("inconclusive", f"neither shown nor refuted:{why} {of_best}.", best)


def describe_speed_up(interval: Interval) -> str:
    """'1.3 (95 % interval 0.9 to 1.8)'."""
    high = "any" if math.isinf(interval.high) else f"{interval.high:.2f}"
    return f"{interval.estimate:.2f} ({interval.coverage:.0%} interval {max(interval.low, 0):.2f} to {high})"
