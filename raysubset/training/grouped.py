"""Forward passes of many members of one architecture at once, with stacked weights.

Activations of K members stay as [N, K, C, H, W] in the memory of [N, K·C, H, W]. A convolution then has K times its
groups, batch normalisation K times its channels, a linear layer is one batched product, and all else works as it is.
This needs a graph of known operations, as torch.fx traces it. Any other network goes through torch.func.vmap as it is,
which moves members beside examples around every layer: four of the small CNN then take three times as long on a CPU
thread.
"""

import contextlib
import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from raysubset.models import copied

Forward = Callable[[Mapping[str, Tensor], Tensor], Tensor]
"""f(parameters and buffers by name [K, …], inputs [N, K, …]) -> outputs [N, K, …]."""

_ELEMENTWISE = (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.Tanh, nn.Identity)
_ELEMENTWISE_FUNCTIONS = (F.relu, torch.relu, F.gelu, F.silu, torch.tanh, torch.add, operator.add)


def forward_of_all(network: nn.Module) -> Forward:
    """Return the network in train mode as a function of stacked weights. It updates running statistics in place.

    The network itself is left alone. If vmap cannot run it, the first call raises torch's RuntimeError.
    """
    network = copied(network).train()
    if (folded := _folded(network)) is not None:
        return lambda tensors, images: functional_call(folded, dict(tensors), (images,))

    def forward_of_one(tensors: dict[str, Tensor], images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the outputs, and the buffers to which forward() assigned new tensors."""
        given = dict(tensors)
        outputs = functional_call(network, tensors, (images,))  # puts these new tensors into its argument
        return outputs, {name: tensor.detach() for name, tensor in tensors.items() if tensor is not given[name]}

    mapped = vmap(forward_of_one, in_dims=(0, 1), out_dims=(1, 0), randomness="error")

    def forward(tensors: Mapping[str, Tensor], images: Tensor) -> Tensor:
        fused = images.device.type != "cpu"  # on a CPU vmap would take members' attention one by one
        with contextlib.nullcontext() if fused else sdpa_kernel(SDPBackend.MATH):
            outputs, assigned = mapped(dict(tensors), images)
        for name, tensor in assigned.items():
            tensors[name].copy_(tensor)
        return outputs

    return forward


def _folded(network: nn.Module) -> nn.Module | None:
    """Return a copy of the network on [N, K, C, H, W] and [N, K, F]; None if a part is unknown.

    A graph lacks what forward() itself does to buffers, which happens while it is traced.
    """
    if _has_hooks(network):  # a graph lacks those of the whole network
        return None
    tried = copied(network)
    try:
        traced = fx.symbolic_trace(tried)
    except Exception:  # tracing runs the user's forward() on stand-ins, which may raise anything
        return None
    buffers = dict(tried.named_buffers())
    if not all(
        isinstance(buffers[name], Tensor) and torch.equal(buffers[name], old) for name, old in network.named_buffers()
    ):
        return None
    if not all(_fold(node, traced) for node in traced.graph.nodes):
        return None
    for node in traced.graph.nodes:
        if node.op == "call_module":
            module = traced.get_submodule(node.target)
            if getattr(module, "inplace", False):
                module.__dict__["inplace"] = False  # an in-place operation on a view costs autograd a copy
            module.__dict__["forward"] = _layer(module)
    traced.recompile()
    return traced


def _fold(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Let an operation leave the dimension of members alone; return False if the operation is unknown."""
    if node.op in ("placeholder", "output"):
        return True
    if node.op == "call_module":
        module = traced.get_submodule(str(node.target))
        is_torchs = type(module).__module__.startswith("torch.nn.modules.")  # parametrized layers are not
        return is_torchs and not _has_hooks(module) and _layer(module) is not None
    if node.op != "call_function":
        return False
    inputs, options = node.args[0] if node.args else None, node.args[1:]
    if node.target is operator.iadd:  # in place, as above
        node.target = operator.add
    elif node.target is torch.flatten and options == (1,) and not node.kwargs:
        node.args = (inputs, 2)
    elif node.target is operator.getitem:  # its slices are counted from the front
        keys = options[0]
        if not isinstance(keys, tuple) or keys[0] != slice(None):
            return False
        node.args = (inputs, (slice(None), *keys))
    elif node.target is F.pad:  # counted from the back
        return isinstance(options[0], tuple | list) and len(options[0]) <= 6
    else:
        return node.target in _ELEMENTWISE_FUNCTIONS
    return True


def _has_hooks(module: nn.Module) -> bool:
    """Return True if functions of the user's see the module's inputs or outputs, which would have more dimensions."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


def _layer(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Return a layer's function on [N, K, …], with its parameters and buffers stacked; None if the layer is unknown."""
    match module:
        case nn.Conv2d() if module.padding_mode == "zeros":
            return partial(_convolution, module)
        case nn.BatchNorm2d() if module.affine and module.track_running_stats and module.momentum is not None:
            return partial(_batch_norm, module)
        case nn.GroupNorm() if module.affine:
            return partial(_group_norm, module)
        case nn.Linear():
            return partial(_linear, module)
        case nn.Flatten() if (module.start_dim, module.end_dim) == (1, -1):
            return partial(torch.flatten, start_dim=2)
        case nn.MaxPool2d() | nn.AvgPool2d() | nn.AdaptiveAvgPool2d() if not getattr(module, "return_indices", False):
            return partial(_channelwise, module.forward)
    return module.forward if isinstance(module, _ELEMENTWISE) else None


def _channelwise(f: Callable[[Tensor], Any], images: Tensor) -> Tensor:
    """Apply f to [N, K·C, H, W], which is a view of the same memory."""
    num = images.shape[1]  # for one member, flatten() would give a single channel strides that hide channels-last
    folded = images.squeeze(1) if num == 1 else images.flatten(1, 2)
    return f(folded).unflatten(1, (num, -1))


def _convolution(layer: nn.Conv2d, images: Tensor) -> Tensor:
    weight, bias = layer.weight.flatten(0, 1), None if layer.bias is None else layer.bias.flatten()
    groups = layer.groups * images.shape[1]
    stride, padding, dilation = layer.stride, layer.padding, layer.dilation
    return _channelwise(lambda x: F.conv2d(x, weight, bias, stride, padding, dilation, groups), images)  # pyright: ignore


def _batch_norm(layer: nn.BatchNorm2d, images: Tensor) -> Tensor:
    mean, variance, count = layer.running_mean, layer.running_var, layer.num_batches_tracked
    assert mean is not None
    assert variance is not None
    assert count is not None
    assert layer.momentum is not None
    if layer.training:
        count.add_(1)
    running = mean.view(-1), variance.view(-1)  # views, as they are updated in place
    affine = layer.weight.flatten(), layer.bias.flatten()
    options = (layer.training, layer.momentum, layer.eps)
    return _channelwise(lambda x: F.batch_norm(x, *running, *affine, *options), images)


def _group_norm(layer: nn.GroupNorm, images: Tensor) -> Tensor:
    groups, weight, bias = layer.num_groups * images.shape[1], layer.weight.flatten(), layer.bias.flatten()
    return _channelwise(lambda x: F.group_norm(x, groups, weight, bias, layer.eps), images)


def _linear(layer: nn.Linear, features: Tensor) -> Tensor:
    """Map [N, K, …, F] to [N, K, …, M]."""
    rows, factors = features.transpose(0, 1), layer.weight.transpose(1, 2)
    inner_shape = rows.shape[1:-1]
    rows = rows if len(inner_shape) == 1 else rows.flatten(1, -2)
    products = torch.bmm(rows, factors) if layer.bias is None else torch.baddbmm(layer.bias[:, None], rows, factors)
    return (products if len(inner_shape) == 1 else products.unflatten(1, inner_shape)).transpose(0, 1)
