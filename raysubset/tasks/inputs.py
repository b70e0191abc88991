"""Turns stored images and tensors into a network's inputs: normalisation and augmentation, on the device, no loop."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from raysubset.config.trees import need

Augmentation = Literal["none", "crop_flip"]
GreyRange = tuple[int, int]  # for pixels of more than 8 bits: the values of black and of white
FULL_RANGE: GreyRange = (0, 65535)

# The padding on each side, which is also the largest shift, is the side divided by this: 4 pixels for CIFAR's 32.
_SIDES_PER_PADDING = 8

LEAST_DEVIATION = 10 * np.finfo(np.float64).eps  # as a share of the mean: less is rounding, as of 0.1 + 0.2 beside 0.3
_MOST = 2**28  # numbers in one example: an image of 16,384×16,384
_LARGE = 1e6  # for a mean or a standard deviation of pixels in [0, 1]


@dataclass(frozen=True)
class ImageInputs:
    """Turns stored images, uint8 [N, H, W, C], into float32 [N, C, H, W] with a mean of 0 and a deviation of 1."""

    image_shape: tuple[int, int, int]  # (H, W, C)
    mean: tuple[float, ...]  # of each channel, over the training split's pixels in [0, 1]
    std: tuple[float, ...]  # likewise; at least one grey level
    augmentation: Augmentation = "none"  # of training batches
    grey_range: GreyRange = FULL_RANGE

    column = "image"

    def __post_init__(self) -> None:
        shape, (black, white) = self.image_shape, self.grey_range
        need(min(shape) > 0 and math.prod(shape) <= _MOST, f"image_shape = {list(shape)!r:.80} is no [H, W, C]")
        for name, values in (("mean", self.mean), ("std", self.std)):
            fits = len(values) == shape[2] and all(-_LARGE < value < _LARGE for value in values)
            need(fits, f"{name} = {list(values)!r:.80} should be {shape[2]} numbers, one a channel")
        is_range = -_LARGE < black < white < _LARGE
        need(is_range, f"grey_range = {self.grey_range!r:.80} should be black and white, of pixels of over 8 bits")
        need(min(self.std) > 0, f"std = {list(self.std)} must be positive")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W), the shape of one image that a network takes."""
        height, width, channels = self.image_shape
        return channels, height, width

    def batch(self, rows: Mapping[str, Tensor], draws: Tensor | None) -> Tensor:
        """Normalise and augment images to float32 [n, C, H, W], a view of NHWC memory.

        The arithmetic treats an image as one row: broadcasting over [H*W*C] instead of [C] takes 1/6 of the time on
        CIFAR-10 (batch 64, one thread), and the same time on MNIST.

        Args:
            rows: "image", uint8 [n, H, W, C]; read-only memory is not written to.
            draws: the rows of draw() for these images; None: no augmentation.
        """
        images = rows["image"]
        height, width, channels = self.image_shape
        pixels = (images if draws is None else crop_and_flip(images, draws)).flatten(1)
        scale, shift = _factors(self, images.device)
        normalised = torch.addcmul(shift, pixels.to(torch.float32), scale)
        return normalised.view(-1, height, width, channels).permute(0, 3, 1, 2)

    def draw(self, num: int, seed: int) -> Tensor:
        """Draw (dy, dx, flip) of crop_flip for `num` images, int64 [num, 3] on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        height, width, _ = self.image_shape
        ranges = (2 * (height // _SIDES_PER_PADDING) + 1, 2 * (width // _SIDES_PER_PADDING) + 1, 2)
        return torch.stack([torch.randint(high, (num,), generator=generator) for high in ranges], dim=1)

    def scaling(self) -> tuple[Tensor, Tensor]:
        """Return (shift, scale), float32 [1, C, 1, 1]: a pixel in [0, 1] is normalised as (pixel - shift) / scale."""
        mean, std = (torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return mean, std


@lru_cache(maxsize=4)
def _factors(inputs: ImageInputs, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (factor, shift), float32 [H*W*C] each: a uint8 pixel is normalised as pixel * factor + shift."""
    mean, std = (torch.tensor(values, device=device) for values in (inputs.mean, inputs.std))
    num = inputs.image_shape[0] * inputs.image_shape[1]
    return (1 / (255 * std)).repeat(num), (-mean / std).repeat(num)


def crop_and_flip(images: Tensor, draws: Tensor) -> Tensor:
    """Pad each image with black by an eighth of its side, crop it to its size, and mirror it if drawn.

    This is one gather with computed indices. A batch of 64 CIFAR images takes 0.15 ms on one CPU thread.

    Args:
        images: uint8 [n, H, W, C], contiguous.
        draws: int64 [n, 3] of (dy, dx, flip): the crop's upper left corner in the padded image; 1 to mirror.

    Returns:
        uint8 [n, H, W, C] in new memory.
    """
    num, height, width, channels = images.shape
    border_y, border_x = height // _SIDES_PER_PADDING, width // _SIDES_PER_PADDING
    padded = pad(images, (0, 0, border_x, border_x, border_y, border_y))
    padded_height, padded_width = padded.shape[1:3]
    dy, dx, flip = draws[:, :, None].unbind(1)  # each [n, 1]
    x = torch.arange(width, device=images.device)
    columns = torch.where(flip == 1, width - 1 - x, x) + dx  # [n, W]
    first_rows = torch.arange(num, device=images.device)[:, None] * padded_height
    rows = first_rows + torch.arange(height, device=images.device) + dy  # [n, H], in all images stacked vertically
    pixels = rows[:, :, None] * padded_width + columns[:, None, :]
    return padded.view(-1, channels).index_select(0, pixels.flatten()).view(images.shape)


@dataclass(frozen=True)
class TensorInputs:
    """Inputs stored as "inputs": float32 [N, …], standardised on reading, or integers in [0, num_values)."""

    shape: tuple[int, ...]  # of one example
    mean: tuple[float, ...] = (0.0,)  # over the training split: one number a feature of [N, F], else one for all
    std: tuple[float, ...] = (1.0,)  # likewise; 1 if it does not vary
    num_values: int | None = None  # for integers

    column = "inputs"
    augmentation = "none"

    def __post_init__(self) -> None:
        has_shape = len(self.shape) > 0 and min(self.shape) > 0 and math.prod(self.shape) <= _MOST
        lengths = (1, *self.shape) if len(self.shape) == 1 else (1,)
        has_scales = len(self.mean) == len(self.std) and len(self.mean) in lengths and min(self.std) > 0
        need(has_shape and has_scales, "inputs hold no shape with its means and positive deviations")
        has_bound = self.num_values is None or 0 < self.num_values <= _MOST
        need(has_bound, f"num_values = {self.num_values} of inputs is out of range")

    def batch(self, rows: Mapping[str, Tensor], draws: Tensor | None) -> Tensor:
        """Return the inputs [n, …], float32 or int64."""
        inputs = rows[self.column]
        return inputs if self.num_values is None else inputs.long()

    def scaling(self) -> tuple[Tensor, Tensor]:
        """Return (shift, scale), float64: a number is standardised as (number - shift) / scale."""
        return torch.tensor(self.mean, dtype=torch.float64), torch.tensor(self.std, dtype=torch.float64)

    def standardised(self, values: np.ndarray, *, where: str, rows: np.ndarray) -> np.ndarray:
        """Turn raw values, [N, …], into the rows to store.

        Args:
            where: the name of the data in messages.
            rows: int64 [N], the row numbers that messages show.

        Raises:
            ValueError: for tokens that training rows do not have, and as as_float32() does.
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
        return as_float32(scaled, "inputs", where=where, rows=rows)


def as_float32(standardised: np.ndarray, name: str, *, where: str, rows: np.ndarray) -> np.ndarray:
    """Round standardised numbers, [N, …], to the float32 to store.

    Args:
        name: what the numbers are in messages.
        where: the name of the data in messages.
        rows: int64 [N], the row numbers that messages show.

    Raises:
        ValueError: with the row of a number that is too large for float32.
    """
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(standardised, dtype=np.float32)
    if not np.isfinite(stored).all():
        far = int(np.flatnonzero(~np.isfinite(stored).reshape(len(stored), -1).all(axis=1))[0])
        raise ValueError(
            f"{name} in row {rows[far]} of {where} lie too far from the training rows' mean, in standard deviations, "
            "for 32-bit floats: leave the row out"
        )
    return stored


def too_wide(names: str, values: np.ndarray, remedy: str) -> ValueError:
    """Return the error for numbers whose mean or deviation 64-bit floats cannot hold."""
    lowest, highest = values.min(), values.max()
    return ValueError(
        f"{names} from {lowest:g} to {highest:g}, which 64-bit floats cannot standardise: take another unit, or "
        f"{remedy}"
    )


def fit_tensors(values: np.ndarray, rows: np.ndarray) -> TensorInputs:
    """Compute mean and deviation over the training `rows` of inputs [N, …]: of each feature of [N, F], else of all.

    Integers [N, T] are tokens. Their largest is taken over all rows, since held-out rows may have it alone.

    Raises:
        ValueError: for negative integers [N, T], and for numbers whose deviation 64-bit floats cannot hold.
    """
    if values.dtype.kind in "iu" and values.ndim == 2:
        if values.min() < 0:
            raise ValueError(
                f"integer inputs run from {values.min()}: tokens are numbered from 0; give floats otherwise"
            )
        return TensorInputs(values.shape[1:], num_values=int(values.max()) + 1)
    wide = values[rows].astype(np.float64)
    axis = 0 if values.ndim == 2 else None
    with np.errstate(over="ignore", invalid="ignore"):
        mean, std = np.atleast_1d(wide.mean(axis=axis)), np.atleast_1d(wide.std(axis=axis))
    if not np.isfinite(std).all():
        raise too_wide("inputs run", wide, "leave rows out whose values stand for missing ones")
    std = np.where(std > LEAST_DEVIATION * np.abs(mean), std, 1.0)
    return TensorInputs(values.shape[1:], tuple(mean.tolist()), tuple(std.tolist()))
