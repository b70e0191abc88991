"""Means weighted by the curvature of each minimum's loss: its diagonal Fisher, or the Gram matrices of its layers."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from raysubset.aggregation.records import Aggregate, Minimum
from raysubset.aggregation.streaming import aggregate_of, load_members, load_statistics, mean_of, wide
from raysubset.training import Weights

FISHER_FLOOR = 1e-6  # Matena and Raffel's number; relative to a member's mean Fisher, which is our choice
RIDGE = 1e-6  # times a Gram matrix's trace, added if it is singular: above float32's rounding; our choice


def fisher_merge(minima: Sequence[Minimum], *, floor: float = FISHER_FLOOR, normalised: bool = True) -> Aggregate:
    """Return Σ F_i θ_i / Σ F_i elementwise; F_i is a member's diagonal Fisher (Matena & Raffel 2022, arXiv:2111.09832).

    For quadratic losses with diagonal curvatures F_i this is the minimum of their sum, if `normalised` is False. Our
    choices: members are weighted by their subsets' sizes, as in a sum over all examples; normalising divides a member's
    Fisher by its mean over all parameters, so that a member that has fitted its subset is not outvoted. Tensors without
    a Fisher are averaged by RunningMean's rule. Members are streamed: memory holds two copies of the weights, and one
    member with its Fisher.

    Args:
        floor: the least F_i, positive. It decides for parameters on which no member's loss depends.

    Raises:
        ValueError: if a member has no fisher statistics, and as uniform_soup().
    """
    plain, sums, totals = mean_of(minima), Weights(), Weights()
    dtypes: dict[str, torch.dtype] = {}
    for minimum, weights in load_members(minima):
        fisher = load_statistics(minimum, "fisher")
        mean = sum(value.sum().item() for value in fisher.values()) / sum(value.numel() for value in fisher.values())
        _refuse_other_keys(minimum, "fisher", fisher, totals or fisher)
        dtypes = dtypes or {key: value.dtype for key, value in weights.items()}
        plain.add({key: value for key, value in weights.items() if key not in fisher}, minimum.num_examples)
        scale = (mean if normalised else 0.0) or 1.0
        for key, diagonal in fisher.items():
            if key not in sums:
                sums[key], totals[key] = (torch.zeros(diagonal.shape, dtype=wide(dtypes[key])) for _ in range(2))
            weight = diagonal.to(sums[key].dtype).clamp_min(floor * scale)
            totals[key].add_(weight, alpha=minimum.num_examples / scale)
            sums[key].addcmul_(weight, weights[key].to(weight.dtype), value=minimum.num_examples / scale)
    merged = plain.weights() | {key: sums[key].div_(totals[key]).to(dtypes[key]) for key in sums}
    return aggregate_of("fisher", minima, merged, [m.num_examples for m in minima], plain)


def regmean(minima: Sequence[Minimum], *, factor: float) -> Aggregate:
    """Return W = (Σ G_i)⁻¹ Σ G_i W_i for linear and convolution layers (RegMean, Jin et al. 2023, arXiv:2212.09849).

    G_i is XᵀX of the layer's inputs on the member's subset, with off-diagonals times `factor`. W are the weights whose
    outputs are, by least squares, nearest to each member's on that member's own inputs. Biases are solved for along
    with the weights (the paper averages them), convolutions by the patches that their filters see. All else is averaged
    by RunningMean's rule, with members weighted by their subsets' sizes.

    The solution is for the difference from the plain mean, in float64. If the sum of the G_i is singular, as with
    inputs that no member ever saw, RIDGE times its trace is added, so that those weights stay the mean's. Members are
    streamed: memory holds two copies of the weights, one sum of matrices, and one member with its matrices.

    Raises:
        ValueError: if a member has no gram statistics, and as uniform_soup().
    """
    mean, grams, products = mean_of(minima), Weights(), Weights()
    for minimum, weights in load_members(minima):
        mean.add(weights, minimum.num_examples)
        member_grams = load_statistics(minimum, "gram")
        _refuse_other_keys(minimum, "gram", member_grams, grams or member_grams)
        for layer, matrices in member_grams.items():
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
        mean_matrix = _matrix(merged, layer, gram)
        right, num = products[layer] - gram @ mean_matrix, gram.shape[1]
        if num > merged[f"{layer}.weight"][0].numel() and not mean.has_changed(f"{layer}.bias"):
            num -= 1  # a frozen bias stays, and weights are solved for given it
        solution = mean_matrix + F.pad(_solve(gram[:, :num, :num], right[:, :num]), (0, 0, 0, gram.shape[1] - num))
        merged |= {key: value.to(merged[key].dtype) for key, value in _parts(solution, merged, layer).items()}
    return aggregate_of("regmean", minima, merged, [m.num_examples for m in minima], mean)


def _refuse_other_keys(minimum: Minimum, kind: str, statistics: Weights, first: Weights) -> None:
    for key in sorted(statistics.keys() ^ first.keys()):
        raise ValueError(f"the {kind} statistics of subset {minimum.subset_id} differ from the first member's in {key}")


def _matrix(weights: Weights, layer: str, grams: Tensor) -> Tensor:
    """Return a layer's weights, with the bias as last row if K includes it: float64 [groups, K, outputs of a group]."""
    matrix = weights[f"{layer}.weight"].double().flatten(1)
    if matrix.shape[1] < grams.shape[1]:
        matrix = torch.cat([matrix, weights[f"{layer}.bias"].double().unsqueeze(1)], dim=1)
    return matrix.unflatten(0, (grams.shape[0], -1)).mT


def _parts(matrix: Tensor, like: Weights, layer: str) -> Weights:
    """Return a layer's weight and bias from _matrix(), in the shapes of `like`."""
    weight = like[f"{layer}.weight"]
    rows, num_inputs = matrix.mT.flatten(0, 1), weight[0].numel()
    parts = {f"{layer}.weight": rows[:, :num_inputs].reshape(weight.shape)}
    return parts if rows.shape[1] == num_inputs else parts | {f"{layer}.bias": rows[:, num_inputs]}


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    """Return gram⁻¹ right of each group, by Cholesky, with the ridge added if a pivot is less than it."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    ridge = RIDGE * diagonal.sum(1, keepdim=True)
    factor, info = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal(dim1=1, dim2=2).square()
    is_singular = (info > 0).unsqueeze(1) | (pivots < ridge).any(1, keepdim=True)
    added = torch.where(ridge > 0, ridge, 1.0) * is_singular  # a layer that only ever saw zeros keeps its mean
    return torch.cholesky_solve(right, torch.linalg.cholesky(gram + torch.diag_embed(added.expand_as(diagonal))))
