"""Legs as Ray tasks: each when its inputs are done, again when its process or node dies, resumed in its folder."""

import dataclasses
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayTaskError

from raysubset.aggregation import Minimum, shrink_perturb
from raysubset.cluster import (
    OUTSIDE_GROUPS,
    SYSTEM_ERRORS,
    WAIT_NOTICE_S,
    Lookout,
    autoscaler_activity,
    describe,
    free_resources,
    get_shared,
    own_address,
    published,
    refuse_unplaceable,
    stop_tasks,
)
from raysubset.comparison.legs import Leg, closure
from raysubset.config import Config, derive_seed
from raysubset.data import FullSet, refuse_changed_files
from raysubset.errors import one_line
from raysubset.events import Event, LegDone, Note, OnEvent, Retry, Waiting
from raysubset.fine_tuning import fine_tune
from raysubset.ledger import Ledger, Work
from raysubset.models import new_model, trainable_names
from raysubset.planning import cut_subsample, cut_subsets
from raysubset.run_directory import (
    RunDirectory,
    aggregate_path,
    aggregate_weights_path,
    minimum_path,
    momentum_path,
    optimizer_path,
    weights_path,
)
from raysubset.subset_actors import read_minimum
from raysubset.training import Weights
from raysubset.user_code import as_here
from raysubset.work import Minimizer, Piece, Round, Run, leave_aggregate, placed_model, test_weights

TEST_PATH = "test.json"  # in a leg's folder
MOST_NOTICE_S = 600.0  # between two lines that say what runs while nothing ends: each takes twice as long as the last
NUM_READERS = 16  # object stores answer in tens of milliseconds, many at a time
TASKS_A_PROCESS = 1000  # Ray ends a process after each task with a GPU: it would import torch anew for each leg


def piece_of(leg: Leg, full_set: FullSet) -> Piece:
    """The leg as a subset actor knows its work."""
    indices = None
    if leg.subset is not None:
        subset = cut_subsets(leg.config, full_set, leg.round)[leg.subset]
        indices = cut_subsample(leg.config, subset, leg.round) if leg.is_subsample else subset.indices
    fresh = {"fresh": "initial", "reinit": "fine_tuning"}
    return Piece(
        leg.stage,
        subset_id=leg.subset,
        round=leg.round,
        indices=indices,
        epochs=leg.epochs,
        schedule_span=leg.span,
        start_id=fresh.get(leg.start.kind) or leg.start.legs[0].key,
        optimizer_path=None if leg.predecessor is None else "predecessor.pt",
        statistics=leg.statistics,
        measures=("validation",) if leg.is_measured else (),
        is_subsample=leg.is_subsample,
    )


class LegFolder:
    """Where a leg leaves what it makes: a run directory of its own."""

    def __init__(self, legs_path: str, leg: Leg) -> None:
        self.leg, self.run = leg, RunDirectory(legs_path, leg.key)

    @property
    def _piece(self) -> Piece:
        leg = self.leg
        return Piece(leg.stage, subset_id=leg.subset, round=leg.round, is_subsample=leg.is_subsample)

    @property
    def folder(self) -> str:
        return self._piece.folder

    def is_done(self) -> bool:
        """Whether its result is there, all as it was written (else with a warning); the record is written last."""
        return self.run.read_record(self._record_path, whole=True) is not None

    def forget(self) -> None:
        """Delete the record, which may stand for files that are damaged: the leg is made again."""
        self.run.delete(self._record_path)

    @property
    def _record_path(self) -> str:
        return aggregate_path(self.leg.round) if self.leg.kind == "aggregate" else minimum_path(self.folder)

    def record(self) -> dict[str, Any]:
        """Validation metrics and what else its kind records."""
        record = self.run.read_json(self._record_path)
        return record["aggregation"] if self.leg.kind == "aggregate" else record

    def weights(self) -> Weights:
        aggregate = self.leg.kind == "aggregate"
        path = aggregate_weights_path(self.leg.round) if aggregate else weights_path(self.folder)
        return self.run.read_weights(path, self.files())

    def files(self) -> dict[str, Any]:
        """The seals of what it left, by path."""
        return self.run.read_json(self._record_path)["files"]

    def minimum(self, part: "LegFolder | None" = None) -> Minimum:
        """What the aggregation takes; with the minimum on a part of the subset, where savgm wants that too."""
        found = read_minimum(self.run, self._piece, self.record())
        return found if part is None else dataclasses.replace(found, load_statistics=lambda kind: part.weights())

    def works(self) -> list[Work]:
        """Its ledger: every attempt."""
        return Ledger(self.run).read()


def start_weights(leg: Leg, legs_path: str, full_set: FullSet) -> Weights | None:
    """What the leg starts from; None: the actor's own seeded initialisation."""
    if leg.start.kind in ("fresh", "reinit"):
        return None
    (before,) = leg.start.legs
    weights = LegFolder(legs_path, before).weights()
    if leg.start.kind == "shrink_perturb":
        config, tuning = leg.config, leg.config.fine_tuning
        seed = derive_seed(config.seed, "start", "fine_tuning")
        model = new_model(config.model, full_set, seed=seed)
        weights = shrink_perturb(
            weights,
            model.state_dict(),
            shrink=tuning.shrink,
            perturb=tuning.perturb,
            parameter_names=trainable_names(model),
        )
    return weights


def _with_pulse(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with one more argument, the first: the key under which its process's pulse is published."""

    def call(key: str, *arguments: Any) -> Any:
        with published(key):
            return function(*arguments)

    call.__name__, call.__qualname__ = function.__name__, function.__qualname__  # what its processes are called
    return call


def _minimize(leg: Leg, legs_path: str, full_set_ref: Sequence[Any], num_gpus: float, submitted_at: float) -> bool:
    """Whether it came to its end; it did not where a signal stopped it, or the driver, which leaves a checkpoint."""
    run, waited_s = _open(leg, legs_path, submitted_at)
    full_set = get_shared(full_set_ref)
    piece = piece_of(leg, full_set)
    if leg.predecessor is not None:
        before = LegFolder(legs_path, leg.predecessor)
        state = before.run.read_checkpoint(optimizer_path(before.folder))
        assert piece.optimizer_path is not None
        run.write_checkpoint(piece.optimizer_path, state)
    start = start_weights(leg, legs_path, full_set)
    minimizer = Minimizer(leg.config, lambda: full_set, run, num_gpus=num_gpus, node=own_address())
    attempt = Ledger(run).next_attempt(piece.ledger_stage, leg.round, leg.subset)

    def stop(number: int, frame: object) -> None:
        minimizer.request_stop(preempted=number == signal.SIGTERM)

    numbers = (signal.SIGINT, signal.SIGTERM)  # what ray.cancel() comes as, and a spot notice
    previous = [signal.signal(number, stop) for number in numbers]
    try:
        (record,) = minimizer.minimize([piece], start, attempts=[attempt], waited_s=waited_s)
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)  # the next leg may be done in this process
    return record is not None


def _open(leg: Leg, legs_path: str, submitted_at: float) -> tuple[RunDirectory, float]:
    """The folder of a leg whose task begins, and how long it waited: of two machines, by two clocks.

    What still claims to run there was lost with its process, or with a driver that died.
    """
    run = RunDirectory(legs_path, leg.key)
    Ledger(run).close_lost()
    return run, max(0.0, time.time() - submitted_at)


def _aggregate(leg: Leg, legs_path: str, full_set_ref: Sequence[Any], num_gpus: float, submitted_at: float) -> bool:
    run, waited_s = _open(leg, legs_path, submitted_at)
    config, full_set = leg.config, get_shared(full_set_ref)
    start = start_weights(leg, legs_path, full_set)
    if start is None:
        start = new_model(config.model, full_set, seed=derive_seed(config.seed, "start")).state_dict()
    folders = [LegFolder(legs_path, member) for member in leg.members]
    parts = {folder.leg.subset: folder for folder in folders if folder.leg.is_subsample}
    minima = [folder.minimum(parts.get(folder.leg.subset)) for folder in folders if not folder.leg.is_subsample]
    momentum: Weights = {}
    if leg.round and config.rounds.has_outer_step():
        before = LegFolder(legs_path, leg.start.legs[0])
        momentum = before.run.read_weights(momentum_path(leg.round - 1), before.files())
    measures = ("validation",) if leg.is_measured else ()
    of = Round(leg.round, minima, start, momentum, measures)
    leave_aggregate(full_set, num_gpus, config, run, of, node=own_address(), waited_s=waited_s)
    return True


def _test(legs: Sequence[Leg], legs_path: str, full_set_ref: Sequence[Any], num_gpus: float) -> None:
    full_set = get_shared(full_set_ref)
    for leg in legs:
        folder = LegFolder(legs_path, leg)
        placed = placed_model(full_set, num_gpus, leg.config)
        metrics = test_weights(full_set, placed, leg.config, folder.weights()).metrics
        folder.run.write_json(TEST_PATH, metrics.to_dict())


class LegRunner:
    """Runs legs where the cluster has room. A task that dies, or is killed as it makes no step (actors.stall_s), is
    tried again, actors.max_attempts times in all; one that SIGTERM stopped (a spot notice) resumes from its checkpoint,
    and that counts as no attempt. What fails for good, and what needs it, is left out and named. Stopped with an
    exception, it lets its tasks write checkpoints first. If the driver dies, the next one finds what is done."""

    def __init__(
        self, config: Config, full_set_ref: Sequence[Any], legs_path: str, *, num_gpus: float, tell: OnEvent
    ) -> None:
        """Raises: ValueError: if a task can never be placed."""
        self._config, self._full_set_ref, self._legs_path = config, full_set_ref, legs_path
        self._num_gpus, self._tell = num_gpus, tell
        self._request = {"CPU": config.actors.num_cpus, "GPU": num_gpus}
        refuse_unplaceable(self._request, "legs of a comparison")
        self._lookout = Lookout(stall_s=config.actors.stall_s, tell=tell)
        self.failed: dict[Leg, str] = {}

    def run(self, finals: Sequence[Leg]) -> None:
        """Do all that the legs need and is not done yet; afterwards `failed` names what could not be.

        Raises:
            ValueError: where the files of a streamed set have changed.
        """
        refuse_changed_files(get_shared(self._full_set_ref))
        legs = list(dict.fromkeys(leg for final in finals for leg in closure(final)))
        with ThreadPoolExecutor(NUM_READERS) as pool:
            are_done = pool.map(lambda leg: self.folder(leg).is_done(), legs)
            done = {leg for leg, is_done in zip(legs, are_done, strict=True) if is_done}
        if done:
            self._tell(Note(f"{len(done)} of {len(legs)} legs are already there"))
        self._run_tasks([leg for leg in legs if leg.kind != "train" and leg not in done], done, len(legs))
        for leg in legs:  # Ray Train takes the whole cluster: one job after the other, when the tasks are through
            if leg.kind == "train" and leg not in done:
                refuse_changed_files(get_shared(self._full_set_ref))
                self.folder(leg).forget()
                self._train(leg)

    def test(self, finals: Sequence[Leg]) -> None:
        """Read the test split, once for each leg: to be called when every choice is made; raises as run() does."""
        refuse_changed_files(get_shared(self._full_set_ref))
        todo = [leg for leg in dict.fromkeys(finals) if leg not in self.failed]
        todo = [leg for leg in todo if self.folder(leg).run.read_json_or_none(TEST_PATH) is None]
        task = self._task(_test, max_retries=3)
        size = max(1, len(todo) // 16)
        parts = [todo[i : i + size] for i in range(0, len(todo), size)]
        arguments = (self._legs_path, self._full_set_ref, self._num_gpus)
        keys = [f"{self._lookout.prefix}test of {len(part)} legs, {number}" for number, part in enumerate(parts)]
        tasks = [task.remote(key, part, *arguments) for key, part in zip(keys, parts, strict=True)]
        try:
            while tasks and ray.wait(tasks, num_returns=len(tasks), timeout=WAIT_NOTICE_S)[1]:
                self._lookout.look()
            ray.get(tasks)
        except BaseException:
            stop_tasks(tasks)
            raise

    def folder(self, leg: Leg) -> LegFolder:
        return LegFolder(self._legs_path, leg)

    def _task(self, function: Callable[..., Any], *, max_retries: int) -> Any:
        """The function as a remote one, with the resources of an actor."""
        decorate: Any = ray.remote(
            num_cpus=self._request["CPU"],
            num_gpus=self._num_gpus,
            max_calls=TASKS_A_PROCESS,
            max_retries=max_retries,
            scheduling_strategy=OUTSIDE_GROUPS,
        )
        return decorate(as_here(_with_pulse(function)))

    def _run_tasks(self, todo: list[Leg], done: set[Leg], num_all: int) -> None:
        tasks = {"minimize": self._task(_minimize, max_retries=0), "aggregate": self._task(_aggregate, max_retries=0)}
        running: dict[ray.ObjectRef, Leg] = {}
        num_lost: dict[Leg, int] = {}
        told_at = looked_at = time.monotonic()
        notice_s = WAIT_NOTICE_S

        def submit(leg: Leg) -> None:
            task = tasks[leg.kind]
            arguments = (leg, self._legs_path, self._full_set_ref, self._num_gpus, time.time())
            running[task.remote(self._lookout.prefix + leg.key, *arguments)] = leg

        try:
            while todo or running:
                for leg in list(todo):
                    if any(before in self.failed for before in leg.inputs):
                        todo.remove(leg)
                        self.failed[leg] = next(self.failed[b] for b in leg.inputs if b in self.failed)
                    elif all(before in done for before in leg.inputs):
                        todo.remove(leg)
                        submit(leg)
                if not running:
                    assert not todo, "a leg waits for one that nobody runs"
                    break
                ended, _ = ray.wait(list(running), num_returns=1, timeout=WAIT_NOTICE_S)
                if time.monotonic() - looked_at >= WAIT_NOTICE_S:
                    looked_at = time.monotonic()
                    self._lookout.look()
                for result_ref in ended:
                    leg = running.pop(result_ref)
                    if self._collect(leg, result_ref, num_lost):
                        done.add(leg)
                        text = f"{leg.key}: validation {self._validation(leg)} ({len(done)} of {num_all} legs)"
                        self._tell(LegDone(text, leg.key))
                    elif leg not in self.failed:
                        submit(leg)
                if ended:
                    told_at, notice_s = time.monotonic(), WAIT_NOTICE_S
                elif time.monotonic() - told_at >= notice_s:
                    told_at, notice_s = time.monotonic(), min(2 * notice_s, MOST_NOTICE_S)
                    free = f"free are {free_resources(self._request)}{autoscaler_activity()}"
                    text = f"{len(running)} legs of {describe(self._request)} each are running or queued; {free}"
                    self._tell(Waiting(text))
        except BaseException:
            stop_tasks(list(running))
            raise

    def _validation(self, leg: Leg) -> str:
        metrics = self.folder(leg).record()["validation"]
        if metrics is None:
            return "not measured"
        loss = "loss not finite" if metrics["loss"] is None else f"{metrics['loss']:.4f}"
        return f"{loss} and {metrics['accuracy']:.2%}"

    def _collect(self, leg: Leg, result_ref: ray.ObjectRef, num_lost: dict[Leg, int]) -> bool:
        """Whether the leg is done; it is in `failed` if it has failed for good."""
        try:
            is_done = ray.get(result_ref)
        except SYSTEM_ERRORS as error:
            num_lost[leg] = num_lost.get(leg, 0) + 1
            text, most = one_line(error), self._config.actors.max_attempts
            if num_lost[leg] >= most:
                self._fail(leg, f"lost {num_lost[leg]} times, last: {text}")
            else:
                self._tell(Retry(f"{leg.key} was lost ({text}); attempt {num_lost[leg] + 1} of {most}"))
            return False
        except RayTaskError as error:
            self._fail(leg, one_line(error.cause))
            return False
        if not is_done:
            self._tell(Retry(f"{leg.key} was stopped by a signal; it goes on from its checkpoint"))
        return is_done

    def _fail(self, leg: Leg, reason: str) -> None:
        self.failed[leg] = reason
        Ledger(self.folder(leg).run).close_lost()
        self._tell(Note(f"{leg.key} failed: {reason}; what needs it is left out", is_warning=True))

    def _train(self, leg: Leg) -> None:
        """Data-parallel training from fresh weights by Ray Train."""
        full_set: FullSet = get_shared(self._full_set_ref)
        config = leg.config
        seed = derive_seed(config.seed, "start")
        model = new_model(config.model, full_set, seed=seed)
        tell = partial(_ignore_all_but_warnings, self._tell)
        try:
            fine_tune(
                Run(config, self.folder(leg).run, full_set, self._full_set_ref, tell),
                model.state_dict(),
                num_workers=leg.num_workers,
                num_gpus=self._num_gpus,
                stage="conventional",
                epochs=leg.epochs,
            )
        except (ValueError, RuntimeError) as error:
            self._fail(leg, one_line(error))
            return
        self._tell(LegDone(f"{leg.key}: validation {self._validation(leg)}", leg.key))


def _ignore_all_but_warnings(tell: OnEvent, event: Event) -> None:
    match event:
        case Note(is_warning=True) | Retry() | Waiting():
            tell(event)
