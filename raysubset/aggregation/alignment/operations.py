"""Operations with a known effect on units, by name and by type of module."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx.node import Node
from torch.nn.modules.batchnorm import _BatchNorm

# By name, so that F.relu, torch.relu, Tensor.relu_ and nn.ReLU are the same
POINTWISE = frozenset({
    "abs", "add", "alphadropout", "celu", "clamp", "clone", "contiguous", "detach", "div", "dropout", "dropout1d",
    "dropout2d", "dropout3d", "elu", "exp", "featurealphadropout", "float", "gelu", "hardshrink", "hardsigmoid",
    "hardswish", "hardtanh", "iadd", "identity", "imul", "isub", "itruediv", "leakyrelu", "log", "logsigmoid",
    "maximum", "minimum", "mish", "mul", "neg", "pow", "relu", "relu6", "selu", "sigmoid", "silu", "softplus",
    "softshrink", "softsign", "sqrt", "square", "stochasticdepth", "sub", "tanh", "tanhshrink", "threshold", "truediv",
})  # fmt: skip
MOVING = frozenset({
    "cat", "channelshuffle", "chunk", "concat", "expand", "flatten", "flip", "getitem", "movedim", "narrow", "permute",
    "pixelshuffle", "pixelunshuffle", "repeat", "reshape", "roll", "select", "split", "squeeze", "stack", "swapaxes",
    "t", "tile", "transpose", "unbind", "unflatten", "unsqueeze", "view",
})  # fmt: skip
POOLING = frozenset(
    f"{kind}{num}d"
    for kind in ("maxpool", "avgpool", "lppool", "adaptiveavgpool", "adaptivemaxpool", "zeropad", "reflectionpad",
                 "replicationpad")
    for num in (1, 2, 3)
) | {"interpolate", "upsample"}  # fmt: skip
REDUCING = frozenset({"mean", "sum", "amax", "amin", "std", "var"})
MIXING = frozenset({"softmax", "logsoftmax", "normalize"})  # these treat all entries of a dimension alike
CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
TRANSPOSED = frozenset({"convtranspose1d", "convtranspose2d", "convtranspose3d"})
NORMS = frozenset({
    "batchnorm1d", "batchnorm2d", "batchnorm3d", "syncbatchnorm", "instancenorm1d", "instancenorm2d", "instancenorm3d",
})  # fmt: skip


def kind(node: Node, module: nn.Module | None) -> str | None:
    """Return a node's operation by a name as above; None unless it is torch's, Python's or torchvision's own.

    Args:
        module: that the node calls, if any. A subclass of torch's has no name, as it may compute anything.
    """
    if module is not None:
        return type(module).__name__.lower() if type(module).__module__.startswith("torch.nn.modules.") else None
    root = (getattr(node.target, "__module__", None) or "builtins").split(".")[0]
    if node.op == "call_function" and root not in ("builtins", "_operator", "torch", "torchvision"):
        return None
    return operation_name(node).lower().replace("_", "")


def operation_name(node: Node) -> str:
    """Return the name of the function or method that a node calls, without the underscore of in-place methods."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.rstrip("_")


def operation(node: Node) -> Callable[..., Any]:
    """Return what a node calls, as a function of all its arguments."""
    if node.op == "call_function":
        assert callable(node.target)
        return node.target
    return lambda self, *args, **kwargs: getattr(self, str(node.target))(*args, **kwargs)


def where(node: Node) -> str:
    """Return a node in words: its operation, and the module that it is in."""
    modules = list(node.meta.get("nn_module_stack", {}).values())
    path, kind = modules[-1] if modules else ("", "")
    kind = getattr(kind, "__name__", kind)
    place = f"{path} ({kind})" if path else "the network"
    return place if node.op == "call_module" else f"{operation_name(node)} in {place}"


def read_by_batch_norm_alone(node: Node, network: nn.Module) -> bool:
    """Return True if only batch norms read the node, so that they normalise its scale away."""
    return all(
        user.op == "call_module" and isinstance(network.get_submodule(str(user.target)), _BatchNorm)
        for user in node.users
    )


def refusal(reason: str) -> ValueError:
    """Return the error for a network whose units cannot be aligned."""
    return ValueError(
        f"this network's units cannot be aligned: {reason}; use subsets.start=shared with another aggregation.method, "
        "or aggregation.method=select_best"
    )
