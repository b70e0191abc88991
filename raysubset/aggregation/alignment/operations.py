"""Operations whose effect on units is known, by name and by type of module."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx.node import Node
from torch.nn.modules.batchnorm import _BatchNorm

# By name, so that F.relu, torch.relu, Tensor.relu and Tensor.relu_ are one.
POINTWISE = frozenset({
    "abs", "add", "clamp", "clone", "contiguous", "detach", "div", "dropout", "dropout1d", "dropout2d",
    "dropout3d", "elu", "exp", "float", "gelu", "hardsigmoid", "hardswish", "hardtanh", "iadd", "imul", "isub",
    "itruediv", "leaky_relu", "log", "maximum", "minimum", "mish", "mul", "neg", "pow", "relu", "relu6", "selu",
    "sigmoid", "silu", "softplus", "softsign", "sqrt", "square", "stochastic_depth", "sub", "tanh", "truediv",
})  # fmt: skip
MOVING = frozenset({
    "cat", "channel_shuffle", "chunk", "concat", "expand", "flatten", "flip", "getitem", "movedim", "narrow",
    "permute", "pixel_shuffle", "pixel_unshuffle", "repeat", "reshape", "roll", "select", "split", "squeeze",
    "stack", "swapaxes", "t", "tile", "transpose", "unbind", "unflatten", "unsqueeze", "view",
})  # fmt: skip
POOLING = frozenset(
    f"{kind}_pool{num}d" for kind in ("max", "avg", "lp", "adaptive_avg", "adaptive_max") for num in (1, 2, 3)
) | {"interpolate"}  # fmt: skip
REDUCING = frozenset({"mean", "sum", "amax", "amin", "std", "var"})
MIXING = frozenset({"softmax", "log_softmax", "normalize"})  # treat all entries of a dimension alike

POINTWISE_MODULES = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid,
    nn.Tanh, nn.Softplus, nn.Softsign, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.LogSigmoid, nn.Tanhshrink,
    nn.Hardshrink, nn.Softshrink, nn.Threshold, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)  # fmt: skip
MOVING_MODULES = (nn.Flatten, nn.Unflatten, nn.ChannelShuffle, nn.PixelShuffle, nn.PixelUnshuffle)
POOLING_MODULES = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.LPPool1d, nn.LPPool2d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d, nn.Upsample, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ReflectionPad1d,
    nn.ReflectionPad2d, nn.ReplicationPad1d, nn.ReplicationPad2d,
)  # fmt: skip
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)  # fmt: skip
MIXING_MODULES = (nn.Softmax, nn.LogSoftmax)


def is_known_function(function: Any) -> bool:
    """Whether a function is torch's, Python's or torchvision's own, so that its name says what it does."""
    root = (getattr(function, "__module__", None) or "builtins").split(".")[0]
    return root in ("builtins", "_operator", "torch", "torchvision")


def operation_name(node: Node) -> str:
    """The name of the function or method that a node calls, without the underscore of those that work in place."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.rstrip("_")


def operation(node: Node) -> Callable[..., Any]:
    """What a node calls, as a function of all its arguments."""
    if node.op == "call_function":
        assert callable(node.target)
        return node.target
    return lambda self, *args, **kwargs: getattr(self, str(node.target))(*args, **kwargs)


def where(node: Node) -> str:
    """A node in words: its operation, and the module it stands in."""
    modules = list(node.meta.get("nn_module_stack", {}).values())
    path, kind = modules[-1] if modules else ("", "")
    kind = getattr(kind, "__name__", kind)
    place = f"{path} ({kind})" if path else "the network"
    return place if node.op == "call_module" else f"{operation_name(node)} in {place}"


def read_by_batch_norm_alone(node: Node, network: nn.Module) -> bool:
    """Whether a node's scale is normalised away wherever it is read."""
    return all(
        user.op == "call_module" and isinstance(network.get_submodule(str(user.target)), _BatchNorm)
        for user in node.users
    )


def refusal(reason: str) -> ValueError:
    """The error for a network whose units are not known well enough."""
    return ValueError(
        f"this network's units cannot be aligned: {reason}; use subsets.start=shared with another aggregation.method, "
        "or aggregation.method=select_best"
    )
