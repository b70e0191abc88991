"""Carves off stratified shares of examples for the splits that a source lacks, by index and seed."""

import numpy as np

from raysubset.config import DataConfig, derive_seed
from raysubset.data.split import SplitName
from raysubset.events import Note


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
