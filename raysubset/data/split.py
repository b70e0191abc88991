"""A split in memory: an Arrow table of named tensors, one row an example, and the source's own columns."""

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

Shapes = Mapping[str, tuple[int, ...]]  # the shape of each named tensor of one example


@dataclass(frozen=True)
class Split:
    """One split: an Arrow table with one chunk a column, which is read without copying.

    Its columns are the tensors, as numbers or flat fixed-size lists of numbers; row, int64, the row number in the
    source's split; and the source's own columns of integers, truth values and strings.
    """

    table: pa.Table
    shapes: Shapes

    @classmethod
    def from_arrays(
        cls, tensors: Mapping[str, np.ndarray], rows: np.ndarray, columns: Mapping[str, pa.Array]
    ) -> "Split":
        """Wrap arrays without copying them: contiguous tensors [N, …] and rows int64 [N]."""
        tensor_columns: dict[str, pa.Array] = {}
        for name, values in tensors.items():
            assert values.flags.c_contiguous
            flat = pa.array(values.reshape(-1))
            is_list = values.ndim > 1
            size = math.prod(values.shape[1:])
            tensor_columns[name] = pa.FixedSizeListArray.from_arrays(flat, size) if is_list else flat
        shapes = {name: values.shape[1:] for name, values in tensors.items()}
        return cls(pa.table(tensor_columns | {"row": pa.array(rows)} | dict(columns)), shapes)

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def num_bytes(self) -> int:
        """The bytes held in memory, and in the object store of each node that reads the split."""
        return self.table.nbytes

    @property
    def num_bytes_per_example(self) -> int:
        """The bytes of an example's tensors."""
        types = (self._values(name).type for name in self.shapes)
        return sum(math.prod(s) * t.bit_width // 8 for s, t in zip(self.shapes.values(), types, strict=True))

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the tensors, [N, …] each, as read-only views of the table's memory."""
        return {name: self._values(name).to_numpy().reshape(-1, *shape) for name, shape in self.shapes.items()}

    def attributes(self, name: str | None) -> pa.Table:
        """Return a table of columns by which subsets can be cut, with the column `name`."""
        return self.table

    def take(self, indices: np.ndarray | None = None) -> dict[str, Tensor]:
        """Return the tensors [n, …] of some examples as a copy on the CPU.

        Without indices, return all in the table's own memory, which other processes may share: never write to it.
        """
        # Arrow's own DLPack, since torch.from_numpy warns of read-only memory.
        tensors = {name: torch.from_dlpack(self._values(name)).view(-1, *shape) for name, shape in self.shapes.items()}
        if indices is None:
            return tensors
        positions = torch.tensor(indices, dtype=torch.int64)
        return {name: values.index_select(0, positions) for name, values in tensors.items()}

    def _values(self, name: str) -> pa.Array:
        (chunk,) = self.table.column(name).chunks
        return chunk.flatten() if pa.types.is_fixed_size_list(chunk.type) else chunk
