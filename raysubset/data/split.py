"""A split in memory: an Arrow table of named tensors, a row an example, and the source's own columns."""

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

Shapes = Mapping[str, tuple[int, ...]]  # of one example, by the tensor's name


@dataclass(frozen=True)
class Split:
    """One split: an Arrow table of one chunk a column, read without copying.

    Columns: the tensors, numbers or flat fixed-size lists of them; row, int64, the row number in the source's split;
    and the source's own columns of integers, truth values and strings.
    """

    table: pa.Table
    shapes: Shapes

    @classmethod
    def from_arrays(
        cls, tensors: Mapping[str, np.ndarray], rows: np.ndarray, columns: Mapping[str, pa.Array]
    ) -> "Split":
        """Wrap arrays without copying: tensors [N, …] contiguous, rows int64 [N]."""
        own: dict[str, pa.Array] = {}
        for name, values in tensors.items():
            assert values.flags.c_contiguous
            flat = pa.array(values.reshape(-1))
            is_list = values.ndim > 1
            own[name] = pa.FixedSizeListArray.from_arrays(flat, math.prod(values.shape[1:])) if is_list else flat
        shapes = {name: values.shape[1:] for name, values in tensors.items()}
        return cls(pa.table(own | {"row": pa.array(rows)} | dict(columns)), shapes)

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def num_bytes(self) -> int:
        """Held in memory, and in the object store of each node that reads it."""
        return self.table.nbytes

    @property
    def num_bytes_per_example(self) -> int:
        """Of an example's tensors."""
        types = (self._values(name).type for name in self.shapes)
        return sum(math.prod(s) * t.bit_width // 8 for s, t in zip(self.shapes.values(), types, strict=True))

    def arrays(self) -> dict[str, np.ndarray]:
        """The tensors, [N, …] each: the table's own memory, read-only."""
        return {name: self._values(name).to_numpy().reshape(-1, *shape) for name, shape in self.shapes.items()}

    def attributes(self, name: str | None) -> pa.Table:
        """What subsets can be cut by, the column of this name for one."""
        return self.table

    def take(self, indices: np.ndarray | None = None) -> dict[str, Tensor]:
        """Return the tensors [n, …] of some examples as a copy on the CPU.

        Without indices: of all, in the table's own memory. It may be shared by other processes: never write to it.
        """
        # Arrow's own DLPack, since torch.from_numpy warns of read-only memory.
        tensors = {name: torch.from_dlpack(self._values(name)).view(-1, *shape) for name, shape in self.shapes.items()}
        if indices is None:
            return tensors
        chosen = torch.tensor(indices, dtype=torch.int64)
        return {name: values.index_select(0, chosen) for name, values in tensors.items()}

    def _values(self, name: str) -> pa.Array:
        (chunk,) = self.table.column(name).chunks
        return chunk.flatten() if pa.types.is_fixed_size_list(chunk.type) else chunk
