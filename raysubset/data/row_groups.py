"""Images of Parquet files, read by row group: the part of a training split that need not be held in memory."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysubset.config import DataConfig
from raysubset.data.findings import FULL_RANGE, Findings, GreyRange
from raysubset.data.image_columns import image_column, images_of
from raysubset.data.images import EncodedImages, decode
from raysubset.data.listing import locate
from raysubset.errors import first_line


@dataclass(frozen=True, eq=False)
class RowGroups:
    """The row groups of a split's files, end to end. Pickles without a pixel; every process opens the files itself."""

    config: DataConfig
    where: str  # names the split in messages
    paths: tuple[str, ...]  # in the file system of config.name
    files: np.ndarray  # int64 [G], the path each row group is in
    numbers: np.ndarray  # int64 [G], of each row group in its file
    starts: np.ndarray  # int64 [G + 1], the first row of each row group; last, the number of rows
    image_shape: tuple[int, int, int] | None = None  # (H, W, C); None until scan() has seen all images
    grey_range: GreyRange | None = FULL_RANGE  # of deep pixels; None while it is still to be chosen

    @classmethod
    def of_files(
        cls, config: DataConfig, where: str, paths: Sequence[str], num_rows: Sequence[Sequence[int]]
    ) -> "RowGroups":
        """Lay files end to end, given the number of rows of each row group of each file."""
        counts = list(itertools.chain.from_iterable(num_rows))
        files = np.repeat(np.arange(len(paths)), [len(groups) for groups in num_rows])
        numbers = np.array([number for groups in num_rows for number in range(len(groups))], dtype=np.int64)
        starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        return cls(config, where, tuple(paths), files, numbers, starts)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, H, W, C) of all images, as an array has it."""
        assert self.image_shape is not None
        return (int(self.starts[-1]), *self.image_shape)

    def of_rows(self, rows: np.ndarray) -> np.ndarray:
        """The row group of each row: int64 [n]."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def read(self, wanted: Iterable[tuple[int, np.ndarray]]) -> Iterator[np.ndarray]:
        """Images of one row group after another, uint8 [n, H, W, C]; what is not wanted of them is not decoded.

        Args:
            wanted: a row group, and which of its rows, ascending; both int64.

        Raises:
            ValueError: for a file that cannot be read, or is another than when its row groups were counted.
        """
        assert self.image_shape is not None
        groups, rows = itertools.tee(wanted)
        for (group, chosen), column in zip(rows, self.columns(group for group, _ in groups), strict=True):
            if len(chosen) < len(column):
                column = column.take(pa.array(chosen))
            images, _ = self.decode(column, f"those read of row group {self._describe(group)}")
            yield np.broadcast_to(images, (len(chosen), *self.image_shape))  # grey ones among coloured: repeated

    def decode(self, column: pa.ChunkedArray, where: str, *, first_row: int = 0) -> tuple[np.ndarray, Findings]:
        """Images of a part of the image column, uint8 [n, H, W, 1 or 3], and what was found in them.

        Args:
            where: names the file in messages.
            first_row: the part's first, in that file.

        Raises:
            ValueError: for what cannot be decoded.
        """
        images, findings = images_of(column, where, image_size=self.config.image_size, first_row=first_row)
        if isinstance(images, EncodedImages):
            return decode(images, self.config.image_size, self.grey_range)
        return images, findings

    def columns(self, groups: Iterable[int]) -> Iterator[pa.ChunkedArray]:
        """The image column of one row group after another, as it is stored; raises as read() does."""
        system, _ = locate(self.config.name)
        with ExitStack() as opened:
            current, parquet = -1, None
            for group in groups:
                path, number = self.paths[self.files[group]], int(self.numbers[group])
                try:
                    if parquet is None or self.files[group] != current:
                        opened.close()
                        file = opened.enter_context(system.open_input_file(path))
                        parquet = pq.ParquetFile(file, page_checksum_verification=True)
                        current = self.files[group]
                    if self._has_changed(parquet, group):
                        raise ValueError(f"{path} has changed since its row groups were counted: start a new run")
                    table = parquet.read_row_group(number, columns=[self.config.image_column])
                    table.validate(full=True)
                except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
                    cause = f"perhaps it is damaged, or not to be seen from every node: {first_line(error)}"
                    raise ValueError(f"row group {self._describe(group)} cannot be read, {cause}") from error
                yield image_column(table, self.config.image_column, path)

    def _has_changed(self, parquet: pq.ParquetFile, group: int) -> bool:
        metadata, number = parquet.metadata, int(self.numbers[group])
        counted = self.starts[group + 1] - self.starts[group]
        return number >= metadata.num_row_groups or metadata.row_group(number).num_rows != counted

    def _describe(self, group: int) -> str:
        return f"{self.numbers[group]} of {self.paths[self.files[group]]}"

    def num_bytes_of_largest(self) -> int:
        """The largest row group, decoded: what a reader of any of it may have to hold."""
        return int(np.diff(self.starts).max()) * math.prod(self.shape[1:])
