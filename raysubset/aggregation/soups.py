"""Means of minima, and the choice of one. Weights are streamed, so memory does not grow with their number."""

import copy
import math
from collections.abc import Sequence

import torch

from raysubset.aggregation.records import Aggregate, Minimum, Score
from raysubset.aggregation.streaming import (
    RunningMean,
    aggregate_of,
    load_member,
    mean_of,
    refuse_not_finite,
    shares_start,
)
from raysubset.tasks import Task
from raysubset.training import Metrics


def select_best(minima: Sequence[Minimum]) -> Aggregate:
    """Return the minimum of least validation loss. It needs no shared start.

    Raises:
        ValueError: if there is no minimum, none has a finite loss, or the best one holds NaN.
    """
    best = by_validation_loss(minima)[0]
    return Aggregate("select_best", load_member(best), (best.subset_id,), (1.0,), shares_start(minima))


def uniform_soup(minima: Sequence[Minimum]) -> Aggregate:
    """Return the elementwise mean of the weights (Wortsman et al. 2022, arXiv:2203.05482).

    Raises:
        ValueError: if the minima differ in keys or shapes, or one holds NaN.
    """
    return _mean("uniform_soup", minima, [1.0] * len(minima))


def weighted_soup(minima: Sequence[Minimum], *, weight_by: str) -> Aggregate:
    """Return the mean weighted by subset sizes (federated averaging, arXiv:1602.05629) or inverse validation losses.

    Weighting by the inverse of the loss is this project's own choice.

    Raises:
        ValueError: as uniform_soup(), and if a loss to weight by is not finite, or below 0, as a task of the user's may
            have it: no inverse of such a loss says how much better it is.
    """
    if weight_by == "examples":
        coefficients = [float(m.num_examples) for m in minima]
    else:
        for minimum in minima:
            if not 0 <= (loss := minimum.validated().loss) < math.inf:
                raise ValueError(
                    f"the minimum of subset {minimum.subset_id} has a validation loss of {loss:g}, and weights by the "
                    "inverse need finite losses above 0: lower minimize.learning_rate, or use "
                    "aggregation.weight_by=examples"
                )
        coefficients = [1 / max(m.validated().loss, 1e-12) for m in minima]
    return _mean("weighted_soup", minima, coefficients)


def greedy_soup(minima: Sequence[Minimum], score: Score) -> Aggregate:
    """Add minima in order of validation loss as long as the mean's loss does not grow (arXiv:2203.05482, recipe 1).

    The paper compares accuracies; here it is the loss, as in every choice. Raises as uniform_soup().
    """
    first, *others = by_validation_loss(minima)
    soup, members, best_loss = mean_of(minima), (first.subset_id,), first.validated().loss
    soup.add(load_member(first))
    tried: list[tuple[tuple[int, ...], float]] = [(members, best_loss)]
    for minimum in others:
        candidate = copy.deepcopy(soup)
        candidate.add(load_member(minimum))
        more, loss = (*members, minimum.subset_id), score(candidate.weights()).loss
        tried.append((more, loss))
        if loss <= best_loss:
            soup, members, best_loss = candidate, more, loss
    shares, shared_start = (1 / len(members),) * len(members), shares_start(minima)
    return Aggregate("greedy_soup", soup.weights(), members, shares, shared_start, tuple(tried), soup.of_first)


def by_validation_loss(minima: Sequence[Minimum]) -> list[Minimum]:
    """Return the minima, the best first. Those whose loss is not finite come last. Ties are ordered by subset id.

    Raises:
        ValueError: if there is no minimum, or none has a finite loss.
    """
    if not minima:
        raise ValueError("there is no minimum to choose from")
    if not any(math.isfinite(m.validated().loss) for m in minima):
        raise ValueError(f"none of the {len(minima)} minima has a finite validation loss: lower minimize.learning_rate")
    return sorted(minima, key=lambda minimum: (minimum.validated().compared_loss, minimum.subset_id))


def ensemble_outputs(minima: Sequence[Minimum], task: Task) -> torch.Tensor:
    """Combine the members' predictions as the task does, float64 [n, …] at ensemble_positions(). It is a reference."""
    return task.combine(minimum.load_outputs().double() for minimum in minima)


def barrier(mean: Metrics, minima: Sequence[Minimum]) -> float:
    """Return the validation loss of the minima's mean minus their mean loss (Frankle et al. 2020, arXiv:1912.05671)."""
    return mean.loss - sum(m.validated().loss for m in minima) / len(minima)


def plain_mean(minima: Sequence[Minimum], coefficients: Sequence[float]) -> RunningMean:
    """Return the mean of members as they are, whatever their starts. NaN and infinity stay in it.

    Raises:
        ValueError: if the minima differ in keys or shapes.
    """
    mean = mean_of(minima)
    for minimum, coefficient in zip(minima, coefficients, strict=True):
        mean.add(minimum.load_weights(), coefficient)
    return mean


def _mean(method: str, minima: Sequence[Minimum], coefficients: Sequence[float]) -> Aggregate:
    mean = plain_mean(minima, coefficients)
    weights = mean.weights()
    refuse_not_finite(weights, minima)
    return aggregate_of(method, minima, weights, coefficients, mean)
