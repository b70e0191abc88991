"""Check before a run what the cluster has, what the config requests, whether that can be placed, memory and time.

for check in examine(config):
    print(check.ok, check.name, check.text)
"""

import math
import platform
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

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
from raysubset.errors import one_line, per_second
from raysubset.events import Event, Step
from raysubset.fine_tuning.streaming import refuse_without_readers
from raysubset.models import architecture
from raysubset.pipeline.decisions import most_tuners, refuse_what_has_no_place
from raysubset.pipeline.node_speeds import MeasuredSpeed, measure_speed
from raysubset.pipeline.run_report import environment
from raysubset.planning import Plan, actor_bytes, make_plan, planned_steps, workers_of_stages
from raysubset.run_directory import CONFIG_PATH, REPORT_PATH, Lease, RunDirectory
from raysubset.subset_actors import memory_warning
from raysubset.work.identity import identify

MEASURE_TIMEOUT_S = 60.0  # for a slot to become free and for the measurement

Found = TypeVar("Found")


@dataclass(frozen=True)
class Check:
    """The outcome of one check."""

    name: str
    ok: bool | None  # None: a note, or the check was not possible
    text: str


Checks = Generator[Check, None, Found]


def examine(config: Config) -> Iterator[Check]:
    """Check everything that a run of this config needs, in the order in which the run would need it.

    No part of the run is started. Ray is started or connected to, and left again at the end. An error of any kind, of
    the user's model, of storage or of Ray, is yielded as a failed check: a run would meet it too.
    """
    yield from _tried("config", _config(config))
    full_set, plan = (yield from _tried("data", _data(config))), None
    if full_set is None:
        yield Check("model", None, "not checked: without data its inputs and outputs are not known")
    else:
        plan = yield from _tried("model and subsets", _model(config, full_set))
    directory = yield from _tried("storage", _storage(config))
    if directory is not None:
        yield from _tried("earlier run", _earlier_run(config, directory, full_set))
    if not (yield from _tried("Ray", _cluster(config, full_set, plan))):
        yield Check("placement, memory and time", None, "not checked: there is no cluster")


def _tried(name: str, checks: Checks[Found]) -> Checks[Found | None]:
    """Yield the checks and return what they find; if one raises, yield a failed check and return None."""
    try:
        return (yield from checks)
    except Exception as error:
        cause = getattr(error, "cause", None) or error  # if a task raised it
        yield Check(name, False, " ".join(str(cause).split()) if isinstance(cause, ValueError) else one_line(cause))
        return None


def _config(config: Config) -> Checks[None]:
    versions = environment()
    packages = ", ".join(f"{name} {version}" for name, version in versions["packages"].items())
    text = f"{config.method} of {config.model.name} on {config.data.name}, run {config.run_name()}"
    yield Check("config", True, text)
    yield Check("versions", True, f"Python {platform.python_version()}, {packages}, commit {versions['commit'] or '?'}")


def _data(config: Config) -> Checks[FullSet]:
    full_set = load_full_set(*config.learned)
    sizes = f"{len(full_set.train)} to train on, {len(full_set.validation)} validation, {len(full_set.test)} test"
    description = ", ".join(f"{name} {value}" for name, value in full_set.task.describe().items())
    yield Check("data", True, f"{full_set.name}: {sizes}; {full_set.task.name}: {description}".replace("_", " "))
    for note in full_set.notes:
        yield Check("data", None, note)
    return full_set


def _model(config: Config, full_set: FullSet) -> Checks[Plan]:
    plan = make_plan(config, full_set)
    name = architecture(config.model, full_set.spec).name
    yield Check("model", True, f"{name} builds, {plan.num_parameters:,} parameters")
    for note in plan.advice:
        yield Check("subsets", None, str(note))
    return plan


def _storage(config: Config) -> Checks[RunDirectory]:
    directory = RunDirectory(config.storage_path, config.run_name())
    directory.check_writable()
    yield Check("storage", True, f"{directory.uri} can be written")
    return directory


def _earlier_run(config: Config, directory: RunDirectory, full_set: FullSet | None) -> Checks[None]:
    """Report what exists under the run's name, and what a run would do with it. Raise what a run would raise."""
    if not directory.exists(CONFIG_PATH):
        if paths := directory.list(recursive=True):
            text = f"{directory.uri} holds {paths[0]} but no {CONFIG_PATH}, so it is no run: choose another --name"
            yield Check("earlier run", False, text)
        else:
            yield Check("earlier run", True, "none of this name: a new run would start")
        return
    with Lease(directory):
        recorded_config = directory.recorded_config()
    if recorded_config is None:
        yield Check("earlier run", True, "one that is partly deleted: a new run would start")
        return
    directory.refuse_other_config(recorded_config, config.to_dict())
    if full_set is not None:
        directory.refuse_changed(identify([config], {config.learned: full_set}, directory.read_identity()))
    if directory.exists(REPORT_PATH):
        yield Check("earlier run", None, "finished: `raysubset run` would print its report (--fresh starts over)")
    else:
        yield Check("earlier run", True, "unfinished: `raysubset run` would resume it")


def _cluster(config: Config, full_set: FullSet | None, plan: Plan | None) -> Checks[bool]:
    """Check what depends on the cluster. Return True once it is connected to."""
    with connected(config.cluster):
        num_gpus = yield from _tried("nodes", _nodes(config))
        if num_gpus is None:
            return True
        slots = yield from _tried("placement", _placement(config, plan, num_gpus))
        if full_set is None or plan is None:
            yield Check("memory and time", None, "not checked: they depend on data and model")
            return True
        num_bytes = yield from _tried("a forward pass in training mode", _memory(config, full_set, plan))
        if num_bytes is not None and slots is not None:
            time = _time(config, full_set, plan, num_gpus=num_gpus, slots=slots, num_bytes=num_bytes)
            yield from _tried("training on a subset", time)
    return True


def _nodes(config: Config) -> Checks[float]:
    """Check the nodes; return the GPUs of an actor, as a run would decide them."""
    types = node_types()
    words = [
        f"{f'{t.num_alive} up' if t.num_alive else f'up to {t.num_startable} {t.name}'}, {describe(t.resources)} each"
        for t in types
    ]
    address = config.cluster.address or "a new cluster on this machine, or the one this job was submitted to"
    yield Check("Ray", True, f"connected ({address}): {'; '.join(words) or 'no nodes'}")
    is_local = RunDirectory(config.storage_path, config.run_name()).local_path is not None
    if is_local and sum(t.num_alive + t.num_startable for t in types) > 1:
        text = f"{config.storage_path} is a local path and the cluster has several nodes: it must be mounted on all"
        yield Check("storage", None, f"{text} of them, or give a URI (s3://…, gs://…)")
    events: list[Event] = []
    num_gpus = num_gpus_of(config.actors, events.append)
    for event in events:
        yield Check("GPUs", None, event.text)
    return num_gpus


def _placement(config: Config, plan: Plan | None, num_gpus: float) -> Checks[int]:
    """Check that everything the run requests can be placed; return how many actors can run at a time now."""
    request = {"CPU": config.actors.num_cpus, "GPU": num_gpus}
    slots = num_slots(request, startable=False)
    num_actors = len(plan.subsets) if plan and config.method == "subset_pretraining" else 1
    at_a_time = min(slots, config.actors.max_num or num_actors, num_actors)
    tuning = config.fine_tuning
    most = most_tuners(config, plan, request, startable=False) if plan else 1  # auto: a run decides on so many at most
    stages = workers_of_stages(config, of_fine_tuning=tuning.min_workers or tuning.workers(auto=most))
    num_workers = {stage: num for stage, num in stages.items() if stage != "subsets"}
    refuse_what_has_no_place(config, None)
    for stage, num in num_workers.items():
        if config.data.streamed and (num > 1 or stage == "fine_tuning"):  # else an actor reads by itself
            refuse_without_readers(config, stage, num_workers=num)
    workers = "".join(f"; {stage} requests {num} at once" for stage, num in num_workers.items())
    text = f"an actor or Ray Train worker requests {describe(request)}; {slots} fit on the current nodes if empty"
    yield Check("placement", True, f"{text}; {num_actors} actors are needed, {at_a_time} run at a time{workers}")
    if not slots:
        text = "nothing fits yet: a run waits for the autoscaler to start a node"
        yield Check("placement", None, f"{text}, {config.cluster.wait_timeout_s:g} s at most (cluster.wait_timeout_s)")
    elif slots < max(num_workers.values(), default=0):
        yield Check("placement", None, "more Ray Train workers are requested than fit now: their stage will wait")
    return at_a_time


def _memory(config: Config, full_set: FullSet, plan: Plan) -> Checks[int]:
    """Check the memory of nodes; return the bytes of an actor's tensors."""
    num_bytes = actor_bytes(config, full_set, plan)  # calls the user's model in training mode for the first time
    table, store = full_set.num_bytes, object_store_bytes()
    text = f"the data set takes {bytes_in_words(table)} of each node's object store"
    yield Check("memory", None if table > 0.8 * store else True, f"{text}; the smallest has {bytes_in_words(store)}")
    text = f"an actor's examples, weights, optimizer state and activations take some {bytes_in_words(num_bytes)}"
    yield Check("memory", True, f"{text}; torch itself (some 0.5 GB) comes on top")
    return num_bytes


def _time(
    config: Config, full_set: FullSet, plan: Plan, *, num_gpus: float, slots: int, num_bytes: int
) -> Checks[None]:
    if not slots:
        yield Check("time", None, "not measured: nothing fits on the nodes that are alive")
        return
    arguments = put_once(full_set), config, plan.subsets[0].indices, num_gpus
    request = {"CPU": config.actors.num_cpus, "GPU": num_gpus}
    try:
        speed: MeasuredSpeed = call_on_cluster(
            measure_speed, *arguments, request=request, tell=lambda event: None, timeout_s=MEASURE_TIMEOUT_S
        )
    except TimeoutError as error:
        yield Check("time", None, f"not measured: {error}")
        return
    if speed.card_bytes is not None:
        warning = memory_warning(num_bytes, speed.card_bytes, num_gpus=num_gpus, most_actors=slots)
        fits = f"the actors of a card fit in its {bytes_in_words(speed.card_bytes)}"
        yield Check("memory", warning is None, warning or fits)
    per_s, num_train = speed.examples_per_s, len(full_set.train)
    passes = passes_in_turn(planned_steps(config, plan, num_train, slots))
    seconds = timedelta(seconds=math.ceil(passes * num_train / per_s))
    rate = f"one actor trains on {per_second(per_s)} examples/s"
    text = f"{rate}: {plan.passes:.2f} passes in {seconds} h, {slots} at a time"
    yield Check("time", True, f"{text}; start-up, evaluation and sharing a machine come on top")


def passes_in_turn(steps: Iterable[Step]) -> float:
    """Return the passes that follow one another: subsets queue for actors, and workers share one piece."""

    def turns(step: Step) -> float:
        return math.ceil(step.num_pieces / step.num_at_once) if step.num_pieces > 1 else 1 / step.num_at_once

    return sum(step.passes / step.num_pieces * turns(step) for step in steps)
