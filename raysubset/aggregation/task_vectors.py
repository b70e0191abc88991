"""Arithmetic on differences of weights: from the common start (TIES, DARE), or from minima on a part of each subset.

Measured, TIES and DARE were behind the plain mean, SAVGM slightly ahead (jobs/aggregators_mnist.py).
"""

import functools
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from raysubset.aggregation.records import Aggregate, Minimum
from raysubset.aggregation.streaming import (
    RunningMean,
    aggregate_of,
    first_not_finite,
    load_members,
    load_statistics,
    mean_of,
    refuse_other_architecture,
    shares_start,
)
from raysubset.config import derive_seed
from raysubset.training import Weights

BLOCK = 2**18  # elements of a task vector at a time: a MiB of float32, which stays in a core's cache


def ties(
    minima: Sequence[Minimum], start: Weights, *, density: float, scale: float, parameter_names: Collection[str]
) -> Aggregate:
    """Trim, elect signs, and average the elements that agree (TIES-Merging, Yadav et al. 2023, arXiv:2306.01708).

    Of each task vector θ_i - θ_0 the share `density` of largest magnitude is kept, over all parameters together (at the
    limit, all of equal magnitude). An element's elected sign is that of the sum of what is kept of it. The kept
    elements of that sign are averaged, and the result is θ_0 plus `scale` times this mean. If signs cancel exactly,
    nothing is added (the authors' code takes the sign of the majority of elements).

    All else is averaged by RunningMean's rule, so batch-norm statistics have to be recomputed. Members are streamed
    once. Memory holds four and a half copies of the parameters, including the result, and one member; six copies from
    256 members on.

    Args:
        start: θ_0, the weights that all minima started from.
        density: in (0, 1].
        scale: λ; positive.
        parameter_names: models.trainable_names(), here and below.

    Raises:
        ValueError: if the minima share no start, and as uniform_soup().
    """
    vectors = _TaskVectors("ties", minima, start, parameter_names)
    sums, magnitudes = vectors.zeros(), vectors.zeros()
    num_plus, num_minus = (vectors.zeros(torch.uint8 if len(minima) < 2**8 else torch.int32) for _ in range(2))
    for _, weights in vectors.members():
        limit = vectors.largest_dropped(weights, density)
        for place, difference in vectors.differences(weights):
            largest = F.hardshrink(difference, limit)
            sums[place].add_(largest)
            num_plus.numpy()[place] += (largest.numpy() > 0).view(np.uint8)  # six times as fast as torch
            num_minus.numpy()[place] += (largest.numpy() < 0).view(np.uint8)
            magnitudes[place].add_(largest.abs_())
    agreeing = magnitudes.add_(sums.abs()).mul_(0.5)  # the sum of magnitudes of elements that have the sum's sign
    agreeing.div_(torch.where(sums > 0, num_plus, num_minus).clamp_min_(1)).mul_(sums.sign_())
    return vectors.aggregate(agreeing, scale)


def dare(
    minima: Sequence[Minimum], start: Weights, *, drop: float, scale: float, seed: int, parameter_names: Collection[str]
) -> Aggregate:
    """Drop elements of task vectors at random and rescale the others (DARE, Yu et al. 2024, arXiv:2311.03099).

    Each element of θ_i - θ_0 is dropped with probability `drop`, rounded to a multiple of 2⁻¹⁶ below one. Kept elements
    are divided by one minus this probability, so that the expectation stays. The result is θ_0 plus `scale` times the
    mean over members (a sum in the paper, whose λ is ours over N). Buffers as in ties(). Members are streamed: memory
    holds two copies of the parameters, including the result, and one member.

    Args:
        start: θ_0, the weights that all minima started from.
        drop: in [0, 1).
        scale: λ; positive.
        seed: each member's draws come from it and the subset's id, the same on every machine.
        parameter_names: the keys of the trainable parameters.

    Raises:
        ValueError: if the minima share no start, and as uniform_soup().
    """
    vectors = _TaskVectors("dare", minima, start, parameter_names)
    num_dropped = min(round(drop * 2**16), 2**16 - 1)  # of 2¹⁶
    sums = vectors.zeros()
    for minimum, weights in vectors.members():
        random_words = np.random.SFC64(derive_seed(seed, "dare", minimum.subset_id)).random_raw
        for place, difference in vectors.differences(weights):
            is_kept = _draws(random_words, len(difference), num_dropped).astype(difference.numpy().dtype)
            sums[place].addcmul_(difference, torch.from_numpy(is_kept))
    sums /= (1 - num_dropped / 2**16) * len(minima)
    return vectors.aggregate(sums, scale)


def savgm(minima: Sequence[Minimum], *, fraction: float, parameter_names: Collection[str]) -> Aggregate:
    """Return (mean θ_i - r mean θ_i') / (1 - r); θ_i' is a minimum on a share r of subset i (Zhang et al., JMLR 2013).

    This is the subsampled average mixture: if a minimum's bias falls as one over the number of examples, its leading
    term cancels. It is a weighted mean in which each θ_i' has weight -r. Buffers are the members' mean, so batch-norm
    statistics have to be recomputed. Members are streamed: memory holds one copy of the weights, and one member with
    its second minimum.

    Args:
        fraction: r, in (0, 1), with which the subsamples were drawn.

    Raises:
        ValueError: if a member has no subsample statistics, and as uniform_soup().
    """
    corrected, buffers = RunningMean(), mean_of(minima)
    for minimum, weights in load_members(minima):
        part = load_statistics(minimum, "subsample")
        refuse_other_architecture(weights, part)
        buffers.add({key: value for key, value in weights.items() if key not in parameter_names})
        corrected.add({name: weights[name] for name in parameter_names})
        corrected.add({name: part[name] for name in parameter_names}, -fraction)
    merged = corrected.weights() | buffers.weights()
    return aggregate_of("savgm", minima, merged, [1.0] * len(minima), buffers)


class _TaskVectors:
    """The members' parameters less those of their start, as one flat vector each. All else is averaged as it is."""

    def __init__(self, method: str, minima: Sequence[Minimum], start: Weights, names: Collection[str]) -> None:
        if not shares_start(minima):
            raise ValueError(
                f"{method} works on the minima's differences from their common start, and these share none: use "
                "subsets.start=shared, or aggregation.method=aligned_soup or select_best"
            )
        self._method, self._minima, self._start, self._buffers = method, minima, start, mean_of(minima)
        self._origin = {name: start[name] for name in sorted(names) if name in start}
        dtypes = (value.dtype for value in self._origin.values())
        self._dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)

    def zeros(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return a vector of zeros, in float32 or a wider type by default."""
        return torch.zeros(sum(value.numel() for value in self._origin.values()), dtype=dtype or self._dtype)

    def members(self) -> Iterator[tuple[Minimum, Weights]]:
        """Yield load_members(), refusing other keys and shapes than the start's, and a start that is not finite."""
        if key := first_not_finite(self._start, self._minima[0].keys_averaged(self._start)):
            raise ValueError(f"the weights that the minima started from hold NaN or infinity in {key}")
        for minimum, weights in load_members(self._minima):
            refuse_other_architecture(self._start, weights)
            self._buffers.add({key: value for key, value in weights.items() if key not in self._origin})
            yield minimum, weights

    def differences(self, weights: Weights) -> Iterator[tuple[slice, Tensor]]:
        """Yield a member's vector in blocks of BLOCK elements, each with its place. Blocks share one memory."""
        block = torch.empty(BLOCK, dtype=self._dtype)
        first = filled = 0
        for name, start in self._origin.items():
            member_part, start = weights[name].reshape(-1), start.reshape(-1)
            while len(member_part):
                free = BLOCK - filled
                part = block[filled : filled + len(member_part)]
                torch.sub(member_part[:free].to(block.dtype), start[:free], out=part)
                member_part, start, filled = member_part[free:], start[free:], filled + len(part)
                if filled == BLOCK:
                    yield slice(first, first + BLOCK), block
                    first, filled = first + BLOCK, 0
        if filled:
            yield slice(first, first + filled), block[:filled]

    def largest_dropped(self, weights: Weights, density: float) -> float:
        """Return a magnitude that only the elements to keep exceed; 0 if fewer elements have moved at all."""
        magnitudes = self.zeros()
        for place, difference in self.differences(weights):
            magnitudes[place] = difference.abs_()
        ordered, num_kept = magnitudes.numpy(), max(1, round(density * len(magnitudes)))
        ordered.partition(-num_kept)
        return float(np.nextafter(ordered[-num_kept], ordered.dtype.type(0)))

    def aggregate(self, vector: Tensor, scale: float) -> Aggregate:
        """Return the aggregate whose parameters are the start's plus `scale` times the merged vector."""
        weights, sizes = dict(self._buffers.weights()), [value.numel() for value in self._origin.values()]
        for (name, value), part in zip(self._origin.items(), vector.split(sizes), strict=True):
            weights[name] = torch.add(value, part.view(value.shape), alpha=scale).to(value.dtype)
        return aggregate_of(self._method, self._minima, weights, [1.0] * len(self._minima), self._buffers)


def _draws(random_words: Callable[[int], np.ndarray], num: int, num_dropped: int) -> np.ndarray:
    """Return uint8 [num] of 0 with probability num_dropped / 2¹⁶, otherwise 1; num_dropped in [0, 2¹⁶).

    An element is kept if a random number of 16 bits is at least num_dropped. 64 elements are compared at once, from the
    last bit on. Trailing zeros decide nothing, so that a half takes one random bit an element.
    """
    num_words = -(-num // 64)
    is_kept = np.full(num_words, 2**64 - 1, np.uint64)
    for digit in reversed(f"{num_dropped:016b}".rstrip("0")):
        random = random_words(num_words)
        is_kept = is_kept & random if digit == "1" else is_kept | random
    return np.unpackbits(is_kept.astype("<u8").view(np.uint8), count=num, bitorder="little")
