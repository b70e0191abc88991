"""The regime: the way of training that takes the least wall time to a quality, at each bandwidth.

The rule is fixed beforehand:
1. The quality is that of the verdicts: the conventional run's on test data, less the margin.
2. An arm's seconds, by seed, are where its cost curve over wall time reaches the quality. Wall time is the third clock:
   passes on the critical path × seconds of a pass on one device + bytes through the slowest link × 8 / bandwidth.
   If the arm reaches the quality at its smallest budget already, they are an upper bound.
3. There are three ways: one device, data-parallel training, subset pretraining. Each is represented by its fastest arm
   (geometric mean over seeds) among those that reach the quality with every seed.
4. The fastest way is named alone if it is faster than each other way: the 95 % interval of the log of their ratio of
   seconds, paired by seed, lies wholly on its side. Otherwise the ways that cannot be told apart from it are named too.
   That includes a way that reaches the quality with some seeds only: it may be the faster one where it does. It also
   includes a way with an arm of which the seconds are an upper bound: smaller budgets might show it to be the faster.
5. An arm of which no seed finished at some budget is named, because it may be the fastest.
6. With fewer than five seeds it is called a smoke test, like a verdict.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from raysubset.comparison.network import Communication
from raysubset.comparison.statistics import passes_needed, t_interval
from raysubset.comparison.verdict import FEWEST_SEEDS

Way = Literal["one device", "data-parallel training", "subset pretraining"]
Curves = Mapping[int, Sequence[tuple[Communication, float]]]
"""By seed, the communication of each budget and the gain that it led to."""


@dataclass(frozen=True)
class Fastest:
    """A way of training, represented by its fastest arm."""

    arm: str
    seconds: float  # geometric mean over seeds
    per_seed: Mapping[int, float]
    is_upper_bound: bool = False  # an arm of this way reaches the quality at its smallest budget already

    def in_words(self) -> str:
        return f"{'at most ' * self.is_upper_bound}{self.seconds:.3g} s"


@dataclass(frozen=True)
class Regime:
    """The ways of least wall time at one bandwidth."""

    gbit_per_s: float  # of each worker's link
    ways: Mapping[Way, Fastest]  # those that reach the quality
    fastest: tuple[Way, ...]  # several if they cannot be told apart; none if no way reaches the quality
    partly: tuple[Way, ...] = ()  # those that reach the quality with some seeds only


def way_of(letter: str, role: str) -> Way:
    """Return the way in which an arm trains."""
    if letter == "I":
        return "data-parallel training"
    return "subset pretraining" if role == "candidate" else "one device"


def regime_at(
    gbit_per_s: float, arms: Mapping[str, tuple[Way, Curves]], *, target: float, s_per_pass: float, seeds: Sequence[int]
) -> Regime:
    """Apply the rule to arms, by their keys, at one bandwidth; the target is a gain, and s_per_pass of one device."""
    ways: dict[Way, Fastest] = {}
    reached: set[Way] = set()  # with one seed or more
    bounded: set[Way] = set()  # at an arm's smallest budget
    for key, (way, curves) in arms.items():
        per_seed: dict[int, float] = {}
        for seed, points in curves.items():
            curve = [(sent.wall_s(gbit_per_s, s_per_pass=s_per_pass), gain) for sent, gain in points]
            needed, bound = passes_needed(curve, target)
            if bound != "at_least":
                per_seed[seed] = needed
                reached.add(way)
            if bound == "at_most":
                bounded.add(way)
        if len(per_seed) == len(seeds):
            seconds = statistics.geometric_mean(per_seed.values())
            if way not in ways or seconds < ways[way].seconds:
                ways[way] = Fastest(key, seconds, per_seed)
    ways = {way: replace(fastest, is_upper_bound=way in bounded) for way, fastest in ways.items()}
    partly: tuple[Way, ...] = tuple(sorted(reached - ways.keys()))
    ordered: list[Way] = sorted(ways, key=lambda way: ways[way].seconds)
    close: list[Way] = [way for way in ordered if not _is_slower(ways[way], ways[ordered[0]])]
    return Regime(gbit_per_s, ways, (*close, *partly) if ways else (), partly)


def _is_slower(one: Fastest, other: Fastest) -> bool:
    """Return True if it takes more seconds than the other, with the whole interval of the ratio above 1."""
    if one.is_upper_bound:
        return False
    return t_interval([math.log(one.per_seed[seed] / other.per_seed[seed]) for seed in other.per_seed]).low > 0


def regime_text(
    regime: Regime, *, quality: str, place: str, is_complete: bool, failed: Sequence[str] = (), num_seeds: int
) -> str:
    """Return the sentence that a comparison ends with.

    Args:
        quality: the target in words.
        place: network, Q, workers and budgets in words.
        is_complete: True if every way had an arm in the comparison.
        failed: arms with a budget of which no seed finished.
    """
    smoke = f"With {num_seeds} seeds, a smoke test. " if num_seeds < FEWEST_SEEDS else ""
    begin = f"{smoke}{place}, at {regime.gbit_per_s:g} Gbit/s a worker: "
    if not regime.ways:
        return f"{begin}no arm reached {quality} with every seed; give larger --budgets."
    ordered = sorted(regime.ways.items(), key=lambda item: item[1].seconds)
    times = ", ".join(f"{way} ({fastest.arm}) {fastest.in_words()}" for way, fastest in ordered)
    times += "".join(f", {way} with some seeds alone" for way in regime.partly)
    first, *others = regime.fastest
    word = f"{first} takes the least time" if not others else f"{' and '.join(regime.fastest)} are not told apart"
    missing = "" if is_complete else " Not every way was compared: add I to --arms for data-parallel training."
    untold = f" {', '.join(failed)} failed, and may take less." if failed else ""
    return f"{begin}{word} to {quality}: {times}.{missing}{untold}"
