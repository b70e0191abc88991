"""A split in memory: named tensors and the source's own columns as an Arrow table; and carving splits off another."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raysubset.config import DataConfig, derive_seed
from raysubset.events import Note
from raysubset.tasks.column_values import is_string

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)


@dataclass(frozen=True)
class Split:
    """One split: an Arrow table with one chunk a column, which is read without copying.

    Its columns are the tensors, as numbers or flat fixed-size lists of numbers; row, int64, the row number in the
    source's split; and the source's own columns of integers, truth values and strings.
    """

    table: pa.Table
    shapes: Mapping[str, tuple[int, ...]]  # of each tensor of one example

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
        return sum(values[:1].nbytes for values in self.arrays().values())

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the tensors in memory, [N, …] each, as read-only views of the table's."""
        return {name: self._values(name).to_numpy().reshape(-1, *shape) for name, shape in self._held.items()}

    def attributes(self, name: str | None) -> pa.Table:
        """Return a table of columns by which subsets can be cut, with the column `name`."""
        return self.table

    def take(self, indices: np.ndarray | None = None) -> dict[str, Tensor]:
        """Return the tensors [n, …] of some examples as a copy on the CPU.

        Without indices, return all in the table's own memory, which other processes may share: never write to it.
        """
        # Arrow's own DLPack, since torch.from_numpy warns of read-only memory.
        tensors = {name: torch.from_dlpack(self._values(name)).view(-1, *shape) for name, shape in self._held.items()}
        if indices is None:
            return tensors
        positions = torch.tensor(indices, dtype=torch.int64)
        return {name: values.index_select(0, positions) for name, values in tensors.items()}

    @property
    def _held(self) -> Mapping[str, tuple[int, ...]]:
        return {name: shape for name, shape in self.shapes.items() if name in self.table.column_names}

    def _values(self, name: str) -> pa.Array:
        (chunk,) = self.table.column(name).chunks
        return chunk.flatten() if pa.types.is_fixed_size_list(chunk.type) else chunk


def is_scalar(type_: pa.DataType) -> bool:
    """Return True for types by whose values subsets can be cut: integers, truth values and texts."""
    return pa.types.is_integer(type_) or pa.types.is_boolean(type_) or is_string(type_)


def carve(labels: np.ndarray, *, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split positions 0 … N-1 into kept and carved ones, each ascending, with every class in its proportion.

    round(N * fraction) positions are carved, at least one, shared among the classes by largest remainder (ties at
    random). A class keeps at least one example, so a class of one example is not carved, and fewer may be carved.

    Raises:
        ValueError: if every class has only one example.
    """
    generator = np.random.default_rng(seed)
    classes, counts = np.unique(labels, return_counts=True)
    num_carved = max(1, round(len(labels) * fraction))
    quotas = counts * fraction
    shares = np.minimum(np.floor(quotas).astype(int), counts - 1)
    by_remainder = np.lexsort((generator.random(len(classes)), shares - quotas))
    spare = [position for position in by_remainder if shares[position] < counts[position] - 1]
    shares[spare[: max(0, num_carved - shares.sum())]] += 1
    if not shares.any():
        raise ValueError(
            f"{len(labels)} examples of {len(classes)} classes are too few to hold any out: some class needs two"
        )
    carved = [
        generator.permutation(np.flatnonzero(labels == label))[:share]
        for label, share in zip(classes, shares, strict=True)
    ]
    is_carved = np.zeros(len(labels), dtype=bool)
    is_carved[np.concatenate(carved)] = True
    return np.flatnonzero(~is_carved), np.flatnonzero(is_carved)


def carve_splits(
    strata: dict[SplitName, np.ndarray], config: DataConfig, *, at_end: bool = False
) -> tuple[dict[SplitName, np.ndarray], list[Note]]:
    """Return the ascending rows of each split, in its own source or in the training split's, with notes.

    Args:
        strata: for each split of the source, the stratum of each example, int64 [N]; proportions are kept.
        at_end: carve off the last examples instead. This is for neighbours that are alike, such as windows of a text.
    """
    end = " from the end" if at_end else ""
    notes: list[Note] = []
    rows: dict[SplitName, np.ndarray] = {name: np.arange(len(numbers)) for name, numbers in strata.items()}
    fractions: dict[SplitName, float] = {"test": config.test_fraction, "validation": config.validation_fraction}
    for name, fraction in fractions.items():
        if name in strata:
            continue
        train = rows["train"]
        if at_end:
            num = max(1, round(len(train) * fraction))
            rows["train"], rows[name] = train[:-num], train[-num:]
        else:
            seed = derive_seed(config.split_seed, name)
            kept, carved = carve(strata["train"][train], fraction=fraction, seed=seed)
            rows["train"], rows[name] = train[kept], train[carved]
    if "test" not in strata:
        share, num = config.test_fraction, len(rows["test"])
        text = f"{config.name} has no test split: {share:.0%} of its examples ({num}) carved off{end} for testing"
        notes.append(Note(text))
    is_used = {"test_fraction": "test" not in strata, "split_seed": not at_end and len(rows) > len(strata)}
    changed = [name for name in is_used if getattr(config, name) != getattr(DataConfig, name)]
    if unused := [f"data.{name}" for name in changed if not is_used[name]]:
        text = f"the splits of {config.name} are carved without {', '.join(unused)}, which does not apply"
        notes.append(Note(text, is_warning=True))
    if "validation" in strata:
        num = len(rows["validation"])
        text = f"{config.name} has {num} validation examples of its own: data.validation_fraction does not apply"
        notes.append(Note(text))
    return rows, notes


def origin_of(split: SplitName, source: Mapping[SplitName, object]) -> SplitName:
    """Return the split of the source that holds a split's rows."""
    return split if split in source else "train"
