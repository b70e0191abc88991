"""Means weighted by what each minimum's loss says of its curvature: diagonal Fisher, and Gram matrices of layers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from raysubset.aggregation.records import Aggregate, Method, Minimum, Needs
from raysubset.aggregation.streaming import (
    aggregate_of,
    check_start,
    load_members,
    load_statistics,
    mean_of,
    wide,
)
from raysubset.config import AggregationConfig
from raysubset.training import Weights

FISHER_FLOOR = 1e-6  # Matena and Raffel's number; here of a member's mean, our choice
RIDGE = 1e-6  # of a Gram matrix's trace, added where it is singular: above float32's rounding; our choice


def curvature_methods(config: AggregationConfig) -> dict[str, Method]:
    """The means that are weighted by curvature, as the config has them."""
    independent = {"allow_independent": config.allow_independent}
    return {
        "fisher": Method(
            lambda minima, _: fisher_merge(minima, floor=FISHER_FLOOR, **independent), Needs(statistics=("fisher",))
        ),
        "regmean": Method(
            lambda minima, _: regmean(minima, factor=config.regmean_factor, **independent),
            Needs(statistics=("gram",)),
        ),
    }


def fisher_merge(
    minima: Sequence[Minimum], *, floor: float, normalised: bool = True, allow_independent: bool = False
) -> Aggregate:
    """Σ F_i θ_i / Σ F_i elementwise, F_i a member's diagonal Fisher (Matena & Raffel 2022, arXiv:2111.09832).

    Of quadratic losses with diagonal curvatures F_i it is the minimum of their sum, where `normalised` is False. Our
    choices: members count by their subsets' sizes, as in a sum over all examples; normalising divides a member's
    Fisher by its mean over all parameters, so that one that has fitted its subset is not outvoted. What has no Fisher
    is averaged by RunningMean's rule. Members are streamed: two copies of the weights, and one member with its Fisher,
    are held.

    Args:
        floor: the least F_i, positive. It decides where no member's loss depends on a parameter.

    Raises:
        ValueError: if a member has no fisher statistics, the floor is not positive, and as uniform_soup().
    """
    if not floor > 0:
        raise ValueError(f"floor = {floor} must be positive: parameters without curvature would have no weight")
    check_start("fisher", minima, allow_independent=allow_independent)
    rest, sums, totals = mean_of(minima), Weights(), Weights()
    dtypes: dict[str, torch.dtype] = {}
    for minimum, weights in load_members(minima):
        fisher = load_statistics(minimum, "fisher")
        mean = sum(value.sum().item() for value in fisher.values()) / sum(value.numel() for value in fisher.values())
        _refuse_other_keys(minimum, "fisher", fisher, totals or fisher)
        dtypes = dtypes or {key: value.dtype for key, value in weights.items()}
        rest.add({key: value for key, value in weights.items() if key not in fisher}, minimum.num_examples)
        scale = (mean if normalised else 0.0) or 1.0
        for key, diagonal in fisher.items():
            if key not in sums:
                sums[key], totals[key] = (torch.zeros(diagonal.shape, dtype=wide(dtypes[key])) for _ in range(2))
            weight = diagonal.to(sums[key].dtype).clamp_min(floor * scale)
            totals[key].add_(weight, alpha=minimum.num_examples / scale)
            sums[key].addcmul_(weight, weights[key].to(weight.dtype), value=minimum.num_examples / scale)
    merged = rest.weights() | {key: sums[key].div_(totals[key]).to(dtypes[key]) for key in sums}
    merged = {key: merged[key] for key in dtypes}
    return aggregate_of("fisher", minima, merged, [m.num_examples for m in minima], rest)


def regmean(minima: Sequence[Minimum], *, factor: float, allow_independent: bool = False) -> Aggregate:
    """W = (Σ G_i)⁻¹ Σ G_i W_i for every linear and convolution layer (RegMean, Jin et al. 2023, arXiv:2212.09849).

    G_i is XᵀX of the layer's inputs on the member's subset, its off-diagonals times `factor`: the weights whose
    outputs are, by least squares, nearest to each member's on that member's own inputs. Biases are solved for along
    with the weights (the paper averages them), convolutions by the patches their filters see. All else is averaged,
    members by their subsets' sizes, by RunningMean's rule.

    Solved in float64 for the difference from the plain mean. Where the sum of the G_i is singular, as with inputs that
    no member ever saw, RIDGE times its trace is added: those weights stay the mean's. Members are streamed: two copies
    of the weights, one sum of matrices, and one member with its matrices, are held.

    Raises:
        ValueError: if a member has no gram statistics, and as uniform_soup().
    """
    check_start("regmean", minima, allow_independent=allow_independent)
    mean, grams, products = mean_of(minima), Weights(), Weights()
    for minimum, weights in load_members(minima):
        mean.add(weights, minimum.num_examples)
        own = load_statistics(minimum, "gram")
        _refuse_other_keys(minimum, "gram", own, grams or own)
        for layer, matrices in own.items():
            gram = matrices.to(torch.float64, copy=True).mul_(minimum.num_examples)
            diagonal = gram.diagonal(dim1=1, dim2=2)
            squares = diagonal.clone()
            gram.mul_(factor)
            diagonal.copy_(squares)
            product = gram @ _matrix(weights, layer, matrices)
            grams[layer] = grams[layer].add_(gram) if layer in grams else gram
            products[layer] = products[layer].add_(product) if layer in products else product
    merged = mean.weights()
    for layer, gram in grams.items():
        if not mean.has_changed(f"{layer}.weight"):
            continue  # a frozen layer: rounding would move it
        middle = _matrix(merged, layer, gram)
        solved = middle + _solve(gram, products[layer] - gram @ middle)
        merged |= {key: value.to(merged[key].dtype) for key, value in _parts(solved, merged, layer).items()}
    return aggregate_of("regmean", minima, merged, [m.num_examples for m in minima], mean)


def _refuse_other_keys(minimum: Minimum, kind: str, own: Weights, first: Weights) -> None:
    for key in sorted(own.keys() ^ first.keys()):
        raise ValueError(f"the {kind} statistics of subset {minimum.subset_id} differ from the first member's in {key}")


def _matrix(weights: Weights, layer: str, grams: Tensor) -> Tensor:
    """A layer's weights with its bias as the last row, float64 [groups, K, outputs of a group], for Grams of that K."""
    matrix = weights[f"{layer}.weight"].double().flatten(1)
    if matrix.shape[1] < grams.shape[1]:
        matrix = torch.cat([matrix, weights[f"{layer}.bias"].double().unsqueeze(1)], dim=1)
    return matrix.unflatten(0, (grams.shape[0], -1)).mT


def _parts(matrix: Tensor, like: Weights, layer: str) -> Weights:
    """The inverse of _matrix(), in the shapes of `like`."""
    weight = like[f"{layer}.weight"]
    rows, num_inputs = matrix.mT.flatten(0, 1), weight[0].numel()
    parts = {f"{layer}.weight": rows[:, :num_inputs].reshape(weight.shape)}
    return parts if rows.shape[1] == num_inputs else parts | {f"{layer}.bias": rows[:, num_inputs]}


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    """gram⁻¹ right of each group, by Cholesky; with the ridge where a pivot is less than it."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    ridge = RIDGE * diagonal.sum(1, keepdim=True)
    factor, failed = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal(dim1=1, dim2=2).square()
    singular = (failed > 0).unsqueeze(1) | (pivots < ridge).any(1, keepdim=True)
    added = torch.where(ridge > 0, ridge, 1.0) * singular  # a layer that only ever saw zeros keeps its mean
    return torch.cholesky_solve(right, torch.linalg.cholesky(gram + torch.diag_embed(added.expand_as(diagonal))))
