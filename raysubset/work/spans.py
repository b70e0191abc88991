"""round_spans(): the part of the schedule that each round covers, and with it the round's length."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from raysubset.config import Config
from raysubset.training import learning_rate_at

_NUM_POINTS = 10_000  # at which the schedule is evaluated


def round_spans(config: Config, num: int) -> Sequence[tuple[float, float]]:
    """Return (begin, end) of each of `num` rounds, as shares of all their epochs.

    With rounds.lengths=quadratic all rounds have the same integral of the squared learning rate: a round's length goes
    by 1/rate² (Gu et al. 2024, arXiv:2310.14423), while their sum and their number stay. Before its peak a schedule
    counts as at its peak, as in the paper for a warm-up.
    """
    ends = [round / num for round in range(num + 1)]
    if config.rounds.lengths == "quadratic":
        recipe = replace(config.stage("subsets"), learning_rate=1.0)
        middles = (np.arange(_NUM_POINTS) + 0.5) / _NUM_POINTS
        rates = [learning_rate_at(recipe, 0, num_steps=1, span=(middle, middle)) for middle in middles]
        largest_to_come = np.maximum.accumulate(rates[::-1])[::-1]
        integral = np.concatenate([[0.0], np.cumsum(largest_to_come**2)])
        ends = np.interp(ends, integral / integral[-1], np.linspace(0.0, 1.0, _NUM_POINTS + 1)).tolist()
    return list(itertools.pairwise(ends))
