import json
import math
import os
import pickle
import re
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any, cast

import pytest

from raysubset.cli import call
from raysubset.cluster import Process
from raysubset.config import Config
from raysubset.events import Event
from raysubset.pipeline import session
from raysubset.pulse import Pulse
from raysubset.quality import ACCURACY
from raysubset.report import read_report, sweep_sections, write_files
from raysubset.report.sweeps import sweep_command
from raysubset.run_directory import CONFIG_PATH, REPORT_PATH, SWEEP_PATH, RunDirectory
from raysubset.run_directory.ledger import Ledger, Work
from raysubset.sweeping import driver, sweep
from raysubset.sweeping.driver import _quiet_tune, _TrialEvents
from raysubset.sweeping.lookout import TrialsLookout
from raysubset.sweeping.plan import (
    Trial,
    divide,
    plan_trials,
    shared_trunks,
    trunk_leg,
    widest_stage,
)
from raysubset.sweeping.records import WHERE, recommend, recommendation, settings_of, trial_measures
from raysubset.sweeping.standing import TrialsStanding
from raysubset.training import Cost
from raysubset.work import Piece
from tests.test_html_report import check_self_contained
from tests.test_report import BITS, a_record, of_task

# isort: split
from ray import cloudpickle, tune  # after raysubset.cluster, which sets what Ray reads when it is imported


def planned(space: dict[str, Any], *, seeds: Any = (0,), num_samples: int = 1, **overrides: Any) -> list[Trial]:
    config = Config().with_overrides({key.replace("__", "."): value for key, value in overrides.items()})
    return plan_trials(config, space, seeds=seeds, num_samples=num_samples, storage_path="/runs/sweep/trials")


# Trials and their names


def test_every_combination_of_lists_and_seeds_is_a_trial_named_by_what_is_special_of_it() -> None:
    trials = planned({"subsets.size": [100, 200], "minimize.learning_rate": [0.05, 0.1]}, seeds=[3, 4])
    assert [trial.name for trial in trials][:3] == [
        "subsets.size-100_minimize.learning_rate-0.05_seed-3",
        "subsets.size-100_minimize.learning_rate-0.05_seed-4",
        "subsets.size-100_minimize.learning_rate-0.1_seed-3",
    ]
    assert len(trials) == 8
    config = trials[2].config
    assert (config.subsets.size, config.minimize.learning_rate, config.seed) == (100, 0.1, 3)
    assert (config.storage_path, config.run_name()) == ("/runs/sweep/trials", trials[2].name)


def test_a_trials_train_job_has_one_worker_unless_told_otherwise() -> None:
    assert [t.config.fine_tuning.num_workers for t in planned({"subsets.size": [100]})] == [1]
    (trial,) = planned({"subsets.size": [100]}, fine_tuning__num_workers=2)
    assert trial.config.fine_tuning.num_workers == 2


def test_distributions_are_drawn_from_the_seed_for_each_combination() -> None:
    space = {"subsets.size": tune.grid_search([100, 200]), "minimize.learning_rate": tune.loguniform(0.01, 1)}
    trials, again = (planned(space, num_samples=2) for _ in range(2))
    assert [trial.name for trial in trials] == [trial.name for trial in again]
    rates = [trial.config.minimize.learning_rate for trial in trials]
    assert rates[:2] == rates[2:]
    assert len(set(rates)) == 2
    assert all(rate and 0.01 <= rate <= 1 for rate in rates)
    other = planned(space, num_samples=2, seed=1)
    assert [trial.name for trial in other] != [trial.name for trial in trials]


@pytest.mark.parametrize(
    ("space", "told"),
    [
        ({}, "nothing to sweep"),
        ({"subsets.size": []}, "neither a list of values nor a distribution"),
        ({"subsets.size": 100}, "neither a list of values nor a distribution"),
        ({"subsets.sise": [100]}, "did you mean subsets.size?"),
        ({"subsets.size": [100, 0]}, "must be at least 1"),
        ({"subsets.size": [100, 100]}, "more than once"),
        ({"seed": [1, 2]}, "give --seeds"),
        ({"cluster.num_cpus": [1, 2]}, "cannot be swept"),
    ],
)
def test_mistakes_in_a_space_are_told_before_anything_runs(space: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        planned(space)


@dataclass
class Known:
    """What is asked of a full set before a sweep begins."""

    quality: Any
    task: Any
    fingerprint: None = None
    start_weights: tuple[()] = ()


def test_trials_that_learn_different_things_are_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nats, squares = SimpleNamespace(loss_name="nats"), SimpleNamespace(loss_name="squares")
    sets = {
        "digits": Known(quality=ACCURACY, task=nats),
        "diabetes": Known(quality=BITS, task=squares),
    }
    monkeypatch.setattr(session, "load_full_set", lambda *learned, known: sets[learned[0].name])
    with pytest.raises(ValueError, match=r"learn different things \(accuracy, bits a token\)"):
        sweep(Config(storage_path=str(tmp_path)), {"data.name": list(sets)}, seeds=1)
    assert list(tmp_path.iterdir()) == []
    characters = Known(
        quality=replace(BITS, unit="bits a character"), task=nats
    )  # of which a text has fewer than bytes
    with pytest.raises(ValueError, match=r"learn different things \(bits a character, bits a token\)"):
        driver._different_losses(cast(Any, [Known(quality=BITS, task=nats), characters]))
    sets["diabetes"].quality = ACCURACY
    assert driver._different_losses(cast(Any, [sets["digits"]])) == ""
    with pytest.raises(ValueError, match=r"different losses \(nats, squares\).* leave --prune out"):
        sweep(Config(storage_path=str(tmp_path)), {"data.name": list(sets)}, seeds=1, scheduler="asha")
    assert list(tmp_path.iterdir()) == []


# Trunks


def test_trials_of_one_seed_share_a_trunk_whatever_their_subsets() -> None:
    trials = planned({"subsets.size": [100, 200], "minimize.epochs": [1.0, 2.0]}, seeds=[0, 1])
    shared = shared_trunks(trials, "/runs/sweep/trunks")
    assert shared.keys() == {trial.name for trial in trials}
    assert len({trunk.key for trunk in shared.values()}) == 2


@pytest.mark.parametrize(
    ("key", "value", "matters"),
    [
        ("minimize.momentum", 0.5, True),
        ("minimize.learning_rate", 0.3, True),
        ("trunk.epochs", 2.0, True),
        ("model.width", 4, True),
        ("actors.num_cpus", 2, True),
        ("data.split_seed", 1, True),
        ("minimize.schedule", "constant", False),
        ("minimize.target_loss", 0.1, False),
        ("subsets.num", 2, False),
        ("fine_tuning.learning_rate", 0.3, False),
        ("rounds.num", 2, False),
        ("actors.max_num", 2, False),
    ],
)
def test_a_trunk_is_shared_exactly_where_all_it_depends_on_is_equal(key: str, value: Any, matters: bool) -> None:
    a, b = (trunk_leg(config, "/runs") for config in (Config(), Config().with_overrides({key: value})))
    assert (a != b) == matters


def test_a_shared_trunk_is_what_each_trials_trunk_would_be() -> None:
    config = Config(seed=3).with_overrides({"trunk.learning_rate": 0.02, "minimize.epochs": 3.0, "trunk.epochs": 2.0})
    leg = trunk_leg(config, "/runs")
    assert leg.config.stage("trunk", epochs=leg.epochs) == config.stage("trunk")
    assert isinstance(leg.piece, Piece)
    own = Piece(config, leg.directory, "trunk")
    assert (leg.piece.folder, leg.piece.start_id, leg.piece.measures) == (own.folder, own.start_id, own.measures)
    several = trunk_leg(config.with_overrides({"trunk.num_workers": 2}), "/runs")
    assert (several.kind, several.num_workers) == ("train", 2)


def test_a_trunk_of_a_single_trial_is_left_to_it() -> None:
    assert shared_trunks(planned({"subsets.size": [100]}), "/runs") == {}
    assert shared_trunks(planned({"subsets.size": [100, 200]}, trunk__epochs=0.0), "/runs") == {}


# Room


@pytest.mark.parametrize(
    ("num_slots", "widest", "num_trials", "expected"),
    [(2, 1, 9, (2, 1)), (2, 2, 9, (1, 2)), (8, 3, 9, (2, 4)), (8, 1, 3, (3, 2)), (0, 1, 9, (1, 1)), (1, 4, 9, (1, 1))],
)
def test_trials_together_never_ask_for_more_places_than_there_are(
    num_slots: int, widest: int, num_trials: int, expected: tuple[int, int]
) -> None:
    at_once, slots_each = divide(num_slots, widest=widest, num_trials=num_trials)
    assert (at_once, slots_each) == expected
    if num_slots >= widest:
        assert at_once * slots_each <= num_slots
        assert slots_each >= widest


def test_the_widest_stage_is_the_largest_train_job_that_is_run() -> None:
    config = Config().with_overrides({"fine_tuning.num_workers": 4, "trunk.num_workers": 3})
    assert widest_stage(config) == 4
    assert widest_stage(config.with_overrides({"fine_tuning.epochs": 0.0})) == 3
    assert widest_stage(config.with_overrides({"fine_tuning.epochs": 0.0, "trunk.epochs": 0.0})) == 1


def test_a_baseline_is_a_conventional_run_a_seed_of_as_many_epochs_as_a_subset_over_all_rounds() -> None:
    config = Config().with_overrides({"minimize.epochs": 5.0, "rounds.num": 3, "fine_tuning.distillation": 0.5})
    arguments: dict[str, Any] = {"seeds": (0, 1), "num_samples": 1, "storage_path": "/trials", "baseline": True}
    *swept, first, last = plan_trials(config, {"subsets.size": [100]}, **arguments)
    assert [trial.is_baseline for trial in (*swept, first, last)] == [False, False, True, True]
    assert (first.name, last.config.seed) == ("method-conventional_seed-0", 1)
    assert first.config.conventional.epochs == 15
    assert shared_trunks([*swept, first, last], "/trunks") == {}
    assert widest_stage(first.config.with_overrides({"conventional.num_workers": 3})) == 3
    given = config.with_overrides({"conventional.epochs": 2.0})
    assert plan_trials(given, {"subsets.size": [100]}, **arguments)[-1].config.conventional.epochs == 2


# Settings and the recommendation


def trial(size: int, seed: int, loss: float | None, *, state: str = "done", **overrides: Any) -> dict[str, Any]:
    """Q is a hundredth of the size, passes are its tenth, half of them on the critical path."""
    record = {"name": f"{size}-{seed}", "seed": seed, "overrides": {"subsets.size": size, **overrides}, "state": state}
    if state != "done":
        return record | ({"error": "ValueError: planted"} if state == "failed" else {})
    return record | {
        "num_subsets": 4,
        "subset_size": size,
        "overdetermination_ratio": size / 100,
        **{f"{where}_loss": loss for where in WHERE},
        **{f"{where}_accuracy": 0.9 for where in WHERE},
        "passes": size / 10,
        "critical_path_passes": size / 20,
    }


def of_losses(losses: dict[int, list[float]]) -> list[dict[str, Any]]:
    return [trial(size, seed, loss) for size, values in losses.items() for seed, loss in enumerate(values)]


def test_a_setting_is_the_mean_over_its_seeds_with_its_standard_error() -> None:
    small, large = settings_of(of_losses({100: [0.1, 0.2, 0.3], 200: [0.5]}), ACCURACY)
    assert small["validation_loss"]["mean"] == pytest.approx(0.2)
    assert small["validation_loss"]["standard_error"] == pytest.approx(0.1 / math.sqrt(3))
    assert large["validation_loss"] == {"mean": 0.5, "standard_error": None}
    assert (small["num_seeds"], small["overdetermination_ratio"]) == (3, 1.0)


@pytest.mark.parametrize(
    ("losses", "size"),
    [
        ({100: [0.9, 0.9], 200: [0.31, 0.31], 400: [0.2, 0.4]}, 200),  # best 0.3 ± 0.1 reaches up to 0.4
        ({100: [0.39, 0.39], 200: [0.31, 0.31], 400: [0.2, 0.4]}, 100),
        ({100: [0.41, 0.41], 400: [0.2, 0.4]}, 400),
        ({400: [0.2, 0.4], 100: [0.39, 0.39]}, 100),  # whatever their order
        ({100: [0.31], 400: [0.3]}, 400),  # one seed: no error, the best
    ],
)
def test_the_smallest_subset_within_one_standard_error_of_the_best(losses: dict[int, list[float]], size: int) -> None:
    settings = settings_of(of_losses(losses), ACCURACY)
    position = recommend(settings)
    assert position is not None
    assert settings[position]["subset_size"] == size
    assert f"{size} examples" in recommendation(settings)


def test_among_settings_of_one_size_the_least_loss_is_recommended() -> None:
    rate = "minimize.learning_rate"
    rates: list[Any] = [({rate: 0.1}, 0.3), ({rate: 0.2}, 0.29)]
    trials = [trial(100, seed, loss + seed / 10, **own) for seed in (0, 1) for own, loss in rates]
    settings = settings_of(trials, ACCURACY)
    assert settings[recommend(settings) or 0]["overrides"][rate] == 0.2
    assert f"{rate} = 0.2" in recommendation(settings)


def test_a_setting_of_which_seeds_failed_is_recommended_if_no_other_finished_with_all_and_that_is_told() -> None:
    part = [*of_losses({100: [0.1, 0.2]}), trial(100, 2, None, state="failed")]
    settings = settings_of([*part, *of_losses({200: [0.5, 0.6, 0.7]})], ACCURACY)
    assert recommend(settings) == 1
    told = recommendation(settings)
    assert told.startswith("The smallest subset within one standard error of the best: 200 examples")
    assert told.endswith(" Settings of which seeds failed were set aside (100 examples, 1 of 3).")
    alone = settings_of([*part, trial(200, 0, None, state="failed"), trial(200, 1, None)], ACCURACY)
    assert recommend(alone) == 0
    assert "No setting finished with all its seeds, and those that failed may be the worse ones" in recommendation(
        alone
    )
    assert "failed" not in recommendation(settings_of(of_losses({200: [0.5, 0.6]}), ACCURACY))


def test_pruned_seeds_rule_a_setting_out() -> None:
    pruned = [*of_losses({100: [0.1, 0.2], 200: [0.5, 0.6]}), trial(100, 2, None, state="pruned")]
    assert recommend(settings_of(pruned, ACCURACY)) == 1


def test_nothing_is_recommended_by_losses_that_differ(tmp_path: Path) -> None:
    (finished,) = plan_trials(Config(), {"subsets.size": [100]}, seeds=[0], num_samples=1, storage_path=str(tmp_path))
    RunDirectory(str(tmp_path), finished.name).write_json(REPORT_PATH, a_record())
    assert driver._gather([finished], {}, {}, ACCURACY, "")["recommended"] == 0
    record = driver._gather([finished], {}, {}, ACCURACY, "the losses differ")
    assert (record["recommended"], record["recommendation"]) == (None, "No recommendation: the losses differ.")


def test_nothing_is_recommended_where_nothing_has_a_finite_loss() -> None:
    settings = settings_of([trial(100, 0, None), trial(200, 0, None, state="failed")], ACCURACY)
    assert recommend(settings) is None
    assert "No recommendation" in recommendation(settings)


def test_a_trial_keeps_what_its_report_says_of_its_subsets_before_and_after_fine_tuning() -> None:
    report = a_record()
    measured, last = trial_measures(report), report["stages"]["rounds"][-1]
    assert measured["own_loss"] == pytest.approx(fmean(one["training"]["loss"] for one in last["minima"]))
    assert measured["full_set_loss"] == last["aggregation"]["training"]["loss"]
    assert measured["before_accuracy"] == last["aggregation"]["validation"]["accuracy"]
    assert measured["validation_loss"] == report["validation"]["loss"]
    assert measured["test_accuracy"] == report["test"]["accuracy"]


# The report


def a_sweep(folder: Path) -> str:
    """A finished sweep's directory: two sizes of two seeds, a third that failed."""
    trials = [*of_losses({100: [0.39, 0.39], 400: [0.2, 0.4]}), trial(5000, 0, None, state="failed")]
    settings = settings_of(trials, ACCURACY)
    record = {
        "kind": "sweep",
        "name": "a-sweep",
        "uri": str(folder / "a-sweep"),
        "space": {"subsets.size": [100, 400, 5000]},
        "seeds": [0, 1],
        "trials": trials,
        "settings": settings,
        "recommended": recommend(settings),
        "recommendation": recommendation(settings),
        "cost": {"passes": 90.0, "device_s": 12.0},
    }
    directory = RunDirectory(str(folder), "a-sweep")
    directory.open(Config(name="a-sweep").to_dict() | {"kind": "sweep"}, {})
    directory.write_json(SWEEP_PATH, record)
    return directory.uri


def test_the_report_has_a_row_a_setting_the_failed_trial_and_the_recommendation(tmp_path: Path) -> None:
    table, curves, lost, told = sweep_sections(read_report(a_sweep(tmp_path)))
    assert [row[0] for row in table.rows] == ["100", "400", "5000"]
    assert table.rows[1] == (
        "400",
        "4",
        "4.00",
        "2",
        "0.3000 ± 0.1000",
        "90.00 ± 0.00",
        "40.00 ± 0.00",
        "20.00 ± 0.00",
        "",
    )
    assert table.rows[0][-1] == "←"
    assert table.rows[2][1:4] == ("–", "–", "0, 1 failed")
    assert len(table.columns) == len(table.rows[0])
    assert curves.rows[1][:2] == ("400", "0.3000 ± 0.1000")
    assert lost.rows == (("5000-0", "failed", "ValueError: planted"),)
    assert "within one standard error of the best: 100 examples" in str(told.lines[0])


def test_a_sweep_of_another_task_has_its_quality_in_its_table_and_plot(tmp_path: Path) -> None:
    record = RunDirectory.at(a_sweep(tmp_path)).read_json(SWEEP_PATH)
    trials = of_task(record["trials"], "next_token", BITS)
    record = of_task(record, "next_token", BITS) | {"trials": trials, "settings": settings_of(trials, BITS)}
    RunDirectory.at(str(tmp_path / "a-sweep")).write_json(SWEEP_PATH, record)
    table, *_ = sweep_sections(read_report(str(tmp_path / "a-sweep")))
    assert table.columns[5] == "bits a token"
    assert table.rows[1][5] == "1.2 ± 0"  # 3 - 2 * 0.9
    assert "accuracy" not in Path(write_files(str(tmp_path / "a-sweep"))).read_text()


def test_the_page_and_its_plot_lie_in_the_sweeps_directory(tmp_path: Path) -> None:
    page = Path(write_files(a_sweep(tmp_path)))
    assert page == tmp_path / "a-sweep/report/report.html"
    assert "within one standard error of the best: 100 examples" in page.read_text()
    assert "Before and after fine-tuning" in page.read_text()
    assert "n = 2 seeds, bars: standard error over seeds" in page.read_text()
    assert "raysubset sweep --seeds 2 --sizes 100 400 5000 --name a-sweep" in page.read_text()
    record = read_report(str(tmp_path / "a-sweep"))
    record["trials"][-1]["state"] = "pruned"
    assert "--sizes 100 400 5000 --prune" in sweep_command(record, Config().to_dict())
    drawn = record["space"] | {"minimize.momentum": [0.8, 0.85, 0.9]}  # one for each of the three sizes
    for setting in record["settings"]:
        setting["overrides"]["minimize.momentum"] = 0.8
    RunDirectory.at(record["uri"]).write_json(SWEEP_PATH, record | {"seeds": [5, 1], "space": drawn})
    page = Path(write_files(record["uri"])).read_text()
    assert "in Python: sweep(…, seeds=[1, 5])" in page
    assert "It runs all 9 combinations of values that were drawn together" in page


def test_costs_are_shares_of_the_conventional_run_where_a_sweep_has_one(tmp_path: Path) -> None:
    record = RunDirectory.at(a_sweep(tmp_path)).read_json(SWEEP_PATH)
    baseline = settings_of([trial(500, seed, 0.25, method="conventional") for seed in (0, 1)], ACCURACY)[0]
    _, curves, *_, told = sweep_sections(record | {"baseline": baseline})
    assert "0.2500 ± 0.0000 over 2 seeds for 50.00 passes: the recommended size took 0.20 times" in str(told.lines[1])
    assert [(row[0], row[-1]) for row in curves.rows] == [("100", "0.20"), ("400", "0.80"), ("conventional", "1.00")]
    RunDirectory.at(record["uri"]).write_json(SWEEP_PATH, record | {"baseline": baseline})
    assert "conventional training" in Path(write_files(record["uri"])).read_text()


def test_the_page_has_the_curves_of_settings_and_the_time_line_of_trials_and_says_what_is_missing(
    tmp_path: Path,
) -> None:
    directory = RunDirectory.at(a_sweep(tmp_path))
    ended: dict[str, Any] = {"ended_at": 113.0, "outcome": "done"}
    trunk = Work("trunk", 0, None, 0, "node-a", "cpu", 100.0, cost=Cost(device_s=2.0), **ended)
    for name in ("100-0", "100-1", "400-0", "5000-0"):
        run = RunDirectory(directory.below("trials"), name)
        Ledger(run).write(trunk)
        work = Work("subsets", 0, 3, 0, "node-b", "cpu", 110.0, waited_s=2.0, cost=Cost(device_s=3.0))
        Ledger(run).write(work if name == "5000-0" else replace(work, **ended))
        if name != "5000-0":  # which failed as an actor was at work
            run.write_json(REPORT_PATH, a_record())
    Ledger(RunDirectory(directory.below("trunks"), "shared")).write(trunk)
    damaged = RunDirectory(directory.below("trials"), "400-1")
    for path in ("ledger.parquet", REPORT_PATH):
        damaged.write_bytes(path, b"half of a f")
    page = Path(write_files(directory.uri))
    read = check_self_contained(page.read_text())
    assert "Time line of the ledger" in read.words
    assert "averaged over a round's members and over the n seeds that finished" in read.words
    assert "Left out: 400-1 (no report), 5000-0 (failed)." in read.words
    told = "5 trials in 5 attempts, 1 of them lost or failed, on 2 nodes, took 14 device-s"
    assert told in read.words
    assert "No work is recorded for 400-1." in read.words
    lost = read.cells.index("node-b") - 5
    assert read.cells[lost : lost + 7] == ["5000-0", "subsets", "3", "1", "1", "node-b", "lost"]


def test_a_listener_with_locks_as_a_terminals_does_not_stop_tune_from_pickling_its_callbacks() -> None:
    lock = threading.Lock()

    def tell(event: Event) -> None:
        with lock:
            pass

    events = _TrialEvents(tell, TrialsStanding(ACCURACY, {}, {}), TrialsLookout(tell, stall_s=1.0))
    pickle.loads(cloudpickle.dumps(events))  # pyright: ignore[reportPrivateImportUsage]


def test_of_running_trials_one_without_a_sign_of_life_is_told_of_then_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    now, beats, events, killed = [0.0], {"alive": 0, "stopped": 0, "ended": 0}, list[Event](), list[Any]()

    def processes_at(prefix: str) -> dict[str, Process]:
        places = {"node": "10.0.0.7", "node_id": "n", "group": ""}
        pids = {"alive": 1, "stopped": 2, "ended": 3}
        return {name: Process(Pulse(num, 1.0), {}, pid=pids[name], **places) for name, num in beats.items()}

    monkeypatch.setattr("raysubset.sweeping.lookout.processes_at", processes_at)
    monkeypatch.setattr("raysubset.sweeping.lookout.kill_processes", killed.extend)
    lookout = TrialsLookout(events.append, stall_s=30.0, clock=lambda: now[0])
    for second in range(1, 68):
        now[0], beats["alive"] = float(second), second
        beats["stopped"] += second <= 4
        lookout.look({"alive", "stopped"})
    who = "of its process 2 on 10.0.0.7"
    assert [event.text for event in events] == [
        f"stopped: no sign of life for 30 s {who}; it is killed in 30 s unless it shows one (--actors.stall-s)",
        f"stopped: no sign of life for 60 s {who}: it is killed (actors.stall_s)",
    ]
    assert killed == [("n", 2)]


def test_an_unfinished_sweep_says_how_far_it_is_and_no_run_takes_its_directory(tmp_path: Path) -> None:
    directory = RunDirectory.at(a_sweep(tmp_path))
    directory.delete(SWEEP_PATH)
    with pytest.raises(ValueError, match="0 trials are done"):
        read_report(directory.uri)
    with pytest.raises(ValueError, match="kind: sweep → None"):
        directory.open(Config(name="a-sweep").to_dict(), {})
    assert json.loads((tmp_path / "a-sweep" / CONFIG_PATH).read_text())["config"]["kind"] == "sweep"


# The command line


@pytest.mark.usefixtures("no_node_ahead")
@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("", "there is nothing to sweep: give --sizes or --space"),
        ("--space minimize.momentum", "write field=value,value"),
        ("--space minimize.momentum=", "write field=value,value"),
        ("--sizes 100 --space subsets.size=100,200", "subsets.size is given twice"),
        ("--space minimize.momentun=0.5,0.9", "did you mean minimize.momentum?"),
        ("--space minimize.momentum=0.5,high", "minimize.momentum = 'high' should be float"),
        ("--sizes many", "sizes"),
        ("--sizes 100 --seeds 0", "--seeds = 0 must be in [1, 1000]"),
        ("--sizes 100 --sedes 3", "did you mean --seeds?"),
        ("--sizes 100 --method conventional", "a sweep is of subset pretraining"),
    ],
)
def test_mistakes_in_flags_are_one_line_and_exit_code_2(
    flags: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(["sweep", "--storage-path", str(tmp_path), *flags.split()]) == 2
    said = capsys.readouterr()
    assert told in said.err
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_sweeps_directory_is_reported_as_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["report", a_sweep(tmp_path)]) == 0
    assert "within one standard error of the best: 100 examples" in " ".join(capsys.readouterr().out.split())


def test_settings_of_tune_are_a_sweeps_alone_and_the_users_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, users = "TUNE_DISABLE_STRICT_METRIC_CHECKING", "RAY_AIR_NEW_OUTPUT"
    assert ours not in os.environ  # although the package is imported: this process may use Tune otherwise
    monkeypatch.setenv(users, "1")
    with _quiet_tune():
        assert (os.environ[ours], os.environ[users]) == ("1", "1")
    assert (os.environ.get(ours), os.environ[users]) == (None, "1")
