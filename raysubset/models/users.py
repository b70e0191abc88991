"""Builds a user's own network by calling their function, and tries it on a few inputs before it is used."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from raysubset.errors import one_line, with_article
from raysubset.models.properties import copied, generators_restored, num_parameters
from raysubset.tasks import Spec
from raysubset.user_code.functions import call_function, load_function


def users_network(name: str, spec: Spec) -> nn.Module:
    """Return the network of a user's function, in float32, without the wrappers of DataParallel and torch.compile.

    Raises:
        ValueError: if there is no such function, or its network cannot be trained or does not return float
            [N, *spec.outputs].
    """
    model = unwrapped(call_function("model.name", name, *_arguments(name, load_function("model.name", name), spec)))
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name} returned {with_article(model)}; it should return an nn.Module")
    model.to("cpu")
    if (key := next((key for key, parameter in model.named_parameters() if parameter.is_complex()), None)) is not None:
        raise ValueError(  # optimizers, means and statistics here are of real numbers
            f"{name}: parameter {key} is complex; hold real and imaginary parts as one real parameter [..., 2] and use "
            "torch.view_as_complex in forward()"
        )
    if others := [key for key, value in model.state_dict().items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{name}: {others[0]} of the state dict is no tensor, and files of weights hold tensors alone")
    model._apply(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor).eval()
    _try_evaluation(name, model, spec)
    if not num_parameters(model):
        raise ValueError(f"{name} has no trainable parameters: there is nothing to minimize over")
    _try_training(name, model, spec)
    return model


def unwrapped(model: Any) -> Any:
    """Return a network without the wrappers of DataParallel and torch.compile; return anything else unchanged."""
    if isinstance(model, nn.DataParallel):
        model = model.module
    return getattr(model, "_orig_mod", model)  # torch.compile's


def _arguments(name: str, function: Callable[..., Any], spec: Spec) -> tuple[Any, ...]:
    """Return the arguments for a user's function: (spec,), or (num_classes, (C, H, W)) if it takes two, or none.

    Raises:
        ValueError: if it takes two and inputs are no images or outputs are not [N, num_classes].
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some functions that are written in C have no signature
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


def needs_default_layout(model: nn.Module) -> bool:
    """Return True if build_model() found that the network cannot be trained on channels-last images."""
    return any(hook is _in_default_layout for hook in model._forward_pre_hooks.values())


def _in_default_layout(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Hook: copy the images into memory [N, C, H, W]; contiguous() would keep the strides of a single channel."""
    return (inputs[0].clone(memory_format=torch.contiguous_format), *inputs[1:])


def _as_a_copy(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Hook: copy the inputs for a network that changes them in place."""
    return (inputs[0].clone(), *inputs[1:])


def _try_evaluation(name: str, model: nn.Module, spec: Spec) -> None:
    """Try two examples of zeros, then one, on a network in eval mode; raise the ValueError of users_network()."""
    for num in (2, 1):
        inputs = spec.zeros(num)
        try:
            with generators_restored(), torch.no_grad():
                outputs = model(inputs)
        except Exception as error:  # the user's forward() may raise anything
            description = f"{_kind(spec)}s of shape {list(inputs.shape)}{' [N, C, H, W]' if spec.is_image else ''}"
            suffix = "" if num > 1 else ", one alone, in evaluation mode"
            remedy = "these are zeros, which it must take, as an example that is all padding"
            raise ValueError(f"{name} cannot take {description}{suffix}: {one_line(error)}; {remedy}") from error
        _check_outputs(name, outputs, num, spec, "")


def _try_training(name: str, model: nn.Module, spec: Spec) -> None:
    """Try a step of two random examples on copies of a network: images in the actors' layout, then in torch's default.

    Refuse a network that fails in both, or whose outputs do not depend on its parameters.
    """
    reasons = []
    for layout in (torch.channels_last, torch.contiguous_format) if spec.is_image else (torch.contiguous_format,):
        network = copied(model).train()
        network.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
        inputs = spec.random(2, torch.default_generator)
        if layout is torch.channels_last:  # the memory of Examples, for one channel as well
            inputs = inputs.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format).permute(0, 3, 1, 2)
        passed = inputs.clone()
        try:
            with generators_restored(), torch.enable_grad():
                outputs = network(passed)
                if isinstance(outputs, Tensor) and outputs.requires_grad and outputs.is_floating_point():
                    outputs.sum().backward()
        except Exception as error:  # the user's forward() may raise anything
            reasons.append(one_line(error) + _drawn(spec, error))
            continue
        _check_outputs(name, outputs, len(inputs), spec, " in train mode")
        if not outputs.requires_grad:
            remedy = "leave no_grad(), detach() and NumPy out of its forward()"
            raise ValueError(f"{name} gave outputs in train mode that have no gradient: {remedy}")
        if reasons:
            model.register_forward_pre_hook(_in_default_layout)
        elif not torch.equal(passed, inputs):
            model.register_forward_pre_hook(_as_a_copy)
        return
    raise ValueError(f"{name} cannot take a step of training on two {_kind(spec)}s: {reasons[-1]}")


def _drawn(spec: Spec, error: Exception) -> str:
    """Say what the inputs were if the error may be due to numbers that are no ids of an embedding."""
    if not isinstance(error, IndexError):
        return ""
    drawn = f"integers below {spec.num_values}" if spec.num_values else "standard normal numbers"
    return f"; these are {drawn}: Spec(…, num_values=(60, 150, None)) says which entries are ids below 60 or 150"


def _kind(spec: Spec) -> str:
    return "image" if spec.is_image else "input"


def _check_outputs(name: str, outputs: Any, num: int, spec: Spec, when: str) -> None:
    """Raise a ValueError unless outputs are float [num, *spec.outputs]."""
    shape = ", ".join(map(str, spec.outputs))
    if not isinstance(outputs, Tensor):
        hint = "join several by torch.cat, which the loss() of a task of your own takes apart"
        if when:
            hint = "as it does in evaluation mode: leave its auxiliary heads out, or wrap it"
        raise ValueError(f"{name} gave {with_article(outputs)}{when}; it should give outputs [N, {shape}]: {hint}")
    if outputs.shape != (num, *spec.outputs) or not outputs.is_floating_point():
        actual = f"{str(outputs.dtype).removeprefix('torch.')} {list(outputs.shape)}"
        examples, hint = f"two {_kind(spec)}s" if num == 2 else f"one {_kind(spec)}", ""
        if num == 1 and outputs.ndim < 1 + len(spec.outputs):
            hint = ": squeeze() drops the dimension of the batch too, flatten(1) does not"
        elif outputs.shape[1:] != spec.outputs and sorted(outputs.shape[1:]) == sorted(spec.outputs):
            hint = ": those dimensions are in another order, put it right by permute()"
        expected = f"float outputs [{num}, {shape}]{hint}"
        raise ValueError(f"{name} gave {actual} for {examples}{when}; it should give {expected}")
