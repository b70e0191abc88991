"""The user's own network: what their function returns, tried before it is used."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from raysubset.models.properties import num_parameters
from raysubset.models.trying import try_evaluation, try_training
from raysubset.tasks import Spec
from raysubset.user_functions import call_function, load_function


def users_network(name: str, spec: Spec) -> nn.Module:
    """The network of a user's function, float32, without torch's wrappers that spread it over cards or compile it.

    Raises:
        ValueError: if there is none, it cannot be trained, or it gives anything but float [N, *spec.outputs].
    """
    model = unwrapped(call_function("model.name", name, *_arguments(name, load_function("model.name", name), spec)))
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name} returned a {type(model).__name__}; it should return an nn.Module")
    model.to("cpu")
    _refuse_complex(name, model)
    model._apply(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor).eval()
    try_evaluation(name, model, spec)
    if not num_parameters(model):
        raise ValueError(f"{name} has no trainable parameters: there is nothing to minimize over")
    try_training(name, model, spec)
    return model


def unwrapped(model: Any) -> Any:
    """A network without what spreads it over cards or compiles it; anything else as it is."""
    if isinstance(model, nn.DataParallel):
        model = model.module
    return getattr(model, "_orig_mod", model)  # torch.compile's


def _arguments(name: str, function: Callable[..., Any], spec: Spec) -> tuple[Any, ...]:
    """(spec,), or (num_classes, (C, H, W)) for a function of two arguments, or none for one of none.

    Raises:
        ValueError: for one of two, where inputs are no images or outputs no [N, num_classes].
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some that are written in C have none
        return (spec,)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    num_required = sum(p.default is p.empty for p in positional)
    takes_more = len(positional) > 1 or any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if not positional and not takes_more:
        return ()
    if num_required == 1 or (num_required == 0 and not takes_more):
        return (spec,)
    if not spec.is_image or spec.num_values is not None or len(spec.outputs) != 1:
        raise ValueError(
            f"{name} takes (num_classes, (C, H, W)), but inputs are {list(spec.inputs)} and outputs "
            f"{list(spec.outputs)} an example: write it as a function of one argument, a raysubset.tasks.Spec"
        )
    return (*spec.outputs, spec.inputs)


def _refuse_complex(name: str, model: nn.Module) -> None:
    """Raises ValueError for complex parameters: optimizers, means and their statistics here are of real numbers."""
    for key, parameter in model.named_parameters():
        if parameter.is_complex():
            raise ValueError(
                f"{name}: parameter {key} is complex; hold real and imaginary parts as one real parameter [..., 2] and "
                "use torch.view_as_complex in forward()"
            )
