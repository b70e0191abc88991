"""Carve a stratified share of examples off: by index, seeded, with a training example left to every class."""

import numpy as np


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
