"""The plan of a run, from config and data, before anything runs: subsets, Q, advice, planned passes."""

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
from raysubset.costs import averaging_forward, epochs_of_cost, num_turns
from raysubset.data import FullSet
from raysubset.errors import first_line
from raysubset.events import Note, Step
from raysubset.fingerprints import digest
from raysubset.legs import Drawing, Leg, critical_path
from raysubset.models import architecture, has_batch_norm, num_parameters
from raysubset.planning.soundness import findings, most_workers, refuse_unfit_methods
from raysubset.run_directory import RunDirectory
from raysubset.subsets import Subset, advice, missing_class_warnings, overdetermination_ratio
from raysubset.tasks import EXACT_OUTPUTS, SAMPLED_TERMS
from raysubset.training import Cost, diagonal_fisher, fisher_cost, forward_share, minimizing_bytes
from raysubset.work import CALIBRATION_EXAMPLES, cut_subsets, seeded_model, start_note, subsample_size

_MUCH, _LITTLE = 0.25, 0.1  # share of a round's training that measuring it may cost, before and after the advice
_FEW_STEPS = 100  # that minimize a subset, over all rounds: fewer are a mistake rather than full-batch training


@dataclass(frozen=True)
class Plan:
    """What can be known of a run before it begins."""

    subsets: tuple[Subset, ...]  # of the first round
    num_parameters: int
    num_bytes: int  # of one set of weights
    forward_share: float  # of a pass, in this network
    has_batch_norm: bool
    full_set_ratio: float  # Q of the full set
    subset_ratios: tuple[float, ...]  # Q of each subset
    advice: tuple[Note, ...]  # for the user
    statistics: tuple[str, ...]  # kinds that actors leave with their minima
    passes: float  # of training, in total; evaluation comes on top. For a conventional run, its epochs. At most these,
    # if a recipe ends early (minimize.tolerance, target_loss) or skips weights' gradients (minimize.skipping)
    critical_path_passes: float  # likewise, as if every subset had its own device
    most_workers: int  # that can share the batches of fine-tuning

    def drawing(self, config: Config, place: RunDirectory | str | None, **more: Any) -> Drawing:
        """Return what draws the legs of a config that this plan is for."""
        return Drawing(config, place, [len(subset.indices) for subset in self.subsets], self.statistics, **more)

    @property
    def network(self) -> dict[str, float]:
        """What reports say of the network."""
        names = ("num_parameters", "num_bytes", "forward_share", "has_batch_norm")
        return {name: getattr(self, name) for name in names}

    @property
    def ratios(self) -> dict[str, Any]:
        """What reports say of Q."""
        return {"full_set": self.full_set_ratio, "subsets": list(self.subset_ratios)}


def make_plan(config: Config, full_set: FullSet, *, shares: Sequence[float] | None = None) -> Plan:
    """Cut the first round's subsets, of equal size or in proportion to the shares, and say what to expect of them.

    Raises:
        ValueError: if the subsets cannot be cut, the model does not fit the data, task or aggregation, a step of
            training fails on a copy of it, or batches are too small for it or for the workers that share them.
    """
    num_train, num_outputs = len(full_set.train), full_set.spec.num_outputs
    model = seeded_model(config, full_set)
    num, share = num_parameters(model), forward_share(model, full_set.spec)
    subsets = cut_subsets(config, full_set, 0, shares=shares)
    sizes = [len(subset.indices) for subset in subsets]
    if (quorum := config.actors.quorum or 0) > len(sizes):
        raise ValueError(f"actors.quorum = {quorum} exceeds the number of subsets, {len(sizes)}: give at most that")
    refuse_contradictions(config)
    method_notes = refuse_unfit_methods(config, full_set, model)
    least = min(sizes)
    if method_of(config.aggregation).needs.parts:
        least = subsample_size(config, least)
    most = most_workers(config, full_set, model, least_subset=least)
    notes = [*start_note(config, full_set), *method_notes, *findings(config, full_set, model)]
    statistics, lines = _statistics(config, full_set, model)
    if config.method == "subset_pretraining":
        missing = missing_class_warnings(subsets, full_set.strata) if full_set.task.class_names else []
        measuring = _measuring_advice(config, full_set, sizes, model, share)
        steps = _few_steps_warning(config, min(sizes))
        lines = [*advice(num_train, sizes, num_outputs, num), *missing, *steps, *measuring, *lines]
    drawing = Drawing(config, None, sizes, statistics)
    legs = list(drawing.legs())

    def measure(leg: Leg) -> float:
        return leg.planned_passes(num_train, share)

    passes, critical_path_passes = math.fsum(map(measure, legs)), critical_path(legs, measure)
    if config.method == "conventional":
        evaluation = sum((_evaluation(leg, full_set, model) for leg in legs), Cost())
        total = passes + evaluation.passes(num_train, share)

        def evaluated(epochs: float) -> float:
            leg = drawing.conventional(epochs, num_workers=1)
            return _evaluation(leg, full_set, model).passes(num_train, share)

        passes = config.conventional.epochs or epochs_of_cost(total, evaluated, least=passes)
        critical_path_passes = passes
    return Plan(
        subsets=subsets,
        num_parameters=num,
        num_bytes=sum(tensor.nbytes for tensor in model.state_dict().values()),
        forward_share=share,
        has_batch_norm=has_batch_norm(model),
        full_set_ratio=overdetermination_ratio(num_train, num_outputs, num),
        subset_ratios=tuple(overdetermination_ratio(size, num_outputs, num) for size in sizes),
        advice=(*notes, *lines),
        statistics=statistics,
        passes=passes,
        critical_path_passes=critical_path_passes,
        most_workers=most,
    )


def planned_steps(config: Config, plan: Plan, num_train: int, at_once: int) -> Iterator[Step]:
    """Yield what each stage of a run trains for, in order.

    Args:
        at_once: actors that the cluster has room for, or can have.
    """
    drawing = plan.drawing(config, None)
    if config.method == "conventional":
        legs = iter([drawing.conventional(plan.passes, num_workers=config.conventional.num_workers)])
    else:
        legs = (leg for leg in drawing.legs(num_workers=config.fine_tuning.workers(auto=1)) if leg.kind != "aggregate")
    for (stage, round), group in groupby(legs, lambda leg: (leg.told_stage, leg.round)):
        stage_legs = list(group)
        passes = math.fsum(leg.planned_passes(num_train, plan.forward_share) for leg in stage_legs)
        first = stage_legs[0]
        num_at_once = first.num_workers if first.subset is None else at_once
        yield Step(stage, round, passes, len(stage_legs), num_at_once, first.epochs)
    yield Step("test", 0, 0.0, 1, 1, 0.0)


def _statistics(config: Config, full_set: FullSet, model: nn.Module) -> tuple[tuple[str, ...], list[Note]]:
    """Return the kinds of statistics that actors leave for the aggregation, and what the user should know about them.

    Raises:
        ValueError: if the Fisher of this network cannot be computed and the method needs it. auto goes without it.
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
    """Return a leg's work besides its training, if no work is lost.

    A greedy soup is counted as if every member were tried, a Ray Train job as if it had one worker, and alignment as if
    each member passed the calibration examples twice.
    """
    config, num_validation = leg.config, len(full_set.validation)
    if leg.kind == "aggregate":
        num = sum(not member.is_subsample for member in leg.members)
        return Cost(num_forward=_aggregation_forward(config, full_set, num, model) if leg.measures else 0)
    size, recipe = leg.size or len(full_set.train), config.stage(leg.stage, epochs=leg.epochs)
    cost = Cost(num_forward=averaging_forward(recipe, size, has_batch_norm=has_batch_norm(model)))
    if leg.stage == "fine_tuning":
        cost += Cost(num_forward=(num_turns(recipe) + 1) * num_validation + min(CALIBRATION_EXAMPLES, size))
    else:
        cost += Cost(num_forward=_num_looks(recipe) * num_validation + bool(leg.measures) * (size + num_validation))
    taken = min(size, config.aggregation.statistics_examples or size)
    if "gram" in leg.statistics:
        cost += Cost(num_forward=taken)
    if "fisher" in leg.statistics:
        cost += fisher_cost(taken, num_parameters(model), full_set.task, labels=config.aggregation.fisher_labels)
    return cost


def _aggregation_forward(config: Config, full_set: FullSet, num: int, model: nn.Module) -> int:
    """Return the examples that aggregating `num` minima passes forward if it is measured, as _evaluation() counts."""
    num_validation, sample = len(full_set.validation), min(CALIBRATION_EXAMPLES, len(full_set.train))
    forward_sizes = Forward(sample, sample * has_batch_norm(model), num_validation)
    methods, forward = methods_tried(config), sample + num_validation
    if num > 1:
        forward = sample + sum(method.needs.forward(num, forward_sizes) for method in methods.values())
        forward += (forward_sizes.refreshing + num_validation) * ("uniform_soup" not in methods)  # is always reported
    if config.rounds.has_outer_step():
        forward += forward_sizes.refreshing + num_validation
    return forward


def _few_steps_warning(config: Config, size: int) -> list[Note]:
    """Warn if a batch holds a whole subset, so that an epoch is one step, and there are few epochs."""
    recipe = config.stage("subsets")
    num_steps = math.ceil(recipe.epochs * config.rounds.num)
    if recipe.whole_loop is not None or recipe.batch_size < size or num_steps >= _FEW_STEPS:
        return []
    text = f"minimize.batch_size = {recipe.batch_size} holds all {size} examples of a subset, so that each epoch on it "
    text += f"is one step, {num_steps} in all: lower --minimize.batch-size, or raise --minimize.epochs"
    return [Note(text, is_warning=True)]


def _measuring_advice(
    config: Config, full_set: FullSet, sizes: list[int], model: nn.Module, share: float
) -> list[Note]:
    """Advise to measure less often if measuring every round costs much in comparison with its training."""
    rounds, num_train = config.rounds, len(full_set.train)
    if rounds.num == 1 or method_of(config.aggregation).needs.validation:
        return []
    forward = max(sizes) + len(full_set.validation) + _aggregation_forward(config, full_set, len(sizes), model)
    measuring = Cost(num_forward=forward).passes(num_train, share)
    training = max(sizes) * config.minimize.epochs / num_train
    interval = min(rounds.num, math.ceil(measuring / (_LITTLE * training)))
    if measuring / rounds.evaluate_every < _MUCH * training or interval <= rounds.evaluate_every:
        return []
    text = f"to measure a round takes {measuring:.2g} passes on the critical path, to train it {training:.2g}"
    return [Note(f"{text}: --rounds.evaluate-every {interval} does it less often")]


def _num_looks(recipe: MinimizeConfig) -> int:
    """Return how often a ValidationWatch measures validation data outside of Ray Train jobs."""
    every = recipe.validate_every or int(recipe.watched_patience() > 0)
    return math.ceil(num_turns(recipe) / every) if every else 0


def actor_bytes(config: Config, full_set: FullSet, plan: Plan) -> int:
    """Return the bytes of tensors on the card of the actor with the most examples (see minimizing_bytes())."""
    model = seeded_model(config, full_set)
    has_lone_trunk = config.trunk.epochs and config.trunk.num_workers == 1
    if config.method == "conventional" or has_lone_trunk:
        data_bytes = full_set.training_num_bytes()
    else:
        data_bytes = full_set.training_num_bytes(max(len(subset.indices) for subset in plan.subsets))
    return data_bytes + minimizing_bytes(model, config.minimize, full_set.spec, num_examples=len(full_set.validation))


def manifest(subsets: tuple[Subset, ...], full_set: FullSet) -> pa.Table:
    """Return a table of the subsets' examples: a row for each, with its positions in the training split and the source.

    Its metadata hold a digest of the data.
    """
    train = full_set.train
    labels = train.arrays().get("label")
    positions = np.concatenate([subset.indices for subset in subsets])
    ids = np.repeat([subset.id for subset in subsets], [len(subset.indices) for subset in subsets])
    rows = train.table["row"].to_numpy()[positions]
    columns = {"subset": pa.array(ids, pa.int32()), "position": positions, "row": rows}
    table = pa.table(columns | ({} if labels is None else {"label": labels[positions]}))
    return table.replace_schema_metadata({"data": digest(full_set.fingerprint)})
