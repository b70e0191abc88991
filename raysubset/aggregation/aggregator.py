"""aggregate() runs the configured method, and measures what is always reported with it, on one device."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raysubset.aggregation.methods import candidates_of_auto, combine, combine_and_score
from raysubset.aggregation.records import Aggregate, Minimum
from raysubset.aggregation.scorer import Scorer
from raysubset.aggregation.soups import barrier, by_validation_loss, plain_mean
from raysubset.aggregation.steps import outer_step
from raysubset.aggregation.streaming import shares_start
from raysubset.config import AggregationConfig, Config
from raysubset.quality import Quality
from raysubset.training import MEASURES, Cost, Measure, Metrics, Weights


@dataclass(frozen=True)
class Candidate:
    """A method that auto tried."""

    method: str
    validation: Metrics | None  # None: the method was refused
    cost: Cost  # of combining and scoring; what actors computed for it is part of the minima's cost
    error: str | None = None  # why it was refused

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return vars(self) | {"validation": self.validation and self.validation.to_dict(), "cost": self.cost.to_dict()}


@dataclass(frozen=True)
class Aggregation:
    """An aggregate, and how it compares with its members. What was not measured is None.

    Its batch-norm statistics are recomputed if it was measured; otherwise they are averaged from the members'.
    """

    aggregate: Aggregate
    cost: Cost
    mean_member: Mapping[str, float | None]  # the mean "loss" of the members, and their mean quality by its name
    training: Metrics | None = None  # of the aggregate, on the calibration sample of the training set
    validation: Metrics | None = None  # of the aggregate, on validation data, as for all below
    uniform_mean: Metrics | None = None  # of the plain mean of all members, for every method: NaN if one is not finite
    ensemble: Metrics | None = None
    best_member: Metrics | None = None
    barrier: float | None = None
    candidates: tuple[Candidate, ...] = ()  # of auto, in the order in which they were tried

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the weights, for JSON."""
        metrics = ("training", "validation", "uniform_mean", "ensemble", "best_member")
        return {
            **self.aggregate.to_dict(),
            **{name: value and value.to_dict() for name in metrics for value in (getattr(self, name),)},
            **{f"mean_member_{name}": mean for name, mean in self.mean_member.items()},
            "barrier": self.barrier,
            "cost": self.cost.to_dict(),
            "candidates": [candidate.to_dict() for candidate in self.candidates],
            "alignment": self.aggregate.alignment,
        }


def aggregate(
    minima: Sequence[Minimum],
    config: AggregationConfig,
    scorer: Scorer,
    *,
    start: Weights | None = None,
    seed: int = 0,
    measure_training: bool = True,
    quality: Quality,
) -> Aggregation:
    """Combine the minima into one set of weights by the configured method, and measure it and its members.

    A single minimum is its own aggregate, by any method. auto tries every applicable method and takes the one of least
    validation loss; methods that are refused are recorded with the reason.

    Args:
        start: the weights that the minima started from, for methods that work on differences from them.
        seed: of the method's random draws.
        measure_training: False: do not measure on training data.
        quality: its mean over the members is recorded, as that of their losses is.

    Raises:
        ValueError: as the method does; see uniform_soup().
    """
    if config.method == "auto":
        combined, validation, candidates = _best_candidate(minima, config, scorer, start=start, seed=seed)
    else:
        combined, validation = combine_and_score(minima, config, scorer, start=start, seed=seed)
        candidates = ()
    validations = {candidate.method: candidate.validation for candidate in candidates} | {combined.method: validation}
    mean = validation if len(minima) == 1 else validations.get("uniform_soup")
    if mean is None:
        mean = scorer.score(plain_mean(minima, [1.0] * len(minima)).weights())  # NaN if a member holds NaN
    records, names = [minimum.validated().to_dict() for minimum in minima], ("loss", quality.name)
    return Aggregation(
        aggregate=combined,
        training=scorer.training(combined.weights) if measure_training else None,
        validation=validation,
        uniform_mean=mean,
        ensemble=scorer.ensemble(minima),
        best_member=by_validation_loss(minima)[0].validated(),
        mean_member={name: sum(record[name] for record in records) / len(records) for name in names},
        barrier=barrier(mean, minima),
        cost=scorer.cost(),
        candidates=candidates,
    )


def _best_candidate(
    minima: Sequence[Minimum], config: AggregationConfig, scorer: Scorer, *, start: Weights | None, seed: int
) -> tuple[Aggregate, Metrics, tuple[Candidate, ...]]:
    """Return the candidate aggregate of least validation loss, and all candidates. Memory holds two aggregates."""
    best, candidates = None, []
    methods = candidates_of_auto(shared_start=shares_start(minima)) if len(minima) > 1 else ("select_best",)
    for method in methods:
        old, validation, error = scorer.cost(), None, None
        try:
            candidate, validation = combine_and_score(
                minima, replace(config, method=method), scorer, start=start, seed=seed
            )
            if validation.compared_loss < (best[1].loss if best else math.inf):
                best = candidate, validation
        except ValueError as refusal:
            error = str(refusal)
        new = scorer.cost()
        cost = Cost(new.num_forward - old.num_forward, device_s=new.device_s - old.device_s)
        candidates.append(Candidate(method, validation, cost, error))
    if best is None:
        reasons = "; ".join(f"{each.method}: {each.error or 'its loss is not finite'}" for each in candidates)
        raise ValueError(f"none of auto's candidates can be used: {reasons}")
    return *best, tuple(candidates)


def aggregate_round(
    minima: Sequence[Minimum],
    config: Config,
    scorer: Scorer,
    *,
    start: Weights,
    momentum: Weights,
    seed: int = 0,
    measures: Collection[Measure] = MEASURES,
    quality: Quality,
    send: Callable[[Weights], Weights] | None = None,
) -> tuple[Aggregation, Weights]:
    """Run aggregate(), then the outer step if the config has one. After these, statistics and metrics are new.

    Args:
        start: the weights that this round's minima started from.
        momentum: of the outer step, as the last round returned it; empty in the first round.
        measures: what the aggregate is measured on. Without "validation" weights are only combined, without any forward
            work but the method's own.
        send: takes the weights and returns them as readers will have them, rounded; None: as they are.

    Returns:
        The aggregation, and the momentum for the next round, which is empty without an outer step.
    """
    has_outer_step, on_training = config.rounds.has_outer_step(), "training" in measures
    is_final = not (has_outer_step or send)
    if "validation" in measures:
        options: dict[str, Any] = {"seed": seed, "measure_training": on_training and is_final}
        aggregation = aggregate(minima, config.aggregation, scorer, start=start, quality=quality, **options)
    else:
        combined = combine(minima, config.aggregation, scorer, start=start, seed=seed)
        aggregation = Aggregation(combined, scorer.cost(), dict.fromkeys(("loss", quality.name)))
    if is_final:
        return aggregation, {}
    weights = aggregation.aggregate.weights
    if has_outer_step:
        weights, momentum = outer_step(
            start,
            weights,
            momentum,
            learning_rate=config.rounds.outer_learning_rate,
            momentum_factor=config.rounds.momentum,
            parameter_names=scorer.parameter_names,
        )
    if send:
        weights = send(weights)
    if "validation" in measures:
        weights = scorer.refreshed(weights)
        training = scorer.training(weights) if on_training else None
        aggregation = replace(aggregation, training=training, validation=scorer.score_as_is(weights))
    return replace(aggregation, aggregate=replace(aggregation.aggregate, weights=weights), cost=scorer.cost()), momentum
