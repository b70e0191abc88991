"""The Ray cluster: connecting, putting the full set there once, and telling what can ever be placed."""

import contextlib
import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raysubset.authentication import use_own_token, use_token_of  # before Ray
from raysubset.errors import first_line

# isort: split
import ray
from ray import exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from raysubset.config import ActorsConfig, ClusterConfig

log = logging.getLogger(__name__)

_MEMORIES = ("memory", "object_store_memory")  # a node's own affair, in bytes
_TYPE_RESOURCE = "accelerator_type:"
_UNLIMITED = 1_000_000  # nodes, or requests a node holds

WAIT_NOTICE_S = 5.0  # between two lines that say what a run waits for
STOP_GRACE_S = 5.0  # for actors and tasks to write a checkpoint when the driver is stopped
CONNECT_TIMEOUT_S = 10.0  # for something to listen at a cluster's address

ASK_FOR_LESS = "Ask for less (--actors.num-cpus, --actors.num-gpus, --fine-tuning.num-workers)"

SYSTEM_ERRORS = (
    exceptions.RayActorError,  # ActorDiedError, ActorUnavailableError
    exceptions.WorkerCrashedError,
    exceptions.NodeDiedError,
    exceptions.ObjectLostError,
    exceptions.OutOfMemoryError,
    exceptions.LocalRayletDiedError,
    exceptions.RaySystemError,
)
"""What a process or node that died looks like to its caller: worth another attempt elsewhere."""


OUTSIDE_GROUPS = PlacementGroupSchedulingStrategy(placement_group=None)  # pyright: ignore[reportArgumentType]
"""Anywhere on the cluster, also where the caller's placement group would catch its actors and tasks: a Tune trial's."""


def preferably_on(node_id: str) -> NodeAffinitySchedulingStrategy:
    """On the node while it has room, else anywhere."""
    return NodeAffinitySchedulingStrategy(node_id, soft=True, _spill_on_unavailable=True)  # else it waits for the node


@dataclass(frozen=True)
class Event:
    """Something a person watching the run wants to know."""

    kind: str  # "stage", "progress", "waiting", "retry", "minimum", "epoch", "note", "warning", "result"
    text: str  # one line
    data: Mapping[str, Any] = field(default_factory=dict)


OnEvent = Callable[[Event], None]


def stage_event(stage: str, text: str) -> Event:
    """That a stage begins."""
    return Event("stage", f"{stage}: {text}", {"stage": stage})


@dataclass(frozen=True)
class NodeType:
    """Nodes that are alive or that an autoscaler can start."""

    name: str
    resources: Mapping[str, float]  # of one node, in total: CPU, GPU, memory in bytes, …
    num_alive: int
    num_startable: int  # further nodes that an autoscaler may still start
    accelerator: str = "CPU"  # as Ray names its type: A100, T4, …; "GPU" where it names none
    group: str = ""  # the autoscaler's name for such nodes
    node_ids: tuple[str, ...] = ()  # of those alive

    def num_fitting(self, request: Mapping[str, float]) -> int:
        """How many such requests an empty node holds at once."""
        wanted = {key: amount for key, amount in request.items() if amount > 0}
        return int(min((self.resources.get(k, 0) / amount + 1e-9 for k, amount in wanted.items()), default=_UNLIMITED))


@contextlib.contextmanager
def connected(config: ClusterConfig) -> Iterator[None]:
    """Be connected to Ray: to the address, the cluster this job was submitted to, or a new one on this machine.

    A connection that exists is used and left open. A new local cluster ends with the block, and with this process.

    Raises:
        ValueError: if nothing answers at the address, it asks for a token that this process does not have, or this
            process is connected to another one.
    """
    if ray.is_initialized():
        _refuse_other_cluster(config.address)
        yield
        return
    started = time.perf_counter()
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    where = config.address or os.environ.get("RAY_ADDRESS")
    if where:
        try:
            _knock(where)
            if gcs_address := _gcs_address(where):
                use_token_of(gcs_address)
            _init(address=config.address, **quiet)
        except ConnectionError as error:
            raise _no_answer(where, error) from error
    else:
        use_own_token()
        _init(
            address="local",
            num_cpus=config.num_cpus,
            num_gpus=config.num_gpus,
            include_dashboard=False,
            **quiet,
        )
    log.info("connected to Ray in %.1f s", time.perf_counter() - started)
    try:
        yield
    finally:
        ray.shutdown()


def _init(**options: Any) -> None:
    """ray.init() that leaves the caller's handler of SIGTERM: by Ray's own, a stopped job just ends, with a stack."""
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(**options)
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _refuse_other_cluster(address: str | None) -> None:
    """ValueError where the connection this process has is not one to host:port."""
    if not address or "://" in address or ":" not in address:  # a client's proxy has another port; "auto", "local"
        return
    try:
        _knock(address)
    except ConnectionError as error:
        raise _no_answer(address, error) from error
    connected_to = ray.get_runtime_context().gcs_address
    host, _, port = address.rpartition(":")
    if f"{socket.gethostbyname(host)}:{port}" != connected_to and address != connected_to:
        raise ValueError(
            f"cluster.address = {address}, but this process is connected to Ray at {connected_to}: call "
            "ray.shutdown() first, or leave the address out"
        )


def _no_answer(address: str, error: ConnectionError) -> ValueError:
    return ValueError(
        f"no Ray cluster answers at {address} ({first_line(error)}). Is it up, and is that the head's "
        "`ray start --port` (6379 by default), not its dashboard's?"
    )


def _gcs_address(address: str) -> str | None:
    """host:port of what "auto" or the address means; None for a client's proxy (ray://), and where nothing is found."""
    from ray._private.services import canonicalize_bootstrap_address  # what ray.init() itself calls

    return None if "://" in address else canonicalize_bootstrap_address(address)


def _knock(address: str) -> None:
    """ConnectionError where nothing listens at host:port: ray.init() would go on trying for many minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not (host and port.isdigit()):  # "auto", "local"
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ConnectionError(str(error)) from error


def own_address() -> str:
    """This process's node, as ledgers name nodes."""
    return ray.util.get_node_ip_address()


def address_of(node_id: str) -> str:
    """The node of that id, which may have gone meanwhile, as ledgers name nodes."""
    return next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == node_id)


def put_once(value: Any) -> list[ray.ObjectRef]:
    """The value in the object store, as a reference inside a list, so that an actor gets it itself and without a copy.

    It lives as long as this driver: an object that was put is not reconstructed when its owner dies.
    """
    return [ray.put(value)]


def get_shared(value_ref: Sequence[ray.ObjectRef]) -> Any:
    """What put_once() put."""
    return ray.get(value_ref[0])


def call_on_cluster(
    function: Callable[..., Any],
    value_ref: Sequence[ray.ObjectRef],
    *arguments: Any,
    request: Mapping[str, float],
    on_event: OnEvent,
    timeout_s: float | None = None,
    node_id: str | None = None,
) -> Any:
    """function(value, *arguments) in a task with these resources; the value is read from the object store there.

    It runs on the node of that id, or on any; while it waits for a place the listener is told so, every WAIT_NOTICE_S.
    A task whose process or node dies is run again by Ray, three times at most; one that must run on a node that has
    gone fails. With the driver it ends.

    Raises:
        ValueError: if it can never be placed.
        TimeoutError: if it has not ended after timeout_s; it is given up.
    """

    place: Any = NodeAffinitySchedulingStrategy(node_id, soft=False) if node_id else OUTSIDE_GROUPS

    @ray.remote(
        num_cpus=request.get("CPU", 0),
        num_gpus=request.get("GPU", 0),
        num_returns="streaming",
        max_retries=3,
        max_calls=1,
        scheduling_strategy=place,
    )
    def call(value_ref: Sequence[ray.ObjectRef], *arguments: Any) -> Iterator[Any]:
        yield None  # it has a place
        yield function(ray.get(value_ref[0]), *arguments)

    refuse_unplaceable(request, "scoring tasks")
    result_refs: Any = call.remote(value_ref, *arguments)
    task, result = f"a task of {describe(request)}", None
    ends_at = time.monotonic() + (math.inf if timeout_s is None else timeout_s)
    try:
        for has_place in (False, True):
            while not ray.wait([result_refs], timeout=max(0.0, min(WAIT_NOTICE_S, ends_at - time.monotonic())))[0]:
                if time.monotonic() >= ends_at:
                    raise TimeoutError(f"{task} did not end in {timeout_s:g} s: the cluster is busy")
                if not has_place:
                    free = f"free are {free_resources(request)}{autoscaler_activity()}"
                    on_event(Event("waiting", f"{task} waits for a place; {free}"))
            result = ray.get(next(result_refs))
    except BaseException:
        ray.cancel(result_refs, force=True)
        raise
    return result


def stop_tasks(result_refs: Sequence[ray.ObjectRef], *, grace_s: float = STOP_GRACE_S) -> None:
    """Have tasks that run stop as Ctrl-C would, by SIGINT's handler in their processes, and never begin the others.

    Those that have not ended after grace_s are ended, processes and all; so are all at once where this is interrupted.
    """
    try:
        for result_ref in result_refs:
            ray.cancel(result_ref)
        ray.wait(list(result_refs), num_returns=len(result_refs), timeout=grace_s)
    finally:  # also when a second Ctrl-C cuts the grace short
        for result_ref in result_refs:
            ray.cancel(result_ref, force=True)


def node_types() -> list[NodeType]:
    """What the cluster has, and what its autoscaler is known to be able to start (clusters/publish_node_types.py)."""
    found: dict[tuple, list[str]] = {}
    num_of_group: dict[str, int] = {}
    for node in ray.nodes():
        if node["Alive"]:
            resources = {k: v for k, v in node["Resources"].items() if k not in _MEMORIES and not k.startswith("node:")}
            group = node["Labels"].get("ray.io/node-group", "")
            accelerator = node["Labels"].get("ray.io/accelerator-type") or _accelerator(resources)
            key = (tuple(sorted(resources.items())), accelerator, group)
            found.setdefault(key, []).append(node["NodeID"])
            num_of_group[group] = num_of_group.get(group, 0) + 1
    types = [
        NodeType("alive", dict(resources), len(ids), 0, accelerator, group, tuple(ids))
        for (resources, accelerator, group), ids in found.items()
    ]
    for group in _published_groups():
        resources = {k: float(amount) for k, amount in group.resources.items() if k not in _MEMORIES}
        most = group.max_count if group.max_count >= 0 else _UNLIMITED
        if (num := most - num_of_group.get(group.name, 0)) > 0:
            types.append(NodeType(group.name, resources, 0, num, _accelerator(resources), group.name))
    return types


def _accelerator(resources: Mapping[str, float]) -> str:
    """The type of accelerator that a node's resources name (accelerator_type:T4, which Ray adds where it finds one)."""
    named = (name.removeprefix(_TYPE_RESOURCE) for name in resources if name.startswith(_TYPE_RESOURCE))
    return next(named, "GPU" if resources.get("GPU", 0) > 0 else "CPU")


def _published_groups() -> Sequence[Any]:
    """The node groups in Ray's control store; none where nobody wrote them there, as Ray's own autoscalers do not."""
    from ray._private.state import state  # Ray has no public call for what an autoscaler can start

    config = state.get_cluster_config()
    return config.node_group_configs if config else []


def _autoscaling_state() -> Any:
    """What Ray's autoscaler (of version 2) last said of itself; empty where there is none."""
    from ray._private.worker import global_worker  # ray.autoscaler.v2.sdk leaves out what we want of the same answer
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # pyright: ignore[reportAttributeAccessIssue]

    client: Any = global_worker
    return GetClusterStatusReply.FromString(client.gcs_client.get_cluster_status()).autoscaling_state


def _may_start_unknown_nodes() -> bool:
    """Whether there is an autoscaler, and nobody has said which nodes it can start."""
    return not _published_groups() and _autoscaling_state().autoscaler_state_version > 0


def autoscaler_activity() -> str:
    """', the autoscaler is starting 2 gpu.spot', or what it failed at; else ''."""
    state = _autoscaling_state()
    starting: dict[str, int] = {}
    for request in state.pending_instance_requests:
        starting[request.ray_node_type_name] = starting.get(request.ray_node_type_name, 0) + request.count
    for instance in state.pending_instances:
        starting[instance.ray_node_type_name] = starting.get(instance.ray_node_type_name, 0) + 1
    if starting:
        return f", the autoscaler is starting {', '.join(f'{num} {name}' for name, num in starting.items())}"
    if state.failed_instance_requests:
        failed = max(state.failed_instance_requests, key=lambda request: request.failed_ts)
        reason = " ".join(failed.reason.split())[:200]
        return f", the autoscaler could not start {failed.count} {failed.ray_node_type_name}: {reason}"
    return ""


def draining_nodes() -> set[str]:
    """Ids of nodes that will go soon: a spot notice, or an autoscaler or person taking them away."""
    from ray._private.state import state  # no public call tells it outside of Ray Train

    return set(state.get_draining_nodes())


def object_store_bytes() -> float:
    """Of the smallest object store of a node that is alive: each node that reads the full set holds a copy."""
    return min((n["Resources"].get("object_store_memory", 0.0) for n in ray.nodes() if n["Alive"]), default=0.0)


def num_slots(request: Mapping[str, float], *, startable: bool) -> int:
    """How many such requests the cluster can hold at once, empty; with or without what an autoscaler may start.

    Where there is an autoscaler and nobody has said which nodes it can start, it is taken to be able to start any.
    """
    if startable and _may_start_unknown_nodes():
        return _UNLIMITED
    return sum(t.num_fitting(request) * (t.num_alive + (t.num_startable if startable else 0)) for t in node_types())


def num_gpus_of(config: ActorsConfig, tell: OnEvent) -> float:
    """GPUs of an actor: as asked for; else 1 where any node has, or is known to be startable with, a GPU.

    Where that cannot be known it is 0, and told.
    """
    if config.num_gpus is not None:
        return config.num_gpus
    has_gpus = any(t.resources.get("GPU", 0) > 0 for t in node_types())
    if not has_gpus and _may_start_unknown_nodes():
        text = (
            "no GPU is up and nobody has said what nodes the autoscaler can start, so actors ask for CPUs alone: if it "
            "can start GPUs give --actors.num-gpus=1, or publish its node types (clusters/publish_node_types.py)"
        )
        tell(Event("warning", text))
    return float(has_gpus)


def refuse_unplaceable(request: Mapping[str, float], what: str, *, num: int = 1, way_out: str = ASK_FOR_LESS) -> None:
    """Stop before waiting for something that can never come.

    Args:
        way_out: what the user can do, after "can never place that: …. ".

    Raises:
        ValueError: with the request, what each kind of node offers, and the way out.
    """
    if num_slots(request, startable=True) >= num:
        return
    offers = "; ".join(
        f"{t.num_alive or f'up to {t.num_startable}'} × {t.name} with {describe(t.resources)}" for t in node_types()
    )
    times = f"{num} × " if num > 1 else ""
    raise ValueError(
        f"{what} ask for {times}{describe(request)}; this cluster can never place that: it has {offers or 'no nodes'}. "
        f"{way_out} or use another cluster"
    )


def describe(resources: Mapping[str, float]) -> str:
    """'4 CPU + 1 GPU'."""
    return " + ".join(f"{amount:g} {name}" for name, amount in resources.items() if amount) or "nothing"


def free_resources(names: Mapping[str, float]) -> str:
    """What is free of the named resources now, in words."""
    free, all_ = ray.available_resources(), ray.cluster_resources()
    return " + ".join(f"{free.get(k, 0):g} of {all_.get(k, 0):g} {k}" for k, amount in names.items() if amount)
