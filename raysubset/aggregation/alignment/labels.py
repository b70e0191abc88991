"""The records of tracing: labels tell the unit of each entry of a tensor, and sites tell where units are found."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.fx.node import map_aggregate

FIXED = 0  # the unit of all that never moves: images, logits, and what is computed from them alone
_PRIME = 0x9E3779B97F4A7C15 - 2**64  # odd, so that int64 products of roles, which wrap around, stay distinct

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Labels:
    """The unit of each entry of a tensor, and its role among that unit's entries: int64, of the tensor's shape.

    Exchanging units u and v exchanges the entries (u, r) and (v, r). Of a convolution's outputs [N, C, H, W], the
    channel is the unit, and example and pixel are the role. Roles are compared, and mean nothing else.
    """

    units: Tensor
    roles: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.units.shape

    @property
    def fixed(self) -> bool:
        """True if no permutation moves any entry."""
        return not self.units.any()

    def dims(self) -> list[int]:
        """Return the dimensions along which units differ."""
        units = self.units
        return [dim for dim in range(units.ndim) if not torch.equal(units, units.narrow(dim, 0, 1).expand_as(units))]

    def along(self, dim: int) -> tuple[Tensor, Tensor] | None:
        """Return units and roles, int64 [shape[dim]] each, of the dimension's indices; None if others tell units apart.

        Indices of equal roles have entries of equal roles. They are numbered from 0 in the order of their appearance.
        """
        units, roles = (part.movedim(dim, 0).flatten(1) for part in (self.units, self.roles))
        if not torch.equal(units, units[:, :1].expand_as(units)):
            return None
        factors = torch.randint(2**62, roles.shape[1:], generator=torch.Generator().manual_seed(0))
        digests = {digest: number for number, digest in enumerate(dict.fromkeys((roles * factors).sum(1).tolist()))}
        return units[:, 0], torch.tensor([digests[digest] for digest in (roles * factors).sum(1).tolist()])


class Use(NamedTuple):
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


def fixed_labels(shape: Sequence[int]) -> Labels:
    index = torch.arange(math.prod(shape)).reshape(tuple(shape))
    return Labels(torch.zeros_like(index), index)


def labels_along(dim: int, shape: Sequence[int], units: Tensor, roles: Tensor) -> Labels:
    """Return labels of a tensor of this shape whose units differ along one dimension, from int64 [shape[dim]] each."""
    view = [-1 if d == dim else 1 for d in range(len(shape))]
    index = torch.arange(math.prod(shape) // shape[dim]).reshape([1 if d == dim else n for d, n in enumerate(shape)])
    roles = roles.view(view) * index.numel() + index if roles.any() else index
    return Labels(units.view(view).expand(shape), roles.expand(shape))


def find(kind: type[T], arguments: Any) -> list[T]:
    """Return all objects of a class in nested arguments, in order."""
    found: list[T] = []
    map_aggregate(arguments, lambda argument: found.append(argument) if isinstance(argument, kind) else None)
    return found


def moved(operation: Callable[..., Any], args: Any, kwargs: Any) -> Labels | tuple[Labels, ...]:
    """Return labels after an operation that only moves entries (reshape, cat, …). It is applied to the labels."""
    numbers = {id(labels): number for number, labels in enumerate(find(Labels, (args, kwargs)))}

    def apply(part: Callable[[Labels], Tensor]) -> Any:
        def entries(argument: Any) -> Any:
            return part(argument).contiguous() if isinstance(argument, Labels) else argument

        return operation(*map_aggregate(args, entries), **map_aggregate(kwargs, entries))

    units = apply(lambda labels: labels.units)
    # the entries of one unit that come from several tensors are told apart by the tensor
    roles = apply(lambda labels: labels.roles * _PRIME + numbers[id(labels)] if len(numbers) > 1 else labels.roles)
    return Labels(units, roles) if isinstance(units, Tensor) else tuple(map(Labels, units, roles))


def joined(values: Sequence[Labels], shape: torch.Size) -> tuple[Labels, list[tuple[Tensor, Tensor]]]:
    """Return labels of an elementwise operation's result, and pairs of units (int64 [n] each) that become the same.

    Entries of operands that never move tell the others' roles apart, as a table of constants does.

    Args:
        values: operands, at least one. They are broadcast as torch does.
    """
    first, *others = (Labels(value.units.expand(shape), value.roles.expand(shape)) for value in values)
    units, roles, pairs = first.units, first.roles, []
    for other in others:
        if not torch.equal(roles, other.roles):
            roles = roles * _PRIME + other.roles
        if other.fixed or not units.any():
            units = units if other.fixed else other.units
            continue
        dims = {*Labels(units, roles).dims(), *other.dims()}
        differing = tuple(slice(None) if dim in dims else 0 for dim in range(len(shape)))
        pairs.append((units[differing].flatten(), other.units[differing].flatten()))
    return Labels(units, roles), pairs
