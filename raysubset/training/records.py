"""Records of a minimization: its progress, its result, and metrics as sums."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from raysubset.config import MinimizeConfig
from raysubset.costs import Cost
from raysubset.tasks import Task, errors_of

Weights = dict[str, Tensor]  # a state dict on the CPU

DIVERGENCE = 10.0  # a minimization ends once an epoch's loss is this many times the first epoch's

Measure = Literal["training", "validation"]
MEASURES: tuple[Measure, ...] = ("training", "validation")  # the data that weights can be measured on before the end


class LeftOutError(RuntimeError):
    """A step of several workers left a parameter without a gradient, which DistributedDataParallel waits for."""


class DivergedError(ValueError):
    """The loss stopped being a finite number before any epoch ended, so there are no weights to restore."""


@dataclass(frozen=True)
class Metrics:
    """Sums over examples, and the means that follow from them."""

    loss_sum: float
    num_examples: int
    sums: dict[str, Any]  # tasks.sums_of(): num_x and x_sum, numbers or lists
    values: dict[str, float]  # the task's qualities by name, its values(), and x_error of a mean x

    @classmethod
    def of_sums(cls, task: Task, loss_sum: float, sums: dict[str, Any], num_examples: int) -> "Metrics":
        """Return the metrics, with the qualities that the task computes from the sums."""
        return cls(loss_sum, num_examples, sums, task.values(sums, num_examples) | errors_of(sums, num_examples))

    @property
    def loss(self) -> float:
        """Mean loss of an example."""
        return self.loss_sum / self.num_examples

    @property
    def compared_loss(self) -> float:
        """The loss by which the best weights are chosen: infinity where it is not finite, as nothing is below NaN."""
        return self.loss if math.isfinite(self.loss) else math.inf

    @property
    def accuracy(self) -> float:
        """The accuracy, in [0, 1], of a task that has one."""
        return self.values["accuracy"]

    def to_dict(self) -> dict[str, Any]:
        """Return the sums, and beside them the means for readers of the JSON."""
        head = {"loss_sum": self.loss_sum, **self.sums, "num_examples": self.num_examples}
        return {**head, "loss": self.loss, **self.values}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Metrics":
        """Invert to_dict(). Numbers that were not finite are null in JSON; they become NaN."""
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
    loss: float  # mean over the epoch's examples, while training; NaN if the weights at its end are not finite
    learning_rate: float  # at the epoch's last step
    num_steps: int  # optimizer steps done so far

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class MinimizeResult:
    """The end of a minimization. The model itself was changed in place."""

    # "epochs", "tolerance", "gradient" (within its tolerance), "target", "diverged" (best weights restored), "stopped",
    # "validation" (patience ran out)
    outcome: str
    history: tuple[EpochRecord, ...]  # from the first epoch, also when resumed
    cost: Cost  # of this call alone, of all shards together
    optimizer: dict[str, Any]  # the optimizer's state dict


@dataclass
class Progress:
    """The state of a minimization. on_step() receives it after every step and must not change it."""

    num_steps: int  # of the whole minimization
    num_steps_per_epoch: int
    step: int = 0  # steps done, also before a resume
    cost: Cost = field(default_factory=Cost)  # of this call so far, of all shards together
    epoch_ended: bool = False  # True if this step ended an epoch, even one cut short by epoch_fraction or the end
    history: list[EpochRecord] = field(default_factory=list)
    summed: tuple[Tensor | float, float] = (0.0, 0)
    """(sum of the losses, number of examples) of the epoch so far. Other threads read it. It is therefore replaced
    after each step, and the sum's tensor is never written to again."""
    validation: "Metrics | None" = None  # at the present weights, if the minimization has measured them itself
    capture: Callable[[], dict[str, Any]] = dict
    """Return all that a later call needs as `state`: tensors and plain values, not copied, so write them at once.

    With several shards the state of any one worker serves all, because the weights are the same. Only "own", if not
    empty, must be replaced by each worker's. Within an epoch that worker's part of the loss so far stands for all
    parts, so the history of a job resumed there may differ in that one number.
    """

    def with_capture(self, capture: Callable[[], dict[str, Any]]) -> "Progress":
        """Return a copy for on_step(). If the loop's own had capture(), which needs it, both would hold the network and
        the optimizer after the end, until Python looks for cycles: a card has no room for two."""
        return replace(self, capture=capture)

    def state_dict(self) -> dict[str, Any]:
        """Return what the checkpoints of every loop hold. `position` orders them."""
        return {"position": [int(self.epoch), self.step], "history": [record.to_dict() for record in self.history]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a checkpoint."""
        self.step, self.history = state["position"][1], [EpochRecord(**record) for record in state["history"]]

    def record_epoch(self, loss: float, learning_rate: float) -> None:
        """Add an epoch that ends at this step to the history."""
        self.history.append(EpochRecord(self.epoch, loss, learning_rate, self.step))

    @property
    def epoch(self) -> float:
        """Epochs done."""
        return self.step / self.num_steps_per_epoch

    @property
    def loss(self) -> float:
        """Mean training loss of the last complete epoch; NaN before there is one."""
        return self.history[-1].loss if self.history else math.nan

    def running_loss(self) -> float:
        """Mean training loss of the epoch so far, of this shard; NaN before the first step. Any thread may call it."""
        total, num = self.summed
        return float(total) / num if num else math.nan


OnStep = Callable[[Progress], bool | str | None]


def num_steps_per_epoch(num_examples: int, recipe: MinimizeConfig) -> int:
    """Return the number of batches of an epoch. They are nearly equal in size, so that batch norm sees no tiny one."""
    return math.ceil(num_examples / recipe.batch_size)


def reached(recipe: MinimizeConfig, progress: Progress) -> str | None:
    """Return the outcome that the last epoch's loss calls for, or None."""
    losses = [record.loss for record in progress.history]
    scale = max(abs(losses[0]), 1e-12)  # the loss of a user's objective may be negative
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
    """Return the error to raise if there are no weights to restore."""
    return DivergedError(
        f"the loss became {loss:g} in epoch 1 with a peak learning rate of {recipe.peak_learning_rate():g}: lower "
        "the learning rate (raysubset find-rate measures some), or use --minimize.schedule=warmup_linear"
    )
