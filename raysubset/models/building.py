"""build_model(): a network by its config and the Spec of what it takes and gives."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import nn

from raysubset.config import ModelConfig
from raysubset.models import cifar, small, tokens, torchvision
from raysubset.models.users import users_network
from raysubset.tasks import Spec


def build_model(config: ModelConfig, spec: Spec, *, seed: int) -> nn.Module:
    """A freshly initialised network that maps [N, *spec.inputs] to float [N, *spec.outputs].

    The weights are drawn from torch's CPU generator under `seed` alone, so every node gets the same bits; the global
    generators are left as they were. A user's "package.module:function" is called as function(spec), or with two
    arguments as function(num_classes, (C, H, W)); its module may lie in the working directory. Its network is tried:
    in evaluation mode, and on a copy for a step of training in the memory layout of the actors. One that works in
    torch's default layout alone is given its images in that (see needs_default_layout()); one that changes its inputs
    in place is given copies.

    Returns:
        A float32 module on the CPU in train mode. Under torch.device("meta") one of stand-ins, which takes no memory;
        torchvision's regnets cannot be built so.

    Raises:
        ValueError: for an unknown name, inputs that the network cannot take, or a user's function that is missing
            or whose network cannot be trained, or gives anything but [N, *spec.outputs] in either mode.
    """
    config = architecture(config, spec)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs' generators as well
        model = users_network(config.name, spec) if config.is_function else _named_network(config, spec)
    return model.train()


class Described(Protocol):
    """What says what a network must take and give: a FullSet, or the record of a trained model."""

    @property
    def spec(self) -> Spec: ...


def new_model(config: ModelConfig, described: Described, *, seed: int = 0) -> nn.Module:
    """build_model() for what the set or record describes."""
    return build_model(config, described.spec, seed=seed)


def architecture(config: ModelConfig, spec: Spec) -> ModelConfig:
    """The config with a network's name instead of "auto"."""
    if config.name != "auto":
        return config
    if spec.num_values is not None:
        name = "transformer"
    elif not spec.is_image:
        name = "mlp"
    else:
        name = "cnn" if len(spec.outputs) == 1 else "unet" if spec.outputs[1:] == spec.inputs[1:] else "mlp"
    return dataclasses.replace(config, name=name)


_FIXED: dict[str, Callable[[Spec], nn.Module]] = {
    "lenet5": small.lenet5,
    "alexnet_32": cifar.alexnet_32,
    "vgg11_32": partial(cifar.vgg_32, 11),
    "vgg16_32": partial(cifar.vgg_32, 16),
    "resnet18_32": cifar.resnet18_32,
}
_SIZED: dict[str, Callable[[Spec, int, int], nn.Module]] = {
    "mlp": small.mlp,
    "lstm": tokens.LSTM,
    "transformer": tokens.Transformer,
}
_NORMED: dict[str, Callable[[Spec, int, int, str], nn.Module]] = {
    "cnn": small.cnn,
    "vgg": small.vgg,
    "cifar_resnet": small.CifarResNet,
    "unet": small.UNet,
}


def _named_network(config: ModelConfig, spec: Spec) -> nn.Module:
    """One of ours or torchvision's."""
    name = config.name
    is_own = name in (*_FIXED, *_SIZED, *_NORMED)
    if not is_own:
        torchvision.check_name(name, (*_NORMED, *_FIXED, *_SIZED))
    _refuse_other_inputs(name, spec)
    if name in _NORMED:
        return _NORMED[name](spec, *config.size(), config.norm)
    if name in _SIZED:
        return _SIZED[name](spec, *config.size())
    return _FIXED[name](spec) if is_own else torchvision.network(name, spec)


def _refuse_other_inputs(name: str, spec: Spec) -> None:
    """Refuse inputs and outputs that a network by this name is not for, with the network that is."""
    inputs, outputs, is_text = spec.inputs, spec.outputs, spec.num_values is not None
    if name == "mlp":
        takes, fits = "floats", not is_text
    elif name in ("lstm", "transformer"):
        takes = "tokens [T] and gives [M], or [T, V]"
        fits = is_text and len(inputs) == 1 and (len(outputs) == 1 or (len(outputs) == 2 and outputs[0] == inputs[0]))
    elif name == "unet":
        takes = "images [C, H, W] and gives [M, H, W]"
        fits = spec.is_image and not is_text and len(outputs) == 3 and outputs[1:] == inputs[1:]
    else:
        takes, fits = "images [C, H, W] and gives [M]", spec.is_image and not is_text and len(outputs) == 1
    if not fits:
        fitting = architecture(ModelConfig(), spec).name
        raise ValueError(
            f"{name} takes {takes}; inputs are {'tokens' if is_text else 'floats'} {list(inputs)} and outputs "
            f"{list(outputs)} an example: "
            + (f"set model.name={fitting}" if fitting != name else "write a network of your own, as module:function")
        )
