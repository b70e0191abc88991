"""Examples as tensors on one device: batches by index, made by their task, without a loop over examples."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raysubset.data.own_augmentation import OwnAugmentation, drawn
from raysubset.pulse import beat
from raysubset.tasks import Task


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples on one device. Their tensors may be read-only shared memory: nothing here writes to them."""

    rows: dict[str, Tensor]  # [N, …] each, as they are stored
    task: Task
    augment: bool = False  # whether epochs draw the augmentation
    augmentation: OwnAugmentation | None = None  # in the place of the task's

    def __len__(self) -> int:
        return len(next(iter(self.rows.values())))

    @property
    def device(self) -> torch.device:
        return next(iter(self.rows.values())).device

    @property
    def is_augmented(self) -> bool:
        return self.augment and (self.augmentation is not None or self.task.augmentation != "none")

    def epoch(
        self,
        *,
        order_seed: int,
        augmentation_seed: int,
        batch_sizes: Sequence[int],
        first: int = 0,
        rank: int = 0,
        num_workers: int = 1,
        channels_last: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of an epoch in random order, from batch `first` on: inputs and targets, as the task makes them.

        The order is drawn on the CPU, so that it is the same on every device.

        Args:
            batch_sizes: of all batches of the epoch; they may take less than all examples.
            rank: which part of each batch is wanted, of num_workers: every num_workers-th example from this one on.
        """
        order = self.order(order_seed)[: sum(batch_sizes)]
        draws = self.draw(augmentation_seed)
        for indices in order.split(list(batch_sizes))[first:]:
            part = indices if num_workers == 1 else indices[rank::num_workers]
            yield self.batch(part, draws=draws, channels_last=channels_last, dtype=dtype)

    def in_order(
        self, batch_sizes: Sequence[int], *, channels_last: bool = True, dtype: torch.dtype = torch.float32
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of all examples as they lie, without augmentation."""
        for indices in torch.arange(len(self), device=self.device).split(list(batch_sizes)):
            yield self.batch(indices, channels_last=channels_last, dtype=dtype)

    def to(self, device: torch.device | str) -> "Examples":
        """The same examples on another device."""
        return dataclasses.replace(self, rows={name: values.to(device) for name, values in self.rows.items()})

    def select(self, indices: Tensor) -> "Examples":
        """Some of the examples, in memory of their own: indices int64 [n] on the device."""
        return dataclasses.replace(self, rows=self._rows(indices))

    def targets(self) -> Tensor:
        """The targets of all examples, [N, …]."""
        return self.task.targets(self.rows)

    def order(self, seed: int) -> Tensor:
        """An epoch's order of all examples: int64 [N] on the device, drawn on the CPU."""
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).to(self.device)

    def draw(self, seed: int) -> Tensor | None:
        """Draw an epoch's augmentation: [N, …] on the device, a row an example; None without one.

        Drawn on the CPU, so that every device sees the same; a row belongs to an example wherever it is batched.
        """
        draws = drawn(self.task, self.augmentation, len(self), seed) if self.augment else None
        return None if draws is None else draws.to(self.device)

    def batch(
        self,
        indices: Tensor,
        *,
        draws: Tensor | None = None,
        channels_last: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        """Return the inputs [n, …] and the targets [n, …] of some examples, as the task makes them.

        Args:
            indices: int64 [n] on the device, positions in these examples.
            draws: draw()'s [N, …], of which the rows of `indices` are used; None leaves examples as they are.
            channels_last: images are a view of NHWC memory; else the memory is NCHW, at the price of a copy.
            dtype: of inputs that are no integers; the task's arithmetic is float32.
        """
        beat()
        rows, own = self._rows(indices), None if draws is None else draws.index_select(0, indices)
        if own is not None and self.augmentation is not None:
            rows, own = self.augmentation(rows, own), None
        inputs, targets = self.task.batch(rows, own)
        if inputs.is_floating_point():
            inputs = inputs.to(dtype)
        if not channels_last and inputs.ndim == 4:
            # contiguous() would keep the strides of one channel, which convolutions take for channels-last.
            inputs = inputs.clone(memory_format=torch.contiguous_format)
        return inputs, targets

    def _rows(self, indices: Tensor) -> dict[str, Tensor]:
        return {name: values.index_select(0, indices) for name, values in self.rows.items()}


def joined(parts: Sequence[Examples]) -> Examples:
    """The examples of all parts behind one another, in memory of their own; the parts share all but the examples.

    Raises:
        ValueError: if the parts are of different tasks, or some are augmented.
    """
    first = parts[0]
    if any(part.task != first.task or part.augment != first.augment for part in parts[1:]):
        raise ValueError("examples that differ in normalisation or augmentation cannot be joined")
    rows = {name: torch.cat([part.rows[name] for part in parts]) for name in first.rows}
    return dataclasses.replace(first, rows=rows)


def even_sizes(num_examples: int, num_batches: int) -> list[int]:
    """Sizes of that many batches, all but equal: none is too small for batch normalisation."""
    size, rest = divmod(num_examples, num_batches)
    return [size + 1] * rest + [size] * (num_batches - rest)
