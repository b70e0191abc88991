"""An arm's learning rate is the best of a grid, which grows while the best one is at its edge."""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence

from raysubset.comparison.arms import Arm, Settings

LEARNING_RATES = (0.3, 1.0, 3.0)  # times the recipe's own; tried for each arm
MOST_BEYOND = 3  # rates tried beyond an edge of that grid, one after the other

Losses = dict[Arm, dict[Settings, float]]


def search(
    grids: Mapping[Arm, Sequence[Settings]],
    losses_of: Callable[[Mapping[Arm, Sequence[Settings]]], Losses],
    *,
    most_beyond: int,
    can_try: Callable[[Arm, Settings], bool] = lambda arm, setting: True,
) -> Losses:
    """Return the loss of every setting that arms tried: their grids, and rates beyond an edge while it is the best.

    Args:
        grids: the settings that each arm tries first.
        losses_of: returns the losses of arms with settings; ∞ if training failed or diverged.
        most_beyond: the most rates that an arm tries beyond an edge.
        can_try: returns False for a setting that the arm's optimizer refuses.
    """
    losses = losses_of(grids)
    for _ in range(most_beyond):
        further = {arm: beyond(best_of(tried), tried) for arm, tried in losses.items()}
        untried = {arm: [setting] for arm, setting in further.items() if setting and can_try(arm, setting)}
        if not untried:
            break
        for arm, tried in losses_of(untried).items():
            losses[arm] |= tried
    return losses


def best_of(losses: Mapping[Settings, float]) -> Settings:
    """Return the setting of least loss; of equals, the one with the lowest rate."""
    return min(losses, key=lambda setting: (losses[setting], setting))


def beyond(setting: Settings, tried: Collection[Settings]) -> Settings | None:
    """Return a setting with a rate beyond the edge, in the ratio of the two rates there.

    None is returned if the setting's rate is not at an edge of the rates that its batch size was tried with.
    """
    rates = sorted(other.learning_rate for other in tried if other.batch_size == setting.batch_size)
    if len(rates) < 2 or rates[0] < setting.learning_rate < rates[-1]:
        return None
    next_rate = rates[1] if setting.learning_rate == rates[0] else rates[-2]
    return dataclasses.replace(setting, learning_rate=float(f"{setting.learning_rate**2 / next_rate:.6g}"))


def is_at_edge(setting: Settings, tried: Collection[Settings], can_try: Callable[[Settings], bool]) -> bool:
    """Return True if a rate beyond the setting's may be better: none was tried, and the optimizer takes some."""
    further = beyond(setting, tried)
    return further is not None and (
        further.learning_rate < setting.learning_rate
        or can_try(dataclasses.replace(setting, learning_rate=1.01 * setting.learning_rate))
    )


def in_words(arm: Arm, losses: Mapping[Settings, float], *, at_edge: bool) -> str:
    """Return the settings that an arm was tuned to, and whether their rate is at the edge."""
    best = best_of(losses)
    if losses[best] == math.inf:
        return f"{arm.key} diverged or failed at every learning rate of the grid"
    note = ", at the edge of the grid" if at_edge else ""
    return f"{arm.key}: learning rate {best.learning_rate:g}{note}, batch {best.batch_size}"
