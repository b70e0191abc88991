"""One Ray Train worker: its share of each batch; rank 0 leaves ledger, history and result in the run directory.

train_here(job, follower, attempt=0, waited_s=0.0)  # the only worker, in this process
"""

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer

from raysubset.cluster import own_address, published
from raysubset.config import TrainingStage, derive_seed
from raysubset.costs import count_bytes, moved_bytes, taken_bytes
from raysubset.data import Examples, FullSet, StreamedExamples
from raysubset.errors import one_line
from raysubset.fine_tuning.job import FOLDER, Job
from raysubset.ledger import Ledger, Work
from raysubset.models import copied, new_model, num_parameters
from raysubset.pulse import beat, stand
from raysubset.run_directory import (
    Sink,
    checkpoint_path,
    history_path,
    left_out_path,
    load_checkpoint,
    minimum_path,
    save_checkpoint,
    trace_path,
    weights_path,
)
from raysubset.soundness import sampled
from raysubset.streaming import read_by_ray_data
from raysubset.training import (
    Cost,
    Distillation,
    DivergedError,
    LeftOutError,
    Metrics,
    Progress,
    Shard,
    ValidationWatch,
    Weights,
    device_name,
    evaluate,
    listener_of,
    minimize,
    num_steps_per_epoch,
    peak_bytes,
    place,
    profiled,
    recompute_batch_norm,
    starts_over,
    try_training,
    use_device,
)
from raysubset.work import Follower, Report, calibration_examples

STATE_FILE = "state.pt"
OWN_STATE_FILE = "own-{rank}.pt"  # of the other workers, in the same checkpoint: Ray Train merges what they report


def train_loop(settings: dict[str, Any]) -> str | None:
    """One worker. Rank 0 keeps the ledger and history, reports checkpoints, and leaves the result in the run.

    Returns:
        Why it diverged, if it did: what a worker raises is tried again by Ray Train, and would end in the same way.

    Raises:
        MistakeError: what its own work raised, which would raise it again; lost connections, storage and devices pass.
        LeftOutError: if a step left out parameters; it is noted, and the next attempt knows.
    """
    context, job = ray.train.get_context(), settings["job"]
    shard = Shard(context.get_world_rank(), context.get_world_size())
    job.workplace.enter()
    try:
        with published(f"{settings['pulses']}/{shard.rank:05d}"):
            _Worker(job, shard).train()
    except DivergedError as error:  # of all workers at the same step: they share their losses and weights
        return one_line(error)
    except LeftOutError:
        job.directory.write_json(left_out_path(job.stage), {"leaves_out": True})
        raise
    except Exception as error:
        if _may_pass(error):
            raise
        where = f"worker {shard.rank} of {shard.num} on node {own_address()}"
        raise MistakeError(f"{where}: {one_line(error)}", isinstance(error, ValueError)) from error
    return None


def train_here(job: Job, follower: Follower, *, attempt: int, waited_s: float) -> dict[str, Any] | None:
    """Do a stage in this process by Ray Train's local mode, from its newest checkpoint.

    What it leaves is what a job of one worker leaves, bit for bit. If the process dies, another one resumes. What its
    work raises passes.

    Args:
        attempt: names its checkpoints and ledger entry; waited_s for the ledger.

    Returns:
        The record (minimum.json); None if it was stopped, with a checkpoint written.
    """
    worker = _Worker(job, Shard(0, 1), _Alone(follower, attempt, waited_s))
    trainer = TorchTrainer(
        worker.train,
        torch_config=_NoDeviceConfig(),
        scaling_config=ray.train.ScalingConfig(num_workers=0),
        run_config=ray.train.RunConfig(name=FOLDER),
    )
    return trainer.fit().return_value


@dataclass(frozen=True)
class _Alone:
    """What a worker is given beside its job where a pool of actors counts its attempts and keeps watch."""

    follower: Follower
    attempt: int
    waited_s: float


class _NoDeviceConfig(TorchConfig):
    """As TorchConfig, which would start CUDA in a process that was given no GPU: use_device() chooses."""

    @property
    def train_func_context(self) -> Any:
        return nullcontext


class MistakeError(Exception):
    """What a worker's own work raised: its place and the cause in a line, and whether it was a ValueError."""

    def __init__(self, text: str, is_value_error: bool) -> None:
        super().__init__(text, is_value_error)
        self.text, self.is_value_error = text, is_value_error


def _may_pass(error: Exception) -> bool:
    """Whether it came from storage, a device, Ray, or another worker that was lost, rather than from the work."""
    if isinstance(error, OSError | torch.AcceleratorError | torch.distributed.DistError):
        return True
    words = str(error).lower()  # gloo's and NCCL's errors are plain RuntimeErrors
    of_connection = isinstance(error, RuntimeError) and any(word in words for word in _WORDS_OF_CONNECTIONS)
    return of_connection or type(error).__module__.startswith("ray.")


_WORDS_OF_CONNECTIONS = ("gloo", "nccl", "connection", "socket", "timed out", "timeout", "peer")


class _Worker:
    """The state of one Ray Train worker over its epochs."""

    def __init__(self, job: Job, shard: Shard, alone: _Alone | None = None) -> None:
        self._alone = alone
        config, full_set = job.config, ray.get(job.full_set_ref[0])
        self._config, self._directory, self._recipe, self._shard = config, job.directory, job.recipe, shard
        self._stage: TrainingStage = job.stage
        self._full_set: FullSet = full_set
        self._device = device = use_device(num_gpus=job.num_gpus, num_threads=config.actors.num_cpus)
        start = ray.get(job.start_ref[0])
        if alone is None:
            count_bytes(full_set.num_bytes + sum(tensor.nbytes for tensor in start.values()))
        model = self._network(start)
        self._shard = shard = replace(shard, leaves_out=self._leaves_out(model))
        self._syncs_batch_norm = config.fine_tuning.sync_batch_norm and device.type == "cuda" and shard.num > 1
        if self._syncs_batch_norm:
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self._model = model
        self._distillation = None
        if job.teachers:
            teachers = [self._network(teacher.weights()) for teacher in job.teachers]
            share, temperature = config.fine_tuning.distillation, config.fine_tuning.temperature
            self._distillation = Distillation(teachers, share=share, temperature=temperature)
        examples = full_set.examples("train", device=device, augment=True)
        if isinstance(examples, StreamedExamples):
            examples = read_by_ray_data(examples, job.full_set_ref, shard=shard, config=config)
        self._examples = examples
        self._calibration = calibration_examples(config, full_set, device)
        self._validation = full_set.examples("validation", _part(len(full_set.validation), shard), device=device)
        self._watch = ValidationWatch(
            model,
            self._validate,
            patience=job.recipe.watched_patience(),
            keeps_best=job.stage == "fine_tuning" and config.fine_tuning.keep == "best",
        )
        self._measured, self._num_bytes_before = Cost(), taken_bytes()
        self._started = self._heard_at = self._saved_at = time.perf_counter()
        self._work: Work | None = None
        if shard.rank == 0:
            self._open_ledger()

    def train(self) -> dict[str, Any] | None:
        """Minimize from the last checkpoint if there is one; rank 0 leaves the result.

        Returns:
            The record, of rank 0; None if it was stopped.

        Raises:
            DivergedError: as minimize() does, on every worker.
        """
        state, so_far = self._restore(), Cost()
        per_epoch = num_steps_per_epoch(len(self._examples), self._recipe)
        every_steps = max(1, round(self._config.actors.checkpoint_epochs * per_epoch))

        whose = {"run": self._directory.name, "stage": self._stage, "round": 0, "subset": None}
        whose |= {"rank": self._shard.rank, "num_workers": self._shard.num}
        listener = listener_of(self._config.actors.on_step, **whose)

        def on_step(progress: Progress) -> bool | str:
            nonlocal so_far
            so_far = progress.cost
            stand(lambda: _standing(progress))
            outcome = self._watch.look(progress)
            if progress.epoch_ended and self._shard.rank == 0:
                self._directory.write_json(history_path(self._stage), self._watch.looks)
            stop = self._alone is not None and self._alone.follower.follow(progress)
            if progress.epoch_ended or progress.step % every_steps == 0 or stop or self._is_due():
                self._checkpoint(progress, stop=stop)
            elif self._work is not None:
                self._beat_if_due(self._work, progress)
            listener(progress)
            if trace:
                trace()
            return outcome or stop

        seed = derive_seed(self._config.seed, "minimize", self._stage, 0, 0)  # a subset actor's
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
            if self._work is not None and (self._alone or isinstance(error, DivergedError)):  # not what others lost
                failed = replace(self._told(self._work, so_far), outcome="failed", error=one_line(error))
                Ledger(self._directory).write(replace(failed, ended_at=time.time()))
            raise
        if self._work is None:
            return None
        if self._alone and result.outcome == "stopped":
            stopped = replace(self._told(self._work, result.cost), outcome=self._alone.follower.outcome())
            Ledger(self._directory).write(replace(stopped, ended_at=time.time()))
            return None
        return self._leave_result(self._work, result.outcome, result.cost)

    def _leaves_out(self, model: torch.nn.Module) -> bool:
        """Whether steps may leave out parameters: found by trying, or by an earlier attempt; workers decide alike."""
        config, shard = self._config, self._shard
        if shard.num == 1 or ":" not in config.model.name:
            return False
        found = self._directory.exists(left_out_path(self._stage))
        if not found:
            trial = try_training(copied(model).cpu(), self._recipe, sampled(self._full_set))
            found = bool(trial.left_out)
        return bool(shard.sum(torch.tensor(float(found), device=self._device)).item())

    def _network(self, weights: Weights) -> torch.nn.Module:
        """The run's network with these weights, on this worker's device."""
        model = new_model(self._config.model, self._full_set)
        model.load_state_dict(weights)
        return place(model, self._device, channels_last=self._recipe.channels_last)

    def _restore(self) -> dict[str, Any] | None:
        state = self._newest() if self._alone else self._reported()
        if state is not None and starts_over(self._recipe, state):
            return None
        if state is not None:
            self._watch.load_state_dict(state)
        return state

    def _newest(self) -> dict[str, Any] | None:
        newest = self._directory.newest_checkpoint(self._stage)
        return newest and newest[1]

    def _reported(self) -> dict[str, Any] | None:
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
        return state

    def _validate(self) -> Metrics:
        """Validation metrics, each worker scoring a part with rank 0's running statistics."""
        if self._shard.num > 1:
            for buffer in self._model.buffers():
                torch.distributed.broadcast(buffer, src=0)
        part = evaluate(self._model, self._validation, self._recipe)
        on = self._device if self._device.type == "cuda" else "cpu"
        flat = [part.loss_sum, part.num_examples, *_flat(part.sums)]
        loss_sum, num_examples, *rest = self._shard.sum(torch.tensor(flat, dtype=torch.float64, device=on)).tolist()
        self._measured += Cost(num_forward=int(num_examples))
        return Metrics.of_sums(self._full_set.task, loss_sum, _unflat(rest, part.sums), int(num_examples))

    def _beat_if_due(self, work: Work, progress: Progress) -> None:
        """Write how far the work is: what is lost if we die is counted."""
        now, ledger = time.perf_counter(), Ledger(self._directory)
        if now - self._heard_at >= ledger.heartbeat_s:
            self._heard_at = now
            ledger.write(self._told(work, progress.cost))

    def _is_due(self) -> bool:
        """Whether actors.checkpoint_s have gone since the last checkpoint, of a worker that need not ask others."""
        return self._alone is not None and time.perf_counter() - self._saved_at >= self._config.actors.checkpoint_s

    def _checkpoint(self, progress: Progress, *, stop: bool) -> None:
        """Report to Ray Train: a barrier of all ranks. Rank 0 writes what is the same for all, the others their own.

        Its local mode keeps no checkpoints: a worker that is alone leaves them in the run directory.
        """
        metrics = {"epoch": progress.epoch, "loss": progress.loss}
        if self._alone:
            assert self._work is not None
            Ledger(self._directory).write(self._told(self._work, progress.cost))  # before: it is counted
            state = self._state(progress)
            if stop or not starts_over(self._recipe, state):  # a loop that would start over gets no further by one
                self._directory.write_checkpoint(checkpoint_path(self._stage, self._alone.attempt), state)
            ray.train.report(metrics)
            self._saved_at = time.perf_counter()
            beat()
            return
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if self._shard.rank == 0:
                assert self._work is not None
                _write(folder, STATE_FILE, self._state(progress))
                checkpoint = ray.train.Checkpoint.from_directory(folder)
                Ledger(self._directory).write(self._told(self._work, progress.cost))
            elif own := progress.capture()["own"]:
                _write(folder, OWN_STATE_FILE.format(rank=self._shard.rank), own)
                checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=f"step-{progress.step:09d}")

    def _state(self, progress: Progress) -> dict[str, Any]:
        return progress.capture() | self._watch.state_dict()

    def _cost(self, minimized: Cost) -> Cost:
        return replace(minimized + self._measured, device_s=(time.perf_counter() - self._started) * self._shard.num)

    def _told(self, work: Work, minimized: Cost) -> Work:
        """The ledger entry so far. Bytes are of all workers: what they fetched at the start, the weights that the first
        gives the others, what it leaves, and a ring all-reduce a step: an upper bound where minimize.skipping freezes
        weights. Left out is what is small: sums that are shared, and what further workers leave of their own."""
        others = self._shard.num - 1
        given = others * sum(tensor.nbytes for tensor in self._model.state_dict().values())
        each = self._recipe.bytes_a_gradient * num_parameters(self._model)
        reduced = minimized.num_steps * 2 * others * each
        num_bytes = self._shard.num * self._num_bytes_before + given + moved_bytes() + reduced
        return replace(work, cost=self._cost(minimized), num_network_bytes=num_bytes)

    def _leave_result(self, work: Work, outcome: str, minimized: Cost) -> dict[str, Any]:
        """Measure and leave the weights, close the ledger entry, and leave the record, which is returned."""
        self._watch.settle()
        num_refreshed = 0
        if self._shard.num > 1 and not self._syncs_batch_norm:  # the statistics are of rank 0's parts of the batches
            num_refreshed = recompute_batch_norm(self._model, self._calibration, self._recipe)
        validation: Examples = self._full_set.examples("validation", device=self._device)
        weights = {k: v.cpu() for k, v in self._model.state_dict().items()}
        record = {
            "training": evaluate(self._model, self._calibration, self._recipe).to_dict(),
            "validation": evaluate(self._model, validation, self._recipe).to_dict(),
            "history": self._watch.looks,
            "outcome": outcome,
            "num_workers": self._shard.num,
            "recomputed_batch_norm": num_refreshed > 0,
            "peak_bytes": peak_bytes(self._device),
            "files": {weights_path(self._stage): self._directory.write_weights(weights_path(self._stage), weights)},
        }
        self._measured += Cost(num_forward=num_refreshed + len(self._calibration) + len(validation))
        work = replace(self._told(work, minimized), outcome="done", ended_at=time.time())
        Ledger(self._directory).write(work)  # before the record, without which all of this would be done again
        self._directory.write_json(minimum_path(self._stage), record)
        for path in self._directory.list(self._stage):
            if "/checkpoint-" in path:
                self._directory.delete(path)
        return record

    def _open_ledger(self) -> None:
        ledger, alone = Ledger(self._directory), self._alone
        if alone is None:
            ledger.close_lost()  # nothing else works while a Train stage does: what still runs is the group that died
        self._work = Work(
            stage=self._stage,
            round=0,
            subset=None,
            attempt=alone.attempt if alone else ledger.next_attempt(self._stage, 0, None),
            node=own_address(),
            device=device_name(self._device),
            started_at=time.time(),
            ended_at=None,
            outcome="running",
            cost=Cost(),
            num_workers=self._shard.num,
            waited_s=alone.waited_s if alone else 0.0,
        )
        ledger.write(self._work)


def _standing(progress: Progress) -> tuple[float | None, ...]:
    """What pulses say: epoch, of how many, this worker's loss so far, and its examples a second."""
    report = Report.of(progress)
    loss = report.running_loss if math.isfinite(report.running_loss) else None
    return report.epoch, report.num_epochs, loss, report.examples_per_s


def _flat(sums: Mapping[str, Any]) -> list[float]:
    """All numbers of tasks.sums_of() in a row."""
    return [number for total in sums.values() for number in (total if isinstance(total, list) else [total])]


def _unflat(numbers: Sequence[float], sums: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of _flat() for sums like these: what was counted is whole."""
    left, found = iter(numbers), {}
    for name, total in sums.items():
        kind = int if name.startswith("num_") else float
        own = [kind(next(left)) for _ in (total if isinstance(total, list) else [total])]
        found[name] = own if isinstance(total, list) else own[0]
    return found


def _write(folder: str, name: str, state: dict[str, Any]) -> None:
    """A file of a checkpoint."""
    with Path(folder, name).open("wb") as file:
        save_checkpoint(state, sink := Sink(file))
    count_bytes(sink.num_bytes)


def _part(num_examples: int, shard: Shard) -> np.ndarray:
    """Positions that a worker scores: every num-th from its rank on."""
    return np.arange(shard.rank, num_examples, shard.num)
