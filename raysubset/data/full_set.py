"""The full set: three splits, and the constants that come from them."""

import math
from dataclasses import dataclass, field
from typing import Literal, overload

import numpy as np
import pyarrow as pa
import torch

from raysubset.data.examples import Augmentation, Examples
from raysubset.data.findings import FULL_RANGE, GreyRange
from raysubset.data.split import Split, SplitName
from raysubset.data.streamed import StreamedSplit
from raysubset.data.streamed_examples import WINDOW_BYTES, StreamedExamples
from raysubset.events import Note
from raysubset.fingerprints import fingerprint
from raysubset.quality import ACCURACY, Quality
from raysubset.tasks import Spec

# A channel that never varies would be divided by zero: one grey level of 256 is the least.
_SMALLEST_STD = 1 / 255

_HISTOGRAM_PIXELS = 2**20  # at a time


@dataclass(frozen=True)
class FullSet:
    """A data set with its three splits. Pickles by reference to Arrow's buffers, so Ray's workers read it in place."""

    name: str
    train: Split | StreamedSplit
    validation: Split
    test: Split
    num_classes: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]  # per channel, of the training split's pixels in [0, 1]
    std: tuple[float, ...]  # likewise; at least one grey level
    augmentation: Augmentation
    advice: tuple[Note, ...]  # what was decided for the user, and warnings
    grey_range: GreyRange = FULL_RANGE  # the values of pixels of more than 8 bits that are black and white
    fingerprint: pa.Table = field(default_factory=lambda: fingerprint(()))  # of what it was read from

    @property
    def notes(self) -> tuple[str, ...]:
        """The advice as a person reads it, a line each."""
        return tuple(map(str, self.advice))

    @property
    def quality(self) -> Quality:
        """What verdicts go by."""
        return ACCURACY

    @property
    def task_name(self) -> str:
        """What is learned, in a word of the config."""
        return "classification"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every image."""
        return self.train.image_shape

    @property
    def spec(self) -> Spec:
        """What a network takes and gives."""
        height, width, channels = self.image_shape
        return Spec((channels, height, width), (self.num_classes,))

    @overload
    def examples(
        self,
        split: Literal["validation", "test"],
        indices: np.ndarray | None = None,
        *,
        device: torch.device | str = "cpu",
        augment: bool = False,
    ) -> Examples: ...

    @overload
    def examples(
        self, split: SplitName, indices: np.ndarray, *, device: torch.device | str = "cpu", augment: bool = False
    ) -> Examples: ...

    @overload
    def examples(
        self, split: SplitName, indices: None = None, *, device: torch.device | str = "cpu", augment: bool = False
    ) -> Examples | StreamedExamples: ...

    def examples(
        self,
        split: SplitName,
        indices: np.ndarray | None = None,
        *,
        device: torch.device | str = "cpu",
        augment: bool = False,
    ) -> Examples | StreamedExamples:
        """Tensors of some examples of a split, or of all, on a device; all of a streamed split are streamed.

        Args:
            split: which split.
            indices: int [n], positions in the split; None for all (on the CPU without a copy).
            device: where the tensors are put.
            augment: whether batches may be augmented as this set is; for training.
        """
        chosen = self._split(split)
        mean, std = torch.tensor(self.mean, device=device), torch.tensor(self.std, device=device)
        augmentation = self.augmentation if augment else "none"
        if indices is None and isinstance(chosen, StreamedSplit):
            return StreamedExamples(chosen, mean, std, augmentation)
        images, labels = chosen.take(indices)
        return Examples(images, labels, mean, std, augmentation).to(device)

    def examples_num_bytes(self, split: SplitName, num: int | None = None) -> int:
        """What examples() of so many examples of a split, or of all, come to hold."""
        chosen = self._split(split)
        num_bytes = (len(chosen) if num is None else num) * chosen.num_bytes_per_example
        if num is None and isinstance(chosen, StreamedSplit):
            return min(num_bytes, 2 * WINDOW_BYTES)
        return num_bytes

    def _split(self, name: SplitName) -> Split | StreamedSplit:
        return getattr(self, name)


def count_levels(images: np.ndarray) -> np.ndarray:
    """How many pixels of uint8 [N, H, W, C] have each grey level, by channel: int64 [C, 256]. Counts can be added."""
    channels = images.shape[3]
    counts = np.zeros((channels, 256), dtype=np.int64)
    num = max(1, _HISTOGRAM_PIXELS // math.prod(images.shape[1:3]))  # bincount widens its input to 8 bytes a pixel
    for start in range(0, len(images), num):
        block = images[start : start + num]
        for channel in range(channels):
            counts[channel] += np.bincount(block[..., channel].ravel(), minlength=256)
    return counts


def statistics_of_levels(counts: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, exact, in units of 255, given count_levels() of the images.

    A deviation is one grey level at least.
    """
    levels = np.arange(256) / 255
    weights = counts / counts.sum(axis=1, keepdims=True)
    mean = weights @ levels
    variance = (weights * (levels - mean[:, None]) ** 2).sum(axis=1)
    std = np.maximum(np.sqrt(variance), _SMALLEST_STD)
    return tuple(mean.tolist()), tuple(std.tolist())
