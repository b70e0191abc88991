"""Runs torch's methods that stay out of compiled code without importing its compiler, which takes a CPU over a second.

torch keeps them out by importing torch._dynamo when they are first called, in every process that makes a step.
"""

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

Kind = TypeVar("Kind", bound=type[Optimizer])
_DISABLED = "__dynamo_disable"  # the attribute in which torch's decorator keeps the disabled method


def _call(plain: Callable[..., Any], recursive: bool, *arguments: Any, **options: Any) -> Any:
    """Call the function, outside compiled code if there may be any."""
    if "torch._dynamo" not in sys.modules:
        return plain(*arguments, **options)
    disabled = torch._dynamo.disable(plain, recursive, wrapping=False)
    setattr(plain, _DISABLED, disabled)  # for the next calls
    return disabled(*arguments, **options)


def import_no_compiler_for(method: Any, *, recursive: bool = True) -> None:
    """Stop a method that torch's decorator wraps from importing the compiler; recursive is the decorator's."""
    if plain := getattr(method, "__wrapped__", None):
        setattr(plain, _DISABLED, partial(_call, plain, recursive))


def lean(kind: Kind) -> Kind:
    """Return the optimizer class with a step that does not import the compiler, unless it is imported already."""
    layers: list[Any] = [kind.step]
    while hasattr(layers[-1], "__wrapped__"):
        layers.append(layers[-1].__wrapped__)
    if len(layers) != 2 + hasattr(kind.step, "hooked"):  # another torch version, whose decorators may do more
        return kind
    *_, torchs_step, plain = layers  # outermost first; the first layer calls hooks, as it does for the returned class

    def step(self: Any, closure: Callable[[], float] | None = None) -> Any:
        if "torch._dynamo" in sys.modules:
            return torchs_step(self, closure)
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return plain(self, closure)

    return type(kind.__name__, (kind,), {"step": step})  # pyright: ignore[reportReturnType]


class _Compiler:
    """Stands in for torch._dynamo: it knows the default of one setting, and imports the compiler for all else."""

    utils = property(lambda self: self)

    def get_optimize_ddp_mode(self) -> str:
        return "ddp_optimizer"

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module("torch._dynamo"), name)


def data_parallel(model: nn.Module, **options: Any) -> DistributedDataParallel:
    """Return DistributedDataParallel of the model, which asks the compiler only for what matters to compiled code."""
    if "torch._dynamo" in sys.modules:
        return DistributedDataParallel(model, **options)
    names: dict[str, Any] = torch.__dict__
    names["_dynamo"] = _Compiler()
    try:
        return DistributedDataParallel(model, **options)
    finally:
        del names["_dynamo"]  # torch looks it up again


import_no_compiler_for(getattr(DistributedDataParallel._inside_ddp_forward, "__wrapped__", None), recursive=False)
for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
    import_no_compiler_for(getattr(Optimizer, name))
