"""Properties of a network: its parameters, its running statistics, and whether it draws random numbers."""

import copy
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def num_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters: P of the overdetermination ratio."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def has_batch_norm(model: nn.Module) -> bool:
    """Return True if the network keeps running statistics that must be recomputed for averaged weights."""
    return bool(learning_batch_norms(model))


def trainable_names(model: nn.Module) -> frozenset[str]:
    """Return the state dict's keys of trainable parameters; tied parameters are under each of their names."""
    return frozenset(name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad)


def tied_names(weights: Mapping[str, Tensor]) -> list[list[str]]:
    """Return the keys of a network's state dict that share one tensor, as tied weights do, in the dict's order.

    Give state_dict(keep_vars=True): some tensors, such as fake ones, tell no address, and only their objects differ.
    """
    names = defaultdict[Any, list[str]](list)
    for name, tensor in weights.items():
        if tensor.numel():
            names[tensor.data_ptr() or id(tensor), tensor.dtype, tensor.shape, tensor.stride()].append(name)
    return [group for group in names.values() if len(group) > 1]


def averaged_names(model: nn.Module) -> frozenset[str]:
    """Return the state dict's keys that may be averaged over members: trainable parameters and running statistics.

    Everything else is taken from one member: frozen parameters, masks, codebooks, counters, the vectors of spectral
    norm, and the statistics of batch norms that stay in evaluation mode.
    """
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    learning = [name for name, module in modules_in_training(model) if _keeps_statistics(module)]
    keys = {f"{name}.{statistic}".lstrip(".") for name in learning for statistic in statistics}
    return trainable_names(model) | (keys & model.state_dict().keys())


def learning_batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Return the batch norms whose running statistics change in training and must be recomputed for averaged weights.

    Batch norms that train() leaves in evaluation mode, or whose momentum is 0, are not among them.
    """
    batch_norms = {id(m): m for _, m in modules_in_training(model) if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    return [module for module in batch_norms.values() if module.track_running_stats and _keeps_statistics(module)]


def modules_in_training(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the names and modules that model.train() puts in training mode. The modes are restored afterwards."""
    with modes_restored(model):
        model.train()
        return [(name, m) for name, m in model.named_modules(remove_duplicate=False) if m.training]


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """Restore each module's mode, training or evaluation, after the block."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


def _keeps_statistics(module: nn.Module) -> bool:
    return isinstance(getattr(module, "running_mean", None), Tensor) and getattr(module, "momentum", None) != 0


def has_dropout(model: nn.Module) -> bool:
    """Return True if the network draws random numbers in train mode: dropout or stochastic depth with p > 0.

    Dropout that a user's forward() calls as a function is not detected.
    """
    return any(_dropout_rate(module) > 0 for module in model.modules())


def _dropout_rate(module: nn.Module) -> float:
    is_dropout = isinstance(module, nn.modules.dropout._DropoutNd) or type(module).__name__ == "StochasticDepth"
    # Attention (torch's and Swin's) and recurrent layers store their rate as the attribute `dropout`.
    rate = module.p if is_dropout else getattr(module, "dropout", 0.0)
    return rate if isinstance(rate, int | float) else 0.0


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the type of a network's first parameter that is no integer, to which inputs are cast; else float32."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point() or p.is_complex()), torch.float32)


def lost_in_copies(model: nn.Module) -> str | None:
    """Return in words what would not work in a copy of the network; None if all would.

    A copied parameter has no hooks on its gradient, and a copied hook that is a closure uses the first network's
    tensors.
    """
    for name, parameter in model.named_parameters():
        if any(getattr(parameter, kind) for kind in ("_backward_hooks", "_post_accumulate_grad_hooks")):
            return f"a hook on the gradient of {name}"
    for name, module in model.named_modules():
        kinds = (f"_{kind}_hooks" for kind in ("forward_pre", "forward", "backward_pre", "backward"))
        if any(getattr(hook, "__closure__", None) for kind in kinds for hook in vars(module)[kind].values()):
            return f"a hook of {name or type(module).__name__} that is a closure"
    return None


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy of a network, which shares attributes that cannot be copied, such as locks.

    For hooks, see lost_in_copies().
    """
    try:
        return deep_copy(model)
    except Exception:  # a user's attribute may raise anything
        shared = {}
        for module in model.modules():
            for name, value in vars(module).items():
                if name not in ("_parameters", "_buffers", "_modules"):
                    try:
                        copy.deepcopy(value)
                    except Exception:  # likewise
                        shared[id(value)] = value
        return deep_copy(model, shared)


def deep_copy(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Return copy.deepcopy(model, memo), with what torch leaves out: attributes that the user gave parameters.

    By them, an optimizer of the user's can tell parameters apart.
    """
    copy_of_model = copy.deepcopy(model, memo)
    for parameter, its_copy in zip(model.parameters(), copy_of_model.parameters(), strict=True):
        vars(its_copy).update(vars(parameter))
    return copy_of_model


@contextmanager
def torch_as_new() -> Iterator[None]:
    """Have torch behave in the block as in a new process, such as an actor: float32, on the CPU, with gradients.

    The caller's default type and device, inference mode and no_grad() are restored after it.
    """
    dtype, is_on_cpu = torch.get_default_dtype(), torch.get_default_device().type == "cpu"
    with torch.inference_mode(False), torch.enable_grad(), nullcontext() if is_on_cpu else torch.device("cpu"):
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


@contextmanager
def generators_restored() -> Iterator[None]:
    """Restore Python's and NumPy's global generators after the block; build_model() restores torch's."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
