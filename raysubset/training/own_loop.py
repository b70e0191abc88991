"""The user's own loop, minimize.loop=package.module:function: a whole minimization under our checkpoints and ledger.

    function(model, examples, recipe, progress, on_step)

It changes the model in place, for `progress.num_steps` steps or as many as it likes. After each it says what the step
cost, by `progress.count(num_examples, loss)` or by setting progress.step, .cost, .history and .epoch_ended itself, and
calls `on_step(progress)`; where that returns True it returns. It can resume in its middle if `progress.capture` is a
function of its own that gives a dict of tensors and plain values: `progress.state` is that dict when it is called to go
on, with the model as it was. Else it starts over where its process dies. Randomness follows from `progress.seed`.
"""

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from raysubset.config import MinimizeConfig, derive_seed
from raysubset.data import Examples
from raysubset.errors import listed
from raysubset.models import copied, generators_restored
from raysubset.pulse import beat
from raysubset.training.own_optimizer import through_a_file
from raysubset.training.records import (
    Cost,
    DivergedError,
    EpochRecord,
    MinimizeResult,
    OnStep,
    Progress,
    num_steps_per_epoch,
)
from raysubset.user_functions import in_a_line, load_function

_FIELD = "minimize.loop"
_NUM_TRIED = 4  # batches of a trial
_MOST_TRIED = 16  # examples in each
_MOST_S = 5.0  # after which a trial's loop is told to stop


@dataclass
class LoopProgress(Progress):
    """Where a loop of the user's own stands: it may change all of this."""

    seed: int = 0  # of all that it draws
    state: dict[str, Any] | None = None  # what capture() gave before it was stopped; None at the beginning
    loss_sum: float = 0.0  # over the examples counted since the last epoch ended
    num_summed: int = 0

    def count(self, num_examples: int, loss: float, *, learning_rate: float = 0.0) -> None:
        """Count a step that passed so many examples forward and backward, at this mean loss; close its epoch.

        The learning rate is for the training curve alone; 0 where there is none.
        """
        self.step += 1
        self.cost += Cost(num_examples, num_examples, 1)
        self.loss_sum += float(loss) * num_examples
        self.num_summed += num_examples
        self.epoch_ended = self.step % self.num_steps_per_epoch == 0 or self.step == self.num_steps
        if self.epoch_ended:
            self.end_epoch(learning_rate)

    def end_epoch(self, learning_rate: float = 0.0) -> None:
        """Close the epoch at the step in hand."""
        mean = self.loss_sum / self.num_summed if self.num_summed else math.nan
        self.history.append(EpochRecord(self.epoch, mean, learning_rate, self.step))
        self.epoch_ended, self.loss_sum, self.num_summed = True, 0.0, 0


class _Told:
    """on_step() as the user's loop calls it: checks what it says, and tells our side in our words."""

    def __init__(self, model: nn.Module, reference: str, on_step: OnStep | None) -> None:
        self._model, self._reference, self._on_step = model, reference, on_step
        self._started = time.perf_counter()
        self.was_called = self.is_stopped = False
        self.last_step = 0
        self.failure: BaseException | None = None  # of our side, which no loop may swallow

    def __call__(self, progress: LoopProgress) -> bool:
        self.was_called = True
        try:
            if flaw := self._flaw(progress):
                raise _misfit(self._reference, flaw)
            return self.tell(progress)
        except BaseException as error:
            self.failure = error
            raise

    def tell(self, progress: LoopProgress) -> bool:
        """Tell our side; whether the loop is to return."""
        self.last_step = progress.step
        beat()
        self.is_stopped = bool(self._on_step and self._on_step(self.seen(progress))) or self.is_stopped
        return self.is_stopped

    def _flaw(self, progress: LoopProgress) -> str | None:
        """What is wrong with what the loop says, and the way out; None if nothing is."""
        if not isinstance(progress, Progress):
            return f"called on_step() with a {type(progress).__name__}: give it progress"
        if not self.last_step < progress.step:
            text = f"called on_step() at step {progress.step} after {self.last_step}"
            return f"{text}: let progress.count() count it, or set progress.step before"
        counts = (progress.step, progress.cost.num_forward, progress.cost.num_backward, progress.cost.num_steps)
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            return f"said steps and costs of {counts}: give whole numbers"
        for record in progress.history[-1:]:
            numbers = (record.loss, record.learning_rate, record.epoch)
            if not all(isinstance(number, int | float) for number in numbers) or not math.isfinite(sum(numbers[1:])):
                return f"recorded {record}: give plain numbers, and 0 where there is no learning rate"
        if progress.epoch_ended and (not progress.history or progress.history[-1].num_steps != progress.step):
            return "set progress.epoch_ended without a record in progress.history: call progress.count()"
        return None

    def seen(self, progress: LoopProgress) -> Progress:
        """Progress as our side sees it, whose state has the weights in it."""
        num_steps = max(progress.num_steps, progress.step)
        seen = Progress(num_steps, progress.num_steps_per_epoch, progress.step, epoch_ended=progress.epoch_ended)
        seen.cost = replace(progress.cost, device_s=time.perf_counter() - self._started)
        seen.history, seen.summed = list(progress.history), (progress.loss_sum, progress.num_summed)
        seen.capture = lambda: self._capture(progress)
        return seen

    def _capture(self, progress: LoopProgress) -> dict[str, Any]:
        state: dict[str, Any] = {"position": [int(progress.epoch), progress.step]}
        if progress.capture is dict:  # of nobody's: it starts over
            return state
        with in_a_line(_FIELD, self._reference):
            state["loop"] = progress.capture()
        return state | {
            "model": self._model.state_dict(),
            "num_steps": [progress.num_steps, progress.num_steps_per_epoch],
            "history": [record.to_dict() for record in progress.history],
            "summed": [progress.loss_sum, progress.num_summed],
        }


def minimize_by_own_loop(
    model: nn.Module,
    examples: Examples,
    recipe: MinimizeConfig,
    *,
    seed: int,
    state: dict[str, Any] | None = None,
    on_step: OnStep | None = None,
) -> MinimizeResult:
    """Minimize by recipe.loop: minimize() with its arguments, whose cost and history are what the loop says.

    Returns:
        The outcome: "epochs" where it came to its last step, "ended" before, "stopped" where it was told to.

    Raises:
        ValueError: for what the loop raises, or a model that is another one afterwards.
        DivergedError: if it ends at weights that are not finite.
    """
    reference = str(recipe.loop)
    function = load_function(_FIELD, reference)
    per_epoch = num_steps_per_epoch(len(examples), recipe)
    progress = LoopProgress(max(1, round(recipe.epochs * per_epoch)), per_epoch, seed=seed)
    if state is not None and not starts_over(recipe, state):
        model.load_state_dict(state["model"])
        progress.step, progress.state = state["position"][1], state["loop"]
        progress.num_steps, progress.num_steps_per_epoch = state["num_steps"]
        progress.history = [EpochRecord(**record) for record in state["history"]]
        progress.loss_sum, progress.num_summed = state["summed"]
    model.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]  # for flat views of weights
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    told = _Told(model, reference, on_step)
    told.last_step = progress.step
    model.train()
    with torch.random.fork_rng(devices=[examples.device] if examples.device.type == "cuda" else []):
        torch.manual_seed(derive_seed(seed, "loop", progress.step))
        try:
            with in_a_line(_FIELD, reference):
                function(model, examples, recipe, progress, told)
        except ValueError:
            if told.failure is None:
                raise
    if told.failure is not None:
        raise told.failure
    if not told.was_called and told.last_step < progress.num_steps:
        raise _misfit(reference, "never called on_step(): call on_step(progress) after every step")
    num_recorded = progress.history[-1].num_steps if progress.history else 0
    if not told.is_stopped and progress.step > num_recorded:
        progress.end_epoch()
        told.tell(progress)
    if {key: tensor.shape for key, tensor in model.state_dict().items()} != shapes:
        raise _misfit(reference, "left a model of other parameters: change those that it was given in place")
    model.zero_grad()
    if not all(bool(tensor.isfinite().all()) for tensor in model.parameters()):
        raise DivergedError(f"{_FIELD} = {reference!r} ended at weights that are not finite: lower its learning rate")
    outcome = "epochs" if progress.step >= progress.num_steps else "stopped" if told.is_stopped else "ended"
    return MinimizeResult(outcome, tuple(progress.history), told.seen(progress).cost, {})


def starts_over(recipe: MinimizeConfig, state: dict[str, Any]) -> bool:
    """Return True if a checkpoint is of a loop of the user's that gave no capture()."""
    return recipe.loop is not None and "loop" not in state


def try_own_loop(model: nn.Module, recipe: MinimizeConfig, sample: Examples) -> str | None:
    """Run the recipe's loop on copies of the model with some examples, on the CPU; once more stopped and resumed.

    Returns:
        What the user should know, if it works.

    Raises:
        ValueError: if it does not, or calls on_step() never, says no costs, loses parameters, or resumes elsewhere.
    """
    reference = str(recipe.loop)
    size = max(2, min(_MOST_TRIED, recipe.batch_size))
    examples = sample.select(torch.arange(_NUM_TRIED * size) % len(sample))
    recipe = replace(recipe, epochs=1.0, batch_size=size, accumulation=1)
    opaque = "has a capture() that a checkpoint cannot hold: give tensors, numbers, words, lists and dicts"
    started, states = time.perf_counter(), list[dict[str, Any]]()

    def keep_first(progress: Progress) -> bool:
        if not states:
            states.append(through_a_file(progress.capture(), _misfit(reference, opaque)))
        return time.perf_counter() - started > _MOST_S

    with generators_restored():
        unbroken = copied(model)
        result = minimize_by_own_loop(unbroken, examples, recipe, seed=0, on_step=keep_first)
        if not result.cost.num_forward or not result.cost.num_backward:
            raise _misfit(reference, "said no costs: let progress.count() count steps, or set progress.cost")
        _refuse_lost(model, unbroken, examples, reference)
        if starts_over(recipe, states[0]):
            return f"{reference} gives no progress.capture: where its process dies, a subset's work starts over"
        calls_after_stop = []

        def stop(progress: Progress) -> bool:
            calls_after_stop.append(progress)
            return True

        minimize_by_own_loop(copied(model), examples, recipe, seed=0, on_step=stop)
        if len(calls_after_stop) > 1:
            raise _misfit(reference, "went on where on_step() had returned True: return then")
        if result.outcome == "stopped":  # too slow for a trial to its end
            return None
        resumed = copied(model)
        minimize_by_own_loop(resumed, examples, recipe, seed=0, state=states[0])
    if not all(map(torch.equal, unbroken.state_dict().values(), resumed.state_dict().values())):
        raise _misfit(
            reference,
            "ends elsewhere when it is resumed from its capture(): draw by progress.seed and the step, keep all that "
            "it remembers in what capture() gives, or set no capture, so that it starts over",
        )
    return None


def _refuse_lost(before: nn.Module, after: nn.Module, examples: Examples, reference: str) -> None:
    """Refuse parameters that stayed where they were, though the loss depends on them."""
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    stayed = [name for name, p in old.items() if p.requires_grad and torch.equal(p, new[name])]
    if stayed:
        network = copied(before).train()
        inputs, targets = examples.batch(torch.arange(len(examples)), dtype=next(network.parameters()).dtype)
        with torch.random.fork_rng(devices=[]):
            examples.task.loss(network(inputs), targets).backward()
        slopes = {name: p.grad for name, p in network.named_parameters()}
        stayed = [name for name in stayed if (slope := slopes[name]) is not None and bool(slope.any())]
    if stayed:
        raise _misfit(
            reference,
            f"left {len(stayed)} of {len(old)} parameters where they were: {listed(stayed, most=3)}. Change "
            "those of the model that it is given; those that should stay have requires_grad=False in the network",
        )


def _misfit(reference: str, text: str) -> ValueError:
    return ValueError(f"{_FIELD} = {reference!r} {text}")
