"""run() on a local cluster, with stages by Ray Train; tasks, and work that stands still."""

import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from raysubset import Config, load_model, run
from raysubset.cluster import call_on_cluster, groups_of, put_once, remove_groups, tasks, workplace
from raysubset.data import load_full_set
from raysubset.events import Event, Note, Progress, Retry, Stage
from raysubset.fine_tuning import FineTuningFailed, fine_tune
from raysubset.fine_tuning import lookout as train_lookout
from raysubset.fine_tuning.job import Job
from raysubset.fine_tuning.lookout import TrainLookout
from raysubset.run_directory import MISTAKES_PATH, PREDICTIONS_PATH, RunDirectory, size_of, weights_path
from raysubset.run_directory.ledger import Ledger
from raysubset.subset_actors import ActorPool, Pack
from raysubset.work import Output, Piece, Run, TestPiece, leave_test, seeded_model
from tests.tiny import stored_weights

# isort: split
import ray

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600), pytest.mark.usefixtures("ray_cluster")]


def test_all_stages_two_of_them_by_two_workers_leave_a_model_that_predicts_and_a_ledger_that_adds_up(
    tmp_path: Path,
) -> None:
    events: list[Event] = []
    made = Config(name="whole", storage_path=str(tmp_path)).with_overrides(
        {
            "subsets.num": 3,
            "minimize.epochs": 3.0,
            "minimize.learning_rate": 0.05,
            "model.norm": "group",  # batch-norm would see each worker's part of a batch by itself
            "trunk.num_workers": 2,
            "trunk.epochs": 1.0,
            "actors.checkpoint_epochs": 1000.0,
            "actors.checkpoint_s": 1e-9,  # after each step, by the first worker's clock
            "fine_tuning.epochs": 2.0,
            "fine_tuning.num_workers": 2,
            "fine_tuning.min_workers": 1,  # an elastic job takes the workers there are
            "actors.max_num": 2,
        }
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
    num_train, num_validation, size = len(full_set.train), len(full_set.validation), len(full_set.train) // 3
    forward = num_train + num_validation + num_train + num_validation  # the trunk, validated; then its losses
    forward += 3 * (3 * size + size + num_validation)  # each subset's epochs and losses
    forward += num_train + num_validation  # the aggregate's losses
    forward += 2 * (num_train + num_validation)  # fine-tuning, with validation after each epoch
    forward += num_train + num_validation  # its losses
    forward += len(full_set.test)
    backward = num_train + 3 * 3 * size + 2 * num_train
    share = report.record["model"]["forward_share"]
    assert report.passes == pytest.approx((forward * share + backward * (1 - share)) / num_train)
    assert report.critical_path_passes < report.passes

    directory = RunDirectory.at(report.uri)
    works = Ledger(directory).read()
    assert sorted((w.stage, w.subset) for w in works if w.subset is not None) == [("subsets", i) for i in range(3)]
    assert {w.outcome for w in works} == {"done"}
    assert len({w.node for w in works}) == 1  # the driver's, actors' and workers', by one name
    assert [w.num_workers for w in works if w.stage in ("trunk", "fine_tuning")] == [2, 2]
    assert report.record["stages"]["trunk"]["num_workers"] == 2

    model = load_model(report.uri)
    rows = full_set.test.take()
    predicted = model(rows["image"].permute(0, 3, 1, 2)).argmax(1)
    assert int((predicted == rows["label"]).sum()) == report.test.sums["num_correct"]
    assert report.test.accuracy > 0.8

    assert [path for path in directory.list("trunk", recursive=True) if path.endswith(".pt")] == []

    # the trunk of two workers ends where that of one does
    piece = Piece(made, RunDirectory(str(tmp_path), "alone"), "trunk", by_train=True)
    opened = Run(made, piece.directory, full_set, put_once(full_set), lambda event: None)
    fine_tune(opened, piece, num_gpus=0.0)  # in this process
    ends = piece.output.weights()
    record = piece.output.record()
    assert record is not None
    assert record["num_workers"] == 1
    for key, value in stored_weights(directory, weights_path("trunk")).items():
        torch.testing.assert_close(ends[key], value, rtol=1e-4, atol=1e-5)


def test_an_actor_can_read_the_test_split_for_the_run_and_leaves_entry_and_predictions(tmp_path: Path) -> None:
    config = Config(name="tested", storage_path=str(tmp_path))
    full_set, directory = load_full_set(config.data), RunDirectory(str(tmp_path), "tested")
    weights, path = seeded_model(config, full_set).state_dict(), weights_path("fine_tuning")
    seal = directory.write_weights(path, weights)
    directory.write_json("trained.json", {"files": {path: seal}})
    test = TestPiece(config, Output(directory, "trained.json", path), "test", is_final=True)
    opened = Run(config, directory, full_set, put_once(full_set), lambda event: None)
    with ActorPool(opened, num_gpus=0.0) as pool:
        ((_, record),) = pool.run([Pack((test,))])
    ((work,), predictions) = Ledger(directory).read(), directory.read_table(PREDICTIONS_PATH)
    assert (work.stage, work.attempt, work.outcome, work.cost.num_forward) == ("test", 0, "done", len(full_set.test))
    assert work.num_network_bytes >= size_of(seal)
    assert record["metrics"] == leave_test(full_set, 0, test, node="here")["metrics"]
    assert directory.read_table(PREDICTIONS_PATH) == predictions
    assert record["files"].keys() == {PREDICTIONS_PATH, MISTAKES_PATH}


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
    assert call_on_cluster(sum, put_once([1, 2]), request={"CPU": 4}, tell=make_room, timeout_s=60.0) == 3
    assert told[1].startswith("a task of 4 CPU waits for a place, or works; free are ")
    assert told[1].endswith(" of 4 CPU")


def test_a_task_that_does_not_end_in_time_is_given_up() -> None:
    def work(seconds: float) -> None:
        time.sleep(seconds)

    with pytest.raises(TimeoutError, match=r"a task of 4 CPU did not end in 0.1 s: the cluster is busy"):
        call_on_cluster(work, put_once(1e6), request={"CPU": 4}, tell=lambda event: None, timeout_s=0.1)
    options: Any = {"request": {"CPU": 4}, "tell": lambda event: None, "timeout_s": 60.0}
    assert call_on_cluster(sum, put_once([1, 2]), **options) == 3  # it left


@pytest.mark.usefixtures("prompt_reports")
def test_a_train_job_whose_workers_stand_still_is_told_of_and_ended_after_max_attempts(tmp_path: Path) -> None:
    overrides = {"model.name": "tests.endless:network", "fine_tuning.epochs": 1.0, "actors.stall_s": 1.0}
    made = Config(name="endless", storage_path=str(tmp_path)).with_overrides(overrides | {"actors.max_attempts": 1})
    full_set, events, directory = load_full_set(made.data), list[Event](), RunDirectory(str(tmp_path), "endless")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(FineTuningFailed, match=r"fine_tuning: no step for \d+ s.* by workers on [\d.]+: killed"):
        fine_tune(
            Run(made, directory, full_set, put_once(full_set), events.append),
            Piece(made, directory, "fine_tuning", by_train=True, num_workers=2),
            num_gpus=0.0,
        )
    warnings = [event.text for event in events if isinstance(event, Note) and event.is_warning]
    # on a busy machine more than once
    assert any(re.match(r"fine_tuning stands still on [\d.]+: no step for", warning) for warning in warnings), warnings
    assert {group["state"] for group in ray.util.placement_group_table().values()} <= {"REMOVED"}
    assert {number: signal.getsignal(number) for number in handlers} == handlers  # Train's own would end us with 0


def test_a_train_job_leaves_a_checkpoint_of_its_last_step_when_a_node_will_go_and_when_it_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = {"fine_tuning.epochs": 1000.0, "actors.checkpoint_epochs": 1000.0, "actors.checkpoint_s": 1000.0}
    made = Config(name="stopped", storage_path=str(tmp_path)).with_overrides(overrides)
    full_set, directory, at_work = load_full_set(made.data), RunDirectory(str(tmp_path), "stopped"), list[Progress]()
    draining, retries = set[str](), list[str]()
    monkeypatch.setattr(train_lookout, "draining_nodes", lambda: draining)

    def tell(event: Event) -> None:
        if isinstance(event, Retry):
            retries.append(event.text)
            draining.clear()
        elif isinstance(event, Progress) and retries:
            at_work.append(event)
            raise KeyboardInterrupt  # as Ctrl-C, and `ray job stop`, do
        elif isinstance(event, Progress):
            draining.add(event.attempt.node)

    piece = Piece(made, directory, "fine_tuning", by_train=True, num_workers=2)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(Run(made, directory, full_set, put_once(full_set), tell), piece, num_gpus=0.0)
    (retry,) = retries
    assert re.fullmatch(r"fine_tuning: node [\d.]+ will go; it starts from its checkpoint elsewhere", retry)
    checkpoint = directory.newest_checkpoint("fine_tuning")
    assert checkpoint
    left, stopped = Ledger(directory).read()
    assert (left.outcome, stopped.outcome) == ("preempted", "interrupted")
    assert checkpoint[1]["position"][1] == left.cost.num_steps + stopped.cost.num_steps
    assert stopped.cost.num_steps > 0 < left.cost.num_steps
    assert at_work[0].epoch >= left.cost.num_steps / -(-len(full_set.train) // made.minimize.batch_size)
    assert {group["state"] for group in ray.util.placement_group_table().values()} <= {"REMOVED"}


def test_places_of_a_group_that_ray_train_forgot_are_freed_for_the_next(tmp_path: Path) -> None:
    """Its controller keeps no record of a group whose worker is lost as its callbacks start, and never removes it."""

    class Controller:
        def __init__(self) -> None:
            self._group: Any = None

        def request_all_places(self) -> None:
            self._group = ray.util.placement_group([{"CPU": 4}])

        def has_places(self, timeout_s: float) -> bool:
            return self._group.wait(timeout_s)

    made = Config(name="lost", storage_path=str(tmp_path))
    full_set, directory = load_full_set(made.data), RunDirectory(str(tmp_path), "lost")
    piece = Piece(made, directory, "fine_tuning", by_train=True, num_workers=4)
    job = Job(piece, put_once(full_set), [], 0.0, workplace())
    lookout = TrainLookout(job, is_elastic=False, tell=lambda event: None)
    controller: Any = ray.remote(num_cpus=0)(Controller).remote()
    ray.get(controller.request_all_places.remote())
    assert ray.get(controller.has_places.remote(60))
    lookout.look(controller)
    ray.get(controller.request_all_places.remote())
    assert not ray.get(controller.has_places.remote(0))
    lookout.look(controller)
    assert ray.get(controller.has_places.remote(60))
    ray.kill(controller)
    remove_groups(list(groups_of(controller)))
