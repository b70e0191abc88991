"""Arithmetic on differences of weights: from the common start (TIES, DARE), or from minima on a part of each subset."""

import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from raysubset.aggregation.needs import Context, Method, Needs
from raysubset.aggregation.records import Aggregate, Minimum
from raysubset.aggregation.streaming import (
    BLOCK,
    RunningMean,
    blocks,
    check_start,
    first_not_finite,
    load_members,
    load_statistics,
    mean_of,
    refuse_not_finite,
    refuse_other_architecture,
    zeros,
)
from raysubset.config import AggregationConfig, derive_seed
from raysubset.training import Weights

STRIDE = 127  # of the sample that bounds ties()'s limit; prime, so that it meets all places of a filter alike


def task_vector_methods(config: AggregationConfig) -> dict[str, Method]:
    """The methods that work on what members moved by, or moved by twice, as the config has them."""

    def by_ties(minima: Sequence[Minimum], context: Context) -> Aggregate:
        options = {"density": config.ties_density, "scale": config.task_scale}
        return ties(minima, _start("ties", context), parameter_names=context.parameter_names, **options)

    def by_dare(minima: Sequence[Minimum], context: Context) -> Aggregate:
        options: dict[str, Any] = {"drop": config.dare_drop, "scale": config.task_scale, "seed": context.seed}
        return dare(minima, _start("dare", context), parameter_names=context.parameter_names, **options)

    def by_savgm(minima: Sequence[Minimum], context: Context) -> Aggregate:
        options: dict[str, Any] = {"fraction": config.savgm_fraction, "allow_independent": config.allow_independent}
        return savgm(minima, parameter_names=context.parameter_names, **options)

    return {"ties": Method(by_ties), "dare": Method(by_dare), "savgm": Method(by_savgm, Needs(parts=True))}


def _start(method: str, context: Context) -> Weights:
    if context.start is None:
        raise ValueError(f"{method} needs the weights that the minima started from")
    return context.start


def ties(
    minima: Sequence[Minimum], start: Weights, *, density: float, scale: float, parameter_names: Collection[str]
) -> Aggregate:
    """Trim, elect sign, and average those that agree (TIES-Merging, Yadav et al. 2023, arXiv:2306.01708).

    Of each task vector θ_i - θ_0 the share `density` of largest magnitude is kept, over all parameters together (of
    equals at the limit all); an element's sign is that of the sum of what is left of it; the kept elements of that sign
    are averaged, and θ_0 plus `scale` times that is the result. Where signs cancel exactly nothing is added (the
    authors' code takes the sign of the majority of elements).

    All else is averaged by RunningMean's rule, so batch-norm statistics are to be recomputed. Members are streamed,
    once: three and a half copies of the parameters, the result among them, and one member are held; five from 256
    members on; two more while it trims a task vector most of whose elements are of one magnitude.

    Args:
        start: θ_0, the weights that all minima started from.
        density: in (0, 1].
        scale: λ; positive.
        parameter_names: the keys that are trainable parameters.

    Raises:
        ValueError: if the minima share no start, and as uniform_soup().
    """
    _refuse_independent("ties", minima)
    origin, buffers = _parameters(start, parameter_names), mean_of(minima)
    sums, magnitudes = _zeros(origin), _zeros(origin)
    num_plus, num_minus = (_zeros(origin, torch.uint8 if len(minima) < 2**8 else torch.int32) for _ in range(2))
    for _, weights in _load_moved(minima, start):
        buffers.add(_without(parameter_names, weights))
        limit = _largest_dropped(weights, origin, density)
        for place, difference in _differences(weights, origin):
            kept = F.hardshrink(difference, limit)
            sums[place].add_(kept)
            num_plus.numpy()[place] += (kept.numpy() > 0).view(np.uint8)  # at six times torch's speed
            num_minus.numpy()[place] += (kept.numpy() < 0).view(np.uint8)
            magnitudes[place].add_(kept.abs_())
    for sum_, magnitude, plus, minus in blocks(sums, magnitudes, num_plus, num_minus):
        agreeing = magnitude.add_(sum_.abs()).mul_(0.5)  # the sum of magnitudes of those whose sign is the sum's
        agreeing.div_(torch.where(sum_ > 0, plus, minus).clamp_min_(1)).mul_(sum_.sign_())
    return _moved("ties", minima, start, magnitudes, scale, buffers, origin)


def dare(
    minima: Sequence[Minimum], start: Weights, *, drop: float, scale: float, seed: int, parameter_names: Collection[str]
) -> Aggregate:
    """Drop elements of task vectors at random and rescale the rest (DARE, Yu et al. 2024, arXiv:2311.03099).

    Each element of θ_i - θ_0 is dropped with probability `drop`, to the nearest of its multiples of 2⁻¹⁶ under one, and
    divided by one less this where it is kept, so that its expectation stays; the result is θ_0 plus `scale` times the
    mean over members (a sum in the paper, whose λ is ours over N). Buffers as in ties(). Members are streamed: two
    copies of the parameters, the result among them, and one member are held.

    Args:
        start: θ_0, the weights that all minima started from.
        drop: in [0, 1).
        scale: λ; positive.
        seed: each member's draws come from it and the subset's id, the same on every machine.
        parameter_names: the keys that are trainable parameters.

    Raises:
        ValueError: if the minima share no start, and as uniform_soup().
    """
    _refuse_independent("dare", minima)
    origin, buffers = _parameters(start, parameter_names), mean_of(minima)
    num_dropped = min(round(drop * 2**16), 2**16 - 1)  # of 2¹⁶
    sums = _zeros(origin)
    for minimum, weights in _load_moved(minima, start):
        buffers.add(_without(parameter_names, weights))
        random_words = np.random.SFC64(derive_seed(seed, "dare", minimum.subset_id)).random_raw
        for place, difference in _differences(weights, origin):
            kept = _draws(random_words, len(difference), num_dropped).astype(difference.numpy().dtype)
            sums[place].addcmul_(difference, torch.from_numpy(kept))
    sums /= (1 - num_dropped / 2**16) * len(minima)
    return _moved("dare", minima, start, sums, scale, buffers, origin)


def savgm(
    minima: Sequence[Minimum], *, fraction: float, parameter_names: Collection[str], allow_independent: bool = False
) -> Aggregate:
    """(mean θ_i - r mean θ_i') / (1 - r), θ_i' the minimum on a share r of subset i (Zhang et al., JMLR 2013).

    Subsampled average mixture: where a minimum's bias falls as one over the number of examples, its leading term
    cancels. It is a weighted mean, in which each θ_i' counts -r. Buffers are the members' mean, so batch-norm
    statistics are to be recomputed. Members are streamed: one copy of the weights, and one member with its second
    minimum, are held.

    Args:
        fraction: r, in (0, 1), with which the subsamples were drawn.
        parameter_names: the keys that are trainable parameters.

    Raises:
        ValueError: if a member has no subsample statistics, and as uniform_soup().
    """
    shared = check_start("savgm", minima, allow_independent=allow_independent)
    corrected, buffers, keys = RunningMean(), mean_of(minima), list[str]()
    for minimum, weights in load_members(minima, checked=False):
        part = load_statistics(minimum, "subsample")
        refuse_other_architecture(weights, part)
        keys = keys or list(weights)
        buffers.add(_without(parameter_names, weights))
        corrected.add({name: weights[name] for name in parameter_names})
        corrected.add({name: part[name] for name in parameter_names}, -fraction)
    made = corrected.weights() | buffers.weights()
    refuse_not_finite(made, minima)
    return _aggregate("savgm", minima, {key: made[key] for key in keys}, shared, buffers)


def _refuse_independent(method: str, minima: Sequence[Minimum]) -> None:
    if not check_start(method, minima, allow_independent=True):
        raise ValueError(
            f"{method} works on the minima's differences from their common start, and these share none: use "
            "subsets.start=shared, or aggregation.method=aligned_soup or select_best"
        )


def _load_moved(minima: Sequence[Minimum], start: Weights) -> Iterator[tuple[Minimum, Weights]]:
    """load_members(), not checked, of the start's keys and shapes; the start is to be finite as well."""
    if bad := first_not_finite(start, minima[0].keys_averaged(start)):
        raise ValueError(f"the weights that the minima started from hold NaN or infinity in {bad}")
    for minimum, weights in load_members(minima, checked=False):
        refuse_other_architecture(start, weights)
        yield minimum, weights


def _parameters(start: Weights, names: Collection[str]) -> Weights:
    return {name: start[name] for name in sorted(names) if name in start}


def _num_elements(origin: Weights) -> int:
    return sum(value.numel() for value in origin.values())


def _dtype(origin: Weights) -> torch.dtype:
    return functools.reduce(torch.promote_types, (value.dtype for value in origin.values()), torch.float32)


def _zeros(origin: Weights, dtype: torch.dtype | None = None) -> Tensor:
    """A flat vector of all these parameters, by default at least float32."""
    return zeros([_num_elements(origin)], dtype or _dtype(origin))


def _differences(weights: Weights, origin: Weights) -> Iterator[tuple[slice, Tensor]]:
    """The task vector as a flat one, BLOCK elements at a time: each with its place, and overwritten by the next."""
    block = torch.empty(BLOCK, dtype=_dtype(origin))
    first = filled = 0
    for name, start in origin.items():
        own, start = weights[name].reshape(-1), start.reshape(-1)
        while len(own):
            free = BLOCK - filled
            part = block[filled : filled + len(own)]
            torch.sub(own[:free].to(block.dtype), start[:free], out=part)
            own, start, filled = own[free:], start[free:], filled + len(part)
            if filled == BLOCK:
                yield slice(first, first + BLOCK), block
                first, filled = first + BLOCK, 0
    if filled:
        yield slice(first, first + filled), block[:filled]


def _without(names: Collection[str], weights: Weights) -> Weights:
    return {key: value for key, value in weights.items() if key not in names}


def _largest_dropped(weights: Weights, origin: Weights, density: float, *, errors: float = 4) -> float:
    """A magnitude that just those elements of the task vector exceed that are kept; 0 where fewer have moved at all.

    Selected among the few between two bounds, so many standard errors around what a sample says; further apart where
    that misleads, at last among all.
    """
    dtype, num_kept = _dtype(origin), max(1, round(density * _num_elements(origin)))
    sample = torch.cat(
        [weights[name].reshape(-1)[::STRIDE].to(dtype) - value.reshape(-1)[::STRIDE] for name, value in origin.items()]
    )
    low, high = _bounds(sample.abs_().numpy(), density, errors)
    num_above, between = _between(weights, origin, low, high)
    if num_above > num_kept or (low > 0 and num_above + len(between) < num_kept):
        return _largest_dropped(weights, origin, density, errors=8 * errors)
    rank = num_kept - num_above
    if rank == 0:
        return high
    if rank > len(between):
        return 0.0
    between.partition(-rank)
    return float(np.nextafter(between[-rank], between.dtype.type(0)))


def _bounds(magnitudes: np.ndarray, share: float, errors: float) -> tuple[float, float]:
    """Above the first and up to the second should be what this share exceeds of all from which these were sampled."""
    num = len(magnitudes)
    middle, margin = num * (1 - share), errors * (math.sqrt(num * share * (1 - share)) + 1)
    first, last = math.floor(middle - margin), math.ceil(middle + margin)
    ordered = np.partition(magnitudes, [max(first, 0), min(last, num - 1)])
    low = float(np.nextafter(ordered[first], ordered.dtype.type(0))) if first >= 0 else 0.0
    return low, float(ordered[last]) if last < num else math.inf


def _between(weights: Weights, origin: Weights, low: float, high: float) -> tuple[int, np.ndarray]:
    """How many of the task vector's magnitudes exceed the second bound, and those that exceed the first alone."""
    num_above, between = 0, []
    for _, difference in _differences(weights, origin):
        magnitudes = difference.abs_().numpy()
        above = magnitudes > high
        num_above += int(np.count_nonzero(above))
        between.append(magnitudes.compress(above ^ (magnitudes > low)))
    return num_above, np.concatenate(between)


def _draws(random_words: Callable[[int], np.ndarray], num: int, num_dropped: int) -> np.ndarray:
    """uint8 [num], 0 with probability num_dropped / 2¹⁶ and otherwise 1; num_dropped in [0, 2¹⁶).

    An element is kept if a random number of 16 bits is at least num_dropped. 64 elements are compared at once, from the
    last bit on; final zeros decide nothing, so that a half takes one random bit an element.
    """
    num_words = -(-num // 64)
    kept = np.full(num_words, 2**64 - 1, np.uint64)
    for digit in reversed(f"{num_dropped:016b}".rstrip("0")):
        random = random_words(num_words)
        kept = kept & random if digit == "1" else kept | random
    return np.unpackbits(kept.astype("<u8").view(np.uint8), count=num, bitorder="little")


def _moved(
    method: str,
    minima: Sequence[Minimum],
    start: Weights,
    vector: Tensor,
    scale: float,
    buffers: RunningMean,
    origin: Weights,
) -> Aggregate:
    """θ_0 plus the merged task vector."""
    weights = dict(buffers.weights())
    for (name, value), part in zip(origin.items(), vector.split([v.numel() for v in origin.values()]), strict=True):
        moved = zeros(value.shape, part.dtype)
        weights[name] = torch.add(value, part.view(value.shape), alpha=scale, out=moved).to(value.dtype)
    refuse_not_finite(weights, minima)
    return _aggregate(method, minima, {key: weights[key] for key in start}, True, buffers)


def _aggregate(
    method: str, minima: Sequence[Minimum], weights: Weights, shared: bool, buffers: RunningMean
) -> Aggregate:
    shares = (1 / len(minima),) * len(minima)
    ids = tuple(m.subset_id for m in minima)
    return Aggregate(method, weights, ids, shares, shared, of_first=buffers.of_first)
