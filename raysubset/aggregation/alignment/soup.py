"""aligned_soup() averages minima whose units have been permuted to correspond."""

import dataclasses
import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raysubset.aggregation.alignment import repairing
from raysubset.aggregation.alignment.matching import match_activations, match_weights, merge_many
from raysubset.aggregation.alignment.tracing import Permutations, UnitStructure, permuted, trace_units
from raysubset.aggregation.records import Aggregate, Minimum
from raysubset.aggregation.scorer import Scorer
from raysubset.aggregation.soups import uniform_soup
from raysubset.aggregation.streaming import aggregate_of, mean_of
from raysubset.config import MinimizeConfig
from raysubset.data import Examples, even_sizes
from raysubset.models import averaged_names, copied
from raysubset.training import Weights, recompute_batch_norm
from raysubset.training.evaluation import evaluation_mode, layout_of

_MOST_EXAMPLES = 1024  # of the calibration sample are used,
_MOST_PIXELS = 2**25  # but no more than have this many numbers: 222 of 3×224×224
_BATCH = 128  # examples whose activations are compared at once
_MOST_ROUNDS = {"weights": 20, "activations": 1}  # of MergeMany; with activations more rounds gained nothing on MNIST
_SEED = 0  # of the order of groups and members; any value will do


def aligned_soup(
    minima: Sequence[Minimum],
    model: nn.Module,
    examples: Examples,
    minimize: MinimizeConfig,
    *,
    matching: str,
    repair: bool,
) -> Aggregate:
    """Permute the minima's units so that they correspond, and average (Git Re-Basin, arXiv:2209.04836).

    The permutations are found on the traced network by weight or activation matching; for more than two members by
    MergeMany. REPAIR (arXiv:2211.08403) then restores the activations' statistics. Members are loaded one at a time,
    three times and once more for each round of MergeMany. Half-precision members accumulate in wider types. If the
    process dies, this work is lost and starts again.

    Args:
        minima: they need not share a start.
        model: on the device of `examples`; its weights are overwritten.
        examples: a calibration sample of training data, of which at most _MOST_EXAMPLES are used.
        minimize: the recipe, for its loss.
        matching: "weights" or "activations".
        repair: False only recomputes batch-norm statistics.

    Returns:
        The aggregate, with batch-norm statistics of the calibration examples, and a report in `alignment`. Losses in it
        are on these examples, after batch-norm statistics are recomputed.

    Raises:
        ValueError: if there are fewer than two minima, they differ in keys or shapes, one holds NaN, or trace_units()
            refuses the network.
    """
    start_s = time.perf_counter()
    if len(minima) < 2:
        raise ValueError(
            f"aligned_soup aligns at least two minima; there are {len(minima)}: use aggregation.method=select_best"
        )
    plain = uniform_soup(minima)
    structure = _without_frozen(trace_units(model, examples.task.spec()), averaged_names(model))
    sample = _sample(examples)
    scorer = _Aligner(model, structure, sample, minimize)

    member_losses = [scorer.score_as_is(minimum.load_weights()).loss for minimum in minima]
    mean_loss = sum(member_losses) / len(minima)
    barrier_before = scorer.score(plain.weights).loss - mean_loss

    match = scorer.match_weights if matching == "weights" else scorer.match_activations
    loaders = [minimum.load_weights for minimum in minima]
    orders, num_rounds = merge_many(loaders, structure, match, most_rounds=_MOST_ROUNDS[matching], seed=_SEED)
    mean, statistics = mean_of(minima), []
    for minimum, order in zip(minima, orders, strict=True):
        aligned = permuted(minimum.load_weights(), structure.groups, order)
        mean.add(aligned)
        if repair:
            statistics.append(scorer.statistics(aligned))
    weights = scorer.refreshed(mean.weights())
    if repair:
        weights = scorer.repaired(weights, statistics)
    barrier_after = scorer.score_as_is(weights).loss - mean_loss

    alignment = {
        "barrier_before": barrier_before,  # loss of the plain mean, minus the members' mean loss
        "barrier_after": barrier_after,  # the same for the aggregate
        "moved": _moved(structure, orders),  # share of units that left their place, mean over members, by group
        "num_groups": len(structure.groups),
        "num_fixed_groups": structure.num_fixed_groups,
        "num_rounds": num_rounds,  # of MergeMany
        "num_forward": scorer.cost().num_forward,  # examples
        "seconds": time.perf_counter() - start_s,
    }
    soup = aggregate_of("aligned_soup", minima, weights, [1.0] * len(minima), mean)
    return dataclasses.replace(soup, alignment=alignment)


class _Aligner(Scorer):
    """A Scorer on one sample that compares and restores the model's activations too."""

    def __init__(self, model: nn.Module, structure: UnitStructure, sample: Examples, minimize: MinimizeConfig) -> None:
        super().__init__(model, calibration=sample, validation=sample, minimize=minimize)
        self._structure = structure
        self._target_model: nn.Module | None = None  # a second model, for comparing activations

    def statistics(self, weights: Weights) -> repairing.Statistics:
        batches = self._batches(weights)
        with evaluation_mode(self._model):
            return repairing.layer_statistics(self._model, self._structure, batches)

    def repaired(self, weights: Weights, members: Sequence[repairing.Statistics]) -> Weights:
        batches = self._batches(weights)
        with evaluation_mode(self._model):
            repairing.repair(self._model, self._structure, repairing.mean_statistics(members), batches)
        return self._weights()

    def match_weights(self, target: Weights, weights: Weights) -> Permutations:
        names = [name for name, _ in self._model.named_parameters()]
        device = self._calibration.device
        return match_weights(target, weights, self._structure, parameter_names=names, seed=_SEED, device=device)

    def match_activations(self, target: Weights, weights: Weights) -> Permutations:
        """Match by activations. The target may be a mean, so its batch-norm statistics are recomputed first."""
        if self._target_model is None:
            self._target_model = copied(self._model)
        self._target_model.load_state_dict(target)
        self._num_forward += recompute_batch_norm(self._target_model, self._calibration, self._minimize)
        self._num_forward += len(self._calibration)
        batches = self._batches(weights)
        with evaluation_mode(self._target_model), evaluation_mode(self._model):
            target_network, network = map(self._structure.network, (self._target_model, self._model))
            return match_activations(target_network, network, self._structure.groups, batches)

    def _batches(self, weights: Weights) -> list[Tensor]:
        """Return the sample in batches, counted, for the model with these weights."""
        self._model.load_state_dict(weights)
        self._num_forward += len(self._calibration)
        sizes = even_sizes(len(self._calibration), math.ceil(len(self._calibration) / _BATCH))
        batches = self._calibration.in_order(sizes, **layout_of(self._model, self._minimize))
        return [images for images, _ in batches]


def _without_frozen(structure: UnitStructure, averaged: frozenset[str]) -> UnitStructure:
    """Keep the units in place that a frozen layer produces or reads: all members have them in the same order."""
    groups = tuple(
        group for group in structure.groups if all(name in averaged for axis, _ in group.axes for name in axis.names)
    )
    num_fixed = structure.num_fixed_groups + len(structure.groups) - len(groups)
    return dataclasses.replace(structure, groups=groups, num_fixed_groups=num_fixed)


def _sample(examples: Examples) -> Examples:
    num = max(1, min(_MOST_EXAMPLES, _MOST_PIXELS // math.prod(examples.task.spec().inputs)))
    return examples.select(torch.arange(min(num, len(examples)), device=examples.device))


def _moved(structure: UnitStructure, orders: Sequence[Permutations]) -> dict[str, float]:
    """Return the share of units that left their place, as a mean over members, by group."""
    shares = {}
    for k, group in enumerate(structure.groups):
        places = torch.arange(group.size)
        shares[group.name] = sum(float((order[k] != places).double().mean()) for order in orders) / len(orders)
    return shares
