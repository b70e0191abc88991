"""The examples of a round's subsets, as pure functions of config, data and round."""

from collections.abc import Sequence

import numpy as np

from raysubset.config import Config, derive_seed
from raysubset.data import FullSet
from raysubset.subsets import Subset, split_into_subsets


def cut_subsets(
    config: Config, full_set: FullSet, round: int, *, shares: Sequence[float] | None = None
) -> tuple[Subset, ...]:
    """Return the subsets of a round: a pure function of config, data, round and the subsets' unequal shares, if any.

    Raises:
        ValueError: as split_into_subsets() does, and for a column whose place in the training table another has.
    """
    column, target = config.subsets.column, config.data.target
    if column == "row" or (column in full_set.train.shapes and target not in (None, column)):
        raise ValueError(
            f"subsets.column = {column!r} is a name that raysubset's own table of the training split has for something "
            "else: rename the column"
        )
    strata, seed = full_set.strata, derive_seed(config.seed, "subsets", round)
    return tuple(
        split_into_subsets(
            strata,
            config.subsets,
            seed,
            num_classes=len(full_set.task.class_names) or int(strata.max()) + 1,
            attributes=full_set.train.attributes(config.subsets.column),
            shares=shares,
        )
    )


def subsample_size(config: Config, num_examples: int) -> int:
    """Return the number of a subset's examples that savgm minimizes on a second time."""
    return max(1, round(config.aggregation.savgm_fraction * num_examples))


def cut_subsample(config: Config, indices: np.ndarray, round: int, subset_id: int) -> np.ndarray:
    """Return the part of a subset that savgm minimizes on a second time: sorted, distinct int64 positions."""
    generator = np.random.default_rng(derive_seed(config.seed, "subsample", round, subset_id))
    return np.sort(generator.choice(indices, subsample_size(config, len(indices)), replace=False))
