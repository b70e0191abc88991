"""Weight Update Skipping, WUS and WUS+LR (arXiv:2012.02792): while accuracy hardly improves, only biases move.

Measured, the time that it saves costs accuracy (jobs/tasks/sisters.py).

Written from the abstract, which has the principle; the rule is our own. Training accuracy (of other tasks, the value of
their watched()) is that of the batches as they come, over windows. A new window begins after the last, and at every
change:

    moving   a window that is less than `threshold` better than the one before freezes the weights
    frozen   for `epochs`; or until a window is worse than the one that froze them by more than `drop`

Weights are the tensors of two dimensions and more; biases and normalisation parameters are never frozen. WUS+LR
multiplies the learning rate by `decay` at each freeze, for good.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from raysubset.config import SkippingConfig
from raysubset.tasks import Task
from raysubset.training.devices import widest_dtype
from raysubset.training.shards import Shard


class Skipping:
    """Watches training accuracy, and freezes and thaws a model's weights.

    A frozen weight needs no gradient and has none, so the optimizer's step leaves it out; its momentum is kept for the
    thaw. All workers decide alike, because the counts are summed over them.

    Raises:
        ValueError: if no parameter of the model would keep moving.
    """

    def __init__(
        self, recipe: SkippingConfig, model: nn.Module, task: Task, shard: Shard, *, num_steps_per_epoch: int
    ) -> None:
        trainable = [p for p in model.parameters() if p.requires_grad]
        self._weights = [p for p in trainable if p.ndim > 1]
        if len(self._weights) == len(trainable):
            raise ValueError(
                f"minimize.skipping.kind={recipe.kind} moves biases and normalisation parameters alone, and the "
                "network has none: leave it out"
            )
        self._convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.bias is not None]
        self._recipe, self._task, self._shard = recipe, task, shard
        self._window = max(1, round(recipe.window * num_steps_per_epoch))
        self._num_frozen_steps = max(1, round(recipe.epochs * num_steps_per_epoch))
        device = trainable[0].device
        self._watched_sum = torch.zeros((), dtype=widest_dtype(device), device=device)  # of this worker's examples
        self._num_examples = 0  # of all workers
        self._window_start = 0  # in steps
        self._previous: float | None = None  # accuracy of the window before
        self._frozen_at: int | None = None  # in steps
        self._reference = 0.0  # accuracy of the window that froze the weights
        self._num_freezes = 0

    @property
    def is_frozen(self) -> bool:
        return self._frozen_at is not None

    @property
    def rate_scale(self) -> float:
        """Factor of the learning rate."""
        return self._recipe.decay**self._num_freezes if self._recipe.kind == "wus_lr" else 1.0

    def after_step(self, step: int, outputs: Tensor, targets: Tensor, num_examples: int) -> None:
        """Count a step, and decide at the end of a window.

        Args:
            outputs: of this worker's part of the batch, [n, …], like the targets.
            num_examples: in the whole batch.
        """
        self._watched_sum += self._task.watched(outputs, targets).sum()
        self._num_examples += num_examples
        if step - self._window_start == self._window:
            self._end_window(step, self._shard.sum(self._watched_sum).item() / self._num_examples)
        if self._frozen_at is not None and step - self._frozen_at >= self._num_frozen_steps:
            self._frozen_at = None
            self._begin_window(step)
            self.thaw()

    def _end_window(self, step: int, accuracy: float) -> None:
        if self._frozen_at is not None:
            if accuracy < self._reference - self._recipe.drop:
                self._frozen_at = None
                self.thaw()
        elif self._previous is not None and accuracy - self._previous < self._recipe.threshold:
            self._frozen_at, self._reference = step, accuracy
            self._num_freezes += 1
            self.freeze()
        self._previous = accuracy
        self._begin_window(step)

    def _begin_window(self, step: int) -> None:
        self._watched_sum.zero_()
        self._num_examples, self._window_start = 0, step

    def freeze(self) -> None:
        for weight in self._weights:
            weight.requires_grad_(False).grad = None
        for convolution in self._convolutions:
            convolution._conv_forward = MethodType(_with_bias_outside, convolution)

    def thaw(self) -> None:
        """Let all weights move, whatever was decided."""
        for weight in self._weights:
            weight.requires_grad_(True)
        for convolution in self._convolutions:
            convolution.__dict__.pop("_conv_forward", None)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that is the same for all workers."""
        return {
            "num_examples": self._num_examples,
            "window_start": self._window_start,
            "previous": self._previous,
            "frozen_at": self._frozen_at,
            "reference": self._reference,
            "num_freezes": self._num_freezes,
        }

    def worker_state_dict(self) -> dict[str, Any]:
        """Return the state of this worker alone."""
        return {"watched_sum": self._watched_sum.item()}

    def load_state_dict(self, state: dict[str, Any], worker_state: dict[str, Any] | None, step: int) -> None:
        """Resume. Without a worker_state, because the number of workers changed, a new window begins."""
        self._previous, self._reference = state["previous"], state["reference"]
        self._frozen_at, self._num_freezes = state["frozen_at"], state["num_freezes"]
        self._begin_window(step)
        if worker_state is not None:
            self._num_examples, self._window_start = state["num_examples"], state["window_start"]
            self._watched_sum.fill_(worker_state["watched_sum"])
        if self.is_frozen:
            self.freeze()


def _with_bias_outside(self: nn.Conv2d, input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve, and add the bias afterwards: the CPU's fused gradients would compute the weight's gradient too."""
    return type(self)._conv_forward(self, input, weight, None) + bias.view(-1, 1, 1)
