"""The calibration examples: a sample of the training split, for averages' batch-norm statistics and training loss."""

import numpy as np
import torch

from raysubset.config import Config, derive_seed
from raysubset.data import Examples, FullSet

CALIBRATION_EXAMPLES = 10_000  # at most: for batch-norm statistics and the training loss of means


def calibration_examples(config: Config, full_set: FullSet, device: torch.device | str) -> Examples:
    """Return the sample of a run, the same for all its stages and processes.

    Batch-norm statistics are of augmented batches, as in training; losses are of the examples as they are.
    """
    num_train = len(full_set.train)
    generator = np.random.default_rng(derive_seed(config.seed, "calibration"))
    positions = np.sort(generator.choice(num_train, min(CALIBRATION_EXAMPLES, num_train), replace=False))
    return full_set.examples("train", positions, device=device, augment=True)
