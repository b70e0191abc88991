"""Which examples form a subset, and whether the subsets determine the network.

subsets = split_into_subsets(labels, config.subsets, seed=7, num_classes=10)
overdetermination_ratio(len(subsets[0].indices), 10, num_parameters)       # Q
"""

from raysubset.subsets.cutting import Subset, resolve_cut, sizes_by_share, split_into_subsets
from raysubset.subsets.determination import (
    advice,
    missing_class_warnings,
    overdetermination_ratio,
    smallest_determined_size,
)
