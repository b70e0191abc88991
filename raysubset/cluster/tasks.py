"""Values in the object store, and tasks: where they run, what they report while they wait, and how they are stopped."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import ray
from ray import exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from raysubset.cluster.resources import WAIT_NOTICE_S, describe, free_resources
from raysubset.errors import note_place
from raysubset.events import OnEvent, Waiting
from raysubset.user_code.given import held_objects, hold
from raysubset.user_code.source_files import Workplace

STOP_GRACE_S = 5.0  # for actors and tasks to write a checkpoint when the driver is stopped

SYSTEM_ERRORS = (
    exceptions.RayActorError,  # ActorDiedError, ActorUnavailableError
    exceptions.WorkerCrashedError,
    exceptions.NodeDiedError,
    exceptions.ObjectLostError,
    exceptions.OutOfMemoryError,
    exceptions.LocalRayletDiedError,
    exceptions.RaySystemError,
)
"""The errors that a caller gets when a process or node has died: another attempt elsewhere is worthwhile."""


OUTSIDE_GROUPS = PlacementGroupSchedulingStrategy(placement_group=None)  # pyright: ignore[reportArgumentType]
"""Anywhere on the cluster, even if the caller's placement group, such as a Tune trial's, would capture its tasks."""


def preferably_on(node_id: str) -> NodeAffinitySchedulingStrategy:
    """Schedule on the node while it has room, otherwise anywhere."""
    return NodeAffinitySchedulingStrategy(node_id, soft=True, _spill_on_unavailable=True)  # without it, Ray waits


def put_once(value: Any) -> list[ray.ObjectRef]:
    """Put the value into the object store. Return its reference in a list, so that an actor gets it without a copy.

    It lives as long as this driver: an object that was put cannot be reconstructed when its owner dies.
    """
    return [ray.put(value)]


def get_shared(value_ref: Sequence[ray.ObjectRef]) -> Any:
    """Return the value that put_once() put."""
    return ray.get(value_ref[0])


def workplace() -> Workplace:
    """Return this process's workplace for the user's code. Given objects are put into the object store once."""
    given = held_objects()
    if given.objects and given.load is None:
        given = replace(given, load=partial(get_shared, put_once(given.for_others())))
        hold(given)
    return replace(Workplace.here(), load_given=given.load)


def call_on_cluster(
    function: Callable[..., Any],
    value_ref: Sequence[ray.ObjectRef],
    *arguments: Any,
    request: Mapping[str, float],
    tell: OnEvent,
    timeout_s: float,
    node_id: str | None = None,
) -> Any:
    """Call function(value, *arguments) in a task with these resources, which the cluster has or can start.

    The task reads the value from the object store. It runs on the node of that id, or on any. Until it ends, `tell`
    gets a message every WAIT_NOTICE_S. If its process or node dies Ray runs it again, three times at most; a task for a
    node that has gone fails. If the driver ends, so does the task.

    Raises:
        TimeoutError: if it has not ended after timeout_s. It is cancelled.
    """
    place: Any = NodeAffinitySchedulingStrategy(node_id, soft=False) if node_id else OUTSIDE_GROUPS

    @ray.remote(
        num_cpus=request.get("CPU", 0),
        num_gpus=request.get("GPU", 0),
        max_retries=3,
        max_calls=1,
        scheduling_strategy=place,
    )
    def call(workplace: Workplace, value_ref: Sequence[ray.ObjectRef], *arguments: Any) -> Any:
        workplace.enter()
        try:
            return function(ray.get(value_ref[0]), *arguments)
        except Exception as error:
            note_place(error)
            raise

    result_ref: Any = call.remote(workplace(), value_ref, *arguments)
    task, ends_at = f"a task of {describe(request)}", time.monotonic() + timeout_s
    try:
        while not ray.wait([result_ref], timeout=max(0.0, min(WAIT_NOTICE_S, ends_at - time.monotonic())))[0]:
            if time.monotonic() >= ends_at:
                raise TimeoutError(f"{task} did not end in {timeout_s:g} s: the cluster is busy")
            tell(Waiting(f"{task} waits for a place, or works; {free_resources(request)}"))
        return ray.get(result_ref)
    except BaseException:
        ray.cancel(result_ref, force=True)
        raise
