"""The optimizer of a recipe, and its learning rate at any point of the schedule."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from raysubset.config import MinimizeConfig
from raysubset.training.muon import Muon
from raysubset.training.own_optimizer import own_optimizer
from raysubset.training.uncompiled import lean

SGD, Adam, AdamW = lean(torch.optim.SGD), lean(torch.optim.Adam), lean(torch.optim.AdamW)

ONE_CYCLE_START, ONE_CYCLE_END = 1 / 25, 1e-4  # of the peak (torch's OneCycleLR starts there and ends at 4e-6)


def make_optimizer(model: nn.Module, recipe: MinimizeConfig) -> torch.optim.Optimizer:
    """Build the recipe's optimizer. Weight decay spares biases and normalisation parameters (tensors of one dimension).

    All moments are zero from the beginning. Steps may leave parameters out (layers dropped at random, mixtures of
    experts), and torch's fused SGD refuses a group in which some parameters have a momentum and others get their first
    gradient. Members whose states hold different parameters would have no mean.

    Whole-subset optimizers are not among them: training.whole_subset makes their steps.
    """
    if recipe.has_own_optimizer:
        return own_optimizer(model, recipe)
    parameters = [p for p in model.parameters() if p.requires_grad]
    rate = recipe.peak_learning_rate()
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    match recipe.optimizer:
        case "sgd":
            nesterov = recipe.momentum > 0 and recipe.extrapolation.kind == "none"  # extrapolation itself looks ahead
            optimizer = SGD(groups, lr=rate, momentum=recipe.momentum, nesterov=nesterov, fused=fused)
        case "adam":
            optimizer = Adam(groups, lr=rate, fused=fused)
        case "adamw":
            optimizer = AdamW(groups, lr=rate, fused=fused)
        case "muon":
            optimizer = Muon(groups, lr=rate, momentum=recipe.momentum)
        case _:
            raise AssertionError(f"training.whole_subset makes the steps of {recipe.optimizer}")
    names = moment_names(recipe)
    for parameter in parameters if names else ():
        optimizer.state[parameter] = {name: torch.zeros_like(parameter, requires_grad=False) for name in names}
        if "exp_avg" in names:
            optimizer.state[parameter]["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return optimizer


def moment_names(recipe: MinimizeConfig) -> tuple[str, ...]:
    """Return the names of the tensors that one of our optimizers keeps for each parameter, in its shape."""
    if recipe.optimizer in ("adam", "adamw"):
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if recipe.momentum else ()


def state_after(outcome: str, state: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state dict at the end of a minimization: after a divergence without any moments.

    The next round begins with new ones, and zeros would count in the mean of members' states.
    """
    return {**state, "state": {}} if outcome == "diverged" else state


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state dict into a new optimizer, with the moments in the memory layout of their parameters.

    The CPU's fused kernels walk through memory whatever the strides, and would mix up a state saved in another layout.
    """
    initial = dict(optimizer.state)
    optimizer.load_state_dict(state)
    for parameter, moments in initial.items():
        optimizer.state[parameter] = moments | optimizer.state[parameter]  # steps may have left the parameter out
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                moments[name] = torch.empty_like(parameter, requires_grad=False).copy_(value)


def learning_rate_at(
    recipe: MinimizeConfig, step: int, *, num_steps: int, span: tuple[float, float] = (0.0, 1.0)
) -> float:
    """Return the learning rate of a step.

    one_cycle differs from torch's OneCycleLR in three ways. It ends at 1e-4 of the peak; torch's default is 4e-6.
    Momentum stays as it is; torch cycles it. Step n of N is n/N of the way; torch's is n/(N - 1). The last step is
    therefore not quite at the end, and parts of a schedule fit together.

    Args:
        step: from 0.
        num_steps: in the span.
        span: the part of the schedule that these steps cover, as shares of it in [0, 1].
    """
    peak, warm = recipe.peak_learning_rate(), recipe.warmup_fraction
    low, high = span
    progress = low + (high - low) * step / num_steps
    decay_progress = (progress - warm) / (1 - warm)
    match recipe.schedule:
        case "constant":
            return peak
        case "cosine":
            return peak * _half_cosine(progress)
        case "one_cycle":
            start, end = peak * ONE_CYCLE_START, peak * ONE_CYCLE_END
            if progress < warm:
                return peak + (start - peak) * _half_cosine(progress / warm)
            return end + (peak - end) * _half_cosine(decay_progress)
        case "warmup_linear":
            if progress < warm:  # uses the progress after the step, or the first step would change nothing
                return peak * min(1.0, (low + (high - low) * (step + 1) / num_steps) / warm)
            return peak * (1 - decay_progress)


def _half_cosine(share: float) -> float:
    """Fall from 1 at share 0 to 0 at share 1."""
    return (1 + math.cos(math.pi * share)) / 2
