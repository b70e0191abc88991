"""What legs came to, judged in the direction of the task's quality: numbers can be checked by hand."""

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray

from raysubset.comparison import checks, compare, gathering
from raysubset.comparison.advice import measured_lines
from raysubset.comparison.arms import ALL_ARMS, Settings, parse_arm
from raysubset.comparison.gathering import gather
from raysubset.comparison.network import Exchange
from raysubset.config import Config
from raysubset.legs.leg import Leg, Start
from raysubset.pipeline.session import Command
from raysubset.quality import ACCURACY, Quality
from raysubset.report import comparison_sections
from raysubset.run_directory import COMPARISON_PATH, RunDirectory
from raysubset.run_directory.ledger import Work
from raysubset.run_directory.shapes import refuse_other_values
from raysubset.sweeping import sweep
from raysubset.training import Cost
from tests.test_comparison_arms import leg

BITS = Quality("bits", higher_is_better=False, unit="bits a token")
R2 = Quality("r2")
NUM_TRAIN, BUDGETS, SEEDS = 100, (1.0, 2.0, 4.0, 8.0), range(5)
LEVELS = {1.0: 0, 2.0: 1, 4.0: 2, 8.0: 3}  # a baseline's, by budget: linear in log passes


@dataclass(frozen=True, eq=False)
class Done(Leg):
    """A leg of a budget that came to a quality on test data."""

    quality: Quality = ACCURACY
    value: float | None = 0.0

    def works(self) -> list[Work]:
        num = round(self.epochs * NUM_TRAIN)
        cost = Cost(num_forward=num, num_backward=num, device_s=self.epochs)
        return [Work(self.stage, 0, None, 0, "node", "cpu", 0.0, ended_at=self.epochs, outcome="done", cost=cost)]

    def validation(self) -> dict[str, Any]:
        return {"loss": 1 / self.epochs, "num_examples": 10, self.quality.name: self.value}

    def tested(self) -> dict[str, Any]:
        return {"loss": 1.0, "num_examples": 10, self.quality.name: self.value}


Compared = Callable[..., dict[str, Any]]


@pytest.fixture
def compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compared:
    data = {"name": "d", "num_train": NUM_TRAIN, "num_test": 10}
    monkeypatch.setattr(gathering, "data_record", lambda full_set: data)
    return lambda quality, at_half_a_pass, **options: gathered(quality, at_half_a_pass, tmp_path, **options)


def gathered(
    quality: Quality, at_half_a_pass: float | None, tmp_path: Path, *, fails: str = "", also_fails: str = ""
) -> dict[str, Any]:
    """comparison.json of an arm of half a pass beside a baseline; a long arm A if B `fails`; E if it `also_fails`.

    The baseline has 2 of BITS, or 0.5 of R2, at one pass, and gets a tenth better each time passes double. Seeds differ
    by thousandths, in both alike.
    """
    sizes: dict[str, Any] = {"num_parameters": 10, "num_bytes": 40, "forward_share": 1 / 3}
    plan: Any = SimpleNamespace(network=sizes, subset_ratios=(2.0,), full_set_ratio=8.0, subsets=(None,), **sizes)
    plan.ratios = {"full_set": 8.0, "subsets": [2.0]}
    full_set: Any = SimpleNamespace(train=range(NUM_TRAIN), quality=quality)
    full_set.task = SimpleNamespace(name="a task", loss_name="a loss", compares_examples=False)
    begin, step = (2.0, -0.1) if quality == BITS else (0.5, 0.1)

    def leg(stage: Any, budget: float, seed: int, value: float | None) -> Leg:
        value = None if value is None else value + seed / 1000
        recipe = {"minimize.learning_rate": 0.4, "minimize.batch_size": 32} if stage == "subsets" else {}
        config = Config(seed=seed).with_overrides(recipe)
        return Done("legs", "minimize", config, stage, budget, Start("fresh"), quality=quality, value=value)

    baseline = {b: {s: leg("conventional", b, s, begin + step * LEVELS[b]) for s in SEEDS} for b in BUDGETS}
    arm = {0.5: {s: leg("subsets", 0.5, s, at_half_a_pass) for s in SEEDS}}
    comparison: Any = SimpleNamespace(run=SimpleNamespace(full_set=full_set), plan=plan, seeds=list(SEEDS))
    comparison.num_workers, comparison.most_beyond, comparison.runner = 2, 0, SimpleNamespace(failed={})
    comparison.tried, comparison.tuning_legs, comparison.at_edge = [], [], {"B"}
    finals = {parse_arm("B"): baseline, parse_arm("D"): arm}
    if fails:
        comparison.runner.failed = {leg: fails for by_seed in baseline.values() for leg in by_seed.values()}
        finals[parse_arm("A")] = {16.0: {s: leg("conventional", 16.0, s, begin + 4 * step) for s in SEEDS}}
    if also_fails:
        failing = {s: leg("subsets", 1.0, s, None) for s in SEEDS}
        finals[parse_arm("E")] = {1.0: failing}
        comparison.runner.failed |= dict.fromkeys(failing.values(), also_fails)
    settings = {key: Settings(0.1, 64) for key in "ABDE"}
    found = gather(comparison, finals, settings, margin=0.01, bandwidth=2.0)
    directory = RunDirectory(str(tmp_path), "c")
    head = {"name": "c", "uri": directory.uri, "config": Config().to_dict(), "environment": None}
    directory.write_json(COMPARISON_PATH, head | found)
    return directory.read_json(COMPARISON_PATH)


def words(record: dict[str, Any]) -> str:
    return "\n".join(
        line for part in comparison_sections(record) for line in (*map(" | ".join, part.rows), *map(str, part.lines))
    )


@pytest.mark.parametrize(("quality", "good", "bad"), [(BITS, 1.7, 2.3), (R2, 0.8, 0.2)])
def test_the_verdict_follows_the_qualitys_direction(quality: Quality, good: float, bad: float, compared: Compared):
    record = compared(quality, good)
    assert record["task"] == {"name": "a task", "loss": "a loss", "quality": quality.to_dict()}
    assert record["verdicts"]["total"]["word"] == "confirmed"
    speed_up = record["speed_ups"]["total"]["D"]
    # the baseline comes within 0.01 of what it has at 8 passes at 2^2.9; the arm has that at half a pass
    assert speed_up["per_seed"]["0"] == pytest.approx(2**2.9 / 0.5, rel=0.02)
    assert set(speed_up["bounds"].values()) == {"at_least"}
    worse = compared(quality, bad)
    assert worse["verdicts"]["total"]["word"] == "refuted"
    assert set(worse["speed_ups"]["total"]["D"]["per_seed"].values()) == {0.0}
    (point,) = worse["arms"][1]["points"]
    assert point["difference"]["estimate"] == pytest.approx(bad - good)  # raw: the arm's less the conventional one's
    assert point["difference"]["low"] <= point["difference"]["high"]
    assert not point["is_non_inferior"]


def test_a_claim_is_not_refuted_while_another_arm_failed_at_what_may_be_a_tenth(compared: Compared):
    record = compared(R2, 0.2, also_fails="RuntimeError: out of memory")
    assert record["regime"]["sentence"].endswith(" E failed, and may take less.")
    failed = record["verdicts"]
    # one pass is more than a tenth of 8 in total, but may be half as long for two workers
    assert (failed["total"]["word"], failed["critical_path"]["word"]) == ("refuted", "inconclusive")
    assert failed["critical_path"]["text"].endswith("E failed, and may be as good.")
    diverged = compared(R2, 0.2, also_fails="DivergedError: the loss is not finite")
    assert {verdict["word"] for verdict in diverged["verdicts"].values()} == {"refuted"}
    assert "failed" not in diverged["regime"]["sentence"]


def test_equal_accuracies_on_ten_test_examples_are_not_certainly_equal(compared: Compared, monkeypatch: Any):
    monkeypatch.setattr(Done, "tested", lambda leg: {"loss": 1.0, "num_examples": 10, "accuracy": 0.9})
    record = compared(ACCURACY, 0.9)
    baseline = record["arms"][0]["points"]
    itself = next(point for point in baseline if point["budget"] == record["conventional"]["budget"])
    assert (itself["difference"]["low"], itself["difference"]["high"], itself["is_non_inferior"]) == (0, 0, True)
    (point,) = record["arms"][1]["points"]
    assert point["difference"]["low"] == pytest.approx(-0.0555, abs=1e-4)  # 2.776 * 0.1 / 5
    assert not point["is_non_inferior"]  # by more than 1 point
    assert point["mean"]["test_accuracy_interval"]["high"] == pytest.approx(0.9555, abs=1e-4)


def test_numbers_of_a_comparison_are_in_the_qualitys_units(compared: Compared):
    record = compared(BITS, 2.3)
    assert record["conventional"]["test_bits"] == pytest.approx(1.702)
    assert record["conventional"]["target_bits"] == pytest.approx(1.712)
    told = words(record)
    assert "1.702 bits a token on test. As good means worse than that by at most 0.01 bits a token: 1.712" in told
    assert "one subset fall short by more than 0.01 bits a token" in told
    assert "2.302 ± 0.002" in told  # scipy.stats.sem(thousandths) * t.ppf(0.975, 4)
    assert "+0.6 [+0.6, +0.6]" in told
    assert told.splitlines()[-1] == record["regime"]["sentence"].replace("(B)", "(conventional)")
    assert record["regime"]["sentence"].startswith(
        "With 10 parameters (Q = 8, subsets 2), 2 workers and budgets of 0.5 to 8 passes, at 2 Gbit/s a worker: one "
        "device takes the least time to 1.712 bits a token: one device (B) "
    )
    assert record["regime"]["sentence"].endswith(
        "Not every way was compared: add I to --arms for data-parallel training."
    )
    at = {one["gbit_per_s"]: one["ways"] for one in record["regime"]["by_bandwidth"]}
    assert list(at) == record["network"]["bandwidths"] == [0.1, 1.0, 2.0, 10.0, 100.0]
    # the baseline comes within 0.01 of its 8 passes at 2^2.9, a second each on any network; D never gets there
    assert {(way, one["arm"]) for ways in at.values() for way, one in ways.items()} == {("one device", "B")}
    assert at[2.0]["one device"]["seconds"] == pytest.approx(2**2.9, rel=0.02)
    for ways in (one["ways"] for one in record["regime"]["by_bandwidth"]):
        ways["one device"]["is_upper_bound"] = True
    assert "at most 7.4" in words(record)
    assert {run["storage_reads"] for arm in record["arms"] for point in arm["points"] for run in point["runs"]} == {0.0}
    assert "reads" not in told
    assert "accuracy" not in told
    assert "%" not in told.replace("95 %", "").replace("94%", "")


def test_a_regime_whose_sentence_is_no_text_is_damage(compared: Compared):
    record = compared(R2, 0.8)
    record["regime"]["sentence"] = 3
    with pytest.raises(ValueError, match="sentence"):
        refuse_other_values(COMPARISON_PATH, record)


def test_ledgers_are_read_with_many_requests_at_a_time_once_each(compared: Compared, monkeypatch: pytest.MonkeyPatch):
    read, works = list[tuple[threading.Thread, str]](), Done.works
    monkeypatch.setattr(Done, "works", lambda leg: (read.append((threading.current_thread(), leg.key)), works(leg))[1])
    compared(ACCURACY, 0.9)
    threads, keys = zip(*read, strict=True)
    assert threading.main_thread() not in threads
    assert len({*keys}) == len(keys) > 1


def test_the_record_holds_what_an_arm_was_tuned_to_and_what_it_trained_with(compared: Compared):
    arm = compared(R2, 0.8)["arms"][1]
    assert arm["settings"] == {"learning_rate": 0.1, "batch_size": 64}
    assert arm["trained"] == {"learning_rate": 0.4, "batch_size": 32}


def test_a_quality_that_is_not_finite_is_neither_as_good_nor_shown_to_be_worse(compared: Compared):
    record = compared(R2, None)
    (point,) = record["arms"][1]["points"]
    assert not point["is_non_inferior"]
    assert record["verdicts"]["total"]["word"] == "inconclusive"
    assert record["speed_ups"]["total"] == {}


def test_a_speed_up_of_which_no_seed_tells_anything_is_shown_as_unknown(compared: Compared):
    record = compared(R2, 0.2)
    interval = {"estimate": None, "low": 0.0, "high": None, "coverage": 0.94, "num": 5}
    record["speed_ups"]["total"]["D"]["interval"] = interval
    assert "one subset | – [0.00, …] 94% | 0.00 " in words(record)
    at = SimpleNamespace(s_per_pass=1.0)
    record["speed_ups"]["critical_path"]["D"]["interval"] = interval
    assert "speed-up" not in list(measured_lines(record, at))[-1]  # pyright: ignore[reportArgumentType]


def test_the_time_of_a_pass_is_that_of_the_baselines_runs_that_finished(compared: Compared):
    record = compared(R2, 0.8, fails="SubsetFailed: it was lost 4 times in a row")
    assert record["conventional"]["budget"] == 16.0
    assert record["network"]["s_per_pass"] == pytest.approx(1.0)
    assert {row["arm"] for row in record["network"]["rows"]} == {"A", "D"}


def test_a_margin_is_the_one_given_the_datas_the_qualitys_or_asked_for():
    assert checks.checked_margin(0.2, R2, "mnist") == 0.2
    assert checks.checked_margin(None, ACCURACY, "mnist") == 0.001
    assert checks.checked_margin(None, ACCURACY, "digits") == checks.MARGIN
    assert checks.checked_margin(None, replace(R2, margin=0.05), "mnist") == 0.05
    assert checks.checked_margin(3.0, BITS, "mnist") == 3.0
    with pytest.raises(ValueError, match=r"--margin = 3.0 must be in \[0, 1\)"):
        checks.checked_margin(3.0, ACCURACY, "mnist")


@pytest.mark.parametrize(
    ("overrides", "left_out"),
    [
        ({}, []),
        ({"minimize.optimizer": "lbfgs"}, ["C", "I", "H:rounds.num=4"]),
        ({"minimize.optimizer": "levenberg_marquardt", "task.loss": "squared_error"}, ["C", "I", "H:rounds.num=4"]),
        ({"subsets.start": "independent", "trunk.epochs": 0.0}, ["H:rounds.num=4"]),
        ({"minimize.patience": 3}, ["H:rounds.num=4"]),
        ({"minimize.averaging.kind": "pswa"}, ["C"]),
    ],
)
def test_arms_that_nobody_named_are_those_that_the_config_allows(overrides: Any, left_out: list[str]):
    config = Config().with_overrides(overrides)
    rates = [config.minimize.peak_learning_rate()]
    arms, notes = checks.usual_arms(config, rates[0])
    assert arms == [key for key in ALL_ARMS if key not in left_out]
    assert [note.text.split()[6].rstrip(":") for note in notes] == left_out
    assert [arm.key for arm in checks.checked_arms(config, [0, 1], [2.0], arms, rates)] == arms
    for key in left_out:
        with pytest.raises(ValueError, match=rf"^arm {key}"):
            checks.checked_arms(config, [0, 1], [2.0], ["B", "G", key], rates)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"arms": "BG"}, "there is no arm 'BG'"),  # which were two arms, letter by letter
        ({"arms": "B"}, "add D, E, G or H to --arms"),
        ({"arms": ["B", 3]}, "--arms: 3 should be a text"),
        ({"budgets": "16"}, "--budgets: '16' should be a number"),  # 1 and 6
        ({"budgets": 0.5}, "--budgets: 0.5 passes is too small"),
        ({"seeds": "01"}, "--seeds: '01' should be a whole number"),
        ({"seeds": [0.5, 1]}, "--seeds: 0.5 should be a whole number"),
        ({"seeds": np.int64(1)}, "--seeds: 1 cannot tell a difference from noise"),
        ({"learning_rates": "0.1"}, "--learning-rates: '0.1' should be a number"),
        ({"learning_rates": -0.5}, "--learning-rates = -0.5 must be positive"),
        ({"batch_sizes": "64"}, "--batch-sizes: '64' should be a whole number"),
        ({"batch_sizes": 0}, "--batch-sizes = 0 must be at least 1"),
    ],
)
def test_a_text_is_no_list_of_its_letters_and_a_single_value_is_a_list_of_one(
    given: dict[str, Any], told: str, tmp_path: Path
):
    with pytest.raises(ValueError, match=re.escape(told)):
        compare(Config(storage_path=str(tmp_path)), **given)


def test_a_seed_that_is_given_twice_counts_once():
    """Or two seeds, given five times in all, would be called no smoke test, and no arm be found that has them all."""
    command: Any = SimpleNamespace(config=Config(seed=7))
    assert Command.chosen_seeds(command, [3, 3, 4, 3, 4], least=0) == [3, 4]
    assert list(Command.chosen_seeds(command, 2, least=0)) == [7, 8]


def test_seeds_of_a_sweep_are_no_letters_of_a_text(tmp_path: Path):
    with pytest.raises(ValueError, match=r"--seeds: '12' should be a whole number"):
        sweep(Config(storage_path=str(tmp_path)), {"subsets.size": [100]}, seeds="12")  # pyright: ignore


def test_a_comparison_that_needs_a_margin_asks_for_it_before_ray_is_started(tmp_path: Path):
    with pytest.raises(ValueError, match=r"how much worse in r2 may a model be .* give --margin"):
        compare(Config(storage_path=str(tmp_path)).with_overrides({"data.name": "diabetes"}))
    assert not ray.is_initialized()
    assert list(tmp_path.iterdir()) == []


def test_what_a_worker_measures_alone_and_fewer_workers_than_asked_for_lengthen_the_critical_path(
    compared: Compared, monkeypatch: pytest.MonkeyPatch
):
    def works(one: Leg) -> list[Work]:
        cost = Cost(num_forward=90, num_backward=60, device_s=1.0)  # of 100 examples: 0.6 passes, 0.3 / 3 to measure
        entry = Work(one.stage, 0, None, 0, "node", "cpu", 0.0, ended_at=1.0, outcome="lost", cost=cost, num_workers=3)
        return [entry, replace(entry, attempt=1, outcome="done", num_workers=2, num_lone_forward=30)]

    monkeypatch.setattr(Done, "works", works)
    for arm in compared(R2, 0.8)["arms"]:
        for run in (run for point in arm["points"] for run in point["runs"]):
            assert run["passes"] == pytest.approx(2 * 0.7)
            assert run["critical_path_passes"] == pytest.approx(0.7 / 3 + 0.6 / 2 + 0.1)


def test_all_reduces_of_a_trunk_and_of_fine_tuning_are_sent_beside_the_weights_of_rounds():
    last = leg("H:rounds.num=2", overrides={"trunk.num_workers": 2, "fine_tuning.num_workers": 3})
    steps = {"trunk": ((5, 2),), "fine_tuning": ((4, 3), (2, 2), (9, 1))}  # an elastic job loses a worker, then another

    def works(one: Leg) -> list[Work]:
        return [
            Work(one.stage, 0, None, 0, "node", "cpu", 0.0, cost=Cost(num_steps=num_steps), num_workers=num_workers)
            for num_steps, num_workers in steps.get(one.stage, ((9, 1),))
        ]

    exchange = Exchange(4, start=40, shared=40, own=30, aggregate=80)
    plan = SimpleNamespace(num_parameters=300)
    legs = SimpleNamespace(works=works, exchange=lambda _: exchange, plan=plan)
    # two rounds of start, minimum and state, three more minima, the aggregate; 2 (N-1)/N gradients of 4 bytes a step
    sent = 2 * (40 + 40 + 30 + 3 * 40 + 80) + (5 + 2) * (2 * 1 / 2 * 300 * 4) + 4 * (2 * 2 / 3 * 300 * 4)
    assert gathering.Legs.sent(legs, last) == (sent, 2 + 5 + 2 + 4)  # pyright: ignore[reportArgumentType]
