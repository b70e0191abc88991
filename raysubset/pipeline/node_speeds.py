"""The speed of each place for an actor on the cluster, weighted or measured, and the subset sizes that follow from it.

slots = weighted_slots(request, speeds={"A100": 3.5, "T4": 1.0}, most=4)
sizes in proportion to shares(slots, num_subsets=4); subset 2 is meant for slot_of(slots, 2)
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from raysubset.cluster import NodeType, address_of, call_on_cluster, describe, node_types
from raysubset.config import Config, SubsetsConfig
from raysubset.data import FullSet
from raysubset.training import Cost, Progress, card_bytes, minimize, place, use_device
from raysubset.work import Run, seeded_model

MEASURE_S = 3.0  # seconds of training that measure a speed
_ENDLESS_EPOCHS = 1e6
OTHER_SPEED = 1.0  # of nodes whose type has no weight


@dataclass(frozen=True)
class Slot:
    """Room for one actor on a node."""

    kind: str  # of the node
    speed: float  # relative to other slots: a weight, or examples/s


@dataclass(frozen=True)
class MeasuredSpeed:
    """The result of a short training on one kind of node."""

    examples_per_s: float
    cost: Cost
    card_bytes: int | None  # memory of the GPU that trained


def shares(slots: Sequence[Slot], num_subsets: int) -> list[float]:
    """Return the relative sizes of the subsets with which all slots finish together.

    A slot's speed is divided among its subsets, so that its turns one after the other take as long as the single turn
    of a slot with one subset.
    """
    turns = Counter(subset % len(slots) for subset in range(num_subsets))
    return [slot_of(slots, subset).speed / turns[subset % len(slots)] for subset in range(num_subsets)]


def slot_of(slots: Sequence[Slot], subset_id: int) -> Slot:
    """Return the slot that a subset is meant for. Slots are ordered from the fastest to the slowest."""
    return slots[subset_id % len(slots)]


def in_words(slots: Sequence[Slot], sizes: Sequence[int]) -> str:
    """Return 'sizes are by speed: for FAST (speed 3) 2 × 485 examples, for SLOW (speed 1) 2 × 161 examples'."""
    parts: dict[Slot, list[int]] = {}
    for subset, size in enumerate(sizes):
        parts.setdefault(slot_of(slots, subset), []).append(size)
    texts = (
        f"for {slot.kind} (speed {slot.speed:.4g}) {len(slot_sizes)} × "
        f"{' to '.join(map(str, sorted({min(slot_sizes), max(slot_sizes)})))} examples"
        for slot, slot_sizes in parts.items()
    )
    return f"sizes are by speed: {', '.join(texts)}"


def decide_slots(run: Run, indices: np.ndarray, *, num_gpus: float, num_subsets: int) -> list[Slot]:
    """Return the slots that the subsets are meant for, the fastest first, weighted or measured as subsets.shares says.

    The ledger receives the cost of measuring.

    Args:
        indices: int64, a subset on which the run's model and recipe are timed.
        num_gpus: of an actor.
        num_subsets: the most slots that are returned.

    Raises:
        ValueError: if there is no node to weigh or measure.
    """
    config, request = run.config, {"CPU": run.config.actors.num_cpus, "GPU": num_gpus}

    def measure(kind: NodeType) -> float:
        node_id = kind.node_ids[0]
        with run.ledger.recorded("measuring", 0, device=kind.accelerator, node=address_of(node_id)) as close:
            speed: MeasuredSpeed = call_on_cluster(
                measure_speed,
                run.full_set_ref,
                *(config, indices, num_gpus),
                request=request,
                tell=run.tell,
                timeout_s=config.cluster.wait_timeout_s,
                node_id=node_id,
            )
            close(speed.cost)
        return speed.examples_per_s

    most, speeds = min(num_subsets, config.actors.max_num or num_subsets), config.subsets.speeds()
    if speeds is not None:
        return weighted_slots(node_types(), request, speeds, most=most)
    return measured_slots(node_types(), request, measure, most=most)


def weighted_slots(
    types: Sequence[NodeType], request: Mapping[str, float], speeds: Mapping[str, float], *, most: int
) -> list[Slot]:
    """Return the fastest slots by weights, which are given to accelerator types or to an autoscaler's node types.

    Nodes that an autoscaler may still start count like nodes that are alive. A type without a weight has the weight 1.

    Raises:
        ValueError: if no known node holds the request, or none that does has a type with a weight.
    """
    slots = [
        _weighted(type, speeds)
        for type in types
        for _ in range(min(type.num_fitting(request) * (type.num_alive + type.num_startable), most))
    ]
    if not slots:
        raise ValueError(
            "subsets.shares gives weights to types of nodes, but no node is up or known to be startable that holds "
            f"{describe(request)}: publish the node types (clusters/publish_node_types.py) or use "
            "subsets.shares=equal"
        )
    if not speeds.keys() & {slot.kind for slot in slots}:
        known_types = ", ".join(sorted({name for type in types for name in (type.accelerator, type.group) if name}))
        raise ValueError(
            f"subsets.shares gives weights to {', '.join(speeds)}, but the nodes that hold {describe(request)} are of "
            f"none of these types; the cluster has {known_types}"
        )
    return _fastest(slots, most)


def _weighted(type: NodeType, speeds: Mapping[str, float]) -> Slot:
    name = next((name for name in (type.accelerator, type.group) if name in speeds), type.accelerator)
    return Slot(name, speeds.get(name, OTHER_SPEED))


def measured_slots(
    types: Sequence[NodeType], request: Mapping[str, float], measure: Callable[[NodeType], float], *, most: int
) -> list[Slot]:
    """Return the fastest slots of the nodes that are alive. `measure` times each kind of node once.

    Raises:
        ValueError: if no node that is alive holds the request.
    """
    slots: list[Slot] = []
    for type in types:
        if num := type.num_fitting(request) * type.num_alive:
            slots += [Slot(kind_of(type), measure(type))] * min(num, most)
    if not slots:
        raise ValueError(
            f"subsets.shares=measured times each kind of node, but no node is up that holds {describe(request)}: give "
            "weights by type instead (--subsets.shares A100=3.5,T4=1), or start the nodes first"
        )
    return _fastest(slots, most)


def _fastest(slots: Sequence[Slot], most: int) -> list[Slot]:
    return sorted(slots, key=lambda slot: -slot.speed)[:most]


def kind_of(type: NodeType) -> str:
    """Return the name of nodes that count as equally fast: accelerator, autoscaler's type and resources."""
    name = f"{type.accelerator} of {type.group}" if type.group else type.accelerator
    return f"{name} ({describe(type.resources)})"


def speeds_of_nodes(config: SubsetsConfig, slots: Sequence[Slot]) -> Iterator[tuple[NodeType, float]]:
    """Yield the cluster's types of nodes now, each with its speed; those whose kind was not measured are left out."""
    weights, measured = config.speeds(), {slot.kind: slot.speed for slot in slots}
    for type in node_types():
        speed = measured.get(kind_of(type)) if weights is None else _weighted(type, weights).speed
        if speed is not None:
            yield type, speed


def speed_of_node(config: SubsetsConfig, slots: Sequence[Slot], node_id: str) -> float | None:
    """Return the speed of the node that an actor started on; None if its kind was not measured, or it has gone."""
    return next((speed for type, speed in speeds_of_nodes(config, slots) if node_id in type.node_ids), None)


def fastest_nodes(config: Config, slots: Sequence[Slot], *, num_gpus: float) -> list[str]:
    """Return the ids of the living nodes, the fastest first, each once per actor that fits; at most one a slot."""
    request = {"CPU": config.actors.num_cpus, "GPU": num_gpus}
    by_speed = sorted(speeds_of_nodes(config.subsets, slots), key=lambda entry: -entry[1])
    ids = [
        id for type, _ in by_speed for id in type.node_ids for _ in range(min(type.num_fitting(request), len(slots)))
    ]
    return ids[: len(slots)]


def measure_speed(full_set: FullSet, config: Config, indices: np.ndarray, num_gpus: float) -> MeasuredSpeed:
    """Train on a subset for a few seconds, on the device of this process, as an actor would."""
    device = use_device(num_gpus=num_gpus, num_threads=config.actors.num_cpus)
    model = seeded_model(config, full_set)
    model = place(model, device, channels_last=config.minimize.channels_last)
    examples = full_set.examples("train", indices, device=device, augment=True)
    start_s, num_before = time.perf_counter(), 0

    def on_step(progress: Progress) -> bool:
        nonlocal start_s, num_before
        if not num_before:  # the first step also includes set-up
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start_s, num_before = time.perf_counter(), progress.cost.num_backward
        return time.perf_counter() - start_s >= MEASURE_S

    recipe = replace(config.stage("subsets"), epochs=_ENDLESS_EPOCHS, tolerance=None, patience=0, target_loss=None)
    cost = minimize(model, examples, recipe, seed=0, on_step=on_step).cost  # a GPU has done all steps when it returns
    if cost.num_backward == num_before:  # L-BFGS may be done after the first
        per_s = num_before / cost.device_s
    else:
        per_s = (cost.num_backward - num_before) / (time.perf_counter() - start_s)
    return MeasuredSpeed(per_s, cost, card_bytes(num_gpus=num_gpus))
