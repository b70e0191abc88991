"""Minima that share no start made one: their units permuted to correspond, then the mean, then REPAIR.

aggregate, report = aligned_soup(minima, model, examples, config.minimize, matching="activations", repair=True)
"""

from raysubset.aggregation.alignment.matching import Match, Merged, match_activations, match_weights, merge_many
from raysubset.aggregation.alignment.repairing import layer_statistics, mean_statistics, repair
from raysubset.aggregation.alignment.soup import AlignmentReport, aligned_soup
from raysubset.aggregation.alignment.tracing import (
    Permutations,
    UnitGroup,
    UnitStructure,
    permuted,
    random_permutations,
    trace_units,
)

__all__ = [
    "aligned_soup",
    "AlignmentReport",
    "trace_units",
    "UnitStructure",
    "UnitGroup",
    "Permutations",
    "permuted",
    "random_permutations",
    "match_weights",
    "match_activations",
    "merge_many",
    "Match",
    "Merged",
    "layer_statistics",
    "mean_statistics",
    "repair",
]
