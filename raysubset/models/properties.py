"""What is asked of any network: its parameters, its running statistics, whether it draws random numbers."""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from torch import Tensor, nn


def num_parameters(model: nn.Module) -> int:
    """Trainable parameters: the P of the overdetermination ratio."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def has_batch_norm(model: nn.Module) -> bool:
    """Whether the network keeps running statistics that must be recomputed for averaged weights."""
    return bool(learning_batch_norms(model))


def trainable_names(model: nn.Module) -> frozenset[str]:
    """Keys of the state dict that training may change by its gradient; tied parameters under each of their names."""
    return frozenset(name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad)


def averaged_names(model: nn.Module) -> frozenset[str]:
    """Keys of the state dict of which a mean over members means something: trainable parameters, running statistics.

    Everything else - frozen parameters, masks, codebooks, counters, the vectors of spectral norm, the statistics of
    batch norm that a network keeps in evaluation mode - stays as one member has it.
    """
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    learning = [name for name, module in modules_in_training(model) if _keeps_statistics(module)]
    keys = {f"{name}.{statistic}".lstrip(".") for name in learning for statistic in statistics}
    return trainable_names(model) | (keys & model.state_dict().keys())


def learning_batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Batch norms whose running statistics change in training, and must be recomputed for averaged weights.

    Those that train() leaves in evaluation mode, or whose momentum is 0, are not among them.
    """
    found = {id(m): m for _, m in modules_in_training(model) if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    return [module for module in found.values() if module.track_running_stats and _keeps_statistics(module)]


def modules_in_training(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that model.train() puts in training mode, by name; the modes are left as they were."""
    with modes_restored(model):
        model.train()
        return [(name, m) for name, m in model.named_modules(remove_duplicate=False) if m.training]


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """Every module in the mode it had, training or evaluation, afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


def _keeps_statistics(module: nn.Module) -> bool:
    return isinstance(getattr(module, "running_mean", None), Tensor) and getattr(module, "momentum", None) != 0


def has_dropout(model: nn.Module) -> bool:
    """Whether modules of the network draw random numbers in train mode: dropout or stochastic depth with p > 0.

    Dropout that a user's forward() calls as a function is not seen.
    """
    return any(_dropout_rate(module) > 0 for module in model.modules())


def _dropout_rate(module: nn.Module) -> float:
    named = isinstance(module, nn.modules.dropout._DropoutNd) or type(module).__name__ == "StochasticDepth"
    # Attention (torch's and Swin's) and recurrent layers hold their rate as a number of this name.
    rate = module.p if named else getattr(module, "dropout", 0.0)
    return rate if isinstance(rate, int | float) else 0.0


def copied(model: nn.Module) -> nn.Module:
    """A copy of a network; attributes that cannot be copied, as locks, are shared with it."""
    try:
        return copy.deepcopy(model)
    except Exception:  # whatever an attribute of the user's raises
        shared = {}
        for module in model.modules():
            for name, value in vars(module).items():
                if name not in ("_parameters", "_buffers", "_modules"):
                    try:
                        copy.deepcopy(value)
                    except Exception:  # likewise
                        shared[id(value)] = value
        return copy.deepcopy(model, shared)


@contextmanager
def generators_restored() -> Iterator[None]:
    """Python's and NumPy's global generators as they were, afterwards; torch's are seen to by build_model()."""
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002
