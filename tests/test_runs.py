"""run() on a local cluster: what is done, that it is counted, and that dying processes change no bit of it."""

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from raysubset import Config, RunReport, run
from raysubset.cluster import put_once
from raysubset.data import load_full_set
from raysubset.events import EpochDone, Event, Note, Progress, Retry
from raysubset.fine_tuning import fine_tune
from raysubset.planning import make_plan
from raysubset.run_directory import (
    PREDICTIONS_PATH,
    REPORT_PATH,
    RunDirectory,
    aggregate_weights_path,
    checkpoint_path,
    minimum_folder,
    minimum_path,
    weights_path,
)
from raysubset.run_directory.ledger import Ledger
from raysubset.subset_actors import SubsetFailed, pool
from raysubset.training import Step, Weights
from raysubset.work import Minimizer, Piece, Run
from tests.slow_steps import slow_down, speed_up
from tests.tiny import stored_weights

pytestmark = pytest.mark.usefixtures("processes")

SMALL = {"trunk.epochs": 0.0, "fine_tuning.epochs": 0.0, "minimize.epochs": 3.0, "actors.max_num": 2}


def config(folder: Path, name: str, **overrides: Any) -> Config:
    fields = {key.replace("__", "."): value for key, value in overrides.items()}
    return Config(name=name, storage_path=str(folder)).with_overrides(SMALL | fields)


def aggregate(report: RunReport) -> Weights:
    return stored_weights(RunDirectory.at(report.uri), aggregate_weights_path(0))


def same_bits(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


NUM_EPOCHS = 4
LONG = {"minimize__epochs": float(NUM_EPOCHS), "subsets__num": 2}
SLOWLY = {"actors__on_step": "tests.slow_steps:listen"}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, processes: None) -> RunReport:
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


@pytest.fixture
def slow_from_epoch_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where LONG | SLOWLY is run."""
    monkeypatch.chdir(tmp_path)
    slow_down(tmp_path, "subsets", from_step=2 * 11 + 1)


@pytest.mark.usefixtures("slow_from_epoch_2")
def test_a_killed_actor_costs_time_and_no_bit(tmp_path: Path, unbroken: RunReport) -> None:
    killed: list[int] = []

    def kill_once(event: Event) -> None:
        if isinstance(event, Progress) and not killed and event.epoch >= 2:
            killed.append(event.attempt.subset or 0)
            os.kill(event.attempt.pid, signal.SIGKILL)
            speed_up(tmp_path, "subsets")
        if isinstance(event, Retry):  # an actor that outlives its node's raylet may still write a heartbeat
            ledger = Ledger(RunDirectory(str(tmp_path), "broken"))
            (lost,) = (work for work in ledger.read() if work.outcome == "lost")
            ledger.write(replace(lost, outcome="running", ended_at=None))

    broken = run(config(tmp_path, "broken", **LONG, **SLOWLY), on_event=kill_once)
    assert killed
    assert same_bits(aggregate(unbroken), aggregate(broken))
    works = [w for w in Ledger(RunDirectory.at(broken.uri)).read() if w.subset == killed[0]]
    assert [(w.attempt, w.outcome) for w in works] == [(0, "lost"), (1, "done")]
    assert works[0].cost.num_forward > 0
    assert works[1].cost.num_backward < NUM_EPOCHS * 647  # it went on from a checkpoint
    assert broken.record["cost"]["lost_passes"] > 0
    assert broken.passes >= unbroken.passes


@pytest.mark.usefixtures("slow_from_epoch_2")
def test_what_an_actor_leaves_after_it_was_given_up_is_not_done_again(tmp_path: Path, unbroken: RunReport) -> None:
    killed: list[int] = []
    late = RunDirectory(str(tmp_path), "late")

    def outlive(event: Event) -> None:
        if isinstance(event, Progress) and not killed and event.epoch >= 2:
            killed.append(event.attempt.subset or 0)
            os.kill(event.attempt.pid, signal.SIGKILL)
            speed_up(tmp_path, "subsets")
        if isinstance(event, Retry):  # as an actor does that outlives its node's raylet: it closes its entry …
            (lost,) = (work for work in Ledger(late).read() if work.outcome == "lost")
            Ledger(late).write(replace(lost, outcome="done", error=None))
            folder = minimum_folder(0, killed[0])
            shutil.rmtree(tmp_path / "late" / folder)  # … and leaves a minimum and no checkpoints
            shutil.copytree(Path(unbroken.uri) / folder, tmp_path / "late" / folder)

    report = run(config(tmp_path, "late", **LONG, **SLOWLY), on_event=outlive)
    works = [work for work in Ledger(late).read() if work.subset == killed[0]]
    assert [(work.attempt, work.outcome) for work in works] == [(0, "done")]
    assert same_bits(aggregate(unbroken), aggregate(report))


@pytest.mark.usefixtures("slow_from_epoch_2")
def test_a_spot_notice_moves_a_subset_with_a_checkpoint_and_costs_no_attempt(
    tmp_path: Path, unbroken: RunReport
) -> None:
    once = {"actors__max_attempts": 1, "actors__checkpoint_epochs": 1000.0}
    warned: list[int] = []

    def terminate_once(event: Event) -> None:
        if isinstance(event, Progress) and not warned and event.epoch >= 2:
            warned.append(event.attempt.subset or 0)
            os.kill(event.attempt.pid, signal.SIGTERM)
            speed_up(tmp_path, "subsets")

    moved = run(config(tmp_path, "moved", **LONG, **SLOWLY, **once), on_event=terminate_once)
    assert warned
    assert same_bits(aggregate(unbroken), aggregate(moved))
    works = [w for w in Ledger(RunDirectory.at(moved.uri)).read() if w.subset == warned[0]]
    assert [w.outcome for w in works] == ["preempted", "done"]
    steps = [sum(w.cost.num_steps for w in works), NUM_EPOCHS * 11]
    assert steps[0] == steps[1]  # nothing was done twice


def test_an_actor_that_is_killed_and_a_driver_that_ends_as_it_fine_tunes_change_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Enough(Exception):
        pass

    tuned = {"subsets__num": 2, "minimize__epochs": 1.0, "fine_tuning__epochs": 4.0, "fine_tuning__num_workers": 1}
    whole = run(config(tmp_path, "whole", **tuned))
    monkeypatch.chdir(tmp_path)
    slow_down(tmp_path, "fine_tuning", from_step=21 + 1)
    struck: list[int] = []

    def strike(event: Event) -> None:
        if not isinstance(event, Progress) or event.attempt.stage != "fine_tuning" or event.epoch <= 1 + len(struck):
            return  # before an epoch's checkpoint is written its last step may be told of
        struck.append(event.attempt.pid)
        if len(struck) == 2:
            raise Enough
        os.kill(event.attempt.pid, signal.SIGKILL)
        slow_down(tmp_path, "fine_tuning", from_step=2 * 21 + 1)

    with pytest.raises(Enough):
        run(config(tmp_path, "broken", **tuned, **SLOWLY), on_event=strike)
    speed_up(tmp_path, "fine_tuning")
    broken = run(config(tmp_path, "broken", **tuned, **SLOWLY))
    directories = [RunDirectory.at(report.uri) for report in (whole, broken)]
    assert same_bits(*(stored_weights(directory, weights_path("fine_tuning")) for directory in directories))
    works = [[w for w in Ledger(directory).read() if w.stage == "fine_tuning"] for directory in directories]
    assert [work.outcome for work in works[1]] == ["lost", "interrupted", "done"]
    assert works[0][0].cost.num_steps == 4 * 21
    assert works[1][0].cost.num_steps > 21
    assert (
        works[1][1].cost.num_steps + works[1][2].cost.num_steps == 3 * 21
    )  # from the checkpoint after the first epoch
    assert broken.test == whole.test


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
    with pytest.raises(ValueError, match=r"minimize\.epochs: 4\.0 → 2\.0.*--fresh"):
        run(made.with_overrides({"minimize.epochs": 2.0}))


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


def test_a_damaged_aggregate_that_an_actor_is_to_fine_tune_is_made_again_to_the_same_bits(tmp_path: Path) -> None:
    made = config(tmp_path, "run", subsets__num=2, fine_tuning__epochs=1.0, fine_tuning__num_workers=1)
    whole, directory = run(made), RunDirectory(str(tmp_path), "run")
    for path in (REPORT_PATH, minimum_path("fine_tuning")):
        directory.delete(path)
    weights = directory.read_bytes(aggregate_weights_path(0))
    directory.write_bytes(aggregate_weights_path(0), weights[:-1] + b"?")
    warnings: list[str] = []
    again = run(made, on_event=lambda event: warnings.append(event.text) if isinstance(event, Note) else None)
    assert any("aggregate.safetensors" in text and "it is computed again" in text for text in warnings)
    assert directory.read_bytes(aggregate_weights_path(0)) == weights
    assert again.test == whole.test


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
    with pytest.raises(ValueError, match=r"conventional: DivergedError: .*lower the learning rate"):
        fine_tune(
            Run(made, directory, full_set, put_once(full_set), lambda event: None),
            Piece(made, directory, "conventional", epochs=1.0, by_train=True, num_workers=0),  # in this process,
            num_gpus=0.0,  # where fit() would raise what the worker does
        )
    (work,) = Ledger(directory).read()
    assert work.outcome == "failed"
    assert "lower the learning rate" in (work.error or "")
    assert work.cost.num_steps > 0


def test_epochs_of_a_job_s_trunk_are_each_reported_and_looked_for_no_more_when_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(run: Run, job: Piece, *, num_gpus: float) -> Any:
        minimizer, alone = Minimizer(lambda: run.full_set, num_gpus=0, node="here"), replace(job, num_workers=0)
        return minimizer.minimize([alone], None, attempts=[0], waited_s=0.0)[0]

    def read(directory: RunDirectory, path: str) -> Any:
        reads.append(path)
        return read_whole(directory, path)

    def listen(event: Event) -> None:
        if isinstance(event, EpochDone):
            epochs.append((event.stage, event.record["epoch"]))
            reads.clear()
        elif isinstance(event, Progress):
            stages.add(event.attempt.stage)
            speed_up(tmp_path, "subsets")

    read_whole, reads, epochs, stages = RunDirectory.read_json_or_none, list[str](), list[Any](), set[str]()
    monkeypatch.setattr(pool, "fine_tune", train)
    monkeypatch.setattr(RunDirectory, "read_json_or_none", read)
    monkeypatch.chdir(tmp_path)
    slow_down(tmp_path, "subsets", from_step=2)
    trunk = {"trunk__epochs": 2.0, "trunk__num_workers": 2, "subsets__num": 2}
    run(config(tmp_path, "run", **trunk, **SLOWLY), on_event=listen)
    assert (epochs, stages) == ([("trunk", 1.0), ("trunk", 2.0)], {"subsets"})
    assert "trunk/history.json" not in reads


STOPPED: list[Minimizer] = []


def stop_in_the_second_epoch(step: Step) -> None:
    for minimizer in STOPPED:
        if step.epoch > 1.5:
            minimizer.request_stop(preempted=True)


def test_a_stage_that_an_actor_does_stops_and_resumes_to_the_bits_of_a_train_job(tmp_path: Path) -> None:
    listener = f"{__name__}:stop_in_the_second_epoch"
    made = config(tmp_path, "job", fine_tuning__epochs=3.0, fine_tuning__keep="best", actors__on_step=listener)
    full_set = load_full_set(made.data)
    job, alone = RunDirectory(str(tmp_path), "job"), RunDirectory(str(tmp_path), "alone")
    opened = Run(made, job, full_set, put_once(full_set), lambda event: None)
    at_once, piece = (Piece(made, directory, "fine_tuning", by_train=True) for directory in (job, alone))
    fine_tune(opened, at_once, num_gpus=0.0)  # one worker, in this process

    first, second = (Minimizer(lambda: full_set, num_gpus=0, node="here") for _ in range(2))
    STOPPED.append(first)
    assert first.minimize([piece], None, attempts=[0], waited_s=0.5) == [None]
    STOPPED.clear()
    assert alone.exists(checkpoint_path("fine_tuning", 0))
    (resumed,) = second.minimize([piece], None, attempts=[1], waited_s=0.0)

    assert same_bits(piece.output.weights(), at_once.output.weights())
    apart = {"files": 0, "peak_bytes": 0}
    assert isinstance(resumed, dict)
    assert {**resumed, **apart} == {**(at_once.record() or {}), **apart}
    assert not alone.exists(checkpoint_path("fine_tuning", 0))
    works = Ledger(alone).read()
    assert [(w.attempt, w.outcome, w.waited_s) for w in works] == [(0, "preempted", 0.5), (1, "done", 0.0)]
    (whole,) = Ledger(job).read()
    assert sum(work.cost.num_steps for work in works) == whole.cost.num_steps  # nothing was done twice
    assert sum(work.cost.num_forward for work in works) == whole.cost.num_forward


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
    assert any("continuing without subset 1" in text for text in warnings)


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

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if images.mean() > 0.5:
            self.fail()
        return super().forward(images)

    def fail(self) -> None:
        raise RuntimeError("too bright")


class Deadly(Raising):
    """Takes its process with it."""

    def fail(self) -> None:
        os._exit(1)
