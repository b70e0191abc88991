"""Examples: tensors on one device, batched by index by their task, without a loop over examples."""

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
    """The examples of a split or subset on one device. Their tensors may be read-only shared memory: never write."""

    rows: dict[str, Tensor]  # the stored tensors, [N, …] each
    task: Task
    augment: bool = False  # if epochs draw the augmentation
    augmentation: OwnAugmentation | None = None  # the user's, instead of the task's

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
        """Yield the inputs and targets of an epoch's batches in random order, from batch `first` on.

        The order is drawn on the CPU, so that it is the same on every device.

        Args:
            batch_sizes: the sizes of all batches of the epoch; their sum may be less than the number of examples.
            rank: the worker whose part of each batch is yielded: every num_workers-th example, from example `rank`.
        """
        order = self.order(order_seed)[: sum(batch_sizes)]
        draws = self.draw(augmentation_seed)
        for indices in order.split(list(batch_sizes))[first:]:
            part = indices if num_workers == 1 else indices[rank::num_workers]
            yield self.batch(part, draws=draws, channels_last=channels_last, dtype=dtype)

    def in_order(
        self, batch_sizes: Sequence[int], *, channels_last: bool = True, dtype: torch.dtype = torch.float32
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of all examples in stored order, without augmentation."""
        for indices in torch.arange(len(self), device=self.device).split(list(batch_sizes)):
            yield self.batch(indices, channels_last=channels_last, dtype=dtype)

    def to(self, device: torch.device | str) -> "Examples":
        """Return the same examples on another device."""
        return dataclasses.replace(self, rows={name: values.to(device) for name, values in self.rows.items()})

    def select(self, indices: Tensor) -> "Examples":
        """Copy the examples at `indices`, int64 [n] on the device."""
        return dataclasses.replace(self, rows=self._rows(indices))

    def targets(self) -> Tensor:
        """Return the targets of all examples, [N, …]."""
        return self.task.targets(self.rows)

    def order(self, seed: int) -> Tensor:
        """Draw an epoch's order of all examples on the CPU: int64 [N] on the device."""
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).to(self.device)

    def draw(self, seed: int) -> Tensor | None:
        """Draw an epoch's augmentation: [N, …] on the device, one row an example; None without augmentation.

        It is drawn on the CPU, so that it is the same on every device. An example keeps its row in whichever batch.
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
        """Return the task's inputs [n, …] and targets [n, …] for some of the examples.

        Args:
            indices: int64 [n] on the device, positions in these examples.
            draws: the result of draw(), [N, …], whose rows at `indices` are used; None: no augmentation.
            channels_last: True: images are a view of NHWC memory. False: they are copied to NCHW memory.
            dtype: the type of float inputs; the task computes in float32.
        """
        beat()
        rows, row_draws = self._rows(indices), None if draws is None else draws.index_select(0, indices)
        if row_draws is not None and self.augmentation is not None:
            rows, row_draws = self.augmentation(rows, row_draws), None
        inputs, targets = self.task.batch(rows, row_draws)
        if inputs.is_floating_point():
            inputs = inputs.to(dtype)
        if not channels_last and inputs.ndim == 4:
            # contiguous() would keep the strides of a single channel, which convolutions read as channels-last.
            inputs = inputs.clone(memory_format=torch.contiguous_format)
        return inputs, targets

    def _rows(self, indices: Tensor) -> dict[str, Tensor]:
        return {name: values.index_select(0, indices) for name, values in self.rows.items()}


def joined(parts: Sequence[Examples]) -> Examples:
    """Copy the examples of all parts into one, in order. The parts must differ in nothing but their examples.

    Raises:
        ValueError: if the parts differ in task, or only some are augmented.
    """
    first = parts[0]
    if any(part.task != first.task or part.augment != first.augment for part in parts[1:]):
        raise ValueError("examples that differ in normalisation or augmentation cannot be joined")
    rows = {name: torch.cat([part.rows[name] for part in parts]) for name in first.rows}
    return dataclasses.replace(first, rows=rows)


def even_sizes(num_examples: int, num_batches: int) -> list[int]:
    """Return the sizes of `num_batches` batches, which differ by at most 1: none is too small for batch norm."""
    size, num_larger = divmod(num_examples, num_batches)
    return [size + 1] * num_larger + [size] * (num_batches - num_larger)
