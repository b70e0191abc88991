"""minimize_packed(): several minimizations at once on one device, each with the result of minimize() alone."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from raysubset.config import WHOLE_SUBSET, MinimizeConfig, derive_seed
from raysubset.costs import Cost
from raysubset.data import Examples, even_sizes, joined
from raysubset.models import dtype_of, has_dropout, lost_in_copies
from raysubset.training.devices import mixed_precision, placed, widest_dtype
from raysubset.training.evaluation import widened
from raysubset.training.optimizers import learning_rate_at, state_after
from raysubset.training.records import (
    DivergedError,
    MinimizeResult,
    Progress,
    diverged_at_once,
    num_steps_per_epoch,
    reached,
)
from raysubset.training.stack import Stack

OnPackedStep = Callable[[Mapping[int, Progress]], bool | None]


def why_not_packed(model: nn.Module, recipe: MinimizeConfig) -> str | None:
    """Return in a few words why this recipe cannot step several members at once, or None if it can."""
    kinds = {name: getattr(recipe, name).kind for name in ("extrapolation", "averaging", "skipping")}
    reasons = (
        (recipe.optimizer in WHOLE_SUBSET, f"{recipe.optimizer} searches a line for each subset"),
        (recipe.loop, f"{recipe.loop} is a loop of one network"),
        (recipe.has_own_optimizer, f"{recipe.optimizer} is an optimizer of one network"),
        (recipe.objective, f"{recipe.objective} is called with one network"),
        *((kind != "none", f"minimize.{name}.kind={kind} is done one by one") for name, kind in kinds.items()),
        (recipe.epoch_fraction < 1, "minimize.epoch_fraction < 1 draws new examples in each epoch"),
        (recipe.accumulation > 1, "minimize.accumulation passes one network's batch in parts"),
        (recipe.precision == "float16", "minimize.precision=float16 scales the loss of one network"),
        (recipe.compile, "minimize.compile is for one network"),
        (has_dropout(model), "the network has dropout, whose noise is each subset's own"),
        (
            lost_in_copies(model) or any(m._backward_hooks or m._backward_pre_hooks for m in model.modules()),
            "the network has hooks on gradients, or closures as hooks, which are of one network",
        ),
        (
            any(isinstance(module, nn.RNNBase) for module in model.modules()),
            "torch cannot run recurrent layers with stacked weights",
        ),
        (
            len({p.dtype for p in model.parameters() if p.requires_grad}) > 1,
            "the network's parameters are of several types",
        ),
    )
    return next((reason for applies, reason in reasons if applies), None)


def minimize_packed(
    models: Sequence[nn.Module],
    examples: Sequence[Examples],
    recipe: MinimizeConfig,
    *,
    seeds: Sequence[int],
    states: Sequence[dict[str, Any] | None] | None = None,
    optimizer_states: Sequence[dict[str, Any] | None] | None = None,
    schedule_span: tuple[float, float] = (0.0, 1.0),
    on_step: OnPackedStep | None = None,
) -> list[MinimizeResult | DivergedError]:
    """Minimize the task's loss for each member over its own examples, changing the models in place.

    Each member has the order, augmentation, learning rate, running statistics and end that minimize() would give it,
    and agrees with it to rounding. States are interchangeable with minimize()'s in both directions. In one step the
    members whose batches have the same size share a forward pass. A member that has ended leaves the stack.

    Args:
        models: of one architecture, on the examples' device.
        examples: of each member; a joint copy of them is held meanwhile.
        recipe: one for which why_not_packed() returns None.
        seeds: of each member, as minimize() takes them; states and optimizer_states likewise.
        on_step: called after every step with the progress of the members that took it, by number. If it returns True,
            those that have not ended end with the outcome "stopped".

    Returns:
        The outcomes. For a member for which minimize() would raise DivergedError, that error stands in their place; the
        others continue. A member's device_s is its share of the time that steps took.

    Raises:
        RuntimeError: torch's, if vmap cannot run the network.
    """
    pack = _Pack(models, examples, recipe, seeds, states, optimizer_states)
    while pack.running:
        pack.step(schedule_span)
        stop = bool(on_step and on_step(pack.progresses()))
        pack.end_finished(stop=stop)
    if examples[0].device.type == "cuda":
        torch.cuda.synchronize(examples[0].device)
    return [member.result for member in pack.members if member.result is not None]


class _Member:
    """The state of one member; its weights are a row of the stack while it runs."""

    def __init__(
        self, number: int, first: int, examples: Examples, recipe: MinimizeConfig, seed: int, state: Any | None
    ) -> None:
        num_per_epoch = num_steps_per_epoch(len(examples), recipe)
        self.number, self.first = number, first  # and the position of its first example in the joint ones
        self.examples, self.seed = examples, seed
        self.batch_sizes = even_sizes(len(examples), num_per_epoch)
        self.progress = Progress(max(1, round(recipe.epochs * num_per_epoch)), num_per_epoch)
        self.batches: Sequence[Tensor] = ()  # of the epoch: positions in the joint examples
        self.num_summed = 0  # examples in the loss sum
        self.best: dict[str, Any] = {}  # the least loss of an epoch, and "model", its weights
        self.outcome: str | None = None
        self.result: MinimizeResult | DivergedError | None = None
        if state is not None:
            self.progress.load_state_dict(state)
            self.num_summed, self.best = state["num_summed"], state["best"]
            if self.progress.step and not self.num_summed:
                self.outcome = reached(recipe, self.progress)

    @property
    def batch_size(self) -> int:
        return self.batch_sizes[self.progress.step % len(self.batch_sizes)]

    @property
    def has_ended(self) -> bool:
        return self.outcome is not None or self.progress.step >= self.progress.num_steps


class _Pack:
    """The members of one call, and the stack of those that still run."""

    def __init__(
        self,
        models: Sequence[nn.Module],
        examples: Sequence[Examples],
        recipe: MinimizeConfig,
        seeds: Sequence[int],
        states: Sequence[dict[str, Any] | None] | None,
        optimizer_states: Sequence[dict[str, Any] | None] | None,
    ) -> None:
        self._recipe, self._last_at = recipe, time.perf_counter()
        states, initial_states = states or [None] * len(models), optimizer_states or [None] * len(models)
        self.members, first = list[_Member](), 0
        for model, member_examples, seed, state in zip(models, examples, seeds, states, strict=True):
            model.train()
            if state is not None:
                model.load_state_dict(state["model"])
            self.members.append(_Member(len(self.members), first, member_examples, recipe, seed, state))
            first += len(member_examples)
        optimizers = [s["optimizer"] if s else initial for s, initial in zip(states, initial_states, strict=True)]
        self.running = list(self.members)  # in order of the stack's rows
        self._joint = joined(examples)
        draws = [draw for member_examples in examples if (draw := member_examples.draw(0)) is not None]
        self._draws = torch.cat(draws) if draws else None
        self._stack = Stack(models, recipe, optimizers)
        device, self._dtype = examples[0].device, dtype_of(models[0])
        self._precision: AbstractContextManager[object] = mixed_precision(device, self._dtype, recipe.precision)
        sums = [0.0 if state is None else state["loss_sum"] for state in states]
        self._loss_sums = torch.tensor(sums, dtype=widest_dtype(device)).to(device)  # by member's number
        self.end_finished(stop=False)

    def step(self, schedule_span: tuple[float, float]) -> None:
        """Make one step of every running member."""
        progresses = [member.progress for member in self.running]
        rates = [learning_rate_at(self._recipe, p.step, num_steps=p.num_steps, span=schedule_span) for p in progresses]
        sizes = [member.batch_size for member in self.running]
        for size in dict.fromkeys(sizes):
            self._forward_and_backward([row for row, row_size in enumerate(sizes) if row_size == size], size)
        self._stack.update(rates)
        now = time.perf_counter()
        share_s, self._last_at = (now - self._last_at) / len(self.running), now
        for member, size in zip(self.running, sizes, strict=True):
            member.num_summed += size
            member.progress.step += 1
            member.progress.cost += Cost(size, size, 1, share_s)
        self._end_epochs(rates)

    def _forward_and_backward(self, rows: list[int], size: int) -> None:
        """Add the gradients and the losses of members whose batches have the same size."""
        batches = [self._next_batch(self.running[row]) for row in rows]
        read = partial(self._joint.batch, draws=self._draws, channels_last=True, dtype=self._dtype)
        if self._joint.augmentation is None:
            inputs, targets = read(torch.stack(batches, dim=1).flatten())
        else:  # the user's function gets one member's batch at a time: it may mix the examples of a batch
            parts = zip(*map(read, batches), strict=True)
            inputs, targets = (torch.stack(values, dim=1).flatten(0, 1) for values in parts)
        inputs = inputs.unflatten(0, (size, len(rows)))  # of images [N, k, C, H, W] in the memory of [N, k, H, W, C]
        if self._recipe.channels_last and inputs.ndim == 5:  # cloned: contiguous() keeps the strides of one channel
            pixels = inputs.permute(0, 3, 4, 1, 2).clone(memory_format=torch.contiguous_format)
            inputs = pixels.permute(0, 3, 4, 1, 2)
        else:
            inputs = inputs.clone(memory_format=torch.contiguous_format)
        with self._precision:
            outputs = self._stack.outputs(inputs, rows)
        targets = targets.unflatten(0, (size, len(rows)))
        losses = vmap(self._joint.task.loss, in_dims=1)(widened(outputs), targets)
        losses.backward(torch.full_like(losses, 1 / size))
        numbers = placed([self.running[row].number for row in rows], losses.device)
        # a new tensor, because other threads read Progress.summed
        self._loss_sums = self._loss_sums.index_add(0, numbers, losses.detach().to(self._loss_sums.dtype))

    def _next_batch(self, member: _Member) -> Tensor:
        """Return positions in the joint examples, int64 [n], drawn at an epoch's beginning and after a resume."""
        epoch, batch = divmod(member.progress.step, len(member.batch_sizes))
        if not member.batches or batch == 0:
            order = member.examples.order(derive_seed(member.seed, "order", epoch))
            member.batches = (order + member.first).split(member.batch_sizes)
            draws = member.examples.draw(derive_seed(member.seed, "augmentation", epoch))
            if draws is not None and self._draws is not None:
                self._draws[member.first : member.first + len(draws)] = draws
        return member.batches[batch]

    def _end_epochs(self, rates: Sequence[float]) -> None:
        """End the epoch of members at its end: add to the history, keep the best weights, and check for an outcome."""
        for member in self.running:
            step, num_steps = member.progress.step, member.progress.num_steps
            member.progress.epoch_ended = step % len(member.batch_sizes) == 0 or step == num_steps
        if any(member.progress.epoch_ended for member in self.running):
            sums, are_finite = self._loss_sums.tolist(), self._stack.are_finite()
            self._loss_sums = self._loss_sums.clone()
            for row, member in enumerate(self.running):
                if member.progress.epoch_ended:
                    mean = sums[member.number] / member.num_summed if are_finite[row] else math.nan
                    member.progress.record_epoch(mean, rates[row])
                    member.num_summed, self._loss_sums[member.number] = 0, 0
                    self._judge(row, member, mean)
        totals = self._loss_sums.unbind()
        for member in self.running:
            member.progress.summed = totals[member.number], member.num_summed

    def _judge(self, row: int, member: _Member, mean: float) -> None:
        """Set a member's outcome by its epoch's mean loss; keep its best weights, or restore them if it diverged."""
        member.outcome = reached(self._recipe, member.progress)
        if member.outcome != "diverged":
            if not member.best or mean < member.best["loss"]:
                member.best = {"loss": mean, "model": self._stack.weights(row)}
        elif member.best:
            self._stack.restart(row, member.best["model"])
        else:
            member.result = diverged_at_once(mean, self._recipe)

    def end_finished(self, *, stop: bool) -> None:
        """Give each member that has ended its result, with `stop` all members; the others stay in the stack."""
        rows = [row for row, member in enumerate(self.running) if not (stop or member.has_ended)]
        if len(rows) == len(self.running):
            return
        for row, member in enumerate(self.running):
            if row not in rows and member.result is None:
                self._stack.weights(row)  # into the member's module
                outcome = member.outcome or ("epochs" if member.has_ended else "stopped")
                history, state = tuple(member.progress.history), state_after(outcome, self._stack.optimizer_state(row))
                member.result = MinimizeResult(outcome, history, member.progress.cost, state)
        self.running = [self.running[row] for row in rows]
        self._stack.keep(rows)

    def progresses(self) -> dict[int, Progress]:
        """Return the progress of the running members, by number."""
        members = [member for member in self.running if member.result is None]
        return {member.number: member.progress.with_capture(partial(self._capture, member)) for member in members}

    def _capture(self, member: _Member) -> dict[str, Any]:
        """Return the state of a running member, in minimize()'s format."""
        row = self.running.index(member)
        return {
            **member.progress.state_dict(),
            "model": self._stack.weights(row),
            "optimizer": self._stack.optimizer_state(row),
            "loss_sum": self._loss_sums[member.number].item(),
            "num_summed": member.num_summed,
            "best": member.best,
            "techniques": {},  # no technique is packed
            "scaler": {},
            "own": {},
            "num_shards": 1,
        }
