"""The user's own loop, minimize.loop=package.module:function: a whole minimization under our checkpoints and ledger.

    function(model, examples, recipe, progress, on_step)

It changes the model in place, for `progress.num_steps` steps or as many as it likes. After each step it reports the
step's cost, by `progress.count(num_examples, loss)` or by setting progress.step, .cost, .history and .epoch_ended
itself, and calls `on_step(progress)`. It must return as soon as on_step() returns True. To resume in its middle it sets
`progress.capture` to its own function, which returns a dict of tensors and plain values. When the loop is resumed,
`progress.state` is that dict and the model has its weights of then. Without a capture() the loop starts over if its
process dies. Its draws follow from `progress.seed`.
"""

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from raysubset.config import MinimizeConfig, derive_seed
from raysubset.data import Examples
from raysubset.errors import with_article
from raysubset.pulse import beat
from raysubset.training.records import Cost, DivergedError, MinimizeResult, OnStep, Progress, num_steps_per_epoch
from raysubset.user_code.functions import in_a_line, load_function, misfit

_FIELD = "minimize.loop"


@dataclass
class LoopProgress(Progress):
    """The progress of a user's own loop, which may change all of it."""

    seed: int = 0  # of all that the loop draws
    state: dict[str, Any] | None = None  # the value of capture() before the loop was stopped; None at the beginning
    loss_sum: float = 0.0  # over the examples counted since the last epoch ended
    num_summed: int = 0

    def count(self, num_examples: int, loss: float, *, learning_rate: float = 0.0) -> None:
        """Count a step that passed so many examples forward and backward, at this mean loss; end an epoch if due.

        The learning rate is for the training curve alone; 0 if there is none.
        """
        self.step += 1
        self.cost += Cost(num_examples, num_examples, 1)
        self.loss_sum += float(loss) * num_examples
        self.num_summed += num_examples
        self.epoch_ended = self.step % self.num_steps_per_epoch == 0 or self.step == self.num_steps
        if self.epoch_ended:
            self.end_epoch(learning_rate)

    def end_epoch(self, learning_rate: float = 0.0) -> None:
        """End the epoch at the current step."""
        mean = self.loss_sum / self.num_summed if self.num_summed else math.nan
        self.record_epoch(mean, learning_rate)
        self.epoch_ended, self.loss_sum, self.num_summed = True, 0.0, 0


def minimize_by_own_loop(
    model: nn.Module,
    examples: Examples,
    recipe: MinimizeConfig,
    *,
    seed: int,
    state: dict[str, Any] | None = None,
    on_step: OnStep | None = None,
) -> MinimizeResult:
    """Minimize by recipe.loop, with minimize()'s arguments; cost and history are those that the loop reports.

    Returns:
        The outcome: "epochs" if the loop reached its last step, "stopped" if on_step() stopped it, else "loop".

    Raises:
        ValueError: for what the loop raises, or if the model has other parameters afterwards.
        DivergedError: if it ends at weights that are not finite.
    """
    reference = str(recipe.loop)
    function = load_function(_FIELD, reference)
    steps_per_epoch = num_steps_per_epoch(len(examples), recipe)
    progress = LoopProgress(max(1, round(recipe.epochs * steps_per_epoch)), steps_per_epoch, seed=seed)
    if state is not None and not starts_over(recipe, state):
        model.load_state_dict(state["model"])
        progress.load_state_dict(state)
        progress.state, (progress.num_steps, progress.num_steps_per_epoch) = state["loop"], state["num_steps"]
        progress.loss_sum, progress.num_summed = state["summed"]
    start_s, last_step, is_stopped = time.perf_counter(), progress.step, False
    failure: BaseException | None = None  # raised by our side; a loop that catches it must not hide it

    def capture() -> dict[str, Any]:
        state = progress.state_dict()
        if progress.capture is dict:  # the loop has not set it, so it starts over
            return state
        with in_a_line(_FIELD, reference):
            state["loop"] = progress.capture()
        return state | {
            "model": model.state_dict(),
            "num_steps": [progress.num_steps, progress.num_steps_per_epoch],
            "summed": [progress.loss_sum, progress.num_summed],
        }

    def cost() -> Cost:
        return replace(progress.cost, device_s=time.perf_counter() - start_s)

    def report() -> bool:
        """Call our on_step() with a plain Progress, and return True if the loop must return."""
        nonlocal last_step, is_stopped
        last_step, num_steps = progress.step, max(progress.num_steps, progress.step)
        beat()
        plain = Progress(num_steps, progress.num_steps_per_epoch, last_step, cost(), progress.epoch_ended)
        plain.history, plain.summed = list(progress.history), (progress.loss_sum, progress.num_summed)
        plain.capture = capture
        is_stopped = bool(on_step and on_step(plain)) or is_stopped
        return is_stopped

    def checked_on_step(reported: object) -> bool:
        nonlocal failure
        try:
            if reported is not progress:
                raise misfit(_FIELD, reference, f"called on_step() with {with_article(reported)}: give it progress")
            if flaw := _flaw(progress, last_step):
                raise misfit(_FIELD, reference, flaw)
            return report()
        except BaseException as error:
            failure = error
            raise

    model.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]  # for flat views of weights
    shapes, first_step = {key: tensor.shape for key, tensor in model.state_dict().items()}, progress.step
    model.train()
    with torch.random.fork_rng(devices=[examples.device] if examples.device.type == "cuda" else []):
        torch.manual_seed(derive_seed(seed, "loop", first_step))
        try:
            with in_a_line(_FIELD, reference):
                function(model, examples, recipe, progress, checked_on_step)
        except ValueError:
            if failure is None:
                raise
    if failure is not None:
        raise failure
    if last_step == first_step and last_step < progress.num_steps:
        raise misfit(_FIELD, reference, "never called on_step(): call on_step(progress) after every step")
    num_recorded = progress.history[-1].num_steps if progress.history else 0
    if not is_stopped and progress.step > num_recorded:
        progress.end_epoch()
        report()
    if {key: tensor.shape for key, tensor in model.state_dict().items()} != shapes:
        raise misfit(_FIELD, reference, "left a model with other parameters: change those that it receives in place")
    model.zero_grad()
    if not all(bool(tensor.isfinite().all()) for tensor in model.parameters()):
        raise DivergedError(f"{_FIELD} = {reference!r} ended at weights that are not finite: lower its learning rate")
    outcome = "epochs" if progress.step >= progress.num_steps else "stopped" if is_stopped else "loop"
    return MinimizeResult(outcome, tuple(progress.history), cost(), {})


def starts_over(recipe: MinimizeConfig, state: dict[str, Any]) -> bool:
    """Return True if the checkpoint of a user's loop has no captured state, so that the loop starts over."""
    return recipe.loop is not None and "loop" not in state


def _flaw(progress: LoopProgress, last_step: int) -> str | None:
    """Return what is wrong with the loop's progress since its last call, and the way out; None if nothing is."""
    if not last_step < progress.step:
        text = f"called on_step() at step {progress.step} after {last_step}"
        return f"{text}: let progress.count() count it, or set progress.step before the call"
    counts = (progress.step, progress.cost.num_forward, progress.cost.num_backward, progress.cost.num_steps)
    if not all(isinstance(count, int) and count >= 0 for count in counts):
        return f"reported steps and costs of {counts}: give whole numbers"
    for record in progress.history[-1:]:
        numbers = (record.loss, record.learning_rate, record.epoch)
        if not all(isinstance(number, int | float) for number in numbers) or not math.isfinite(sum(numbers[1:])):
            return f"recorded {record}: give plain numbers, and 0 where there is no learning rate"
    if progress.epoch_ended and (not progress.history or progress.history[-1].num_steps != progress.step):
        return "set progress.epoch_ended without a record in progress.history: call progress.count()"
    return None
