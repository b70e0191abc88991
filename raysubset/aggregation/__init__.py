"""From many minima to one set of weights: pure functions of weights and a score, without Ray or files.

soup = merge([model.state_dict() for model in models])         # for anybody's state dicts
aggregation = aggregate(minima, config.aggregation, scorer)    # with the measures that are always reported
"""

from raysubset.aggregation.aggregator import Aggregation, Candidate, aggregate, aggregate_round
from raysubset.aggregation.curvature import fisher_merge, regmean
from raysubset.aggregation.merging import merge
from raysubset.aggregation.methods import (
    candidates_of_auto,
    combine_and_score,
    method_of,
    methods,
    methods_tried,
    refuse_contradictions,
    statistics_of,
)
from raysubset.aggregation.records import Aggregate, Context, Forward, Method, Minimum, Needs, Score
from raysubset.aggregation.scorer import Scorer
from raysubset.aggregation.sending import Send, from_differences, to_differences
from raysubset.aggregation.soups import barrier, ensemble_outputs, greedy_soup, select_best, uniform_soup, weighted_soup
from raysubset.aggregation.steps import mean_optimizer_state, outer_step, shrink_perturb
from raysubset.aggregation.streaming import RunningMean, shares_start
from raysubset.aggregation.task_vectors import dare, savgm, ties
