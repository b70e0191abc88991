"""build_model(): a network by its config and the Spec of what it takes and gives."""

import dataclasses
from typing import Protocol

import torch
from torch import nn

from raysubset.config import ModelConfig
from raysubset.models import dense, images, torchvision
from raysubset.models.users import users_network
from raysubset.tasks import Spec

_OWN = ("cnn", "lenet5", "mlp", "cifar_resnet")


def build_model(config: ModelConfig, spec: Spec, *, seed: int) -> nn.Module:
    """A freshly initialised network that maps [N, *spec.inputs] to float [N, *spec.outputs].

    The weights are drawn from torch's CPU generator under `seed` alone, so every node gets the same bits; the global
    generators are left as they were. A user's "package.module:function" is called as function(spec), or with two
    arguments as function(num_classes, (C, H, W)); its module may lie in the working directory. Its network is tried:
    in evaluation mode, and on a copy for a step of training in the memory layout of the actors. One that works in
    torch's default layout alone is given its images in that (see needs_default_layout()); one that changes its inputs
    in place is given copies.

    Args:
        config: architecture, size and normalisation.
        spec: shapes and type of inputs and outputs.
        seed: of the initial weights.

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
    """The config with a network's name instead of "auto".

    Raises:
        ValueError: if model.norm does not apply to that network.
    """
    if config.name != "auto":
        return config
    if spec.num_values is not None:
        name = "transformer"
    elif not spec.is_image:
        name = "mlp"
    else:
        name = {1: "cnn", 3: "unet"}.get(len(spec.outputs), "mlp")
    return dataclasses.replace(config, name=name)


def _named_network(config: ModelConfig, spec: Spec) -> nn.Module:
    """One of ours or torchvision's.

    Raises:
        ValueError: for an unknown name, or inputs and outputs that are not the network's.
    """
    if config.name not in _OWN:
        torchvision.check_name(config.name, _OWN)
    takes_any = config.name == "mlp"
    if spec.num_values is not None or not (takes_any or (spec.is_image and len(spec.outputs) == 1)):
        takes = "floats" if takes_any else "images and gives a vector"
        kind = "floats" if spec.num_values is None else "tokens"
        fitting = architecture(ModelConfig(), spec).name
        raise ValueError(
            f"{config.name} takes {takes}; inputs are {kind} {list(spec.inputs)} and outputs {list(spec.outputs)} an "
            f"example: set model.name={fitting}"
        )
    if config.name == "lenet5":
        return images.lenet5(spec)
    if config.name not in _OWN:
        return torchvision.network(config.name, spec)
    width, depth = config.size()
    if config.name == "mlp":
        return dense.mlp(spec, width, depth)
    if config.name == "cnn":
        return images.cnn(spec, width, depth, config.norm)
    return images.CifarResNet(spec, width, depth, config.norm)
