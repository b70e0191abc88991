"""Steps between stages: the outer optimizer, shrink-and-perturb, and the mean of members' optimizer states."""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from raysubset.aggregation.streaming import RunningMean
from raysubset.training import Weights


def outer_step(
    start: Weights,
    mean: Weights,
    momentum: Weights,
    *,
    learning_rate: float,
    momentum_factor: float,
    parameter_names: Collection[str],
) -> tuple[Weights, Weights]:
    """Take one step of Nesterov SGD on the round's displacement start - mean (DiLoCo, Douillard et al., 2311.08105).

    With learning rate 1 and no momentum the result is the mean. All but the trainable parameters is the mean's:
    its statistics have to be recomputed in any case.

    Args:
        momentum: as the last round returned it; empty in the first round.

    Returns:
        The next start, and the momentum to pass in with it (parameters only).
    """
    weights, next_momentum = dict(mean), {}
    for name in parameter_names:
        gradient = start[name] - mean[name]
        velocity = gradient if name not in momentum else (momentum_factor * momentum[name]).add_(gradient)
        next_momentum[name] = velocity
        step = (momentum_factor * velocity).add_(gradient).mul_(learning_rate)
        weights[name] = torch.sub(start[name], step, out=step)
    return weights, next_momentum


def shrink_perturb(
    weights: Weights, fresh: Weights, *, shrink: float, perturb: float, parameter_names: Collection[str]
) -> Weights:
    """Return shrink * weights + perturb * fresh (Ash & Adams 2020, arXiv:1910.08475) for the given parameters.

    All else stays. parameter_names are the trainable ones, as a frozen parameter could never recover.
    """
    mixed = {name: shrink * weights[name] + perturb * fresh[name] for name in parameter_names}
    return {**weights, **mixed}


def mean_optimizer_state(states: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return the elementwise mean of optimizers' state dicts, read one after the other, with the first's step counters.

    Empty states, of members that diverged and began again, are left out. If all are empty, the first is returned.

    Raises:
        ValueError: if there is no state, or two hold different things.
    """
    first, mean = None, RunningMean()
    for state in states:
        moments = {
            f"{parameter}.{name}": value
            for parameter, values in state["state"].items()
            for name, value in values.items()
            if isinstance(value, Tensor) and name != "step"
        }
        if first is None or not first["state"]:
            first = state
        if moments:
            mean.add(moments)
    if first is None:
        raise ValueError("there is no optimizer state to average")
    means = mean.weights()
    averaged = {
        parameter: {name: means.get(f"{parameter}.{name}", value) for name, value in values.items()}
        for parameter, values in first["state"].items()
    }
    return {**first, "state": averaged}
