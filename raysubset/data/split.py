"""A split in memory: an Arrow table of images, labels and the source's own columns."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

SplitName = Literal["train", "validation", "test"]

RESERVED_COLUMNS = ("image", "label", "row")


@dataclass(frozen=True)
class Split:
    """One split: an Arrow table of one chunk a column, read without copying.

    Columns: image, fixed_size_list<uint8>[H*W*C] in the order H, W, C; label, int64; row, int64, the row number in the
    source's split; and the source's own columns of integers, truth values and strings.
    """

    table: pa.Table
    image_shape: tuple[int, int, int]  # (H, W, C)

    @classmethod
    def from_arrays(
        cls, images: np.ndarray, labels: np.ndarray, rows: np.ndarray, columns: Mapping[str, pa.Array]
    ) -> "Split":
        """Wrap arrays without copying: images uint8 [N, H, W, C] contiguous, labels and rows int64 [N]."""
        assert images.dtype == np.uint8
        assert images.flags.c_contiguous
        _, height, width, channels = images.shape
        flat = pa.FixedSizeListArray.from_arrays(pa.array(images.reshape(-1)), height * width * channels)
        own = {"image": flat, "label": pa.array(labels), "row": pa.array(rows)}
        return cls(pa.table(own | dict(columns)), (height, width, channels))

    def __len__(self) -> int:
        return self.table.num_rows

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
        return self._values("label").to_numpy()

    @property
    def images(self) -> np.ndarray:
        """uint8 [N, H, W, C]: the table's own memory, read-only."""
        return self._values("image").to_numpy().reshape(-1, *self.image_shape)

    def take(self, indices: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
        """Return images, uint8 [n, H, W, C], and labels, int64 [n], of some examples as a copy on the CPU.

        Without indices: of all, in the table's own memory. It may be shared by other processes: never write to it.
        """
        # Arrow's own DLPack, since torch.from_numpy warns of read-only memory.
        images = torch.from_dlpack(self._values("image")).view(-1, *self.image_shape)
        labels = torch.from_dlpack(self._values("label"))
        if indices is None:
            return images, labels
        chosen = torch.tensor(indices, dtype=torch.int64)
        return images.index_select(0, chosen), labels.index_select(0, chosen)

    def _values(self, name: str) -> pa.Array:
        (chunk,) = self.table.column(name).chunks
        return chunk.flatten() if pa.types.is_fixed_size_list(chunk.type) else chunk
