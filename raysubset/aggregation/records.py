"""What goes into an aggregation and what comes out, and what a method is: how it makes weights, and what it needs."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from raysubset.training import Cost, Metrics, Weights

Score = Callable[[Weights], Metrics]
"""Validation metrics of weights that are no member's own: batch-norm statistics are recomputed first."""


def _no_statistics(kind: str) -> Weights:
    raise ValueError(f"the minima have no {kind} statistics: they were made for another aggregation.method")


@dataclass(frozen=True)
class Minimum:
    """Where one subset's minimization ended. The weights stay where they are until they are asked for."""

    subset_id: int
    num_examples: int  # of the subset
    start_id: str  # names the start weights: minima with equal ids share a start
    load_weights: Callable[[], Weights] = field(repr=False)
    load_outputs: Callable[[], Tensor] = field(repr=False)  # [num_validation, …], predict()'s
    outcome: str = "epochs"  # MinimizeResult's
    training: Metrics | None = None  # on the subset itself, un-augmented, in evaluation mode, where it is measured
    validation: Metrics | None = None  # likewise
    cost: Cost = field(default_factory=Cost)  # of the attempt that finished
    load_statistics: Callable[[str], Weights] = field(default=_no_statistics, repr=False)
    """What its actor left of a kind; ValueError where there is nothing. By parameter, "fisher": diagonal_fisher(); by
    layer, "gram": gram_matrices(); "subsample": the weights of the minimum on a part of the subset."""
    averaged: frozenset[str] | None = field(default=None, repr=False)  # models.averaged_names(); None: all keys

    def keys_averaged(self, weights: Weights) -> Collection[str]:
        """Return the keys of its weights, or of their like, that a mean is made of, and that are to be finite."""
        return weights.keys() if self.averaged is None else self.averaged

    def validated(self) -> Metrics:
        """What it validates at.

        Raises:
            ValueError: if that was not measured.
        """
        if self.validation is None:
            raise ValueError(f"the minimum of subset {self.subset_id} was not measured on validation data")
        return self.validation

    def to_dict(self) -> dict[str, Any]:
        """All but the weights, for JSON."""
        return {
            "subset_id": self.subset_id,
            "num_examples": self.num_examples,
            "start_id": self.start_id,
            "outcome": self.outcome,
            "training": self.training and self.training.to_dict(),
            "validation": self.validation and self.validation.to_dict(),
            "cost": self.cost.to_dict(),
        }

    @classmethod
    def from_dict(
        cls,
        record: dict[str, Any],
        load_weights: Callable[[], Weights],
        load_outputs: Callable[[], Tensor],
        load_statistics: Callable[[str], Weights] = _no_statistics,
    ) -> "Minimum":
        """The inverse of to_dict()."""
        same = ("subset_id", "num_examples", "start_id", "outcome")
        return cls(
            **{name: record[name] for name in same},
            training=record["training"] and Metrics.from_dict(record["training"]),
            validation=record["validation"] and Metrics.from_dict(record["validation"]),
            cost=Cost.from_dict(record["cost"]),
            load_weights=load_weights,
            load_outputs=load_outputs,
            load_statistics=load_statistics,
        )


@dataclass(frozen=True)
class Aggregate:
    """One set of weights made of several minima."""

    method: str
    weights: Weights = field(repr=False)
    subset_ids: tuple[int, ...]  # members that went in, in the order they did
    coefficients: tuple[float, ...]  # of the members, summing to one; none of a user's method
    shared_start: bool  # False labels a mean of minima that share no start
    tried: tuple[tuple[tuple[int, ...], float], ...] = ()  # (members, validation loss) of each candidate scored
    of_first: tuple[str, ...] = ()  # keys in which members differ and of which no mean is made: the first member's
    alignment: dict[str, Any] | None = None  # aligned_soup's report

    def to_dict(self) -> dict[str, Any]:
        """All but the weights, for JSON."""
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
    """Examples that are passed forward for one set of weights."""

    calibration: int  # the sample of training data
    refreshing: int  # of these, to recompute batch-norm statistics: none in a network without
    validation: int


@dataclass(frozen=True)
class Needs:
    """What a method needs beside the minima's weights. Config, plan, actors and report go by it."""

    shared_start: bool = True  # it averages: of minima that share no start the result is useless
    validation: bool = False  # it goes by what minima validate at
    statistics: tuple[str, ...] = ()  # that actors take of their minimum: "fisher", "gram"
    parts: bool = False  # minima on parts of the subsets too (aggregation.savgm_fraction), as "subsample" statistics
    forward: Callable[[int, Forward], int] = lambda num, one: one.refreshing + one.validation
    """Examples that it passes forward, with so many members, until its result is measured: for the planned cost."""


@dataclass(frozen=True)
class Context:
    """What a method has in hand beside the minima."""

    start: Weights | None  # what the minima started from, where they share that
    parameter_names: frozenset[str]  # keys of the trainable parameters
    score: Score  # of any weights, on validation data; what it passes forward is counted
    align: Callable[[Sequence[Minimum]], Aggregate]  # aligned_soup() on the calibration examples
    seed: int  # of what it draws at random


@dataclass(frozen=True)
class Method:
    """One way to make one set of weights of several minima."""

    combine: Callable[[Sequence[Minimum], Context], Aggregate]
    needs: Needs = Needs()
