"""The full set: three splits, and the task that is learned from them."""

import math
from dataclasses import dataclass, field
from typing import Literal, overload

import numpy as np
import pyarrow as pa
import torch

from raysubset.data.examples import Examples
from raysubset.data.own_augmentation import OwnAugmentation
from raysubset.data.split import Split, SplitName
from raysubset.data.streamed import StreamedSplit
from raysubset.data.streamed_examples import WINDOW_BYTES, Batches, StreamedExamples
from raysubset.events import Note
from raysubset.fingerprints import fingerprint
from raysubset.quality import Quality
from raysubset.tasks import Spec, Task

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
    task: Task  # what is learned from it, fitted on the training split
    advice: tuple[Note, ...]  # what was decided for the user, and warnings
    fingerprint: pa.Table = field(default_factory=lambda: fingerprint(()))  # of what it was read from
    augmentation: OwnAugmentation | None = None  # of training batches, in the place of the task's

    @property
    def notes(self) -> tuple[str, ...]:
        """The advice as a person reads it, a line each."""
        return tuple(map(str, self.advice))

    @property
    def spec(self) -> Spec:
        """What a network takes and gives of one example."""
        return self.task.spec()

    @property
    def num_bytes(self) -> int:
        """Of its splits, in the object store of each node."""
        return sum(split.num_bytes for split in (self.train, self.validation, self.test))

    @property
    def quality(self) -> Quality:
        """The metric that verdicts go by."""
        return self.task.measured_by

    @property
    def strata(self) -> np.ndarray:
        """Which training examples stratified cuts keep in proportion: int64 [N] from 0 on."""
        strata = self.task.strata(self.train.arrays())
        return np.zeros(len(self.train), dtype=np.int64) if strata is None else strata

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
    ) -> Batches: ...

    def examples(
        self,
        split: SplitName,
        indices: np.ndarray | None = None,
        *,
        device: torch.device | str = "cpu",
        augment: bool = False,
    ) -> Batches:
        """Tensors of some examples of a split, or of all, on a device; all of a streamed split are streamed.

        Args:
            split: which split.
            indices: int [n], positions in the split; None for all (on the CPU without a copy).
            device: where the tensors are put.
            augment: whether epochs draw the augmentation; for training.
        """
        chosen = self._split(split)
        if indices is None and isinstance(chosen, StreamedSplit):
            return StreamedExamples(chosen, self.task, torch.device(device), augment, self.augmentation)
        return Examples(chosen.take(indices), self.task, augment, self.augmentation).to(device)

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
