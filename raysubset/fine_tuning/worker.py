"""A Ray Train worker: computes its share of each batch. Rank 0 writes ledger, history and result to the directory."""

import math
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import torch

from raysubset.cluster import own_address, published
from raysubset.config import TrainingStage, derive_seed
from raysubset.costs import count_bytes, moved_bytes, taken_bytes
from raysubset.data import FullSet, StreamedExamples
from raysubset.errors import one_line
from raysubset.fine_tuning.checkpoint_clock import CheckpointClock
from raysubset.fine_tuning.job import Job
from raysubset.fine_tuning.streaming import read_by_ray_data
from raysubset.models import copied, new_model, num_parameters
from raysubset.pulse import stand
from raysubset.run_directory import (
    Sink,
    history_path,
    left_out_path,
    load_checkpoint,
    minimum_path,
    save_checkpoint,
    trace_path,
)
from raysubset.run_directory.ledger import Ledger, Work
from raysubset.training import (
    Cost,
    DivergedError,
    LeftOutError,
    Metrics,
    Progress,
    Shard,
    ValidationWatch,
    device_name,
    evaluate,
    listener_of,
    minimize,
    num_steps_per_epoch,
    place,
    profiled,
    recompute_batch_norm,
    starts_over,
    try_training,
    use_device,
)
from raysubset.work import Report, calibration_examples, distillation_of, leave_trained

STATE_FILE = "state.pt"
OWN_STATE_FILE = "own-{rank}.pt"  # the other workers' own states, in the same checkpoint: Ray Train merges the reports


def train_loop(settings: dict[str, Any]) -> str | None:
    """Run one worker. Rank 0 keeps the ledger and history, reports checkpoints, and writes the result to the run.

    Returns:
        Why the loss diverged, if it did. It is not raised, because Ray Train would try again and diverge in the same
        way.

    Raises:
        MistakeError: for an error of the worker's own work, which would recur; errors of connections, storage and
            devices pass through.
        LeftOutError: if a step left out parameters; the run records it, and the next attempt allows it.
    """
    context, job = ray.train.get_context(), settings["job"]
    shard = Shard(context.get_world_rank(), context.get_world_size())
    job.workplace.enter()
    try:
        with published(f"{settings['pulses']}/{shard.rank:05d}"):
            _Worker(job, shard).train()
    except DivergedError as error:  # all workers raise it at the same step, because they share losses and weights
        return one_line(error)
    except LeftOutError:
        job.piece.directory.write_json(left_out_path(job.piece.stage), {"leaves_out": True})
        raise
    except Exception as error:
        if _may_pass(error):
            raise
        place_text = f"worker {shard.rank} of {shard.num} on node {own_address()}"
        raise MistakeError(f"{place_text}: {one_line(error)}", isinstance(error, ValueError)) from error
    return None


class MistakeError(Exception):
    """An error of a worker's own work: its place and cause in a line, and whether it was a ValueError."""

    def __init__(self, text: str, is_value_error: bool) -> None:
        super().__init__(text, is_value_error)
        self.text, self.is_value_error = text, is_value_error


def _may_pass(error: Exception) -> bool:
    """Return True if the error came from storage, a device, Ray, or another worker that was lost, not from the work."""
    if isinstance(error, OSError | torch.AcceleratorError | torch.distributed.DistError):
        return True
    words = str(error).lower()  # gloo's and NCCL's errors are plain RuntimeErrors
    is_of_connection = isinstance(error, RuntimeError) and any(word in words for word in _WORDS_OF_CONNECTIONS)
    return is_of_connection or type(error).__module__.startswith("ray.")


_WORDS_OF_CONNECTIONS = ("gloo", "nccl", "connection", "socket", "timed out", "timeout", "peer")


class _Worker:
    """The state of one Ray Train worker over its epochs."""

    def __init__(self, job: Job, shard: Shard) -> None:
        piece, config, full_set = job.piece, job.piece.config, ray.get(job.full_set_ref[0])
        self._piece = piece
        self._config, self._directory, self._shard = config, piece.directory, shard
        self._stage: TrainingStage = piece.stage
        self._recipe, self._ledger = config.stage(piece.stage, epochs=piece.epochs), Ledger(piece.directory)
        self._full_set: FullSet = full_set
        self._device = device = use_device(num_gpus=job.num_gpus, num_threads=config.actors.num_cpus)
        start = ray.get(job.start_ref[0])
        count_bytes(full_set.num_bytes + sum(tensor.nbytes for tensor in start.values()))
        model = new_model(config.model, full_set)
        model.load_state_dict(start)
        model = place(model, device, channels_last=self._recipe.channels_last)
        self._shard = shard = replace(shard, leaves_out=self._leaves_out(model))
        self._syncs_batch_norm = config.fine_tuning.sync_batch_norm and device.type == "cuda" and shard.num > 1
        if self._syncs_batch_norm:
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self._model = model
        self._distillation = distillation_of(piece, full_set, device)
        examples = full_set.training_batches(device=device, augment=True)
        if isinstance(examples, StreamedExamples):
            examples = read_by_ray_data(examples, job.full_set_ref, shard=shard, config=config)
        self._examples = examples
        self._calibration = calibration_examples(config, full_set, device)
        self._validation = full_set.examples("validation", _part(len(full_set.validation), shard), device=device)
        self._watch = ValidationWatch(
            model,
            self._validate,
            patience=self._recipe.watched_patience(),
            keeps_best=piece.stage == "fine_tuning" and config.fine_tuning.keep == "best",
        )
        self._measuring_cost, self._num_start_bytes = Cost(), taken_bytes()
        self._start_s = self._beat_at = time.perf_counter()
        self._work: Work | None = None
        if shard.rank == 0:
            self._open_ledger()

    def train(self) -> None:
        """Minimize from the last checkpoint if there is one; rank 0 writes the result.

        Raises:
            DivergedError: as minimize() does, on every worker.
        """
        state, latest_cost = self._restore(), Cost()
        steps_per_epoch = num_steps_per_epoch(len(self._examples), self._recipe)
        every_steps = max(1, round(self._config.actors.checkpoint_epochs * steps_per_epoch))
        limit_s, step = self._config.actors.checkpoint_s, state["position"][1] if state else 0
        self._clock = CheckpointClock(self._shard, self._device, limit_s=limit_s, step=step)

        work_fields = {"run": self._directory.name, "stage": self._stage, "round": 0, "subset": None}
        work_fields |= {"rank": self._shard.rank, "num_workers": self._shard.num}
        listener = listener_of(self._config.actors.on_step, **work_fields)

        def on_step(progress: Progress) -> str | None:
            nonlocal latest_cost
            latest_cost = progress.cost
            stand(lambda: _standing(progress))
            outcome = self._watch.look(progress)
            if progress.epoch_ended and self._shard.rank == 0:
                self._directory.write_json(history_path(self._stage), self._watch.looks)
            is_due = self._clock.is_due(progress.step)
            if progress.epoch_ended or progress.step % every_steps == 0 or is_due:
                self._checkpoint(progress)
            elif self._work is not None:
                self._beat_if_due(self._work, progress)
            listener(progress)
            if trace:
                trace()
            return outcome

        seed = derive_seed(self._config.seed, "minimize", self._stage, 0, 0)  # the same as a subset actor's
        num_traced = self._config.actors.profile if self._shard.rank == 0 else 0
        leave = partial(self._directory.write_bytes, trace_path(self._stage))
        try:
            with profiled(num_traced, self._device, leave) as trace:
                result = minimize(
                    self._model,
                    self._examples,
                    self._recipe,
                    seed=seed,
                    state=state,
                    shard=self._shard,
                    distillation=self._distillation,
                    validation=self._validation,
                    on_step=on_step,
                )
        except Exception as error:
            if self._work is not None and isinstance(error, DivergedError):  # not for a lost worker
                entry = replace(self._entry(self._work, latest_cost), outcome="failed", error=one_line(error))
                self._ledger.write(replace(entry, ended_at=time.time()))
            raise
        if self._work is not None:
            self._leave_result(self._work, result.outcome, result.cost)

    def _leaves_out(self, model: torch.nn.Module) -> bool:
        """Return True if steps may leave out parameters, by a trial or an earlier attempt. All workers decide alike."""
        config, shard = self._config, self._shard
        if shard.num == 1 or ":" not in config.model.name:
            return False
        leaves_out = self._directory.exists(left_out_path(self._stage))
        if not leaves_out:
            trial = try_training(copied(model).cpu(), self._recipe, self._full_set.sample())
            leaves_out = bool(trial.left_out)
        return bool(shard.sum(torch.tensor(float(leaves_out), device=self._device)).item())

    def _restore(self) -> dict[str, Any] | None:
        """Return the state to resume from, or None to start over."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return None
        with checkpoint.as_directory() as folder:
            data = Path(folder, STATE_FILE).read_bytes()
            count_bytes(self._shard.num * len(data))
            state = load_checkpoint(data)
            own_path = Path(folder, OWN_STATE_FILE.format(rank=self._shard.rank))
            if own_path.exists():
                state["own"] = load_checkpoint(own_path.read_bytes())
        if starts_over(self._recipe, state):
            return None
        self._watch.load_state_dict(state)
        return state

    def _validate(self) -> Metrics:
        """Return validation metrics. Each worker scores a part, with rank 0's running statistics."""
        if self._shard.num > 1:
            for buffer in self._model.buffers():
                torch.distributed.broadcast(buffer, src=0)
        part = evaluate(self._model, self._validation, self._recipe)
        sum_device = self._device if self._device.type == "cuda" else "cpu"

        def total(value: Any) -> Any:
            return self._shard.sum(torch.tensor(value, dtype=torch.float64, device=sum_device))

        sums = {
            name: (total(value).long() if name.startswith("num_") else total(value)).tolist()
            for name, value in part.sums.items()
        }
        num_examples = int(total(part.num_examples))
        self._measuring_cost += Cost(num_forward=num_examples)
        return Metrics.of_sums(self._full_set.task, float(total(part.loss_sum)), sums, num_examples)

    def _beat_if_due(self, work: Work, progress: Progress) -> None:
        """Write the work so far to the ledger if it is due, so that it is counted if this process dies."""
        now = time.perf_counter()
        if now - self._beat_at >= self._ledger.heartbeat_s:
            self._beat_at = now
            self._ledger.write(self._entry(work, progress.cost))

    def _checkpoint(self, progress: Progress) -> None:
        """Report to Ray Train: a barrier of all ranks. Rank 0 writes the common state, the others their own."""
        metrics = {"epoch": progress.epoch, "loss": progress.loss}
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if self._shard.rank == 0:
                assert self._work is not None
                _write(folder, STATE_FILE, progress.capture() | self._watch.state_dict())
                checkpoint = ray.train.Checkpoint.from_directory(folder)
                self._ledger.write(self._entry(self._work, progress.cost))
            elif own_state := progress.capture()["own"]:
                _write(folder, OWN_STATE_FILE.format(rank=self._shard.rank), own_state)
                checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=f"step-{progress.step:09d}")
        self._clock.start(progress.step)

    def _cost(self, minimized: Cost) -> Cost:
        elapsed_s = time.perf_counter() - self._start_s
        return replace(minimized + self._measuring_cost, device_s=elapsed_s * self._shard.num)

    def _entry(self, work: Work, minimized: Cost) -> Work:
        """Return the ledger entry so far, with the bytes that all workers moved.

        These are what they fetched at the start, the weights that the first gives the others, what it writes, and a
        ring all-reduce per step: an upper bound if minimize.skipping freezes weights. Small amounts are left out: sums
        that are shared, and the other workers' own states.
        """
        num_others = self._shard.num - 1
        num_given_bytes = num_others * sum(tensor.nbytes for tensor in self._model.state_dict().values())
        num_gradient_bytes = self._recipe.bytes_a_gradient * num_parameters(self._model)
        num_reduced_bytes = minimized.num_steps * 2 * num_others * num_gradient_bytes
        num_bytes = self._shard.num * self._num_start_bytes + num_given_bytes + moved_bytes() + num_reduced_bytes
        return replace(work, cost=self._cost(minimized), num_network_bytes=num_bytes)

    def _leave_result(self, work: Work, outcome: str, minimized: Cost) -> None:
        """Measure and write the weights, close the ledger entry, and write the record."""
        self._watch.settle()
        num_refreshed = 0
        if self._shard.num > 1 and not self._syncs_batch_norm:  # the statistics are of rank 0's parts of the batches
            num_refreshed = recompute_batch_norm(self._model, self._calibration, self._recipe)
        record, cost = leave_trained(
            self._model,
            self._full_set,
            self._piece,
            self._watch,
            outcome=outcome,
            device=self._device,
            num_workers=self._shard.num,
            recomputed_batch_norm=num_refreshed > 0,
        )
        self._measuring_cost += cost + Cost(num_forward=num_refreshed)
        work = replace(self._entry(work, minimized), outcome="done", ended_at=time.time())
        self._ledger.write(work)  # before the record: without that, all of this work is done again
        self._directory.write_json(minimum_path(self._stage), record)

    def _open_ledger(self) -> None:
        self._ledger.close_lost()  # nothing else runs during a Ray Train stage: an open entry is of a dead group
        attempt = self._ledger.next_attempt(self._stage, 0, None)
        work = Work(self._stage, 0, None, attempt, own_address(), device_name(self._device), started_at=time.time())
        self._work = replace(work, num_workers=self._shard.num)
        self._ledger.write(self._work)


def _standing(progress: Progress) -> tuple[float | None, ...]:
    """Return the numbers of a pulse: epoch, number of epochs, this worker's loss so far, and its examples a second."""
    report = Report.of(progress)
    loss = report.running_loss if math.isfinite(report.running_loss) else None
    return report.epoch, report.num_epochs, loss, report.examples_per_s


def _write(folder: str, name: str, state: dict[str, Any]) -> None:
    """Write a file of a checkpoint."""
    with Path(folder, name).open("wb") as file:
        save_checkpoint(state, sink := Sink(file))
    count_bytes(sink.num_bytes)


def _part(num_examples: int, shard: Shard) -> np.ndarray:
    """Return the positions that a worker scores: every num-th from its rank on."""
    return np.arange(shard.rank, num_examples, shard.num)
