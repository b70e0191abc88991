"""UnitTracer follows units through a network: which must be permuted together, and where each is found."""

import dataclasses
import operator
from collections import Counter
from collections.abc import Sequence
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
    Value,
    find_tensors,
    find_values,
    fixed_labels,
    holds_tensors,
    joined,
    labels_along,
    moved,
    with_labels,
)

# The arguments of layers' functions after the input
_ARGUMENTS = {
    **dict.fromkeys(operations.CONVOLUTIONS, ("weight", "bias", "stride", "padding", "dilation", "groups")),
    "linear": ("weight", "bias"),
    "layernorm": ("normalized_shape", "weight", "bias"),
    "groupnorm": ("num_groups", "weight", "bias"),
}
_DEFAULTS = {"bias": None, "groups": 1}


class UnitTracer(fx.Interpreter):
    """Runs a network on a batch, and computes the labels of every tensor along with it.

    After run(): `sites`; `pairs`, int64 [n] each, of units that are the same; `held`, units that an unknown operation
    keeps in place, and which; `layers`, convolutions, linear layers and norms, with their output's units.
    """

    def __init__(self, network: fx.GraphModule, names: dict[int, tuple[str, ...]]) -> None:
        """`names` are those in the state dict, by id of the parameter or buffer."""
        super().__init__(network)
        self.extra_traceback = False  # it would be added to messages for the user
        self.num_units = FIXED + 1
        self.sites: list[Site] = []
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.held: list[tuple[Tensor, str]] = []
        self.layers: list[tuple[Layer, Tensor]] = []
        self._names = names
        self._values: dict[Node, Any] = {}
        self._axes: dict[Use, list[Site]] = {}  # sites of the same axis: several if a tensor is used again
        self._num_users: Counter[tuple[str, ...]] = Counter()  # nodes, by the tensor's names

    def run(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().run(*args, **kwargs)
        for use, sites in self._axes.items():
            if len(sites) < self._num_users[use.names]:  # in its other uses, it is not these units' axis
                self.pairs.append((sites[0].units, torch.full_like(sites[0].units, FIXED)))
        return outputs

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        args: Any = map_arg(n.args, lambda node: self._values[node])
        kwargs: Any = map_arg(n.kwargs, lambda node: self._values[node])
        if n.op == "output":
            for value in find_values(args):
                units = value.labels.units.flatten()
                self.pairs.append((units, torch.full_like(units, FIXED)))
        elif (n.op == "get_attr" and id(result) in self._names) or not holds_tensors(result):
            self._values[n] = result
        elif n.target is operator.getitem and isinstance(args[0], tuple):
            self._values[n] = dataclasses.replace(args[0][args[1]], node=n.name)
        else:
            labels = None
            if n.op not in ("placeholder", "get_attr"):
                self._num_users.update(self._names[id(tensor)] for tensor in self._tensors(n, args, kwargs))
                labels = self._labels(n, args, kwargs, result)
                if labels is None:
                    self._hold(n, args, kwargs)
            self._values[n] = with_labels(n.name, result, labels)
        return result

    def _labels(self, n: Node, args: Any, kwargs: Any, result: Any) -> Labels | list[Labels] | None:
        """Return labels of the tensor or tensors of a node; None if the operation is unknown."""
        values, parameters = find_values((args, kwargs)), find_tensors((args, kwargs))
        module = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
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
                self._note_layer(n, kind, labels, result)
            if labels is not None or module is None:
                return labels
        if parameters or (module is not None and len(values) > 1):
            return None
        if kind in operations.MOVING:
            return moved(module or operations.operation(n), args, kwargs)
        if kind == "pad":
            return self._pad(*args, **kwargs)
        if kind in operations.POOLING:
            return _pooled(values[0], kind, result)
        if kind in operations.REDUCING:
            return self._reduced(values[0], kwargs.get("dim", args[1] if len(args) > 1 else None), result)
        return self._mixed(values[0]) if kind in operations.MIXING else None

    def _layer(self, kind: str, x: Value, layer: Any, out: Tensor) -> Labels | None:
        """Label the output of a module, or of a function with a layer's arguments; None if the kind is unknown."""
        weight: Any = getattr(layer, "weight", None)
        bias: Any = getattr(layer, "bias", None)
        if kind == "prelu":
            return x.labels if weight.numel() == 1 else self._channels(x, (weight,))
        if kind in operations.TRANSPOSED:
            return self._transposed(x, weight, bias, layer.groups)
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

    def _note_layer(self, n: Node, kind: str, labels: Labels, out: Tensor) -> None:
        """Note a module that sets the scale of its output's channels."""
        dim = out.ndim - 1 if kind in ("linear", "layernorm") else 1
        if labels.dims() == [dim] and kind != "prelu" and kind not in operations.TRANSPOSED:
            self.layers.append((Layer(n.name, str(n.target), dim), labels.units.flatten()))
            if not operations.read_by_batch_norm_alone(n, self.module):
                site = Site(labels.units.flatten(), labels.roles.flatten(), seen_in=(n.name, dim), once=False)
                self.sites.append(site)

    def _convolution(self, x: Value, weight: Tensor, bias: Tensor | None, groups: int, out: Tensor) -> Labels | None:
        """Depthwise outputs belong to their inputs' units. A grouped convolution's units stay within their group."""
        if not set(x.labels.dims()) <= {1}:
            return None
        units, roles = x.along(1)
        num_out = len(weight) // groups
        if groups > 1 and weight.shape[1] == 1:
            roles = (roles[:, None] * num_out + torch.arange(num_out)).flatten()
            units = units.repeat_interleave(num_out)
            if bool((units == FIXED).all()):
                return fixed_labels(out.ndim)
            self._site(units, roles, [(weight, 0), (bias, 0)])
            return labels_along(1, out.ndim, units, roles)
        for k in range(groups):
            rows = (k * num_out, (k + 1) * num_out) if groups > 1 else None
            self._read(x, 1, k * weight.shape[1], weight.shape[1], Use(self._names[id(weight)], 1, rows))
        return self._produced(1, out.ndim, torch.arange(len(weight)) // num_out, [(weight, 0), (bias, 0)])

    def _transposed(self, x: Value, weight: Tensor, bias: Tensor | None, groups: int) -> Labels | None:
        num_out = weight.shape[1]
        if not set(x.labels.dims()) <= {1} or groups > 1:
            return None
        self._read(x, 1, 0, len(weight), Use(self._names[id(weight)], 0))
        return self._produced(1, len(x.shape), torch.zeros(num_out, dtype=torch.int64), [(weight, 1), (bias, 0)])

    def _linear(self, x: Value, weight: Tensor, bias: Tensor | None, out: Tensor) -> Labels | None:
        last, dims = len(x.shape) - 1, x.labels.dims()
        if dims and last not in dims:
            return x.labels  # its units lie along another dimension than the mixed one
        if dims not in ([], [last]):
            return None
        self._read(x, last, 0, x.shape[last], Use(self._names[id(weight)], 1))
        return self._produced(last, out.ndim, torch.zeros(len(weight), dtype=torch.int64), [(weight, 0), (bias, 0)])

    def _group_norm(self, x: Value, weight: Any, bias: Any, num_groups: int) -> Labels | None:
        """Units stay within their group. That whole groups could change places is not used."""
        if not set(x.labels.dims()) <= {1}:
            return None
        units, _ = x.along(1)
        if not x.labels.fixed:
            self.sites.append(Site(units, torch.arange(len(units)) * num_groups // len(units), once=False))
        return self._channels(x, (weight, bias))

    def _layer_norm(self, x: Value, weight: Any, bias: Any, normalized_shape: Sequence[int]) -> Labels | None:
        dims, first = x.labels.dims(), len(x.shape) - len(normalized_shape)
        if all(dim < first for dim in dims):
            return x.labels
        if len(dims) > 1:
            return None
        self._site(*x.along(dims[0]), [(weight, dims[0] - first), (bias, dims[0] - first)])
        return x.labels

    def _channels(self, x: Value, tensors: Sequence[Tensor | None]) -> Labels | None:
        """Label an operation on each channel of [N, C, …] by itself, with tensors [C]."""
        if not set(x.labels.dims()) <= {1}:
            return None
        if not x.labels.fixed:
            self._site(*x.along(1), [(tensor, 0) for tensor in tensors])
        return x.labels

    def _produced(
        self, dim: int, num_dims: int, group_of: Tensor, tensors: Sequence[tuple[Tensor | None, int]]
    ) -> Labels:
        """Return labels of new units. Units of the same group, int64 group_of [C], may change places."""
        if len(group_of) == 1:
            return fixed_labels(num_dims)
        units = self._new_units(len(group_of))
        self._site(units, group_of, tensors)
        return labels_along(dim, num_dims, units, torch.zeros_like(units))

    def _pointwise(self, values: Sequence[Value], parameters: Sequence[Tensor], out: Tensor) -> Labels | None:
        moving = [value for value in values if not value.labels.fixed]
        if not moving:
            return fixed_labels(out.ndim)
        labels, pairs = joined(moving, out.ndim)
        dims = labels.dims()
        for value in values:
            axes_of_units = [dim - (out.ndim - len(value.shape)) for dim in dims]
            if any(d >= 0 and value.shape[d] > 1 and value.labels.units.shape[d] == 1 for d in axes_of_units):
                return None  # the value differs along a dimension in which it has no units
        for parameter in parameters:
            axes_of_units = [dim - (out.ndim - parameter.ndim) for dim in dims]
            axes = [axis for axis in axes_of_units if axis >= 0 and parameter.shape[axis] > 1]
            if axes and len(dims) > 1:
                return None
            if axes:
                self._site(labels.units.flatten(), labels.roles.flatten(), [(parameter, axes[0])])
        if pairs:
            self.pairs += pairs
            self._mixed(Value("", out.shape, labels))
        return labels

    def _reduced(self, x: Value, dims: Any, out: Tensor) -> Labels | None:
        """Label a mean or the like, over all units, which leaves nothing to permute, or along other dimensions."""
        if isinstance(dims, bool):
            return None  # std(unbiased)
        listed = range(len(x.shape)) if dims is None else dims if isinstance(dims, tuple | list) else [dims]
        reduced, unit_dims = {dim % len(x.shape) for dim in listed}, set(x.labels.dims())
        if unit_dims <= reduced:
            self._mixed(x)
            return fixed_labels(out.ndim)
        if unit_dims & reduced:
            return None
        dims_left = [dim for dim in range(len(x.shape)) if dim not in reduced or out.ndim == len(x.shape)]
        shape = [x.labels.units.shape[dim] for dim in dims_left]
        return Labels(x.labels.units.reshape(shape), x.labels.roles.reshape(shape))

    def _mixed(self, x: Value) -> Labels:
        """Label an operation that treats all units of a tensor alike, but only as a whole."""
        if not x.labels.fixed:
            self.sites.append(Site(x.labels.units.flatten(), x.labels.roles.flatten(), once=False))
        return x.labels

    def _pad(self, x: Value, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Labels | None:
        """Constant new channels are units that may change places with one another, such as a shortcut's zeros."""
        labels, dims = x.labels, x.labels.dims()
        for i in range(len(pad) // 2):
            dim, (num_before, num_after) = len(x.shape) - 1 - i, pad[2 * i : 2 * i + 2]
            if dim not in dims or not (num_before or num_after):
                continue
            if dims != [dim] or mode != "constant" or min(num_before, num_after) < 0:
                return None
            units, roles = x.along(dim)
            new_units = self._new_units(num_before + num_after)
            self._site(new_units, torch.zeros_like(new_units), [])
            units = torch.cat([new_units[:num_before], units, new_units[num_before:]])
            roles = torch.cat([roles.new_zeros(num_before), roles, roles.new_zeros(num_after)])
            labels = labels_along(dim, len(x.shape), units, roles)
        return labels

    def _new_units(self, num: int) -> Tensor:
        self.num_units += num
        return torch.arange(self.num_units - num, self.num_units)

    def _site(self, units: Tensor, roles: Tensor, tensors: Sequence[tuple[Tensor | None, int]]) -> None:
        uses = tuple(Use(self._names[id(tensor)], axis) for tensor, axis in tensors if tensor is not None)
        self._add(Site(units, roles, uses))

    def _read(self, x: Value, dim: int, first: int, num: int, use: Use) -> None:
        """Note that a layer mixes `num` entries of a tensor with an axis of its weights."""
        if not x.labels.fixed:
            units, roles = (part[first : first + num] for part in x.along(dim))
            self._add(Site(units, roles, (use,)))

    def _add(self, site: Site) -> None:
        """Add a site with parameters. Units on an axis that was met before are the same as the units met then."""
        new_uses = []
        for use in site.uses:
            axis_sites = self._axes.setdefault(use, [])
            axis_sites.append(site)
            if len(axis_sites) == 1:
                new_uses.append(use)
                continue
            self.pairs.append((axis_sites[0].units, site.units))
            if not torch.equal(axis_sites[0].roles, site.roles):
                self.held.append((site.units, f"{use.names[0]}, which is used in two ways"))
        self.sites.append(dataclasses.replace(site, uses=tuple(new_uses)))

    def _hold(self, n: Node, args: Any, kwargs: Any) -> None:
        """Keep the units of an unknown operation in place.

        Raises:
            ValueError: if the operation has parameters, of whose axes nothing is known.
        """
        if self._tensors(n, args, kwargs):
            raise operations.refusal(f"nothing is known of {operations.where(n)}")
        for value in find_values((args, kwargs)):
            if not value.labels.fixed:
                self.held.append((value.labels.units.flatten(), operations.where(n)))

    def _tensors(self, n: Node, args: Any, kwargs: Any) -> list[Tensor]:
        """Return the parameters and buffers that a node uses."""
        if n.op == "call_module":
            return list(self.fetch_attr(str(n.target)).state_dict(keep_vars=True).values())
        return find_tensors((args, kwargs))


def _pooled(x: Value, name: str, out: Tensor) -> Labels | None:
    """Label an operation along the dimensions after [N, C]. A name like max_pool2d tells their number."""
    num = next((int(letter) for letter in name if letter.isdigit()), len(x.shape) - 2)
    is_known = len(x.shape) == out.ndim == num + 2 and all(dim < 2 for dim in x.labels.dims())
    return x.labels if is_known else None
