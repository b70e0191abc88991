"""fine_tune(): the driver's side of a Ray Train job."""

import math
import os
from collections.abc import Sequence
from typing import Any

# Ray Train reads these where the driver runs. Polling every 2 s would make each job of a few seconds twice as long.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")

import ray
import ray.train

from raysubset.cluster import SYSTEM_ERRORS, put_once, refuse_unplaceable, workplace
from raysubset.config import TrainingStage
from raysubset.errors import one_line
from raysubset.events import Note, OnEvent, Retry
from raysubset.fine_tuning.lookout import TrainLookout
from raysubset.fine_tuning.process_group import PrivateTorchConfig
from raysubset.fine_tuning.snapshots import mend_snapshot
from raysubset.fine_tuning.trainer import WatchedTrainer
from raysubset.fine_tuning.worker import Job, MistakeError, train_loop
from raysubset.quality import Quality
from raysubset.run_directory import minimum_path, weights_path
from raysubset.streaming import refuse_without_readers
from raysubset.training import Weights
from raysubset.work import Run

LOOK_S = 1.0  # between two looks at the history that the first worker leaves
CONTROLLER_FAILURES = 3
_JOB = "ray_train"  # its folder in that of the stage


class FineTuningFailed(RuntimeError):
    """Ray Train gave up; the message names the stage and the cause."""


def refuse_old_ray_train() -> None:
    """Raises ValueError: if the environment has Ray Train in its first version, which our jobs are not written for."""
    if not hasattr(ray.train, "UserCallback"):  # only the second has it
        setting = os.environ.get("RAY_TRAIN_V2_ENABLED")
        raise ValueError(f"RAY_TRAIN_V2_ENABLED={setting} asks for Ray Train of old, which cannot fine-tune: unset it")


def fine_tune(
    run: Run,
    weights: Weights,
    *,
    num_workers: int,
    num_gpus: float,
    stage: TrainingStage = "fine_tuning",
    epochs: float | None = None,
    teachers: Sequence[str] = (),
) -> tuple[Weights, dict[str, Any]]:
    """Minimize on the full set from the weights, by a Ray Train job of several workers in data parallel.

    The global batch is config.minimize.batch_size whatever the number of workers. A worker that dies, or is killed as
    it stands still (actors.stall_s), restarts the group from the last checkpoint, up to actors.max_attempts times; with
    fine_tuning.min_workers set, on fewer workers. So does a controller that dies. A loss that diverges
    and what a worker's own work raises are not tried again. If the driver dies, the same call resumes from the last
    checkpoint; a stage that was finished is read back.

    Args:
        teachers: folders of the run's minima to distil from (fine_tuning.distillation); every worker reads them all.

    Returns:
        The weights it ended at, and the stage's record (minimum.json).

    Raises:
        ValueError: if the workers can never be placed, or the loss diverges.
        FineTuningFailed: if the job failed more often than allowed.
        TimeoutError: if the workers have no place for cluster.wait_timeout_s.
    """
    config, directory = run.config, run.directory
    if (record := directory.read_record(minimum_path(stage))) is None:
        request = {"CPU": config.actors.num_cpus, "GPU": num_gpus}
        least = (config.fine_tuning.min_workers if stage == "fine_tuning" else None) or num_workers
        refuse_unplaceable(request, f"{stage} workers", num=least)
        if config.data.streamed:
            refuse_without_readers(config, stage, num_workers=num_workers)
        recipe, start_ref = config.stage(stage, epochs=epochs), put_once(weights)
        refs, here = (run.full_set_ref, start_ref), workplace()
        job = Job(config, recipe, directory, stage, *refs, num_gpus, tuple(teachers), here)
        _fit(job, num_workers=num_workers, quality=run.full_set.quality, tell=run.tell)
        record = directory.read_json(minimum_path(stage))
    return directory.read_weights(weights_path(stage), record["files"]), record


def _fit(job: Job, *, num_workers: int, quality: Quality, tell: OnEvent) -> None:
    """Run the job to its end, again where its controller dies."""
    run, stage, most = job.directory, job.stage, job.config.actors.max_attempts
    least = job.config.fine_tuning.min_workers if stage == "fine_tuning" else None
    lookout = TrainLookout(job, num_workers=num_workers, is_elastic=least is not None, quality=quality, tell=tell)
    num_lost = 0
    while True:
        num_epochs = lookout.num_epochs
        if mended := mend_snapshot(run, f"{stage}/{_JOB}"):
            tell(Note(mended, is_warning=True))
        trainer = _trainer(job, num_workers=num_workers, least=least, pulses=lookout.key)
        trainer.look = lookout.look
        try:
            diverged = trainer.fit().return_value
            break
        except ray.train.TrainingFailedError as error:
            causes = list(getattr(error, "worker_failures", {}).values()) or [
                getattr(error, "controller_failure", error)
            ]
            if mistake := next((cause for cause in causes if isinstance(cause, MistakeError)), None):
                text = f"{stage}, {mistake.text}"
                raise (ValueError(text) if mistake.is_value_error else FineTuningFailed(text)) from error
            own = [cause for cause in causes if isinstance(cause, ValueError)]
            text = f"{stage}: {one_line((own or causes)[0])}"
            if lookout.stalled and not own:
                text = f"{stage}: {lookout.stalled}"
            raise (ValueError(text) if own else FineTuningFailed(text)) from error
        except SYSTEM_ERRORS as error:  # of the controller itself: Ray Train tries again what befalls its workers
            if run.exists(minimum_path(stage)):
                return
            num_lost = 1 if lookout.num_epochs > num_epochs else num_lost + 1
            text = f"{stage}: Ray Train's controller was lost {num_lost} of {most} times ({one_line(error)})"
            if num_lost >= most:
                raise FineTuningFailed(text) from error
            tell(Retry(f"{text}; it starts from its last checkpoint"))
            lookout.begin()
    lookout.tell_epochs()
    if diverged:
        raise ValueError(f"{stage}: {diverged}")


def _trainer(job: Job, *, num_workers: int, least: int | None, pulses: str) -> WatchedTrainer:
    config, run, stage, num_gpus = job.config, job.directory, job.stage, job.num_gpus
    storage_path, filesystem = run.train_storage(stage)
    resources: dict[str, float] = {"CPU": config.actors.num_cpus}
    if num_gpus:
        resources["GPU"] = num_gpus
    wait_s, start_timeout_s, num_failures = config.cluster.wait_timeout_s, 60.0, CONTROLLER_FAILURES
    if least is None:
        start_timeout_s += wait_s  # the lookout gives up before
    else:  # each time so many workers have no place, as after a node's death, Ray Train tries with fewer
        num_failures += math.ceil(wait_s / start_timeout_s)
    trainer = WatchedTrainer(
        train_loop,
        train_loop_config={"job": job, "pulses": pulses},
        # NCCL refuses two workers on one card
        torch_config=PrivateTorchConfig(backend="gloo" if num_gpus < 1 else "nccl"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=num_workers if least is None else (least, num_workers),
            use_gpu=bool(num_gpus),
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name=_JOB,
            storage_path=storage_path,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(
                max_failures=config.actors.max_attempts - 1, controller_failure_limit=num_failures
            ),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )
    trainer.every_s, trainer.start_timeout_s = LOOK_S, start_timeout_s
    return trainer
