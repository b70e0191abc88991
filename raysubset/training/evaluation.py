"""Losses, metrics and batch-norm statistics of a model on examples: forward work only."""

import math
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.utils._pytree import tree_leaves

from raysubset.config import MinimizeConfig
from raysubset.data import Batches, Examples, even_sizes
from raysubset.models import dtype_of, learning_batch_norms, modes_restored, modules_in_training
from raysubset.pulse import measuring
from raysubset.tasks import Spec, Task, added, sums_of
from raysubset.training.records import Metrics

MOST_SAMPLED_BYTES = 2**20  # of outputs that members save: those of texts and masks would outweigh their weights
EVALUATION_BATCH = 500  # examples of a forward pass; more does not help a CPU and less does not fill a GPU
MOST_EVALUATED = 2**25  # numbers that go into a module or come out: fewer examples, so that a step's memory suffices
STATISTICS_SEED = 0  # of the order and augmentation of the batches that batch-norm statistics are of
SPECTRAL_ITERATIONS = 30  # of the power method; the norm's error falls with the square of the vectors'

_widest: MutableMapping[nn.Module, int] = WeakKeyDictionary()  # numbers of an example that a network's modules return


def widened(outputs: Tensor) -> Tensor:
    """Return a network's outputs in float32, those of mixed precision too; float64 stays."""
    return outputs if outputs.dtype == torch.float64 else outputs.float()


def layout_of(model: nn.Module, recipe: MinimizeConfig) -> dict[str, Any]:
    """Return the arguments of Examples.batch() that say in which memory layout and type a network takes its inputs."""
    return {"channels_last": recipe.channels_last, "dtype": dtype_of(model)}


def evaluation_batch(spec: Spec, widest: int = 0) -> int:
    """Return the number of examples of a forward pass: EVALUATION_BATCH, or fewer large ones: 222 of 3×224×224.

    Args:
        widest: the most numbers of an example that a module returns.
    """
    most = MOST_EVALUATED // max(math.prod(spec.inputs), spec.num_outputs, widest)
    return max(1, min(EVALUATION_BATCH, most))


def batch_of(model: nn.Module, examples: Batches, recipe: MinimizeConfig) -> int:
    """Return evaluation_batch() for a network: two examples pass it first, once in a process, to see its modules.

    They are not counted, as trial steps are not. Tasks that compare examples go by the spec alone: what they measure
    depends on the batches, which members, ensembles and aggregates have alike.
    """
    if examples.task.compares_examples:
        return evaluation_batch(examples.task.spec())
    if model not in _widest:
        num, sizes = min(2, len(examples)), [0]

        def look(module: nn.Module, inputs: Any, outputs: Any) -> None:
            sizes.extend(part.numel() // num for part in tree_leaves(outputs) if isinstance(part, Tensor))

        inputs, _ = next(iter(examples.in_order([num, len(examples) - num], **layout_of(model, recipe))))
        handle = register_module_forward_hook(look)
        try:
            with evaluation_mode(model), torch.no_grad():
                model(inputs)
        finally:
            handle.remove()
        _widest[model] = max(sizes)
    return evaluation_batch(examples.task.spec(), _widest[model])


@torch.no_grad()  # in inference mode a network could not compute derivatives of its own
def evaluate(model: nn.Module, examples: Batches, recipe: MinimizeConfig) -> Metrics:
    """Return loss and qualities in evaluation mode, at the model's own precision; its mode is left as it was."""
    return _measured(model, examples, recipe, torch.empty(0))[0]


def _measured(
    model: nn.Module, examples: Batches, recipe: MinimizeConfig, positions: Tensor
) -> tuple[Metrics, list[Tensor]]:
    """Return the metrics on all examples, and batch by batch the outputs of those at ascending positions."""
    task, first, sampled = examples.task, 0, list[Tensor]()
    loss, sums = torch.zeros((), dtype=torch.float64), dict[str, Any]()
    for outputs, targets in _outputs(model, examples, recipe):
        loss += task.reported_loss(outputs, targets).cpu()
        sums = added(sums, sums_of(task, outputs, targets))
        if len(positions):
            in_batch = positions[(positions >= first) & (positions < first + len(outputs))]
            sampled.append(outputs[in_batch - first].cpu())
        first += len(outputs)
    return Metrics.of_sums(task, float(loss), sums, len(examples)), sampled


@torch.no_grad()
def predict(model: nn.Module, examples: Batches, recipe: MinimizeConfig) -> Tensor:
    """Return the network's outputs on the CPU, in evaluation mode: [N, …], logits for cross-entropy."""
    return torch.cat([outputs.cpu() for outputs, _ in _outputs(model, examples, recipe)])


def ensemble_positions(examples: Examples) -> Tensor:
    """Return the positions, ascending int64 [n], of the examples whose outputs members save for their ensemble: all, or
    evenly spaced ones up to MOST_SAMPLED_BYTES of outputs."""
    num, most = len(examples), max(1, MOST_SAMPLED_BYTES // (4 * examples.task.spec().num_outputs))
    if num <= most:
        return torch.arange(num, device=examples.device)
    return torch.linspace(0, num - 1, most, dtype=torch.float64).long().to(examples.device)


@torch.no_grad()
def evaluate_for_ensemble(model: nn.Module, examples: Examples, recipe: MinimizeConfig) -> tuple[Metrics, Tensor]:
    """Return metrics on all examples, and outputs [n, …] on the CPU of those at ensemble_positions(), in one pass."""
    task, positions = examples.task, ensemble_positions(examples)
    if len(positions) == len(examples):
        outputs = predict(model, examples, recipe)
        return metrics_of_outputs(outputs, examples.targets().cpu(), task), outputs
    metrics, sampled = _measured(model, examples, recipe, positions)
    return metrics, torch.cat(sampled)


def metrics_of_outputs(outputs: Tensor, targets: Tensor, task: Task) -> Metrics:
    """Return loss and qualities of outputs: those of predict(), or an ensemble's."""
    size = evaluation_batch(task.spec()) if task.compares_examples else len(targets)
    sizes = _sizes(len(targets), task, size)
    loss, sums = 0.0, dict[str, Any]()
    for batch in zip(outputs.split(sizes), targets.split(sizes), strict=True):
        loss += float(task.reported_loss(batch[0].double(), batch[1]))
        sums = added(sums, sums_of(task, *batch))
    return Metrics.of_sums(task, loss, sums, len(targets))


def _outputs(model: nn.Module, examples: Batches, recipe: MinimizeConfig) -> Iterator[tuple[Tensor, Tensor]]:
    with evaluation_mode(model):
        sizes, num_done = _sizes(len(examples), examples.task, batch_of(model, examples, recipe)), 0
        measuring(num_done, len(examples))
        for inputs, targets in examples.in_order(sizes, **layout_of(model, recipe)):
            yield widened(model(inputs)).detach(), targets
            num_done += len(targets)
            measuring(num_done, len(examples))


def _sizes(num: int, task: Task, size: int) -> list[int]:
    """Return the sizes of the batches in which `num` examples are measured: equal if the task compares them."""
    if task.compares_examples:
        return even_sizes(num, math.ceil(num / size))
    full, remainder = divmod(num, size)
    return [size] * full + [remainder] * bool(remainder)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode, and afterwards back in its own mode."""
    with modes_restored(model):
        model.eval()
        yield


def recompute_batch_norm(
    model: nn.Module,
    examples: Batches,
    recipe: MinimizeConfig,
    *,
    num_sampled: int | None = None,
    seed: int = STATISTICS_SEED,
) -> int:
    """Set running statistics to the mean over batches of these examples, as a mean of weights needs (SWA, §3.2).

    Weights that were trained on augmented batches need the statistics of augmented batches: those of CIFAR-10's images
    as they are cost a small CNN four points of accuracy. Batch norms that training leaves alone keep theirs. Spectral
    norms get the singular vectors of their weights.

    Args:
        model: changed in place; its mode is left as it was.
        examples: passed in batches of nearly equal size, about evaluation_batch(), augmented if their epochs are.
        num_sampled: pass so many of them, drawn at random, instead of all.
        seed: of the sample and the augmentation.

    Returns:
        The number of examples passed forward: 0 if the model keeps no running statistics.
    """
    _iterate_spectral_norms(model)
    layers = learning_batch_norms(model)
    if not layers:
        return 0
    num = num_sampled or len(examples)
    sizes = even_sizes(num, math.ceil(num / batch_of(model, examples, recipe)))
    layout = layout_of(model, recipe)
    if num_sampled or examples.is_augmented:
        batches = examples.epoch(batch_sizes=sizes, order_seed=seed, augmentation_seed=seed, **layout)
    else:
        batches = examples.in_order(sizes, **layout)
    momenta = [layer.momentum for layer in layers]
    counters = [layer.num_batches_tracked for layer in layers if layer.num_batches_tracked is not None]
    counts = [counter.clone() for counter in counters]
    with evaluation_mode(model), torch.no_grad():  # torch's update_bn turns dropout on: its statistics are random
        for layer in layers:
            _start_cumulative_mean(layer)
            layer.train()
        for inputs, _ in batches:
            model(inputs)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    for counter, count in zip(counters, counts, strict=True):
        counter.copy_(count)
    return num


def _start_cumulative_mean(layer: _BatchNorm) -> None:
    """Let the first batch replace a layer's statistics. If forward() puts the layer in evaluation mode, they stay."""
    statistics = [value for value in (layer.running_mean, layer.running_var) if value is not None]
    if not all(bool(value.isfinite().all()) for value in statistics):
        layer.reset_running_stats()  # 0 · NaN would stay in the mean
    layer.momentum = None  # cumulative mean: the first batch has weight 1, the old statistics 0
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.zero_()


@torch.no_grad()
def _iterate_spectral_norms(model: nn.Module) -> None:
    """Set the singular vectors that spectral norms keep to those of their weights, in both of torch's forms.

    Spectral norms that train() leaves in evaluation mode keep theirs.
    """
    for _, module in modules_in_training(model):
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                for _ in range(SPECTRAL_ITERATIONS):
                    hook.compute_weight(module, do_power_iteration=True)
        if not parametrize.is_parametrized(module):
            continue
        parametrizations = cast(nn.ModuleDict, module.parametrizations)
        for name, steps in parametrizations.items():
            norms = [step for step in cast(parametrize.ParametrizationList, steps) if isinstance(step, _SpectralNorm)]
            with modes_restored(module):
                for norm in norms:
                    norm.train()
                for _ in range(SPECTRAL_ITERATIONS * bool(norms)):
                    getattr(module, name)  # computes the weight, and one iteration with it
