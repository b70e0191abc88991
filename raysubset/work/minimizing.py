"""Minimizer: does pieces of work in this process, each from its newest checkpoint to its minimum."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from raysubset.aggregation import Send, to_differences
from raysubset.config import WHOLE_SUBSET, Config, MinimizeConfig, derive_seed
from raysubset.costs import moved_bytes, taken_bytes
from raysubset.data import Examples, FullSet, StreamedExamples
from raysubset.errors import one_line
from raysubset.models import averaged_names, num_parameters, trainable_names
from raysubset.pulse import beat, begin
from raysubset.run_directory import (
    RunDirectory,
    checkpoint_path,
    history_path,
    minimum_path,
    optimizer_path,
    outputs_path,
    statistics_path,
    trace_path,
    weights_path,
)
from raysubset.run_directory.ledger import WRITE_BACK_S, Ledger, Outcome, Work
from raysubset.training import (
    Cost,
    DivergedError,
    Metrics,
    MinimizeResult,
    Progress,
    Shard,
    ValidationWatch,
    Weights,
    device_name,
    diagonal_fisher,
    evaluate,
    evaluate_for_ensemble,
    gram_matrices,
    listener_of,
    minimize,
    minimize_packed,
    num_steps_per_epoch,
    peak_bytes,
    place,
    profiled,
    starts_over,
    try_packing,
    use_device,
)
from raysubset.work.networks import Networks
from raysubset.work.pieces import Piece, TrialPiece
from raysubset.work.reports import Report
from raysubset.work.starting import fixed_weights, seeded_model, unchanged_names
from raysubset.work.trained import distillation_of, evaluate_together, leave_trained, leaves_out

MOST_KEPT_BYTES = 2**28  # of optimizer states that a process has in memory beside their files


@dataclass
class _Job:
    """A piece in hand, with what it needs on the device."""

    piece: Piece
    start: Weights | None  # its first weights; None: seeded ones, which are not needed again
    fixed: Weights  # the start weights that training usually leaves unchanged
    work: Work
    model: torch.nn.Module
    examples: Examples | StreamedExamples
    recipe: MinimizeConfig
    state: dict[str, Any] | None  # of its newest checkpoint
    optimizer_state: dict[str, Any] | None
    stale: list[str]  # checkpoints of attempts before the one that it resumes from
    every_steps: int  # between checkpoints
    last_step: int  # of the last checkpoint
    last_at: float = field(default_factory=time.perf_counter)
    beat_at: float = field(default_factory=time.perf_counter)  # the time of its ledger entry's last heartbeat
    watch: ValidationWatch | None = None
    validation_cost: Cost = field(default_factory=Cost)  # of the watch

    def changed(self, weights: Weights) -> Weights:
        """Return the weights that differ from the start's fixed weights."""
        names = unchanged_names(weights, self.fixed)
        return {name: tensor for name, tensor in weights.items() if name not in names}


class Minimizer:
    """Minimizes on one piece of work at a time, or on a pack of them, on the device that this process was given.

    Its output in the run directory is a pure function of the piece; in a pack it is so to rounding, as torch rounds
    otherwise for another number of members, which resume in the pack that is left. If the process dies, another resumes
    from the last checkpoint. Other threads may call reports() and request_stop() meanwhile.

    Several workers of a Ray Train job do a piece together, each with its shard of every batch. The first alone writes
    to the run directory. If one dies, the group has to start again; it resumes from the last checkpoint, too.
    """

    _config: Config  # of the current pieces
    _run: RunDirectory

    def __init__(
        self,
        load_full_set: Callable[[], FullSet],
        *,
        num_gpus: float,
        node: str,
        stream: Callable[..., StreamedExamples] | None = None,
        shard: Shard | None = None,
    ) -> None:
        """Begin without work.

        Args:
            load_full_set: returns the full set.
            node: this node's address, for the ledger.
            stream: returns streamed examples that other processes read for stages that Ray Train does, given those
                that this process would read, and the config.
            shard: this worker's share of the work; None: all of it.
        """
        self._shard = shard or Shard()
        self.load_full_set, self._num_gpus, self._node, self._stream = load_full_set, num_gpus, node, stream
        self.networks = Networks()
        self._optimizers: dict[tuple[str, str], tuple[dict[str, Any], int]] = {}  # by file, and their sizes in bytes
        self._progress: Mapping[int, Progress] = {}  # by place in the current pack
        self._closed: list[Work] = []  # of the current pieces, whose ledger entries have an outcome
        self._start_bytes = self._step_bytes = 0  # that other workers move, at the start and in each step
        self.is_busy = False
        self._started = time.perf_counter()
        self._is_to_stop = self._preempted = False  # no Event: a signal within its lock would wait for ever

    def reports(self) -> dict[int, Report]:
        """Return reports of the current pieces that have made a step, by place in the pack."""
        return {number: Report.of(progress) for number, progress in self._progress.items() if progress.step}

    def request_stop(self, *, preempted: bool = False) -> None:
        """Write a checkpoint after the current step, and return. A stopped minimizer does no further work."""
        if preempted:  # set in one statement: a signal may come between two
            self._preempted = True
        self._is_to_stop = True

    def minimize(
        self,
        pieces: Sequence[Piece],
        start: Weights | None,
        *,
        attempts: Sequence[int],
        waited_s: float,
    ) -> list[dict[str, Any] | DivergedError | None]:
        """Do pieces of work at once, each from its newest checkpoint, and write their minima to the run directory.

        Args:
            pieces: several are packed (training.minimize_packed), and belong to one run, stage and round.
            start: the start weights; None: those that the piece names, or the model's seeded initialisation.
            attempts: name these attempts' files.
            waited_s: how long the pieces waited for an actor, for the ledger.

        Returns:
            For each piece the minimum's record (minimum.json); None if it was stopped, with a checkpoint written; or
            the error, if it was one of several and its loss was never finite. All workers but the first return None.
        """
        with self._at_work(pieces) as device:
            num_workers = self._shard.num
            started_at = time.time() - (time.perf_counter() - self._started)
            more: dict[str, Any] = {"started_at": started_at, "waited_s": waited_s, "num_workers": num_workers}
            works = [
                Work(*piece.ledger_key, attempt, self._node, device_name(device), **more)
                for piece, attempt in zip(pieces, attempts, strict=True)
            ]
            for work in works if self._shard.rank == 0 else ():
                Ledger(self._run).begin(work)
            try:
                start = pieces[0].start_weights(self.load_full_set()) if start is None else start
                jobs = [
                    self._prepare(piece, start and piece.moved_on(start), work, device, place_in_pack)
                    for place_in_pack, (piece, work) in enumerate(zip(pieces, works, strict=True))
                ]
                with self._profiled(jobs[0]) as trace:
                    results = self._minimize(jobs, trace)
                if self._shard.rank:
                    return [None]
                costs = [
                    self._cost_so_far(number) if isinstance(result, DivergedError) else result.cost
                    for number, result in enumerate(results)
                ]
                apart_s = num_workers * (time.perf_counter() - self._started) - sum(cost.device_s for cost in costs)
                shared = Cost(device_s=apart_s / len(jobs))  # of the time that was no steps
                return [
                    self._leave(job, result, cost, shared)
                    for job, result, cost in zip(jobs, results, costs, strict=True)
                ]
            except Exception as error:
                self.networks.forget()
                device_s = num_workers * (time.perf_counter() - self._started) / len(works)
                for number, work in enumerate(works):
                    if work not in self._closed:
                        cost = replace(self._cost_so_far(number), device_s=device_s)
                        self._close(work, "failed", cost, error=one_line(error))
                raise

    def try_packing(self, piece: TrialPiece, *, attempt: int) -> dict[str, Any]:
        """Time some steps of the trial's pieces, packed and singly; only the ledger's entry is written.

        Returns:
            A record of the trial, or {"refused": why the network cannot be packed}, with the device's name.
        """
        with self._at_work(piece.pieces) as device:
            place: dict[str, Any] = {"device": device_name(device), "node": self._node}
            with Ledger(self._run).recorded("measuring", 0, attempt=attempt, **place) as close:
                members = [self._placed(member, None, device, number) for number, member in enumerate(piece.pieces)]
                examples, recipe = [_held(member[1]) for member in members], self._config.stage(piece.pieces[0].stage)
                try:
                    trial = try_packing([model for model, _ in members], examples, recipe)
                    cost, record = trial.cost, asdict(trial)
                except ValueError as error:
                    cost, record = Cost(), {"refused": str(error)}
                close(replace(cost, device_s=time.perf_counter() - self._started))
        return record | {"device": place["device"]}

    @contextmanager
    def _at_work(self, pieces: Sequence[Piece]) -> Iterator[torch.device]:
        """Be busy with these pieces in the block, on the device that this yields."""
        begin()
        self._config, self._run = pieces[0].config, pieces[0].directory
        self._progress, self._started, self.is_busy = {}, time.perf_counter(), True
        self._closed.clear()
        self._start_bytes = self._step_bytes = 0
        try:
            yield use_device(num_gpus=self._num_gpus, num_threads=self._config.actors.num_cpus)
        finally:
            self._progress, self.is_busy = {}, False

    def _cost_so_far(self, number: int) -> Cost:
        return self._progress[number].cost if number in self._progress else Cost()

    def _close(
        self, work: Work, outcome: Outcome, cost: Cost, *, num_lone_forward: int = 0, error: str | None = None
    ) -> None:
        """Close a ledger entry. The bytes that a pack moved for all count with the first entry that is closed."""
        ended_at = work.started_at + time.perf_counter() - self._started  # a clock that is set changes no duration
        end: dict[str, Any] = {"outcome": outcome, "ended_at": ended_at, "error": error, "cost": cost}
        self._write(replace(work, num_lone_forward=num_lone_forward, **end), taken_bytes())
        self._closed.append(work)

    def _write(self, work: Work, num_bytes: int = 0) -> None:
        """Write a ledger entry, with the bytes that this process moved and those of the other workers."""
        if self._shard.rank == 0:
            num_bytes += self._start_bytes + work.cost.num_steps * self._step_bytes
            Ledger(self._run).write(replace(work, num_network_bytes=num_bytes))

    def _placed(
        self, piece: Piece, start: Weights | None, device: torch.device, place_in_pack: int
    ) -> tuple[torch.nn.Module, Examples | StreamedExamples]:
        """Return the piece's model and examples on the device."""
        config, full_set = self._config, self.load_full_set()
        if start is None:
            model = seeded_model(config, full_set, piece.start_id)
            model = place(model, device, channels_last=config.minimize.channels_last)
        else:
            model = self.networks.placed(config, full_set, start, device, place_in_pack=place_in_pack)
        examples = full_set.training_batches(piece.positions(full_set), device=device, augment=True)
        if piece.by_train and self._stream and isinstance(examples, StreamedExamples):
            examples = self._stream(examples, config=config)
        return model, examples

    def _syncs_batch_norm(self, device: torch.device) -> bool:
        return self._shard.num > 1 and self._config.fine_tuning.sync_batch_norm and device.type == "cuda"

    def _prepare(
        self, piece: Piece, start: Weights | None, work: Work, device: torch.device, place_in_pack: int
    ) -> _Job:
        """Put the piece's model and examples on the device, and read its newest checkpoint."""
        config = self._config
        model, examples = self._placed(piece, start, device, place_in_pack)
        fixed = fixed_weights(start or model.state_dict(), averaged_names(model))
        fixed = {name: tensor.detach().to("cpu", copy=not start) for name, tensor in fixed.items()}
        num_before = moved_bytes()
        attempt, state = self._run.newest_checkpoint(piece.folder) or (None, None)
        if self._shard.num > 1:
            self._meet(piece, model, num_fetched_bytes=moved_bytes() - num_before)
        if self._syncs_batch_norm(device):  # not before: the CPU, on which they try the network, cannot
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        optimizer_state = None
        if piece.optimizer:
            directory, path = piece.optimizer
            optimizer_state, _ = self._optimizers.pop((directory.uri, path), (None, 0))
            if optimizer_state is None:
                optimizer_state = directory.read_checkpoint(path)["optimizer"]
        recipe = config.stage(piece.stage, epochs=piece.epochs)
        every_steps = max(1, round(config.actors.checkpoint_epochs * num_steps_per_epoch(len(examples), recipe)))
        newest_path = None if attempt is None else checkpoint_path(piece.folder, attempt)
        stale = [path for path in self._checkpoints(piece) if path != newest_path] if newest_path else []
        if state and starts_over(recipe, state):
            state = None
        if state and fixed:
            state = _with_weights(state, lambda weights: fixed | weights)
        if state and isinstance(own_states := state.get("own"), list):  # one for each worker
            state["own"] = own_states[self._shard.rank] if self._shard.rank < len(own_states) else {}
        last_step = state["position"][1] if state else 0
        counts = every_steps, last_step
        job = _Job(piece, start, fixed, work, model, examples, recipe, state, optimizer_state, stale, *counts)
        job.watch = self._watch(job)
        return job

    def _meet(self, piece: Piece, model: torch.nn.Module, *, num_fetched_bytes: int) -> None:
        """Agree with the other workers on whether steps may leave out parameters, and note what they move.

        That is what they fetch at the start, the weights that the first gives the others, and a ring all-reduce per
        step: an upper bound if minimize.skipping freezes weights. Sums that are shared, a few numbers, are left out.
        """
        recipe, full_set = self._config.stage(piece.stage), self.load_full_set()
        self._shard = replace(self._shard, leaves_out=leaves_out(piece, model, recipe, full_set, self._shard))
        num_others, num_weights = self._shard.num - 1, sum(tensor.nbytes for tensor in model.state_dict().values())
        self._start_bytes = num_others * (full_set.num_bytes + 2 * num_weights + num_fetched_bytes)
        self._step_bytes = num_others * 2 * recipe.bytes_a_gradient * num_parameters(model)

    def _minimize(
        self, jobs: Sequence[_Job], trace: Callable[[], None] | None
    ) -> Sequence[MinimizeResult | DivergedError]:
        """Minimize all jobs to their ends, or until they are stopped."""
        config, first, recipe = self._config, jobs[0].piece, jobs[0].recipe
        seeds = [
            derive_seed(config.seed, "minimize", stage, round, subset_id or 0)
            for stage, round, subset_id in (job.piece.ledger_key for job in jobs)
        ]

        listeners = [self._listener(job.piece) for job in jobs]

        def on_steps(progress: Mapping[int, Progress]) -> bool:
            self._progress = {**self._progress, **progress}
            stop = self._is_to_stop
            for number, job_progress in progress.items():
                self._save_if_due(jobs[number], job_progress, now=stop, is_first=number == 0)
                listeners[number](job_progress)
            if trace:
                trace()
            return stop

        if len(jobs) > 1:
            return minimize_packed(
                [job.model for job in jobs],
                [_held(job.examples) for job in jobs],
                recipe,
                seeds=seeds,
                states=[job.state for job in jobs],
                optimizer_states=[job.optimizer_state for job in jobs],
                schedule_span=first.schedule_span,
                on_step=on_steps,
            )
        (job,) = jobs
        validation = None
        if recipe.optimizer in WHOLE_SUBSET and recipe.patience_or_default():
            validation = self.load_full_set().examples("validation", device=job.examples.device)

        def on_step(progress: Progress) -> bool | str:
            outcome = job.watch.look(progress) if job.watch else None
            if job.watch and job.piece.by_train and progress.epoch_ended and self._shard.rank == 0:
                self._run.write_json(history_path(job.piece.stage), job.watch.looks)
            return on_steps({0: replace(progress, cost=progress.cost + job.validation_cost)}) or outcome or False

        result = minimize(
            job.model,
            job.examples,
            recipe,
            seed=seeds[0],
            state=job.state,
            optimizer_state=job.optimizer_state,
            schedule_span=first.schedule_span,
            shard=self._shard,
            distillation=distillation_of(first, self.load_full_set(), job.examples.device),
            validation=validation,
            on_step=on_step,
        )
        if job.watch is None:
            return [result]
        if result.outcome != "stopped":
            job.watch.settle(result.history)
        return [replace(result, cost=result.cost + job.validation_cost)]

    def _watch(self, job: _Job) -> ValidationWatch | None:
        """Return a watch of validation data at epochs' ends if the recipe requests one, as all of Ray Train's do."""
        recipe, piece, shard, full_set = job.recipe, job.piece, self._shard, self.load_full_set()
        if not (piece.by_train or recipe.validate_every or recipe.watched_patience()):
            return None
        num = len(full_set.validation)
        positions = np.arange(min(shard.rank, num - 1), num, shard.num) if shard.num > 1 else None
        examples = full_set.examples("validation", positions, device=job.examples.device)

        def validate() -> Metrics:
            job.validation_cost += Cost(num_forward=num)
            return evaluate_together(job.model, examples, recipe, shard, counts=shard.rank < num)

        watch = ValidationWatch(
            job.model,
            validate,
            every=1 if piece.by_train else recipe.validate_every or 1,
            patience=recipe.watched_patience(),
            keeps_best=piece.stage == "fine_tuning" and self._config.fine_tuning.keep == "best",
        )
        if job.state:
            watch.load_state_dict(job.state)
        return watch

    def _listener(self, piece: Piece) -> Callable[[Progress], None]:
        """Return the function that reports a piece's steps to the user's own listener."""
        stage, round, subset = piece.ledger_key
        work_fields = {"run": self._run.name, "stage": stage, "round": round, "subset": subset}
        shard = self._shard
        return listener_of(self._config.actors.on_step, **work_fields, rank=shard.rank, num_workers=shard.num)

    def _profiled(self, job: _Job) -> AbstractContextManager[Callable[[], None] | None]:
        """Return a context that traces steps of the first subset, or of a full-set stage, if the config says so."""
        piece = job.piece
        is_first = not (piece.subset_id or piece.round or piece.is_subsample or self._shard.rank)
        num_steps = self._config.actors.profile if is_first else 0
        return profiled(num_steps, job.examples.device, partial(self._run.write_bytes, trace_path(piece.stage)))

    def _save_if_due(self, job: _Job, progress: Progress, *, now: bool, is_first: bool) -> None:
        """Write a checkpoint if it is due, and heartbeats with it and in between, so that lost work is counted.

        The first job of a pack reports the bytes that the pack moved.
        """
        now_s, num_workers = time.perf_counter(), self._shard.num
        is_step_due = progress.step - job.last_step >= job.every_steps  # alike in all workers
        is_due = is_step_due or now_s - job.last_at >= self._config.actors.checkpoint_s
        is_saved = now or (is_due and progress.step < progress.num_steps)
        state = progress.capture() if is_saved else {}
        if num_workers > 1 and state.get("own"):  # by the clock, which only one looks at, no other would join in
            is_saved, job.last_at = is_step_due, now_s
            state["own"] = self._shard.gathered(state["own"]) if is_saved else {}
        if self._shard.rank:
            job.last_at = now_s if is_due else job.last_at
            job.last_step = progress.step if is_step_due else job.last_step
            return
        if is_saved or now_s - job.beat_at >= Ledger(self._run).heartbeat_s:
            # Before the checkpoint, so that the work in it is counted
            self._write(replace(job.work, cost=progress.cost), moved_bytes() if is_first else 0)
            job.beat_at = time.perf_counter()
        if is_saved:
            state |= job.watch.state_dict() if job.watch else {}
            if now or not starts_over(job.recipe, state):  # a checkpoint does not help a loop that starts over
                if job.fixed:
                    state = _with_weights(state, job.changed)
                while job.stale:  # or each attempt would leave one, and read all
                    self._run.delete(job.stale.pop())
                self._run.write_checkpoint(checkpoint_path(job.piece.folder, job.work.attempt), state)
            job.last_step, job.last_at = progress.step, time.perf_counter()
            beat()

    def _leave(
        self, job: _Job, result: MinimizeResult | DivergedError, cost: Cost, shared: Cost
    ) -> dict[str, Any] | DivergedError | None:
        """Write a job's minimum, if it reached one, and close its ledger entry with its cost and the shared cost."""
        piece, run, folder, began = job.piece, self._run, job.piece.folder, time.perf_counter()
        if isinstance(result, DivergedError):
            self._close(job.work, "failed", cost + shared, error=one_line(result))
            return result
        if result.outcome == "stopped":
            self._close(job.work, "preempted" if self._preempted else "interrupted", cost + shared)
            return None
        full_set, device = self.load_full_set(), job.examples.device
        if piece.by_train:
            assert job.watch is not None
            is_refreshed = self._shard.num > 1 and not self._syncs_batch_norm(device)
            record, measured = leave_trained(job.model, full_set, piece, device, fixed=job.fixed, refresh=is_refreshed)
            record |= {"history": job.watch.looks, "num_workers": self._shard.num}
        else:
            record, measured = self._leave_minimum(job, full_set)
        record |= {"outcome": result.outcome, "peak_bytes": peak_bytes(device)}
        left_s = self._shard.num * (time.perf_counter() - began)  # the seconds of measuring are among them
        cost += shared + replace(measured, device_s=left_s)
        rounds = self._config.rounds
        has_next = piece.stage == "subsets" and not piece.is_subsample and piece.round + 1 < rounds.num
        if has_next and rounds.optimizer_state != "reset":
            path, state = optimizer_path(folder), _sent_state(result.optimizer, piece.send)
            record["files"][path] = run.write_checkpoint(path, {"optimizer": state}, is_durable=False)
            if rounds.optimizer_state == "keep":
                self._keep_optimizer(path, state)
        if not piece.by_train:
            history = [epoch.to_dict() for epoch in result.history]
            record |= {
                "cost": cost.to_dict(),
                "history": job.watch.history(history) if job.watch else history,
                "round": piece.round,
                "attempt": job.work.attempt,
            }
        num_lone = measured.num_forward if self._shard.num > 1 else 0
        # Before the record: without that, all of this work is done again
        self._close(job.work, "done", cost, num_lone_forward=num_lone)
        run.write_json(minimum_path(folder), record)
        for path in self._checkpoints(piece):
            run.delete(path)
        return record

    def _checkpoints(self, piece: Piece) -> list[str]:
        return [path for path in self._run.list(piece.folder) if "/checkpoint-" in path]

    def _keep_optimizer(self, path: str, state: dict[str, Any]) -> None:
        """Keep the newest optimizer states in memory too, because the next round's members may be done here."""
        tensors = (v for moments in state["state"].values() for v in moments.values() if isinstance(v, torch.Tensor))
        num_bytes = sum(tensor.nbytes for tensor in tensors)
        if num_bytes <= MOST_KEPT_BYTES:
            while self._optimizers and sum(size for _, size in self._optimizers.values()) > MOST_KEPT_BYTES - num_bytes:
                del self._optimizers[next(iter(self._optimizers))]
            self._optimizers[self._run.uri, path] = state, num_bytes

    def _leave_minimum(self, job: _Job, full_set: FullSet) -> tuple[dict[str, Any], Cost]:
        """Write the minimum's weights, what it is measured at, and the statistics that the aggregation needs of it.

        Returns:
            The record, which the caller writes, and the cost of measuring.
        """
        model, piece, examples, start, config = job.model, job.piece, job.examples, job.start, self._config
        recipe, run, folder = config.minimize, self._run, piece.folder
        subset_examples = replace(examples, augment=False)  # the same tensors, or files: no second copy
        weights, send = model.state_dict(), "float32" if start is None else piece.send
        frozen = unchanged_names(weights, job.fixed)
        if start is not None and piece.send != "float32":
            weights, frozen = to_differences(weights, start, trainable_names(model), piece.send), frozenset()
        # A crash of the machine may cost short work, which the record's seals then show; long work is synced
        is_durable = job.state is not None or time.perf_counter() - self._started > WRITE_BACK_S
        files = run.write_apart(weights_path(folder), weights, frozen, is_durable=is_durable)
        training = validation = None
        measured = Cost()
        if "validation" in piece.measures:
            held_out = full_set.examples("validation", device=examples.device)
            metrics, outputs = evaluate_for_ensemble(model, held_out, recipe)
            path = outputs_path(folder)
            files[path] = run.write_weights(path, {"outputs": outputs}, is_durable=is_durable)
            validation = metrics.to_dict()
            measured += Cost(num_forward=len(held_out))
        if "training" in piece.measures:
            training = evaluate(model, subset_examples, recipe).to_dict()
            measured += Cost(num_forward=len(subset_examples))
        functions = {"fisher": partial(diagonal_fisher, labels=config.aggregation.fisher_labels), "gram": gram_matrices}
        for kind in piece.statistics:
            seed = derive_seed(config.seed, kind, piece.round, piece.subset_id or 0)
            options: dict[str, Any] = {"num_examples": config.aggregation.statistics_examples, "seed": seed}
            tensors, cost = functions[kind](model, _held(subset_examples), recipe, **options)
            path = statistics_path(folder, kind)
            files[path] = run.write_weights(path, tensors, is_durable=is_durable)
            measured += cost
        record = {
            "subset_id": piece.subset_id,
            "num_examples": len(subset_examples),
            "start_id": piece.start_id,
            "training": training,
            "validation": validation,
            "statistics": list(piece.statistics),
            "files": files,
        }
        return record | ({} if send == "float32" else {"send": send}), measured


def _with_weights(state: dict[str, Any], change: Callable[[Weights], Weights]) -> dict[str, Any]:
    """Return a checkpoint's state with its weights changed: the current ones, and the best so far."""
    best = {key: state[key] for key in ("best", "best_validated") if "model" in (state.get(key) or ())}
    changed = {key: record | {"model": change(record["model"])} for key, record in best.items()}
    return state | changed | ({"model": change(state["model"])} if "model" in state else {})


def _sent_state(state: dict[str, Any], send: Send) -> dict[str, Any]:
    """Return an optimizer's state on the CPU, its moments in 16 bits where members send fewer than 32: optimizers load
    them in their parameters' type."""
    narrow = send in ("bfloat16", "int8")

    def sent(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to("cpu", torch.bfloat16 if narrow and value.ndim and value.is_floating_point() else None)

    return state | {"state": {key: {k: sent(v) for k, v in moments.items()} for key, moments in state["state"].items()}}


def _held(examples: Examples | StreamedExamples) -> Examples:
    """Return a subset's examples, which are in memory: only full-set stages stream."""
    assert isinstance(examples, Examples)
    return examples
