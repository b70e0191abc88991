"""Examples of a streamed split: the batches of an epoch, read in windows of row groups while the last one trains."""

import dataclasses
import itertools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raysubset.data.examples import Examples
from raysubset.data.own_augmentation import OwnAugmentation, drawn
from raysubset.data.streamed import StreamedSplit
from raysubset.tasks import Task

# Of tensors: shuffled together, and held twice, one window being trained on while the next is read.
WINDOW_BYTES = 2**28

Tensors = Mapping[str, np.ndarray]  # [n, …] each, by their names

Reader = Callable[[StreamedSplit, Sequence[np.ndarray]], Iterator[Tensors]]
"""Reads positions of a split, given as ranges [k, 2] (each in one row group) a window: the tensors that are not held,
in that order, in parts of any length but none of two windows."""


def read_here(split: StreamedSplit, windows: Sequence[np.ndarray]) -> Iterator[Tensors]:
    """The Reader of one process: one row group at a time, when it is asked for."""
    yield from split.read(np.arange(start, stop) for ranges in windows for start, stop in ranges)


@dataclass(frozen=True, eq=False)
class StreamedExamples:
    """All examples of a streamed split, as Examples gives their batches, with the memory of two windows.

    An epoch takes the row groups in random order, shuffles the examples of a window of them, and cuts the stream into
    batches, across windows too. So examples far apart in the files meet in a batch only by their row groups' order: a
    set whose rows are sorted, by class say, wants shuffling before it is written. Batches are made by the task as
    Examples' are. The order is a pure function of seed, split and window_bytes, whatever reads.
    """

    split: StreamedSplit
    task: Task
    device: torch.device  # of the batches
    augment: bool = False  # whether epochs draw the augmentation
    augmentation: OwnAugmentation | None = None  # in the place of the task's
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
        channels_last: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of an epoch as Examples.epoch() gives them; each example is in one batch at most.

        Windows before batch `first` are not read. Of several workers each reads a stretch of row groups of its own,
        and takes of it as many examples as its part of a batch has: a worker's share of an epoch is that of every
        num_workers-th example, so all make the same number of steps and none is left out.

        Raises:
            ValueError: for a file that cannot be read, or has changed.
        """
        generator = np.random.default_rng(order_seed)
        groups = _ranges(self.split.group_bounds())
        groups = groups[generator.permutation(len(groups))]
        shares = [_num_dealt(len(self), worker, num_workers) for worker in range(num_workers)]
        groups = _stretch(groups, sum(shares[:rank]), sum(shares[: rank + 1]))
        draws = drawn(self.task, self.augmentation, len(self), augmentation_seed) if self.augment else None
        windows = [_Window(ranges, generator.permutation(_num(ranges))) for ranges in self._windows(groups)]
        sizes = part_sizes(batch_sizes, rank, num_workers)
        return self._batches(windows, sizes, first=first, draws=draws, channels_last=channels_last, dtype=dtype)

    def in_order(
        self, batch_sizes: Sequence[int], *, channels_last: bool = True, dtype: torch.dtype = torch.float32
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of all examples as they lie, without augmentation."""
        plain = dataclasses.replace(self, augment=False)
        ranges = self._windows(_ranges(self.split.group_bounds()))
        windows = [_Window(each, np.arange(_num(each))) for each in ranges]
        return plain._batches(windows, batch_sizes, first=0, draws=None, channels_last=channels_last, dtype=dtype)

    def _windows(self, groups: np.ndarray) -> list[np.ndarray]:
        """Ranges [k, 2] a window, of row groups in this order."""
        num_rows = max(1, self.window_bytes // self.split.num_bytes_per_example)
        return cut_ranges(groups, num_rows)

    def _batches(
        self,
        windows: "list[_Window]",
        sizes: Sequence[int],
        *,
        first: int,
        draws: Tensor | None,
        channels_last: bool,
        dtype: torch.dtype,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of these sizes from the windows' examples, from batch `first` on."""
        filled = self._filled(windows, sizes, first=first, draws=draws)
        pool = ThreadPoolExecutor(1, thread_name_prefix="raysubset-window")
        try:
            upcoming = pool.submit(next, filled, None)
            while (window := upcoming.result()) is not None:
                examples, own_draws, own_sizes = window
                upcoming = pool.submit(next, filled, None)
                for indices in torch.arange(len(examples), device=self.device).split(own_sizes):
                    yield examples.batch(indices, draws=own_draws, channels_last=channels_last, dtype=dtype)
        finally:  # also where the caller stops in the middle
            pool.shutdown(cancel_futures=True)
            filled.close()

    def _filled(
        self, windows: "list[_Window]", sizes: Sequence[int], *, first: int, draws: Tensor | None
    ) -> Generator[tuple[Examples, Tensor | None, list[int]], None, None]:
        """Examples in the order of the batches, whole batches of them, their augmentation, and the batches' sizes.

        What a window has beyond its last whole batch is carried into the next.
        """
        ends = np.cumsum(sizes)
        done = int(ends[first - 1]) if first else 0  # examples of the stream that were handed out
        stops = np.cumsum([len(window) for window in windows])
        skipped = int(np.searchsorted(stops, done, side="right"))
        at = int(stops[skipped - 1]) if skipped else 0
        needed = windows[skipped : int(np.searchsorted(stops, ends[-1])) + 1]
        parts = self.read(self.split, [window.ranges for window in needed])
        tensors: Tensors = self.split.groups.empty(0)
        positions = np.empty(0, dtype=np.int64)
        for window in needed:
            tensors, positions = window.fill(parts, carried=tensors), np.concatenate([positions, window.positions])
            if at < done:  # going on in the middle of it
                tensors = {name: values[done - at :] for name, values in tensors.items()}
                positions, at = positions[done - at :], done
            num = int(np.searchsorted(ends, at + len(positions), side="right"))  # batches that are whole
            cut = int(ends[num - 1]) - at if num > first else 0
            if cut:
                chosen = positions[:cut]
                own = None if draws is None else draws[torch.from_numpy(chosen)].to(self.device)
                rows = {name: torch.from_numpy(values[:cut]) for name, values in tensors.items()}
                rows |= self.split.held.take(chosen)
                examples = Examples(rows, self.task, self.augment, self.augmentation).to(self.device)
                yield examples, own, list(sizes[first:num])
            tensors = {name: values[cut:].copy() for name, values in tensors.items()}
            positions, at, first = positions[cut:], at + cut, num


Batches = Examples | StreamedExamples  # what the training loop and the evaluation need: batches by epoch, and in order


@dataclass(frozen=True, eq=False)
class _Window:
    """Examples that are shuffled together."""

    ranges: np.ndarray  # int64 [k, 2], positions in the split
    order: np.ndarray  # int64 [n]: which of the examples, as the ranges have them, comes at each place

    def __len__(self) -> int:
        return len(self.order)

    @property
    def positions(self) -> np.ndarray:
        """int64 [n], in the split, in this window's order."""
        return np.concatenate([np.arange(start, stop) for start, stop in self.ranges])[self.order]

    def fill(self, parts: Iterator[Tensors], *, carried: Tensors) -> Tensors:
        """The carried examples, c of them, and after them this window's in its order: [c + n, …] each."""
        places, filled = np.empty_like(self.order), dict[str, np.ndarray]()
        for name, values in carried.items():
            places[self.order] = np.arange(len(values), len(values) + len(self))
            filled[name] = np.empty((len(values) + len(self), *values.shape[1:]), values.dtype)
            filled[name][: len(values)] = values
        num_read = 0
        while num_read < len(self):
            part = next(parts)
            chosen = places[num_read:][: len(next(iter(part.values())))]
            for name, values in part.items():
                filled[name][chosen] = values
            num_read += len(chosen)
        return filled


def cut_ranges(ranges: np.ndarray, num_examples: int) -> list[np.ndarray]:
    """Cut ranges [k, 2] into lists of about so many examples; a range stays whole, and may be longer."""
    begins = np.cumsum(ranges[:, 1] - ranges[:, 0]) - (ranges[:, 1] - ranges[:, 0])
    return np.split(ranges, np.flatnonzero(np.diff(begins // num_examples)) + 1)


def part_sizes(batch_sizes: Sequence[int], rank: int, num_workers: int) -> list[int]:
    """Sizes of a worker's parts of the batches, the examples of all batches being dealt out one by one.

    >>> part_sizes([3, 3, 2], 0, 2), part_sizes([3, 3, 2], 1, 2)
    ([2, 1, 1], [1, 2, 1])
    """
    dealt = [_num_dealt(int(end), rank, num_workers) for end in np.cumsum([0, *batch_sizes])]
    return [after - before for before, after in itertools.pairwise(dealt)]


def _num_dealt(num: int, rank: int, num_workers: int) -> int:
    """How many of the first `num` examples go to a worker."""
    return (num - rank + num_workers - 1) // num_workers


def _ranges(bounds: np.ndarray) -> np.ndarray:
    """[k, 2] of the intervals between bounds that are not empty."""
    ranges = np.stack([bounds[:-1], bounds[1:]], axis=1)
    return ranges[ranges[:, 0] < ranges[:, 1]]


def _num(ranges: np.ndarray) -> int:
    return int((ranges[:, 1] - ranges[:, 0]).sum())


def _stretch(ranges: np.ndarray, start: int, stop: int) -> np.ndarray:
    """What lies from start to stop where the ranges are laid end to end."""
    ends = np.cumsum(ranges[:, 1] - ranges[:, 0])
    begins = ends - (ranges[:, 1] - ranges[:, 0])
    lows = ranges[:, 0] + np.maximum(start - begins, 0)
    highs = ranges[:, 1] - np.maximum(ends - stop, 0)
    return np.stack([lows, highs], axis=1)[lows < highs]
