"""Arithmetic on differences of weights: from the common start (TIES, DARE), or from minima on a part of each subset."""

import functools
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from raysubset.aggregation.records import Aggregate, Minimum
from raysubset.aggregation.streaming import (
    RunningMean,
    blocks,
    check_start,
    first_not_finite,
    load_members,
    load_statistics,
    refuse_not_finite,
    refuse_other_architecture,
    wide,
    widened,
)
from raysubset.config import derive_seed
from raysubset.training import Weights


def ties(
    minima: Sequence[Minimum], start: Weights, *, density: float, scale: float, parameter_names: Collection[str]
) -> Aggregate:
    """Trim, elect sign, and average those that agree (TIES-Merging, Yadav et al. 2023, arXiv:2306.01708).

    Of each task vector θ_i - θ_0 the share `density` of largest magnitude is kept, over all parameters together; an
    element's sign is that of the sum of what is left of it; the kept elements of that sign are averaged, and θ_0 plus
    `scale` times that is the result. Where signs cancel exactly nothing is added (the authors' code takes the sign of
    the majority of elements).

    Buffers are averaged, so batch-norm statistics are to be recomputed; integer buffers are the first member's. Members
    are streamed, twice, for the signs and for the means: four copies of the parameters, the result among them, and one
    member are held.

    Args:
        start: θ_0, the weights that all minima started from.
        density: in (0, 1].
        scale: λ; positive.
        parameter_names: the keys that are parameters.

    Raises:
        ValueError: if the minima share no start, and as uniform_soup().
    """
    _refuse_independent("ties", minima)
    names = sorted(parameter_names)
    signs, magnitudes, thresholds, buffers = torch.zeros(0), torch.zeros(0), [], RunningMean()
    for _, weights in _load_moved(minima, start):
        if not thresholds:
            signs, magnitudes = _zeros(start, names), _zeros(start, names)
        buffers.add(_without(parameter_names, weights))
        for place, difference in _differences(weights, start, names):
            magnitudes[place].copy_(difference.abs_())
        thresholds.append(_least_kept(magnitudes, density))
        for place, difference in _differences(weights, start, names):
            signs[place].addcmul_(difference, difference.abs().ge_(thresholds[-1]))
    signs.sign_()
    totals, counts = magnitudes.zero_(), torch.zeros_like(signs)
    for (_, weights), threshold in zip(_load_moved(minima, start), thresholds, strict=True):
        for place, difference in _differences(weights, start, names):
            agreement = difference.mul_(signs[place])  # positive where the signs are the same
            kept = agreement.clone().ge_(threshold)
            totals[place].addcmul_(agreement, kept)
            counts[place].add_(kept)
    return _moved("ties", minima, start, totals.div_(counts.clamp_min_(1.0)).mul_(signs), scale, buffers, names)


def dare(
    minima: Sequence[Minimum],
    start: Weights,
    *,
    drop: float,
    scale: float,
    seed: int,
    parameter_names: Collection[str],
) -> Aggregate:
    """Drop elements of task vectors at random and rescale the rest (DARE, Yu et al. 2024, arXiv:2311.03099).

    Each element of θ_i - θ_0 is dropped with probability `drop`, and divided by 1 - drop where it is kept, so that its
    expectation stays; the result is θ_0 plus `scale` times the mean over members (a sum in the paper, whose λ is ours
    over N). Buffers as in ties(). Members are streamed: two copies of the parameters, the result among them, and one
    member are held.

    Args:
        start: θ_0, the weights that all minima started from.
        drop: in [0, 1).
        scale: λ; positive.
        seed: each member's draws come from it and the subset's id.
        parameter_names: the keys that are parameters.

    Raises:
        ValueError: if the minima share no start, and as uniform_soup().
    """
    _refuse_independent("dare", minima)
    names = sorted(parameter_names)
    sums, buffers = torch.zeros(0), RunningMean()
    for minimum, weights in _load_moved(minima, start):
        sums = sums if len(sums) else _zeros(start, names)
        buffers.add(_without(parameter_names, weights))
        generator = torch.Generator().manual_seed(derive_seed(seed, "dare", minimum.subset_id))
        for place, difference in _differences(weights, start, names):
            if drop:
                difference *= torch.rand(len(difference), generator=generator).ge_(drop)
            sums[place].add_(difference)
    sums /= (1 - drop) * len(minima)
    return _moved("dare", minima, start, sums, scale, buffers, names)


def savgm(
    minima: Sequence[Minimum],
    *,
    fraction: float,
    parameter_names: Collection[str],
    allow_independent: bool = False,
) -> Aggregate:
    """(mean θ_i - r mean θ_i') / (1 - r), θ_i' the minimum on a share r of subset i (Zhang et al., JMLR 2013).

    Subsampled average mixture: where a minimum's bias falls as one over the number of examples, its leading term
    cancels. It is a weighted mean, in which each θ_i' counts -r. Buffers are the members' mean, so batch-norm
    statistics are to be recomputed. Members are streamed: one copy of the weights, and one member with its second
    minimum, are held.

    Args:
        fraction: r, in (0, 1), with which the subsamples were drawn.
        parameter_names: the keys that are parameters.

    Raises:
        ValueError: if a member has no subsample statistics, and as uniform_soup().
    """
    shared = check_start("savgm", minima, allow_independent=allow_independent)
    corrected, buffers, keys = RunningMean(), RunningMean(), list[str]()
    for minimum, weights in load_members(minima, checked=False):
        part = load_statistics(minimum, "subsample")
        refuse_other_architecture(weights, part)
        keys = keys or list(weights)
        buffers.add(_without(parameter_names, weights))
        corrected.add({name: weights[name] for name in parameter_names})
        corrected.add({name: part[name] for name in parameter_names}, -fraction)
    made = corrected.weights() | buffers.weights()
    refuse_not_finite(made, minima)
    return _aggregate("savgm", minima, {key: made[key] for key in keys}, shared)


def _refuse_independent(method: str, minima: Sequence[Minimum]) -> None:
    if not check_start(method, minima, allow_independent=True):
        raise ValueError(
            f"{method} works on the minima's differences from their common start, and these share none: use "
            "subsets.start=shared, or aggregation.method=aligned_soup or select_best"
        )


def _load_moved(minima: Sequence[Minimum], start: Weights) -> Iterator[tuple[Minimum, Weights]]:
    """load_members(), of the start's keys and shapes; the start is to be finite as well."""
    if bad := first_not_finite(start):
        raise ValueError(f"the weights that the minima started from hold NaN or infinity in {bad}")
    for minimum, weights in load_members(minima):
        refuse_other_architecture(start, weights)
        yield minimum, weights


def _zeros(start: Weights, names: Sequence[str]) -> Tensor:
    """A flat vector of all these parameters, at least float32."""
    dtype = functools.reduce(torch.promote_types, (start[name].dtype for name in names), torch.float32)
    return torch.zeros(sum(start[name].numel() for name in names), dtype=dtype)


def _differences(weights: Weights, start: Weights, names: Sequence[str]) -> Iterator[tuple[slice, Tensor]]:
    """The task vector by blocks(), the caller's own: each with its place in the flat vector."""
    first = 0
    for name in names:
        dtype = wide(start[name].dtype)
        for own, origin in blocks(weights[name], start[name]):
            yield slice(first, first + len(own)), own.to(dtype) - origin
            first += len(own)


def _without(names: Collection[str], weights: Weights) -> Weights:
    return {key: value for key, value in weights.items() if key not in names}


def _least_kept(magnitudes: Tensor, density: float) -> float:
    """The least magnitude of the share that is kept, positive: what did not move has no sign. Reorders them."""
    num_dropped = len(magnitudes) - max(1, round(density * len(magnitudes)))
    if num_dropped:
        magnitudes.numpy().partition(num_dropped)  # a third of kthvalue()'s time
    least = float(magnitudes[num_dropped]) if num_dropped else 0.0
    return max(least, torch.finfo(magnitudes.dtype).tiny)


def _moved(
    method: str,
    minima: Sequence[Minimum],
    start: Weights,
    vector: Tensor,
    scale: float,
    buffers: RunningMean,
    names: Sequence[str],
) -> Aggregate:
    """θ_0 plus the merged task vector."""
    weights = dict(buffers.weights())
    for name, part in zip(names, vector.split([start[name].numel() for name in names]), strict=True):
        moved = widened(start[name]).add_(part.view(start[name].shape), alpha=scale)
        weights[name] = moved.to(start[name].dtype)
    return _aggregate(method, minima, {key: weights[key] for key in start}, True)


def _aggregate(method: str, minima: Sequence[Minimum], weights: Weights, shared: bool) -> Aggregate:
    share = 1 / len(minima)
    return Aggregate(method, weights, tuple(m.subset_id for m in minima), (share,) * len(minima), shared)
