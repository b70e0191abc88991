"""The input and output of an aggregation, and what a method is: how it combines weights, and what it needs for that."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from raysubset.training import Cost, Metrics, Weights

Score = Callable[[Weights], Metrics]
"""Returns validation metrics of weights that belong to no member. Batch-norm statistics are recomputed first."""


def _no_statistics(kind: str) -> Weights:
    raise ValueError(f"the minima have no {kind} statistics: they were computed for another aggregation.method")


@dataclass(frozen=True)
class Minimum:
    """The end of one subset's minimization. The weights stay where they are until they are loaded."""

    subset_id: int
    num_examples: int  # of the subset
    start_id: str  # names the start weights: minima with equal ids share a start
    load_weights: Callable[[], Weights] = field(repr=False)
    load_outputs: Callable[[], Tensor] = field(repr=False)  # [num_validation, …], of predict()
    outcome: str = "epochs"  # as in MinimizeResult
    training: Metrics | None = None  # on the subset itself, un-augmented, in evaluation mode; None: not measured
    validation: Metrics | None = None  # on validation data; None: not measured
    cost: Cost = field(default_factory=Cost)  # of the attempt that finished
    load_statistics: Callable[[str], Weights] = field(default=_no_statistics, repr=False)
    """Loads the statistics of a kind that the actor left; ValueError if there are none. By parameter, "fisher":
    diagonal_fisher(); by layer, "gram": gram_matrices(); "subsample": the weights of the minimum on a part of the
    subset."""
    averaged: frozenset[str] | None = field(default=None, repr=False)  # models.averaged_names(); None: all keys

    def keys_averaged(self, weights: Weights) -> Collection[str]:
        """Return the keys of weights such as its own that a mean averages, and whose values must be finite."""
        return weights.keys() if self.averaged is None else self.averaged

    def validated(self) -> Metrics:
        """Return the validation metrics.

        Raises:
            ValueError: if they were not measured.
        """
        if self.validation is None:
            raise ValueError(f"the minimum of subset {self.subset_id} was not measured on validation data")
        return self.validation


@dataclass(frozen=True)
class Aggregate:
    """One set of weights, combined from several minima."""

    method: str
    weights: Weights = field(repr=False)
    subset_ids: tuple[int, ...]  # of the members used, in the order in which they were added
    coefficients: tuple[float, ...]  # of the members, summing to one; empty for a user's method
    shared_start: bool  # False marks a mean of minima that share no start
    tried: tuple[tuple[tuple[int, ...], float], ...] = ()  # (members, validation loss) of each candidate scored
    of_first: tuple[str, ...] = ()  # keys in which members differ but that are not averaged: the first member's values
    alignment: dict[str, Any] | None = None  # the report of aligned_soup

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the weights, for JSON."""
        return {
            "method": self.method,
            "subset_ids": list(self.subset_ids),
            "coefficients": list(self.coefficients),
            "shared_start": self.shared_start,
            "tried": [{"subset_ids": list(ids), "validation_loss": loss} for ids, loss in self.tried],
            "of_first": list(self.of_first),
        }


@dataclass(frozen=True)
class Forward:
    """Numbers of examples that are passed forward for one set of weights."""

    calibration: int  # the sample of training data
    refreshing: int  # of these, to recompute batch-norm statistics: 0 for a network without batch norm
    validation: int


@dataclass(frozen=True)
class Needs:
    """What a method needs besides the minima's weights. Config checks, plan, actors and report use it."""

    shared_start: bool = True  # it averages, which is useless for minima that share no start
    validation: bool = False  # it uses the minima's validation metrics
    statistics: tuple[str, ...] = ()  # kinds that actors compute of their minimum: "fisher", "gram"
    parts: bool = False  # minima on parts of the subsets too (aggregation.savgm_fraction), as "subsample" statistics
    forward: Callable[[int, Forward], int] = lambda num, sizes: sizes.refreshing + sizes.validation
    """Returns the examples passed forward with this number of members until the result is measured, for the plan."""


@dataclass(frozen=True)
class Context:
    """What a method receives besides the minima."""

    start: Weights | None  # the start that the minima share; None if they share none
    parameter_names: frozenset[str]  # keys of the trainable parameters
    score: Score  # of any weights, on validation data; its forward work is counted
    align: Callable[[Sequence[Minimum]], Aggregate]  # aligned_soup() on the calibration examples
    seed: int  # of the method's random draws
    tied: Sequence[Sequence[str]] = ()  # keys of one and the same tensor, in the state dict's order


@dataclass(frozen=True)
class Method:
    """One way to combine several minima into one set of weights."""

    combine: Callable[[Sequence[Minimum], Context], Aggregate]
    needs: Needs = Needs()
    settings: tuple[str, ...] = ()  # fields of AggregationConfig that it uses, besides method and allow_independent
