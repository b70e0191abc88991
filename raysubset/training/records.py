"""Where a minimization stands, and what comes of it: weights, and metrics as sums."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch import Tensor

from raysubset.config import MinimizeConfig
from raysubset.costs import Cost
from raysubset.tasks import Task, errors_of

Weights = dict[str, Tensor]  # a state dict on the CPU

DIVERGENCE = 10.0  # an epoch's loss this many times the first epoch's is given up on

Measure = Literal["training", "validation"]
MEASURES: tuple[Measure, ...] = ("training", "validation")  # what weights can be measured on before the end


class LeftOutError(RuntimeError):
    """A step of several workers left out a parameter, of which nobody told DistributedDataParallel."""


class DivergedError(ValueError):
    """The loss stopped being a finite number before any epoch ended, so there are no weights to go back to."""


@dataclass(frozen=True)
class Metrics:
    """Sums over examples, and what follows from them."""

    loss_sum: float
    num_examples: int
    sums: dict[str, Any]  # tasks.sums_of(): num_x and x_sum, numbers or lists
    values: dict[str, float]  # the task's qualities by name, its values(), and x_error of a mean x

    @classmethod
    def of_sums(cls, task: Task, loss_sum: float, sums: dict[str, Any], num_examples: int) -> "Metrics":
        """Metrics whose qualities the task makes of the sums."""
        return cls(loss_sum, num_examples, sums, task.values(sums, num_examples) | errors_of(sums, num_examples))

    @property
    def loss(self) -> float:
        """Mean loss of an example."""
        return self.loss_sum / self.num_examples

    @property
    def accuracy(self) -> float:
        """The accuracy, in [0, 1], of a task that has one."""
        return self.values["accuracy"]

    def to_dict(self) -> dict[str, Any]:
        """The sums, and the quotients for the reader of the JSON."""
        head = {"loss_sum": self.loss_sum, **self.sums, "num_examples": self.num_examples}
        return {**head, "loss": self.loss, **self.values}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Metrics":
        """The inverse of to_dict(); what was not finite has become null in JSON and is NaN again."""
        numbers = {key: math.nan if value is None else value for key, value in record.items()}
        head = ("loss_sum", "num_examples", "loss")
        named = {key: key.startswith("num_") or key.endswith("_sum") for key in numbers}
        sums = {key: value for key, value in numbers.items() if named[key] and key not in head}
        values = {key: value for key, value in numbers.items() if key not in (*head, *sums)}
        return cls(numbers["loss_sum"], record["num_examples"], sums, values)


@dataclass(frozen=True)
class EpochRecord:
    """One line of a training curve."""

    epoch: float  # epochs done, of the examples minimized on
    loss: float  # mean over the epoch's examples, while training; NaN if it ended at weights that are not finite
    learning_rate: float  # at the epoch's last step
    num_steps: int  # optimizer steps done so far

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class MinimizeResult:
    """How a minimization ended; the model itself was changed in place."""

    # "epochs", "tolerance", "gradient" (within its tolerance), "target", "diverged" (best weights restored), "stopped",
    # "validation" (patience has run out)
    outcome: str
    history: tuple[EpochRecord, ...]  # from the first epoch, also when resumed
    cost: Cost  # of this call alone, of all shards together
    optimizer: dict[str, Any]  # the optimizer's state dict


@dataclass
class Progress:
    """Where a minimization stands; on_step sees it after every step and must not change it."""

    num_steps: int  # of the whole minimization
    num_steps_per_epoch: int
    step: int = 0  # steps done, also before a resume
    cost: Cost = field(default_factory=Cost)  # of this call so far, of all shards together
    epoch_ended: bool = False  # whether this step closed an epoch, a turn of epoch_fraction, or the last part of one
    history: list[EpochRecord] = field(default_factory=list)
    summed: tuple[Tensor | float, float] = (0.0, 0)
    """The sum of the losses of an epoch so far, and of how many examples. Other threads read it: it is replaced after
    each step, and the sum is never written to again."""
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

    def running_loss(self) -> float:
        """Mean training loss of the epoch so far, with shards that of one; NaN before its first step, and for any
        thread that asks."""
        total, num = self.summed
        return float(total) / num if num else math.nan


OnStep = Callable[[Progress], bool | str | None]


def num_steps_per_epoch(num_examples: int, recipe: MinimizeConfig) -> int:
    """Batches an epoch is cut into: all but equal in size, so that none is too small for batch normalisation."""
    return math.ceil(num_examples / recipe.batch_size)


def reached(recipe: MinimizeConfig, progress: Progress) -> str | None:
    """The outcome that the last epoch's loss calls for, if any."""
    losses = [record.loss for record in progress.history]
    scale = max(abs(losses[0]), 1e-12)  # a loss of the user's own may be below 0
    if not math.isfinite(losses[-1]) or losses[-1] > losses[0] + (DIVERGENCE - 1) * scale:
        return "diverged"
    if recipe.target_loss is not None and losses[-1] <= recipe.target_loss:
        return "target"
    if (
        recipe.tolerance is not None
        and len(losses) > 1
        and losses[-2] - losses[-1] < recipe.tolerance * abs(losses[-2])
    ):
        return "tolerance"
    return None


def diverged_at_once(loss: float, recipe: MinimizeConfig) -> DivergedError:
    """What there is to say when there are no weights to go back to."""
    return DivergedError(
        f"the loss became {loss:g} in epoch 1 with a peak learning rate of {recipe.peak_learning_rate():g}: lower "
        "the learning rate, or use --minimize.schedule=warmup_linear"
    )
