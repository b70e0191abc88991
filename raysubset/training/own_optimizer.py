"""The user's own optimizer, minimize.optimizer=package.module:function: built from parameters and recipe."""

import numbers

import torch
from torch import Tensor, nn

from raysubset.config import MinimizeConfig
from raysubset.errors import listed
from raysubset.user_code.functions import call_function, misfit

_FIELD = "minimize.optimizer"


def own_optimizer(model: nn.Module, recipe: MinimizeConfig) -> torch.optim.Optimizer:
    """Call the user's function with the trained parameters and the recipe.

    Raises:
        ValueError: if it returns no optimizer, or one that lacks parameters or a learning rate for the schedule to set.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = call_function(_FIELD, recipe.optimizer, list(named.values()), recipe)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise misfit(
            _FIELD, recipe.optimizer, f"returned a {type(optimizer).__name__}: it should return a torch.optim.Optimizer"
        )
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    missing = [name for name, p in named.items() if not any(p is q for q in grouped)]
    if missing:
        raise misfit(
            _FIELD,
            recipe.optimizer,
            f"left {len(missing)} of {len(named)} parameters out of its groups: {listed(missing, most=3)}. Give "
            "it all of them; those that should stay have requires_grad=False in the network",
        )
    if len(grouped) > len(named):
        raise misfit(_FIELD, recipe.optimizer, "has parameters in its groups that it did not receive")
    rates = [group.get("lr") for group in optimizer.param_groups]
    if not all(isinstance(rate, numbers.Real | Tensor) and float(rate) >= 0 for rate in rates) or not any(rates):
        raise misfit(
            _FIELD,
            recipe.optimizer,
            f"has groups of lr {', '.join(map(str, rates))}: give it one that the schedule can scale",
        )
    return optimizer


def rates_of_groups(optimizer: torch.optim.Optimizer) -> tuple[float, list[float]]:
    """Return (the largest initial lr of an optimizer's groups, each group's lr as a share of it)."""
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    return max(rates), [rate / max(rates) for rate in rates]
