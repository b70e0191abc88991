"""Streams the features of tables in Parquet files: fits them in one pass over the columns, and encodes row groups."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from raysubset.data.files import with_folder_columns
from raysubset.data.layout import Placed
from raysubset.data.row_groups import RowGroups
from raysubset.data.split import SplitName
from raysubset.data.tables import is_scalar, plain
from raysubset.tasks import TableInputs

_READ_BYTES = 2**28  # of columns that are read together, estimated at _VALUE_BYTES a value
_VALUE_BYTES = 16


@dataclass(frozen=True, eq=False)
class TableGroups(RowGroups):
    """Row groups whose columns are read as features: "inputs", float32 [n, F]."""

    members: tuple[Placed, ...]  # the files, whose folders may name columns
    kinds: Mapping[str, pa.DataType]  # the types of the folders' columns
    schema: pa.Schema  # of the features' columns, with types that hold the values of all files
    inputs: TableInputs | None = None  # None until it is fitted on training rows

    @property
    def columns(self) -> Sequence[str]:
        return [column.name for column in self._inputs.columns]

    def empty(self, num: int) -> dict[str, np.ndarray]:
        return {self._inputs.column: np.empty((num, self._inputs.num_features), dtype=np.float32)}

    def tensors(self, table: pa.Table, rows: np.ndarray, group: int) -> dict[str, np.ndarray]:
        table = self._alike(table, group, self.columns).take(pa.array(rows))
        features, _ = self._inputs.encode(table, where=f"row group {self.describe(group)}", rows=rows)
        return {self._inputs.column: features}

    @property
    def attribute_fields(self) -> Sequence[pa.Field]:
        return [field for field in self.schema if is_scalar(field.type)]

    def attribute(self, name: str) -> pa.ChunkedArray | None:
        is_present = name in [field.name for field in self.attribute_fields]
        return self.whole_columns([name]).column(name) if is_present else None

    def whole_columns(self, names: Sequence[str]) -> pa.Table:
        """Read some columns of all rows into memory. Raises as read() does."""
        groups = range(len(self.numbers))
        parts = zip(groups, self.tables(groups, names), strict=True)
        return pa.concat_tables([self._alike(table, group, names) for group, table in parts])

    def _alike(self, table: pa.Table, group: int, names: Sequence[str]) -> pa.Table:
        """Return these columns of the table in the schema's types, as after joining it to the other files' tables."""
        file = self.files[group]
        table = with_folder_columns(table, self.members[file], self.kinds).select(names)
        empty = self.schema.empty_table().select(names)
        return pa.concat_tables([empty, plain(table, self.config, self.paths[file])], promote_options="permissive")

    @property
    def _inputs(self) -> TableInputs:
        assert self.inputs is not None
        return self.inputs


class TrainingColumns:
    """The columns of training rows for fit_columns(), which are read in order, a few at a time, and then freed.

    The other splits' values are kept. So each value is read once, and memory holds only a few training columns.
    """

    def __init__(self, groups: TableGroups, rows: Mapping[SplitName, np.ndarray], *, kept: Sequence[SplitName]) -> None:
        """Prepare to read. `rows` are each split's rows in the files; the raw values of `kept` splits are kept."""
        self.column_names, self.num_rows = groups.schema.names, len(rows["train"])
        self._groups, self._rows, self._part = groups, rows, pa.table({})
        self._kept: dict[SplitName, list[pa.Table]] = {split: [] for split in kept}

    def column(self, name: str) -> pa.ChunkedArray:
        if name not in self._part.column_names:
            self._part = pa.table({})
            place, num = self.column_names.index(name), _READ_BYTES // _VALUE_BYTES // int(self._groups.starts[-1])
            self._part = self._groups.whole_columns(self.column_names[place : place + max(1, num)])
            for split, parts in self._kept.items():
                parts.append(self._part.take(pa.array(self._rows[split])))
        return self._part.column(name).take(pa.array(self._rows["train"]))

    def kept(self, split: SplitName) -> pa.Table:
        """Return all columns of a kept split's rows. Call it after column() has read every column."""
        return pa.table({name: part.column(name) for part in self._kept[split] for name in part.column_names})
