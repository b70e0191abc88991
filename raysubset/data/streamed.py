"""A split whose inputs stay in Parquet files: targets are in memory, inputs are read by row group when needed."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raysubset.data.row_groups import RowGroups
from raysubset.data.split import Shapes, Split
from raysubset.events import Note


@dataclass(frozen=True, eq=False)
class StreamedSplit:
    """One split that holds only its targets and the source's own columns in memory. It pickles without inputs."""

    held: Split  # without the tensors that the groups read
    groups: RowGroups

    @property
    def table(self) -> pa.Table:
        """The table of the held split, without the tensors that the groups read."""
        return self.held.table

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def shapes(self) -> Shapes:
        """The shape of each tensor of one example, held or read."""
        return {name: values.shape[1:] for name, values in self.groups.empty(0).items()} | dict(self.held.shapes)

    @property
    def num_bytes(self) -> int:
        """The bytes held in memory, and in the object store of each node that reads the split."""
        return self.table.nbytes

    @property
    def num_bytes_per_example(self) -> int:
        """The bytes of an example's tensors."""
        return self.groups.num_bytes_per_example + self.held.num_bytes_per_example

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the held tensors, [N, …] each, as read-only views of the table's memory."""
        return self.held.arrays()

    def attributes(self, name: str | None) -> pa.Table:
        """Return a table of columns by which subsets can be cut, with the column `name`, which is read if not held.

        If there is no such column, the table has all that there are, and no rows.
        """
        if not name or name in self.table.column_names:
            return self.table
        column = self.groups.attribute(name)
        if column is None:
            return pa.schema([*self.table.schema, *self.groups.attribute_fields]).empty_table()
        return self.table.append_column(name, column.take(self.table["row"]))

    def take(self, indices: np.ndarray | None = None) -> dict[str, Tensor]:
        """Return the tensors of some examples, or of all, on the CPU, as Split.take() does.

        Only row groups that hold one of the examples are opened, one at a time, so memory holds the result and one
        row group. A row group is read whole, so scattered examples cost reading all files, but not decoding them.

        Raises:
            ValueError: for a file that cannot be read or has changed.
        """
        positions = np.arange(len(self)) if indices is None else np.asarray(indices, dtype=np.int64)
        tensors = self.groups.empty(len(positions))
        ascending = np.argsort(positions, kind="stable")
        groups = self.groups.of_rows(self._rows[positions[ascending]])
        places = np.split(ascending, np.flatnonzero(np.diff(groups)) + 1) if len(positions) else []
        for place, part in zip(places, self.read([positions[place] for place in places]), strict=True):
            for name, values in part.items():
                tensors[name][place] = values
        return {name: torch.from_numpy(values) for name, values in tensors.items()} | self.held.take(positions)

    def read(self, parts: Iterable[np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        """Yield the tensors that the groups read, [n, …] each, for one part after another. Raises as take() does.

        Args:
            parts: int64 ascending positions in the split; each part lies in one row group.
        """
        return self.groups.read(self._in_group(part) for part in parts)

    def group_bounds(self) -> np.ndarray:
        """Return bounds, int64 [G + 1]: examples from bounds[g] to bounds[g + 1] lie in row group g."""
        return np.searchsorted(self._rows, self.groups.starts)

    def share_read(self, positions: np.ndarray) -> float:
        """Return the share of the files' rows that take() reads for these positions: their whole row groups."""
        groups, starts = np.unique(self.groups.of_rows(self._rows[positions])), self.groups.starts
        return float((starts[groups + 1] - starts[groups]).sum() / starts[-1])

    def _in_group(self, part: np.ndarray) -> tuple[int, np.ndarray]:
        rows = self._rows[part]
        group = int(self.groups.of_rows(rows[:1])[0])
        return group, rows - self.groups.starts[group]

    @property
    def _rows(self) -> np.ndarray:
        (chunk,) = self.table.column("row").chunks
        return chunk.to_numpy()


def streaming_note(train: StreamedSplit, num_held: int) -> Note:
    """Return the note on what stays in files and what is in memory, `num_held` bytes of other splits among it."""
    groups, (target, *_) = train.groups, train.held.shapes
    size = len(train) * train.num_bytes_per_example / 1e6
    return Note(
        f"streamed: the {len(train)} training examples ({size:,.0f} MB as tensors) stay in {len(groups.numbers)} row "
        f"groups of {len(groups.paths)} file(s), which every node must see; held in memory are their {target}s and "
        f"{num_held / 1e6:,.0f} MB of validation and test examples"
    )
