"""A split whose images stay in Parquet files: labels in memory, images read by row group when they are wanted."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raysubset.data.row_groups import RowGroups


@dataclass(frozen=True, eq=False)
class StreamedSplit:
    """One split, of which only the labels and the source's own columns are held: it pickles without a pixel.

    Columns: as Split's, without image.
    """

    table: pa.Table
    groups: RowGroups

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every image."""
        height, width, channels = self.groups.shape[1:]
        return height, width, channels

    @property
    def num_bytes(self) -> int:
        """Held in memory, and in the object store of each node that reads it."""
        return self.table.nbytes

    @property
    def num_bytes_per_example(self) -> int:
        """Of an image and its label as tensors."""
        return math.prod(self.image_shape) + 8

    @property
    def labels(self) -> np.ndarray:
        """int64 [N]: the table's own memory, read-only."""
        return self._values("label")

    def take(self, indices: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
        """Return images, uint8 [n, H, W, C], and labels, int64 [n], of some examples, or of all, on the CPU.

        Row groups that hold none of them are not opened, the others one at a time: memory is the result and one row
        group. Each is read whole, so examples that lie scattered cost the reading, not the decoding, of all files.

        Raises:
            ValueError: for a file that cannot be read, or has changed.
        """
        positions = np.arange(len(self)) if indices is None else np.asarray(indices, dtype=np.int64)
        images = np.empty((len(positions), *self.image_shape), dtype=np.uint8)
        ascending = np.argsort(positions, kind="stable")
        groups = self.groups.of_rows(self._values("row")[positions[ascending]])
        places = np.split(ascending, np.flatnonzero(np.diff(groups)) + 1) if len(positions) else []
        for place, part in zip(places, self.read([positions[place] for place in places]), strict=True):
            images[place] = part
        return torch.from_numpy(images), torch.from_numpy(self.labels[positions])

    def read(self, parts: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Images, uint8 [n, H, W, C], of one part after another; raises as take() does.

        Args:
            parts: int64 ascending positions in the split, those of a part in one row group.
        """
        return self.groups.read(self._in_group(part) for part in parts)

    def group_bounds(self) -> np.ndarray:
        """int64 [G + 1]: examples from bounds[g] to bounds[g + 1] lie in row group g."""
        return np.searchsorted(self._values("row"), self.groups.starts)

    def _in_group(self, part: np.ndarray) -> tuple[int, np.ndarray]:
        rows = self._values("row")[part]
        group = int(self.groups.of_rows(rows[:1])[0])
        return group, rows - self.groups.starts[group]

    def _values(self, name: str) -> np.ndarray:
        (chunk,) = self.table.column(name).chunks
        return chunk.to_numpy()
