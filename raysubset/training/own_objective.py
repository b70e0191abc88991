"""The user's own objective, minimize.objective=package.module:function: the loop calls it instead of the task's loss.

    loss, outputs = function(model, inputs, targets, task, generator)

`loss` is summed over the examples. `outputs` [n, *spec.outputs] are those of the examples, or of their mixtures;
techniques watch them. The generator is seeded by the step, so that a resumed run draws the same.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from raysubset.config import MinimizeConfig
from raysubset.data import Examples
from raysubset.errors import with_article
from raysubset.models import copied, dtype_of, generators_restored
from raysubset.tasks import Task
from raysubset.training.devices import mixed_precision
from raysubset.training.evaluation import widened
from raysubset.user_code.functions import in_a_line, load_function, misfit

_FIELD = "minimize.objective"
_NUM_TRIED = 8  # examples
_NUM_DRAWS = 3  # with different draws of the objective, whose losses are compared together


class OwnObjective:
    """Calls the user's function, and counts the examples that it passes forward beyond a batch's own.

    Attributes:
        generator: of the function's draws, to be seeded before each step.
        num_extra: examples passed through the whole network beyond one pass of each, by this process.
    """

    def __init__(self, reference: str, device: torch.device) -> None:
        self._reference, self.generator = reference, torch.Generator(device)
        self._function = load_function(_FIELD, reference)
        self.num_extra = 0

    def __call__(self, model: object, inputs: Tensor, targets: Tensor, task: Task) -> tuple[Tensor, Tensor]:
        """Return (the summed loss in float32, the outputs).

        Raises:
            ValueError: if it does not return a loss, summed, and outputs that fit; or for what it raises.
        """
        assert isinstance(model, nn.Module)  # a compiled model is one, but torch.compile()'s type does not show it
        num_passed = 0

        def count(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            nonlocal num_passed
            num_passed += next((len(item) for item in (*arguments, *keywords.values()) if isinstance(item, Tensor)), 0)

        hook = model.register_forward_pre_hook(count, with_kwargs=True)
        try:
            with in_a_line(_FIELD, self._reference):
                pair = self._function(model, inputs, targets, task, self.generator)
        finally:
            hook.remove()
        self.num_extra += max(0, num_passed - len(inputs))
        loss, outputs = _checked(pair, len(inputs), task, self._reference)
        return widened(loss), outputs


def try_own_objective(model: nn.Module, recipe: MinimizeConfig, sample: Examples) -> None:
    """Call the recipe's objective on the CPU with a copy of the model, some examples, and the same examples twice over.

    Raises:
        ValueError: if it raises anything, or does not return a summed loss and outputs that fit.
    """
    reference, network = str(recipe.objective), copied(model).train()
    dtype = dtype_of(network)
    indices = torch.arange(_NUM_TRIED) % len(sample)
    inputs, targets = sample.batch(indices, channels_last=recipe.channels_last, dtype=dtype)
    objective = OwnObjective(reference, inputs.device)
    precision = mixed_precision(inputs.device, dtype, recipe.precision)

    def loss_of(inputs: Tensor, targets: Tensor) -> float:
        total = 0.0
        for draw in range(_NUM_DRAWS):
            objective.generator.manual_seed(draw)
            torch.manual_seed(draw)
            with precision:
                total += objective(network, inputs, targets, sample.task)[0].item()
        return total

    with generators_restored(), torch.random.fork_rng(devices=[]):
        single_loss = loss_of(inputs, targets)
        double_loss = loss_of(torch.cat([inputs, inputs]), torch.cat([targets, targets]))
        network.eval()  # without dropout, and without statistics of the batch
        whole_loss = parts_loss = loss_of(inputs, targets)
        states = objective.generator.get_state(), torch.get_rng_state()
        undrawn = torch.Generator().manual_seed(_NUM_DRAWS - 1).get_state()
        if recipe.accumulation > 1 and all(torch.equal(state, undrawn) for state in states):
            halves = zip(inputs.tensor_split(2), targets.tensor_split(2), strict=True)
            parts_loss = sum(loss_of(*half) for half in halves)
    if math.isfinite(single_loss) and single_loss and double_loss / single_loss < math.sqrt(2):
        raise misfit(
            _FIELD,
            reference,
            f"gave a loss of {single_loss / _NUM_DRAWS:g} for {_NUM_TRIED} examples and of "
            f"{double_loss / _NUM_DRAWS:g} for these twice: return the sum over the examples, not their mean",
        )
    if abs(parts_loss - whole_loss) > 1e-3 * abs(whole_loss):
        text = f"gave a loss of {whole_loss:g} for {_NUM_TRIED} examples and of {parts_loss:g} for their halves: it "
        text += "compares the examples of a batch, which minimize.accumulation parts: leave it out"
        raise misfit(_FIELD, reference, text)


def _checked(pair: object, num: int, task: Task, reference: str) -> tuple[Tensor, Tensor]:
    """Return the loss and the outputs, after checking their kinds and shapes."""
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(part, Tensor) for part in pair):
        kind = f"{len(pair)} values" if isinstance(pair, tuple | list) else with_article(pair)
        raise misfit(_FIELD, reference, f"returned {kind}: return two tensors, (loss summed over examples, outputs)")
    loss, outputs = pair
    if loss.ndim or not loss.is_floating_point() or not loss.requires_grad:
        text = f"returned a loss of shape {list(loss.shape)}, {loss.dtype}"
        raise misfit(_FIELD, reference, f"{text}: return one number that depends on the parameters")
    expected = (num, *task.spec().outputs)
    if tuple(outputs.shape) != expected:
        text = f"returned outputs {list(outputs.shape)} for {num} examples, and the task's are {list(expected)}"
        raise misfit(_FIELD, reference, f"{text}: return those of each example of the batch")
    return loss, outputs
