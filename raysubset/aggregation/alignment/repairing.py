"""REPAIR (arXiv:2211.08403): averaging shrinks the variance of activations, and this restores it layer by layer."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from raysubset.aggregation.alignment.tracing import UnitStructure, walk
from raysubset.aggregation.alignment.unit_tracer import Layer

Statistics = dict[str, tuple[Tensor, Tensor]]
"""Mean and standard deviation, float64 [C] each, of a layer's output channels, by the layer's node."""

_LEAST_STD = 1e-6  # of the target's: a channel that varies less is constant, and no factor makes it vary


def layer_statistics(model: nn.Module, structure: UnitStructure, batches: Sequence[Tensor]) -> Statistics:
    """Return statistics over examples and pixels of the layers that repair() changes, in evaluation mode.

    Args:
        batches: as repair() takes them.
    """
    network, statistics = structure.network(model), Statistics()
    dims = {layer.node: layer.dim for layer in _repaired(network, structure)}
    with torch.no_grad():
        for steps in zip(*(walk(network, images) for images in batches), strict=True):
            name = steps[0][0].name
            if name in dims:
                mean, std, _ = _moments([value for _, value in steps], dims[name])
                statistics[name] = mean, std
    return statistics


def mean_statistics(members: Sequence[Statistics]) -> Statistics:
    """Return the mean of the members' means, and of their standard deviations: the target of REPAIR."""
    of_layers = {node: zip(*(member[node] for member in members), strict=True) for node in members[0]}
    return {node: (torch.stack(means).mean(0), torch.stack(stds).mean(0)) for node, (means, stds) in of_layers.items()}


def repair(model: nn.Module, structure: UnitStructure, targets: Statistics, batches: Sequence[Tensor]) -> None:
    """Give each layer's outputs the target means and standard deviations, in place, in forward order.

    A convolution or linear layer is changed through its weight and bias; without a bias only its standard deviation
    changes. If only batch norms read a layer, the norm is changed instead: its running statistics are set to those of
    the examples (the paper's RESET), then its own weight and bias. Group and layer norms are changed likewise. The
    logits' layer, frozen layers, and modules that are called more than once stay unchanged.

    All batches go through the network side by side, once, so that each layer sees repaired inputs. Memory holds the
    activations of all batches around one layer.

    Args:
        model: in evaluation mode.
        targets: of the same structure, from mean_statistics().
        batches: images [n, C, H, W] on the model's device.
    """
    network = structure.network(model)
    sites = {layer.node: (network.get_submodule(layer.module), layer.dim) for layer in _repaired(network, structure)}
    with torch.no_grad():
        walkers = [walk(network, images) for images in batches]
        inputs: dict[str, list[Tensor]] = {}  # of the batch norms to come
        for node in network.graph.nodes:
            layer, dim = sites.get(node.name, (None, 0))
            if isinstance(layer, _BatchNorm):
                _reset(layer, inputs.pop(node.name))
            values = [next(walker)[1] for walker in walkers]
            if layer is not None:
                _correct(layer, dim, values, *targets[node.name])
            inputs |= {
                user.name: values for user in node.users if isinstance(sites.get(user.name, (None,))[0], _BatchNorm)
            }


def _repaired(network: fx.GraphModule, structure: UnitStructure) -> list[Layer]:
    """Return the layers that repair() changes."""
    modules = [node.target for node in network.graph.nodes if node.op == "call_module"]
    frozen = {name.rpartition(".")[0] for name, p in network.named_parameters() if not p.requires_grad}
    return [layer for layer in structure.layers if modules.count(layer.module) == 1 and layer.module not in frozen]


def _reset(norm: _BatchNorm, inputs: Sequence[Tensor]) -> None:
    if norm.running_mean is None or norm.running_var is None:
        return
    mean, std, num = _moments(inputs, 1)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(std.square() * (num / max(1, num - 1)))  # unbiased, as torch keeps it


def _correct(layer: nn.Module, dim: int, values: Sequence[Tensor], target_mean: Tensor, target_std: Tensor) -> None:
    """Scale and shift the layer's outputs, and change the layer so that it computes them."""
    weight, bias = layer.weight, layer.bias
    if not isinstance(weight, Tensor):
        return
    mean, std, _ = _moments(values, dim)
    scale = torch.where(std > _LEAST_STD * target_std, target_std / std, 1.0)
    weight.mul_(scale.to(weight.dtype).view(-1, *[1] * (weight.ndim - 1)))
    shift = torch.zeros_like(mean)
    if isinstance(bias, Tensor):
        shift = target_mean - scale * mean
        bias.mul_(scale).add_(shift)
    for value in values:
        shape = [-1 if d == dim else 1 for d in range(value.ndim)]
        value.mul_(scale.to(value.dtype).view(shape)).add_(shift.to(value.dtype).view(shape))


def _moments(values: Iterable[Tensor], dim: int) -> tuple[Tensor, Tensor, int]:
    """Return mean and standard deviation of each channel, float64 [C], and the number of values of one."""
    total, total_of_squares, num = torch.zeros(()), torch.zeros(()), 0
    for value in values:
        rows = value.movedim(dim, 0).flatten(1).double()
        total, total_of_squares = total.to(rows) + rows.sum(1), total_of_squares.to(rows) + rows.square().sum(1)
        num += rows.shape[1]
    mean = total / num
    return mean, (total_of_squares / num - mean.square()).clamp_min(0).sqrt(), num
