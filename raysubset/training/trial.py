"""What a network and a recipe do in a few steps of training: tried on copies, before a run."""

import math
import time
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from raysubset.config import WHOLE_SUBSET, MinimizeConfig
from raysubset.data import Examples
from raysubset.models import copied, generators_restored
from raysubset.tasks import Spec
from raysubset.training.evaluation import predict
from raysubset.training.loop import minimize
from raysubset.training.records import DivergedError, Progress

_NUM_STEPS = 4  # so that layers left out at random are, in one of them
_MOST_EXAMPLES = 16  # of a step, and no more than so many numbers in their inputs
_MOST_NUMBERS = 200_000
_MOST_S = 1.0  # after which no further step is tried
_WIDE = 3.0  # standard deviation of weights for which only a bounded function is in [0, 1] everywhere


@dataclass(frozen=True)
class Trial:
    """What was found."""

    left_out: tuple[str, ...]  # trainable parameters that had no gradient in some step, by name
    ends_in: str | None  # softmax, log_softmax or sigmoid, if the outputs are a function's that is none of logits


def try_training(model: nn.Module, recipe: MinimizeConfig, sample: Examples) -> Trial:
    """Train a copy for a few steps at a rate that moves nothing, in an actor's mode, layout, precision and techniques.

    The model and all generators are left as they were; what the network or the recipe's check raises passes through.
    All is on the CPU; where the sample has too few examples they are taken again and again.
    """
    num_numbers = math.prod(sample.task.spec().inputs)
    size = max(2, min(_MOST_EXAMPLES, recipe.batch_size, _MOST_NUMBERS // num_numbers))
    examples = sample.select(torch.arange(_NUM_STEPS * size) % len(sample))
    recipe = replace(
        recipe,
        epochs=1.0,
        batch_size=size,
        accumulation=min(recipe.accumulation, size // 2),
        learning_rate=1e-9,
        schedule="constant",
        tolerance=None,
        patience=0,
        target_loss=None,
        compile=False,
        loop=None,  # which is tried by itself
    )
    network, outputs = copied(model), []
    left_out: set[str] = set()
    is_whole = recipe.optimizer in WHOLE_SUBSET

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not is_whole:  # within vmap there is nothing to keep
            outputs.append(output.detach().float())

    hook = network.register_forward_hook(keep)
    started = time.perf_counter()

    def on_step(_: Progress) -> bool:
        if not is_whole:
            left_out.update(name for name, p in network.named_parameters() if p.requires_grad and p.grad is None)
        return time.perf_counter() - started > _MOST_S

    with generators_restored():
        with suppress(DivergedError):  # on noise, which says nothing
            minimize(network, examples, recipe, seed=0, on_step=on_step)
        hook.remove()
        if is_whole:
            outputs.append(predict(network, examples, recipe))
        ends_in = _function_at_the_end(network, torch.cat(outputs), examples) if outputs else None
    return Trial(tuple(name for name, _ in model.named_parameters() if name in left_out), ends_in)


def least_batch(model: nn.Module, spec: Spec) -> int:
    """The fewest examples that a step takes: 2 where batch normalisation would see a single value a channel of one."""
    network, one = copied(model).train(), spec.zeros(1)
    if one.is_floating_point():
        one = one.to(next(network.parameters()).dtype)
    with generators_restored(), torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            outputs = network(one)
        except Exception:  # what it does with more was tried before
            return 2
    return 1 if tuple(outputs.shape[1:]) == spec.outputs else 2


def _function_at_the_end(network: nn.Module, outputs: Tensor, examples: Examples) -> str | None:
    """Which function gave outputs [n, M] that no logits are; None of outputs of other dimensions."""
    if outputs.ndim != 2:
        return None
    if are_probabilities(outputs, tolerance=1e-2):
        return "softmax"
    if bool((outputs <= 0).all()) and are_probabilities(outputs.exp(), tolerance=1e-2):
        return "log_softmax"
    if not _is_within_0_and_1(outputs):
        return None
    parameters = [p for p in network.parameters() if p.requires_grad]
    inputs, _ = examples.batch(torch.arange(min(len(examples), _MOST_EXAMPLES)), dtype=parameters[0].dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for parameter in parameters:
            parameter.normal_(0, _WIDE, generator=generator)
        return "sigmoid" if _is_within_0_and_1(network.eval()(inputs)) else None


def are_probabilities(outputs: Tensor, *, tolerance: float = 1e-5) -> bool:
    """Whether each row of outputs [n, M] is of numbers from 0 up that sum to 1, as logits' rows are by chance alone."""
    return bool((outputs >= 0).all()) and bool(((outputs.sum(1) - 1).abs() <= tolerance).all())


def _is_within_0_and_1(outputs: Tensor) -> bool:
    return bool(((outputs >= 0) & (outputs <= 1)).all())
