"""What an aggregation method is to the rest of the system: how it makes weights, and what it needs for that."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raysubset.aggregation.records import Aggregate, Minimum, Score
from raysubset.training import Weights


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
