"""The user's own optimizer, minimize.optimizer=package.module:function: built from parameters and recipe, and tried."""

import io
import numbers
from typing import Any

import torch
from torch import Tensor, nn

from raysubset.config import MinimizeConfig
from raysubset.errors import listed
from raysubset.models import copied, generators_restored
from raysubset.user_code.functions import call_function, in_a_line, misfit

_FIELD = "minimize.optimizer"
_NUM_STEPS = 2  # before a trial's state is saved, and after it is loaded


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


def try_own_optimizer(model: nn.Module, recipe: MinimizeConfig) -> None:
    """Step on a copy of the model, then again with a checkpoint in between, which must make no difference.

    Raises:
        ValueError: if it makes one, or the optimizer raises anything.
    """
    unbroken, resumed = copied(model), copied(model)
    with generators_restored(), torch.random.fork_rng(devices=[]):
        optimizer = own_optimizer(unbroken, recipe)
        _step(unbroken, optimizer, recipe, first=0)
        with in_a_line(_FIELD, recipe.optimizer):
            state = optimizer.state_dict()
        state = through_a_file(
            state,
            misfit(
                _FIELD,
                recipe.optimizer,
                "has a state_dict() that a checkpoint cannot hold: keep tensors, numbers, words, lists and dicts in it",
            ),
        )
        resumed.load_state_dict(unbroken.state_dict())
        another = own_optimizer(resumed, recipe)
        with in_a_line(_FIELD, recipe.optimizer):
            another.load_state_dict(state)
        _step(unbroken, optimizer, recipe, first=_NUM_STEPS)
        _step(resumed, another, recipe, first=_NUM_STEPS)
    pairs = zip(unbroken.parameters(), resumed.parameters(), strict=True)
    if not all(torch.equal(p, q) for p, q in pairs if p.isfinite().all()):
        raise misfit(
            _FIELD,
            recipe.optimizer,
            "moves the parameters elsewhere when it is resumed from its state_dict(): keep all that it remembers from "
            "step to step in self.state and in its groups",
        )


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, recipe: MinimizeConfig, *, first: int) -> None:
    """Make a trial's steps along random gradients, each seeded by its number."""
    for step in range(first, first + _NUM_STEPS):
        torch.manual_seed(step)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn_like(parameter)
        with in_a_line(_FIELD, recipe.optimizer):
            optimizer.step()


def through_a_file(state: dict[str, Any], misfit: ValueError) -> dict[str, Any]:
    """Return a state as a checkpoint would restore it.

    Raises:
        ValueError: the misfit, if a checkpoint cannot hold the state.
    """
    file = io.BytesIO()
    try:
        torch.save(state, file)
        file.seek(0)
        return torch.load(file, weights_only=True)
    except Exception as error:  # torch.save() and load() raise many kinds
        raise misfit from error
