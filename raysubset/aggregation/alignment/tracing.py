"""Traces the permutation structure of a network: which units may change places, and what moves with them."""

from collections import defaultdict
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from raysubset.aggregation.alignment.unit_tracer import FIXED, Axis, Layer, UnitTracer, refusal
from raysubset.errors import first_line
from raysubset.models import copied
from raysubset.tasks import Spec
from raysubset.training import Weights

Permutations = tuple[Tensor, ...]
"""int64 [n] on the CPU for each group of n units: the unit that comes to each place."""

_NUM_EXAMPLES = 2  # with random numbers, for tracing and checking
_TOLERANCE = 1e-6  # relative, in float64


@dataclass(frozen=True, eq=False)
class UnitGroup:
    """Units that may change places with each other: any permutation of them leaves the network's function unchanged."""

    name: str  # of the first parameter's module, with the first unit's place unless it is 0
    size: int
    axes: tuple[tuple[Axis, Tensor], ...]
    """Where the units are in the weights: int64 [n, R], the indices of each unit along an axis. R > 1 if a unit covers
    several, as after a flatten."""
    activations: tuple[tuple[Layer, Tensor], ...]  # likewise in layers' outputs, before the activation function


@dataclass(frozen=True, eq=False)
class UnitStructure:
    """The result of trace_units()."""

    groups: tuple[UnitGroup, ...]
    num_fixed_groups: int  # sets of units that an unknown operation keeps in place
    layers: tuple[Layer, ...]  # in forward order, without the logits' layer
    graph: fx.Graph = field(repr=False)

    def network(self, model: nn.Module) -> fx.GraphModule:
        """Return the traced forward pass over the model's own modules."""
        return fx.GraphModule(model, self.graph)

    def identity(self) -> Permutations:
        return tuple(torch.arange(group.size) for group in self.groups)


def permuted(weights: Weights, groups: Sequence[UnitGroup], permutations: Permutations) -> Weights:
    """Return weights with each group's units in the given order. Unchanged tensors are shared rather than copied."""
    weights = dict(weights)
    copied: set[str] = set()
    for group, order in zip(groups, permutations, strict=True):
        if torch.equal(order, torch.arange(group.size)):
            continue
        for axis, positions in group.axes:
            name = axis.names[0]
            if name not in copied:
                weights[name] = weights[name].clone()
                copied.add(name)
            view, positions = axis.view(weights), positions.to(weights[name].device)
            view[positions] = view[positions[order]]
            for other in axis.names[1:]:
                weights[other] = weights[name]
    return weights


def trace_units(model: nn.Module, spec: Spec) -> UnitStructure:
    """Find which units of a network may be permuted, by following them through torch.fx's graph of its evaluation mode.

    A unit is a channel or neuron with all that moves with it: filters, biases, statistics, and the columns of layers
    that read it. Units that meet an unknown operation stay in place. The result is checked: a random permutation must
    leave the outputs for random inputs unchanged, in float64.

    Args:
        model: on any device and of any type. It is copied, and not changed.
        spec: of the model, with inputs as small as it takes.

    Raises:
        ValueError: if torch.fx cannot trace the network, a layer is unknown (attention and recurrent ones are), the
            inputs are tokens, no units may change places, or the permutation changes the outputs or they are not
            finite.
    """
    if spec.num_values is not None:
        raise refusal("its inputs are tokens, and nothing is known of embeddings")
    model = copied(model).to("cpu", torch.float64).eval()
    network = fx.GraphModule(model, _graph(model))
    _randomize(model)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(_NUM_EXAMPLES, *spec.inputs, dtype=torch.float64, generator=generator)
    tracer, outputs = UnitTracer(network, model.state_dict(keep_vars=True)), inputs
    with torch.no_grad():
        for node, outputs in walk(network, inputs):
            tracer.follow(node, outputs)
        structure = _structure(tracer, network.graph)
        _check(network, structure, inputs, outputs, generator)
    network.graph.owning_module = None  # else the structure would keep the copy alive
    return structure


def walk(network: fx.GraphModule, images: Tensor) -> Generator[tuple[fx.Node, Any], None, None]:
    """Yield each node in order with its value. Values are freed after their last use, as in a forward pass.

    If the caller changes a value in place, later nodes see the change.
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


def _graph(model: nn.Module) -> fx.Graph:
    tracer = fx.Tracer()
    try:
        return tracer.trace(model)
    except Exception as error:  # a forward() that gets stand-ins for tensors may raise anything
        path, kind = next(reversed(tracer.module_stack.values()), ("", type(model)))
        place = f"{path} ({kind.__name__})" if path else kind.__name__
        raise refusal(f"torch.fx cannot trace {place}: {first_line(error)}") from error


def _structure(tracer: UnitTracer, graph: fx.Graph) -> UnitStructure:
    """Sort units into groups. A kind is the sum of a random number for each time that a unit is found in a site."""
    random, unit_class = np.random.default_rng(0), _classes(tracer)
    kind = np.zeros(int(unit_class.max()) + 1, dtype=np.uint64)
    for site in tracer.sites:
        np.add.at(kind, unit_class[site.units.numpy()], random.integers(2**64, dtype=np.uint64))
    is_fixed, is_held = np.zeros((2, len(kind)), dtype=bool)
    is_fixed[unit_class[FIXED]] = True
    for units, _ in tracer.held:
        is_held[unit_class[units.numpy()]] = True
    is_movable = ~is_fixed & ~is_held
    _, group_of_movable, sizes = np.unique(kind[is_movable], return_inverse=True, return_counts=True)
    group_of = np.full(len(kind), -1)  # of each class; -1: it stays in place, or may change places with no other
    group_of[is_movable] = np.where(sizes[group_of_movable] > 1, group_of_movable, -1)
    axes, activations = (defaultdict[int, list[tuple[Any, Tensor]]](list) for _ in range(2))
    layers = []
    for site in tracer.sites:
        classes = unit_class[site.units.numpy()]
        order = np.argsort(classes, kind="stable")
        for group in dict.fromkeys(group_of[classes].tolist()):
            if group < 0:
                continue
            places = order[group_of[classes[order]] == group]
            positions = torch.from_numpy(places.reshape(sizes[group], -1))
            for axis in site.axes:
                axes[group].append((axis, positions))
            if site.layer is not None:
                activations[group].append((site.layer, positions))
        if site.layer is not None and not is_fixed[classes].all():
            layers.append(site.layer)
    groups = tuple(
        UnitGroup(_name(*group_axes[0]), int(sizes[group]), tuple(group_axes), tuple(activations[group]))
        for group, group_axes in axes.items()
    )
    if not groups:
        raise refusal(f"all are kept in place by {tracer.held[0][1]}" if tracer.held else "none are hidden")
    return UnitStructure(groups, len(np.unique(kind[is_held & ~is_fixed])), tuple(layers), graph)


def _classes(tracer: UnitTracer) -> np.ndarray:
    """Return int [num_units], with the same number for units that are the same unit."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    first, second = (torch.cat([pair[k] for pair in tracer.pairs]).numpy() for k in (0, 1))
    joined = coo_array((np.ones(len(first), dtype=bool), (first, second)), shape=(tracer.num_units,) * 2)
    return connected_components(joined, directed=False)[1]


def _name(axis: Axis, positions: Tensor) -> str:
    first = int(positions.min()) + (axis.rows[0] if axis.rows and axis.dim == 0 else 0)
    layer = axis.names[0].rpartition(".")[0] or axis.names[0]
    return f"{layer}[{first}]" if first else layer


def _randomize(model: nn.Module) -> None:
    """Draw new values for parameters and statistics that are constant at first: they would hide a wrong permutation."""
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
    if not error <= _TOLERANCE * scale:  # also if outputs are not finite
        raise refusal(f"permuted units change the outputs for random inputs by {error:g} of {scale:g}")
