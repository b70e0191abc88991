"""Carve stratified shares of examples off for the splits that a source lacks: by index, seeded."""

import numpy as np

from raysubset.config import DataConfig, derive_seed
from raysubset.data.split import SplitName
from raysubset.events import Note


def carve(labels: np.ndarray, *, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split positions 0 … N-1 into the kept and the carved, each ascending, every class in its proportion.

    The carved are round(N * fraction), one at least, shared among the classes by largest remainder (ties at random).
    A class keeps one example at least, so one that has no more is not carved, and fewer may come off.

    Raises:
        ValueError: if no class has an example to spare.
    """
    generator = np.random.default_rng(seed)
    classes, counts = np.unique(labels, return_counts=True)
    wanted = max(1, round(len(labels) * fraction))
    quotas = counts * fraction
    shares = np.minimum(np.floor(quotas).astype(int), counts - 1)
    by_remainder = np.lexsort((generator.random(len(classes)), shares - quotas))
    spare = [position for position in by_remainder if shares[position] < counts[position] - 1]
    shares[spare[: max(0, wanted - shares.sum())]] += 1
    if not shares.any():
        raise ValueError(
            f"{len(labels)} examples of {len(classes)} classes are too few to hold any out: some class needs two"
        )
    carved = [
        generator.permutation(np.flatnonzero(labels == label))[:share]
        for label, share in zip(classes, shares, strict=True)
    ]
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[np.concatenate(carved)] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def carve_splits(
    strata: dict[SplitName, np.ndarray], config: DataConfig, *, at_end: bool = False
) -> tuple[dict[SplitName, np.ndarray], list[Note]]:
    """Ascending rows of each split, in its own source or in the training split's, and notes on those carved off.

    Args:
        strata: of each split that the source has, int64 [N]: what is kept in proportion.
        at_end: carve the last examples off instead, where neighbours have too much in common, as windows of a text.
    """
    end = " from the end" if at_end else ""
    notes: list[Note] = []
    rows: dict[SplitName, np.ndarray] = {name: np.arange(len(numbers)) for name, numbers in strata.items()}
    if "test" not in strata:
        rows["train"], rows["test"] = _carve(
            "test", config.test_fraction, strata["train"], rows["train"], config, at_end
        )
        num, share = len(rows["test"]), config.test_fraction
        text = f"{config.name} has no test split: {share:.0%} of its examples ({num}) carved off{end} for testing"
        notes.append(Note(text))
    if "validation" not in strata:
        fraction = config.validation_fraction
        rows["train"], rows["validation"] = _carve(
            "validation", fraction, strata["train"], rows["train"], config, at_end
        )
    else:
        num = len(rows["validation"])
        text = f"{config.name} has {num} validation examples of its own: data.validation_fraction does not apply"
        notes.append(Note(text))
    return rows, notes


def _carve(
    name: SplitName, fraction: float, strata: np.ndarray, rows: np.ndarray, config: DataConfig, at_end: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Rows that remain for training, and those carved off for another split."""
    if at_end:
        num = max(1, round(len(rows) * fraction))
        return rows[:-num], rows[-num:]
    kept, carved = carve(strata[rows], fraction=fraction, seed=derive_seed(config.split_seed, name))
    return rows[kept], rows[carved]
