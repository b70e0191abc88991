"""UnitTracer follows units through a network: which are one and the same, and along which axes each is found."""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Node, map_aggregate, map_arg
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from raysubset.training import Weights

FIXED = 0  # the unit of all that never moves: images, logits, and what is computed from them alone

# Operations of known effect by name, so that F.relu, torch.relu, Tensor.relu_ and nn.ReLU are the same
_POINTWISE = frozenset({
    "abs", "add", "alphadropout", "celu", "clamp", "clone", "contiguous", "detach", "div", "dropout", "dropout1d",
    "dropout2d", "dropout3d", "elu", "exp", "featurealphadropout", "float", "gelu", "hardshrink", "hardsigmoid",
    "hardswish", "hardtanh", "iadd", "identity", "imul", "isub", "itruediv", "leakyrelu", "log", "logsigmoid",
    "maximum", "minimum", "mish", "mul", "neg", "pow", "relu", "relu6", "selu", "sigmoid", "silu", "softplus",
    "softshrink", "softsign", "sqrt", "square", "stochasticdepth", "sub", "tanh", "tanhshrink", "threshold", "truediv",
})  # fmt: skip
_MOVING = frozenset({
    "cat", "channelshuffle", "chunk", "concat", "expand", "flatten", "flip", "getitem", "movedim", "narrow", "permute",
    "pixelshuffle", "pixelunshuffle", "repeat", "reshape", "roll", "select", "split", "squeeze", "stack", "swapaxes",
    "t", "tile", "transpose", "unbind", "unflatten", "unsqueeze", "view",
})  # fmt: skip
_POOLING = frozenset(
    f"{kind}{num}d"
    for kind in ("maxpool", "avgpool", "lppool", "adaptiveavgpool", "adaptivemaxpool", "zeropad", "reflectionpad",
                 "replicationpad")
    for num in (1, 2, 3)
) | {"interpolate", "upsample"}  # fmt: skip
_REDUCING = frozenset({"mean", "sum", "amax", "amin"})
_MIXING = frozenset({"softmax", "logsoftmax", "normalize"})  # these treat all entries of a dimension alike
_TRANSPOSED = frozenset({"convtranspose1d", "convtranspose2d", "convtranspose3d"})
_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"}) | _TRANSPOSED
_NORMS = frozenset({
    "batchnorm1d", "batchnorm2d", "batchnorm3d", "groupnorm", "instancenorm1d", "instancenorm2d", "instancenorm3d",
    "prelu", "syncbatchnorm",
})  # fmt: skip
_ARGUMENTS = {  # of layers that are called as functions, after the input
    **dict.fromkeys(_CONVOLUTIONS - _TRANSPOSED, ("weight", "bias", "stride", "padding", "dilation", "groups")),
    "linear": ("weight", "bias"),
    "layernorm": ("normalized_shape", "weight", "bias"),
    "groupnorm": ("num_groups", "weight", "bias"),
}

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Units:
    """Stands for an activation: the unit of each of its entries, int64 of its shape."""

    of: Tensor

    def dims(self) -> list[int]:
        """Return the dimensions along which units differ."""
        return [dim for dim in range(self.of.ndim) if not bool((self.of == self.of.narrow(dim, 0, 1)).all())]

    def along(self, dim: int) -> Tensor | None:
        """Return the units, int64 [shape[dim]], of a dimension's indices; None if others tell units apart too."""
        rows = self.of.movedim(dim, 0).flatten(1)
        return rows[:, 0] if bool((rows == rows[:, :1]).all()) else None


class Axis(NamedTuple):
    """An axis of a parameter or buffer, or of some of its rows if a grouped convolution's groups differ."""

    names: tuple[str, ...]  # in the state dict; several for a shared tensor
    dim: int
    rows: tuple[int, int] | None = None  # (from, to) of axis 0

    def view(self, weights: Weights) -> Tensor:
        """Return the part of the tensor, sharing its memory, with this axis first: [C, …]."""
        tensor = weights[self.names[0]]
        return (tensor if self.rows is None else tensor[slice(*self.rows)]).movedim(self.dim, 0)


@dataclass(frozen=True)
class Layer:
    """A module that sets the scale of its output's channels, unless only batch norms read it: they undo any scale."""

    node: str  # of the graph
    module: str
    dim: int  # of the channels


@dataclass(frozen=True, eq=False)
class Site:
    """A place where units meet. Two units may be exchanged only if they are in the same sites, equally often."""

    units: Tensor  # int64 [C]
    axes: tuple[Axis, ...] = ()  # of length C
    layer: Layer | None = None  # whose output has these channels


class UnitTracer:
    """Computes the units of every activation of a network beside it.

    After follow() of all nodes: `sites`; `pairs`, int64 [n] each, of units that are the same; `held`, units that an
    unknown operation keeps in place, and which.
    """

    def __init__(self, network: fx.GraphModule, tensors: Mapping[str, Tensor]) -> None:
        """`tensors` are the model's parameters and buffers by name, as in its state dict, themselves."""
        self.num_units = FIXED + 1
        self.sites: list[Site] = []
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.held: list[tuple[Tensor, str]] = []
        self._network = network
        self._names: dict[int, tuple[str, ...]] = {}  # by id of the parameter or buffer
        for name, tensor in tensors.items():
            self._names[id(tensor)] = (*self._names.get(id(tensor), ()), name)
        self._values: dict[Node, Any] = {}
        self._units_of: dict[Axis, Tensor] = {}  # where an axis was met first

    def follow(self, n: Node, result: Any) -> None:
        """Find the units of the result of the next node.

        Raises:
            ValueError: if the operation is unknown and has parameters, of whose axes nothing is known.
        """
        args: Any = map_arg(n.args, lambda node: self._values[node])
        kwargs: Any = map_arg(n.kwargs, lambda node: self._values[node])
        activations, tensors = _find(Units, (args, kwargs)), _find(Tensor, (args, kwargs))
        module = self._network.get_submodule(str(n.target)) if n.op == "call_module" else None
        value = result  # of a parameter, a constant, or what is no tensor
        if n.op == "output":
            for activation in activations:
                self._join(activation.of, torch.tensor(FIXED))
        elif n.op == "placeholder":
            value = _fixed_like(result)
        elif n.target is operator.getitem and isinstance(args[0], tuple):
            value = args[0][args[1]]
        elif n.op != "get_attr" and _find(Tensor, result):
            units = self._units(n, module, args, kwargs, result) if activations else None
            has_parameters = any(id(tensor) in self._names for tensor in tensors)
            if units is None and (has_parameters or (module is not None and module.state_dict())):
                raise refusal(f"nothing is known of {_where(n)}")
            self.held += [(each.of.flatten(), _where(n)) for each in activations if units is None and each.of.any()]
            value = units or (_fixed_like(result) if activations else result)
        self._values[n] = value

    def _units(self, n: Node, module: nn.Module | None, args: Any, kwargs: Any, result: Any) -> Any:
        """Return the Units of a node's result, or a tuple of them; None if the operation is unknown."""
        activations, tensors = _find(Units, (args, kwargs)), _find(Tensor, (args, kwargs))
        kind = _kind(n, module)
        if kind in _POINTWISE:
            return self._pointwise(activations, tensors, result)
        if kind is None or not args or (activations[0] is not args[0] and not isinstance(args[0], tuple | list)):
            return None
        x = activations[0]
        if len(activations) == 1 and (module is not None or kind in _ARGUMENTS):
            options = dict(zip(_ARGUMENTS.get(kind, ()), args[1:], strict=False))
            layer = module or SimpleNamespace(**{"bias": None, "groups": 1} | options | kwargs)
            units = self._layer(kind, x, layer, result)
            if module is not None and units is not None:
                self._note_layer(n, kind, units)
            if units is not None or module is None:
                return units
        if any(id(tensor) in self._names for tensor in tensors) or (module is not None and len(activations) > 1):
            return None
        if kind in _MOVING:
            return _moved(module or _operation(n), args, kwargs)
        if kind == "pad":
            return self._pad(result.shape, *args, **kwargs)
        if kind in _POOLING and (channels := x.along(1)) is not None and result.shape[:2] == x.of.shape[:2]:
            return _spread(channels, 1, result.shape)
        if kind in _REDUCING:
            return self._reduced(x, result, *args[1:], **kwargs)
        return self._mixed(x) if kind in _MIXING else None

    def _layer(self, kind: str, x: Units, layer: Any, out: Tensor) -> Units | None:
        """Return the units of the output of a module, or of a function with a layer's arguments; None if unknown."""
        tensors: Any = [getattr(layer, name, None) for name in ("weight", "bias", "running_mean", "running_var")]
        if any(isinstance(tensor, Tensor) and id(tensor) not in self._names for tensor in tensors):
            return None  # computed from parameters, as by spectral norm's hook
        weight, bias, mean, variance = tensors
        dims, last = x.dims(), x.of.ndim - 1
        if kind == "linear":
            if len(dims) == 1 and dims != [last]:  # its units lie along another dimension than the mixed one
                return _spread(_along(x, dims[0]), dims[0], out.shape)
            return self._produced(x.along(last), last, weight, bias, out)
        if kind == "layernorm":
            first = x.of.ndim - len(layer.normalized_shape)
            if len(dims) == 1 and dims[0] >= first:
                self._meet(_along(x, dims[0]), (weight, dims[0] - first), (bias, dims[0] - first))
            return x if len(dims) <= 1 else None
        channels = x.along(1)
        if channels is None:
            return None
        if kind in _NORMS:
            if kind == "groupnorm":  # units stay within their group. That whole groups could change places is not used
                self.sites += [Site(part) for part in channels.chunk(layer.num_groups)]
            if kind != "prelu" or weight.numel() > 1:
                self._meet(channels, (weight, 0), (bias, 0), (mean, 0), (variance, 0))
            return x
        if kind in _TRANSPOSED:
            return self._produced(channels, 1, weight, bias, out, axes=(1, 0)) if layer.groups == 1 else None
        if kind not in _CONVOLUTIONS:
            return None
        if layer.groups > 1 and weight.shape[1] == 1:  # depthwise outputs belong to their inputs' units
            units = channels.repeat_interleave(len(weight) // layer.groups)
            self._meet(units, (weight, 0), (bias, 0))
            return _spread(units, 1, out.shape)
        return self._produced(channels, 1, weight, bias, out, groups=layer.groups)

    def _produced(
        self,
        read: Tensor | None,
        dim: int,
        weight: Tensor,
        bias: Tensor | None,
        out: Tensor,
        *,
        axes: tuple[int, int] = (0, 1),
        groups: int = 1,
    ) -> Units | None:
        """Return new units along a dimension, which a layer computes from those that it reads along it.

        The weight's `axes` are those of the new units and of the ones read. New units stay within their group.
        """
        if read is None:
            return None
        num_rows = len(weight) // groups
        for number, part in enumerate(read.chunk(groups)):
            rows = (number * num_rows, (number + 1) * num_rows) if groups > 1 else None
            self._meet(part, (weight, axes[1]), rows=rows)
        if out.shape[dim] == 1:
            return _fixed_like(out)
        units = self._new_units(out.shape[dim])
        self._meet(units, (weight, axes[0]), (bias, 0))
        self.sites += [Site(part) for part in units.chunk(groups)]
        return _spread(units, dim, out.shape)

    def _note_layer(self, n: Node, kind: str, out: Units) -> None:
        """Note a module that sets the scale of its output's channels."""
        dim = out.of.ndim - 1 if kind in ("linear", "layernorm") else 1
        is_normalised = all(
            user.op == "call_module" and isinstance(self._network.get_submodule(str(user.target)), _BatchNorm)
            for user in n.users
        )
        if out.dims() == [dim] and kind not in {"prelu", *_TRANSPOSED} and not is_normalised:
            self.sites.append(Site(_along(out, dim), layer=Layer(n.name, str(n.target), dim)))

    def _pointwise(self, activations: Sequence[Units], tensors: Sequence[Tensor], out: Tensor) -> Units | None:
        """Return the units of an elementwise operation's result. Units that meet become the same."""
        x, *others = activations
        for other in others:
            x = self._added(x, other, out.shape)
        dims = x.dims()
        for tensor in tensors:
            axes = [axis for dim in dims if (axis := dim - x.of.ndim + tensor.ndim) >= 0 and tensor.shape[axis] > 1]
            if axes and (len(dims) > 1 or id(tensor) not in self._names):
                return None
            if axes:
                self._meet(_along(x, dims[0]), (tensor, axes[0]))
        return x

    def _added(self, x: Units, other: Units, shape: torch.Size) -> Units:
        """Return x with another operand, both broadcast. Fixed values stop units unless all have the same ones."""
        first, second = Units(x.of.expand(shape)), Units(other.of.expand(shape))
        for units, fixed in ((first, other.of), (second, x.of)):
            sizes = [1] * (len(shape) - fixed.ndim) + list(fixed.shape)
            if not fixed.any() and all(sizes[dim] == 1 for dim in units.dims()):
                return units
        differing = {*first.dims(), *second.dims()}
        index = tuple(slice(None) if dim in differing else 0 for dim in range(len(shape)))
        self._join(first.of[index], second.of[index])
        return first if first.of.any() else second

    def _reduced(self, x: Units, out: Tensor, dim: Any = None, keepdim: bool = False, **_: Any) -> Units | None:
        """Return the units of a mean or the like, over all units, which leaves none, or along other dimensions."""
        dims = range(x.of.ndim) if dim is None else dim if isinstance(dim, tuple | list) else [dim]
        reduced = {d % x.of.ndim for d in dims}
        if reduced.issuperset(x.dims()):
            self._mixed(x)
            return _fixed_like(out)
        return None if reduced.intersection(x.dims()) else Units(x.of.amax(tuple(reduced), keepdim))

    def _mixed(self, x: Units) -> Units:
        """Return x, after an operation that treats all units alike, but only as a whole."""
        dims = x.dims()
        self.sites.append(Site(_along(x, dims[0]) if len(dims) == 1 else x.of.flatten()))
        return x

    def _pad(
        self, shape: torch.Size, x: Units, pad: Sequence[int], mode: str = "constant", value: float | None = None
    ) -> Units | None:
        """Constant new channels are units that may change places with one another, such as a shortcut's zeros."""
        dims = x.dims()
        if len(dims) != 1:
            return None if dims else Units(torch.full(shape, FIXED))
        (dim,) = dims
        units, place = _along(x, dim), 2 * (len(shape) - 1 - dim)
        num_before, num_after = pad[place : place + 2] or (0, 0)
        if num_before or num_after:
            if mode != "constant" or min(num_before, num_after) < 0:
                return None
            new_units = self._new_units(num_before + num_after)
            self.sites.append(Site(new_units))
            units = torch.cat([new_units[:num_before], units, new_units[num_before:]])
        return _spread(units, dim, shape)

    def _new_units(self, num: int) -> Tensor:
        self.num_units += num
        return torch.arange(self.num_units - num, self.num_units)

    def _join(self, first: Tensor, second: Tensor) -> None:
        """Note that units are the same."""
        first, second = torch.broadcast_tensors(first, second)
        self.pairs.append((first.flatten(), second.flatten()))

    def _meet(self, units: Tensor, *axes: tuple[Tensor | None, int], rows: tuple[int, int] | None = None) -> None:
        """Note units along axes of tensors. Units on an axis that was met before are the same as the units met then."""
        new_axes = []
        for axis in (Axis(self._names[id(tensor)], dim, rows) for tensor, dim in axes if tensor is not None):
            if axis in self._units_of:
                self._join(self._units_of[axis], units)
            else:
                self._units_of[axis] = units
                new_axes.append(axis)
        self.sites.append(Site(units, tuple(new_axes)))


def refusal(reason: str) -> ValueError:
    """Return the error for a network whose units cannot be aligned."""
    return ValueError(
        f"this network's units cannot be aligned: {reason}; use subsets.start=shared with another aggregation.method, "
        "or aggregation.method=select_best"
    )


def _find(kind: type[T], arguments: Any) -> list[T]:
    """Return all objects of a class in nested arguments, in order."""
    return [argument for argument in tree_leaves(arguments) if isinstance(argument, kind)]


def _along(units: Units, dim: int) -> Tensor:
    """Return units.along(dim), where no other dimension tells units apart."""
    channels = units.along(dim)
    assert channels is not None
    return channels


def _spread(units: Tensor, dim: int, shape: torch.Size) -> Units:
    """Return units along one dimension of an activation of this shape."""
    return Units(units.view([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape))


def _fixed_like(result: Any) -> Any:
    """Return fixed units in the place of each tensor."""
    if isinstance(result, tuple | list):
        return tuple(map(_fixed_like, result))
    return Units(torch.full(result.shape, FIXED)) if isinstance(result, Tensor) else result


def _moved(operation: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Return units after an operation that only moves entries (reshape, cat, …). It is applied to the units."""

    def entries(argument: Any) -> Any:
        if isinstance(argument, Units):
            return argument.of.contiguous()
        is_constant = isinstance(argument, Tensor) and argument.is_floating_point()  # integers are indices
        return torch.full(argument.shape, FIXED) if is_constant else argument

    units = operation(*map_aggregate(args, entries), **map_aggregate(kwargs, entries))
    return Units(units) if isinstance(units, Tensor) else tuple(map(Units, units))


def _operation(node: Node) -> Callable[..., Any]:
    """Return what a node calls, as a function of all its arguments."""
    if node.op == "call_function":
        assert callable(node.target)
        return node.target
    return lambda self, *args, **kwargs: getattr(self, str(node.target))(*args, **kwargs)


def _kind(node: Node, module: nn.Module | None) -> str | None:
    """Return a node's operation by a name as above; None unless it is torch's, Python's or torchvision's own.

    A subclass of a module of torch's has no name, as it may compute anything.
    """
    if module is not None:
        return type(module).__name__.lower() if type(module).__module__.startswith("torch.nn.modules.") else None
    root = (getattr(node.target, "__module__", None) or "builtins").split(".")[0]
    if node.op == "call_function" and root not in ("builtins", "_operator", "torch", "torchvision"):
        return None
    return _operation_name(node).lower().replace("_", "")


def _operation_name(node: Node) -> str:
    """Return the name of the function or method that a node calls, without the underscore of in-place methods."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.rstrip("_")


def _where(node: Node) -> str:
    """Return a node in words: its operation, and the module that it is in."""
    modules = list(node.meta.get("nn_module_stack", {}).values())
    path, kind = modules[-1] if modules else ("", "")
    kind = getattr(kind, "__name__", kind)
    place = f"{path} ({kind})" if path else "the network"
    return place if node.op == "call_module" else f"{_operation_name(node)} in {place}"
