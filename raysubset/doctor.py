"""Check before a run what the cluster has, what the config requests, whether that can be placed, memory and time.

for check in examine(config):
    print(check.ok, check.name, check.text)
"""

import heapq
import platform
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from raysubset.cluster import (
    call_on_cluster,
    connected,
    describe,
    node_types,
    num_gpus_of,
    num_slots,
    object_store_bytes,
    put_once,
)
from raysubset.config import Config
from raysubset.costs import bytes_in_words
from raysubset.data import FullSet, load_full_set
from raysubset.errors import one_line
from raysubset.events import Event
from raysubset.fine_tuning.streaming import refuse_without_readers
from raysubset.models import architecture
from raysubset.pipeline.decisions import most_tuners, refuse_what_has_no_place
from raysubset.pipeline.node_speeds import MeasuredSpeed, in_words, measure_speed, shares, weighted_slots
from raysubset.pipeline.run_report import environment
from raysubset.planning import Plan, actor_bytes, make_plan, workers_of_stages
from raysubset.run_directory import CONFIG_PATH, REPORT_PATH, Lease, RunDirectory
from raysubset.subset_actors import memory_warning
from raysubset.work.identity import identify

MEASURE_TIMEOUT_S = 60.0  # for a slot to become free and for the measurement


@dataclass(frozen=True)
class Check:
    """The outcome of one check."""

    name: str
    ok: bool | None  # None: a note, or the check was not possible
    text: str


def examine(config: Config) -> Iterator[Check]:
    """Check everything that a run of this config needs, in the order in which the run would need it.

    No part of the run is started. Ray is started or connected to, and left again at the end. An unexpected error is
    yielded as the last check, failed.
    """
    try:
        yield from _examine(config)
    except Exception as error:  # of the user's model, of storage, of Ray: a run would meet every kind too
        yield Check("the next check", False, f"it was not possible: {_why(error)}")


def _examine(config: Config) -> Iterator[Check]:
    versions = environment()
    packages = ", ".join(f"{name} {version}" for name, version in versions["packages"].items())
    yield Check(
        "config", True, f"{config.method} of {config.model.name} on {config.data.name}, run {config.run_name()}"
    )
    yield Check("versions", True, f"Python {platform.python_version()}, {packages}, commit {versions['commit'] or '?'}")
    directory = RunDirectory(config.storage_path, config.run_name())
    full_set = yield from _data(config)
    plan = None
    if full_set is None:
        yield Check("model", None, "not checked: without data its inputs and outputs are not known")
    else:
        plan = yield from _model(config, full_set)
    yield from _storage(config, directory, full_set)
    with ExitStack() as stack:
        try:
            stack.enter_context(connected(config.cluster))
        except (ValueError, RuntimeError, OSError) as error:
            yield Check("Ray", False, _why(error))
            yield Check("placement, memory and time", None, "not checked: there is no cluster")
            return
        num_gpus = yield from _nodes(config, directory)
        slots = yield from _placement(config, plan, num_gpus)
        if full_set is None or plan is None:
            yield Check("memory and time", None, "not checked: they depend on data and model")
            return
        if config.method == "subset_pretraining" and config.subsets.shares != "equal":
            yield from _sizes(config, full_set, plan, num_gpus)
        try:
            num_bytes = actor_bytes(config, full_set, plan)
        except Exception as error:  # the user's model, in training mode for the first time
            yield Check("memory", False, f"a forward pass in training mode failed: {_why(error)}")
            return
        yield from _memory(full_set, num_bytes)
        yield from _time(config, full_set, plan, num_gpus=num_gpus, slots=slots, num_bytes=num_bytes)


def _data(config: Config) -> Generator[Check, None, FullSet | None]:
    try:
        full_set = load_full_set(*config.learned)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        yield Check("data", False, _why(error))
        return None
    sizes = f"{len(full_set.train)} to train on, {len(full_set.validation)} validation, {len(full_set.test)} test"
    description = ", ".join(f"{name} {value}" for name, value in full_set.task.describe().items())
    yield Check("data", True, f"{full_set.name}: {sizes}; {full_set.task.name}: {description}".replace("_", " "))
    for note in full_set.notes:
        yield Check("data", None, note)
    return full_set


def _model(config: Config, full_set: FullSet) -> Generator[Check, None, Plan | None]:
    try:
        plan = make_plan(config, full_set)
    except (ValueError, RuntimeError, ImportError) as error:
        yield Check("model and subsets", False, _why(error))
        return None
    name = architecture(config.model, full_set.spec).name
    yield Check("model", True, f"{name} builds, {plan.num_parameters:,} parameters")
    for note in plan.advice:
        yield Check("subsets", None, str(note))
    return plan


def _storage(config: Config, directory: RunDirectory, full_set: FullSet | None) -> Iterator[Check]:
    try:
        directory.check_writable()
    except ValueError as error:
        yield Check("storage", False, str(error))
        return
    yield Check("storage", True, f"{directory.uri} can be written")
    try:
        yield _earlier_run(config, directory, full_set)
    except ValueError as error:  # the run is of a newer version, of other data or code, or is being written
        yield Check("earlier run", False, str(error))


def _earlier_run(config: Config, directory: RunDirectory, full_set: FullSet | None) -> Check:
    """Report what exists under the run's name, and what a run would do with it.

    Raises:
        ValueError: if a run would refuse it.
    """
    if not directory.exists(CONFIG_PATH):
        if paths := directory.list(recursive=True):
            text = f"{directory.uri} holds {paths[0]} but no {CONFIG_PATH}, so it is no run: choose another --name"
            return Check("earlier run", False, text)
        return Check("earlier run", True, "none of this name: a new run would start")
    with Lease(directory):
        recorded_config = directory.recorded_config()
    if recorded_config is None:
        return Check("earlier run", True, "one that is partly deleted: a new run would start")
    directory.refuse_other_config(recorded_config, config.to_dict())
    if full_set is not None:
        directory.refuse_changed(identify([config], {config.learned: full_set}, directory.read_identity()))
    if directory.exists(REPORT_PATH):
        return Check("earlier run", None, "finished: `raysubset run` would print its report (--fresh starts over)")
    return Check("earlier run", True, "unfinished: `raysubset run` would resume it")


def _nodes(config: Config, directory: RunDirectory) -> Generator[Check, None, float]:
    """Check the nodes; return the GPUs of an actor, as a run would decide them."""
    types = node_types()
    words = [
        f"{f'{t.num_alive} up' if t.num_alive else f'up to {t.num_startable} {t.name}'}, {describe(t.resources)} each"
        for t in types
    ]
    address = config.cluster.address or "a new cluster on this machine, or the one this job was submitted to"
    yield Check("Ray", True, f"connected ({address}): {'; '.join(words) or 'no nodes'}")
    num_nodes = sum(t.num_alive + t.num_startable for t in types)
    if directory.local_path and num_nodes > 1:
        text = f"{directory.storage_path} is a local path and the cluster has several nodes: it must be mounted on all"
        yield Check("storage", None, f"{text} of them, or give a URI (s3://…, gs://…)")
    events: list[Event] = []
    num_gpus = num_gpus_of(config.actors, events.append)
    for event in events:
        yield Check("GPUs", None, event.text)
    return num_gpus


def _placement(config: Config, plan: Plan | None, num_gpus: float) -> Generator[Check, None, int]:
    """Check that everything the run requests can be placed; return how many actors can run at a time now."""
    request = {"CPU": config.actors.num_cpus, "GPU": num_gpus}
    slots = num_slots(request, startable=False)
    num_actors = len(plan.subsets) if plan and config.method == "subset_pretraining" else 1
    at_a_time = min(slots, config.actors.max_num or num_actors, num_actors)
    tuning = config.fine_tuning
    most = most_tuners(config, plan, request, startable=False) if plan else 1  # auto: a run decides on so many at most
    stages = workers_of_stages(config, of_fine_tuning=tuning.min_workers or tuning.workers(auto=most))
    num_workers = {stage: num for stage, num in stages.items() if stage != "subsets"}
    try:
        refuse_what_has_no_place(config, None)
        for stage, num in num_workers.items():
            if config.data.streamed and (num > 1 or stage == "fine_tuning"):  # else an actor reads by itself
                refuse_without_readers(config, stage, num_workers=num)
    except ValueError as error:
        yield Check("placement", False, str(error))
        return at_a_time
    workers = "".join(f"; {stage} requests {num} at once" for stage, num in num_workers.items())
    text = f"an actor or Ray Train worker requests {describe(request)}; {slots} fit on the current nodes if empty"
    yield Check("placement", True, f"{text}; {num_actors} actors are needed, {at_a_time} run at a time{workers}")
    if not slots:
        text = "nothing fits yet: a run waits for the autoscaler to start a node"
        yield Check("placement", None, f"{text}, {config.cluster.wait_timeout_s:g} s at most (cluster.wait_timeout_s)")
    elif slots < max(num_workers.values(), default=0):
        yield Check("placement", None, "more Ray Train workers are requested than fit now: their stage will wait")
    return at_a_time


def _sizes(config: Config, full_set: FullSet, plan: Plan, num_gpus: float) -> Iterator[Check]:
    """Report the sizes of unequal subsets, as far as they are known without measuring."""
    speeds = config.subsets.speeds()
    if speeds is None:
        yield Check("subsets", None, "their sizes will follow speed: a run times each kind of node that is up, once")
        return
    request, num = {"CPU": config.actors.num_cpus, "GPU": num_gpus}, len(plan.subsets)
    try:
        slots = weighted_slots(node_types(), request, speeds, most=min(num, config.actors.max_num or num))
        plan = make_plan(config, full_set, shares=shares(slots, num))
    except ValueError as error:
        yield Check("subsets", False, str(error))
        return
    yield Check("subsets", None, in_words(slots, [len(subset.indices) for subset in plan.subsets]))


def _memory(full_set: FullSet, num_bytes: int) -> Iterator[Check]:
    table, store = full_set.num_bytes, object_store_bytes()
    text = f"the data set takes {bytes_in_words(table)} of each node's object store"
    yield Check("memory", None if table > 0.8 * store else True, f"{text}; the smallest has {bytes_in_words(store)}")
    text = f"an actor's examples, weights, optimizer state and activations take some {bytes_in_words(num_bytes)}"
    yield Check("memory", True, f"{text}; torch itself (some 0.5 GB) comes on top")


def _time(
    config: Config, full_set: FullSet, plan: Plan, *, num_gpus: float, slots: int, num_bytes: int
) -> Iterator[Check]:
    if not slots:
        yield Check("time", None, "not measured: nothing fits on the nodes that are alive")
        return
    request = {"CPU": config.actors.num_cpus, "GPU": num_gpus}
    indices, reference = plan.subsets[0].indices, put_once(full_set)
    try:
        speed: MeasuredSpeed = call_on_cluster(
            measure_speed,
            reference,
            config,
            indices,
            num_gpus,
            request=request,
            tell=lambda event: None,
            timeout_s=MEASURE_TIMEOUT_S,
        )
    except TimeoutError as error:
        yield Check("time", None, f"not measured: {error}")
        return
    except Exception as error:  # of the user's model or data: a run would meet it too
        yield Check("time", False, f"training on a subset failed: {_why(error)}")
        return
    if speed.card_bytes is not None:
        warning = memory_warning(num_bytes, speed.card_bytes, num_gpus=num_gpus, most_actors=slots)
        fits = f"the actors of a card fit in its {bytes_in_words(speed.card_bytes)}"
        yield Check("memory", warning is None, warning or fits)
    per_s = speed.examples_per_s
    seconds = training_s(config, plan, len(full_set.train), per_s=per_s, num_slots=slots)
    text = f"one actor trains on {per_s:,.0f} examples/s: {plan.passes:.2f} passes in {_duration(seconds)} with "
    yield Check("time", True, f"{text}{slots} at a time; start-up, evaluation and sharing a machine come on top")


def training_s(config: Config, plan: Plan, num_train: int, *, per_s: float, num_slots: int) -> float:
    """Return the seconds of training with `num_slots` actors at a time, each subset given to the first free one."""
    if config.method == "conventional":
        return plan.passes * num_train / per_s / config.conventional.num_workers
    longest = _makespan([len(subset.indices) for subset in plan.subsets], num_slots)
    subsets = config.rounds.num * config.minimize.epochs * longest
    num_workers = config.fine_tuning.workers(auto=num_slots)
    full_set_epochs = config.trunk.epochs / config.trunk.num_workers + config.fine_tuning.epochs / num_workers
    return (subsets + full_set_epochs * num_train) / per_s


def _makespan(sizes: Sequence[int], num_slots: int) -> int:
    """Return when the last piece ends, if each starts in order on the first free slot."""
    free_at = [0] * num_slots
    for size in sizes:
        heapq.heapreplace(free_at, free_at[0] + size)
    return max(free_at)


def _why(error: BaseException) -> str:
    """Return the error in one line; if a task raised it, its cause."""
    cause = getattr(error, "cause", None) or error
    return " ".join(str(cause).split()) if isinstance(cause, ValueError) else one_line(cause)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 1 else "less than a second"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
