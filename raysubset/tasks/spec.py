"""Spec: the shapes that a network takes and gives for one example."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spec:
    """The shapes of a network's inputs and outputs for one example, without the batch dimension."""

    inputs: tuple[int, ...]  # (C, H, W) of an image, (F,) of a table's row, (T,) of tokens
    outputs: tuple[int, ...]  # (M,) of classes or numbers, (T, V) of the next tokens, (M, H, W) of a mask
    num_values: int | None = None  # inputs are int64 in [0, num_values); None: inputs are float32

    @property
    def num_outputs(self) -> int:
        """M of the overdetermination ratio: how many numbers the network gives for one example."""
        return math.prod(self.outputs)

    @property
    def is_image(self) -> bool:
        """True if inputs are images, [N, C, H, W], which have a memory layout."""
        return len(self.inputs) == 3

    def zeros(self, num: int) -> Tensor:
        """Return inputs [num, *inputs] of zeros, in torch's default layout."""
        return torch.zeros(num, *self.inputs, dtype=torch.float32 if self.num_values is None else torch.int64)

    def random(self, num: int, generator: torch.Generator) -> Tensor:
        """Draw inputs [num, *inputs]: standard normal numbers, or integers below num_values."""
        if self.num_values is None:
            return torch.randn(num, *self.inputs, generator=generator)
        return torch.randint(self.num_values, (num, *self.inputs), generator=generator)
