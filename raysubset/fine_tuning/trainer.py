"""fit(): runs a Ray Train job to its end, with a TorchTrainer whose controller the driver watches."""

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysubset.cluster import STOP_GRACE_S, SYSTEM_ERRORS, groups_of, remove_groups
from raysubset.cluster.private_ray import (
    DatasetsCallback,
    DefaultFailurePolicy,
    FailureDecision,
    TrainController,
    get_env_vars_to_propagate,
)
from raysubset.errors import CorruptFile, counted, one_line
from raysubset.events import OnEvent, Retry, Waiting
from raysubset.fine_tuning.job import FOLDER, FineTuningFailed, Job
from raysubset.fine_tuning.lookout import NodeLeaves, TrainLookout
from raysubset.fine_tuning.process_group import PrivateTorchConfig
from raysubset.fine_tuning.worker import MistakeError, train_loop
from raysubset.run_directory import RunDirectory, is_unusable, minimum_path
from raysubset.work import Piece

LOOK_S = 1.0  # between two looks at the job
SETTINGS = {  # of the controller and its workers, unless the user sets them
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # polling every 2 s would double the time of a job of a few seconds
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
}
PLACE_S, ELASTIC_PLACE_S = 60.0, 15.0  # wait for places of a group of workers; free ones are given at once


class Failures:
    """Counts the failures of a Ray Train job in a row, that is without a new checkpoint between them."""

    def __init__(self, directory: RunDirectory, stage: str) -> None:
        self._directory, self._stage, self._num = directory, stage, 0
        self._checkpoints = self._found()

    def _found(self) -> set[str]:
        """Return the stage's checkpoints. Each attempt has a file of its own."""
        return {path for path in self._directory.list(self._stage) if path.endswith(".pt")}

    def count(self) -> int:
        """Count one more, and return how many there are in a row."""
        with suppress(OSError):  # the storage may answer the next time
            before, self._checkpoints = self._checkpoints, self._found()
            if self._checkpoints != before:
                self._num = 0
        self._num += 1
        return self._num


class Attempts(DefaultFailurePolicy):
    """Ray Train's policy: tries again until failures of workers or starts come too often without a new checkpoint.

    It ends on mistakes of the work, which would recur, and on damaged files. If a worker was lost as well, the others'
    errors may follow from that, and the job is tried again. Notices of preemption do not count.
    """

    def __init__(self, directory: RunDirectory, stage: str, *, most: int, most_starts: int) -> None:
        super().__init__(ray.train.FailureConfig(max_failures=-1))
        limits = {ray.train.WorkerGroupError: most, ray.train.ControllerError: most_starts}
        self._failures = [(kind, Failures(directory, stage), limit) for kind, limit in limits.items()]

    def make_decision(self, training_failed_error: ray.train.TrainingFailedError) -> FailureDecision:
        errors = getattr(training_failed_error, "worker_failures", {}).values()
        is_worker_lost = any(isinstance(error, SYSTEM_ERRORS) for error in errors)
        if not is_worker_lost and any(isinstance(error, MistakeError | CorruptFile) for error in errors):
            return FailureDecision.RAISE
        for kind, failures, limit in self._failures:
            if isinstance(training_failed_error, kind) and failures.count() >= limit:
                return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


class WatchedTrainer(TorchTrainer):
    """Calls `look` with the controller while fit() waits for it; an exception from `look` ends the job.

    However fit() ends, the controller, its workers and their placement group are gone. Ctrl-C calls `stop` and raises
    KeyboardInterrupt from it; TorchTrainer's own handler would end the process as if all had succeeded.
    """

    look: Callable[[Any], None]
    stop: Callable[[], None]
    attempts: Attempts
    start_timeout_s: float  # for a group of workers to get places; after that the controller counts a failure

    def _create_default_callbacks(self) -> list[Any]:
        """Return TorchTrainer's callbacks, except the one that starts a process for data sets: our jobs have none."""
        callbacks: list[Any] = super()._create_default_callbacks()  # pyright: ignore[reportAttributeAccessIssue]
        return [callback for callback in callbacks if not isinstance(callback, DatasetsCallback)]

    def _initialize_and_run_controller(self, **options: Any) -> ray.train.Result:
        """Run the controller as TorchTrainer does, and call `look` while waiting for it."""
        variables = SETTINGS | get_env_vars_to_propagate()
        variables["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(self.start_timeout_s)
        affinity = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        controller_class: Any = ray.remote(TrainController)
        place = {"num_cpus": 0, "scheduling_strategy": affinity, "runtime_env": {"env_vars": variables}}
        options["failure_policy"] = self.attempts
        controller = controller_class.options(**place).remote(**options)
        try:
            result: Any = None
            for method in (controller.run, controller.get_result):
                result_ref = method.remote()
                while not ray.wait([result_ref], timeout=LOOK_S)[0]:
                    self.look(controller)
                result = ray.get(result_ref)
            ray.kill(controller)  # by itself it would end later, or never if one of its threads hangs
            return result
        except BaseException as error:
            self._end(controller, error)
            raise

    def _end(self, controller: Any, error: BaseException) -> None:
        try:
            if isinstance(error, KeyboardInterrupt):
                self.stop()
            if not isinstance(error, SYSTEM_ERRORS):
                ray.wait([controller.abort.remote()], timeout=STOP_GRACE_S)
        finally:  # also if a second Ctrl-C cuts the grace period short
            ray.kill(controller)
            remove_groups(list(groups_of(controller)))


def fit(job: Job, *, tell: OnEvent) -> None:
    """Run the job to its end, again if its controller dies, ends because an actor was lost, or leaves a node."""
    piece, config = job.piece, job.piece.config
    directory, stage, most = piece.directory, piece.stage, config.actors.max_attempts
    least = config.fine_tuning.min_workers if stage == "fine_tuning" else None
    lookout = TrainLookout(job, is_elastic=least is not None, tell=tell)
    losses = Failures(directory, stage)
    while True:
        directory.delete(f"{stage}/{FOLDER}")  # workers need nothing of what Ray Train has left
        directory.newest_checkpoint(stage)  # warns of a damaged one, where the user sees it
        trainer = _trainer(job, least=least, pulses=lookout.key)
        trainer.look, trainer.stop = lookout.look, lookout.stop
        tell(Waiting(f"{stage}: Ray Train starts {counted(piece.num_workers, 'worker')}"))
        try:
            if diverged := trainer.fit().return_value:
                raise ValueError(f"{stage}: {diverged}")
            return
        except NodeLeaves as leaving:
            if directory.exists(minimum_path(stage)):
                return
            tell(Retry(f"{stage}: {leaving}; it starts from its checkpoint elsewhere"))
            lookout.begin()
        except (ray.train.TrainingFailedError, *SYSTEM_ERRORS) as error:
            loss = getattr(error, "controller_failure", error)  # Ray Train handles those of its workers
            if not isinstance(loss, SYSTEM_ERRORS):
                raise _failure(error, piece, lookout.stalled) from error
            if directory.exists(minimum_path(stage)):
                return
            num_lost = losses.count()
            text = f"{stage}: Ray Train's controller was lost {num_lost} of {most} times ({one_line(loss)})"
            if num_lost >= most:
                raise FineTuningFailed(text) from error
            tell(Retry(f"{text}; it starts from its last checkpoint"))
            lookout.begin()


def _failure(error: Exception, piece: Piece, stalled: str) -> Exception:
    """Return the error of a job that Ray Train has given up: a ValueError for mistakes, a damaged file's, that of
    storage which is full or the like, else a FineTuningFailed."""
    causes = list(getattr(error, "worker_failures", {}).values()) or [getattr(error, "controller_failure", error)]
    if damage := next((cause for cause in causes if isinstance(cause, CorruptFile) or is_unusable(cause)), None):
        return damage
    if mistake := next((cause for cause in causes if isinstance(cause, MistakeError)), None):
        text = f"{piece.stage}, {mistake.text}"
        return ValueError(text) if mistake.is_value_error else FineTuningFailed(text)
    if mistakes := [cause for cause in causes if isinstance(cause, ValueError)]:
        return ValueError(f"{piece.stage}: {one_line(mistakes[0])}")
    text = f"{piece.stage}: {stalled or one_line(causes[0])}"
    if isinstance(error, ray.train.WorkerGroupError):
        attempts = counted(piece.config.actors.max_attempts, "attempt")
        text += f"; {attempts} in a row left no new checkpoint (actors.max_attempts)"
    return FineTuningFailed(text)


def _trainer(job: Job, *, least: int | None, pulses: str) -> WatchedTrainer:
    config, directory, stage, num_gpus = job.piece.config, job.piece.directory, job.piece.stage, job.num_gpus
    storage_path, filesystem = directory.train_storage(stage)
    resources: dict[str, float] = {"CPU": config.actors.num_cpus}
    if num_gpus:
        resources["GPU"] = num_gpus
    wait_s, most_starts = config.cluster.wait_timeout_s, config.actors.max_attempts
    start_timeout_s = PLACE_S + wait_s  # the lookout gives up before
    if least is not None:  # Ray Train still counts on a node that died; then it tries with fewer workers
        start_timeout_s = ELASTIC_PLACE_S
        most_starts += math.ceil(wait_s / start_timeout_s)
    trainer = WatchedTrainer(
        train_loop,
        train_loop_config={"job": job, "pulses": pulses},
        # NCCL refuses two workers on one card
        torch_config=PrivateTorchConfig(backend="gloo" if num_gpus < 1 else "nccl"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=job.piece.num_workers if least is None else (least, job.piece.num_workers),
            use_gpu=bool(num_gpus),
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name=FOLDER,
            storage_path=storage_path,
            storage_filesystem=filesystem,
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )
    trainer.start_timeout_s = start_timeout_s
    trainer.attempts = Attempts(directory, stage, most=config.actors.max_attempts, most_starts=most_starts)
    return trainer
