"""Which examples are used for what, as pure functions of config, data and round: subsets, and samples of them."""

from collections.abc import Sequence

import numpy as np
import torch

from raysubset.config import Config, derive_seed
from raysubset.data import Examples, FullSet
from raysubset.subsets import Subset, split_into_subsets

CALIBRATION_EXAMPLES = 10_000  # at most: for batch-norm statistics and the training loss of means


def cut_subsets(
    config: Config, full_set: FullSet, round: int, *, shares: Sequence[float] | None = None
) -> tuple[Subset, ...]:
    """Return the subsets of a round: a pure function of config, data, round and the subsets' unequal shares, if any.

    Raises:
        ValueError: as split_into_subsets() does, and if subsets.column has a name that our training table uses itself.
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


def calibration_examples(config: Config, full_set: FullSet, device: torch.device | str) -> Examples:
    """Return the sample of training examples that all stages and processes of a run use for statistics and losses.

    Batch-norm statistics are of augmented batches, as in training; losses are of the examples as they are.
    """
    num_train = len(full_set.train)
    generator = np.random.default_rng(derive_seed(config.seed, "calibration"))
    positions = np.sort(generator.choice(num_train, min(CALIBRATION_EXAMPLES, num_train), replace=False))
    return full_set.examples("train", positions, device=device, augment=True)
