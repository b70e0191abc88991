"""Members read one after the other: what is refused of them, and a mean that holds one copy whatever their number."""

import math
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from raysubset.aggregation.records import Aggregate, Minimum
from raysubset.training import Weights

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}  # by bytes
CURE = "lower minimize.learning_rate, or use aggregation.method=select_best"


class RunningMean:
    """A weighted mean of weights that are added one after the other. It holds one copy, however many are added.

    This is the one place that says how a mean is computed. Values that no member changed stay, to the last bit: frozen
    parameters, masks of infinities. Of the others, floating and complex values of the keys in `averaged` are averaged.
    The rest are the first member's: integers, codebooks, the vectors of spectral norm.

    Args:
        averaged: models.averaged_names(); None: all keys.
    """

    def __init__(self, averaged: Collection[str] | None = None) -> None:
        self._averaged = averaged
        self._mean: Weights = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._total = 0.0
        self._differing: set[str] = set()  # keys in which members differ

    def add(self, weights: Weights, coefficient: float = 1.0) -> None:
        """Add one member. Half-precision members accumulate in float32.

        Raises:
            ValueError: if keys or shapes differ from those of the first member.
        """
        if not self._mean:
            self._dtypes = {key: value.dtype for key, value in weights.items()}
            self._mean = {key: value.to(wide(value.dtype), copy=True) for key, value in weights.items()}
            self._total = coefficient
            return
        refuse_other_architecture(self._mean, weights)
        self._total += coefficient
        for key, mean in self._mean.items():
            value = weights[key].to(mean.dtype)
            if key not in self._differing:
                if _same(mean, value):
                    continue
                self._differing.add(key)
            is_number = mean.is_floating_point() or mean.is_complex()
            if is_number and (self._averaged is None or key in self._averaged):
                mean.lerp_(value, coefficient / self._total)

    def has_changed(self, key: str) -> bool:
        """Return True if two members differ in this key."""
        return key in self._differing

    @property
    def of_first(self) -> tuple[str, ...]:
        """The keys in which members differ but that are not averaged: their values are the first member's."""
        return () if self._averaged is None else tuple(sorted(self._differing - set(self._averaged)))

    def weights(self) -> Weights:
        """Return the mean in the members' types. It shares the mean's memory, so it is valid until the next add()."""
        return {key: value.to(self._dtypes[key]) for key, value in self._mean.items()}


def _same(first: Tensor, second: Tensor) -> bool:
    """Return True if two tensors of one shape and type have the same bits, NaN included. Stops at a difference."""
    bits = _INTEGERS[first.element_size()]
    return torch.equal(first.view(bits), second.view(bits))


def mean_of(minima: Sequence[Minimum]) -> RunningMean:
    """Return an empty mean for these members."""
    return RunningMean(minima[0].averaged if minima else None)


def shares_start(minima: Sequence[Minimum]) -> bool:
    """Return True if all minima started from the same weights."""
    return len({m.start_id for m in minima}) <= 1


def aggregate_of(
    method: str, minima: Sequence[Minimum], weights: Weights, coefficients: Sequence[float], mean: RunningMean
) -> Aggregate:
    """Return an aggregate of all minima. `mean` averaged the plain part; coefficients are relative to one another."""
    ids, shares = tuple(m.subset_id for m in minima), tuple(c / sum(coefficients) for c in coefficients)
    return Aggregate(method, weights, ids, shares, shares_start(minima), of_first=mean.of_first)


def load_member(minimum: Minimum) -> Weights:
    """Load a minimum's weights.

    Raises:
        ValueError: if they hold NaN or infinity.
    """
    weights = minimum.load_weights()
    if key := first_not_finite(weights, minimum.keys_averaged(weights)):
        raise ValueError(f"the minimum of subset {minimum.subset_id} holds NaN or infinity in {key}: {CURE}")
    return weights


def load_members(minima: Sequence[Minimum]) -> Iterator[tuple[Minimum, Weights]]:
    """Yield each minimum with its weights, one after the other.

    Raises:
        ValueError: as load_member(), and if the weights differ in keys or shapes from the first member's.
    """
    first_shapes: Weights = {}
    for minimum in minima:
        weights = load_member(minimum)
        first_shapes = first_shapes or {key: value.to("meta") for key, value in weights.items()}
        refuse_other_architecture(first_shapes, weights)
        yield minimum, weights


def refuse_not_finite(mean: Weights, minima: Sequence[Minimum]) -> None:
    """Raise load_member()'s error for the first bad member if a mean holds NaN or infinity. Only then read members."""
    if first_not_finite(mean, minima[0].keys_averaged(mean)):
        for minimum in minima:
            load_member(minimum)


def load_statistics(minimum: Minimum, kind: str) -> Weights:
    """Load the statistics of a kind that a minimum's actor left.

    Raises:
        ValueError: if there are none of this kind, or they hold NaN or infinity.
    """
    statistics = minimum.load_statistics(kind)
    keys = minimum.keys_averaged(statistics) if kind == "subsample" else statistics.keys()
    if key := first_not_finite(statistics, keys):
        raise ValueError(f"the {kind} statistics of subset {minimum.subset_id} hold NaN or infinity in {key}: {CURE}")
    return statistics


def first_not_finite(tensors: Weights, keys: Collection[str]) -> str | None:
    """Return the first of the keys whose values are not finite, as after a minimization that diverged; else None.

    A finite sum shows that all values are finite, at 40 times the speed of isfinite() (one CPU thread, torch 2.15).
    """
    for key, value in tensors.items():
        value = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
        if not value.is_floating_point() or key not in keys:
            continue
        total = value.sum(dtype=torch.float64 if value.dtype == torch.float64 else torch.float32).item()
        if not math.isfinite(total) and not bool(value.isfinite().all()):
            return key
    return None


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the type to accumulate in: float32 for half precision."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def refuse_other_architecture(first: Weights, second: Weights) -> None:
    """Raise a ValueError with the first key that one of the two lacks, or whose shape differs."""
    for key in sorted(first.keys() ^ second.keys()):
        raise ValueError(f"minima of different architectures cannot be averaged: {key} is in one and not in the other")
    for key, value in first.items():
        if value.shape != second[key].shape:
            a, b = tuple(value.shape), tuple(second[key].shape)
            raise ValueError(
                f"minima of different architectures cannot be averaged: {key} is {a} in one and {b} in another"
            )
