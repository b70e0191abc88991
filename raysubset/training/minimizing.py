"""minimize(): a recipe carried out, by batches or by steps that each see the whole subset."""

from typing import Any

from torch import nn

from raysubset.config import MinimizeConfig
from raysubset.data import Batches, Examples
from raysubset.training.loop import minimize_by_batches
from raysubset.training.own_loop import minimize_by_own_loop
from raysubset.training.progress import OnStep
from raysubset.training.records import MinimizeResult
from raysubset.training.shards import Shard
from raysubset.training.techniques import Distillation
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
        recipe: the recipe; whole-subset optimizers go to minimize_whole(), a loop of the user's to that.
        seed: of order, augmentation, dropout and noise.
        state: what Progress.capture() gave, to go on from there.
        optimizer_state: momenta to start with when there is no `state` (a member's next round).
        schedule_span: the part of the schedule that this call covers, as shares of it.
        shard: this worker's share of each batch. The sum of the shares' gradients is the whole batch's gradient.
        distillation: an ensemble to learn from as well; the history's losses are then of both.
        validation: what minimize.patience looks at.
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
    if loop := recipe.whole_loop:
        assert optimizer_state is None, "other loops keep no state over rounds"
        assert distillation is None, "other loops minimize the task's loss alone"
        if shard.num > 1:
            raise ValueError(f"{loop} works in one process, not in {shard.num} workers: set num_workers=1, or use sgd")
        if not isinstance(examples, Examples):
            raise ValueError(
                f"{loop} has all {len(examples)} examples in memory, and they are streamed: use sgd, adam or adamw, or "
                "leave --data.streamed out"
            )
        if recipe.loop is not None:
            return minimize_by_own_loop(model, examples, recipe, seed=seed, state=state, on_step=on_step)
        return minimize_whole(model, examples, recipe, validation=validation, state=state, on_step=on_step)
    return minimize_by_batches(
        model,
        examples,
        recipe,
        seed=seed,
        state=state,
        optimizer_state=optimizer_state,
        schedule_span=schedule_span,
        shard=shard,
        distillation=distillation,
        on_step=on_step,
    )
