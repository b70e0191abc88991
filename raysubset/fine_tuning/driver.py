"""fine_tune(): the driver's side of a Ray Train job."""

import _thread
import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any

# Ray Train reads these where the driver runs. Polling every 2 s would make each job of a few seconds twice as long.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "60")

import numpy as np
import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from raysubset.cluster import put_once, refuse_unplaceable
from raysubset.config import Config, TrainingStage
from raysubset.errors import one_line
from raysubset.events import Event, OnEvent
from raysubset.fine_tuning.worker import Job, train_loop
from raysubset.run_directory import RunDirectory, history_path, minimum_path, weights_path
from raysubset.streaming import refuse_without_readers
from raysubset.training import Metrics, Weights

LOOK_S = 1.0  # between two looks at the history that the first worker leaves
CONTROLLER_FAILURES = 3  # Ray Train retries a group that cannot start for ever unless told otherwise


class FineTuningFailed(RuntimeError):
    """Ray Train gave up; the message names the stage and the cause."""


def fine_tune(
    config: Config,
    full_set_ref: Sequence[ray.ObjectRef],
    weights: Weights,
    run: RunDirectory,
    *,
    calibration: np.ndarray,
    num_workers: int,
    num_gpus: float,
    on_event: OnEvent,
    stage: TrainingStage = "fine_tuning",
    epochs: float | None = None,
    teachers: Sequence[str] = (),
) -> tuple[Weights, dict[str, Any]]:
    """Minimize on the full set from the weights, by a Ray Train job of several workers in data parallel.

    The global batch is config.minimize.batch_size whatever the number of workers. A worker that dies restarts the group
    from the last checkpoint, up to actors.max_attempts times; with fine_tuning.min_workers set, on fewer workers. A
    loss that diverges is not tried again. If the driver dies, the same call goes on from the last checkpoint; a stage
    that was finished is read back.

    Args:
        calibration: int64 positions in the training split, for batch-norm statistics and the training loss.
        teachers: folders of the run's minima to distil from (fine_tuning.distillation); every worker reads them all.

    Returns:
        The weights it ended at, and the stage's record (minimum.json).

    Raises:
        ValueError: if the workers can never be placed, or the loss diverges.
        FineTuningFailed: if the job failed more often than allowed.
    """
    if (record := run.read_json_or_none(minimum_path(stage))) is None:
        request = {"CPU": config.actors.num_cpus, "GPU": num_gpus}
        least = (config.fine_tuning.min_workers if stage == "fine_tuning" else None) or num_workers
        refuse_unplaceable(request, f"{stage} workers", num=least)
        if config.data.streamed:
            refuse_without_readers(config, stage, num_workers=num_workers)
        recipe, start_ref = config.stage(stage, epochs=epochs), put_once(weights)
        job = Job(config, recipe, run, stage, full_set_ref, start_ref, calibration, num_gpus, tuple(teachers))
        _fit(job, num_workers=num_workers, on_event=on_event)
        record = run.read_json(minimum_path(stage))
    return run.read_weights(weights_path(stage)), record


def _fit(job: Job, *, num_workers: int, on_event: OnEvent) -> None:
    """Run the job to its end, telling of its epochs meanwhile."""
    config, run, stage, num_gpus = job.config, job.run, job.stage, job.num_gpus
    storage_path, filesystem = run.train_storage(stage)
    resources: dict[str, float] = {"CPU": config.actors.num_cpus}
    if num_gpus:
        resources["GPU"] = num_gpus
    least = config.fine_tuning.min_workers if stage == "fine_tuning" else None
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"job": job},
        # NCCL refuses two workers on one card
        torch_config=TorchConfig(backend="gloo" if num_gpus < 1 else "nccl"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=num_workers if least is None else (least, num_workers),
            use_gpu=bool(num_gpus),
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name="ray_train",
            storage_path=storage_path,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(
                max_failures=config.actors.max_attempts - 1, controller_failure_limit=CONTROLLER_FAILURES
            ),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )
    with _telling_of_epochs(run, stage, on_event), _interruptible():
        try:
            diverged = trainer.fit().return_value
        except ray.train.TrainingFailedError as error:
            causes = list(getattr(error, "worker_failures", {}).values()) or [error]
            own = [cause for cause in causes if isinstance(cause, ValueError)]
            text = f"{stage}: {one_line((own or causes)[0])}"
            raise (ValueError(text) if own else FineTuningFailed(text)) from error
    if diverged:
        raise ValueError(f"{stage}: {diverged}")


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Have Ctrl-C raise KeyboardInterrupt, during fit() and afterwards.

    fit() puts a handler of its own there for good, which ends the job, and then the process as if all were done.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stopped:
        raise KeyboardInterrupt from stopped
    finally:
        if callable(handler) and _on_main_thread():
            signal.signal(signal.SIGINT, handler)


@contextlib.contextmanager
def _telling_of_epochs(run: RunDirectory, stage: TrainingStage, on_event: OnEvent) -> Iterator[None]:
    """While fit() blocks, a thread reads the history that the first worker leaves in storage.

    What the listener raises there, as where another driver has taken the run over, is raised here: at once on the main
    thread, whose job is stopped, elsewhere when the job is done.
    """
    done, can_interrupt = threading.Event(), _on_main_thread()
    raised: list[Exception] = []

    def history() -> list[dict[str, Any]]:
        return run.read_json_or_none(history_path(stage)) or []

    def tell(entries: Sequence[dict[str, Any]]) -> None:
        nonlocal num_told
        for entry in entries[num_told:]:
            num_told += 1
            validation = Metrics.from_dict(entry["validation"])
            text = f"{stage}: epoch {entry['epoch']:g}, loss {entry['loss']:.4f}, validation {validation.loss:.4f}"
            on_event(Event("epoch", f"{text} and {validation.accuracy:.2%}", {"stage": stage, **entry}))

    def watch() -> None:
        while not done.wait(LOOK_S):
            try:
                entries = history()
            except OSError:  # the storage may answer the next time
                continue
            try:
                tell(entries)
            except Exception as error:
                raised.append(error)
                if can_interrupt and not done.is_set():
                    _thread.interrupt_main()
                return

    num_told = len(history())
    thread = threading.Thread(target=watch, daemon=True, name="raysubset-epochs")
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if raised:
            raise raised[0] from None
        raise
    finally:
        done.set()
        thread.join()
    if raised:
        raise raised[0]
    tell(history())


def _on_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
