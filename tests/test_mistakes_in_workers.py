"""What a Ray Train worker raises: tried again where it came from outside its work, and only there."""

# pyright: reportPrivateImportUsage=false

import errno
import os
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from ray import cloudpickle
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from raysubset.cluster import tasks
from raysubset.config import Config
from raysubset.data import load_full_set
from raysubset.errors import CorruptFile
from raysubset.events import Event, Retry
from raysubset.fine_tuning import streaming, trainer, worker
from raysubset.fine_tuning.job import FineTuningFailed, Job
from raysubset.fine_tuning.trainer import Attempts, WatchedTrainer, fit
from raysubset.fine_tuning.worker import MistakeError, _may_pass
from raysubset.models import build_model
from raysubset.run_directory import RunDirectory, checkpoint_path
from raysubset.run_directory.ledger import Ledger
from raysubset.subset_actors.pool import PLACE_ERRORS
from raysubset.training import Shard, use_device
from raysubset.user_code.functions import in_a_line
from raysubset.work import Piece


@pytest.fixture
def directory(tmp_path) -> RunDirectory:
    return RunDirectory(str(tmp_path), "run")


def save_checkpoint(directory: RunDirectory, step: int) -> None:
    directory.write_checkpoint(checkpoint_path("conventional", step), {"position": [0, step]})


def attempts_at(directory: RunDirectory) -> Attempts:
    """As the controller has it, which gets it from another process."""
    return cloudpickle.loads(cloudpickle.dumps(Attempts(directory, "conventional", most=3, most_starts=2)))


def decision(directory: RunDirectory, *errors: Exception) -> FailureDecision:
    error = cloudpickle.loads(cloudpickle.dumps(WorkerGroupError("failed", dict(enumerate(errors)))))
    return attempts_at(directory).make_decision(error)


def test_settings_of_a_train_job_are_the_jobs_and_a_users_own_come_first(monkeypatch):
    """They had been set in the driver's environment, where the user's own later jobs had them too."""

    class Seen(Exception):
        pass

    def options(**place: Any) -> None:
        raise Seen(place["runtime_env"]["env_vars"])

    context = SimpleNamespace(get_node_id=lambda: "a" * 56)
    calls = {"get_runtime_context": lambda: context, "remote": lambda kind: SimpleNamespace(options=options)}
    monkeypatch.setattr(trainer, "ray", SimpleNamespace(**calls))
    job = object.__new__(WatchedTrainer)
    job.start_timeout_s, job.attempts = 60.0, cast(Any, None)
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PRINT_PATCH", "1")
    with pytest.raises(Seen) as seen:
        job._initialize_and_run_controller()
    (variables,) = seen.value.args
    assert (variables["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"], variables["RAY_TRAIN_ENABLE_PRINT_PATCH"]) == ("0.2", "1")
    assert "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S" not in os.environ


def test_mistakes_are_not_tried_again_and_losses_are(directory):
    mistake = MistakeError("worker 1 of 2 on node 10.0.0.1: TypeError: labels are wanted", False)
    assert decision(directory, mistake) == FailureDecision.RAISE
    assert decision(directory, RuntimeError("Connection closed by peer"), mistake) == FailureDecision.RAISE
    assert decision(directory, OSError("503")) == FailureDecision.RETRY
    assert decision(directory, RayActorError(), mistake) == FailureDecision.RETRY  # it may follow from the loss


LOST = WorkerGroupError("failed", {0: RayActorError()})
NOT_STARTED = ControllerError(WorkerGroupStartupFailedError("a node died"))


@pytest.mark.parametrize(("failure", "most"), [(LOST, 3), (NOT_STARTED, 2)])
def test_only_failures_in_a_row_without_a_new_checkpoint_count(directory, failure, most):
    attempts = attempts_at(directory)
    for step in range(8):
        for _ in range(most - 1):
            assert attempts.make_decision(failure) == FailureDecision.RETRY
        save_checkpoint(directory, step)
    for _ in range(most - 1):
        assert attempts.make_decision(failure) == FailureDecision.RETRY
    assert attempts.make_decision(failure) == FailureDecision.RAISE


def test_a_job_is_tried_again_after_its_controller_lost_an_actor(directory, monkeypatch):
    """The controller loses an actor with its node where Ray Train does not expect it, and ends with its error."""
    job, events, failures = job_in(directory), list[Event](), list[Exception]()

    def lose_actors(trainer: WatchedTrainer) -> None:
        failures.append(ControllerError(ActorUnavailableError("Socket closed", None)))
        if len(failures) < 7:  # with most = 3
            save_checkpoint(directory, len(failures))
        raise failures[-1]

    monkeypatch.setattr(WatchedTrainer, "fit", lose_actors)
    with pytest.raises(FineTuningFailed, match=r"conventional: Ray Train's controller was lost 3 of 3 times \(Act"):
        fit(job, tell=events.append)
    assert len(failures) == 8  # the sixth left the last checkpoint
    retries = [event.text for event in events if isinstance(event, Retry)]
    assert ["1 of 3" in text for text in retries] == [True] * 6 + [False]


def test_a_damaged_file_that_a_worker_meets_is_the_drivers_to_have_made_again(directory, monkeypatch):
    """A teacher's weights, which only workers read. It is not tried again as it is, and no mistake of the user's."""
    damage = CorruptFile("rounds/0000/minima/0001/weights.safetensors", "it was changed")

    def meet(*_: object) -> None:
        raise damage

    monkeypatch.setattr(worker, "_train", meet)
    monkeypatch.setattr(worker, "published", lambda *_: nullcontext())
    monkeypatch.setattr(streaming, "own_address", lambda: "there")
    context = SimpleNamespace(get_world_rank=lambda: 1, get_world_size=lambda: 2)
    monkeypatch.setattr(worker, "ray", SimpleNamespace(train=SimpleNamespace(get_context=lambda: context)))
    job = replace(job_in(directory), workplace=SimpleNamespace(enter=lambda: None))
    with pytest.raises(CorruptFile, match="it was changed"):
        worker.train_loop({"job": job, "pulses": ""})
    assert decision(directory, damage) == FailureDecision.RAISE

    def fail(trainer: WatchedTrainer) -> None:
        raise cloudpickle.loads(cloudpickle.dumps(WorkerGroupError("failed", {1: damage})))

    monkeypatch.setattr(WatchedTrainer, "fit", fail)
    with pytest.raises(CorruptFile) as told:
        fit(job, tell=lambda event: None)
    assert told.value.path == damage.path


def test_a_full_disk_is_no_failure_of_a_job_without_which_others_could_go_on(directory, monkeypatch):
    full, left = OSError(errno.ENOSPC, "No space left on device", "checkpoint-00.pt"), ConnectionError("peer")

    def fail(trainer: WatchedTrainer) -> None:
        raise cloudpickle.loads(cloudpickle.dumps(WorkerGroupError("failed", {0: left, 1: full})))

    monkeypatch.setattr(WatchedTrainer, "fit", fail)
    job = replace(job_in(directory), workplace=SimpleNamespace(enter=lambda: None))
    with pytest.raises(OSError, match=r"No space left on device: 'checkpoint-00\.pt'"):
        fit(job, tell=lambda event: None)


def test_errors_of_a_controller_itself_end_a_job(directory, monkeypatch):
    def fail(trainer: WatchedTrainer) -> None:
        raise ControllerError(RuntimeError("no such callback"))

    monkeypatch.setattr(WatchedTrainer, "fit", fail)
    with pytest.raises(FineTuningFailed, match=r"conventional: RuntimeError: no such callback$"):
        fit(job_in(directory), tell=lambda event: None)


def job_in(directory: RunDirectory) -> Job:
    """A job whose workers never start."""
    config = Config().with_overrides({"actors.max_attempts": 3})
    nothing: Any = None
    return Job(Piece(config, directory, "conventional"), [], [], 0.0, nothing)


def test_workers_that_are_started_again_after_the_minimum_was_written_leave_it_as_it_is(directory, monkeypatch):
    """Ray Train starts all again if one is lost before the controller has heard that they are done."""
    monkeypatch.setattr(tasks, "ray", SimpleNamespace(get=lambda given: given))
    monkeypatch.setattr(streaming, "own_address", lambda: "there")
    config = Config().with_overrides({"trunk.epochs": 0.2})
    full_set = load_full_set(config.data)
    start, nothing = build_model(config.model, full_set.spec, seed=1).state_dict(), cast(Any, None)
    full_set_ref, start_ref = cast(Any, [full_set]), cast(Any, [start])
    job = Job(Piece(config, directory, "trunk", by_train=True, num_workers=1), full_set_ref, start_ref, 0.0, nothing)
    minimizer = streaming.minimizer_on(job.full_set_ref, num_gpus=0.0, shard=Shard())
    worker._train(job, minimizer, 0)
    record = job.piece.record()
    assert record is not None
    worker._train(job, minimizer, 0)
    assert [work.outcome for work in Ledger(directory).read()] == ["done"]
    directory.delete("trunk/weights.safetensors")
    worker._train(job, minimizer, 0)
    assert [work.outcome for work in Ledger(directory).read()] == ["lost", "done"]
    assert job.piece.output.files() == record["files"]


def test_what_may_pass_is_storage_devices_ray_and_lost_connections():
    passing = [OSError("503"), ConnectionError(), RayActorError(), torch.distributed.DistNetworkError("lost")]
    passing += [RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.1]:3021")]
    assert all(map(_may_pass, passing))
    mistakes = [ValueError("connection"), TypeError("x"), KeyError("labels"), RuntimeError("mat1 and mat2 shapes")]
    assert not any(map(_may_pass, mistakes))


def test_a_device_that_fails_in_a_users_function_is_no_mistake_of_the_function():
    with pytest.raises(torch.AcceleratorError) as told, in_a_line("data.augmentation", "views:cut"):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    assert _may_pass(told.value)
    assert isinstance(told.value, PLACE_ERRORS)  # and in an actor


def test_a_gpu_that_was_given_and_is_not_there_is_a_device_that_failed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(torch.AcceleratorError, match=r"1 GPU was given .* sees none: .*num-gpus=0") as told:
        use_device(num_gpus=1.0, num_threads=torch.get_num_threads())
    there = cloudpickle.loads(cloudpickle.dumps(told.value))
    assert _may_pass(there)
    assert isinstance(there, PLACE_ERRORS)  # so another node may do the work
