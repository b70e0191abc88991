"""The resources of the cluster, those that its autoscaler can start, and so what can ever be placed."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from raysubset.config import ActorsConfig, ClusterConfig
from raysubset.events import Note, OnEvent

_MEMORIES = ("memory", "object_store_memory")  # in bytes; these differ from node to node
_TYPE_RESOURCE = "accelerator_type:"
_UNLIMITED = 1_000_000  # nodes, or requests that a node holds

WAIT_NOTICE_S = 5.0  # between two messages that say what a run waits for
ASK_FOR_LESS = "Ask for less (--actors.num-cpus, --actors.num-gpus, --fine-tuning.num-workers)"


@dataclass(frozen=True)
class NodeType:
    """Nodes of one kind that are alive, or that an autoscaler can start."""

    name: str
    resources: Mapping[str, float]  # of one node, in total: CPU, GPU, memory in bytes, …
    num_alive: int
    num_startable: int  # further nodes that an autoscaler may still start
    accelerator: str = "CPU"  # its type as Ray names it: A100, T4, …; "GPU" for a GPU without a name
    group: str = ""  # the autoscaler's name for such nodes
    node_ids: tuple[str, ...] = ()  # of the nodes that are alive

    def num_fitting(self, request: Mapping[str, float]) -> int:
        """Return how many such requests an empty node holds at once."""
        wanted = {key: amount for key, amount in request.items() if amount > 0}
        return int(min((self.resources.get(k, 0) / amount + 1e-9 for k, amount in wanted.items()), default=_UNLIMITED))


def own_address() -> str:
    """Return the address of this process's node, by which ledgers name nodes."""
    return ray.util.get_node_ip_address()


def address_of(node_id: str) -> str:
    """Return the address of a node by its id. The node may have gone meanwhile."""
    return next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == node_id)


def node_types() -> list[NodeType]:
    """Return the cluster's nodes, and those that its autoscaler can start (clusters/publish_node_types.py)."""
    ids_by_kind: dict[tuple, list[str]] = {}
    num_of_group: dict[str, int] = {}
    for node in ray.nodes():
        if node["Alive"]:
            resources = {k: v for k, v in node["Resources"].items() if k not in _MEMORIES and not k.startswith("node:")}
            group = node["Labels"].get("ray.io/node-group", "")
            accelerator = node["Labels"].get("ray.io/accelerator-type") or _accelerator(resources)
            key = (tuple(sorted(resources.items())), accelerator, group)
            ids_by_kind.setdefault(key, []).append(node["NodeID"])
            num_of_group[group] = num_of_group.get(group, 0) + 1
    types = [
        NodeType("alive", dict(resources), len(ids), 0, accelerator, group, tuple(ids))
        for (resources, accelerator, group), ids in ids_by_kind.items()
    ]
    for group in _published_groups():
        resources = {k: float(amount) for k, amount in group.resources.items() if k not in _MEMORIES}
        most = group.max_count if group.max_count >= 0 else _UNLIMITED
        if (num := most - num_of_group.get(group.name, 0)) > 0:
            types.append(NodeType(group.name, resources, 0, num, _accelerator(resources), group.name))
    return types


def offered(config: ClusterConfig) -> list[NodeType]:
    """Return the nodes of the connected cluster, or else the node of the new cluster that this process would start."""
    if ray.is_initialized():
        return node_types()
    from raysubset.cluster.private_ray import ResourceAndLabelSpec

    counted = ResourceAndLabelSpec(num_cpus=config.num_cpus, num_gpus=config.num_gpus)
    resources = counted.resolve(is_head=True, node_ip_address="127.0.0.1").to_resource_dict()
    return [NodeType("this machine", {key: float(resources.get(key) or 0) for key in ("CPU", "GPU")}, 1, 0)]


def _accelerator(resources: Mapping[str, float]) -> str:
    """Return the accelerator that a node's resources name (accelerator_type:T4, which Ray adds if it knows it)."""
    named = (name.removeprefix(_TYPE_RESOURCE) for name in resources if name.startswith(_TYPE_RESOURCE))
    return next(named, "GPU" if resources.get("GPU", 0) > 0 else "CPU")


def _published_groups() -> Sequence[Any]:
    """Return the node groups in Ray's control store; none if nobody wrote them there, as Ray's autoscalers do not."""
    from raysubset.cluster.private_ray import state

    config = state.get_cluster_config()
    return config.node_group_configs if config else []


def _autoscaling_state() -> Any:
    """Return the last report of Ray's autoscaler (version 2); empty if there is none."""
    from raysubset.cluster.private_ray import GetClusterStatusReply, global_worker

    return GetClusterStatusReply.FromString(global_worker.gcs_client.get_cluster_status()).autoscaling_state


def _may_start_unknown_nodes() -> bool:
    """Return True if there is an autoscaler, and nobody has published which nodes it can start."""
    return ray.is_initialized() and not _published_groups() and _autoscaling_state().autoscaler_state_version > 0


def _autoscaler_activity() -> str:
    """Return ', the autoscaler is starting 2 gpu.spot', or what it failed to start; else ''."""
    state = _autoscaling_state()
    starting = Counter[str]()
    for request in state.pending_instance_requests:
        starting[request.ray_node_type_name] += request.count
    starting.update(instance.ray_node_type_name for instance in state.pending_instances)
    if starting:
        return f", the autoscaler is starting {', '.join(f'{num} {name}' for name, num in starting.items())}"
    if state.failed_instance_requests:
        failed = max(state.failed_instance_requests, key=lambda request: request.failed_ts)
        reason = " ".join(failed.reason.split())[:200]
        return f", the autoscaler could not start {failed.count} {failed.ray_node_type_name}: {reason}"
    return ""


def draining_nodes() -> set[str]:
    """Return the ids of nodes that will go soon, by a spot notice, an autoscaler or a person."""
    from raysubset.cluster.private_ray import state

    return set(state.get_draining_nodes())


def groups_of(actor: Any) -> dict[str, str]:
    """Return the ids of an actor's placement groups that exist, the oldest first, each with its state: PENDING, …"""
    from raysubset.cluster.private_ray import PlacementGroupTableData, state

    table = state._connect_and_get_accessor()
    groups = map(PlacementGroupTableData.FromString, table.get_placement_group_table())
    creator, states = actor._actor_id.binary(), PlacementGroupTableData.PlacementGroupState
    existing = [g for g in groups if g.creator_actor_id == creator and g.state != states.REMOVED]
    existing.sort(key=lambda group: group.placement_group_creation_timestamp_ms)
    return {group.placement_group_id.hex(): states.Name(group.state) for group in existing}


def remove_groups(ids: Sequence[str]) -> None:
    """Remove placement groups and the processes in them. Those of a dead actor would stay, and hold their places."""
    for id in ids:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(id)))


def object_store_bytes() -> float:
    """Return the size of the smallest object store of a living node. Each node that reads the full set holds a copy."""
    return min((n["Resources"].get("object_store_memory", 0.0) for n in ray.nodes() if n["Alive"]), default=0.0)


def num_slots(request: Mapping[str, float], *, startable: bool, types: Sequence[NodeType] | None = None) -> int:
    """Return how many such requests the empty cluster can hold at once.

    Args:
        startable: count the nodes that an autoscaler may start too. If there is an autoscaler, and nobody has published
            which nodes it can start, it counts as able to start any.
    """
    if startable and _may_start_unknown_nodes():
        return _UNLIMITED
    nodes = node_types() if types is None else types
    return sum(t.num_fitting(request) * (t.num_alive + (t.num_startable if startable else 0)) for t in nodes)


def num_gpus_of(config: ActorsConfig, tell: OnEvent, *, types: Sequence[NodeType] | None = None) -> float:
    """Return the GPUs of an actor: the number set, or else 1 if any node has a GPU or can be started with one.

    If that cannot be known it is 0, with a warning.
    """
    if config.num_gpus is not None:
        return config.num_gpus
    has_gpus = any(t.resources.get("GPU", 0) > 0 for t in (node_types() if types is None else types))
    if not has_gpus and _may_start_unknown_nodes():
        text = (
            "no GPU is up and nobody has said what nodes the autoscaler can start, so actors ask for CPUs alone: if it "
            "can start GPUs give --actors.num-gpus=1, or publish its node types (clusters/publish_node_types.py)"
        )
        tell(Note(text, is_warning=True))
    return float(has_gpus)


def refuse_unplaceable(
    request: Mapping[str, float],
    what: str,
    *,
    num: int = 1,
    way_out: str = ASK_FOR_LESS,
    types: Sequence[NodeType] | None = None,
) -> None:
    """Stop before waiting for something that can never come.

    Args:
        types: the cluster's nodes if they are known already, or those of a cluster that is not up yet.
        way_out: what the user can do, after "can never place that: …. ".

    Raises:
        ValueError: with the request, what each kind of node offers, and the way out.
    """
    types = node_types() if types is None else types
    if num_slots(request, startable=True, types=types) >= num:
        return
    times = f"{num} × " if num > 1 else ""
    raise ValueError(
        f"{what} ask for {times}{describe(request)}; this cluster can never place that: it has {offers(types)}. "
        f"{way_out} or use another cluster"
    )


def offers(types: Sequence[NodeType]) -> str:
    """Return '2 × alive with 4 CPU; up to 3 × gpu.spot with 8 CPU + 1 GPU'."""
    words = (f"{t.num_alive or f'up to {t.num_startable}'} × {t.name} with {describe(t.resources)}" for t in types)
    return "; ".join(words) or "no nodes"


def describe(resources: Mapping[str, float]) -> str:
    """Return '4 CPU + 1 GPU'."""
    return " + ".join(f"{amount:g} {name}" for name, amount in resources.items() if amount) or "nothing"


def free_resources(request: Mapping[str, float]) -> str:
    """Return 'free are 0 of 4 CPU, the autoscaler is starting 2 gpu.spot': what there is for a request that waits."""
    free, all_ = ray.available_resources(), ray.cluster_resources()
    words = (f"{free.get(k, 0):g} of {all_.get(k, 0):g} {k}" for k, amount in request.items() if amount)
    return f"free are {' + '.join(words)}{_autoscaler_activity()}"
