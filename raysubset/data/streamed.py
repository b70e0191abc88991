"""A split whose inputs stay in Parquet files: targets in memory, inputs read by row group when they are wanted."""

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
    """One split, of which only the targets and the source's own columns are held: it pickles without inputs."""

    held: Split  # without what the groups read
    groups: RowGroups

    @property
    def table(self) -> pa.Table:
        """As Split's, without what the groups read."""
        return self.held.table

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def shapes(self) -> Shapes:
        """As Split's."""
        return {name: values.shape[1:] for name, values in self.groups.empty(0).items()} | dict(self.held.shapes)

    @property
    def num_bytes(self) -> int:
        """Held in memory, and in the object store of each node that reads it."""
        return self.table.nbytes

    @property
    def num_bytes_per_example(self) -> int:
        """Of an example's tensors."""
        return self.groups.num_bytes_per_example + self.held.num_bytes_per_example

    def arrays(self) -> dict[str, np.ndarray]:
        """The tensors that are held, [N, …] each: the table's own memory, read-only."""
        return self.held.arrays()

    def attributes(self, name: str | None) -> pa.Table:
        """As Split's; a column that is not held is read."""
        column = self.groups.attribute(name) if name and name not in self.table.column_names else None
        return self.table if column is None else self.table.append_column(name, column.take(self.table["row"]))

    def take(self, indices: np.ndarray | None = None) -> dict[str, Tensor]:
        """Return the tensors of some examples, or of all, on the CPU, as Split.take() does.

        Row groups that hold none of them are not opened, the others one at a time: memory is the result and one row
        group. Each is read whole, so examples that lie scattered cost the reading, not the decoding, of all files.

        Raises:
            ValueError: for a file that cannot be read, or has changed.
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
        """What the groups read, [n, …] each, of one part after another; raises as take() does.

        Args:
            parts: int64 ascending positions in the split, those of a part in one row group.
        """
        return self.groups.read(self._in_group(part) for part in parts)

    def group_bounds(self) -> np.ndarray:
        """int64 [G + 1]: examples from bounds[g] to bounds[g + 1] lie in row group g."""
        return np.searchsorted(self._rows, self.groups.starts)

    def share_read(self, positions: np.ndarray) -> float:
        """Share of the files' rows that take() of these positions reads: those of all row groups that hold one."""
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
    """What stays where, given the bytes of the splits in memory."""
    groups, (target, *_) = train.groups, train.held.shapes
    size = len(train) * train.num_bytes_per_example / 1e6
    return Note(
        f"streamed: the {len(train)} training examples ({size:,.0f} MB as tensors) stay in {len(groups.numbers)} row "
        f"groups of {len(groups.paths)} file(s), which every node must see; held in memory are their {target}s and "
        f"{num_held / 1e6:,.0f} MB of validation and test examples"
    )
