"""A split whose inputs stay in Parquet files, read by row group; and its batches, read ahead by windows of groups."""

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raysubset.data.examples import Augmented, Examples, OwnAugmentation
from raysubset.data.row_groups import RowGroups, TableGroups
from raysubset.data.split import Split, is_scalar
from raysubset.errors import counted
from raysubset.events import Note
from raysubset.tasks import Task


@dataclass(frozen=True, eq=False)
class StreamedSplit(Split):
    """One split that holds only its targets and the source's own columns in memory. It pickles without inputs."""

    groups: RowGroups  # which read the tensors that the table lacks

    @property
    def num_bytes_per_example(self) -> int:
        return self.groups.num_bytes_per_example + super().num_bytes_per_example

    def attributes(self, name: str | None) -> pa.Table:
        """Return a table of columns by which subsets can be cut, with the column `name`, which is read if not held.

        If there is no such column, the table has all that there are, and no rows.
        """
        if not name or name in self.table.column_names:
            return self.table
        if not isinstance(self.groups, TableGroups):
            return self.table.slice(0, 0)
        fields = [field for field in self.groups.schema if is_scalar(field.type)]
        if name not in [field.name for field in fields]:
            return pa.schema([*self.table.schema, *fields]).empty_table()
        column = self.groups.whole_columns([name]).column(name)
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
        return {name: torch.from_numpy(values) for name, values in tensors.items()} | self.held(positions)

    def held(self, positions: np.ndarray) -> dict[str, Tensor]:
        """Return the tensors that are in memory, of some examples."""
        return super().take(positions)

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
        return self._values("row").to_numpy()


# The decoded size from which a row group is reported: reading one of its examples may hold all of it in memory.
LARGE_ROW_GROUP_BYTES = 2**30


def streaming_notes(train: StreamedSplit, num_held: int) -> list[Note]:
    """Return notes on what stays in files and what is in memory, and a warning of large row groups.

    Args:
        num_held: the bytes of validation and test examples.
    """
    groups, (target, *_) = train.groups, train.arrays()
    size = len(train) * train.num_bytes_per_example / 1e6
    text = (
        f"streamed: the {len(train)} training examples ({size:,.0f} MB as tensors) stay in {len(groups.numbers)} row "
        f"groups of {counted(len(groups.paths), 'file')}, which every node must see; held in memory are their "
        f"{target}s and {num_held / 1e6:,.0f} MB of validation and test examples"
    )
    largest, limit = groups.num_bytes_of_largest() / 1e9, LARGE_ROW_GROUP_BYTES / 1e9
    warning = (
        f"a row group of {groups.where} takes {largest:.1f} GB decoded, and is held whole while it is read: write the "
        f"files with fewer rows a group (row_group_size of pyarrow's write_table), {limit:.1f} GB at most"
    )
    return [Note(text), Note(warning, is_warning=True)] if largest > limit else [Note(text)]


# The tensors of a window, which are shuffled together. Two windows are held: one is trained on, the next is read.
WINDOW_BYTES = 2**28

Tensors = Mapping[str, np.ndarray]  # [n, …] each, by their names

Reader = Callable[[StreamedSplit, Sequence[np.ndarray]], Iterator[Tensors]]
"""Reads the tensors of a split that are not held, in order. A window is given as ranges of positions, [k, 2], each in
one row group. The parts that it yields may have any length, but none spans two windows."""


def read_here(split: StreamedSplit, windows: Sequence[np.ndarray]) -> Iterator[Tensors]:
    """Read in this process, one row group at a time, on demand: the default Reader."""
    yield from split.read(np.arange(start, stop) for ranges in windows for start, stop in ranges)


@dataclass(frozen=True, eq=False)
class StreamedExamples(Augmented):
    """All examples of a streamed split, with the interface of Examples and the memory of two windows.

    An epoch takes the row groups in random order, shuffles the examples of each window of row groups, and cuts the
    stream into batches, also across windows. Examples that are far apart in the files share a batch only if their row
    groups come close, so rows that are sorted, for example by class, should be shuffled before they are written. The
    order is a pure function of seed, split and window_bytes, whichever Reader reads.
    """

    split: StreamedSplit
    task: Task
    device: torch.device  # of the batches
    augment: bool = False  # if epochs draw the augmentation
    augmentation: OwnAugmentation | None = None  # the user's, instead of the task's
    read: Reader = read_here
    window_bytes: int = WINDOW_BYTES

    def __len__(self) -> int:
        return len(self.split)

    def epoch(
        self,
        *,
        order_seed: int,
        augmentation_seed: int,
        batch_sizes: Sequence[int],
        first: int = 0,
        rank: int = 0,
        num_workers: int = 1,
        **layout: Any,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch, as Examples.epoch() does. Each example is in at most one batch.

        Windows before batch `first` are not read. Each of several workers reads its own stretch of row groups, and
        takes from it the examples for its part of each batch. Its share of an epoch is as large as that of every
        num_workers-th example, so all workers make the same number of steps and no example is left out.

        Raises:
            ValueError: for a file that cannot be read or has changed.
        """
        generator = np.random.default_rng(order_seed)
        groups = _ranges(self.split.group_bounds())
        groups = groups[generator.permutation(len(groups))]
        shares = [_num_dealt(len(self), worker, num_workers) for worker in range(num_workers)]
        groups = _stretch(groups, sum(shares[:rank]), sum(shares[: rank + 1]))
        draws = self.drawn(augmentation_seed)
        windows = [_Window(ranges, generator.permutation(_num(ranges))) for ranges in self._windows(groups)]
        sizes = part_sizes(batch_sizes, rank, num_workers)
        return self._batches(windows, sizes, first=first, draws=draws, **layout)

    def in_order(self, batch_sizes: Sequence[int], **layout: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of all examples in stored order, without augmentation."""
        ranges = self._windows(_ranges(self.split.group_bounds()))
        windows = [_Window(each, np.arange(_num(each))) for each in ranges]
        return self._batches(windows, batch_sizes, first=0, draws=None, **layout)

    def _windows(self, groups: np.ndarray) -> list[np.ndarray]:
        """Cut row groups in this order into windows: ranges [k, 2] each."""
        num_rows = max(1, self.window_bytes // self.split.num_bytes_per_example)
        return cut_ranges(groups, num_rows)

    def _batches(
        self, windows: "list[_Window]", sizes: Sequence[int], *, first: int, draws: Tensor | None, **layout: Any
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of these sizes from the windows' examples, from batch `first` on."""
        chunks = self._read_chunks(windows, sizes, first=first, draws=draws)
        pool = ThreadPoolExecutor(1, thread_name_prefix="raysubset-window")
        try:
            upcoming = pool.submit(next, chunks, None)
            while (chunk := upcoming.result()) is not None:
                examples, chunk_draws, chunk_sizes = chunk
                upcoming = pool.submit(next, chunks, None)
                for indices in torch.arange(len(examples), device=self.device).split(chunk_sizes):
                    yield examples.batch(indices, draws=chunk_draws, **layout)
        finally:  # also if the caller stops in the middle
            pool.shutdown(cancel_futures=True)
            chunks.close()

    def _read_chunks(
        self, windows: "list[_Window]", sizes: Sequence[int], *, first: int, draws: Tensor | None
    ) -> Generator[tuple[Examples, Tensor | None, list[int]], None, None]:
        """Yield chunks of whole batches: their examples in order, their augmentation, and the batches' sizes.

        A window's examples beyond its last whole batch are carried into the next window.
        """
        ends = np.cumsum(sizes)
        num_used = int(ends[first - 1]) if first else 0  # examples of the stream that earlier batches took
        stops = np.cumsum([len(window) for window in windows])
        num_skipped = int(np.searchsorted(stops, num_used, side="right"))
        offset = int(stops[num_skipped - 1]) if num_skipped else 0
        needed = windows[num_skipped : int(np.searchsorted(stops, ends[-1])) + 1]
        parts = self.read(self.split, [window.ranges for window in needed])
        tensors: Tensors = self.split.groups.empty(0)
        positions = np.empty(0, dtype=np.int64)
        for window in needed:
            tensors, positions = window.fill(parts, carried=tensors), np.concatenate([positions, window.positions])
            if offset < num_used:  # resuming in the middle of this window
                tensors = {name: values[num_used - offset :] for name, values in tensors.items()}
                positions, offset = positions[num_used - offset :], num_used
            num_whole = int(np.searchsorted(ends, offset + len(positions), side="right"))  # batches up to here
            cut = int(ends[num_whole - 1]) - offset if num_whole > first else 0
            if cut:
                chunk = positions[:cut]
                chunk_draws = None if draws is None else draws[torch.from_numpy(chunk)].to(self.device)
                rows = {name: torch.from_numpy(values[:cut]) for name, values in tensors.items()}
                rows |= self.split.held(chunk)
                examples = Examples(rows, self.task, self.augment, self.augmentation).to(self.device)
                yield examples, chunk_draws, list(sizes[first:num_whole])
            tensors = {name: values[cut:].copy() for name, values in tensors.items()}
            positions, offset, first = positions[cut:], offset + cut, num_whole


Batches = Examples | StreamedExamples  # the interface of training and evaluation: batches of an epoch, or in order


@dataclass(frozen=True, eq=False)
class _Window:
    """The examples that are shuffled together."""

    ranges: np.ndarray  # int64 [k, 2], positions in the split
    order: np.ndarray  # int64 [n]: for each place in the shuffled window, an index into the ranges' examples

    def __len__(self) -> int:
        return len(self.order)

    @property
    def positions(self) -> np.ndarray:
        """The examples' positions in the split, int64 [n], in the window's order."""
        return np.concatenate([np.arange(start, stop) for start, stop in self.ranges])[self.order]

    def fill(self, parts: Iterator[Tensors], *, carried: Tensors) -> Tensors:
        """Read the window: return the c carried examples followed by the window's in its order, [c + n, …] each."""
        places, tensors = np.empty_like(self.order), dict[str, np.ndarray]()
        for name, values in carried.items():
            places[self.order] = np.arange(len(values), len(values) + len(self))
            tensors[name] = np.empty((len(values) + len(self), *values.shape[1:]), values.dtype)
            tensors[name][: len(values)] = values
        num_read = 0
        while num_read < len(self):
            part = next(parts)
            part_places = places[num_read:][: len(next(iter(part.values())))]
            for name, values in part.items():
                tensors[name][part_places] = values
            num_read += len(part_places)
        return tensors


def cut_ranges(ranges: np.ndarray, num_examples: int) -> list[np.ndarray]:
    """Cut ranges [k, 2] into groups of about `num_examples` examples. No range is divided, even if it is longer."""
    begins = np.cumsum(ranges[:, 1] - ranges[:, 0]) - (ranges[:, 1] - ranges[:, 0])
    return np.split(ranges, np.flatnonzero(np.diff(begins // num_examples)) + 1)


def part_sizes(batch_sizes: Sequence[int], rank: int, num_workers: int) -> list[int]:
    """Return the sizes of a worker's parts of the batches, if all batches' examples are dealt out one by one.

    >>> part_sizes([3, 3, 2], 0, 2), part_sizes([3, 3, 2], 1, 2)
    ([2, 1, 1], [1, 2, 1])
    """
    dealt = [_num_dealt(int(end), rank, num_workers) for end in np.cumsum([0, *batch_sizes])]
    return [end - start for start, end in itertools.pairwise(dealt)]


def _num_dealt(num: int, rank: int, num_workers: int) -> int:
    """Return how many of the first `num` examples are dealt to a worker."""
    return (num - rank + num_workers - 1) // num_workers


def _ranges(bounds: np.ndarray) -> np.ndarray:
    """Return the intervals between bounds that are not empty, [k, 2]."""
    ranges = np.stack([bounds[:-1], bounds[1:]], axis=1)
    return ranges[ranges[:, 0] < ranges[:, 1]]


def _num(ranges: np.ndarray) -> int:
    return int((ranges[:, 1] - ranges[:, 0]).sum())


def _stretch(ranges: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Return the parts of the ranges between start and stop, counted as if the ranges were laid end to end."""
    ends = np.cumsum(ranges[:, 1] - ranges[:, 0])
    begins = ends - (ranges[:, 1] - ranges[:, 0])
    lows = ranges[:, 0] + np.maximum(start - begins, 0)
    highs = ranges[:, 1] - np.maximum(ends - stop, 0)
    return np.stack([lows, highs], axis=1)[lows < highs]
