"""Checks that network, recipes and batches fit together, before a run, by counting and by trying copies."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raysubset.aggregation import methods_tried
from raysubset.config import WHOLE_SUBSET, Config, MinimizeConfig, TrainingStage
from raysubset.data import Examples, FullSet
from raysubset.errors import counted, listed, one_line
from raysubset.events import Note
from raysubset.models import (
    architecture,
    copied,
    dtype_of,
    generators_restored,
    has_dropout,
    needs_default_layout,
    num_parameters,
)
from raysubset.tasks import CrossEntropy, SquaredError
from raysubset.training import Shard, least_batch, load_listener, try_own_objective, try_own_steps, try_training
from raysubset.training.evaluation import evaluation_mode, predict
from raysubset.training.techniques.skipping import Skipping
from raysubset.training.whole_subset.levenberg_marquardt import LevenbergMarquardt
from raysubset.training.whole_subset.objective import Objective
from raysubset.user_code.given import is_instance


def most_workers(config: Config, full_set: FullSet, model: nn.Module, *, least_subset: int) -> int:
    """Return how many workers can share the batches of fine-tuning.

    Args:
        least_subset: number of examples of the smallest subset, or part of a subset, that is minimized on.

    Raises:
        ValueError: if a stage's smallest batch is too small for the network or for the workers that are set, or its
            optimizer cannot minimize the network's loss.
    """
    recipe, task, needed = config.minimize, full_set.task, least_batch(model, full_set.spec)
    name, optimizer = architecture(config.model, full_set.spec).name, recipe.optimizer
    is_whole = recipe.whole_loop is not None
    if optimizer in WHOLE_SUBSET:
        noisy = f"{optimizer} needs a loss without noise, but"
        if has_dropout(model):
            raise ValueError(f"{noisy} {name} has dropout: use sgd, adam or adamw")
        if full_set.examples("train", np.arange(1), augment=True).is_augmented:
            way_out = "set --data.augmentation none, or use sgd, adam or adamw"
            raise ValueError(f"{noisy} the task augments training examples: {way_out}")
    most = 1
    for stage, num_workers in workers_of_stages(config, of_fine_tuning=config.fine_tuning.workers(auto=1)).items():
        num_examples = least_subset if stage == "subsets" else len(full_set.train)
        flag = f"--{stage.replace('_', '-')}.num-workers"
        if is_whole and num_workers > 1:
            raise ValueError(f"{recipe.whole_loop} works in one process: set {flag} 1, or use sgd")
        if task.compares_examples:
            parting = {f"minimize.optimizer={optimizer}": optimizer in WHOLE_SUBSET}
            parting |= {"minimize.accumulation": recipe.accumulation > 1, flag: num_workers > 1}
            if setting := next((setting for setting, is_set in parting.items() if is_set), None):
                raise ValueError(f"{task.name} compares the examples of a batch, which {setting} parts")
        smallest = num_examples if is_whole else num_examples // math.ceil(num_examples / recipe.batch_size)
        # Batch norm shares statistics between workers on CUDA only, and the device is not known here
        each = 1 if config.fine_tuning.sync_batch_norm and num_workers > 1 else needed
        if each > 1 and recipe.accumulation > 1:
            each *= recipe.accumulation
            if (most_parts := smallest // num_workers // needed) < recipe.accumulation:
                raise ValueError(
                    f"minimize.accumulation = {recipe.accumulation} would leave parts of one example in batches "
                    f"of {smallest} by {counted(num_workers, 'worker')} of {stage}, where {config.model.name}'s batch "
                    f"normalisation needs two: give {max(1, most_parts)} at most, or a larger --minimize.batch-size"
                )
        if smallest < each:
            raise ValueError(
                f"{name} cannot be trained on one example alone, as batch normalisation needs two, and "
                f"{stage} would: it has {counted(num_examples, 'example')} in batches of at most {recipe.batch_size}. "
                "Give a larger --minimize.batch-size or --subsets.size, or a network without batch normalisation"
            )
        fitting = 1 if is_whole or task.compares_examples else smallest // each
        if num_workers > fitting:
            needs = f", as batch normalisation needs {each} examples in each" if num_workers <= smallest else ""
            raise ValueError(
                f"batches of {smallest} examples cannot be shared by the {num_workers} workers of {stage}{needs}: "
                f"set {flag} to {fitting} at most, or --minimize.batch-size to {each * num_workers} at least"
            )
        most = fitting if stage == "fine_tuning" else most
    return most


def refuse_unfit_methods(config: Config, full_set: FullSet, model: nn.Module) -> list[Note]:
    """Refuse methods that need what the task or network lacks: curvature, a watched number, units that can be aligned.

    Refuse the user's own optimizer, objective, loop or augmentation if it does not work on the network. Return notes on
    what the user should know.

    Raises:
        ValueError: with the way out.
    """
    task, example = full_set.task, full_set.examples("validation", np.arange(1))
    outputs, targets = torch.zeros(1, *full_set.spec.outputs), example.targets()
    if config.subsets.scheme == "dirichlet" and not full_set.strata.any():
        raise ValueError(
            f"subsets.scheme=dirichlet skews classes, and {task.name} has no classes of examples: use stratified or iid"
        )
    if config.minimize.optimizer == "gauss_newton":
        task.curvature(outputs, outputs, targets)
        with evaluation_mode(model):
            objective = Objective(model, example, config.minimize)
            objective.gauss_newton_product(torch.zeros(num_parameters(model)))
    if config.minimize.optimizer == "levenberg_marquardt":
        with evaluation_mode(model):
            LevenbergMarquardt(Objective(model, example, config.minimize))
    method, name = config.aggregation.method, architecture(config.model, full_set.spec).name
    notes = list[Note]()
    if is_instance(config.model.name):
        refuse_fresh_weights(config)
        notes.append(Note(f"{config.model.name} brings its own weights, which the shared start has, whatever the seed"))
    if config.method == "subset_pretraining" and "aligned_soup" in methods_tried(config):
        from raysubset.aggregation.alignment import trace_units  # scipy is slow to import, and rarely needed

        try:
            trace_units(model, full_set.spec)
        except ValueError as error:
            if method != "auto":
                raise
            notes.append(Note(f"auto goes without aligned_soup: {error}"))
    if method == "regmean" and not any(isinstance(module, nn.Linear | nn.Conv2d) for module in model.modules()):
        raise ValueError(
            f"aggregation.method=regmean goes by the inputs of linear and convolution layers, and {name} has none: set "
            "--aggregation.method uniform_soup"
        )
    if config.minimize.skipping.kind != "none":
        Skipping(config.minimize.skipping, model, task, Shard(), num_steps_per_epoch=1)
        task.watched(outputs, targets)
    if full_set.augmentation:
        with generators_restored(), torch.random.fork_rng(devices=[]):
            full_set.augmentation.try_on(full_set.sample().rows)
    if config.actors.on_step:
        load_listener(config.actors.on_step)
    has_own_steps = config.minimize.loop is not None or config.minimize.has_own_optimizer
    if has_own_steps and (text := try_own_steps(model, config.minimize, full_set.sample())):
        notes.append(Note(text))
    if config.minimize.objective:
        try_own_objective(model, config.minimize, full_set.sample())
    return notes


def refuse_fresh_weights(config: Config) -> None:
    """Refuse stages that start from newly drawn weights if the network is an object that has weights of its own.

    Raises:
        ValueError: with the way out.
    """
    tuning = config.fine_tuning
    if not is_instance(config.model.name) or config.method != "subset_pretraining":
        return
    setting = "subsets.start=independent" if config.subsets.start == "independent" else ""
    if not setting and tuning.epochs and tuning.start in ("reinit", "shrink_perturb"):
        setting = f"fine_tuning.start={tuning.start}"
    if setting:
        raise ValueError(
            f"{setting} draws new weights, and {config.model.name} is a network that has its own: give a function "
            "or class that creates one, model=…, or leave the setting out"
        )


def workers_of_stages(config: Config, *, of_fine_tuning: int) -> dict[TrainingStage, int]:
    """Return the actors or Ray Train workers that each stage needs at once. Subsets need no more than one actor."""
    if config.method == "conventional":
        return {"conventional": config.conventional.num_workers}
    stages: dict[TrainingStage, int] = {"subsets": 1}
    if config.trunk.epochs:
        stages["trunk"] = config.trunk.num_workers
    if config.fine_tuning.epochs:
        stages["fine_tuning"] = of_fine_tuning
    return stages


def findings(config: Config, full_set: FullSet, model: nn.Module) -> list[Note]:
    """Take a few steps of every recipe with a user's network, and return what they show, for Plan.advice.

    Raises:
        ValueError: if the steps fail.
    """
    name, objective = config.model.name, getattr(full_set.task, "objective", None)
    if ":" not in name:
        return []
    notes, left_out, ends_in = list[Note](), {}, None
    sample = full_set.sample()
    for recipe in dict.fromkeys(
        config.stage(stage, epochs=1.0) for stage in workers_of_stages(config, of_fine_tuning=1)
    ):
        try:
            trial = try_training(model, recipe, sample)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        except Exception as error:  # the user's forward() may raise anything
            way_out = "; set --minimize.precision float32" if recipe.precision in ("bfloat16", "float16") else ""
            raise ValueError(f"{name} cannot take a step of training: {one_line(error)}{way_out}") from error
        left_out |= dict.fromkeys(trial.left_out)
        ends_in = trial.ends_in
    with generators_restored(), torch.random.fork_rng(devices=[]):
        first, again = (predict(model, sample.select(torch.arange(1)), config.minimize) for _ in range(2))
    if not torch.allclose(first, again, equal_nan=True):
        text = "gives other outputs for the same input in evaluation mode, so what is measured is random and differs "
        notes.append(Note(f"{name} {text}from run to run: let it draw only if self.training", is_warning=True))
    elif _is_passed_by(model, sample, config.minimize):
        text = "is measured without a part of it: in evaluation torch's fast path of attention passes by what replaces "
        remedy = "its layers, as adapters do; call torch.backends.mha.set_fastpath_enabled(False) where you build it"
        notes.append(Note(f"{name} {text}{remedy}", is_warning=True))
    if needs_default_layout(model) and config.minimize.channels_last:
        text = (
            f"{name} cannot be trained in the channels-last layout, as where view() follows a convolution: it gets its "
            "images in torch's default layout, which is slower; reshape() or flatten(1) work in both"
        )
        notes.append(Note(text))
    if left_out:
        names = listed(list(left_out), most=3)
        notes.append(Note(f"{name} leaves parameters out of some steps or all, which do not move them: {names}"))
    if ends_in in ("softmax", "sigmoid") and isinstance(objective, CrossEntropy):
        text = f"{name} ends in a {ends_in}, and cross-entropy takes a softmax of it once more, which hardly learns"
        notes.append(Note(f"{text}: have it return logits, or set --task.loss squared_error", is_warning=True))
    if ends_in == "log_softmax" and isinstance(objective, SquaredError):
        text = f"{name} ends in a log_softmax, which squared error compares with 0 and 1"
        notes.append(Note(f"{text}: have it return logits, or set --task.loss cross_entropy", is_warning=True))
    return notes


def _is_passed_by(model: nn.Module, sample: Examples, recipe: MinimizeConfig) -> bool:
    """Return True if torch's fast path of attention, taken in evaluation alone, computes another network.

    It reads the weights of a layer's parts and calls none of them. All weights are moved before, as adapters begin
    where they change nothing.
    """
    if not any(isinstance(module, nn.TransformerEncoderLayer) for module in model.modules()):
        return False
    network, num = copied(model).eval(), min(2, len(sample))
    layout: dict[str, Any] = {"channels_last": recipe.channels_last, "dtype": dtype_of(model)}
    ((inputs, _),) = sample.select(torch.arange(num)).in_order([num], **layout)
    was_enabled, outputs = torch.backends.mha.get_fastpath_enabled(), list[Tensor]()
    with generators_restored(), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        try:
            for is_enabled in (was_enabled, False):
                torch.backends.mha.set_fastpath_enabled(is_enabled)
                outputs.append(network(inputs))
        finally:
            torch.backends.mha.set_fastpath_enabled(was_enabled)
    tolerance = 1e-3 * float(outputs[0].abs().max())
    return not torch.allclose(*outputs, rtol=1e-3, atol=tolerance, equal_nan=True)
