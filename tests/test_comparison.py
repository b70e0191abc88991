"""A comparison on digits by actors: hand-counted costs, failures, resuming."""

import copy
import os
import re
import shutil
import signal
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

import raysubset
from raysubset import Config, compare
from raysubset.cluster import put_once
from raysubset.comparison import ComparisonReport
from raysubset.comparison.arms import Arm, Settings, arm_config, final_leg, parse_arm
from raysubset.data import load_full_set
from raysubset.events import Event, LegDone, OnEvent, Progress, Retry, Waiting
from raysubset.legs import Leg, LegRunner, closure
from raysubset.planning import make_plan
from raysubset.report import comparison_sections, read_report
from raysubset.run_directory import RunDirectory, checkpoint_path, weights_path
from raysubset.run_directory.ledger import Ledger
from raysubset.work import Run
from tests.processes import Processes
from tests.slow_steps import slow_down, speed_up
from tests.tiny import same_bits, stored_weights

pytestmark = pytest.mark.usefixtures("processes")

NUM_TRAIN, NUM_VALIDATION, SIZE = 1294, 144, 323
FIRST, REST = 64 * 9 * 8, 16 * 72 * 16 + 16 * 10  # products of an example's forward pass; the first needs no gradient
SHARE = (FIRST + REST) / (2 * FIRST + 3 * REST)  # of a pass that is forward
SAVGM = "H:aggregation.method=savgm,aggregation.savgm_fraction=0.5,rounds.num=2,rounds.outer_momentum=0,subsets.num=2"
TAUGHT = (  # by its minima, in rounds that send differences and average optimizer states
    "H:subsets.num=2,rounds.num=2,rounds.optimizer_state=average,rounds.send=int8,"
    "fine_tuning.distillation=0.5,fine_tuning.keep=best"
)
BROKEN = "B:minimize.learning_rate=1e30"  # diverges in its first epoch


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def events() -> list[Event]:
    return []


@pytest.fixture(scope="module")
def report(storage: Path, events: list[Event], processes: None) -> ComparisonReport:
    arms = ["B", "D", "F", "G", SAVGM, TAUGHT, BROKEN]
    config = Config(name="digits", storage_path=str(storage))
    return compare(config, seeds=2, budgets=[2], arms=arms, learning_rates=[0.1], on_event=events.append)


def runs(report: ComparisonReport, key: str) -> list[dict]:
    (arm,) = [arm for arm in report.arms if arm["key"] == key]
    return arm["points"][0]["runs"]


def forward(num: float) -> float:
    """Passes of so many examples passed forward alone."""
    return num * SHARE / NUM_TRAIN


def test_costs_are_those_counted_by_hand(report: ComparisonReport):
    (run, _) = runs(report, "B")
    assert run["passes"] == run["critical_path_passes"] == pytest.approx(2 + forward(NUM_VALIDATION))
    # D: two passes in the proportion 8 · 323/1294 : 2, in whole steps; both legs validated
    (run, _) = runs(report, "D")
    scale = 2 / (8 * SIZE / NUM_TRAIN + 2)
    steps = round(8 * scale * 6)  # six batches make an epoch of 323
    trained = steps / 6 * SIZE / NUM_TRAIN + round(2 * scale * 21) / 21  # 21 make one of the full set
    assert run["passes"] == pytest.approx(trained + forward(2 * NUM_VALIDATION), rel=2e-3)
    # F throws the first leg away and pays for it all the same
    assert runs(report, "F")[0]["passes"] == pytest.approx(run["passes"], rel=1e-6)


def test_four_disjoint_minima_cost_four_and_lie_side_by_side(report: ComparisonReport):
    (run, _) = runs(report, "G")
    scale = 2 / (4 * 8 * SIZE / NUM_TRAIN + 2)
    subset = round(8 * scale * 6) / 6 * SIZE / NUM_TRAIN + forward(NUM_VALIDATION)
    aggregation = forward(NUM_TRAIN + NUM_VALIDATION)  # batch-norm statistics on the calibration sample; validation
    tuning = round(2 * scale * 21) / 21 + forward(NUM_VALIDATION)
    assert run["passes"] == pytest.approx(4 * subset + aggregation + tuning, rel=5e-3)
    assert run["critical_path_passes"] == pytest.approx(subset + aggregation + tuning, rel=5e-3)


def test_savgm_pays_for_the_halves_of_subsets_after_their_minima(report: ComparisonReport):
    (run, _) = runs(report, SAVGM)
    # Trunk, two rounds of 8 epochs of two subsets and of half of each, tuning: 1 + 2 · 8 · 1.5 + 2 for 2 passes
    scale, half = 2 / 27, NUM_TRAIN // 2
    subset = round(8 * scale * 11) / 11 * half / NUM_TRAIN + forward(NUM_VALIDATION)  # eleven batches an epoch
    part = round(8 * scale * 6) / 6 * (half / 2) / NUM_TRAIN + forward(NUM_VALIDATION)  # six
    aggregation = 2 * forward(NUM_TRAIN + NUM_VALIDATION)  # of the corrected mean, and of the plain one beside it
    around = (round(scale * 21) + round(2 * scale * 21)) / 21 + 2 * forward(NUM_VALIDATION)
    assert run["passes"] == pytest.approx(around + 2 * (2 * (subset + part) + aggregation), rel=5e-3)
    assert run["critical_path_passes"] == pytest.approx(around + 2 * (subset + part + aggregation), rel=5e-3)


@pytest.mark.parametrize("key", [SAVGM, TAUGHT], ids=["savgm", "taught"])
def test_an_arm_ends_at_the_bits_of_a_run_with_its_settings(
    report: ComparisonReport, storage: Path, tmp_path: Path, key: str
):
    arm, (result, _) = parse_arm(key), runs(report, key)
    base = Config(name="digits", storage_path=str(tmp_path))
    config = arm_config(arm, base, Settings(0.1, 64), seed=result["seed"], num_workers=2)
    shape = {"num_train": NUM_TRAIN, "num_workers": 2, "legs_path": f"{storage}/digits/legs"}
    last = final_leg(arm, config, 2.0, make_plan(config, load_full_set(config.data)), **shape)
    assert last.key == result["leg"]
    epochs = {
        f"{'minimize' if leg.stage == 'subsets' else leg.stage}.epochs": leg.epochs
        for leg in closure(last)
        if leg.kind != "aggregate"
    }
    run = raysubset.run(config.with_overrides(epochs | {"fine_tuning.num_workers": 1}))
    assert same_bits(stored_weights(RunDirectory.at(run.uri), weights_path("fine_tuning")), last.output.weights())
    tested = last.tested()
    assert tested is not None
    assert run.test.to_dict() == tested


def test_what_an_arm_is_made_of_is_in_the_record(report: ComparisonReport):
    legs = report.record["legs"]
    (run, _) = runs(report, "G")
    (before,) = legs[run["leg"]]["inputs"]
    assert (legs[run["leg"]]["stage"], legs[before]["kind"]) == ("fine_tuning", "aggregate")
    members = [legs[key] for key in legs[before]["inputs"]]
    assert [(one["stage"], one["subset"]) for one in members] == [("subsets", n) for n in range(4)]


def test_actors_that_did_the_legs_stay_for_the_test_split(report: ComparisonReport, events: list[Event]):
    starts = [event.text for event in events if isinstance(event, Waiting) and event.text.startswith("actors of")]
    assert starts == ["actors of 1 CPU each start"]


def test_the_ledger_tells_how_long_legs_waited(report: ComparisonReport, storage: Path):
    works = [
        work for key in report.record["legs"] for work in Ledger(RunDirectory(f"{storage}/digits/legs", key)).read()
    ]
    assert {work.stage for work in works} >= {"conventional", "trunk", "subsets", "subsamples", "aggregation"}
    assert all(work.waited_s > 0 for work in works)


def test_an_arm_that_fails_is_named_and_ends_no_other(report: ComparisonReport):
    assert all("DivergedError" in run["error"] for run in runs(report, BROKEN))
    assert all(run["error"] is None for key in ("B", "D", "F", "G") for run in runs(report, key))
    assert set(report.record["failed"].values()) == {run["error"] for run in runs(report, BROKEN)}
    assert BROKEN not in report.record["speed_ups"]["total"]


def test_a_rate_of_the_grid_that_diverges_is_no_failure_of_the_command(report: ComparisonReport):
    assert report.has_failed, "an arm diverged at the rate that was chosen for it"
    record = copy.deepcopy(report.record)
    record["arms"] = [arm for arm in record["arms"] if arm["key"] != BROKEN]
    assert record["failed"]
    assert not ComparisonReport.from_dict(record).has_failed
    record["failed"]["conventional-minimize-0"] = "SubsetFailed: B at rate 0.1, tuning was lost 4 times in a row"
    assert ComparisonReport.from_dict(record).has_failed


def test_two_seeds_are_called_a_smoke_test(report: ComparisonReport):
    for verdict in report.verdicts.values():
        assert verdict["is_smoke_test"]
        assert "smoke test" in verdict["text"]


def test_the_report_is_read_back_and_shown(report: ComparisonReport):
    record = read_report(report.uri)
    assert record == report.to_dict()
    title, *_ = comparison_sections(record)
    word = report.verdicts["total"]["word"]
    assert str(title.lines[0]).startswith(
        f"A tenth of the cost, counting passes in total: {word}. With 2 seeds, a smoke"
    )
    assert "% interval" not in str(title.lines[0])  # of two seeds


def test_going_on_does_only_what_is_new(report: ComparisonReport, storage: Path):
    events: list[Event] = []
    config = Config(name="digits", storage_path=str(storage))
    again = compare(config, seeds=2, budgets=[2], arms=["B", "G"], learning_rates=[0.1], on_event=events.append)
    assert not [event for event in events if isinstance(event, LegDone) and not event.was_there]
    assert any("legs are already there" in event.text for event in events)
    assert runs(again, "G") == runs(report, "G")
    assert again.record["seconds"]["num_sessions"] == 2
    assert again.record["seconds"]["wall"] > report.record["seconds"]["wall"] > 0


def test_an_arm_that_can_never_be_placed_is_refused_before_anything_is_run_unless_it_is_done(
    report: ComparisonReport, storage: Path, tmp_path: Path
):
    config = Config(name="digits", storage_path=str(tmp_path))
    again = partial(compare, config, seeds=2, budgets=[2], arms=["B", "G", "I"], learning_rates=[0.1])
    with pytest.raises(ValueError, match=r"arm I ask for 9 × 1 CPU.*--num-workers.*--cluster.num-cpus.*out of --arms"):
        again(num_workers=9)
    assert not (tmp_path / "digits/legs").exists()
    # As if it had been done on a larger cluster: B's results in its place
    shutil.copytree(storage / "digits/legs", tmp_path / "digits/legs")
    arm = parse_arm("I")
    for run in runs(report, "B"):
        own = arm_config(arm, config, Settings(0.1, 64), seed=run["seed"], num_workers=9)
        leg = baseline(own, 2.0, arm=arm, num_workers=9)
        shutil.copytree(tmp_path / "digits/legs" / run["leg"], tmp_path / "digits/legs" / leg.key)
    assert runs(again(), "I")[0]["passes"] == runs(report, "B")[0]["passes"]  # nine are remembered
    with pytest.raises(ValueError, match="arm I ask for 8 × 1 CPU"):
        again(num_workers=8)


def baseline(
    config: Config, budget: float, *, arm: Arm | None = None, num_workers: int = 2, legs_path: str = ""
) -> Leg:
    """The one leg of arm B, or of another with one."""
    shape = {"num_train": NUM_TRAIN, "num_workers": num_workers, "legs_path": legs_path}
    return final_leg(arm or parse_arm("B"), config, budget, make_plan(config, load_full_set(config.data)), **shape)


def runner_of(config: Config, tell: OnEvent) -> LegRunner:
    full_set = load_full_set(config.data)
    run = Run(config, RunDirectory(config.storage_path, "comparison"), full_set, put_once(full_set), tell)
    return LegRunner(run, num_gpus=0.0)


def test_a_leg_survives_the_death_of_its_process_and_a_spot_notice_costs_no_attempt(
    tmp_path: Path, processes: Processes, monkeypatch: pytest.MonkeyPatch
):
    overrides = {"model.width": 4, "actors.max_attempts": 2, "actors.checkpoint_epochs": 1.0}
    overrides |= {"actors.on_step": "tests.slow_steps:listen"}
    config = Config(storage_path=str(tmp_path)).with_overrides(overrides)
    own = arm_config(parse_arm("B"), config, Settings(0.1, 64), seed=0, num_workers=2)
    leg = baseline(own, 4.0, legs_path=str(tmp_path))
    monkeypatch.chdir(tmp_path)
    slow_down(tmp_path, "conventional", from_step=21 + 1)
    events: list[Event] = []

    def strike() -> None:
        for attempt, blow in enumerate((signal.SIGTERM, signal.SIGKILL)):
            while not leg.directory.exists(checkpoint_path("conventional", attempt)):
                time.sleep(0.01)
            for pid in processes.pids():
                os.kill(pid, blow)
            slow_down(tmp_path, "conventional", from_step=2 * 21 + 1)
        speed_up(tmp_path, "conventional")

    striking = threading.Thread(target=strike, daemon=True)
    striking.start()
    with runner_of(config, events.append) as runner:
        runner.run([leg])
    striking.join()
    works = leg.works()
    assert [work.outcome for work in works] == ["preempted", "lost", "done"]
    assert works[2].cost.num_steps < 4 * 21  # it went on from a checkpoint
    retries = [event.text for event in events if isinstance(event, Retry)]
    assert re.search(rf"{leg.key} left node .* with a checkpoint written", retries[0])
    assert f"{leg.key} was lost" in retries[1]


def test_ctrl_c_leaves_a_checkpoint_of_a_leg_at_work(tmp_path: Path):
    overrides = {"model.width": 4, "actors.checkpoint_epochs": 1e6, "actors.checkpoint_s": 1e6}
    config = Config(storage_path=str(tmp_path)).with_overrides(overrides)
    own = arm_config(parse_arm("B"), config, Settings(0.1, 64), seed=0, num_workers=2)
    leg = baseline(own, 1e4, legs_path=str(tmp_path))

    is_at_work = threading.Event()  # as the driver knows: what an actor began a moment ago ends without a checkpoint

    def tell(event: Event) -> None:
        if isinstance(event, Progress):
            is_at_work.set()

    def press() -> None:
        is_at_work.wait()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    with pytest.raises(KeyboardInterrupt), runner_of(config, tell) as runner:
        runner.run([leg])
    (work,) = leg.works()
    assert work.outcome == "interrupted"
    Ledger(leg.directory).write(replace(work, outcome="running"))  # as an actor does that outlives its node's raylet
    assert [work.outcome for work in leg.works()] == ["lost"] == [work.outcome for work in Ledger(leg.directory).read()]
    newest = leg.directory.newest_checkpoint("conventional")
    assert newest is not None
    assert newest[1]["position"][1] == work.cost.num_steps > 0
