"""Tensors as a network's inputs: numbers with a mean of 0 and a deviation of 1, or integers below a bound."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorInputs:
    """Named "inputs": float32 [N, …], standardised when they were read, or integers from 0 up to num_values."""

    shape: tuple[int, ...]  # of one example
    mean: tuple[float, ...] = (0.0,)  # of each feature of [N, F], else one number; of the training split
    std: tuple[float, ...] = (1.0,)  # likewise; 1 where nothing varies
    num_values: int | None = None  # of integers

    column = "inputs"
    augmentation = "none"

    def batch(self, rows: Mapping[str, Tensor], draws: Tensor | None) -> Tensor:
        """[n, …]: float32, or int64."""
        inputs = rows[self.column]
        return inputs if self.num_values is None else inputs.long()

    def draw(self, num: int, seed: int) -> Tensor | None:
        return None

    def scaling(self) -> tuple[Tensor, Tensor]:
        """(shift, scale), float32: what a number is lessened by and then divided by."""
        return torch.tensor(self.mean, dtype=torch.float32), torch.tensor(self.std, dtype=torch.float32)

    def standardised(self, values: np.ndarray, *, where: str, rows: np.ndarray) -> np.ndarray:
        """Stored rows of raw ones, [N, …].

        Args:
            where: names them in messages.
            rows: int64 [N], numbers that messages show for them.

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
    """Statistics of the training rows of inputs [N, …]: of each feature of [N, F], of all numbers else.

    Integers [N, T] are tokens, which are counted in all rows: any of them may be held out.
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
