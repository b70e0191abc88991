"""minimize(): the one training loop, for subsets, trunk, fine-tuning and conventional runs alike."""

import math
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from raysubset.config import MinimizeConfig, derive_seed
from raysubset.costs import Cost
from raysubset.data import Batches, Examples, even_sizes
from raysubset.training.devices import mixed_precision, widest_dtype
from raysubset.training.evaluation import widened
from raysubset.training.optimizers import learning_rate_at, load_optimizer_state, make_optimizer
from raysubset.training.own_loop import minimize_by_own_loop
from raysubset.training.own_objective import OwnObjective
from raysubset.training.own_optimizer import rates_of_groups
from raysubset.training.records import (
    EpochRecord,
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

    Order, augmentation and dropout depend on the seed and the epoch alone, so the same call gives the same bits on one
    device type and thread count, also when it was stopped and resumed in the middle of an epoch.

    Args:
        model: on the examples' device; every worker has one of its own, with the same weights.
        examples: every worker holds or streams all of them, and computes its share of each batch.
        recipe: the recipe; whole-subset optimizers go to minimize_whole(), a loop of the user's to that, which both
            want one worker, and examples in memory.
        seed: of order, augmentation, dropout and noise.
        state: what Progress.capture() gave, to go on from there.
        optimizer_state: momenta to start with when there is no `state` (a member's next round).
        schedule_span: the part of the schedule that this call covers, as shares of it.
        shard: this worker's share of each batch. The sum of the shares' gradients is the whole batch's gradient.
        distillation: an ensemble to learn from as well; the history's losses are then of both.
        validation: what minimize.patience of whole-subset optimizers looks at.
        on_step: called after every step; returning True ends the call with the outcome "stopped", a text with that one.
            Where weights are averaged it sees the average at epochs' ends if the run goes on from it, and always at the
            very end.

    Returns:
        The outcome. On divergence the weights of the epoch with the least loss are restored, the optimizer's state is
        a new one.

    Raises:
        DivergedError: if the loss was not finite in the first epoch already.
        ValueError: if there are more workers than examples in a batch, optimizer, precision or a technique does not
            fit, or streamed examples cannot be read.
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
    started = time.perf_counter()
    device, task, dtype = examples.device, examples.task, next(model.parameters()).dtype
    per_epoch = num_steps_per_epoch(len(examples), recipe)
    batch_sizes = even_sizes(len(examples), per_epoch)[: max(1, round(recipe.epoch_fraction * per_epoch))]
    per_turn = len(batch_sizes)  # an epoch's steps, unless epoch_fraction cuts it short
    if batch_sizes[-1] < shard.num:
        raise ValueError(f"batches of {batch_sizes[-1]} examples cannot be shared by {shard.num} workers: use fewer")
    progress = Progress(max(1, round(recipe.epochs * per_epoch)), per_epoch)
    optimizer = make_optimizer(model, recipe)
    largest_rate, shares = rates_of_groups(optimizer)
    if recipe.learning_rate is None:
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
    objective = OwnObjective(recipe.objective, device) if recipe.objective else None
    num_seen = first_step = 0

    def capture() -> dict[str, Any]:
        return {
            "position": [progress.step // per_epoch, progress.step],
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "loss_sum": loss_sum.item(),
            "num_summed": num_summed,
            "history": [record.to_dict() for record in progress.history],
            "best": best,
            "techniques": techniques.state_dict(),
            "own": techniques.own_state_dict(),
            "num_shards": shard.num,
        }

    def cost() -> Cost:
        held_s = (time.perf_counter() - started) * shard.num
        num_taught = num_seen * distillation.num_teachers if distillation else 0
        num_further = objective.num_further * shard.num if objective else 0
        num_backward = num_seen - techniques.num_skipped // 2  # half of a backward pass is the weights' gradients
        num_forward = num_seen + num_taught + num_further + techniques.num_forward
        return Cost(num_forward, num_backward + num_further, progress.step - first_step, held_s)

    def forward_and_backward(inputs: Tensor, targets: Tensor, weight: float) -> Tensor:
        """Add the gradients of `weight` times the summed loss, and the loss to loss_sum; return the outputs."""
        nonlocal loss_sum
        taught = None
        if objective is not None:
            with precision:
                loss, outputs = objective(forward, inputs, targets, task)
        else:
            with precision:
                outputs = forward(inputs)
                if distillation is not None:
                    taught = distillation.targets(inputs, task)
            loss = task.loss(widened(outputs), targets)
            if distillation is not None and taught is not None:
                loss = distillation.mixed(loss, widened(outputs), taught, task)
        loss.backward(scaler.scale(torch.full_like(loss, weight)))
        loss_sum = loss_sum + loss.detach()  # another tensor, for other threads that read progress.summed
        return outputs.detach()

    progress.capture = capture
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if state is not None:
            model.load_state_dict(state["model"])
            load_optimizer_state(optimizer, state["optimizer"])
            scaler.load_state_dict(state.get("scaler", {}))
            first_step = progress.step = state["position"][1]
            progress.history = [EpochRecord(**record) for record in state["history"]]
            loss_sum.fill_(state["loss_sum"])
            num_summed, best = state["num_summed"], state["best"]
            own = state["own"] if state["num_shards"] == shard.num else {}
            techniques.load_state_dict(state["techniques"], own, progress.step)
        elif optimizer_state is not None:
            load_optimizer_state(optimizer, optimizer_state)
        model.train()
        outcome = reached(recipe, progress) if progress.step and not num_summed else None
        outcome = (state or {}).get("asked") or outcome  # by who watched it
        while outcome is None and progress.step < progress.num_steps:
            turn, batch = divmod(progress.step, per_turn)
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
                objective.seed(derive_seed(seed, "objective", shard.rank, progress.step))
            rate = learning_rate_at(recipe, progress.step, num_steps=progress.num_steps, span=schedule_span)
            rate *= techniques.rate_scale
            for group, share in zip(optimizer.param_groups, shares, strict=True):
                group["lr"] = rate * share
            inputs, targets = next(batches)
            techniques.before_forward(rate, progress.step)
            for parameter in parameters:
                parameter.grad = None  # as zero_grad(), which takes 8 µs of a CPU thread more
            weight = shard.num / batch_sizes[batch]  # where shards are, their gradients are averaged
            if num_parts == 1:
                outputs = forward_and_backward(inputs, targets, weight)
            else:
                outputs = in_parts(forward_and_backward, inputs, targets, weight, num_parts=num_parts, network=network)
            shard.check_gradients(parameters)
            techniques.after_backward()
            scaler.unscale_(optimizer)
            if recipe.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, recipe.clip_norm)
            scaler.step(optimizer)  # not one whose gradients are not finite
            scaler.update()

            num_summed += batch_sizes[batch]
            num_seen += batch_sizes[batch]
            progress.step += 1
            techniques.after_step(progress.step, outputs, targets, batch_sizes[batch])
            progress.epoch_ended = progress.step % per_turn == 0 or progress.step == progress.num_steps
            if progress.epoch_ended:
                mean = shard.sum(loss_sum).item() / num_summed
                values = [p.detach() for p in parameters if p.requires_grad]
                if not torch.nn.utils.get_total_norm(values, norm_type=math.inf).isfinite():
                    mean = math.nan  # it is the last step that went too far, which no loss has seen
                progress.history.append(EpochRecord(progress.epoch, mean, rate, progress.step))
                loss_sum, num_summed = torch.zeros_like(loss_sum), 0
                outcome = reached(recipe, progress)
                if outcome == "diverged":
                    if not best:
                        raise diverged_at_once(mean, recipe)
                    model.load_state_dict(best["model"])
                    techniques.close()
                    optimizer = make_optimizer(model, recipe)  # the old one's moments may be NaN
                else:
                    techniques.end_epoch(progress.step, last=bool(outcome) or progress.step == progress.num_steps)
                    if not best or mean < best["loss"]:
                        best = {"loss": mean, "model": {k: v.detach().clone() for k, v in model.state_dict().items()}}
            progress.cost, progress.summed = cost(), (loss_sum, num_summed / shard.num)
            if on_step is not None and (asked := on_step(progress)) and outcome is None:
                outcome = asked if isinstance(asked, str) else "stopped"
    optimizer.zero_grad()
    techniques.close()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return MinimizeResult(outcome or "epochs", tuple(progress.history), cost(), optimizer.state_dict())


def _seed_noise(device: torch.device, seed: int) -> None:
    """Seed what dropout draws from: every step anew, so that a resumed run needs no random state to be saved."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
