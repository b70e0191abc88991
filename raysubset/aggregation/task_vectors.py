"""Arithmetic on differences of weights: from the common start (TIES, DARE), or from minima on a part of each subset."""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from raysubset.aggregation.records import Aggregate, Minimum
from raysubset.aggregation.streaming import (
    RunningMean,
    check_start,
    first_not_finite,
    load_members,
    load_statistics,
    refuse_other_architecture,
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
    are read twice, for the signs and for the means, so that memory does not grow with their number.

    Args:
        start: θ_0, the weights that all minima started from.
        density: in (0, 1].
        scale: λ; positive.
        parameter_names: the keys that are parameters.

    Raises:
        ValueError: if the minima share no start, and as uniform_soup().
    """
    _refuse_independent("ties", minima)
    sums = torch.zeros(0)
    for _, vector, _ in _task_vectors(minima, start, parameter_names):
        trimmed = _trim(vector, density)
        sums = sums.add_(trimmed) if len(sums) else trimmed
    signs = sums.sign_()
    totals, counts, buffers = torch.zeros_like(signs), torch.zeros_like(signs), RunningMean()
    for _, vector, others in _task_vectors(minima, start, parameter_names):
        buffers.add(others)
        trimmed = _trim(vector, density)
        agrees = trimmed.sign().eq_(signs).mul_(signs.abs())
        totals.addcmul_(trimmed, agrees)
        counts.add_(agrees)
    return _moved("ties", minima, start, totals.div_(counts.clamp_min_(1.0)), scale, buffers, parameter_names)


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
    over N). Buffers as in ties(); members are streamed.

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
    buffers, sums = RunningMean(), torch.zeros(0)
    for minimum, vector, others in _task_vectors(minima, start, parameter_names):
        buffers.add(others)
        if drop:
            generator = torch.Generator().manual_seed(derive_seed(seed, "dare", minimum.subset_id))
            vector *= torch.rand(len(vector), generator=generator) >= drop
        sums = sums.add_(vector) if len(sums) else vector
    sums /= (1 - drop) * len(minima)
    return _moved("dare", minima, start, sums, scale, buffers, parameter_names)


def savgm(
    minima: Sequence[Minimum],
    *,
    fraction: float,
    parameter_names: Collection[str],
    allow_independent: bool = False,
) -> Aggregate:
    """(mean θ_i - r mean θ_i') / (1 - r), θ_i' the minimum on a share r of subset i (Zhang et al., JMLR 2013).

    Subsampled average mixture: where a minimum's bias falls as one over the number of examples, its leading term
    cancels. Buffers are the mean's, so batch-norm statistics are to be recomputed; members are streamed.

    Args:
        fraction: r, in (0, 1), with which the subsamples were drawn.
        parameter_names: the keys that are parameters.

    Raises:
        ValueError: if a member has no subsample statistics, and as uniform_soup().
    """
    shared = check_start("savgm", minima, allow_independent=allow_independent)
    mean, dtypes = RunningMean(), dict[str, torch.dtype]()
    for minimum, weights in load_members(minima):
        part = load_statistics(minimum, "subsample")
        refuse_other_architecture(weights, part)
        dtypes = dtypes or {key: value.dtype for key, value in weights.items()}
        corrected = dict(weights)
        for name in parameter_names:
            corrected[name] = widened(weights[name]).sub_(part[name], alpha=fraction).div_(1 - fraction)
        mean.add(corrected)
    weights = {key: value.to(dtypes[key]) for key, value in mean.weights().items()}
    return _aggregate("savgm", minima, weights, shared)


def _refuse_independent(method: str, minima: Sequence[Minimum]) -> None:
    if not check_start(method, minima, allow_independent=True):
        raise ValueError(
            f"{method} works on the minima's differences from their common start, and these share none: use "
            "subsets.start=shared, or aggregation.method=aligned_soup or select_best"
        )


def _task_vectors(
    minima: Sequence[Minimum], start: Weights, parameter_names: Collection[str]
) -> Iterator[tuple[Minimum, Tensor, Weights]]:
    """Each member, its task vector (its own, flat, at least float32), and its buffers."""
    names = sorted(parameter_names)
    if bad := first_not_finite(start):
        raise ValueError(f"the weights that the minima started from hold NaN or infinity in {bad}")
    origin = torch.zeros(0)
    for minimum, weights in load_members(minima):
        refuse_other_architecture(start, weights)
        origin = origin if len(origin) else _flat(start, names)
        vector = _flat(weights, names).sub_(origin)
        yield minimum, vector, {key: value for key, value in weights.items() if key not in parameter_names}


def _flat(weights: Weights, names: Sequence[str]) -> Tensor:
    return torch.cat([widened(weights[name]).flatten() for name in names])


def _trim(vector: Tensor, density: float) -> Tensor:
    """The vector, in place, with zeros for all but the share of largest magnitude, and what equals the least of it."""
    num_dropped = len(vector) - max(1, round(density * len(vector)))
    if num_dropped:
        magnitudes = vector.abs()
        vector *= magnitudes >= magnitudes.kthvalue(num_dropped + 1).values
    return vector


def _moved(
    method: str,
    minima: Sequence[Minimum],
    start: Weights,
    vector: Tensor,
    scale: float,
    buffers: RunningMean,
    parameter_names: Collection[str],
) -> Aggregate:
    """θ_0 plus the merged task vector."""
    names = sorted(parameter_names)
    weights = dict(buffers.weights())
    for name, part in zip(names, vector.split([start[name].numel() for name in names]), strict=True):
        moved = widened(start[name]).add_(part.view(start[name].shape), alpha=scale)
        weights[name] = moved.to(start[name].dtype)
    return _aggregate(method, minima, {key: weights[key] for key in start}, True)


def _aggregate(method: str, minima: Sequence[Minimum], weights: Weights, shared: bool) -> Aggregate:
    share = 1 / len(minima)
    return Aggregate(method, weights, tuple(m.subset_id for m in minima), (share,) * len(minima), shared)
