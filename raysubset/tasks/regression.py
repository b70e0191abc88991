"""Regression: numbers of an example, by squared, absolute or Huber's error."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raysubset.config import TaskConfig
from raysubset.tasks.columns import TableInputs
from raysubset.tasks.images import ImageInputs
from raysubset.tasks.losses import AbsoluteError, Huber, SquaredError
from raysubset.tasks.spec import Spec
from raysubset.tasks.task import InputsTask, Rows
from raysubset.tasks.tensors import TensorInputs

_NUM_STRATA = 10


@dataclass(frozen=True)
class Regression(InputsTask[SquaredError | AbsoluteError | Huber]):
    """K numbers an example. Stored rows are the inputs' column and "target", float32 [N, K], standardised.

    The loss is of standardised targets, so that no rate depends on their unit; qualities are in their own units.
    """

    inputs: ImageInputs | TableInputs | TensorInputs
    target_names: tuple[str, ...]
    mean: tuple[float, ...]  # of each target, over the training split
    std: tuple[float, ...]  # likewise
    objective: SquaredError | AbsoluteError | Huber = field(default_factory=SquaredError)

    name = "regression"
    quality = "r2"

    def spec(self) -> Spec:
        return self.spec_of(len(self.target_names))

    def targets(self, rows: Rows) -> Tensor:
        return rows["target"]

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Of each standardised target: the error squared and absolute, the target and its square, [n, K]."""
        error, wide = outputs.double() - targets.double(), targets.double()
        return {
            "error_squared": error.square(),
            "error_absolute": error.abs(),
            "target": wide,
            "target_squared": wide.square(),
        }

    def values(self, sums: Mapping[str, Any], num: int) -> dict[str, float]:
        """r2, the mean over targets of the share of their variance that is explained; rmse and mae in their units."""
        names = ("error_squared", "error_absolute", "target", "target_squared")
        squared, absolute, total, total_squared = (np.array(sums[f"{name}_sum"]) for name in names)
        spread, std = total_squared - total**2 / num, np.array(self.std)
        with np.errstate(divide="ignore", invalid="ignore"):
            r2 = float(np.mean(1 - squared / spread))
        return {
            "r2": r2,
            "rmse": float(np.sqrt(np.mean(squared / num * std**2))),
            "mae": float(np.mean(absolute / num * std)),
        }

    def watched(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """1 less the squared error of standardised targets: the share of the training variance explained."""
        return 1 - (outputs - targets).square().mean(1)

    def strata(self, rows: Mapping[str, np.ndarray]) -> np.ndarray:
        return strata_of_numbers(rows["target"])

    def standardised(self, values: np.ndarray) -> np.ndarray:
        """Stored targets, float32 [N, K], of raw ones."""
        return np.ascontiguousarray((values - np.array(self.mean)) / np.array(self.std), dtype=np.float32)

    @property
    def loss_name(self) -> str:
        return f"{self.objective.name} of standardised targets"

    def scaling_of_outputs(self) -> tuple[Tensor, Tensor]:
        """(shift, scale), float32 [K]: outputs times scale, plus shift, are in the targets' units."""
        return torch.tensor(self.mean, dtype=torch.float32), torch.tensor(self.std, dtype=torch.float32)

    def tabulate(self, outputs: Tensor, targets: Tensor) -> dict[str, np.ndarray]:
        """target and prediction, float64 in the targets' units; with several targets target_0, prediction_0, …"""
        mean, std = torch.tensor(self.mean, dtype=torch.float64), torch.tensor(self.std, dtype=torch.float64)
        columns = {}
        for name, values in (("target", targets), ("prediction", outputs)):
            own = (values.double() * std + mean).numpy()
            for number in range(own.shape[1]):
                columns[name if own.shape[1] == 1 else f"{name}_{number}"] = own[:, number]
        return columns

    def describe(self) -> dict[str, Any]:
        return {"targets": list(self.target_names), "inputs": list(self.inputs.shape)}


def regression(
    inputs: ImageInputs | TableInputs | TensorInputs, names: tuple[str, ...], config: TaskConfig, train: np.ndarray
) -> Regression:
    """The task as the config has it, given the training targets, float64 [N, K], none of them constant."""
    losses = {"absolute_error": AbsoluteError(), "huber": Huber()}
    mean, std = train.mean(axis=0), train.std(axis=0)
    return Regression(inputs, names, tuple(mean.tolist()), tuple(std.tolist()), losses.get(config.loss, SquaredError()))


def strata_of_numbers(targets: np.ndarray) -> np.ndarray:
    """Tenths of the first target's values, or fewer parts of four examples at least: int64 [N]."""
    first = targets.reshape(len(targets), -1)[:, 0]
    num = max(1, min(_NUM_STRATA, len(first) // 4))
    edges = np.unique(np.quantile(first, np.arange(1, num) / num))
    return np.searchsorted(edges, first, side="right").astype(np.int64)
