"""Tries a network on a few inputs: whether it takes them, gives what it should, and has a gradient."""

from typing import Any

import torch
from torch import Tensor, nn

from raysubset.errors import one_line
from raysubset.models.properties import copied, generators_restored
from raysubset.tasks import Spec


def needs_default_layout(model: nn.Module) -> bool:
    """Whether build_model() found that the network cannot be trained on channels-last images, so is given no such."""
    return any(hook is _in_default_layout for hook in model._forward_pre_hooks.values())


def _in_default_layout(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A hook: copies of the images in memory [N, C, H, W]; contiguous() would keep the strides of a single channel."""
    return (inputs[0].clone(memory_format=torch.contiguous_format), *inputs[1:])


def _as_a_copy(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A hook: copies of the inputs, as the network changes its own."""
    return (inputs[0].clone(), *inputs[1:])


def try_evaluation(name: str, model: nn.Module, spec: Spec) -> None:
    """Try two examples of zeros, and one, on a network in eval mode.

    Raises:
        ValueError: if it cannot take them, or gives anything but float [N, *spec.outputs].
    """
    for num in (2, 1):
        inputs = spec.zeros(num)
        try:
            with generators_restored(), torch.no_grad():
                outputs = model(inputs)
        except Exception as error:  # the user's forward() may raise anything
            of = f"{_kind(spec)}s of shape {list(inputs.shape)}{' [N, C, H, W]' if spec.is_image else ''}"
            text = f"{name} cannot take {of}" if num > 1 else f"{name} cannot take {of}, one alone, in evaluation mode"
            raise ValueError(f"{text}: {one_line(error)}") from error
        _check_outputs(name, outputs, num, spec, "")


def try_training(name: str, model: nn.Module, spec: Spec) -> None:
    """Try a step of two random examples on copies of a network; images in the layout of the actors, else in torch's.

    Raises:
        ValueError: if it fails in both, or gives anything but float [2, *spec.outputs] that depends on its parameters.
    """
    reasons = []
    for layout in (torch.channels_last, torch.contiguous_format) if spec.is_image else (torch.contiguous_format,):
        network = copied(model).train()
        network.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
        inputs = spec.random(2, torch.default_generator)
        if layout is torch.channels_last:  # in the memory that Examples have, of one channel too
            inputs = inputs.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format).permute(0, 3, 1, 2)
        given = inputs.clone()
        try:
            with generators_restored(), torch.enable_grad():
                outputs = network(given)
                if isinstance(outputs, Tensor) and outputs.requires_grad and outputs.is_floating_point():
                    outputs.sum().backward()
        except Exception as error:  # likewise
            reasons.append(one_line(error))
            continue
        _check_outputs(name, outputs, len(inputs), spec, " in train mode")
        if not outputs.requires_grad:
            cause = "leave no_grad(), detach() and NumPy out of its forward()"
            raise ValueError(f"{name} gave outputs in train mode that have no gradient: {cause}")
        if reasons:
            model.register_forward_pre_hook(_in_default_layout)
        elif not torch.equal(given, inputs):
            model.register_forward_pre_hook(_as_a_copy)
        return
    raise ValueError(f"{name} cannot take a step of training on two {_kind(spec)}s: {reasons[-1]}")


def _kind(spec: Spec) -> str:
    return "image" if spec.is_image else "input"


def _check_outputs(name: str, outputs: Any, num: int, spec: Spec, when: str) -> None:
    """Refuse anything but float [num, *spec.outputs]."""
    wanted = ", ".join(map(str, spec.outputs))
    if not isinstance(outputs, Tensor):
        raise ValueError(
            f"{name} gave a {type(outputs).__name__}{when}; it should give outputs [N, {wanted}]"
            + (", as it does in evaluation mode: leave its auxiliary heads out, or wrap it" if when else "")
        )
    if outputs.shape != (num, *spec.outputs) or not outputs.is_floating_point():
        gave = f"{str(outputs.dtype).removeprefix('torch.')} {list(outputs.shape)}"
        examples = f"two {_kind(spec)}s" if num == 2 else f"one {_kind(spec)}"
        cause = ""
        if num == 1 and outputs.ndim < 1 + len(spec.outputs):
            cause = ": squeeze() drops the dimension of the batch too, flatten(1) does not"
        elif outputs.shape[1:] != spec.outputs and sorted(outputs.shape[1:]) == sorted(spec.outputs):
            cause = ": those dimensions are in another order, put it right by permute()"
        raise ValueError(
            f"{name} gave {gave} for {examples}{when}; it should give float outputs [{num}, {wanted}]{cause}"
        )
