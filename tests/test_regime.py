"""The regime: which way takes the least wall time, by the rule, of planted cost curves."""

from typing import Any

import pytest

from raysubset.comparison.network import Communication
from raysubset.comparison.regime import Regime, Way, regime_at, regime_text, way_of

SEEDS = range(5)
NOISE = (0.0, 0.01, -0.01, 0.02, -0.02)


def curves(*, passes: float, num_bytes: float, noise: float = 1.0) -> dict[int, list[tuple[Communication, float]]]:
    """Gain 0.5 at a tenth of these passes and bytes, 0.9 at all of them, a little more or fewer by seed."""
    return {
        seed: [
            (Communication(passes * (1 + noise * NOISE[seed]), num_bytes, 1), 0.9),
            (Communication(passes / 10, num_bytes / 10, 1), 0.5),
        ]
        for seed in SEEDS
    }


def arms(**changes: Any) -> dict[str, tuple[Way, dict[int, list[tuple[Communication, float]]]]]:
    """One device in 8 passes; two workers in 4 with 100 GB to send; rounds in 5 with 1 GB."""
    found: dict[str, tuple[Way, Any]] = {
        "B": ("one device", curves(passes=8, num_bytes=0)),
        "I": ("data-parallel training", curves(passes=4, num_bytes=100e9)),
        "H": ("subset pretraining", curves(passes=5, num_bytes=1e9)),
    }
    return found | changes


def at(gbit_per_s: float, **changes: Any) -> Regime:
    return regime_at(gbit_per_s, arms(**changes), target=0.9, s_per_pass=10.0, seeds=SEEDS)


@pytest.mark.parametrize(
    ("gbit_per_s", "fastest"),
    [
        (0.01, "one device"),
        (1.0, "subset pretraining"),
        (10.0, "subset pretraining"),
        (1000.0, "data-parallel training"),
    ],
)
def test_the_fastest_way_is_that_of_computing_and_sending_at_the_bandwidth(gbit_per_s: float, fastest: str):
    found = at(gbit_per_s)
    assert found.fastest == (fastest,)
    seconds = {"B": 80.0, "I": 40 + 800 / gbit_per_s, "H": 50 + 8 / gbit_per_s}
    assert {one.arm: one.seconds for one in found.ways.values()} == pytest.approx(seconds, rel=2e-3)


def test_ways_that_seeds_do_not_tell_apart_are_both_named():
    near = curves(passes=5.01, num_bytes=1e9, noise=-1.0)
    assert at(1.0, I=("data-parallel training", near)).fastest == ("subset pretraining", "data-parallel training")


def test_a_way_stands_for_its_fastest_arm_of_those_that_reach_the_quality_with_every_seed():
    failing = curves(passes=1, num_bytes=0)
    failing[3] = failing[3][1:]  # which ends at 0.5
    found = at(1.0, D=("subset pretraining", failing), G=("subset pretraining", curves(passes=4.5, num_bytes=1e9)))
    assert found.ways["subset pretraining"].arm == "G"
    lost = {key: one for key, one in failing.items() if key != 3}
    assert at(1.0, D=("subset pretraining", lost)).ways["subset pretraining"].arm == "H"


def test_a_way_that_gets_there_with_some_seeds_alone_is_not_told_apart():
    """Else one that missed by a hair with one seed of two would be beaten by what it cannot be told from."""
    partly = curves(passes=1, num_bytes=0)
    partly[3] = partly[3][1:]
    found = at(1.0, B=("one device", partly))
    assert found.fastest == ("subset pretraining", "one device")
    told = regime_text(found, quality="90.00 %", place="With 4 workers", is_complete=True, num_seeds=4)
    assert told.startswith(
        "With 4 seeds, a smoke test. With 4 workers, at 1 Gbit/s a worker: subset pretraining and one "
    )
    assert "are not told apart to 90.00 %" in told
    assert told.endswith("one device with some seeds alone.")


def at_once(passes: float, num_bytes: float) -> dict[int, list[tuple[Communication, float]]]:
    """Curves that are above 0.9 at their smallest budget."""
    return {seed: points[:1] for seed, points in curves(passes=passes, num_bytes=num_bytes).items()}


def test_a_way_that_its_smallest_budget_takes_there_may_be_the_faster_one():
    found = at(1.0, B=("one device", at_once(8, 0)))  # 80 s at most: it may have been there after 50
    assert found.fastest == ("subset pretraining", "one device")
    assert [found.ways[way].is_upper_bound for way in found.fastest] == [False, True]
    told = regime_text(found, quality="90.00 %", place="With 4 workers", is_complete=True, num_seeds=5)
    assert "subset pretraining (H) 58 s, one device (B) at most 80 s, data-parallel training (I) 840 s." in told
    found = at(1.0, H=("subset pretraining", at_once(5, 1e9)))  # 58 s at most are fewer than the others' all the same
    assert found.fastest == ("subset pretraining",)
    # so they are if another arm of that way stands for it
    slow = at(1000.0, D=("subset pretraining", at_once(70, 0)))
    assert slow.fastest == ("data-parallel training", "subset pretraining")
    assert (slow.ways["subset pretraining"].arm, slow.ways["subset pretraining"].is_upper_bound) == ("H", True)


def test_arms_are_of_the_way_they_train():
    assert [way_of(*one) for one in (("I", "control"), ("H", "candidate"), ("F", "control"), ("B", "baseline"))] == [
        "data-parallel training",
        "subset pretraining",
        "one device",
        "one device",
    ]


def test_the_sentence_names_the_way_its_seconds_and_what_was_not_compared():
    told = regime_text(at(1.0), quality="90.00 %", place="With 4 workers", is_complete=True, num_seeds=5)
    assert told == (
        "With 4 workers, at 1 Gbit/s a worker: subset pretraining takes the least time to 90.00 %: subset pretraining "
        "(H) 58 s, one device (B) 80 s, data-parallel training (I) 840 s."
    )
    without = regime_at(1.0, {"B": arms()["B"]}, target=0.95, s_per_pass=1.0, seeds=SEEDS)
    told = regime_text(without, quality="95.00 %", place="With 4 workers", is_complete=False, num_seeds=5)
    assert (
        told == "With 4 workers, at 1 Gbit/s a worker: no arm reached 95.00 % with every seed; give larger --budgets."
    )
