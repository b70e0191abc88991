"""The arms of a comparison: how conventional training, its controls and subset pretraining spend a budget."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from raysubset.config import Config, field_type, parse_value
from raysubset.legs import Leg
from raysubset.planning import Plan

Role = Literal["baseline", "control", "candidate"]

TITLES: dict[str, str] = {
    "A": "conventional, long",
    "B": "conventional",
    "C": "RS2: a fresh random share of the set each epoch",
    "D": "one subset, then fine-tuning",
    "E": "one subset, shrink-perturb, then fine-tuning",
    "F": "one subset, thrown away, then training from fresh weights",
    "G": "aggregate of disjoint minima, then fine-tuning",
    "H": "trunk, then aggregate of disjoint minima, then fine-tuning",
    "I": "data-parallel training",
}
ALL_ARMS = (*TITLES, "H:rounds.num=4")

LONG = 2.0  # A's budget, as a multiple of the largest of the others
RS2_FRACTION = 0.1  # of the full set that an epoch of C takes: our choice of arXiv:2305.18424's one parameter


@dataclass(frozen=True, eq=False)
class Arm:
    """One way to train, at any budget."""

    key: str  # "G", or "G:aggregation.method=fisher"
    letter: str  # of TITLES
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        more = ", ".join(f"{name} = {value}" for name, value in self.overrides.items())
        return TITLES[self.letter] + (f" ({more})" if more else "")

    @property
    def start(self) -> str:
        """The value of fine_tuning.start: what the arm's fine-tuning starts from."""
        return {"E": "shrink_perturb", "F": "reinit"}.get(self.letter, "warm")

    @property
    def role(self) -> Role:
        """The arm's role. A baseline with overrides is a control, such as a sister method."""
        if self.letter in "AB" and not self.overrides:
            return "baseline"
        return "candidate" if self.letter in "DEGH" else "control"


def parse_arm(key: str) -> Arm:
    """Return the arm of a letter, with or without overrides: 'B:minimize.averaging.kind=pswa,minimize.momentum=0.8'.

    Raises:
        ValueError: for an unknown letter or an override without a value.
    """
    letter, colon, settings = key.partition(":")
    if letter not in TITLES:
        raise ValueError(
            f"there is no arm {key!r}: give some of {', '.join(TITLES)}, or with overrides "
            "as in G:aggregation.method=fisher"
        )
    overrides: dict[str, Any] = {}
    for part in settings.split(",") if colon else ():
        name, mark, value = part.partition("=")
        if not (name and mark and value):
            raise ValueError(f"arm {key!r}: write overrides as field=value, separated by commas")
        name = name.strip().replace("-", "_")
        overrides[name] = parse_value(value.strip(), field_type(Config, name))
    return Arm(key, letter, overrides)


@dataclass(frozen=True, order=True)
class Settings:
    """The settings of an arm besides its budget: the batch size, chosen once, and the learning rate, tuned for it."""

    learning_rate: float
    batch_size: int


def arm_config(arm: Arm, config: Config, settings: Settings, *, seed: int, num_workers: int) -> Config:
    """Return the config with which this arm runs.

    I has num_workers times the batch size and the learning rate (the linear rule of arXiv:1706.02677). With an override
    of the accumulation, each worker passes that many batches before gradients are exchanged, so that a pass has fewer
    exchanges; batch size and learning rate grow by the same factor.
    """
    changes: dict[str, Any] = {
        "seed": seed,
        "minimize.learning_rate": settings.learning_rate,
        "minimize.batch_size": settings.batch_size,
        "trunk.learning_rate": None,
        "fine_tuning.learning_rate": None,
        "fine_tuning.start": arm.start,
    }
    if arm.letter == "C":
        changes["minimize.epoch_fraction"] = RS2_FRACTION
    if arm.letter == "I":
        factor = num_workers * arm.overrides.get("minimize.accumulation", 1)
        changes |= {
            "minimize.learning_rate": settings.learning_rate * factor,
            "minimize.batch_size": settings.batch_size * factor,
        }
    shape: dict[str, Any] = {} if arm.letter in "ABCHI" else {"trunk.epochs": 0.0}
    if arm.letter in "DEF":
        shape["rounds.num"] = 1
    return config.with_overrides(changes | dict(arm.overrides) | shape)


def final_leg(
    arm: Arm,
    config: Config,
    budget: float,
    plan: Plan,
    *,
    num_train: int,
    num_workers: int,
    legs_path: str,
    label: str = "",
) -> Leg:
    """Return the last leg of an arm, whose inputs lead back to all others.

    The stages keep the config's proportions, scaled so that they train for `budget` passes in total, with those of
    distillation's teachers. They are done as in a run: by Ray Train if the config sets several workers. If it leaves
    the number of fine-tuning's workers open, one actor fine-tunes, so that the legs of several arms are done side by
    side.

    Args:
        config: arm_config()'s, and plan its plan.
        num_train: examples of the full set.
        num_workers: of I.
        legs_path: where legs have their directories.
        label: of its legs. A leg that several arms share has the label of the first.
    """
    drawing = plan.drawing(config, legs_path, is_lean=True, label=label)
    if arm.letter in "ABCI":
        return drawing.conventional(budget, num_workers=num_workers if arm.letter == "I" else 1)
    if arm.letter in "DEF":
        drawing = replace(drawing, sizes=drawing.sizes[:1], statistics=(), aggregates=False)
    legs = list(drawing.legs())
    full_set_epochs = sum(leg.epochs for leg in legs if leg.size is None)
    total = full_set_epochs + math.fsum(leg.epochs * leg.size for leg in legs if leg.size is not None) / num_train
    total += math.fsum(leg.planned_passes(num_train, plan.forward_share) - leg.passes(num_train) for leg in legs)
    *_, last = replace(drawing, scale=budget / total).legs(num_workers=config.fine_tuning.workers(auto=1))
    return last
