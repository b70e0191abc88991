"""The permutation structure of a network, traced: which units may change places, and what moves with them."""

import copy
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from raysubset.aggregation.alignment.labels import FIXED, Layer
from raysubset.aggregation.alignment.operations import refusal
from raysubset.aggregation.alignment.unit_tracer import UnitTracer
from raysubset.errors import first_line
from raysubset.tasks import Spec
from raysubset.training import Weights

Permutations = tuple[Tensor, ...]
"""int64 [n] on the CPU for each group of n units: which unit comes to each place."""

_NUM_EXAMPLES = 2  # of random numbers, to trace and to check with
_TOLERANCE = 1e-6  # relative, in float64


@dataclass(frozen=True, eq=False)
class UnitAxis:
    """Where a group's units lie along an axis of a parameter or buffer."""

    names: tuple[str, ...]  # in the state dict; several for a shared tensor
    axis: int
    positions: Tensor  # int64 [n, R]: the indices of each unit; R > 1 where one covers several, as behind a flatten
    rows: tuple[int, int] | None = None  # of axis 0, from and to: one group of a grouped convolution

    def view(self, weights: Weights) -> Tensor:
        """The part of the tensor in question, the units' axis first: [C, …], sharing its memory."""
        tensor = weights[self.names[0]]
        return (tensor if self.rows is None else tensor[slice(*self.rows)]).movedim(self.axis, 0)


@dataclass(frozen=True, eq=False)
class Activation:
    """A layer's output in which a group's units are found, before the activation function."""

    node: str  # of the graph
    dim: int
    positions: Tensor  # int64 [n, R]


@dataclass(frozen=True, eq=False)
class UnitGroup:
    """Units that may change places with each other: any permutation of them leaves the network's function as it is."""

    name: str  # of the first parameter's module; with the first unit's place, where that is not 0
    size: int
    axes: tuple[UnitAxis, ...]
    activations: tuple[Activation, ...]


@dataclass(frozen=True, eq=False)
class UnitStructure:
    """What trace_units() found."""

    groups: tuple[UnitGroup, ...]
    num_fixed_groups: int  # sets of units kept in place by an operation that is not understood
    held_by: tuple[str, ...]  # these operations
    layers: tuple[Layer, ...]  # in forward order, without the logits'
    graph: fx.Graph = field(repr=False)

    def network(self, model: nn.Module) -> fx.GraphModule:
        """The traced forward pass over the model's own modules."""
        return fx.GraphModule(model, self.graph)

    def identity(self) -> Permutations:
        return tuple(torch.arange(group.size) for group in self.groups)


def permuted(weights: Weights, groups: Sequence[UnitGroup], permutations: Permutations) -> Weights:
    """The weights with each group's units in the given order; tensors that do not change are shared, not copied."""
    weights = dict(weights)
    copied: set[str] = set()
    for group, order in zip(groups, permutations, strict=True):
        if torch.equal(order, torch.arange(group.size)):
            continue
        for axis in group.axes:
            name = axis.names[0]
            if name not in copied:
                weights[name] = weights[name].clone()
                copied.add(name)
            positions = axis.positions.to(weights[name].device)
            view = axis.view(weights)
            view[positions] = view[positions[order]]
            for other in axis.names[1:]:
                weights[other] = weights[name]
    return weights


def trace_units(model: nn.Module, spec: Spec) -> UnitStructure:
    """Find which units of a network may be permuted, by following each through torch.fx's graph of its evaluation mode.

    A unit is a channel or neuron with all that moves with it: filters, biases, statistics, the columns of the layers
    that read it. Units that meet an operation which is not understood stay in place. The result is checked: a
    random permutation must leave the outputs for random inputs as they are, in float64.

    Args:
        model: any device and type; it is copied, and left as it is.
        spec: what it takes, inputs as small as it can.

    Raises:
        ValueError: if torch.fx cannot trace the network, nothing is known of one of its layers (attention, recurrent
            ones), its inputs are tokens, no units may change places, or those that may change the outputs, which may
            not be finite.
    """
    if spec.num_values is not None:
        raise refusal("its inputs are tokens, and nothing is known of embeddings")
    model = copy.deepcopy(model).to("cpu", torch.float64).eval()
    network = fx.GraphModule(model, _graph(model))
    _randomize(model)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(_NUM_EXAMPLES, *spec.inputs, dtype=torch.float64, generator=generator)
    names: dict[int, tuple[str, ...]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names[id(tensor)] = (*names.get(id(tensor), ()), name)
    tracer = UnitTracer(network, names)
    with torch.no_grad():
        expected = tracer.run(inputs)
        structure = _structure(tracer, network.graph)
        _check(network, structure, inputs, expected, generator)
    network.graph.owning_module = None  # else the structure would keep the copy alive
    return structure


def walk(network: fx.GraphModule, images: Tensor) -> Generator[tuple[fx.Node, Any], None, None]:
    """Yield each node in order with what it gives; values are freed after their last use, as in a forward pass.

    What the caller does to a value in place, later nodes see.
    """
    interpreter = fx.Interpreter(network)
    interpreter.args_iter = iter([images])
    for node in network.graph.nodes:
        value = interpreter.env[node] = interpreter.run_node(node)
        yield node, value
        del value
        for used in interpreter.user_to_last_uses.get(node, ()):
            del interpreter.env[used]


def random_permutations(groups: Sequence[UnitGroup], generator: torch.Generator) -> Permutations:
    return tuple(torch.randperm(group.size, generator=generator) for group in groups)


class _Tracer(fx.Tracer):
    """Knows the module it is in when the user's forward() fails."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[str] = []

    def call_module(self, m, forward, args, kwargs):
        self.inside.append(f"{self.path_of_module(m)} ({type(m).__name__})")
        output = super().call_module(m, forward, args, kwargs)
        self.inside.pop()
        return output


def _graph(model: nn.Module) -> fx.Graph:
    tracer = _Tracer()
    try:
        return tracer.trace(model)
    except Exception as error:  # a forward() that is given stand-ins for tensors may raise anything
        place = tracer.inside[-1] if tracer.inside else type(model).__name__
        raise refusal(f"torch.fx cannot trace {place}: {first_line(error)}") from error


def _structure(tracer: UnitTracer, graph: fx.Graph) -> UnitStructure:
    unit_class = _classes(tracer)
    num = int(unit_class.max()) + 1
    kept = np.zeros(num, dtype=bool)  # classes that stay in place: not understood, or a contradiction
    for units, _ in tracer.held:
        kept[unit_class[units]] = True
    kind = _kinds(tracer, unit_class, kept)
    fixed = np.zeros(num, dtype=bool)
    fixed[unit_class[FIXED]] = True
    movable = ~fixed & ~kept
    members = np.bincount(kind[movable], minlength=int(kind.max()) + 1)
    axes: dict[int, list[UnitAxis]] = {}
    activations: dict[int, list[Activation]] = {}
    for site in tracer.sites:
        classes = unit_class[site.units]
        kinds = np.where(movable[classes] & (members[kind[classes]] > 1), kind[classes], -1)
        order = np.lexsort((site.roles.numpy(), classes, kinds))
        for this in np.unique(kinds[kinds >= 0]):
            of_kind = order[kinds[order] == this]
            positions = torch.from_numpy(of_kind.reshape(members[this], -1))
            axes.setdefault(this, []).extend(UnitAxis(use.names, use.axis, positions, use.rows) for use in site.uses)
            if site.seen_in is not None:
                activations.setdefault(this, []).append(Activation(*site.seen_in, positions))
    groups = [
        UnitGroup(_name(own), int(members[this]), tuple(own), tuple(activations.get(this, ())))
        for this, own in axes.items()
        if own
    ]
    if not groups:
        raise refusal(f"all are kept in place by {tracer.held[0][1]}" if tracer.held else "none are hidden")
    held_by = tuple(dict.fromkeys(where for units, where in tracer.held if not fixed[unit_class[units]].all()))
    layers = tuple(layer for layer, units in tracer.layers if not fixed[unit_class[units]].all())
    return UnitStructure(tuple(groups), len(np.unique(kind[kept & ~fixed])), held_by, layers, graph)


def _classes(tracer: UnitTracer) -> np.ndarray:
    """int [num_units]: the same number for units that are one."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    nobody = torch.zeros(1, dtype=torch.int64)
    first, second = (torch.cat([nobody, *(pair[k] for pair in tracer.pairs)]).numpy() for k in (0, 1))
    joined = coo_array((np.ones(len(first), dtype=bool), (first, second)), shape=(tracer.num_units,) * 2)
    return connected_components(joined, directed=False)[1]


def _kinds(tracer: UnitTracer, unit_class: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """int [num_classes]: equal for classes found in the same sites in the same roles. Adds contradictions to `kept`."""
    kind = np.zeros(len(kept), dtype=np.int64)
    num_kinds = 1
    for site in tracer.sites:
        classes, roles = unit_class[site.units], site.roles.numpy()
        order = np.lexsort((roles, classes))
        classes, roles = classes[order], roles[order]
        if site.once:
            twice = (classes[1:] == classes[:-1]) & (roles[1:] == roles[:-1])
            kept[classes[1:][twice]] = True
        present, counts = np.unique(classes, return_counts=True)
        starts = counts.cumsum() - counts
        for count in np.unique(counts):  # those present so many times, told apart by their roles and their kind so far
            chosen = counts == count
            patterns = roles[starts[chosen][:, None] + np.arange(count)]
            known = np.column_stack([kind[present[chosen]], patterns])
            refined = np.unique(known, axis=0, return_inverse=True)[1].reshape(-1)
            kind[present[chosen]] = num_kinds + refined
            num_kinds += int(refined.max()) + 1
    return kind


def _name(axes: Sequence[UnitAxis]) -> str:
    first = int(axes[0].positions.min()) + (axes[0].rows[0] if axes[0].rows and axes[0].axis == 0 else 0)
    layer = axes[0].names[0].rpartition(".")[0] or axes[0].names[0]
    return f"{layer}[{first}]" if first else layer


def _randomize(model: nn.Module) -> None:
    """Draw parameters and statistics that are all alike, as many are at first: a wrong permutation would not show."""
    generator = torch.Generator().manual_seed(0)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
            tensor.uniform_(0.5, 1.5, generator=generator)


def _check(
    network: fx.GraphModule, structure: UnitStructure, inputs: Tensor, expected: Tensor, generator: torch.Generator
) -> None:
    orders = random_permutations(structure.groups, generator)
    weights = permuted(network.state_dict(), structure.groups, orders)
    outputs = torch.func.functional_call(network, weights, (inputs,))
    scale = float((expected - expected.mean()).abs().max())
    error = float((outputs - expected).abs().max())
    if not error <= _TOLERANCE * scale:  # also where outputs are not finite
        raise refusal(f"permuted units change the outputs for random inputs by {error:g} of {scale:g}")
