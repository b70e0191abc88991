"""Which units of two networks correspond, by their weights or by their activations (Git Re-Basin, arXiv:2209.04836)."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from raysubset.aggregation.alignment.tracing import Permutations, UnitGroup, UnitStructure, permuted, walk
from raysubset.training import Weights

Match = Callable[[Weights, Weights], Permutations]
"""Orders of the second network's units that bring them to the places of the first's."""

_MAX_SWEEPS = 100  # over all groups, as in the authors' code; a few are enough
_GAIN = 1e-9  # relative: less is rounding, and could be gained and lost for ever


def match_weights(
    target: Weights,
    weights: Weights,
    structure: UnitStructure,
    *,
    parameter_names: Collection[str],
    seed: int,
    device: torch.device,
) -> Permutations:
    """Weight matching, the paper's Algorithm 1: permute one group after the other so that the two agree best.

    Agreement is the inner product of the parameters. Groups are taken in random order, each by a linear assignment
    given all others, until none can be improved: a local optimum. The arithmetic is float64, on the device; both
    networks are held there once. Running statistics, which `parameter_names` lacks, do not count.
    """
    target = {name: target[name].to(device, torch.float64) for name in parameter_names}
    current = {name: weights[name].to(device, torch.float64) for name in parameter_names}
    groups = [
        replace(group, axes=tuple(axis for axis in group.axes if axis.names[0] in parameter_names))
        for group in structure.groups
    ]
    orders = list(structure.identity())
    generator = torch.Generator().manual_seed(seed)
    for _ in range(_MAX_SWEEPS):
        improved = False
        for k in torch.randperm(len(groups), generator=generator).tolist():
            group = groups[k]
            similarity = torch.zeros(group.size, group.size, dtype=torch.float64, device=device)
            for axis in group.axes:
                positions = axis.positions.to(device)
                ours, theirs = (axis.view(both)[positions].reshape(group.size, -1) for both in (target, current))
                similarity += ours @ theirs.T
            order = _best_order(similarity)
            if order is None:
                continue
            candidate = permuted(current, [group], (order,))
            names = {axis.names[0] for axis in group.axes}
            if len(names) < len(group.axes) and not _agree_better(target, candidate, current, names):
                continue  # both axes of one tensor are permuted, which is no linear assignment any more
            current, orders[k], improved = candidate, orders[k][order], True
        if not improved:
            break
    return tuple(orders)


def match_activations(
    target: fx.GraphModule, network: fx.GraphModule, groups: Sequence[UnitGroup], batches: Iterable[Tensor]
) -> Permutations:
    """Activation matching: units correspond whose outputs correlate best over examples.

    They are compared before the activation function, behind which some never fire: on MNIST that was the better by 10
    points of the mean's accuracy. Both networks, traced and in evaluation mode, run side by side, batch [n, C, H, W] by
    batch; sums are float64 on their device. A unit that is constant on the examples correlates with none.
    """
    correlations = [[_Correlation() for _ in group.activations] for group in groups]
    where: dict[str, list[tuple[int, int]]] = {}
    for g, group in enumerate(groups):
        for r, seen in enumerate(group.activations):
            where.setdefault(seen.node, []).append((g, r))
    with torch.no_grad():
        for images in batches:
            for (node, ours), (_, theirs) in zip(walk(target, images), walk(network, images), strict=True):
                for g, r in where.get(node.name, ()):
                    seen = groups[g].activations[r]
                    positions = seen.positions.to(images.device)
                    a, b = (x.movedim(seen.dim, 0)[positions].flatten(1).double() for x in (ours, theirs))
                    correlations[g][r].add(a, b)
    orders = []
    for group, own in zip(groups, correlations, strict=True):
        order = _best_order(sum((correlation.matrix() for correlation in own), torch.zeros(()))) if own else None
        orders.append(torch.arange(group.size) if order is None else order)
    return tuple(orders)


class _Correlation:
    """The correlation of two networks' units, over examples and pixels."""

    def __init__(self) -> None:
        self._count = 0
        self._sums: list[Tensor] = []

    def add(self, a: Tensor, b: Tensor) -> None:
        """a and b: float64 [n, S], the values of each unit."""
        sums = [a.sum(1), b.sum(1), a.square().sum(1), b.square().sum(1), a @ b.T]
        self._sums = [old + new for old, new in zip(self._sums, sums, strict=True)] if self._sums else sums
        self._count += a.shape[1]

    def matrix(self) -> Tensor:
        """float64 [n, n] in [-1, 1]; zero where a unit is constant."""
        mean_a, mean_b, square_a, square_b, product = (total / self._count for total in self._sums)
        scale_a, scale_b = (
            torch.where(variance > 1e-12 * square, variance.clamp_min(1e-300).rsqrt(), 0.0)
            for variance, square in ((square_a - mean_a**2, square_a), (square_b - mean_b**2, square_b))
        )
        return (product - torch.outer(mean_a, mean_b)) * torch.outer(scale_a, scale_b)


def merge_many(
    members: Sequence[Callable[[], Weights]], structure: UnitStructure, match: Match, *, most_rounds: int, seed: int
) -> tuple[list[Permutations], int]:
    """MergeMany, the paper's Algorithm 3: align each member in turn to the mean of the others until nothing changes.

    In the first round only members aligned already enter the mean, which is our own choice: the mean of members that
    are not aligned is no network's. So two members need that round alone. Members are loaded one at a time, once a
    round; in memory are one of them, the mean it is aligned to, and in float64 the sum of all.

    Args:
        most_rounds: with weights the agreement grows in each, and few are needed; with activations nothing ends them.
        seed: of the members' order, drawn anew each round.

    Returns:
        The order of each member's units, and the number of rounds.
    """
    generator = torch.Generator().manual_seed(seed)
    orders: list[Permutations] = [structure.identity() for _ in members]
    total: Weights = {}
    changed, num_rounds = True, 0
    while changed and num_rounds < (1 if len(members) == 2 else most_rounds):
        changed = False
        for num_visited, k in enumerate(torch.randperm(len(members), generator=generator).tolist()):
            aligned = permuted(members[k](), structure.groups, orders[k])
            first = num_rounds == 0
            others = total if first else _plus(total, aligned, -1)
            if others:
                found = match(_divided(others, num_visited if first else len(members) - 1, aligned), aligned)
                if any(not torch.equal(order, torch.arange(len(order))) for order in found):
                    changed = True
                    orders[k] = tuple(old[new] for old, new in zip(orders[k], found, strict=True))
                    aligned = permuted(aligned, structure.groups, found)
            total = _plus(others, aligned, 1)
        num_rounds += 1
    return orders, num_rounds


def _plus(total: Weights, weights: Weights, sign: int) -> Weights:
    """The sum in float64; empty weights are zero."""
    floating = {name: value.double() for name, value in weights.items() if value.is_floating_point()}
    return {name: total[name] + sign * value for name, value in floating.items()} if total else floating


def _divided(total: Weights, num: int, like: Weights) -> Weights:
    """The mean of `num` members in their own types; integer buffers are the last member's."""
    return {name: (total[name] / num).to(own.dtype) if name in total else own for name, own in like.items()}


def _best_order(similarity: Tensor) -> Tensor | None:
    """The order of columns that makes the trace largest, int64 [n] on the CPU; None if it is as large already."""
    from scipy.optimize import linear_sum_assignment

    matrix = similarity.cpu().numpy()
    columns = linear_sum_assignment(matrix, maximize=True)[1]
    best, present = float(matrix[range(len(matrix)), columns].sum()), float(matrix.trace())
    return torch.from_numpy(columns) if best - present > _GAIN * max(abs(best), abs(present)) else None


def _agree_better(target: Weights, candidate: Weights, current: Weights, names: Collection[str]) -> bool:
    after, before = (sum(float((target[n] * weights[n]).sum()) for n in names) for weights in (candidate, current))
    return after - before > _GAIN * max(abs(after), abs(before))
