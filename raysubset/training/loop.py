"""minimize(): the one training loop, for subsets, trunk, fine-tuning and conventional runs alike."""

import math
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from raysubset.config import MinimizeConfig, derive_seed
from raysubset.costs import Cost
from raysubset.data import Batches, Examples, even_sizes
from raysubset.models import dtype_of
from raysubset.training.devices import mixed_precision, widest_dtype
from raysubset.training.evaluation import widened
from raysubset.training.optimizers import learning_rate_at, load_optimizer_state, make_optimizer, state_after
from raysubset.training.own_loop import minimize_by_own_loop
from raysubset.training.own_objective import OwnObjective
from raysubset.training.own_optimizer import rates_of_groups
from raysubset.training.records import (
    MinimizeResult,
    OnStep,
    Progress,
    diverged_at_once,
    num_steps_per_epoch,
    reached,
)
from raysubset.training.shards import Shard, in_parts
from raysubset.training.techniques import Distillation, Techniques
from raysubset.training.whole_subset import minimize_whole
from raysubset.user_code.functions import in_a_line


def minimize(
    model: nn.Module,
    examples: Batches,
    recipe: MinimizeConfig,
    *,
    seed: int,
    state: dict[str, Any] | None = None,
    optimizer_state: dict[str, Any] | None = None,
    schedule_span: tuple[float, float] = (0.0, 1.0),
    shard: Shard | None = None,
    distillation: Distillation | None = None,
    validation: Examples | None = None,
    on_step: OnStep | None = None,
) -> MinimizeResult:
    """Minimize the task's loss over the examples, changing the model in place.

    Order, augmentation and dropout depend on the seed and the epoch alone. The same call therefore gives the same bits
    on one device type and thread count, even if it was stopped and resumed in the middle of an epoch.

    Args:
        model: on the examples' device. Every worker has its own copy, with the same weights.
        examples: every worker holds or streams all of them, and computes its share of each batch.
        recipe: the recipe. Whole-subset optimizers and a user's loop are handed on to minimize_whole() and
            minimize_by_own_loop(), which both need one worker and examples in memory.
        seed: of order, augmentation, dropout and noise.
        state: the value of Progress.capture(), to resume from.
        optimizer_state: momenta to start with if there is no `state` (a member's next round).
        schedule_span: the part of the schedule that this call covers, as shares of it.
        shard: this worker's share of each batch. The sum of the shares' gradients is the whole batch's gradient.
        distillation: an ensemble to learn from as well; the history's losses then include its term.
        validation: measured by whole-subset optimizers for minimize.patience.
        on_step: called after every step. If it returns True the call ends with the outcome "stopped"; if it returns a
            text, with that outcome. If weights are averaged, on_step sees the average at the very end, and at the end
            of every epoch if the run continues from the average.

    Returns:
        The outcome. On divergence the weights of the epoch with the least loss are restored, with a new optimizer
        state.

    Raises:
        DivergedError: if the loss is not finite in the first epoch already.
        ValueError: if there are more workers than examples in a batch, if the optimizer, the precision or a technique
            does not fit, or if streamed examples cannot be read.
    """
    shard = shard or Shard()
    if recipe.whole_loop:
        assert optimizer_state is None, "other loops keep no state over rounds"
        assert distillation is None, "other loops minimize the task's loss alone"
        assert shard.num == 1, "other loops work in one process"
        assert isinstance(examples, Examples), "other loops have all examples in memory"
        if recipe.loop is not None:
            return minimize_by_own_loop(model, examples, recipe, seed=seed, state=state, on_step=on_step)
        return minimize_whole(model, examples, recipe, validation=validation, state=state, on_step=on_step)
    start_s = time.perf_counter()
    device, task, dtype = examples.device, examples.task, dtype_of(model)
    steps_per_epoch = num_steps_per_epoch(len(examples), recipe)
    batch_sizes = even_sizes(len(examples), steps_per_epoch)[: max(1, round(recipe.epoch_fraction * steps_per_epoch))]
    steps_per_turn = len(batch_sizes)  # fewer than an epoch's steps if epoch_fraction cuts it short
    if batch_sizes[-1] < shard.num:
        raise ValueError(f"batches of {batch_sizes[-1]} examples cannot be shared by {shard.num} workers: use fewer")
    progress = Progress(max(1, round(recipe.epochs * steps_per_epoch)), steps_per_epoch)
    optimizer = make_optimizer(model, recipe)
    largest_rate, shares = rates_of_groups(optimizer)
    if recipe.learning_rate is None and recipe.has_own_optimizer:
        recipe = replace(recipe, learning_rate=largest_rate)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    techniques = Techniques(model, examples, recipe, optimizer, progress, seed=seed, shard=shard)
    network = techniques.data_parallel(device)
    forward = torch.compile(network) if recipe.compile else network
    precision = mixed_precision(device, dtype, recipe.precision)
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "float16")
    loss_sum = torch.zeros((), dtype=widest_dtype(device), device=device)
    num_summed = 0  # examples in loss_sum, over all shards
    best: dict[str, Any] = {}
    batches, num_parts = None, recipe.accumulation
    stepping = partial(in_a_line, "minimize.optimizer", recipe.optimizer) if recipe.has_own_optimizer else nullcontext
    objective = OwnObjective(recipe.objective, device) if recipe.objective else None
    num_seen = first_step = 0

    def capture() -> dict[str, Any]:
        with stepping():
            moments = optimizer.state_dict()
        return {
            **progress.state_dict(),
            "model": model.state_dict(),
            "optimizer": moments,
            "scaler": scaler.state_dict(),
            "loss_sum": loss_sum.item(),
            "num_summed": num_summed,
            "best": best,
            "techniques": techniques.state_dict(),
            "own": techniques.worker_state_dict(),
            "num_shards": shard.num,
        }

    def cost() -> Cost:
        device_s = (time.perf_counter() - start_s) * shard.num
        num_teacher_forward = num_seen * distillation.num_teachers if distillation else 0
        num_extra = objective.num_extra * shard.num if objective else 0
        num_backward = num_seen - techniques.num_skipped // 2  # half of a backward pass is the weights' gradients
        num_forward = num_seen + num_teacher_forward + num_extra + techniques.num_forward
        return Cost(num_forward, num_backward + num_extra, progress.step - first_step, device_s)

    def forward_and_backward(inputs: Tensor, targets: Tensor, weight: float) -> Tensor:
        """Add the gradients of `weight` times the summed loss, add the loss to loss_sum, and return the outputs."""
        nonlocal loss_sum
        teacher_outputs = None
        if objective is not None:
            with precision:
                loss, outputs = objective(forward, inputs, targets, task)
        else:
            with precision:
                outputs = forward(inputs)
                if distillation is not None:
                    teacher_outputs = distillation.targets(inputs, task)
            loss = task.loss(widened(outputs), targets)
            if distillation is not None and teacher_outputs is not None:
                loss = distillation.mixed(loss, widened(outputs), teacher_outputs, task)
        scaler.scale(loss * weight).backward()  # a gradient given to backward() imports sympy, 0.6 s of a CPU
        loss_sum = loss_sum + loss.detach()  # a new tensor, because other threads read progress.summed
        return outputs.detach()

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if state is not None:
            model.load_state_dict(state["model"])
            with stepping():
                load_optimizer_state(optimizer, state["optimizer"])
            scaler.load_state_dict(state.get("scaler", {}))
            progress.load_state_dict(state)
            first_step = progress.step
            loss_sum.fill_(state["loss_sum"])
            num_summed, best = state["num_summed"], state["best"]
            worker_state = state["own"] if state["num_shards"] == shard.num else {}
            techniques.load_state_dict(state["techniques"], worker_state, progress.step)
        elif optimizer_state is not None:
            load_optimizer_state(optimizer, optimizer_state)
        model.train()
        outcome = reached(recipe, progress) if progress.step and not num_summed else None
        outcome = (state or {}).get("asked") or outcome  # the outcome that a ValidationWatch requested
        while outcome is None and progress.step < progress.num_steps:
            turn, batch = divmod(progress.step, steps_per_turn)
            if batches is None or batch == 0:
                batches = examples.epoch(
                    order_seed=derive_seed(seed, "order", turn),
                    augmentation_seed=derive_seed(seed, "augmentation", turn),
                    batch_sizes=batch_sizes,
                    first=batch,
                    rank=shard.rank,
                    num_workers=shard.num,
                    channels_last=recipe.channels_last,
                    dtype=dtype,
                )
            _seed_noise(device, derive_seed(seed, "noise", shard.rank, progress.step))
            if objective is not None:
                objective.generator.manual_seed(derive_seed(seed, "objective", shard.rank, progress.step))
            rate = learning_rate_at(recipe, progress.step, num_steps=progress.num_steps, span=schedule_span)
            rate *= techniques.rate_scale
            for group, share in zip(optimizer.param_groups, shares, strict=True):
                group["lr"] = rate * share
            inputs, targets = next(batches)
            techniques.before_forward(rate, progress.step)
            for parameter in parameters:
                parameter.grad = None  # zero_grad() takes 8 µs of a CPU thread longer
            weight = shard.num / batch_sizes[batch]  # the gradients of the shards are averaged
            if num_parts == 1:
                outputs = forward_and_backward(inputs, targets, weight)
            else:
                outputs = in_parts(forward_and_backward, inputs, targets, weight, num_parts=num_parts, network=network)
            shard.check_gradients(parameters)
            techniques.after_backward()
            scaler.unscale_(optimizer)
            if recipe.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, recipe.clip_norm)
            with stepping():
                scaler.step(optimizer)  # skips the step if gradients are not finite
            scaler.update()

            num_summed += batch_sizes[batch]
            num_seen += batch_sizes[batch]
            progress.step += 1
            techniques.after_step(progress.step, outputs, targets, batch_sizes[batch])
            progress.epoch_ended = progress.step % steps_per_turn == 0 or progress.step == progress.num_steps
            if progress.epoch_ended:
                mean = shard.sum(loss_sum).item() / num_summed
                values = [p.detach() for p in parameters if p.requires_grad and p.numel()]
                if not torch.nn.utils.get_total_norm(values, norm_type=math.inf).isfinite():
                    mean = math.nan  # the last step went too far, and no loss was computed after it
                progress.record_epoch(mean, rate)
                loss_sum, num_summed = torch.zeros_like(loss_sum), 0
                outcome = reached(recipe, progress)
                if outcome == "diverged":
                    if not best:
                        raise diverged_at_once(mean, recipe)
                    model.load_state_dict(best["model"])
                    techniques.close()
                    optimizer = make_optimizer(model, recipe)  # the old moments may be NaN
                else:
                    techniques.end_epoch(progress.step, last=bool(outcome) or progress.step == progress.num_steps)
                    if not best or mean < best["loss"]:
                        best = {"loss": mean, "model": {k: v.detach().clone() for k, v in model.state_dict().items()}}
            progress.cost, progress.summed = cost(), (loss_sum, num_summed / shard.num)
            if on_step is not None and (request := on_step(progress.with_capture(capture))) and outcome is None:
                outcome = request if isinstance(request, str) else "stopped"
    optimizer.zero_grad()
    techniques.close()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    outcome = outcome or "epochs"
    return MinimizeResult(outcome, tuple(progress.history), cost(), state_after(outcome, optimizer.state_dict()))


def _seed_noise(device: torch.device, seed: int) -> None:
    """Seed the generator of dropout before every step, so that a resumed run needs no saved random state."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
