"""torch's methods that stay out of compiled code, without the import of its compiler: more than a second of a CPU.

torch keeps them out by importing torch._dynamo when they are first called, in every process that makes a step.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch.optim import Optimizer

Kind = TypeVar("Kind", bound=type[Optimizer])
_MADE = "__dynamo_disable"  # where torch's decorator keeps what it has made of a method


def _call(plain: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call it out of compiled code, if there may be any."""
    if "torch._dynamo" not in sys.modules:
        return plain(*arguments, **options)
    disabled = torch._dynamo.disable(plain, wrapping=False)
    setattr(plain, _MADE, disabled)  # from now on
    return disabled(*arguments, **options)


def import_no_compiler_for(method: Any) -> None:
    """Have a method that torch has decorated so import the compiler no more."""
    if plain := getattr(method, "__wrapped__", None):
        setattr(plain, _MADE, partial(_call, plain))


def lean(kind: Kind) -> Kind:
    """Return the optimizer with a step that imports no compiler, where nothing else has."""
    layers: list[Any] = [kind.step]
    while hasattr(layers[-1], "__wrapped__"):
        layers.append(layers[-1].__wrapped__)
    if len(layers) != 2 + hasattr(kind.step, "hooked"):  # another torch's, whose decorators may do more
        return kind
    *_, torchs, plain = layers  # the one before calls hooks, as it will of what is returned

    def step(self: Any, closure: Callable[[], float] | None = None) -> Any:
        if "torch._dynamo" in sys.modules:
            return torchs(self, closure)
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return plain(self, closure)

    return type(kind.__name__, (kind,), {"step": step})  # pyright: ignore[reportReturnType]


for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
    import_no_compiler_for(getattr(Optimizer, name))
