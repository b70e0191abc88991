"""Labels say to which unit each entry of a tensor belongs, sites where units are found: what tracing writes down."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import map_aggregate

FIXED = 0  # the unit of all that never moves: images, logits, what is computed of them alone


@dataclass(frozen=True, eq=False)
class Labels:
    """The unit of each entry of a tensor, and its role among that unit's entries.

    Both have the tensor's dimensions, of size 1 where all indices are alike to every unit: the labels of a
    convolution's outputs [N, C, H, W] are [1, C, 1, 1]. Exchanging the units u and v exchanges the entries (u, r) and
    (v, r) at equal indices of the other dimensions; after flattening, the role says which pixel of its map an entry is.
    """

    units: Tensor  # int64
    roles: Tensor  # int64, of the same shape

    @property
    def fixed(self) -> bool:
        """Whether no permutation moves any entry."""
        return self.units.numel() == 1 and self.units.item() == FIXED

    def dims(self) -> list[int]:
        """The dimensions along which units differ."""
        return [dim for dim, size in enumerate(self.units.shape) if size > 1]


@dataclass(frozen=True, eq=False)
class Value:
    """A node's tensor, as tracing knows it."""

    node: str  # its name in the graph
    shape: torch.Size
    labels: Labels

    def along(self, dim: int) -> tuple[Tensor, Tensor]:
        """Units and roles int64 [shape[dim]] of labels that differ along that dimension alone."""
        size = self.shape[dim]
        return self.labels.units.reshape(-1).expand(size), self.labels.roles.reshape(-1).expand(size)


@dataclass(frozen=True)
class Use:
    """An axis of a parameter or buffer; of some rows of it alone where a grouped convolution's groups differ."""

    names: tuple[str, ...]  # in the state dict, several for a shared tensor
    axis: int
    rows: tuple[int, int] | None = None  # of axis 0, from and to


@dataclass(frozen=True, eq=False)
class Site:
    """A place where units meet: two may be exchanged only if they are found in the same sites in the same roles."""

    units: Tensor  # int64 [C]
    roles: Tensor  # int64 [C]
    uses: tuple[Use, ...] = ()  # axes of length C
    seen_in: tuple[str, int] | None = None  # the tensor whose entries these are: its node and dimension
    once: bool = True  # whether two entries of one unit in one role would be a contradiction


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
    """Labels that differ along one dimension, from int64 [C] each."""
    shape = [1] * num_dims
    shape[dim] = -1
    return Labels(units.reshape(shape), roles.reshape(shape))


def find_values(arguments: Any) -> list[Value]:
    """All values in nested arguments, in order."""
    found: list[Value] = []

    def visit(argument: Any) -> Any:
        if isinstance(argument, Value):
            found.append(argument)
        return argument

    map_aggregate(arguments, visit)
    return found


def moved(operation: Callable[..., Any], args: Any, kwargs: Any) -> list[Labels] | None:
    """Labels after an operation that only moves entries about (reshape, cat, …): it is carried out on the labels.

    Returns:
        Labels of each tensor it gives, or None where the result has no such labels.
    """
    numbers = {id(value): number for number, value in enumerate(find_values((args, kwargs)))}
    results = []
    for part in (0, 1):

        def entries(argument: Any, part: int = part) -> Any:
            if not isinstance(argument, Value):
                return argument
            units, roles = _expanded(argument)
            # Entries of one unit that come from several tensors are told apart by the tensor.
            return roles * len(numbers) + numbers[id(argument)] if part else units

        result = operation(*map_aggregate(args, entries), **map_aggregate(kwargs, entries))
        results.append([result] if isinstance(result, Tensor) else list(result))
    found = [_collapsed(units, roles) for units, roles in zip(*results, strict=True)]
    known = [labels for labels in found if labels is not None]
    return known if len(known) == len(found) else None


def joined(values: Sequence[Value], num_dims: int) -> tuple[Labels, list[tuple[Tensor, Tensor]]]:
    """Labels of an elementwise operation's result, and the pairs of units (int64 [n] each) that it makes one.

    Args:
        values: its operands that are not fixed, at least one; broadcast against each other as torch does.
    """
    padding = [(1,) * (num_dims - len(value.shape)) for value in values]
    units = torch.broadcast_tensors(
        *[v.labels.units.reshape(p + v.labels.units.shape) for v, p in zip(values, padding, strict=True)]
    )
    roles = torch.broadcast_tensors(
        *[v.labels.roles.reshape(p + v.labels.roles.shape) for v, p in zip(values, padding, strict=True)]
    )
    role = roles[0]
    for other in roles[1:]:
        role = _renumbered(role * (int(other.max()) + 1) + other)
    return Labels(units[0], role), [(units[0].flatten(), other.flatten()) for other in units[1:]]


def with_labels(node: str, result: Any, labels: Labels | list[Labels] | None) -> Any:
    """A node's tensor or tensors as values; fixed where there are no labels."""
    if isinstance(result, Tensor):
        known = labels[0] if isinstance(labels, list) else labels
        return Value(node, result.shape, known or fixed_labels(result.ndim))
    assert labels is None or isinstance(labels, list)
    if isinstance(result, tuple | list):
        of_each = labels or [None] * len(result)
        return tuple(with_labels(node, part, own) for part, own in zip(result, of_each, strict=True))
    return result


def holds_tensors(result: Any) -> bool:
    return isinstance(result, Tensor) or (isinstance(result, tuple | list) and any(map(holds_tensors, result)))


def find_tensors(arguments: Any) -> list[Tensor]:
    """Parameters and buffers among nested arguments."""
    found: list[Tensor] = []
    map_aggregate(arguments, lambda argument: found.append(argument) if isinstance(argument, Tensor) else None)
    return found


def _expanded(value: Value) -> tuple[Tensor, Tensor]:
    """Units and roles of every entry, int64 of the tensor's shape; a role tells the plain dimensions' index as well."""
    labels = value.labels
    sizes = [full if size == 1 else 1 for full, size in zip(value.shape, labels.units.shape, strict=True)]
    index = torch.arange(math.prod(sizes)).reshape(sizes)
    roles = labels.roles * index.numel() + index
    return labels.units.expand(value.shape).contiguous(), roles.expand(value.shape).contiguous()


def _collapsed(units: Tensor, roles: Tensor) -> Labels | None:
    """The inverse of _expanded(); None if a plain dimension's indices mean different things to different units."""
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
