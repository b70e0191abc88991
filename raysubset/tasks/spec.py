"""Spec: what a network takes and gives, of one example."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spec:
    """Shapes of one example at a network's two ends, without the batch dimension."""

    inputs: tuple[int, ...]  # (C, H, W) of an image, (F,) of a table's row, (T,) of tokens
    outputs: tuple[int, ...]  # (M,) of classes or numbers, (T, V) of the next tokens, (M, H, W) of a mask
    num_values: int | None = None  # of int64 inputs, which are from 0 up to it; None: inputs are float32

    @property
    def num_outputs(self) -> int:
        """M of the overdetermination ratio: numbers that the network gives for one example."""
        return math.prod(self.outputs)

    @property
    def is_image(self) -> bool:
        """Whether inputs are images, [N, C, H, W], which have a memory layout."""
        return len(self.inputs) == 3

    def zeros(self, num: int) -> Tensor:
        """Inputs [num, *inputs] of zeros, in torch's default layout."""
        return torch.zeros(num, *self.inputs, dtype=torch.float32 if self.num_values is None else torch.int64)

    def random(self, num: int, generator: torch.Generator) -> Tensor:
        """Inputs [num, *inputs]: standard normal numbers, or integers below num_values."""
        if self.num_values is None:
            return torch.randn(num, *self.inputs, generator=generator)
        return torch.randint(self.num_values, (num, *self.inputs), generator=generator)
