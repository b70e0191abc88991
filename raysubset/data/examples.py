"""Examples as tensors on one device: batches by index, normalised and augmented there, without a loop over examples."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from raysubset.pulse import beat

Augmentation = Literal["none", "crop_flip"]

# Zero padding on each side, and so the largest shift, is the side divided by this: 4 pixels for CIFAR's 32.
_SIDES_PER_PADDING = 8


class Batches(Protocol):
    """What the loop and the evaluation ask of examples, held in memory or streamed: Examples says what each means."""

    def __len__(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

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
    ) -> Iterator[tuple[Tensor, Tensor]]: ...

    def in_order(
        self, batch_sizes: Sequence[int], *, channels_last: bool = True, dtype: torch.dtype = torch.float32
    ) -> Iterator[tuple[Tensor, Tensor]]: ...


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples on one device. Images may be read-only shared memory: nothing here writes to them."""

    images: Tensor  # uint8 [N, H, W, C]
    labels: Tensor  # int64 [N]
    mean: Tensor  # float32 [C], of pixels in [0, 1]
    std: Tensor  # float32 [C], of pixels in [0, 1]
    augmentation: Augmentation = "none"

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        return self.labels.device

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
        """Batches of an epoch in random order, from batch `first` on: images [n, C, H, W] and labels [n], normalised.

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
        moved = {name: getattr(self, name).to(device) for name in ("images", "labels", "mean", "std")}
        return dataclasses.replace(self, **moved)

    def order(self, seed: int) -> Tensor:
        """An epoch's order of all examples: int64 [N] on the device, drawn on the CPU."""
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).to(self.device)

    def draw(self, seed: int) -> Tensor | None:
        """Draw an epoch's augmentation: int64 [N, 3] on the device, a row (dy, dx, flip) an example; None without one.

        Drawn on the CPU, so that every device sees the same; a row belongs to an example wherever it is batched.
        """
        if self.augmentation == "none":
            return None
        return draw_augmentation(len(self), self.images.shape[1:], seed).to(self.images.device)

    def batch(
        self,
        indices: Tensor,
        *,
        draws: Tensor | None = None,
        channels_last: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        """Return the normalised images [n, C, H, W] and the labels [n] of some examples.

        Whole images are rows to the arithmetic: broadcasting over [H*W*C] rather than [C] takes 1/6 of the time on
        CIFAR-10 (batch 64, one thread), the same on MNIST.

        Args:
            indices: int64 [n] on the device, positions in these examples.
            draws: draw()'s [N, 3], of which the rows of `indices` are used; None leaves the images as they are.
            channels_last: a view of NHWC memory; else the memory is NCHW, at the price of a copy.
            dtype: of the images; the arithmetic is float32.
        """
        beat()
        _, height, width, channels = self.images.shape
        if draws is None:
            pixels = self.images.flatten(1).index_select(0, indices)
        else:
            chosen = self.images.index_select(0, indices)
            pixels = crop_and_flip(chosen, draws.index_select(0, indices)).flatten(1)
        normalised = torch.addcmul(self._shift, pixels.to(torch.float32), self._scale)
        images = normalised.view(-1, height, width, channels).permute(0, 3, 1, 2).to(dtype)
        if not channels_last:
            # contiguous() would keep the strides of one channel, which convolutions take for channels-last.
            images = images.clone(memory_format=torch.contiguous_format)
        return images, self.labels.index_select(0, indices)

    @cached_property
    def _scale(self) -> Tensor:
        """float32 [H*W*C]: what a uint8 pixel is multiplied by."""
        return (1 / (255 * self.std)).repeat(self.images.shape[1] * self.images.shape[2])

    @cached_property
    def _shift(self) -> Tensor:
        """float32 [H*W*C]: what is added after that."""
        return (-self.mean / self.std).repeat(self.images.shape[1] * self.images.shape[2])


def draw_augmentation(num: int, image_shape: Sequence[int], seed: int) -> Tensor:
    """Examples.draw() for so many images [H, W, C], on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    height, width = image_shape[:2]
    ranges = (2 * (height // _SIDES_PER_PADDING) + 1, 2 * (width // _SIDES_PER_PADDING) + 1, 2)
    return torch.stack([torch.randint(high, (num,), generator=generator) for high in ranges], dim=1)


def joined(parts: Sequence[Examples]) -> Examples:
    """The examples of all parts behind one another, in memory of their own; the parts share all but the examples.

    Raises:
        ValueError: if the parts differ in normalisation or augmentation.
    """
    first = parts[0]
    for part in parts[1:]:
        same = torch.equal(part.mean, first.mean) and torch.equal(part.std, first.std)
        if not same or part.augmentation != first.augmentation:
            raise ValueError("examples that differ in normalisation or augmentation cannot be joined")
    images, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("images", "labels"))
    return dataclasses.replace(first, images=images, labels=labels)


def even_sizes(num_examples: int, num_batches: int) -> list[int]:
    """Sizes of that many batches, all but equal: none is too small for batch normalisation."""
    size, rest = divmod(num_examples, num_batches)
    return [size + 1] * rest + [size] * (num_batches - rest)


def crop_and_flip(images: Tensor, draws: Tensor) -> Tensor:
    """Crop each image out of itself padded with black by an eighth of its side, then mirror it where drawn.

    One gather with computed indices; a batch of 64 CIFAR images takes 0.15 ms on one CPU thread.

    Args:
        images: uint8 [n, H, W, C], contiguous.
        draws: int64 [n, 3] of (dy, dx, flip): the crop's upper left corner in the padded image; 1 to mirror.

    Returns:
        uint8 [n, H, W, C], in memory of its own.
    """
    num, height, width, channels = images.shape
    border_y, border_x = height // _SIDES_PER_PADDING, width // _SIDES_PER_PADDING
    padded = pad(images, (0, 0, border_x, border_x, border_y, border_y))
    padded_height, padded_width = padded.shape[1:3]
    dy, dx, flip = draws[:, :, None].unbind(1)  # each [n, 1]
    x = torch.arange(width, device=images.device)
    columns = torch.where(flip == 1, width - 1 - x, x) + dx  # [n, W]
    first_rows = torch.arange(num, device=images.device)[:, None] * padded_height
    rows = first_rows + torch.arange(height, device=images.device) + dy  # [n, H], of all images below one another
    pixels = rows[:, :, None] * padded_width + columns[:, None, :]
    return padded.view(-1, channels).index_select(0, pixels.flatten()).view(images.shape)
