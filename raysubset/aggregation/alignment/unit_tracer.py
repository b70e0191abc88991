"""UnitTracer follows units through a network: which must be permuted together, and where each is found."""

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import Node, map_arg

from raysubset.aggregation.alignment import operations
from raysubset.aggregation.alignment.labels import (
    FIXED,
    Labels,
    Layer,
    Site,
    Use,
    find,
    fixed_labels,
    joined,
    labels_along,
    moved,
)

# The arguments of layers' functions after the input
_ARGUMENTS = {
    **dict.fromkeys(operations.CONVOLUTIONS, ("weight", "bias", "stride", "padding", "dilation", "groups")),
    "linear": ("weight", "bias"),
    "layernorm": ("normalized_shape", "weight", "bias"),
    "groupnorm": ("num_groups", "weight", "bias"),
}
_DEFAULTS = {"bias": None, "groups": 1}


class UnitTracer:
    """Computes the labels of every tensor of a network beside it.

    After follow() of all nodes: `sites`; `pairs`, int64 [n] each, of units that are the same; `held`, units that an
    unknown operation keeps in place, and which; `layers`, convolutions, linear layers and norms, with their output's
    units.
    """

    def __init__(self, network: fx.GraphModule, tensors: Mapping[str, Tensor]) -> None:
        """`tensors` are the model's parameters and buffers by name, as in its state dict, themselves."""
        self.num_units = FIXED + 1
        self.sites: list[Site] = []
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.held: list[tuple[Tensor, str]] = []
        self.layers: list[tuple[Layer, Tensor]] = []
        self._network = network
        self._names: dict[int, tuple[str, ...]] = {}  # by id of the parameter or buffer
        for name, tensor in tensors.items():
            self._names[id(tensor)] = (*self._names.get(id(tensor), ()), name)
        self._values: dict[Node, Any] = {}
        self._sites: dict[Use, Site] = {}  # the first of each axis

    def follow(self, n: Node, result: Any) -> None:
        """Label the result of the next node."""
        args: Any = map_arg(n.args, lambda node: self._values[node])
        kwargs: Any = map_arg(n.kwargs, lambda node: self._values[node])
        if n.op == "output":
            for value in find(Labels, args):
                units = value.units.flatten()
                self.pairs.append((units, torch.full_like(units, FIXED)))
        elif (n.op == "get_attr" and id(result) in self._names) or not find(Tensor, result):
            self._values[n] = result
        elif n.target is operator.getitem and isinstance(args[0], tuple):
            self._values[n] = args[0][args[1]]
        else:
            labels = None
            if n.op not in ("placeholder", "get_attr"):
                labels = self._labels(n, args, kwargs, result)
                if labels is None:
                    self._hold(n, args, kwargs)
            self._values[n] = _fixed_like(result) if labels is None else labels

    def _labels(self, n: Node, args: Any, kwargs: Any, result: Any) -> Labels | tuple[Labels, ...] | None:
        """Return labels of the tensor or tensors of a node; None if the operation is unknown."""
        values, parameters = find(Labels, (args, kwargs)), find(Tensor, (args, kwargs))
        module = self._network.get_submodule(str(n.target)) if n.op == "call_module" else None
        kind = operations.kind(n, module)
        if not values or kind is None:
            return None
        if kind in operations.POINTWISE:
            return self._pointwise(values, parameters, result)
        if not args or (values[0] is not args[0] and not isinstance(args[0], tuple | list)):
            return None
        if len(values) == 1 and (kind in _ARGUMENTS or module is not None):
            options = dict(zip(_ARGUMENTS.get(kind, ()), args[1:], strict=False))
            labels = self._layer(kind, values[0], module or SimpleNamespace(**_DEFAULTS | options | kwargs), result)
            if module is not None and labels is not None:
                self._note_layer(n, kind, labels)
            if labels is not None or module is None:
                return labels
        if parameters or (module is not None and len(values) > 1):
            return None
        if kind in operations.MOVING:
            return moved(module or operations.operation(n), args, kwargs)
        if kind == "pad":
            return self._pad(result.shape, *args, **kwargs)
        if kind in operations.POOLING:
            return _pooled(values[0], kind, result)
        if kind in operations.REDUCING:
            return self._reduced(values[0], kwargs.get("dim", args[1] if len(args) > 1 else None), result)
        return self._mixed(values[0]) if kind in operations.MIXING else None

    def _layer(self, kind: str, x: Labels, layer: Any, out: Tensor) -> Labels | None:
        """Label the output of a module, or of a function with a layer's arguments; None if the kind is unknown."""
        weight: Any = getattr(layer, "weight", None)
        bias: Any = getattr(layer, "bias", None)
        if kind == "prelu":
            return x if weight.numel() == 1 else self._channels(x, (weight,))
        if kind in operations.TRANSPOSED:
            if layer.groups > 1 or not self._read(x, 1, Use(self._names[id(weight)], 0)):
                return None
            return self._produced(1, out.shape, [(weight, 1), (bias, 0)])
        if kind in operations.CONVOLUTIONS:
            return self._convolution(x, weight, bias, layer.groups, out)
        if kind == "linear":
            return self._linear(x, weight, bias, out)
        if kind in operations.NORMS:
            buffers = (getattr(layer, name, None) for name in ("running_mean", "running_var"))
            return self._channels(x, (weight, bias, *buffers))
        if kind == "groupnorm":
            return self._group_norm(x, weight, bias, layer.num_groups)
        return self._layer_norm(x, weight, bias, layer.normalized_shape) if kind == "layernorm" else None

    def _note_layer(self, n: Node, kind: str, labels: Labels) -> None:
        """Note a module that sets the scale of its output's channels."""
        dim = len(labels.shape) - 1 if kind in ("linear", "layernorm") else 1
        if labels.dims() == [dim] and kind != "prelu" and kind not in operations.TRANSPOSED:
            units, roles = _along(labels, dim)
            self.layers.append((Layer(n.name, str(n.target), dim), units))
            if not operations.read_by_batch_norm_alone(n, self._network):
                self.sites.append(Site(units, roles, seen_in=(n.name, dim), once=False))

    def _convolution(self, x: Labels, weight: Tensor, bias: Tensor | None, groups: int, out: Tensor) -> Labels | None:
        """Depthwise outputs belong to their inputs' units. A grouped convolution's units stay within their group."""
        num_out, channels = len(weight) // groups, x.along(1)
        if channels is None:
            return None
        if groups > 1 and weight.shape[1] == 1:
            units, roles = (part.repeat_interleave(num_out) for part in channels)
            roles = roles * num_out + torch.arange(num_out).repeat(groups)
            self._site(units, roles, [(weight, 0), (bias, 0)])
            return labels_along(1, out.shape, units, roles) if units.any() else fixed_labels(out.shape)
        for k in range(groups):
            rows = (k * num_out, (k + 1) * num_out) if groups > 1 else None
            part = slice(k * weight.shape[1], (k + 1) * weight.shape[1])
            self._read(x, 1, Use(self._names[id(weight)], 1, rows), part)
        return self._produced(1, out.shape, [(weight, 0), (bias, 0)], groups)

    def _linear(self, x: Labels, weight: Tensor, bias: Tensor | None, out: Tensor) -> Labels | None:
        last, dims = len(x.shape) - 1, x.dims()
        if len(dims) == 1 and dims != [last]:  # its units lie along another dimension than the mixed one
            return labels_along(dims[0], out.shape, *_along(x, dims[0]))
        if not self._read(x, last, Use(self._names[id(weight)], 1)):
            return None
        return self._produced(last, out.shape, [(weight, 0), (bias, 0)])

    def _group_norm(self, x: Labels, weight: Any, bias: Any, num_groups: int) -> Labels | None:
        """Units stay within their group. That whole groups could change places is not used."""
        if (channels := x.along(1)) is not None:
            units = channels[0]
            self.sites.append(Site(units, torch.arange(len(units)) * num_groups // len(units), once=False))
        return self._channels(x, (weight, bias))

    def _layer_norm(self, x: Labels, weight: Any, bias: Any, normalized_shape: Sequence[int]) -> Labels | None:
        dims, first = x.dims(), len(x.shape) - len(normalized_shape)
        if all(dim < first for dim in dims):
            return x
        if len(dims) > 1:
            return None
        self._site(*_along(x, dims[0]), [(weight, dims[0] - first), (bias, dims[0] - first)])
        return x

    def _channels(self, x: Labels, tensors: Sequence[Tensor | None]) -> Labels | None:
        """Label an operation on each channel of [N, C, …] by itself, with tensors [C]."""
        if (channels := x.along(1)) is None:
            return None
        self._site(*channels, [(tensor, 0) for tensor in tensors])
        return x

    def _produced(
        self, dim: int, shape: torch.Size, tensors: Sequence[tuple[Tensor | None, int]], groups: int = 1
    ) -> Labels:
        """Return labels of new units along a dimension. Units of one of the equal groups may change places."""
        if (num := shape[dim]) == 1:
            return fixed_labels(shape)
        units = self._new_units(num)
        self._site(units, torch.arange(num) * groups // num, tensors)
        return labels_along(dim, shape, units, torch.zeros_like(units))

    def _pointwise(self, values: Sequence[Labels], parameters: Sequence[Tensor], out: Tensor) -> Labels | None:
        labels, pairs = joined(values, out.shape)
        dims = labels.dims()
        for parameter in parameters:
            axes_of_units = [dim - (out.ndim - parameter.ndim) for dim in dims]
            axes = [axis for axis in axes_of_units if axis >= 0 and parameter.shape[axis] > 1]
            if axes and len(dims) > 1:
                return None
            if axes:
                self._site(*_along(labels, dims[0]), [(parameter, axes[0])])
        self.pairs += pairs
        return self._mixed(labels) if pairs else labels

    def _reduced(self, x: Labels, dims: Any, out: Tensor) -> Labels | None:
        """Label a mean or the like, over all units, which leaves nothing to permute, or along other dimensions."""
        if isinstance(dims, bool):
            return None  # std(unbiased)
        listed = range(len(x.shape)) if dims is None else dims if isinstance(dims, tuple | list) else [dims]
        reduced, unit_dims = {dim % len(x.shape) for dim in listed}, x.dims()
        if reduced.issuperset(unit_dims):
            self._mixed(x)
            return fixed_labels(out.shape)
        if len(unit_dims) > 1 or reduced.intersection(unit_dims):
            return None
        (dim,) = unit_dims
        num_before = sum(other < dim for other in reduced) if out.ndim < len(x.shape) else 0
        return labels_along(dim - num_before, out.shape, *_along(x, dim))

    def _mixed(self, x: Labels) -> Labels:
        """Label an operation that treats all units of a tensor alike, but only as a whole."""
        dims = x.dims()
        units, roles = _along(x, dims[0]) if len(dims) == 1 else (x.units.flatten(), x.roles.flatten())
        self.sites.append(Site(units, roles, once=False))
        return x

    def _pad(
        self, shape: torch.Size, x: Labels, pad: Sequence[int], mode: str = "constant", value: float | None = None
    ) -> Labels | None:
        """Constant new channels are units that may change places with one another, such as a shortcut's zeros."""
        dims = x.dims()
        if len(dims) != 1:
            return None if dims else fixed_labels(shape)
        (dim,) = dims
        units, roles = _along(x, dim)
        place = 2 * (len(shape) - 1 - dim)
        num_before, num_after = pad[place : place + 2] or (0, 0)
        if num_before or num_after:
            if mode != "constant" or min(num_before, num_after) < 0:
                return None
            new_units = self._new_units(num_before + num_after)
            self._site(new_units, torch.zeros_like(new_units), [])
            units = torch.cat([new_units[:num_before], units, new_units[num_before:]])
            roles = torch.cat([roles.new_zeros(num_before), roles, roles.new_zeros(num_after)])
        return labels_along(dim, shape, units, roles)

    def _new_units(self, num: int) -> Tensor:
        self.num_units += num
        return torch.arange(self.num_units - num, self.num_units)

    def _site(self, units: Tensor, roles: Tensor, tensors: Sequence[tuple[Tensor | None, int]]) -> None:
        uses = tuple(Use(self._names[id(tensor)], axis) for tensor, axis in tensors if tensor is not None)
        self._add(Site(units, roles, uses))

    def _read(self, x: Labels, dim: int, use: Use, part: slice = slice(None)) -> bool:
        """Note that a layer mixes entries of a tensor with an axis of its weights. Return False if they are unknown."""
        if (channels := x.along(dim)) is not None:
            self._add(Site(channels[0][part], channels[1][part], (use,)))
        return channels is not None

    def _add(self, site: Site) -> None:
        """Add a site with parameters. Units on an axis that was met before are the same as the units met then."""
        new_uses = []
        for use in site.uses:
            first = self._sites.setdefault(use, site)
            if first is site:
                new_uses.append(use)
                continue
            self.pairs.append((first.units, site.units))
            if not torch.equal(first.roles, site.roles):
                self.held.append((site.units, f"{use.names[0]}, which is used in two ways"))
        self.sites.append(dataclasses.replace(site, uses=tuple(new_uses)))

    def _hold(self, n: Node, args: Any, kwargs: Any) -> None:
        """Keep the units of an unknown operation in place.

        Raises:
            ValueError: if the operation has parameters, of whose axes nothing is known.
        """
        module = self._network.get_submodule(str(n.target)) if n.op == "call_module" else None
        if (module is not None and module.state_dict()) or find(Tensor, (args, kwargs)):
            raise operations.refusal(f"nothing is known of {operations.where(n)}")
        for value in find(Labels, (args, kwargs)):
            if not value.fixed:
                self.held.append((value.units.flatten(), operations.where(n)))


def _along(labels: Labels, dim: int) -> tuple[Tensor, Tensor]:
    """Return labels.along(dim), where no other dimension tells units apart."""
    found = labels.along(dim)
    assert found is not None
    return found


def _fixed_like(result: Any) -> Any:
    """Return fixed labels in the place of each tensor."""
    if isinstance(result, tuple | list):
        return tuple(map(_fixed_like, result))
    return fixed_labels(result.shape) if isinstance(result, Tensor) else result


def _pooled(x: Labels, name: str, out: Tensor) -> Labels | None:
    """Label an operation along the dimensions after [N, C]. A name like max_pool2d tells their number."""
    num = next((int(letter) for letter in name if letter.isdigit()), len(x.shape) - 2)
    channels = x.along(1) if len(x.shape) == out.ndim == num + 2 else None
    return None if channels is None else labels_along(1, out.shape, *channels)
