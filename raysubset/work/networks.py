"""Networks: a process's cache of networks, because building one for each piece of work takes long."""

from contextlib import suppress
from typing import Any

import torch
from torch import nn

from raysubset.config import Config
from raysubset.data import FullSet
from raysubset.models import deep_copy, lost_in_copies
from raysubset.training import Weights, place
from raysubset.work.starting import random_model


class Networks:
    """Builds networks like random_model() with given weights, and reuses them.

    Drawing 11 million initial weights that start weights overwrite takes 300 ms of a CPU, copying them 2. Our own
    networks are used again: beside its state dict, a minimization leaves only gradients, frozen flags and modes in
    them. If a user's code handles the network (model, optimizer or objective), each piece gets a copy of an unused one,
    or a new one if copying fails or would lose hooks. The state of such a network outside its state dict is that of the
    seed "initial", for all rounds and members alike.
    """

    def __init__(self) -> None:
        self._key: Any = None
        self._networks: list[nn.Module] = []  # by place in a pack; with a user's code one, to be copied

    def placed(
        self, config: Config, full_set: FullSet, weights: Weights, device: torch.device, *, place_in_pack: int = 0
    ) -> nn.Module:
        """Return a network with these weights, on the device, valid until the next call for this place in a pack."""
        key = (config.model, full_set.spec)
        is_users_code = config.model.is_function or any(field.startswith("minimize.") for field in config.functions())
        if is_users_code:
            key = (*key, config.seed)
        if key != self._key:
            self.forget()
            self._key = key
        if is_users_code:
            model = self._copy(config, full_set)
        else:
            while len(self._networks) <= place_in_pack:
                self._networks.append(random_model(config, full_set))
            model = self._networks[place_in_pack].train().requires_grad_()  # as build_model() returns ours
            model.zero_grad()
        model.load_state_dict(weights)
        return place(model, device, channels_last=config.minimize.channels_last)  # other loops change the layout

    def forget(self) -> None:
        """Drop all networks: after an exception their state is unknown."""
        self._key, self._networks = None, []

    def _copy(self, config: Config, full_set: FullSet) -> nn.Module:
        if not self._networks:
            self._networks.append(random_model(config, full_set))
        if lost_in_copies(self._networks[0]) is None:
            with suppress(Exception):  # a user's attribute may raise anything
                return deep_copy(self._networks[0])
        return self._networks.pop()
