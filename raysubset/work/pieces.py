"""Pieces of work: what an actor is given, and what it says of it meanwhile."""

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from raysubset.config import TrainingStage
from raysubset.ledger import Stage
from raysubset.run_directory import minimum_folder, subsample_folder
from raysubset.training import MEASURES, Cost, Measure, Progress


@dataclass(frozen=True)
class Piece:
    """One minimization: on a subset, or on the full set by a single actor (a trunk, a conventional run)."""

    stage: TrainingStage
    subset_id: int | None = None
    round: int = 0
    indices: np.ndarray | None = field(
        default=None, repr=False, compare=False
    )  # int64, of the training split; None: all
    epochs: float | None = None  # instead of the recipe's
    schedule_span: tuple[float, float] = (0.0, 1.0)
    start_id: str = "initial"
    optimizer_path: str | None = None  # the optimizer state to go on with
    node_speed: float | None = None  # of the node it is sized for, where sizes are by speed
    statistics: tuple[str, ...] = ()  # kinds to leave beside the minimum
    measures: Collection[Measure] = MEASURES  # what its minimum is measured on
    is_subsample: bool = False  # of a part of the subset, with the recipe of subsets

    @property
    def ledger_stage(self) -> Stage:
        return "subsamples" if self.is_subsample else self.stage

    @property
    def folder(self) -> str:
        """Where it leaves its minimum."""
        if self.is_subsample:
            assert self.subset_id is not None
            return subsample_folder(self.round, self.subset_id)
        return self.stage if self.subset_id is None else minimum_folder(self.round, self.subset_id)

    @property
    def label(self) -> str:
        part = "a part of " if self.is_subsample else ""
        return self.stage if self.subset_id is None else f"{part}subset {self.subset_id}"


@dataclass(frozen=True)
class Report:
    """What an actor says of its work while it does it."""

    epoch: float
    num_epochs: float
    loss: float  # of the last whole epoch
    examples_per_s: float
    cost: Cost

    @classmethod
    def of(cls, progress: Progress) -> "Report":
        """Where a minimization stands."""
        per_s = progress.cost.num_forward / max(progress.cost.device_s, 1e-9)
        num_epochs = progress.num_steps / progress.num_steps_per_epoch
        return cls(progress.epoch, num_epochs, progress.loss, per_s, progress.cost)
