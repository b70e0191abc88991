"""What follows from config and data before anything is run: subsets, Q, advice, planned passes."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
from torch import nn

from raysubset.aggregation import Forward, method_of, methods_tried, refuse_contradictions, statistics_of
from raysubset.config import Config, MinimizeConfig
from raysubset.data import FullSet
from raysubset.errors import first_line
from raysubset.events import Note, Step
from raysubset.fingerprints import digest
from raysubset.legs import Drawing, Leg, critical_path
from raysubset.models import architecture, has_batch_norm, num_parameters
from raysubset.run_directory import RunDirectory
from raysubset.soundness import findings, most_workers, refuse_unfit_methods
from raysubset.subsets import Subset, advice, missing_class_warnings, overdetermination_ratio
from raysubset.tasks import EXACT_OUTPUTS, SAMPLED_TERMS
from raysubset.training import (
    Cost,
    diagonal_fisher,
    fisher_cost,
    forward_share,
    minimizing_bytes,
)
from raysubset.training.techniques.chosen import BATCH_NORM_EXAMPLES, PASSING_EXAMPLES
from raysubset.work import CALIBRATION_EXAMPLES, cut_subsets, seeded_model, start_note, subsample_size

_MUCH, _LITTLE = 0.25, 0.1  # of a round's training, that its measuring may cost without and after advice


@dataclass(frozen=True)
class Plan:
    """A run as far as it can be told beforehand."""

    subsets: tuple[Subset, ...]  # of the first round
    num_parameters: int
    num_bytes: int  # of one set of weights
    forward_share: float  # of a pass, in this network
    full_set_ratio: float  # Q of the full set
    subset_ratios: tuple[float, ...]  # Q of each subset
    advice: tuple[Note, ...]  # for the user
    statistics: tuple[str, ...]  # kinds that actors are to leave beside their minima
    passes: float  # of training, in total; evaluation comes on top. For a conventional run, its epochs. At most, where
    # a recipe ends early (minimize.tolerance, target_loss) or spares weights their gradients (minimize.skipping)
    critical_path_passes: float  # likewise, if every subset had a device of its own
    most_workers: int  # that can share the batches of fine-tuning

    def drawing(self, config: Config, place: RunDirectory | str | None, **more: Any) -> Drawing:
        """What draws the legs of a config that this is the plan of."""
        return Drawing(config, place, [len(subset.indices) for subset in self.subsets], self.statistics, **more)


def make_plan(config: Config, full_set: FullSet, *, shares: Sequence[float] | None = None) -> Plan:
    """Cut the first round's subsets, equal or in proportion to the shares, and say what to expect of them.

    Raises:
        ValueError: if the subsets cannot be cut, the model does not fit images, classes and aggregation, a step of
            training fails on a copy of it, or batches are too small for it or for the workers that share them.
    """
    num_train, num_outputs = len(full_set.train), full_set.spec.num_outputs
    model = seeded_model(config, full_set)
    num, share = num_parameters(model), forward_share(model, full_set.spec)
    subsets = cut_subsets(config, full_set, 0, shares=shares)
    sizes = [len(subset.indices) for subset in subsets]
    quorum = config.actors.quorum
    if quorum is not None and quorum > len(sizes):
        raise ValueError(f"actors.quorum = {quorum} exceeds the number of subsets, {len(sizes)}: give at most that")
    refuse_contradictions(config)
    without = refuse_unfit_methods(config, full_set, model)
    least = min(sizes)
    if method_of(config.aggregation).needs.parts:
        least = subsample_size(config, least)
    most = most_workers(config, full_set, model, least_subset=least)
    found = [*start_note(config, full_set), *without, *findings(config, full_set, model)]
    statistics, lines = _statistics(config, full_set, model)
    if config.method == "subset_pretraining":
        missing = list[Note]()
        if names := full_set.task.class_names:
            missing = missing_class_warnings(subsets, full_set.strata, len(names))
        measuring = _measuring_advice(config, full_set, sizes, model, share)
        lines = [*advice(num_train, sizes, num_outputs, num), *missing, *measuring, *lines]
    drawing = Drawing(config, None, sizes, statistics)
    legs = list(drawing.legs())

    def measure(leg: Leg) -> float:  # with what teachers add, who pass all batches of fine-tuning forward
        num_teachers = len(leg.members) if leg.stage == "fine_tuning" else 0
        return leg.passes(num_train) + leg.epochs * Cost(num_forward=num_teachers).passes(1, share)

    passes, critical_path_passes = math.fsum(map(measure, legs)), critical_path(legs, measure)
    if config.method == "conventional":
        evaluation = sum((_evaluation(leg, full_set, model) for leg in legs), Cost())
        own = _evaluation(drawing.conventional(passes, num_workers=1), full_set, model)
        equal = passes + (evaluation + Cost(num_forward=-own.num_forward)).passes(num_train, share)
        passes = critical_path_passes = config.conventional.epochs or max(equal, passes)
    return Plan(
        subsets=subsets,
        num_parameters=num,
        num_bytes=sum(tensor.nbytes for tensor in model.state_dict().values()),
        forward_share=share,
        full_set_ratio=overdetermination_ratio(num_train, num_outputs, num),
        subset_ratios=tuple(overdetermination_ratio(size, num_outputs, num) for size in sizes),
        advice=(*found, *lines),
        statistics=statistics,
        passes=passes,
        critical_path_passes=critical_path_passes,
        most_workers=most,
    )


def planned_steps(config: Config, plan: Plan, num_train: int, at_once: int, num_workers: int) -> Iterator[Step]:
    """What each stage of a run trains for, in order.

    Args:
        at_once: actors that the cluster has, or can have, room for.
        num_workers: of fine-tuning.
    """
    drawing = plan.drawing(config, None)
    if config.method == "conventional":
        legs = iter([drawing.conventional(plan.passes, num_workers=config.conventional.num_workers)])
    else:
        legs = (leg for leg in drawing.legs(num_workers=max(1, num_workers)) if leg.kind != "aggregate")
    for (stage, round), group in groupby(legs, lambda leg: (leg.told_stage, leg.round)):
        of_stage = list(group)
        passes, first = math.fsum(leg.passes(num_train) for leg in of_stage), of_stage[0]
        yield Step(stage, round, passes, len(of_stage), first.num_workers if first.subset is None else at_once)
    yield Step("test", 0, 0.0, 1, 1)


def _statistics(config: Config, full_set: FullSet, model: nn.Module) -> tuple[tuple[str, ...], list[Note]]:
    """What actors are to leave for the aggregation, and what the user should know of it.

    Raises:
        ValueError: if the Fisher that was asked for cannot be taken of this network; auto goes without.
    """
    aggregation = config.aggregation
    kinds = statistics_of(config)
    if "fisher" not in kinds:
        return kinds, []
    try:
        diagonal_fisher(model, full_set.examples("validation", np.arange(1)), config.minimize, labels="true")
    except (ValueError, RuntimeError) as error:  # what vmap cannot follow is a RuntimeError
        cause = first_line(error) if isinstance(error, ValueError) else f"vmap cannot follow it ({first_line(error)})"
        if aggregation.method != "auto":
            name = architecture(config.model, full_set.spec).name
            text = f"aggregation.method={aggregation.method} cannot be used with {name}: {cause}"
            raise ValueError(f"{text}; use a soup or ties") from error
        return tuple(kind for kind in kinds if kind != "fisher"), [Note(f"auto goes without fisher: {cause}")]
    num, labels = full_set.spec.num_outputs, aggregation.fisher_labels
    if num <= EXACT_OUTPUTS or full_set.task.num_fisher_terms(labels=labels) != SAMPLED_TERMS:
        return kinds, []
    return kinds, [Note(f"the Fisher's sum over {num} outputs is estimated from {SAMPLED_TERMS} draws an example")]


def _evaluation(leg: Leg, full_set: FullSet, model: nn.Module) -> Cost:
    """What a leg works beside its training, if no work is lost.

    A greedy soup is counted as if every member were tried; Ray Train jobs as if of one worker; alignment as if each
    member passed the calibration examples twice.
    """
    config, num_validation = leg.config, len(full_set.validation)
    if leg.kind == "aggregate":
        num = sum(not member.is_subsample for member in leg.members)
        return Cost(num_forward=_aggregation_forward(config, full_set, num, model) if leg.measures else 0)
    size, recipe = leg.size or len(full_set.train), config.stage(leg.stage, epochs=leg.epochs)
    cost = Cost(num_forward=_averaging_forward(recipe, size, model))
    if leg.stage == "fine_tuning":
        cost += Cost(num_forward=(_num_turns(recipe) + 1) * num_validation + min(CALIBRATION_EXAMPLES, size))
    elif leg.measures:
        cost += Cost(num_forward=size + num_validation)
    taken = min(size, config.aggregation.statistics_examples or size)
    if "gram" in leg.statistics:
        cost += Cost(num_forward=taken)
    if "fisher" in leg.statistics:
        cost += fisher_cost(taken, num_parameters(model), full_set.task, labels=config.aggregation.fisher_labels)
    return cost


def _aggregation_forward(config: Config, full_set: FullSet, num: int, model: nn.Module) -> int:
    """Examples that the aggregation of so many minima passes forward if it is measured, counted as in _evaluation()."""
    num_validation, sample = len(full_set.validation), min(CALIBRATION_EXAMPLES, len(full_set.train))
    one = Forward(sample, sample * has_batch_norm(model), num_validation)
    tried, forward = methods_tried(config), sample + num_validation
    if num > 1:
        forward = sample + sum(method.needs.forward(num, one) for method in tried.values())
        forward += (one.refreshing + num_validation) * ("uniform_soup" not in tried)  # which is always reported
    if config.rounds.has_outer_step():
        forward += one.refreshing + num_validation
    return forward


def _measuring_advice(
    config: Config, full_set: FullSet, sizes: list[int], model: nn.Module, share: float
) -> list[Note]:
    """Whether measuring every round costs much beside its training, and how to do it less often."""
    rounds, num_train = config.rounds, len(full_set.train)
    if rounds.num == 1 or method_of(config.aggregation).needs.validation:
        return []
    forward = max(sizes) + len(full_set.validation) + _aggregation_forward(config, full_set, len(sizes), model)
    measured, trained = (
        Cost(num_forward=forward).passes(num_train, share),
        max(sizes) * config.minimize.epochs / num_train,
    )
    if measured / rounds.evaluate_every < _MUCH * trained:
        return []
    every = min(rounds.num, math.ceil(measured / (_LITTLE * trained)))
    if every <= rounds.evaluate_every:
        return []
    text = f"to measure a round takes {measured:.2g} passes on the critical path, to train it {trained:.2g}"
    return [Note(f"{text}: --rounds.evaluate-every {every} does it less often")]


def _num_turns(recipe: MinimizeConfig) -> int:
    """How often an epoch, or epoch_fraction of one, ends, the last part of one included."""
    return math.ceil(recipe.epochs / recipe.epoch_fraction)


def _averaging_forward(recipe: MinimizeConfig, num_examples: int, model: nn.Module) -> int:
    """Examples passed forward for the running statistics of averages of weights, as Techniques.end_epoch() does."""
    if recipe.averaging.kind == "none" or not has_batch_norm(model):
        return 0
    num_restarts = (_num_turns(recipe) - 1) * recipe.averaging.restarts()
    return num_restarts * min(PASSING_EXAMPLES, num_examples) + min(BATCH_NORM_EXAMPLES, num_examples)


def actor_bytes(config: Config, full_set: FullSet, plan: Plan) -> int:
    """What the tensors of an actor that holds the most examples take on its card (see minimizing_bytes())."""
    model = seeded_model(config, full_set)
    alone = config.trunk.epochs and config.trunk.num_workers == 1
    if config.method == "conventional" or alone:
        held = full_set.examples_num_bytes("train")
    else:
        held = full_set.examples_num_bytes("train", max(len(subset.indices) for subset in plan.subsets))
    return held + minimizing_bytes(model, config.minimize, full_set.spec, num_examples=len(full_set.validation))


def manifest(subsets: tuple[Subset, ...], full_set: FullSet) -> pa.Table:
    """Which examples each subset has, a row an example: by position in the training split, and by row in the source.

    A digest of the data stands in its metadata.
    """
    train = full_set.train
    labels = train.arrays().get("label")
    parts = [
        pa.table(
            {
                "subset": pa.array([subset.id] * len(subset.indices), pa.int32()),
                "position": subset.indices,
                "row": train.table["row"].to_numpy()[subset.indices],
            }
            | ({} if labels is None else {"label": labels[subset.indices]})
        )
        for subset in subsets
    ]
    table = pa.concat_tables(parts).combine_chunks()
    return table.replace_schema_metadata({"data": digest(full_set.fingerprint)})
