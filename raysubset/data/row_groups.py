"""Reads tensors from Parquet files by row group, images or features, so that a split need not be held in memory."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysubset.config import DataConfig
from raysubset.data.findings import FULL_RANGE, Findings, GreyRange
from raysubset.data.image_columns import image_column, images_of, plain
from raysubset.data.images import EncodedImages, decode
from raysubset.data.layout import Placed
from raysubset.data.listing import locate
from raysubset.data.split import SplitName
from raysubset.errors import ChangedFile, first_line
from raysubset.tasks import TableInputs

_READ_BYTES = 2**28  # of columns that are read together, estimated at _VALUE_BYTES a value
_VALUE_BYTES = 16


@dataclass(frozen=True, eq=False)
class RowGroups(ABC):
    """The row groups of a split's files, in order. They pickle without examples; every process opens the files itself.

    Subclasses define which columns become which tensors.
    """

    config: DataConfig
    where: str  # the name of the split in messages
    paths: tuple[str, ...]  # in the file system of config.name
    files: np.ndarray  # int64 [G], the position in `paths` of each row group's file
    numbers: np.ndarray  # int64 [G], the number of each row group in its file
    starts: np.ndarray  # int64 [G + 1], the first row of each row group, and at the end the number of rows

    @classmethod
    def of_files(cls, config: DataConfig, where: str, paths: Sequence[str], **fields: Any) -> Self:
        """Join files, whose row groups are counted. `fields` are the subclass's."""
        system, _ = locate(config.name)
        metadata = [pq.read_metadata(path, filesystem=system) for path in paths]
        files = np.repeat(np.arange(len(paths)), [each.num_row_groups for each in metadata])
        numbers = np.concatenate([np.arange(each.num_row_groups) for each in metadata])
        counts = [each.row_group(number).num_rows for each in metadata for number in range(each.num_row_groups)]
        starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        return cls(config, where, tuple(paths), files, numbers, starts, **fields)

    @property
    @abstractmethod
    def columns(self) -> Sequence[str]:
        """The columns to read from the files."""

    @abstractmethod
    def empty(self, num: int) -> dict[str, np.ndarray]:
        """Allocate the tensors of `num` examples, [num, …] each."""

    @abstractmethod
    def tensors(self, table: pa.Table, rows: np.ndarray, group: int) -> dict[str, np.ndarray]:
        """Return the tensors of some rows of a row group's table, as empty() allocates them. Raises as read() does."""

    def of_rows(self, rows: np.ndarray) -> np.ndarray:
        """Return the row group of each row: int64 [n]."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def read(self, requests: Iterable[tuple[int, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
        """Yield the tensors of one row group after another, [n, …] each. Only the requested rows are decoded.

        Args:
            requests: pairs of a row group and its rows, ascending, int64.

        Raises:
            ValueError: for a file that cannot be read.
            ChangedFile: for one that has changed since its row groups were counted.
        """
        group_requests, row_requests = itertools.tee(requests)
        tables = self.tables(group for group, _ in group_requests)
        for (group, rows), table in zip(row_requests, tables, strict=True):
            yield self.tensors(table, rows, group)

    def tables(self, groups: Iterable[int], columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yield the stored columns of one row group after another. Raises as read() does."""
        system, columns = locate(self.config.name)[0], [*(self.columns if columns is None else columns)]
        for number, members in itertools.groupby(groups, key=self.files.__getitem__):
            where = path = self.paths[number]
            try:
                with system.open_input_file(path) as file:
                    parquet = pq.ParquetFile(file, page_checksum_verification=True)
                    for group in members:
                        where = f"row group {self.describe(group)}"
                        self._refuse_changed(parquet.metadata, group)
                        table = parquet.read_row_group(int(self.numbers[group]), columns=columns)
                        table.validate(full=True)
                        yield table
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
                cause = f"perhaps it is damaged, or not every node can see it: {first_line(error)}"
                raise ValueError(f"{where} cannot be read, {cause}") from error

    def _refuse_changed(self, metadata: pq.FileMetaData, group: int) -> None:
        number, num_counted = int(self.numbers[group]), self.starts[group + 1] - self.starts[group]
        if number >= metadata.num_row_groups or metadata.row_group(number).num_rows != num_counted:
            path = self.paths[self.files[group]]
            raise ChangedFile(f"{path} has changed since its row groups were counted: start a new run")

    def describe(self, group: int) -> str:
        """Return the group's number and file, for messages."""
        return f"{self.numbers[group]} of {self.paths[self.files[group]]}"

    def num_bytes_of_largest(self) -> int:
        """Return the decoded bytes of the largest row group, which a reader of any of its rows may have to hold."""
        return int(np.diff(self.starts).max()) * self.num_bytes_per_example

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor of one example that is read."""
        return {name: values.shape[1:] for name, values in self.empty(0).items()}

    @property
    def num_bytes_per_example(self) -> int:
        """The bytes of an example's tensors that are read."""
        return sum(values.nbytes for values in self.empty(1).values())


@dataclass(frozen=True, eq=False)
class ImageGroups(RowGroups):
    """Row groups of images, which are read as uint8 [n, H, W, C]."""

    image_shape: tuple[int, ...] = ()  # (H, W, C), once all images are decoded
    grey_range: GreyRange | None = FULL_RANGE  # of deep pixels; None until it is chosen

    @property
    def columns(self) -> Sequence[str]:
        return [self.config.image_column]

    def empty(self, num: int) -> dict[str, np.ndarray]:
        return {"image": np.empty((num, *self.image_shape), dtype=np.uint8)}

    def tensors(self, table: pa.Table, rows: np.ndarray, group: int) -> dict[str, np.ndarray]:
        images, _ = self._decode(table.take(pa.array(rows)), group, f"those read of row group {self.describe(group)}")
        return {"image": np.broadcast_to(images, (len(rows), *self.image_shape))}  # repeats grey among coloured images

    def blocks(self) -> Iterator[tuple[np.ndarray, Findings]]:
        """Decode and yield all images by row group, uint8 [n, H, W, 1 or 3], with findings. Raises as read() does."""
        filled = np.flatnonzero(np.diff(self.starts)).tolist()
        for group, table in zip(filled, self.tables(filled), strict=True):
            file = self.files[group]
            first_row = int(self.starts[group] - self.starts[np.searchsorted(self.files, file)])
            yield self._decode(table, group, self.paths[file], first_row)

    def _decode(self, table: pa.Table, group: int, where: str, first_row: int = 0) -> tuple[np.ndarray, Findings]:
        column = image_column(table, self.config.image_column, self.paths[self.files[group]])
        images, findings = images_of(column, where, image_size=self.config.image_size, first_row=first_row)
        if isinstance(images, EncodedImages):
            return decode(images, self.config.image_size, self.grey_range)
        return images, findings


@dataclass(frozen=True, eq=False)
class TableGroups(RowGroups):
    """Row groups whose columns are read as features: "inputs", float32 [n, F]."""

    members: tuple[Placed, ...]  # the files, whose folders may name columns
    schema: pa.Schema  # of the features' columns, with types that hold the values of all files
    inputs: TableInputs | None = None  # None until it is fitted on training rows

    @property
    def columns(self) -> Sequence[str]:
        return [column.name for column in self.inputs.columns] if self.inputs else self.schema.names

    def empty(self, num: int) -> dict[str, np.ndarray]:
        return {self._inputs.column: np.empty((num, *self._inputs.shape), dtype=np.float32)}

    def tensors(self, table: pa.Table, rows: np.ndarray, group: int) -> dict[str, np.ndarray]:
        table = self._alike(table, group, self.columns).take(pa.array(rows))
        features, _ = self._inputs.encode(table, where=f"row group {self.describe(group)}", rows=rows)
        return {self._inputs.column: features}

    def whole_columns(self, names: Sequence[str]) -> pa.Table:
        """Read some columns of all rows into memory. Raises as read() does."""
        groups = range(len(self.numbers))
        parts = zip(groups, self.tables(groups, names), strict=True)
        return pa.concat_tables([self._alike(table, group, names) for group, table in parts])

    def _alike(self, table: pa.Table, group: int, names: Sequence[str]) -> pa.Table:
        """Return these columns of the table in the schema's types, as after joining it to the other files' tables."""
        file = self.files[group]
        table = self.members[file].with_columns(table).select(names)
        empty = self.schema.empty_table().select(names)
        return concatenated([empty, plain(table, self.config, self.paths[file])], self.config.name)

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
        self.column_names = groups.schema.names
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


def concatenated(tables: Sequence[pa.Table], where: str) -> pa.Table:
    """Concatenate the tables of some files, with types that hold the values of all.

    A dictionary, as pandas' categories are, is decoded where another file has the values themselves.

    Raises:
        ValueError: for files whose columns have types that do not go together.
    """
    fields = [field for table in tables for field in table.schema if not pa.types.is_null(field.type)]
    decoded = {field.name for field in fields if not pa.types.is_dictionary(field.type)}
    try:
        return pa.concat_tables([_decoded(table, decoded) for table in tables], promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        text = f"the {len(tables)} files of {where} do not go together: {error}"
        raise ValueError(f"{text}: write the column alike in all, or leave it out with --data.columns") from error


def _decoded(table: pa.Table, names: Collection[str]) -> pa.Table:
    """Return the table with the values of those of its dictionaries that are among the names."""
    for place, field in enumerate(table.schema):
        if field.name in names and pa.types.is_dictionary(field.type):
            table = table.set_column(place, field.name, table.column(place).cast(field.type.value_type))
    return table
