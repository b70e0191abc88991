"""Spec: the shapes that a network takes and gives for one example."""

import math
from dataclasses import dataclass
from operator import index

import torch
from torch import Tensor

_EXACT = 2**24  # whole numbers from 0 that float32 holds


@dataclass(frozen=True)
class Spec:
    """The shapes of a network's inputs and outputs for one example, without the batch dimension."""

    inputs: tuple[int, ...]  # (C, H, W) of an image, (F,) of a table's row, (T,) of tokens
    outputs: tuple[int, ...]  # (M,) of classes or numbers, (T, V) of the next tokens, (M, H, W) of a mask
    num_values: int | tuple[int | None, ...] | None = None
    """Inputs are int64 in [0, num_values); None: inputs are float32. A tuple says it for each entry of the last
    dimension, such as ids of users and items, (60, 150). If it has None beside ids or masks, all are float32."""

    def __post_init__(self) -> None:
        for name in ("inputs", "outputs"):
            given = getattr(self, name)
            try:
                object.__setattr__(self, name, tuple(index(size) for size in given))
            except TypeError as error:
                raise ValueError(
                    f"Spec.{name} = {given!r}: give a tuple of whole numbers, the sizes of one example without the "
                    "batch, such as (3, 32, 32) or (10,); several parts are joined to one tensor"
                ) from error
        if not isinstance(self.num_values, tuple):
            return
        if self.inputs[-1:] != (len(self.num_values),):
            text = f"Spec.num_values has {len(self.num_values)} entries, and inputs are {list(self.inputs)}"
            raise ValueError(f"{text}: give one for each of the last dimension")
        if not self.are_integers and (most := max(each or 0 for each in self.num_values)) > _EXACT:
            raise ValueError(f"Spec.num_values has {most} ids beside numbers, and float32 holds {_EXACT} exactly")

    @property
    def are_integers(self) -> bool:
        """True if inputs are int64, False if they are float32."""
        return None not in (self.num_values if isinstance(self.num_values, tuple) else (self.num_values,))

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
        return torch.zeros(num, *self.inputs, dtype=torch.int64 if self.are_integers else torch.float32)

    def random(self, num: int, generator: torch.Generator) -> Tensor:
        """Draw inputs [num, *inputs]: standard normal numbers, or integers below num_values."""
        if self.num_values is None:
            return torch.randn(num, *self.inputs, generator=generator)
        if isinstance(self.num_values, int):
            return torch.randint(self.num_values, (num, *self.inputs), generator=generator)
        entries = (Spec(self.inputs[:-1], (), each).random(num, generator) for each in self.num_values)
        return torch.stack([entry if self.are_integers else entry.float() for entry in entries], -1)
