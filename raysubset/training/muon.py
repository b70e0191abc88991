"""Muon (Jordan 2024): steps along the polar factor of a matrix's momentum, whose singular values are about one.

With gradient g, momentum factor u and learning rate η, for a matrix [o, i] (a kernel [o, i, k, k] is one [o, i·k²]):

    m ← u·m + g        W ← W − η·√max(1, o/(i·k²))·polar(g + u·m)

An embedding is a matrix with one row per word. On python_docs, a small transformer with a tied head reached a
validation loss of 2.51 that way, and of 2.59 with Nesterov steps for the embedding (n = 1, 100 steps, rates 0.03 and
0.1 alike). Tensors of one dimension, biases and normalisation parameters, take Nesterov steps of 2η. Weight decay is an
L2 penalty, added to the gradient as by sgd. In a matrix it therefore turns the step and does not lengthen it, whereas
torch.optim.Muon shrinks the weights beside the step.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_COEFFICIENTS = 3.4445, -4.7750, 2.0315  # singular values soon lie between 0.68 and 1.14, if not at 1
_NUM_ITERATIONS = 5
_LEAST_NORM = 1e-7
REST_FACTOR = 2.0  # of the learning rate, for parameters that are not matrices


class Muon(torch.optim.Optimizer):
    """Moves tensors of two dimensions or more along the polar factor, and others by Nesterov steps."""

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float, momentum: float) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Move every parameter that has a gradient; the gradients stay."""
        assert closure is None, "a step uses the gradients that are there"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = parameter.grad
                if group["weight_decay"]:
                    gradient = gradient.add(parameter, alpha=group["weight_decay"])
                if group["momentum"]:
                    state = self.state[parameter]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(parameter)
                    momentum = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
                    gradient = gradient.add(momentum, alpha=group["momentum"])
                if parameter.ndim > 1:
                    direction = scaled_polar(gradient.flatten(1)).view(parameter.shape)
                    parameter.add_(direction, alpha=-group["lr"])
                else:
                    parameter.add_(gradient, alpha=-REST_FACTOR * group["lr"])


def scaled_polar(matrices: Tensor) -> Tensor:
    """Return √max(1, o/i) times polar(matrices), for matrices [..., o, i]."""
    return polar(matrices).mul_(math.sqrt(max(1.0, matrices.shape[-2] / max(1, matrices.shape[-1]))))


def polar(matrices: Tensor) -> Tensor:
    """Approximate U·Vᵀ of each matrix U·S·Vᵀ [..., o, i] by Newton-Schulz iterations in the matrices' own precision."""
    a, b, c = _COEFFICIENTS
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=_LEAST_NORM)
    for _ in range(_NUM_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT.contiguous() if is_tall else x
