"""Extrap-SGD (arXiv:2006.05720): gradients are taken ahead of the weights that they move.

Measured, it was not ahead of plain steps (jobs/tasks/sisters.py).

With learning rate γ, extrapolation rate γ̂ = rate · γ, momentum u and worker k:

    w½_k = w − γ̂·ζ_k        g_k = ∇f_k(w½_k) + λ·w½_k        v ← u·v + mean of g_k        w ← w − γ·v

ζ_k is g_k of the step before, its mean over the workers, or noise. The accelerated form looks further ahead, along the
momentum: w½_k = w − γ·u·v − γ̂·ζ_k. The momentum is heavy-ball: torch's Nesterov form would look ahead a second time.
Written from the abstract and from memory: the structure is the paper's, the constants are our own.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from raysubset.config import ExtrapolationConfig, derive_seed


class Extrapolation:
    """Moves the parameters of an optimizer to w½ before the forward pass, and back after the backward pass.

    Memory: one buffer of the parameters' size. It holds ζ between the steps, and w while the parameters are at w½. A
    parameter that needs no gradient stays where it is, and its last gradient is forgotten.
    """

    def __init__(self, recipe: ExtrapolationConfig, optimizer: torch.optim.Optimizer, *, seed: int, rank: int) -> None:
        self._recipe, self._optimizer, self._seed, self._rank = recipe, optimizer, seed, rank
        self.differs_by_worker = recipe.kind != "past_global"  # each worker has a w½ of its own
        self._parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
        self._decays = [group["weight_decay"] for group in optimizer.param_groups for _ in group["params"]]
        self._buffers: dict[int, Tensor] = {}  # by position in the parameters
        self._moved: list[int] = []  # positions of the parameters that are at w½, or were in the last step

    @torch.no_grad()
    def look_ahead(self, rate: float, step: int) -> None:
        """Move to w½, with the learning rate of this step. `step`, the number of steps done, seeds the noise."""
        moved = [i for i, p in enumerate(self._parameters) if p.requires_grad]
        if self._recipe.kind.startswith("past"):
            self._buffers = {i: buffer for i, buffer in self._buffers.items() if self._parameters[i].requires_grad}
        else:
            self._buffers = self._noise(moved, step)
        distance = self._recipe.rate * rate
        for i in moved:
            parameter, buffer = self._parameters[i], self._buffers.get(i)
            if buffer is None:  # this parameter has had no gradient yet
                buffer = self._buffers[i] = torch.zeros_like(parameter)
            velocity = self._optimizer.state.get(parameter, {}).get("momentum_buffer")
            ahead = torch.add(parameter, buffer.mul_(-distance), out=buffer)
            if self._recipe.accelerated and velocity is not None:
                ahead.sub_(velocity, alpha=rate * self._optimizer.param_groups[0]["momentum"])
            self._exchange(i)
        self._moved = moved

    @torch.no_grad()
    def come_back(self, average: Callable[[], None]) -> None:
        """Move back to w with the gradients of w½, and remember these gradients.

        `average` averages the gradients over the workers, unless the backward pass did. It is called once: after the
        worker's own gradient is remembered, or before the mean is.
        """
        if not self.differs_by_worker:
            average()
        for i in self._moved:
            parameter, decay = self._parameters[i], self._decays[i]
            gradient, ahead = parameter.grad, parameter.data
            self._exchange(i)
            if gradient is None:
                del self._buffers[i]
            elif decay:
                difference = ahead - parameter
                torch.add(gradient, ahead, alpha=decay, out=ahead)
                gradient.add_(difference, alpha=decay)  # the optimizer adds the decay of w: together it is that of w½
            else:
                ahead.copy_(gradient)
        if self.differs_by_worker:
            average()

    def state_dict(self) -> dict[str, Any]:
        """Return the last gradients, by position in the optimizer. They differ by worker unless kind is past_global."""
        return {"gradients": self._buffers if self._recipe.kind.startswith("past") else {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._buffers = {
            i: torch.empty_like(self._parameters[i]).copy_(gradient) for i, gradient in state["gradients"].items()
        }

    def _exchange(self, i: int) -> None:
        """Exchange the memory of a parameter and its buffer: nothing is copied or rounded."""
        parameter = self._parameters[i]
        parameter.data, self._buffers[i] = self._buffers[i], parameter.data

    def _noise(self, moved: list[int], step: int) -> dict[int, Tensor]:
        """Draw independent normal elements; if kind is filter_scaled, scale each filter to its weights' length."""
        device = self._parameters[0].device
        generator = torch.Generator(device).manual_seed(derive_seed(self._seed, "extrapolation", self._rank, step))
        buffers = {i: torch.empty_like(self._parameters[i]).normal_(generator=generator) for i in moved}
        if self._recipe.kind == "filter_scaled":
            for i, noise in buffers.items():
                noise.mul_(_length(self._parameters[i]) / _length(noise))
        return buffers


def _length(values: Tensor) -> Tensor:
    """Return the norm of each filter (slice along the first dimension), or of a whole tensor of fewer dimensions."""
    return values.flatten(1).norm(dim=1).view(-1, *[1] * (values.ndim - 1)) if values.ndim > 1 else values.norm()
