"""run() on a local cluster: what is done, that it is counted, and that dying processes change no bit of it."""

import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from raysubset import Config, RunReport, load_model, run
from raysubset.cluster import call_on_cluster, put_once, tasks
from raysubset.config import derive_seed
from raysubset.data import load_full_set
from raysubset.events import Event, Note, Progress, Retry, Stage
from raysubset.fine_tuning import FineTuningFailed, Job, fine_tune
from raysubset.fine_tuning.worker import train_here
from raysubset.ledger import Ledger
from raysubset.models import build_model, new_model
from raysubset.planning import make_plan
from raysubset.pulse import beat, begin
from raysubset.run_directory import (
    PREDICTIONS_PATH,
    RunDirectory,
    aggregate_weights_path,
    checkpoint_path,
    minimum_folder,
    minimum_path,
    weights_path,
)
from raysubset.subset_actors import SubsetFailed
from raysubset.training import Weights
from raysubset.user_code import Workplace
from raysubset.work import Follower, Run, TrainPiece
from tests.cluster import endless
from tests.tiny import stored_weights

# isort: split
import ray

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180), pytest.mark.usefixtures("ray_cluster")]

SMALL = {"trunk.epochs": 0.0, "fine_tuning.epochs": 0.0, "minimize.epochs": 3.0, "actors.max_num": 2}


def config(folder: Path, name: str, **overrides: Any) -> Config:
    fields = {key.replace("__", "."): value for key, value in overrides.items()}
    return Config(name=name, storage_path=str(folder)).with_overrides(SMALL | fields)


def aggregate(report: RunReport) -> Weights:
    return stored_weights(RunDirectory.at(report.uri), aggregate_weights_path(0))


def same_bits(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_all_stages_leave_a_model_that_predicts_and_a_ledger_that_adds_up(tmp_path: Path) -> None:
    events: list[Event] = []
    made = config(
        tmp_path,
        "whole",
        subsets__num=5,
        trunk__epochs=1.0,
        fine_tuning__epochs=2.0,
        fine_tuning__num_workers=2,
        fine_tuning__min_workers=1,  # an elastic job takes the workers there are
    )
    report = run(made, on_event=events.append)

    assert [event.stage for event in events if isinstance(event, Stage) and event.stage] == [
        "trunk",
        "subsets",
        "aggregation",
        "fine_tuning",
        "test",
    ]
    full_set = load_full_set(made.data)
    num_train, num_validation, size = len(full_set.train), len(full_set.validation), len(full_set.train) // 5
    forward = num_train + num_train + num_validation  # the trunk, then its training and validation losses
    forward += 5 * (3 * size + size + num_validation)  # each subset's epochs and losses
    forward += num_train + num_train + num_validation  # the aggregate's batch-norm statistics and losses
    forward += 2 * (num_train + num_validation)  # fine-tuning, with validation after each epoch
    forward += num_train + num_train + num_validation  # its batch-norm statistics and losses
    forward += len(full_set.test)
    backward = num_train + 5 * 3 * size + 2 * num_train
    share = report.record["model"]["forward_share"]
    assert report.passes == pytest.approx((forward * share + backward * (1 - share)) / num_train)
    assert report.critical_path_passes < report.passes

    works = Ledger(RunDirectory.at(report.uri)).read()
    assert sorted((w.stage, w.subset) for w in works if w.subset is not None) == [("subsets", i) for i in range(5)]
    assert {w.outcome for w in works} == {"done"}
    assert len({w.node for w in works}) == 1  # the driver's, actors' and workers', by one name
    assert [w.num_workers for w in works if w.stage == "fine_tuning"] == [2]

    model = load_model(report.uri)
    rows = full_set.test.take()
    predicted = model(rows["image"].permute(0, 3, 1, 2)).argmax(1)
    assert int((predicted == rows["label"]).sum()) == report.test.sums["num_correct"]
    assert report.test.accuracy > 0.8


LONG = {"minimize__epochs": 40.0, "subsets__num": 2}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> RunReport:
    return run(config(tmp_path_factory.mktemp("runs"), "unbroken", **LONG))


def test_the_manifest_names_disjoint_subsets_by_row(unbroken: RunReport) -> None:
    table = RunDirectory.at(unbroken.uri).read_table("rounds/0000/subsets.parquet")
    full_set = load_full_set(Config().data)
    assert table.group_by("subset").aggregate([([], "count_all")])["count_all"].to_pylist() == [647] * 2
    assert len(set(table["row"].to_pylist())) == 2 * 647
    rows = full_set.train.table["row"].take(table["position"])
    assert rows.to_pylist() == table["row"].to_pylist()


def test_the_number_of_actors_changes_no_bit(tmp_path: Path, unbroken: RunReport) -> None:
    alone = run(config(tmp_path, "alone", **LONG, actors__max_num=1))
    assert same_bits(aggregate(unbroken), aggregate(alone))


@pytest.mark.usefixtures("prompt_reports")
def test_a_killed_actor_costs_time_and_no_bit(tmp_path: Path, unbroken: RunReport) -> None:
    killed: list[int] = []

    def kill_once(event: Event) -> None:
        if isinstance(event, Progress) and not killed and event.epoch >= 2:
            killed.append(event.attempt.subset)
            os.kill(event.attempt.pid, signal.SIGKILL)
        if isinstance(event, Retry):  # an actor that outlives its node's raylet may still write a heartbeat
            ledger = Ledger(RunDirectory(str(tmp_path), "broken"))
            (lost,) = (work for work in ledger.read() if work.outcome == "lost")
            ledger.write(replace(lost, outcome="running", ended_at=None))

    broken = run(config(tmp_path, "broken", **LONG), on_event=kill_once)
    assert killed
    assert same_bits(aggregate(unbroken), aggregate(broken))
    works = [w for w in Ledger(RunDirectory.at(broken.uri)).read() if w.subset == killed[0]]
    assert [(w.attempt, w.outcome) for w in works] == [(0, "lost"), (1, "done")]
    assert works[0].cost.num_forward > 0
    assert works[1].cost.num_backward < 40 * 647  # it went on from a checkpoint
    assert broken.record["cost"]["lost_passes"] > 0
    assert broken.passes >= unbroken.passes


@pytest.mark.usefixtures("prompt_reports")
def test_a_spot_notice_moves_a_subset_with_a_checkpoint_and_costs_no_attempt(
    tmp_path: Path, unbroken: RunReport
) -> None:
    once = {"actors__max_attempts": 1, "actors__checkpoint_epochs": 1000.0}
    warned: list[int] = []

    def terminate_once(event: Event) -> None:
        if isinstance(event, Progress) and not warned and event.epoch >= 2:
            warned.append(event.attempt.subset)
            os.kill(event.attempt.pid, signal.SIGTERM)

    moved = run(config(tmp_path, "moved", **LONG, **once), on_event=terminate_once)
    assert warned
    assert same_bits(aggregate(unbroken), aggregate(moved))
    works = [w for w in Ledger(RunDirectory.at(moved.uri)).read() if w.subset == warned[0]]
    assert [w.outcome for w in works] == ["preempted", "done"]
    steps = [sum(w.cost.num_steps for w in works), 40 * 11]
    assert steps[0] == steps[1]  # nothing was done twice


def test_a_trunk_of_two_train_workers_ends_where_that_of_one_does(tmp_path: Path) -> None:
    plain = {"model__norm": "none", "minimize__epochs": 1.0, "minimize__learning_rate": 0.02, "trunk__epochs": 1.0}
    made = config(tmp_path, "trunk", trunk__num_workers=2, subsets__num=2, **plain)
    report = run(made)
    directory, alone = RunDirectory.at(report.uri), RunDirectory(str(tmp_path), "alone")
    assert report.record["stages"]["trunk"]["num_workers"] == 2
    assert {w.num_workers for w in Ledger(directory).read() if w.stage == "trunk"} == {2}

    full_set = load_full_set(made.data)
    fresh = new_model(made.model, full_set, seed=derive_seed(made.seed, "start")).state_dict()
    opened = Run(made, alone, full_set, put_once(full_set), lambda event: None)
    ends, record = fine_tune(opened, fresh, num_workers=0, num_gpus=0.0, stage="trunk")  # one, in this process
    assert record["num_workers"] == 1
    for key, value in stored_weights(directory, weights_path("trunk")).items():
        torch.testing.assert_close(ends[key], value, rtol=1e-4, atol=1e-5)


def test_scoring_can_be_done_in_a_task_of_its_own() -> None:
    def work(value: list[int], more: int) -> tuple[int, int]:
        return sum(value) + more, os.getpid()

    total, pid = call_on_cluster(work, put_once([1, 2, 3]), 4, request={"CPU": 1}, tell=lambda event: None)
    assert total == 10
    assert pid != os.getpid()


def test_a_task_without_a_place_says_what_it_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Holder:
        def up(self) -> None: ...

    holder: Any = ray.remote(num_cpus=4)(Holder).remote()
    ray.get(holder.up.remote())
    told: list[str] = []

    def make_room(event: Event) -> None:
        told.append(event.text)
        if len(told) == 2:
            ray.kill(holder)

    monkeypatch.setattr(tasks, "WAIT_NOTICE_S", 0.05)
    assert call_on_cluster(sum, put_once([1, 2]), request={"CPU": 4}, tell=make_room) == 3
    assert told[1].startswith("a task of 4 CPU waits for a place; free are ")
    assert told[1].endswith(" of 4 CPU")


def test_a_task_that_makes_no_step_is_told_of_killed_and_run_again(tmp_path: Path) -> None:
    def work(folder: str) -> int:
        begin()
        for _ in range(3):
            beat()
        marker = Path(folder, "begun")
        while not marker.exists():
            marker.touch()
            while True:
                pass
        return os.getpid()

    events: list[Event] = []
    call_on_cluster(work, put_once(str(tmp_path)), request={"CPU": 1}, tell=events.append, stall_s=3.0)
    told = [event.text for event in events if isinstance(event, Note | Retry)]
    assert re.match(r"work on node [\d.]+ stands still: no step for \d+ s .*it is killed in", told[0])
    assert told[1].endswith("it was killed (actors.stall_s)")


def test_a_task_that_does_not_end_in_time_is_given_up() -> None:
    def work(seconds: float) -> None:
        time.sleep(seconds)

    with pytest.raises(TimeoutError, match=r"a task of 4 CPU did not end in 0.1 s: the cluster is busy"):
        call_on_cluster(work, put_once(1e6), request={"CPU": 4}, tell=lambda event: None, timeout_s=0.1)
    assert call_on_cluster(sum, put_once([1, 2]), request={"CPU": 4}, tell=lambda event: None) == 3  # it left


def test_rounds_redraw_the_subsets_and_keep_the_optimizer(tmp_path: Path) -> None:
    rounds = {"rounds__num": 3, "minimize__epochs": 0.5, "rounds__outer_momentum": 0.5, "trunk__epochs": 1.0}
    report = run(config(tmp_path, "rounds", **rounds))
    directory = RunDirectory.at(report.uri)
    tables = [directory.read_table(f"rounds/{r:04d}/subsets.parquet") for r in range(3)]
    assert not tables[0].equals(tables[1])
    assert directory.list("rounds/0001/minima/0000") == []  # nobody would read it any more
    assert not directory.exists("rounds/0002/minima/0000/optimizer.pt")
    records = report.record["stages"]["rounds"]
    assert [r["minima"][0]["start_id"] for r in records] == ["trunk", "round-0000", "round-0001"]
    rates = [r["minima"][0]["history"][-1]["learning_rate"] for r in records]
    assert rates[0] > rates[1] > rates[2]  # one schedule over all rounds
    assert records[-1]["aggregation"]["validation"]["loss"] < records[0]["aggregation"]["validation"]["loss"]


def test_a_finished_run_is_read_back_and_a_changed_config_refused(unbroken: RunReport) -> None:
    made = config(Path(unbroken.uri).parent, "unbroken", **LONG)
    notes: list[str] = []
    again = run(made, on_event=lambda event: notes.append(event.text))
    assert again.record == unbroken.record
    assert "is finished" in notes[0]
    with pytest.raises(ValueError, match=r"minimize\.epochs: 40\.0 → 4\.0.*--fresh"):
        run(made.with_overrides({"minimize.epochs": 4.0}))


def test_a_finished_run_that_was_moved_and_damaged_is_made_whole_from_what_its_last_stage_left(
    unbroken: RunReport, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(unbroken.uri, tmp_path / "unbroken"))
    model = (moved / "model.safetensors").read_bytes()
    (moved / "model.safetensors").write_bytes(model[:-1] + b"?")
    again = run(config(tmp_path, "unbroken", **LONG))
    assert (moved / "model.safetensors").read_bytes() == model
    assert (again.uri, again.test, again.validation) == (str(moved), unbroken.test, unbroken.validation)
    assert again.record["files"][PREDICTIONS_PATH] == unbroken.record["files"][PREDICTIONS_PATH]
    num_test, forward_share = again.record["data"]["num_test"], again.record["model"]["forward_share"]
    scored_again = forward_share * num_test / again.record["data"]["num_train"]
    assert again.passes - unbroken.passes == pytest.approx(scored_again)
    assert run(config(tmp_path, "unbroken", **LONG)).record == again.record


def test_a_run_of_another_config_is_deleted_where_fresh_is_asked_for(tmp_path: Path) -> None:
    made, directory = config(tmp_path, "again", subsets__num=2), RunDirectory(str(tmp_path), "again")
    directory.open(made.with_overrides({"minimize.epochs": 1.0}).to_dict(), {})
    directory.write_json(minimum_path(minimum_folder(0, 0)), {})
    fresh = run(made, fresh=True)
    assert [m["history"][-1]["epoch"] for m in fresh.record["stages"]["rounds"][0]["minima"]] == [3.0, 3.0]


def test_more_gpus_than_there_will_ever_be_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"subset actors ask for 1 CPU \+ 1 GPU; .* 4 CPU.*--actors\.num-gpus"):
        run(config(tmp_path, "gpus", actors__num_gpus=1.0))


def test_divergence_names_the_subset_and_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"subset \d on node .*lower the learning rate"):
        run(config(tmp_path, "nan", minimize__learning_rate=1e30, model__norm="none"))


def test_a_train_job_that_diverges_tells_ray_train_of_no_error_to_try_again(tmp_path: Path) -> None:
    made = config(tmp_path, "nan", minimize__learning_rate=1e30, model__norm="none")
    full_set, directory = load_full_set(made.data), RunDirectory(str(tmp_path), "nan")
    weights = build_model(made.model, full_set.spec, seed=0).state_dict()
    with pytest.raises(ValueError, match=r"conventional: DivergedError: .*lower the learning rate"):
        fine_tune(
            Run(made, directory, full_set, put_once(full_set), lambda event: None),
            weights,
            num_workers=0,  # in this process, where fit() would raise what the worker does
            num_gpus=0.0,
            stage="conventional",
            epochs=1.0,
        )
    (work,) = Ledger(directory).read()
    assert work.outcome == "failed"
    assert "lower the learning rate" in (work.error or "")
    assert work.cost.num_steps > 0


def test_a_stage_that_an_actor_does_stops_and_resumes_to_the_bits_of_a_train_job(tmp_path: Path) -> None:
    made = config(tmp_path, "job", fine_tuning__epochs=3.0, fine_tuning__keep="best")
    full_set = load_full_set(made.data)
    job, alone = RunDirectory(str(tmp_path), "job"), RunDirectory(str(tmp_path), "alone")
    weights = new_model(made.model, full_set, seed=1).state_dict()
    opened = Run(made, job, full_set, put_once(full_set), lambda event: None)
    ends, record = fine_tune(opened, weights, num_workers=0, num_gpus=0.0)  # one worker, in this process

    piece, refs = TrainPiece(made, alone, "fine_tuning"), (opened.full_set_ref, put_once(weights))
    own = Job.of(piece, *refs, num_gpus=0.0, workplace=Workplace.here())
    stopping = Follower(lambda progress: progress.epoch > 1.5, lambda: "preempted")
    assert train_here(own, stopping, attempt=0, waited_s=0.5) is None
    assert alone.exists(checkpoint_path("fine_tuning", 0))
    resumed = train_here(own, Follower(lambda progress: False, lambda: "preempted"), attempt=1, waited_s=0.0)

    assert same_bits(piece.output.weights(), ends)
    assert {**(resumed or {}), "files": 0} == {**record, "files": 0}
    assert not alone.exists(checkpoint_path("fine_tuning", 0))
    works = Ledger(alone).read()
    assert [(w.attempt, w.outcome, w.waited_s) for w in works] == [(0, "preempted", 0.5), (1, "done", 0.0)]
    (whole,) = Ledger(job).read()
    assert sum(work.cost.num_steps for work in works) == whole.cost.num_steps  # nothing was done twice
    assert sum(work.cost.num_forward for work in works) == whole.cost.num_forward


def test_a_train_job_whose_workers_stand_still_is_told_of_and_ended_after_max_attempts(tmp_path: Path) -> None:
    made = config(tmp_path, "endless", model__name="tests.cluster.endless:network", fine_tuning__epochs=1.0)
    made = made.with_overrides({"actors.stall_s": 3.0, "actors.max_attempts": 1})
    full_set, events = load_full_set(made.data), list[Event]()
    with pytest.raises(FineTuningFailed, match=r"fine_tuning: no step for \d+ s.* on worker\(s\) on [\d.]+: killed"):
        fine_tune(
            Run(made, RunDirectory(str(tmp_path), "endless"), full_set, put_once(full_set), events.append),
            endless.network(10, full_set.spec.inputs).state_dict(),
            num_workers=2,
            num_gpus=0.0,
        )
    warnings = [event.text for event in events if isinstance(event, Note) and event.is_warning]
    assert any("stand still: no step for" in warning for warning in warnings), (
        warnings
    )  # on a busy machine more than once
    assert {group["state"] for group in ray.util.placement_group_table().values()} <= {"REMOVED"}


def test_a_conventional_run_costs_what_was_planned_which_is_what_subset_pretraining_does(tmp_path: Path) -> None:
    # that subset pretraining costs this is seen in tests/test_work.py
    made = config(tmp_path, "conventional", method="conventional", subsets__num=2, trunk__epochs=1.0)
    report, full_set = run(made), load_full_set(made.data)
    plan = make_plan(made, full_set)
    own = len(full_set.train) + len(full_set.validation) + len(full_set.test)
    planned = plan.passes + own * plan.forward_share / len(full_set.train)
    assert report.passes == pytest.approx(planned, abs=0.03)  # of 5: steps are whole


POISONED = {
    "data__name": f"{__name__}:sites",
    "subsets__scheme": "column",
    "subsets__column": "site",
    "minimize__epochs": 1.0,
    "actors__max_attempts": 2,
}


def test_without_a_quorum_a_subset_that_fails_ends_the_run_and_is_named(tmp_path: Path) -> None:
    with pytest.raises(SubsetFailed, match=r"subset 1 on node .*: RuntimeError: too bright"):
        run(config(tmp_path, "all", model__name=f"{__name__}:Raising", **POISONED))


@pytest.mark.parametrize("model", ["Raising", "Deadly"])
def test_a_quorum_goes_on_without_a_subset_that_fails_for_good(tmp_path: Path, model: str) -> None:
    poisoned = config(tmp_path, "quorum", actors__quorum=2, model__name=f"{__name__}:{model}", **POISONED)
    warnings: list[str] = []
    listen: Callable[[Event], None] = lambda e: warnings.append(e.text) if isinstance(e, Note) else None  # noqa: E731
    report = run(poisoned, on_event=listen)
    assert report.record["stages"]["rounds"][0]["aggregation"]["subset_ids"] == [0, 2]
    assert any("going on without subset 1" in text for text in warnings)


def sites() -> dict[str, pa.Table]:
    """A data set of three sites; the images of site b are brighter than any other."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 100, (300, 8, 8), generator=generator, dtype=torch.uint8)
    images[100:200] += 150
    site = ["a"] * 100 + ["b"] * 100 + ["c"] * 100

    def table(part: slice) -> pa.Table:
        flat = pa.FixedSizeListArray.from_arrays(pa.array(images[part].reshape(-1).numpy()), 64)
        labels = [i % 2 for i in range(300)][part]
        return pa.table({"image": flat, "label": labels, "site": site[part]})

    return {"train": table(slice(None)), "validation": table(slice(0, 50)), "test": table(slice(50, 100))}


class Raising(torch.nn.Sequential):
    """Fails on a batch of bright images only."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(64, num_classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.mean() > 0.5:
            self.fail()
        return super().forward(images)

    def fail(self) -> None:
        raise RuntimeError("too bright")


class Deadly(Raising):
    """Takes its process with it."""

    def fail(self) -> None:
        os._exit(1)
