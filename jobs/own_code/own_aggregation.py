"""An aggregation of your own: the elementwise median of minima, which one member that went astray does not move.

Command:    cd jobs/own_code && raysubset run --aggregation.method own_aggregation:median
"""

import torch

from raysubset.aggregation import Needs


def median(minima, context):
    """The aggregate's weights; context has the start weights, a score on validation data and a seed."""
    members = [minimum.load_weights() for minimum in minima]
    return {key: torch.stack([member[key] for member in members]).median(0).values for key in members[0]}


median.needs = Needs(shared_start=True)  # pyright: ignore[reportFunctionMemberAccess]
