"""The records of tracing: labels tell the unit of each entry of a tensor, and sites tell where units are found."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import map_aggregate

FIXED = 0  # the unit of all that never moves: images, logits, and what is computed from them alone


@dataclass(frozen=True, eq=False)
class Labels:
    """The unit of each entry of a tensor, and its role among that unit's entries.

    Both tensors have the labelled tensor's dimensions, with size 1 where every unit treats all indices alike: the
    labels of a convolution's outputs [N, C, H, W] are [1, C, 1, 1]. Exchanging units u and v exchanges the entries
    (u, r) and (v, r) at equal indices of the other dimensions. After flattening, the role is the pixel of a unit's map.
    """

    units: Tensor  # int64
    roles: Tensor  # int64, of the same shape

    @property
    def fixed(self) -> bool:
        """True if no permutation moves any entry."""
        return self.units.numel() == 1 and self.units.item() == FIXED

    def dims(self) -> list[int]:
        """Return the dimensions along which units differ."""
        return [dim for dim, size in enumerate(self.units.shape) if size > 1]


@dataclass(frozen=True, eq=False)
class Value:
    """A node's tensor, as tracing sees it."""

    node: str  # its name in the graph
    shape: torch.Size
    labels: Labels

    def along(self, dim: int) -> tuple[Tensor, Tensor]:
        """Return units and roles, int64 [shape[dim]] each, of labels that differ along this dimension only."""
        size = self.shape[dim]
        return self.labels.units.reshape(-1).expand(size), self.labels.roles.reshape(-1).expand(size)


@dataclass(frozen=True)
class Use:
    """An axis of a parameter or buffer, or of some of its rows if a grouped convolution's groups differ."""

    names: tuple[str, ...]  # in the state dict; several for a shared tensor
    axis: int
    rows: tuple[int, int] | None = None  # (from, to) of axis 0


@dataclass(frozen=True, eq=False)
class Site:
    """A place where units meet. Two units may be exchanged only if they are in the same sites in the same roles."""

    units: Tensor  # int64 [C]
    roles: Tensor  # int64 [C]
    uses: tuple[Use, ...] = ()  # axes of length C
    seen_in: tuple[str, int] | None = None  # node and dimension of the tensor whose entries these are
    once: bool = True  # True if two entries of one unit in one role would be a contradiction


@dataclass(frozen=True)
class Layer:
    """A module that sets the scale of its output's channels."""

    node: str  # of the graph
    module: str
    dim: int  # of the channels


def fixed_labels(num_dims: int) -> Labels:
    zero = torch.zeros([1] * num_dims, dtype=torch.int64)
    return Labels(zero, zero)


def labels_along(dim: int, num_dims: int, units: Tensor, roles: Tensor) -> Labels:
    """Return labels that differ along one dimension, from int64 [C] each."""
    shape = [1] * num_dims
    shape[dim] = -1
    return Labels(units.reshape(shape), roles.reshape(shape))


def find_values(arguments: Any) -> list[Value]:
    """Return all values in nested arguments, in order."""
    values: list[Value] = []

    def visit(argument: Any) -> Any:
        if isinstance(argument, Value):
            values.append(argument)
        return argument

    map_aggregate(arguments, visit)
    return values


def moved(operation: Callable[..., Any], args: Any, kwargs: Any) -> list[Labels] | None:
    """Return labels after an operation that only moves entries (reshape, cat, …). It is applied to the labels.

    Returns:
        Labels of each resulting tensor; None if they cannot be described by labels.
    """
    numbers = {id(value): number for number, value in enumerate(find_values((args, kwargs)))}
    results = []
    for part in (0, 1):

        def entries(argument: Any, part: int = part) -> Any:
            if not isinstance(argument, Value):
                return argument
            units, roles = _expanded(argument)
            # The entries of one unit that come from several tensors are told apart by the tensor.
            return roles * len(numbers) + numbers[id(argument)] if part else units

        result = operation(*map_aggregate(args, entries), **map_aggregate(kwargs, entries))
        results.append([result] if isinstance(result, Tensor) else list(result))
    all_labels = [_collapsed(units, roles) for units, roles in zip(*results, strict=True)]
    labels_found = [labels for labels in all_labels if labels is not None]
    return labels_found if len(labels_found) == len(all_labels) else None


def joined(values: Sequence[Value], num_dims: int) -> tuple[Labels, list[tuple[Tensor, Tensor]]]:
    """Return labels of an elementwise operation's result, and pairs of units (int64 [n] each) that become the same.

    Args:
        values: operands that are not fixed, at least one. They are broadcast as torch does.
    """
    units, roles = (
        torch.broadcast_tensors(*[part[(None,) * (num_dims - part.ndim)] for part in parts])
        for parts in ([v.labels.units for v in values], [v.labels.roles for v in values])
    )
    role = roles[0]
    for other in roles[1:]:
        role = _renumbered(role * (int(other.max()) + 1) + other)
    return Labels(units[0], role), [(units[0].flatten(), other.flatten()) for other in units[1:]]


def with_labels(node: str, result: Any, labels: Labels | list[Labels] | None) -> Any:
    """Return a node's tensor or tensors as values, which are fixed if there are no labels."""
    if isinstance(result, Tensor):
        tensor_labels = labels[0] if isinstance(labels, list) else labels
        return Value(node, result.shape, tensor_labels or fixed_labels(result.ndim))
    assert labels is None or isinstance(labels, list)
    if isinstance(result, tuple | list):
        part_labels = labels or [None] * len(result)
        return tuple(with_labels(node, part, label) for part, label in zip(result, part_labels, strict=True))
    return result


def holds_tensors(result: Any) -> bool:
    return isinstance(result, Tensor) or (isinstance(result, tuple | list) and any(map(holds_tensors, result)))


def find_tensors(arguments: Any) -> list[Tensor]:
    """Return the parameters and buffers in nested arguments."""
    tensors: list[Tensor] = []
    map_aggregate(arguments, lambda argument: tensors.append(argument) if isinstance(argument, Tensor) else None)
    return tensors


def _expanded(value: Value) -> tuple[Tensor, Tensor]:
    """Return units and roles of every entry, int64 of the tensor's shape. Roles include the plain dimensions' index."""
    labels = value.labels
    sizes = [full if size == 1 else 1 for full, size in zip(value.shape, labels.units.shape, strict=True)]
    index = torch.arange(math.prod(sizes)).reshape(sizes)
    roles = labels.roles * index.numel() + index
    return labels.units.expand(value.shape).contiguous(), roles.expand(value.shape).contiguous()


def _collapsed(units: Tensor, roles: Tensor) -> Labels | None:
    """Invert _expanded(). None if indices of a plain dimension mean different things to different units."""
    plain = [dim for dim in range(units.ndim) if bool((units == units.narrow(dim, 0, 1)).all())]
    first_units, first_roles = units, roles
    for dim in plain:
        first_units, first_roles = first_units.narrow(dim, 0, 1), first_roles.narrow(dim, 0, 1)
    labels = Labels(first_units.clone(), _renumbered(first_roles))
    if labels.fixed:
        return labels
    sizes = [units.shape[dim] if dim in plain else 1 for dim in range(units.ndim)]
    index = torch.arange(math.prod(sizes)).reshape(sizes)
    key = (labels.roles * index.numel() + index).expand(roles.shape)  # must determine the role, whatever the unit
    table = roles.new_zeros(int(key.max()) + 1)
    table[key.flatten()] = roles.flatten()
    return labels if torch.equal(table[key], roles) else None


def _renumbered(roles: Tensor) -> Tensor:
    return torch.unique(roles, return_inverse=True)[1].reshape(roles.shape)
