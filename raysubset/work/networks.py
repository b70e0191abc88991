"""Networks: what a process keeps of a network from one piece of work to the next, as to make one takes long."""

import copy
from typing import Any

import torch
from torch import nn

from raysubset.config import Config
from raysubset.data import FullSet
from raysubset.training import Weights, place
from raysubset.work.starting import random_model


class Networks:
    """Networks that are as random_model() makes them but for the weights they are given.

    To draw 11 million initial weights that start weights overwrite takes 300 ms of a CPU, to copy them 2. A network of
    ours is used again: its state dict is all that a minimization leaves in it beside gradients, frozen flags and modes.
    Where code of the user's has it in hand (the network, optimizer or objective), each piece gets a copy of one that
    was not used; a network that cannot be copied is made anew. What such a network holds outside its state dict is that
    of the seed "initial", in all rounds and members alike.
    """

    def __init__(self) -> None:
        self._key: Any = None
        self._kept: list[nn.Module] = []  # by place in a pack; of users' code one, which is copied
        self._flags: list[tuple[list[bool], list[bool]]] = []

    def placed(
        self, config: Config, full_set: FullSet, weights: Weights, device: torch.device, *, place_in_pack: int = 0
    ) -> nn.Module:
        """A network with these weights, on the device; valid until another is asked for the same place in a pack."""
        key = (config.model, full_set.spec, config.minimize.channels_last, device)
        touched = config.model.is_function or any(field.startswith("minimize.") for field in config.functions())
        if touched:
            key = (*key, config.seed)
        if key != self._key:
            self.forget()
            self._key = key
        if touched:
            model = self._copy(config, full_set)
            model.load_state_dict(weights)
            return place(model, device, channels_last=config.minimize.channels_last)
        while len(self._kept) <= place_in_pack:
            model = random_model(config, full_set)
            self._kept.append(model)
            self._flags.append(([p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]))
        model, (required, training) = self._kept[place_in_pack], self._flags[place_in_pack]
        for parameter, flag in zip(model.parameters(), required, strict=True):
            parameter.requires_grad_(flag).grad = None
        for module, flag in zip(model.modules(), training, strict=True):
            module.training = flag
        model.load_state_dict(weights)
        return place(model, device, channels_last=config.minimize.channels_last)  # lbfgs and its like change the layout

    def forget(self) -> None:
        """Keep none: after an exception, nobody knows what it left in them."""
        self._key, self._kept, self._flags = None, [], []

    def _copy(self, config: Config, full_set: FullSet) -> nn.Module:
        if not self._kept:
            self._kept.append(random_model(config, full_set))
        try:
            return copy.deepcopy(self._kept[0])
        except Exception:  # whatever an attribute of the user's raises
            return self._kept.pop()
