"""Train a copy of the network for a few steps before a run, to learn how the network and the recipe behave."""

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

_NUM_STEPS = 4  # several, so that layers dropped at random are dropped in one of them
_MOST_EXAMPLES = 16  # of a step
_MOST_NUMBERS = 200_000  # in the inputs of a step
_MOST_S = 1.0  # no further step begins after so long
_WIDE = 3.0  # standard deviation of weights for which only a bounded function is in [0, 1] everywhere


@dataclass(frozen=True)
class Trial:
    """The findings of try_training()."""

    left_out: tuple[str, ...]  # trainable parameters that had no gradient in some step, by name
    ends_in: str | None  # softmax, log_softmax or sigmoid if the outputs come from that function; None for logits


def try_training(model: nn.Module, recipe: MinimizeConfig, sample: Examples) -> Trial:
    """Train a copy for a few steps at a negligible rate, with the recipe's mode, layout, precision and techniques.

    It computes on the CPU, and repeats examples if the sample has too few. The model and all generators are left as
    they were. What the network, or the recipe's check, raises passes through.
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
        loop=None,  # try_own_loop() tries it
    )
    network, outputs = copied(model), []
    left_out: set[str] = set()
    is_whole = recipe.optimizer in WHOLE_SUBSET

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not is_whole:  # within vmap outputs cannot be kept
            outputs.append(output.detach().float())

    hook = network.register_forward_hook(keep)
    start_s = time.perf_counter()

    def on_step(_: Progress) -> bool:
        if not is_whole:
            left_out.update(name for name, p in network.named_parameters() if p.requires_grad and p.grad is None)
        return time.perf_counter() - start_s > _MOST_S

    with generators_restored():
        with suppress(DivergedError):  # it is on noise, so a divergence means nothing
            minimize(network, examples, recipe, seed=0, on_step=on_step)
        hook.remove()
        if is_whole:
            outputs.append(predict(network, examples, recipe))
        ends_in = _function_at_the_end(network, torch.cat(outputs), examples) if outputs else None
    return Trial(tuple(name for name, _ in model.named_parameters() if name in left_out), ends_in)


def least_batch(model: nn.Module, spec: Spec) -> int:
    """Return the fewest examples of a step: 2 if batch normalisation would see a single value per channel of one."""
    network, example = copied(model).train(), spec.zeros(1)
    if example.is_floating_point():
        example = example.to(next(network.parameters()).dtype)
    with generators_restored(), torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            outputs = network(example)
        except Exception:  # larger batches were tried before
            return 2
    return 1 if tuple(outputs.shape[1:]) == spec.outputs else 2


def _function_at_the_end(network: nn.Module, outputs: Tensor, examples: Examples) -> str | None:
    """Return the function whose outputs [n, M] these are, if they are no logits; None for other dimensions."""
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
    """Return True if each row of outputs [n, M] has numbers from 0 up that sum to 1; rows of logits rarely do."""
    return bool((outputs >= 0).all()) and bool(((outputs.sum(1) - 1).abs() <= tolerance).all())


def _is_within_0_and_1(outputs: Tensor) -> bool:
    return bool(((outputs >= 0) & (outputs <= 1)).all())
