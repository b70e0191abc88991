"""What the loop returns: weights, and metrics as sums."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor

from raysubset.costs import Cost
from raysubset.tasks import Task, errors_of

Weights = dict[str, Tensor]  # a state dict on the CPU

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
        sums = {key: value for key, value in numbers.items() if _is_sum(key) and key not in head}
        values = {key: value for key, value in numbers.items() if key not in (*head, *sums)}
        return cls(numbers["loss_sum"], record["num_examples"], sums, values)


def _is_sum(key: str) -> bool:
    return key.startswith("num_") or key.endswith("_sum")


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
