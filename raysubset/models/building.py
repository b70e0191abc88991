"""build_model() builds a network from its config and the Spec of its inputs and outputs."""

import dataclasses
from collections.abc import Callable

import torch
from torch import nn

from raysubset.config import ModelConfig
from raysubset.models import cifar, small, tokens, torchvision
from raysubset.models.users import users_network
from raysubset.tasks import Spec


def build_model(config: ModelConfig, spec: Spec, *, seed: int = 0) -> nn.Module:
    """Build a newly initialised network that maps [N, *spec.inputs] to float [N, *spec.outputs].

    The weights are drawn from torch's CPU generator, seeded with `seed` alone, so every node gets the same bits. The
    global generators are restored afterwards.

    A user's "package.module:function" is called as function(spec), or, if it takes two arguments, as
    function(num_classes, (C, H, W)). Its module may be in the working directory. Its network is tried in evaluation
    mode, and a copy of it for one step of training in the actors' memory layout. A network that works only in torch's
    default layout is given its images in that layout (see needs_default_layout()). A network that changes its inputs
    in place is given copies of them.

    Returns:
        A float32 module on the CPU in train mode. Under torch.device("meta") its tensors take no memory;
        torchvision's regnets cannot be built there.

    Raises:
        ValueError: for an unknown name, for inputs that the network cannot take, and for a user's function that is
            missing or whose network cannot be trained or does not return float [N, *spec.outputs] in both modes.
    """
    config = architecture(config, spec)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs' generators as well
        model = users_network(config.name, spec) if config.is_function else _named_network(config, spec)
    return model.train()


def architecture(config: ModelConfig, spec: Spec) -> ModelConfig:
    """Return the config with the name of a network that fits the Spec instead of "auto"."""
    if config.name != "auto":
        return config
    if spec.are_integers:
        name = "transformer"
    elif not spec.is_image:
        name = "mlp"
    else:
        name = "cnn" if len(spec.outputs) == 1 else "unet" if spec.outputs[1:] == spec.inputs[1:] else "mlp"
    return dataclasses.replace(config, name=name)


_NETWORKS: dict[str, Callable[[Spec, ModelConfig], nn.Module]] = {
    "cnn": lambda spec, config: small.cnn(spec, *config.size(), config.norm),
    "vgg": lambda spec, config: small.vgg(spec, *config.size(), config.norm),
    "cifar_resnet": lambda spec, config: small.CifarResNet(spec, *config.size(), config.norm),
    "unet": lambda spec, config: small.UNet(spec, *config.size(), config.norm),
    "lenet5": lambda spec, _: small.lenet5(spec),
    "alexnet_32": lambda spec, _: cifar.alexnet_32(spec),
    "vgg11_32": lambda spec, _: cifar.vgg_32(11, spec),
    "vgg16_32": lambda spec, _: cifar.vgg_32(16, spec),
    "resnet18_32": lambda spec, _: cifar.resnet18_32(spec),
    "mlp": lambda spec, config: small.mlp(spec, *config.size()),
    "lstm": lambda spec, config: tokens.LSTM(spec, *config.size()),
    "transformer": lambda spec, config: tokens.Transformer(spec, *config.size()),
}


def _named_network(config: ModelConfig, spec: Spec) -> nn.Module:
    """Build one of this package's or torchvision's networks."""
    name = config.name
    if name not in _NETWORKS:
        torchvision.check_name(name, tuple(_NETWORKS))
    _refuse_other_inputs(name, spec)
    return _NETWORKS[name](spec, config) if name in _NETWORKS else torchvision.network(name, spec)


def _refuse_other_inputs(name: str, spec: Spec) -> None:
    """Refuse inputs and outputs that this network cannot take, and name a network that can."""
    inputs, outputs, is_text = spec.inputs, spec.outputs, spec.are_integers
    if name == "mlp":
        takes, fits = "floats", not is_text
    elif name in ("lstm", "transformer"):
        takes = "tokens [T] and gives [M], or [T, V]"
        of_text = isinstance(spec.num_values, int) and len(inputs) == 1
        fits = of_text and (len(outputs) == 1 or (len(outputs) == 2 and outputs[0] == inputs[0]))
    elif name == "unet":
        takes = "images [C, H, W] and gives [M, H, W]"
        fits = spec.is_image and not is_text and len(outputs) == 3 and outputs[1:] == inputs[1:]
    else:
        takes, fits = "images [C, H, W] and gives [M]", spec.is_image and not is_text and len(outputs) == 1
    if not fits:
        fitting = architecture(ModelConfig(), spec).name
        is_own = fitting == name or (spec.are_integers and not isinstance(spec.num_values, int))
        raise ValueError(
            f"{name} takes {takes}; inputs are {'tokens' if is_text else 'floats'} {list(inputs)} and outputs "
            f"{list(outputs)} an example: "
            + ("write a network of your own, as module:function" if is_own else f"set model.name={fitting}")
        )
