"""Train copies of the network for a few steps before a run: do network, recipe and the user's own code fit together?"""

import io
import math
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from raysubset.config import WHOLE_SUBSET, MinimizeConfig
from raysubset.data import Examples
from raysubset.errors import listed
from raysubset.models import copied, dtype_of, generators_restored
from raysubset.tasks import Spec
from raysubset.training.evaluation import layout_of, predict
from raysubset.training.loop import minimize
from raysubset.training.own_loop import starts_over
from raysubset.training.records import DivergedError, Progress
from raysubset.user_code.functions import misfit

_NUM_STEPS = 4  # several, so that layers dropped at random are dropped in one of them
_MOST_EXAMPLES = 16  # of a step
_MOST_NUMBERS = 200_000  # in the inputs of a step
_MOST_S = 1.0  # no further step begins after so long
_MOST_OWN_S = 5.0  # likewise of the user's own loop or optimizer
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
    examples, recipe = _shortened(sample, recipe)
    recipe = replace(recipe, learning_rate=1e-9, schedule="constant", loop=None)  # try_own_steps() tries the loop
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


def _shortened(sample: Examples, recipe: MinimizeConfig) -> tuple[Examples, MinimizeConfig]:
    """Return examples of a few small batches, repeated if the sample has too few, and the recipe of one epoch."""
    num_numbers = math.prod(sample.task.spec().inputs)
    size = max(2, min(_MOST_EXAMPLES, recipe.batch_size, _MOST_NUMBERS // num_numbers))
    accumulation = min(recipe.accumulation, size // 2)
    endless: dict[str, Any] = {"tolerance": None, "patience": 0, "target_loss": None, "compile": False}
    recipe = replace(recipe, epochs=1.0, batch_size=size, accumulation=accumulation, **endless)
    return sample.select(torch.arange(_NUM_STEPS * size) % len(sample)), recipe


_RESUMING = {  # the field: what a checkpoint holds of it, and what to do if that is not all
    "minimize.loop": (
        "capture()",
        "draw by progress.seed and the step, return all that it remembers from capture(), or set no capture, so that "
        "it starts over",
    ),
    "minimize.optimizer": (
        "state_dict()",
        "keep all that it remembers from step to step in self.state and in its groups",
    ),
}


def try_own_steps(model: nn.Module, recipe: MinimizeConfig, sample: Examples) -> str | None:
    """Minimize a copy by the user's own loop or optimizer, and another from a checkpoint of the first step, on the CPU.

    Returns:
        A note for the user, if the loop works but cannot resume.

    Raises:
        ValueError: if the user's code fails, or ends elsewhere when resumed; if a loop never calls on_step(), continues
            after it returned True, reports no costs, or leaves parameters unchanged.
    """
    field = "minimize.loop" if recipe.loop else "minimize.optimizer"
    reference, (memory, way_out) = str(recipe.loop or recipe.optimizer), _RESUMING[field]
    examples, recipe = _shortened(sample, recipe)
    start_s, states, calls_after_stop = time.perf_counter(), list[dict[str, Any]](), list[Progress]()

    def keep_first(progress: Progress) -> bool:
        if not states:
            text = f"has a {memory} that a checkpoint cannot hold: keep tensors, numbers, words, lists and dicts in it"
            states.append(through_a_file(progress.capture(), misfit(field, reference, text)))
        return time.perf_counter() - start_s > _MOST_OWN_S

    def stop(progress: Progress) -> bool:
        calls_after_stop.append(progress)
        return True

    unbroken, resumed = copied(model), copied(model)
    with generators_restored(), suppress(DivergedError) if recipe.has_own_optimizer else nullcontext():
        result = minimize(unbroken, examples, recipe, seed=0, on_step=keep_first)
        if recipe.loop:
            if not result.cost.num_forward or not result.cost.num_backward:
                text = "reported no costs: let progress.count() count steps, or set progress.cost"
                raise misfit(field, reference, text)
            _refuse_unmoved(model, unbroken, examples, recipe)
            if starts_over(recipe, states[0]):
                return f"{reference} sets no progress.capture: if its process dies, a subset's work starts over"
            minimize(copied(model), examples, recipe, seed=0, on_step=stop)
            if len(calls_after_stop) > 1:
                raise misfit(field, reference, "continued after on_step() had returned True: return then")
        if result.outcome == "stopped":  # too slow for the trial to reach its end
            return None
        minimize(resumed, examples, recipe, seed=0, state=states[0])
        if not all(map(torch.equal, unbroken.state_dict().values(), resumed.state_dict().values())):
            raise misfit(field, reference, f"ends elsewhere when it is resumed from its {memory}: {way_out}")
    return None


def through_a_file(state: dict[str, Any], misfit: ValueError) -> dict[str, Any]:
    """Return a state as a checkpoint would restore it.

    Raises:
        ValueError: the misfit, if a checkpoint cannot hold the state.
    """
    file = io.BytesIO()
    try:
        torch.save(state, file)
        file.seek(0)
        return torch.load(file, weights_only=True)
    except Exception as error:  # torch.save() and load() raise many kinds
        raise misfit from error


def _refuse_unmoved(start: nn.Module, end: nn.Module, examples: Examples, recipe: MinimizeConfig) -> None:
    """Refuse a loop that left parameters unchanged although the loss depends on them."""
    old, new = dict(start.named_parameters()), dict(end.named_parameters())
    unmoved = [name for name, p in old.items() if p.requires_grad and torch.equal(p, new[name])]
    if unmoved:
        slopes = gradients_of(start, examples, recipe)
        unmoved = [name for name in unmoved if (slope := slopes[name]) is not None and bool(slope.any())]
    if unmoved:
        raise misfit(
            "minimize.loop",
            str(recipe.loop),
            f"left {len(unmoved)} of {len(old)} parameters unchanged: {listed(unmoved, most=3)}. Change those of the "
            "model that it receives; those that should stay have requires_grad=False in the network",
        )


def gradients_of(model: nn.Module, examples: Examples, recipe: MinimizeConfig) -> dict[str, Tensor | None]:
    """Return the loss's gradients in train mode by names of trainable parameters. The model is left as it was."""
    network, indices = copied(model).train(), torch.arange(len(examples), device=examples.device)
    inputs, targets = examples.batch(indices, **layout_of(network, recipe))
    with torch.random.fork_rng(devices=[]):
        examples.task.loss(network(inputs), targets).backward()
    return {name: p.grad for name, p in network.named_parameters() if p.requires_grad}


def least_batch(model: nn.Module, spec: Spec) -> int:
    """Return the fewest examples of a step: 2 if batch normalisation would see a single value per channel of one."""
    network, example = copied(model).train(), spec.zeros(1)
    if example.is_floating_point():
        example = example.to(dtype_of(network))
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
