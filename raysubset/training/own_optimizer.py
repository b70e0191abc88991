"""The user's own optimizer, minimize.optimizer=package.module:function: built from parameters and recipe."""

import numbers

import torch
from torch import Tensor, nn

from raysubset.config import MinimizeConfig
from raysubset.errors import listed, with_article
from raysubset.user_code.functions import call_function, misfit

_FIELD = "minimize.optimizer"


def own_optimizer(model: nn.Module, recipe: MinimizeConfig) -> torch.optim.Optimizer:
    """Call the user's function with the trained parameters and the recipe.

    Raises:
        ValueError: if it returns no optimizer, or one that lacks parameters or a learning rate for the schedule to set.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = call_function(_FIELD, recipe.optimizer, list(named.values()), recipe)
    if flaw := _flaw(optimizer, named):
        raise misfit(_FIELD, recipe.optimizer, flaw)
    return optimizer


def _flaw(optimizer: object, named: dict[str, nn.Parameter]) -> str | None:
    """Return what is wrong with the optimizer of the named parameters, and the way out; None if nothing is."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        return f"returned {with_article(optimizer)}: it should return a torch.optim.Optimizer"
    grouped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in named.items() if id(p) not in grouped]
    if missing:
        names = listed(missing, most=3)
        text = f"left {len(missing)} of {len(named)} parameters out of its groups: {names}. Give it all of them; those"
        return f"{text} that should stay have requires_grad=False in the network"
    if len(grouped) > len(named):
        return "has parameters in its groups that it did not receive"
    rates = [group.get("lr") for group in optimizer.param_groups]
    if not all(isinstance(rate, numbers.Real | Tensor) and float(rate) >= 0 for rate in rates) or not any(rates):
        return f"has groups of lr {', '.join(map(str, rates))}: give it one that the schedule can scale"
    return None


def rates_of_groups(optimizer: torch.optim.Optimizer) -> tuple[float, list[float]]:
    """Return (the largest initial lr of an optimizer's groups, each group's lr as a share of it)."""
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    return max(rates), [rate / max(rates) for rate in rates]
