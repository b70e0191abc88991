"""Finds which units of two networks correspond, by weights or by activations (Git Re-Basin, arXiv:2209.04836)."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor, fx

from raysubset.aggregation.alignment.tracing import Permutations, UnitGroup, UnitStructure, permuted, walk
from raysubset.aggregation.alignment.unit_tracer import Layer
from raysubset.training import Weights

Match = Callable[[Weights, Weights], Permutations]
"""Returns the orders of the second network's units that bring them to the places of the first's."""

_MAX_SWEEPS = 100  # over all groups, as in the authors' code; a few are enough
_GAIN = 1e-9  # relative: a smaller gain is rounding, and could come and go for ever


def match_weights(
    target: Weights,
    weights: Weights,
    structure: UnitStructure,
    *,
    parameter_names: Collection[str],
    seed: int,
    device: torch.device,
) -> Permutations:
    """Match weights by the paper's Algorithm 1: permute one group after the other so that the networks agree best.

    Agreement is the inner product of the parameters. Groups are taken in random order. Each is solved as a linear
    assignment given all others, until none can be improved: a local optimum. The arithmetic is float64, on the device,
    which holds both networks once. Running statistics, which `parameter_names` lacks, do not count.
    """
    target = {name: target[name].to(device, torch.float64) for name in parameter_names}
    current = {name: weights[name].to(device, torch.float64) for name in parameter_names}
    groups = [
        replace(group, axes=tuple(pair for pair in group.axes if pair[0].names[0] in parameter_names))
        for group in structure.groups
    ]
    orders = list(structure.identity())
    generator = torch.Generator().manual_seed(seed)
    for _ in range(_MAX_SWEEPS):
        has_improved = False
        for k in torch.randperm(len(groups), generator=generator).tolist():
            group = groups[k]
            similarity = torch.zeros(group.size, group.size, dtype=torch.float64, device=device)
            for axis, positions in group.axes:
                index = positions.to(device)
                ours, theirs = (axis.view(each)[index].reshape(group.size, -1) for each in (target, current))
                similarity += ours @ theirs.T
            order = _best_order(similarity)
            if order is None:
                continue
            candidate = permuted(current, [group], (order,))
            names = {axis.names[0] for axis, _ in group.axes}
            if len(names) < len(group.axes) and not _agree_better(target, candidate, current, names):
                continue  # both axes of one tensor are permuted, so this is no longer a linear assignment
            current, orders[k], has_improved = candidate, orders[k][order], True
        if not has_improved:
            break
    return tuple(orders)


def match_activations(
    target: fx.GraphModule, network: fx.GraphModule, groups: Sequence[UnitGroup], batches: Iterable[Tensor]
) -> Permutations:
    """Match activations: the units correspond whose outputs correlate best over examples.

    Outputs are compared before the activation function, as some units never fire after it: on MNIST that improved the
    mean's accuracy by 10 points. Both networks, traced and in evaluation mode, run side by side, batch [n, C, H, W] by
    batch. Sums are float64, on their device. A unit that is constant on the examples correlates with none.
    """
    by_group = [[_Correlation(layer, positions) for layer, positions in group.activations] for group in groups]
    with torch.no_grad():
        for images in batches:
            for (node, ours), (_, theirs) in zip(walk(target, images), walk(network, images), strict=True):
                for correlation in chain.from_iterable(by_group):
                    if correlation.layer.node == node.name:
                        correlation.add(ours, theirs)
    orders = []
    for group, parts in zip(groups, by_group, strict=True):
        order = _best_order(sum((part.matrix() for part in parts), torch.zeros(()))) if parts else None
        orders.append(torch.arange(group.size) if order is None else order)
    return tuple(orders)


class _Correlation:
    """The correlation of two networks' units in a layer's outputs, over examples and pixels."""

    def __init__(self, layer: Layer, positions: Tensor) -> None:
        self.layer, self._positions = layer, positions
        self._count = 0
        self._sums: list[Tensor] = []

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        """Add the layer's outputs in each network."""
        index = self._positions.to(ours.device)
        a, b = (x.movedim(self.layer.dim, 0)[index].flatten(1).double() for x in (ours, theirs))
        sums = [a.sum(1), b.sum(1), a.square().sum(1), b.square().sum(1), a @ b.T]
        self._sums = [old + new for old, new in zip(self._sums, sums, strict=True)] if self._sums else sums
        self._count += a.shape[1]

    def matrix(self) -> Tensor:
        """Return float64 [n, n] in [-1, 1]; 0 for a unit that is constant."""
        mean_a, mean_b, square_a, square_b, product = (total / self._count for total in self._sums)
        scale_a, scale_b = (
            torch.where(variance > 1e-12 * square, variance.clamp_min(1e-300).rsqrt(), 0.0)
            for variance, square in ((square_a - mean_a**2, square_a), (square_b - mean_b**2, square_b))
        )
        return (product - torch.outer(mean_a, mean_b)) * torch.outer(scale_a, scale_b)


def merge_many(
    members: Sequence[Callable[[], Weights]], structure: UnitStructure, match: Match, *, most_rounds: int, seed: int
) -> tuple[list[Permutations], int]:
    """Align each member in turn to the mean of the others until nothing changes (MergeMany, the paper's Algorithm 3).

    In the first round only members that are aligned already enter the mean. This is our own choice: the mean of members
    that are not aligned is not a working network. So two members need only this round. Members are loaded one at a
    time, once a round. Memory holds one of them, the mean that it is aligned to, and the sum of all in float64.

    Args:
        most_rounds: with weights the agreement grows in each round, and few are needed; with activations nothing else
            ends the rounds.
        seed: of the members' order, which is drawn again each round.

    Returns:
        The order of each member's units, and the number of rounds.
    """
    generator = torch.Generator().manual_seed(seed)
    orders: list[Permutations] = [structure.identity() for _ in members]
    total: Weights = {}
    has_changed, num_rounds = True, 0
    while has_changed and num_rounds < (1 if len(members) == 2 else most_rounds):
        has_changed = False
        for num_visited, k in enumerate(torch.randperm(len(members), generator=generator).tolist()):
            aligned = permuted(members[k](), structure.groups, orders[k])
            is_first_round = num_rounds == 0
            others = total if is_first_round else _plus(total, aligned, -1)
            if others:
                matched = match(_divided(others, num_visited if is_first_round else len(members) - 1, aligned), aligned)
                if any(not torch.equal(order, torch.arange(len(order))) for order in matched):
                    has_changed = True
                    orders[k] = tuple(old[new] for old, new in zip(orders[k], matched, strict=True))
                    aligned = permuted(aligned, structure.groups, matched)
            total = _plus(others, aligned, 1)
        num_rounds += 1
    return orders, num_rounds


def _plus(total: Weights, weights: Weights, sign: int) -> Weights:
    """Return total + sign * weights in float64. An empty total is zero."""
    floating = {name: value.double() for name, value in weights.items() if value.is_floating_point()}
    return {name: total[name] + sign * value for name, value in floating.items()} if total else floating


def _divided(total: Weights, num: int, like: Weights) -> Weights:
    """Return the mean of `num` members, in the types of `like`. Integer buffers are those of `like`."""
    return {name: (total[name] / num).to(value.dtype) if name in total else value for name, value in like.items()}


def _best_order(similarity: Tensor) -> Tensor | None:
    """Return the order of columns of the largest trace, int64 [n] on the CPU; None if the trace is as large already."""
    from scipy.optimize import linear_sum_assignment

    matrix = similarity.cpu().numpy()
    columns = linear_sum_assignment(matrix, maximize=True)[1]
    best, current = float(matrix[range(len(matrix)), columns].sum()), float(matrix.trace())
    return torch.from_numpy(columns) if best - current > _GAIN * max(abs(best), abs(current)) else None


def _agree_better(target: Weights, candidate: Weights, current: Weights, names: Collection[str]) -> bool:
    new, old = (sum(float((target[n] * weights[n]).sum()) for n in names) for weights in (candidate, current))
    return new - old > _GAIN * max(abs(new), abs(old))
