"""The full set: three splits, and the task to learn from them."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch

from raysubset.config import DataConfig
from raysubset.data.examples import Examples, OwnAugmentation
from raysubset.data.row_groups import RowGroups
from raysubset.data.split import SPLITS, Split, SplitName, is_scalar, origin_of
from raysubset.data.streamed import WINDOW_BYTES, Batches, StreamedExamples, StreamedSplit, streaming_notes
from raysubset.events import Note
from raysubset.fingerprints import fingerprint
from raysubset.quality import Quality
from raysubset.tasks import Spec, Task

# The least standard deviation is one grey level of 256: a channel that never varies would be divided by zero.
_SMALLEST_STD = 1 / 255

_HISTOGRAM_PIXELS = 2**20  # counted at a time
_MOST_SAMPLED = 64  # validation examples that a network is tried on


@dataclass(frozen=True)
class FullSet:
    """A data set with three splits. It pickles by reference to Arrow's buffers, so Ray's workers read it in place."""

    name: str
    train: Split
    validation: Split
    test: Split
    task: Task  # fitted on the training split
    advice: tuple[Note, ...]  # decisions made for the user, and warnings
    fingerprint: pa.Table = field(default_factory=lambda: fingerprint(()))  # of the files or arrays it was read from
    start_weights: Mapping[str, pa.Table] = field(default_factory=dict)  # fingerprints of model.weights, by their name
    augmentation: OwnAugmentation | None = None  # of training batches, instead of the task's
    is_ever_augmented: bool = True  # False: data.augmentation=none, whatever the task draws

    @property
    def notes(self) -> tuple[str, ...]:
        """The advice as lines of text."""
        return tuple(map(str, self.advice))

    @property
    def spec(self) -> Spec:
        """The shapes that a network takes and gives for one example."""
        return self.task.spec()

    @property
    def num_bytes(self) -> int:
        """The bytes of all splits, which each node's object store holds."""
        return sum(split.num_bytes for split in (self.train, self.validation, self.test))

    @property
    def quality(self) -> Quality:
        """The metric that verdicts go by."""
        task = self.task
        return Quality(task.quality, task.higher_is_better, task.is_share, task.unit, task.margin)

    @property
    def strata(self) -> np.ndarray:
        """The stratum of each training example, int64 [N] from 0: stratified cuts keep their proportions."""
        strata = self.task.strata(self.train.arrays())
        return np.zeros(len(self.train), dtype=np.int64) if strata is None else strata

    def examples(
        self,
        split: SplitName,
        indices: np.ndarray | None = None,
        *,
        device: torch.device | str = "cpu",
        augment: bool = False,
    ) -> Examples:
        """Return a split's examples, or some of them, in a device's memory, also those of a streamed split.

        Args:
            split: the name of the split.
            indices: int [n], positions in the split; None for all (on the CPU without a copy).
            device: the device of the tensors.
            augment: True: epochs draw the augmentation, for training.
        """
        source: Split = getattr(self, split)
        augment = augment and self.is_ever_augmented
        return Examples(source.take(indices), self.task, augment, self.augmentation).to(device)

    def sample(self) -> Examples:
        """Return some validation examples, on the CPU, for trying a network."""
        return self.examples("validation", np.arange(min(len(self.validation), _MOST_SAMPLED)))

    def training_batches(
        self, indices: np.ndarray | None = None, *, device: torch.device | str = "cpu", augment: bool = False
    ) -> Batches:
        """Return training examples as examples() does, except all of a streamed split, which are streamed."""
        if indices is None and isinstance(self.train, StreamedSplit):
            augment = augment and self.is_ever_augmented
            return StreamedExamples(self.train, self.task, torch.device(device), augment, self.augmentation)
        return self.examples("train", indices, device=device, augment=augment)

    def training_num_bytes(self, num: int | None = None) -> int:
        """Return the bytes that examples() holds for `num` training examples, or training_batches() for all."""
        num_bytes = (len(self.train) if num is None else num) * self.train.num_bytes_per_example
        if num is None and isinstance(self.train, StreamedSplit):
            return min(num_bytes, 2 * WINDOW_BYTES)
        return num_bytes


def assembled(
    config: DataConfig,
    rows: Mapping[SplitName, np.ndarray],
    stored: Callable[[SplitName], Mapping[str, np.ndarray]],
    task: Task,
    notes: Iterable[Note],
    *,
    tables: Mapping[SplitName, pa.Table] | None = None,
    groups: RowGroups | None = None,
) -> FullSet:
    """Build the full set of the tensors that `stored` returns for each split's rows.

    Args:
        rows: the rows of each split, in its own split of the source or in the source's training split.
        tables: the splits of the source, whose scalars are kept as well.
        groups: the files of training inputs that are streamed, and that `stored` leaves out.
    """
    splits = dict[SplitName, Split]()
    for split in SPLITS:
        tensors = {name: np.ascontiguousarray(values) for name, values in stored(split).items()}
        table = tables[origin_of(split, tables)] if tables else pa.table({})
        names = [field.name for field in table.schema if is_scalar(field.type) and field.name not in {*tensors, "row"}]
        # take() copies: pickling a slice would include the buffers of the whole column.
        taken = {name: table.column(name).take(pa.array(rows[split])).combine_chunks() for name in names}
        splits[split] = Split.from_arrays(tensors, rows[split], taken)
    train, validation, test = (splits[split] for split in SPLITS)
    if groups is not None:
        train = StreamedSplit(train.table, groups.shapes | dict(train.shapes), groups)
        notes = [*notes, *streaming_notes(train, validation.num_bytes + test.num_bytes)]
    return FullSet(config.name, train, validation, test, task, tuple(notes))


def count_levels(images: np.ndarray) -> np.ndarray:
    """Count the pixels of each grey level in uint8 [N, H, W, C], by channel: int64 [C, 256]. Counts can be added."""
    channels = images.shape[3]
    counts = np.zeros((channels, 256), dtype=np.int64)
    num = max(1, _HISTOGRAM_PIXELS // math.prod(images.shape[1:3]))  # bincount widens its input to 8 bytes a pixel
    for start in range(0, len(images), num):
        block = images[start : start + num]
        for channel in range(channels):
            counts[channel] += np.bincount(block[..., channel].ravel(), minlength=256)
    return counts


def statistics_of_levels(counts: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the exact mean and standard deviation of each channel in [0, 1], from count_levels() of the images.

    A deviation is at least one grey level.
    """
    levels = np.arange(256) / 255
    weights = counts / counts.sum(axis=1, keepdims=True)
    mean = weights @ levels
    variance = (weights * (levels - mean[:, None]) ** 2).sum(axis=1)
    std = np.maximum(np.sqrt(variance), _SMALLEST_STD)
    return tuple(mean.tolist()), tuple(std.tolist())
