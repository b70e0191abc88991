"""Tensors as a network's inputs: numbers with a mean of 0 and a deviation of 1, or integers below a bound."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorInputs:
    """Inputs stored as "inputs": float32 [N, …], standardised on reading, or integers in [0, num_values)."""

    shape: tuple[int, ...]  # of one example
    mean: tuple[float, ...] = (0.0,)  # over the training split: one number a feature of [N, F], else one for all
    std: tuple[float, ...] = (1.0,)  # likewise; 1 if nothing varies
    num_values: int | None = None  # for integers

    column = "inputs"
    augmentation = "none"

    def batch(self, rows: Mapping[str, Tensor], draws: Tensor | None) -> Tensor:
        """Return the inputs [n, …], float32 or int64."""
        inputs = rows[self.column]
        return inputs if self.num_values is None else inputs.long()

    def draw(self, num: int, seed: int) -> Tensor | None:
        return None

    def scaling(self) -> tuple[Tensor, Tensor]:
        """Return (shift, scale), float32: a number is standardised as (number - shift) / scale."""
        return torch.tensor(self.mean, dtype=torch.float32), torch.tensor(self.std, dtype=torch.float32)

    def standardised(self, values: np.ndarray, *, where: str, rows: np.ndarray) -> np.ndarray:
        """Turn raw values, [N, …], into the rows to store.

        Args:
            where: the name of the data in messages.
            rows: int64 [N], the row numbers that messages show.

        Raises:
            ValueError: for tokens that training rows do not have.
        """
        if self.num_values is not None:
            if len(wrong := np.argwhere((values < 0) | (values >= self.num_values))):
                token, row = values[tuple(wrong[0])], rows[wrong[0][0]]
                raise ValueError(
                    f"inputs of {where} have token {token} in row {row}: the train split's are 0 to "
                    f"{self.num_values - 1}, and there must be no others; give floats if these are numbers"
                )
            return np.ascontiguousarray(values, dtype=np.int64 if self.num_values > 2**31 else np.int32)
        scaled = (values.astype(np.float64) - np.array(self.mean)) / np.array(self.std)
        return np.ascontiguousarray(scaled, dtype=np.float32)


def fit_tensors(values: np.ndarray, rows: np.ndarray) -> TensorInputs:
    """Compute mean and deviation over the training `rows` of inputs [N, …]: of each feature of [N, F], else of all.

    Integers [N, T] are tokens. Their largest is taken over all rows, since held-out rows may have it alone.

    Raises:
        ValueError: for negative integers [N, T].
    """
    if values.dtype.kind in "iu" and values.ndim == 2:
        if values.min() < 0:
            raise ValueError(
                f"integer inputs run from {values.min()}: tokens are numbered from 0; give floats otherwise"
            )
        return TensorInputs(values.shape[1:], num_values=int(values.max()) + 1)
    wide = values[rows].astype(np.float64)
    axis = 0 if values.ndim == 2 else None
    mean, std = np.atleast_1d(wide.mean(axis=axis)), np.atleast_1d(wide.std(axis=axis))
    std = np.where(std > 0, std, 1.0)
    return TensorInputs(values.shape[1:], tuple(mean.tolist()), tuple(std.tolist()))
