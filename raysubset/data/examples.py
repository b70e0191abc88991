"""Examples: tensors on one device, batched by index and augmented by their task or the user's own function.

rows = function(rows, generator)

The user's function, data.augmentation=package.module:function, is called with each training batch. `rows` are the
stored tensors by name (image: uint8 [n, H, W, C]), on the device, before the task turns them into inputs. The function
returns tensors of the same names, types and shapes. The generator is on the device as well. The epoch and the batch's
first example seed it, so that a resumed run draws the same.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raysubset.errors import with_article
from raysubset.pulse import beat
from raysubset.tasks import Task
from raysubset.user_code.functions import in_a_line, load_function, misfit

_FIELD = "data.augmentation"


@dataclass(frozen=True)
class OwnAugmentation:
    """Calls the user's function instead of the task's own augmentation."""

    reference: str

    def draw(self, num: int, seed: int) -> Tensor:
        """Draw a seed for each example of an epoch, int64 [num, 1] on the CPU. A batch uses its first example's."""
        return torch.randint(2**62, (num, 1), generator=torch.Generator().manual_seed(seed))

    def __call__(self, rows: Mapping[str, Tensor], draws: Tensor) -> Mapping[str, Tensor]:
        """Call the function with a batch's rows, seeded by draw()'s rows of these examples.

        Raises:
            ValueError: for what the function raises, and if, in any batch, it returns rows that do not fit.
        """
        generator = torch.Generator(draws.device).manual_seed(int(draws[0]))
        function = load_function(_FIELD, self.reference)
        with in_a_line(_FIELD, self.reference):
            augmented = function(dict(rows), generator)
        if (returned := _described(augmented)) != (wanted := _described(rows)):
            text = f"returned {returned}, and got {wanted}: keep names, types and shapes"
            remedy = "draw() and batch() of a task of your own may make others, such as two views of an image"
            raise misfit(_FIELD, self.reference, f"{text}; {remedy}")
        return augmented

    def try_on(self, rows: Mapping[str, Tensor]) -> None:
        """Call the function twice with copies of some rows and the same draws.

        Raises:
            ValueError: as a call does, and if the results differ, since it draws from another generator.
        """
        seeds = torch.zeros((1, 1), dtype=torch.int64)
        results = [self({name: values.clone() for name, values in rows.items()}, seeds) for _ in range(2)]
        if not all(torch.equal(results[0][name], results[1][name]) for name in rows):
            raise misfit(
                _FIELD, self.reference, "gave other rows with the same generator: draw from the generator alone"
            )


def _described(rows: object) -> str:
    """Return "image torch.uint8 [64, 28, 28, 1], label torch.int64 [64]"."""
    if not isinstance(rows, Mapping):
        return with_article(rows)
    kinds = {
        str(name): f"{values.dtype} {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        for name, values in rows.items()
    }
    return ", ".join(f"{name} {kinds[name]}" for name in sorted(kinds))


class Augmented(ABC):
    """Examples that are augmented if `augment` is set: by the user's augmentation, or else by the task's."""

    task: Task
    augment: bool
    augmentation: OwnAugmentation | None

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    def is_augmented(self) -> bool:
        return self.augment and (self.augmentation is not None or self.task.draw(1, 0) is not None)

    def drawn(self, seed: int) -> Tensor | None:
        """Draw an epoch's augmentation, one row an example, on the CPU, so that it is the same on every device."""
        return (self.augmentation or self.task).draw(len(self), seed) if self.augment else None


@dataclass(frozen=True, eq=False)
class Examples(Augmented):
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

    def epoch(
        self,
        *,
        order_seed: int,
        augmentation_seed: int,
        batch_sizes: Sequence[int],
        first: int = 0,
        rank: int = 0,
        num_workers: int = 1,
        **layout: Any,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the inputs and targets of an epoch's batches in random order, from batch `first` on.

        The order is drawn on the CPU, so that it is the same on every device.

        Args:
            batch_sizes: the sizes of all batches of the epoch; their sum may be less than the number of examples.
            rank: the worker whose part of each batch is yielded: every num_workers-th example, from example `rank`.
            layout: channels_last and dtype, as batch() takes them.
        """
        order = self.order(order_seed)[: sum(batch_sizes)]
        draws = self.draw(augmentation_seed)
        for indices in order.split(list(batch_sizes))[first:]:
            part = indices if num_workers == 1 else indices[rank::num_workers]
            yield self.batch(part, draws=draws, **layout)

    def in_order(self, batch_sizes: Sequence[int], **layout: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of all examples in stored order, without augmentation."""
        for indices in torch.arange(len(self), device=self.device).split(list(batch_sizes)):
            yield self.batch(indices, **layout)

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

        An example keeps its row in whichever batch.
        """
        draws = self.drawn(seed)
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
