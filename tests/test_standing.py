import pytest

from raysubset.comparison.standing import ArmsStanding
from raysubset.config import Config
from raysubset.data import load_full_set
from raysubset.legs import Leg, Start
from raysubset.planning import make_plan, planned_steps
from raysubset.quality import ACCURACY
from raysubset.sweeping.standing import TrialsStanding


def test_arms_fill_in_with_means_over_seeds_and_the_best_at_the_largest_budget_that_compares():
    budgets = {"B": [1.0, 2.0], "G": [1.0, 2.0]}
    standing = ArmsStanding(ACCURACY, budgets, num_seeds=2, tried={"B": 1.0})
    configs = [Config(seed=seed) for seed in (0, 1)]
    legs = {
        (arm, budget, seed): Leg("/legs", "minimize", configs[seed], "trunk", budget, Start("fresh"), round=arm == "G")
        for arm in budgets
        for budget in (1.0, 2.0)
        for seed in (0, 1)
    }
    for (arm, budget, _), leg in legs.items():
        standing.expect(arm, [leg], 100, budget)
    standing.note_settings("B", "0.1")
    for key, value in ((("B", 1.0, 0), 0.5), (("B", 1.0, 1), 0.7), (("G", 1.0, 0), 0.9), (("B", 2.0, 0), None)):
        standing.note_done(legs[key].key, {"accuracy": value}, was_there=key[0] == "G")
        standing.note_done(legs[key].key, {"accuracy": value})  # a resumed comparison hears of it twice
    event = standing.event()
    assert event.columns == ("learning rate", "1 passes", "2 passes")
    assert [row.cells for row in event.rows] == [("0.1", "60.00%", "- (1/2)"), ("", "90.00% (1/2)", "")]
    assert [(row.passes, row.planned, row.is_best) for row in event.rows] == [(4.0, 7.0, False), (1.0, 6.0, True)]
    assert event.found == 1.0
    assert event.text == "4 of 8 results; best so far G, accuracy 90.00% on validation data at 1 passes"


def test_a_leg_at_work_counts_by_the_share_that_it_has_done():
    standing = ArmsStanding(ACCURACY, {"B": [8.0]}, num_seeds=1, tried={})
    leg = Leg("/legs", "minimize", Config(), "trunk", 8.0, Start("fresh"))
    standing.expect("B", [leg], 100, 8.0)
    passes = []
    for share in (0.25, 0.5, 0.125):  # the last after a death, from the checkpoint before
        standing.note_progress(leg.key, share)
        passes.append(standing.event().rows[0].passes)
    standing.note_done(leg.key, {"accuracy": 0.5})
    standing.note_progress(leg.key, 0.875)  # a report that comes late
    assert (*passes, standing.event().rows[0].passes) == (2.0, 4.0, 1.0, 8.0)


def test_trials_stand_with_the_best_by_validation_loss():
    names = ("a", "b", "c")
    standing = TrialsStanding(ACCURACY, dict.fromkeys(names, 10.0), {"a": 0.0, "b": 0.5, "c": 0.0})
    standing.update(
        "a", "at work", {"stage": "trunk", "passes": 1.0, "validation_loss": 0.5, "validation_accuracy": 0.9}
    )
    standing.update("b", "at work", {"stage": "trunk", "passes": 1.0, "validation_loss": float("nan")})
    event = standing.update("c", "done", {"stage": "done", "passes": 12.0, "validation_loss": 0.4})
    assert event.columns == ("stage", "passes", "validation loss", "accuracy")
    assert [row.cells for row in event.rows] == [
        ("trunk", "1.00", "0.5000", "90.00%"),
        ("trunk", "1.00", "", ""),
        ("done", "12.00", "0.4000", ""),
    ]
    assert [(row.passes, row.is_best) for row in event.rows] == [(1.0, False), (1.0, False), (10.0, True)]
    assert event.found == 0.5
    assert event.text == "1 of 3 trials ended; best so far c, validation loss 0.4000"


def test_a_trial_that_is_stopped_early_leaves_its_passes_out_of_the_plan():
    standing = TrialsStanding(ACCURACY, {"a": 10.0, "b": 10.0}, {"a": 0.0, "b": 0.0})
    standing.update("a", "at work", {"passes": 2.0})
    assert [(row.passes, row.planned) for row in standing.update("a", "done").rows] == [(2.0, 2.0), (0.0, 10.0)]


def test_the_steps_of_a_plan_are_the_passes_that_it_plans():
    config = Config().with_overrides({"rounds.num": 3, "aggregation.method": "savgm"})
    full_set = load_full_set(config.data)
    plan = make_plan(config, full_set)
    steps = list(planned_steps(config, plan, len(full_set.train), 2))
    assert sum(step.passes for step in steps) == pytest.approx(plan.passes)
    expected = [("trunk", 0), *((stage, n) for n in range(3) for stage in ("subsets", "subsamples"))]
    assert [(step.stage, step.round) for step in steps] == [*expected, ("fine_tuning", 0), ("test", 0)]
