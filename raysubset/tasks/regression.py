"""Regression: predicts numbers for an example, by squared, absolute or Huber's error."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raysubset.config.trees import need
from raysubset.tasks.columns import TableInputs
from raysubset.tasks.inputs import ImageInputs, TensorInputs, as_float32
from raysubset.tasks.losses import AbsoluteError, Huber, SquaredError
from raysubset.tasks.spec import Spec
from raysubset.tasks.task import InputsTask, Rows

_NUM_STRATA = 10
_MOST_TARGETS = 20  # that are measured one by one, too
_LEAST_SPREAD = 1e-12  # as a share of the squares: less is rounding


@dataclass(frozen=True)
class Regression(InputsTask[SquaredError | AbsoluteError | Huber]):
    """The task of K numbers an example. Stored rows are the inputs' column and "target", float32 [N, K], standardised.

    The loss is computed on standardised targets, so that learning rates do not depend on units. rmse and mae are in
    the targets' units.
    """

    inputs: ImageInputs | TableInputs | TensorInputs
    target_names: tuple[str, ...]
    mean: tuple[float, ...]  # of each target, over the training split
    std: tuple[float, ...]  # likewise
    objective: SquaredError | AbsoluteError | Huber = field(default_factory=SquaredError)

    name = "regression"
    quality = "r2"

    def __post_init__(self) -> None:
        num = len(self.target_names)
        fits = num == len(self.mean) == len(self.std) and min(self.std, default=0) > 0
        need(fits, f"task.mean and task.std should be {num} numbers, deviations positive")

    def spec(self) -> Spec:
        return self.spec_of(len(self.target_names))

    def targets(self, rows: Rows) -> Tensor:
        return rows["target"]

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return squared and absolute errors, targets and their squares, [n, K] each, of standardised targets."""
        error, wide = outputs.double() - targets.double(), targets.double()
        return {
            "error_squared": error.square(),
            "error_absolute": error.abs(),
            "target": wide,
            "target_squared": wide.square(),
        }

    def values(self, sums: Mapping[str, Any], num: int) -> dict[str, float]:
        """Return r2, the share of variance explained, rmse and mae in the targets' units, all averaged over targets.

        For several targets, up to 20, r2_0, rmse_0 and mae_0 are those of the first, and so on: their units differ. r2
        is NaN if a target is the same for all examples.
        """
        names = ("error_squared", "error_absolute", "target", "target_squared")
        squared, absolute, total, total_squared = (np.array(sums[f"{name}_sum"]) for name in names)
        spread, std = total_squared - total**2 / num, np.array(self.std)
        spread[spread <= _LEAST_SPREAD * total_squared] = math.nan
        each = {"r2": 1 - squared / spread, "rmse": np.sqrt(squared / num) * std, "mae": absolute / num * std}
        values = {name: float(np.mean(of_targets)) for name, of_targets in each.items()}
        if 1 < len(std) <= _MOST_TARGETS:
            values |= {f"{name}_{k}": float(each[name][k]) for k in range(len(std)) for name in each}
        return values

    def watched(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return 1 minus the squared error of standardised targets: the share of the training variance explained."""
        return 1 - (outputs - targets).square().mean(1)

    def strata(self, rows: Mapping[str, np.ndarray]) -> np.ndarray:
        return strata_of_numbers(rows["target"])

    def standardised(self, values: np.ndarray, *, where: str, rows: np.ndarray) -> np.ndarray:
        """Standardise raw targets, [N, K], into the float32 targets to store. Arguments and errors: as_float32()."""
        scaled = (values - np.array(self.mean)) / np.array(self.std)
        return as_float32(scaled, "targets", where=where, rows=rows)

    @property
    def loss_name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return f"{self.objective.name} of standardised targets"

    def scaling_of_outputs(self) -> tuple[Tensor, Tensor]:
        """Return (shift, scale), float64 [K]: outputs * scale + shift is in the targets' units."""
        return torch.tensor(self.mean, dtype=torch.float64), torch.tensor(self.std, dtype=torch.float64)

    def tabulate(self, outputs: Tensor, targets: Tensor) -> dict[str, np.ndarray]:
        """Return float64 target and prediction in the targets' units; for several targets target_0, prediction_0, …"""
        mean, std = self.scaling_of_outputs()
        columns = {}
        for name, values in (("target", targets), ("prediction", outputs)):
            unscaled = (values.double() * std + mean).numpy()
            for number in range(unscaled.shape[1]):
                columns[name if unscaled.shape[1] == 1 else f"{name}_{number}"] = unscaled[:, number]
        return columns

    def describe(self) -> dict[str, Any]:
        return {"targets": list(self.target_names), "inputs": list(self.inputs.shape)}


def strata_of_numbers(targets: np.ndarray) -> np.ndarray:
    """Cut the first target's values into tenths, or into fewer strata of at least four examples: int64 [N]."""
    first = targets.reshape(len(targets), -1)[:, 0]
    num = max(1, min(_NUM_STRATA, len(first) // 4))
    edges = np.unique(np.quantile(first, np.arange(1, num) / num))
    return np.searchsorted(edges, first, side="right").astype(np.int64)
