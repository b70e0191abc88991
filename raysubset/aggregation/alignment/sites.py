"""Where units are found in a network: what tracing writes down."""

from dataclasses import dataclass

from torch import Tensor


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
