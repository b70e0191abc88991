"""aggregate(): the configured method with what is always reported beside it, on one device."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raysubset.aggregation.methods import candidates_of_auto, combine, make
from raysubset.aggregation.records import Aggregate, Minimum
from raysubset.aggregation.scorer import Scorer
from raysubset.aggregation.soups import barrier, by_validation_loss, plain_mean
from raysubset.aggregation.steps import outer_step
from raysubset.aggregation.streaming import shares_start
from raysubset.config import AggregationConfig, Config
from raysubset.quality import Quality
from raysubset.training import Cost, Metrics, Weights


@dataclass(frozen=True)
class Candidate:
    """A method that auto tried."""

    method: str
    validation: Metrics | None  # None: it was refused
    cost: Cost  # of making and scoring it; what its actors did for it is in the minima's cost
    error: str | None = None  # why it was refused

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "method": self.method,
            "validation": self.validation and self.validation.to_dict(),
            "cost": self.cost.to_dict(),
            "error": self.error,
        }


@dataclass(frozen=True)
class Aggregation:
    """An aggregate, and how it compares with its members: None for what was not measured.

    Its batch-norm statistics are refreshed if it was measured, and else averaged from the members'.
    """

    aggregate: Aggregate
    cost: Cost
    mean_member: Mapping[str, float | None]  # the mean of the members' losses, and of their qualities by its name
    training: Metrics | None = None  # of the aggregate on the calibration sample of the training set
    validation: Metrics | None = None  # of the aggregate, as all below
    uniform_mean: Metrics | None = None  # of the plain mean of all, whatever the method: NaN if one is not finite
    ensemble: Metrics | None = None
    best_member: Metrics | None = None
    barrier: float | None = None
    candidates: tuple[Candidate, ...] = ()  # of auto, in the order tried

    def to_dict(self) -> dict[str, Any]:
        """All but the weights, for JSON."""
        metrics = {
            "training": self.training,
            "validation": self.validation,
            "uniform_mean": self.uniform_mean,
            "ensemble": self.ensemble,
            "best_member": self.best_member,
        }
        return {
            **self.aggregate.to_dict(),
            **{name: value and value.to_dict() for name, value in metrics.items()},
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
    """Make one set of weights of the minima by the configured method, and measure it beside its members.

    A single minimum is its own aggregate, by any method. With auto every method that is applicable is tried, and the
    one of least validation loss taken; those that are refused are recorded with the reason.

    Args:
        start: the weights the minima started from, for methods that work on differences from them.
        seed: of what a method draws at random.
        measure_training: False: not on training data, even if the scorer would.
        quality: whose mean over the members is recorded beside that of their losses.

    Raises:
        ValueError: as the method does; see uniform_soup().
    """
    if config.method == "auto":
        made, validation, candidates = _best_candidate(minima, config, scorer, start=start, seed=seed)
    else:
        made, validation = make(minima, config, scorer, start=start, seed=seed)
        candidates = ()
    measured = {candidate.method: candidate.validation for candidate in candidates} | {made.method: validation}
    mean = validation if len(minima) == 1 else measured.get("uniform_soup")
    if mean is None:
        mean = scorer.score(plain_mean(minima, [1.0] * len(minima)).weights())  # of NaN where a member holds some
    records, names = [minimum.validated().to_dict() for minimum in minima], ("loss", quality.name)
    return Aggregation(
        aggregate=made,
        training=scorer.training(made.weights) if measure_training else None,
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
    """The applicable method's aggregate of least validation loss, and all that were tried. Two of them are held."""
    best, tried = None, []
    methods = candidates_of_auto(shared_start=shares_start(minima)) if len(minima) > 1 else ("select_best",)
    for method in methods:
        before, validation, error = scorer.cost(), None, None
        try:
            made, validation = make(minima, replace(config, method=method), scorer, start=start, seed=seed)
            if math.isfinite(validation.loss) and (best is None or validation.loss < best[1].loss):
                best = made, validation
        except ValueError as refusal:
            error = str(refusal)
        after = scorer.cost()
        cost = Cost(after.num_forward - before.num_forward, device_s=after.device_s - before.device_s)
        tried.append(Candidate(method, validation, cost, error))
    if best is None:
        reasons = "; ".join(f"{one.method}: {one.error or 'its loss is not finite'}" for one in tried)
        raise ValueError(f"none of auto's candidates can be used: {reasons}")
    return *best, tuple(tried)


def aggregate_round(
    minima: Sequence[Minimum],
    config: Config,
    scorer: Scorer,
    *,
    start: Weights,
    momentum: Weights,
    seed: int = 0,
    measured: bool = True,
    quality: Quality,
) -> tuple[Aggregation, Weights]:
    """aggregate(), then the outer step where the config has one, with its statistics refreshed and measured anew.

    Args:
        start: the weights this round's minima started from.
        momentum: the outer step's, as the last round returned it; empty in the first.
        measured: False: make the weights alone, without any forward work but what the method itself needs.

    Returns:
        The aggregation, and the momentum for the next round: empty without an outer step.
    """
    steps = config.rounds.has_outer_step()
    if measured:
        options: dict[str, Any] = {"seed": seed, "measure_training": not steps, "quality": quality}
        made = aggregate(minima, config.aggregation, scorer, start=start, **options)
    else:
        combined = combine(minima, config.aggregation, scorer, start=start, seed=seed)
        made = Aggregation(combined, scorer.cost(), dict.fromkeys(("loss", quality.name)))
    if not steps:
        return made, {}
    weights, momentum = outer_step(
        start,
        made.aggregate.weights,
        momentum,
        learning_rate=config.rounds.outer_learning_rate,
        momentum_factor=config.rounds.momentum,
        parameter_names=scorer.parameter_names,
    )
    if measured:
        weights = scorer.refreshed(weights)
        made = replace(made, training=scorer.training(weights), validation=scorer.score_as_is(weights))
    return replace(made, aggregate=replace(made.aggregate, weights=weights), cost=scorer.cost()), momentum
