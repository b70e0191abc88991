"""minimize(): the one training loop, for subsets, trunk, fine-tuning and conventional runs alike."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from raysubset.config import WHOLE_SUBSET, MinimizeConfig, derive_seed
from raysubset.data import Batches, Examples, even_sizes
from raysubset.training.devices import mixed_precision
from raysubset.training.evaluation import summed_loss, widened
from raysubset.training.optimizers import learning_rate_at, load_optimizer_state, make_optimizer
from raysubset.training.records import Cost, DivergedError, EpochRecord, MinimizeResult
from raysubset.training.shards import Shard
from raysubset.training.techniques import Distillation, Techniques

DIVERGENCE = 10.0  # an epoch's loss this many times the first epoch's is given up on


@dataclass
class Progress:
    """Where a minimization stands; on_step sees it after every step and must not change it."""

    num_steps: int  # of the whole minimization
    num_steps_per_epoch: int
    step: int = 0  # steps done, also before a resume
    cost: Cost = field(default_factory=Cost)  # of this call so far, of all shards together
    epoch_ended: bool = False  # whether this step closed an epoch, a turn of epoch_fraction, or the last part of one
    history: list[EpochRecord] = field(default_factory=list)
    capture: Callable[[], dict[str, Any]] = dict
    """Everything a later call needs as `state`: tensors and plain values, not copied, so write them down at once.

    With several shards any one worker's will do for all, the weights being the same, if the others are given their own
    "own" in it where that is not empty. Within an epoch its part of the loss so far stands for all parts, so the
    history of a job resumed there may differ in that one number.
    """

    @property
    def epoch(self) -> float:
        """Epochs done."""
        return self.step / self.num_steps_per_epoch

    @property
    def loss(self) -> float:
        """Mean training loss of the last whole epoch; NaN before."""
        return self.history[-1].loss if self.history else math.nan


OnStep = Callable[[Progress], bool | None]


def num_steps_per_epoch(num_examples: int, config: MinimizeConfig) -> int:
    """Batches an epoch is cut into: all but equal in size, so that none is too small for batch normalisation."""
    return math.ceil(num_examples / config.batch_size)


def minimize(
    model: nn.Module,
    examples: Batches,
    config: MinimizeConfig,
    *,
    seed: int,
    state: dict[str, Any] | None = None,
    optimizer_state: dict[str, Any] | None = None,
    schedule_span: tuple[float, float] = (0.0, 1.0),
    shard: Shard | None = None,
    distillation: Distillation | None = None,
    on_step: OnStep | None = None,
) -> MinimizeResult:
    """Minimize the recipe's loss over the examples, changing the model in place.

    Order, augmentation and dropout depend on the seed and the epoch alone, so the same call gives the same bits on one
    device type and thread count, also when it was stopped and resumed in the middle of an epoch.

    Args:
        model: on the examples' device; every worker has one of its own, with the same weights.
        examples: every worker holds or streams all of them, and computes its share of each batch.
        config: the recipe; whole-subset optimizers go to minimize_whole().
        seed: of order, augmentation, dropout and noise.
        state: what Progress.capture() gave, to go on from there.
        optimizer_state: momenta to start with when there is no `state` (a member's next round).
        schedule_span: the part of the schedule that this call covers, as shares of it.
        shard: this worker's share of each batch. The sum of the shares' gradients is the whole batch's gradient.
        distillation: an ensemble to learn from as well; the history's losses are then of both.
        on_step: called after every step; returning True ends the call with the outcome "stopped". Where weights are
            averaged it sees the average at epochs' ends if the run goes on from it, and always at the very end.

    Returns:
        The outcome. On divergence the weights of the epoch with the least loss are restored, the optimizer's state is
        a new one.

    Raises:
        DivergedError: if the loss was not finite in the first epoch already.
        ValueError: if there are more workers than examples in a batch, optimizer, precision or a technique does not
            fit, or streamed examples cannot be read.
    """
    shard = shard or Shard()
    if config.optimizer in WHOLE_SUBSET:
        from raysubset.training.whole_subset import minimize_whole

        assert optimizer_state is None, "whole-subset optimizers keep no state over rounds"
        assert distillation is None, "whole-subset optimizers minimize the recipe's loss alone"
        if shard.num > 1:
            raise ValueError(
                f"{config.optimizer} works in one process, not in {shard.num} workers: set num_workers=1, or use sgd"
            )
        if not isinstance(examples, Examples):
            raise ValueError(
                f"{config.optimizer} passes over all {len(examples)} examples at every step, and they are streamed: "
                "use sgd, adam or adamw, or leave --data.streamed out"
            )
        return minimize_whole(model, examples, config, state=state, on_step=on_step)
    started = time.perf_counter()
    device, dtype = examples.device, next(model.parameters()).dtype
    per_epoch = num_steps_per_epoch(len(examples), config)
    batch_sizes = even_sizes(len(examples), per_epoch)[: max(1, round(config.epoch_fraction * per_epoch))]
    per_turn = len(batch_sizes)  # an epoch's steps, unless epoch_fraction cuts it short
    if batch_sizes[-1] < shard.num:
        raise ValueError(f"batches of {batch_sizes[-1]} examples cannot be shared by {shard.num} workers: use fewer")
    progress = Progress(max(1, round(config.epochs * per_epoch)), per_epoch)
    optimizer = make_optimizer(model, config)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    steps = {"num_steps": progress.num_steps, "num_steps_per_epoch": per_epoch}
    techniques = Techniques(model, examples, config, optimizer, **steps, seed=seed, shard=shard)
    network = techniques.data_parallel(device)
    forward = torch.compile(network) if config.compile else network
    precision = mixed_precision(device, dtype, config.precision)
    sum_dtype = torch.float32 if device.type == "mps" else torch.float64
    loss_sum = torch.zeros((), dtype=sum_dtype, device=device)
    num_summed = 0  # examples in loss_sum, over all shards
    best: dict[str, Any] = {}
    batches, targets = None, None
    num_seen = first_step = 0

    def capture() -> dict[str, Any]:
        return {
            "position": [progress.step // per_epoch, progress.step],
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
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
        num_backward = num_seen - techniques.num_skipped // 2  # half of a backward pass is the weights' gradients
        return Cost(num_seen + num_taught + techniques.num_forward, num_backward, progress.step - first_step, held_s)

    progress.capture = capture
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if state is not None:
            model.load_state_dict(state["model"])
            load_optimizer_state(optimizer, state["optimizer"])
            first_step = progress.step = state["position"][1]
            progress.history = [EpochRecord(**record) for record in state["history"]]
            loss_sum.fill_(state["loss_sum"])
            num_summed, best = state["num_summed"], state["best"]
            own = state["own"] if state["num_shards"] == shard.num else {}
            techniques.load_state_dict(state["techniques"], own, progress.step)
        elif optimizer_state is not None:
            load_optimizer_state(optimizer, optimizer_state)
        model.train()
        outcome = reached(config, progress) if progress.step and not num_summed else None
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
                    channels_last=config.channels_last,
                    dtype=dtype,
                )
            _seed_noise(device, derive_seed(seed, "noise", shard.rank, progress.step))
            rate = learning_rate_at(config, progress.step, num_steps=progress.num_steps, span=schedule_span)
            rate *= techniques.rate_scale
            for group in optimizer.param_groups:
                group["lr"] = rate
            images, labels = next(batches)
            techniques.before_forward(rate, progress.step)
            with precision:
                outputs = forward(images)
                if distillation is not None:
                    targets = distillation.targets(images, config.loss)
            loss = summed_loss(widened(outputs), labels, config)
            if distillation is not None and targets is not None:
                loss = distillation.mixed(loss, widened(outputs), targets, config)
            for parameter in parameters:
                parameter.grad = None  # as zero_grad(), which takes 8 µs of a CPU thread more
            # Where shards are, their gradients are averaged.
            loss.backward(torch.full_like(loss, shard.num / batch_sizes[batch]))
            shard.check_gradients(parameters)
            techniques.after_backward()
            optimizer.step()

            loss_sum += loss.detach()
            num_summed += batch_sizes[batch]
            num_seen += batch_sizes[batch]
            progress.step += 1
            techniques.after_step(progress.step, outputs.detach(), labels, batch_sizes[batch])
            progress.epoch_ended = progress.step % per_turn == 0 or progress.step == progress.num_steps
            if progress.epoch_ended:
                mean = shard.sum(loss_sum).item() / num_summed
                if not _is_finite(model):
                    mean = math.nan  # it is the last step that went too far, which no loss has seen
                progress.history.append(EpochRecord(progress.epoch, mean, rate, progress.step))
                loss_sum.zero_()
                num_summed = 0
                outcome = reached(config, progress)
                if outcome == "diverged":
                    _restore(model, best, mean, config)
                    techniques.close()
                    optimizer = make_optimizer(model, config)  # the old one's moments may be NaN
                else:
                    techniques.end_epoch(progress.step, last=bool(outcome) or progress.step == progress.num_steps)
                    if not best or mean < best["loss"]:
                        best = {"loss": mean, "model": {k: v.detach().clone() for k, v in model.state_dict().items()}}
            progress.cost = cost()
            if on_step is not None and on_step(progress) and outcome is None:
                outcome = "stopped"
    optimizer.zero_grad()
    techniques.close()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return MinimizeResult(outcome or "epochs", tuple(progress.history), cost(), optimizer.state_dict())


def reached(config: MinimizeConfig, progress: Progress) -> str | None:
    """The outcome that the last epoch's loss calls for, if any."""
    losses = [record.loss for record in progress.history]
    if not math.isfinite(losses[-1]) or losses[-1] > DIVERGENCE * max(losses[0], 1e-12):
        return "diverged"
    if config.target_loss is not None and losses[-1] <= config.target_loss:
        return "target"
    if config.tolerance is not None and len(losses) > 1 and losses[-2] - losses[-1] < config.tolerance * losses[-2]:
        return "tolerance"
    return None


def _is_finite(model: nn.Module) -> bool:
    """Whether every trainable parameter is a finite number."""
    parameters = [p.detach() for p in model.parameters() if p.requires_grad]
    return bool(torch.nn.utils.get_total_norm(parameters, norm_type=math.inf).isfinite())


def _restore(model: nn.Module, best: dict[str, Any], loss: float, config: MinimizeConfig) -> None:
    if not best:
        raise diverged_at_once(loss, config)
    model.load_state_dict(best["model"])


def diverged_at_once(loss: float, config: MinimizeConfig) -> DivergedError:
    """What there is to say when there are no weights to go back to."""
    return DivergedError(
        f"the loss became {loss:g} in epoch 1 with a peak learning rate of {config.peak_learning_rate():g}: lower "
        "the learning rate, or use --minimize.schedule=warmup_linear"
    )


def _seed_noise(device: torch.device, seed: int) -> None:
    """Seed what dropout draws from: every step anew, so that a resumed run needs no random state to be saved."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
