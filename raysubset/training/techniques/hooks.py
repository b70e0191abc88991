"""Techniques: the hooks by which the training loop calls the techniques that a recipe has."""

from typing import Any

import torch
from torch import Tensor, nn

from raysubset.config import MinimizeConfig, derive_seed
from raysubset.costs import BATCH_NORM_EXAMPLES, PASSING_EXAMPLES
from raysubset.data import Batches
from raysubset.training.evaluation import recompute_batch_norm
from raysubset.training.records import Progress
from raysubset.training.shards import Shard
from raysubset.training.techniques.averaging import Averaging
from raysubset.training.techniques.extrapolation import Extrapolation
from raysubset.training.techniques.skipping import Skipping


class Techniques:
    """Applies extrapolation, averaging and skipping if the recipe has them; without any, every hook does nothing.

    Attributes:
        num_forward: examples passed forward besides the steps, by all workers in this call.
        num_skipped: examples whose backward pass left out the weights, in this call.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: Batches,
        recipe: MinimizeConfig,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        *,
        seed: int,
        shard: Shard,
    ) -> None:
        self._model, self._examples, self._recipe, self._seed, self._shard = model, examples, recipe, seed, shard
        self.num_forward = self.num_skipped = 0
        self._extrapolation = self._averaging = self._skipping = None
        if recipe.extrapolation.kind != "none":
            self._extrapolation = Extrapolation(recipe.extrapolation, optimizer, seed=seed, rank=shard.rank)
        if recipe.averaging.kind != "none":
            steps = {"num_steps": progress.num_steps, "num_steps_per_epoch": progress.num_steps_per_epoch}
            self._averaging = Averaging(recipe.averaging, model, **steps)
        if recipe.skipping.kind != "none":
            per_epoch = progress.num_steps_per_epoch
            self._skipping = Skipping(recipe.skipping, model, examples.task, shard, num_steps_per_epoch=per_epoch)
        self._averages_gradients = shard.num > 1 and (
            recipe.objective is not None  # it may call parts of the network, or all of it several times
            or self._skipping is not None
            or (self._extrapolation is not None and self._extrapolation.differs_by_worker)
        )

    def data_parallel(self, device: torch.device) -> nn.Module:
        """Return the model to pass forward through.

        DistributedDataParallel hides a worker's own gradient, and hangs on a parameter that stops having one. If
        either matters, the plain model is returned and after_backward() averages the gradients.
        """
        if self._averages_gradients:
            return self._model
        return self._shard.data_parallel(self._model, device, as_bfloat16=self._recipe.gradients == "bfloat16")

    @property
    def rate_scale(self) -> float:
        """Factor of the schedule's learning rate."""
        return self._skipping.rate_scale if self._skipping else 1.0

    def before_forward(self, rate: float, step: int) -> None:
        if self._extrapolation:
            self._extrapolation.look_ahead(rate, step)

    def after_backward(self) -> None:
        """Put back the weights from which the optimizer steps, and average the gradients over the workers."""
        if self._extrapolation:
            self._extrapolation.come_back(self._average_gradients)
        else:
            self._average_gradients()

    def _average_gradients(self) -> None:
        if self._averages_gradients:
            as_bfloat16 = self._recipe.gradients == "bfloat16"
            self._shard.average_gradients(self._model.parameters(), as_bfloat16=as_bfloat16)

    def after_step(self, step: int, outputs: Tensor, targets: Tensor, num_examples: int) -> None:
        """Args as Skipping.after_step()."""
        if self._averaging:
            self._averaging.after_step(step)
        if self._skipping:
            self.num_skipped += num_examples * self._skipping.is_frozen
            self._skipping.after_step(step, outputs, targets, num_examples)

    def end_epoch(self, step: int, *, last: bool) -> None:
        """Average the weights if that is due, and recompute the averaged weights' batch-norm statistics.

        All workers pass the same examples forward, augmented as in training.
        """
        if self._averaging and self._averaging.end_epoch(step, last=last):
            num = min(BATCH_NORM_EXAMPLES if last else PASSING_EXAMPLES, len(self._examples))
            seed = derive_seed(self._seed, "batch_norm")
            num = recompute_batch_norm(self._model, self._examples, self._recipe, num_sampled=num, seed=seed)
            self.num_forward += self._shard.num * num

    def close(self) -> None:
        """Thaw frozen weights, so that all parameters of the model learn."""
        if self._skipping:
            self._skipping.thaw()

    def state_dict(self) -> dict[str, Any]:
        """Return the state that is the same for all workers: plain values and tensors, not copied."""
        state = {}
        if self._extrapolation and not self._extrapolation.differs_by_worker:
            state["extrapolation"] = self._extrapolation.state_dict()
        if self._averaging:
            state["averaging"] = self._averaging.state_dict()
        if self._skipping:
            state["skipping"] = self._skipping.state_dict()
        return state

    def worker_state_dict(self) -> dict[str, Any]:
        """Return the state of this worker alone, which may be empty."""
        state = {}
        if self._extrapolation and self._extrapolation.differs_by_worker:
            state["extrapolation"] = self._extrapolation.state_dict()
        if self._skipping:
            state["skipping"] = self._skipping.worker_state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any], worker_state: dict[str, Any], step: int) -> None:
        """Resume from both states; `worker_state` is empty if the number of workers has changed.

        Extrapolation then begins without a last gradient, and skipping with a new window.
        """
        if self._extrapolation and (extrapolation := (state | worker_state).get("extrapolation")):
            self._extrapolation.load_state_dict(extrapolation)
        if self._averaging:
            self._averaging.load_state_dict(state["averaging"])
        if self._skipping:
            self._skipping.load_state_dict(state["skipping"], worker_state.get("skipping"), step)
