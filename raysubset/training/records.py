"""What the loop returns: weights, metrics as sums, and costs as counts."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor

from raysubset.config import from_tree

Weights = dict[str, Tensor]  # a state dict on the CPU

Measure = Literal["training", "validation"]
MEASURES: tuple[Measure, ...] = ("training", "validation")  # what weights can be measured on before the end

FORWARD_SHARE = 1 / 3  # of a pass, of deep networks: a backward pass costs about twice a forward pass


class LeftOutError(RuntimeError):
    """A step of several workers left out a parameter, of which nobody told DistributedDataParallel."""


class DivergedError(ValueError):
    """The loss stopped being a finite number before any epoch ended, so there are no weights to go back to."""


@dataclass(frozen=True)
class Metrics:
    """Sums over examples, divided once: metrics of parts may be added."""

    loss_sum: float
    num_correct: int
    num_examples: int

    @property
    def loss(self) -> float:
        """Mean loss of an example."""
        return self.loss_sum / self.num_examples

    @property
    def accuracy(self) -> float:
        """Top-1, in [0, 1]."""
        return self.num_correct / self.num_examples

    def __add__(self, other: "Metrics") -> "Metrics":
        return Metrics(
            self.loss_sum + other.loss_sum, self.num_correct + other.num_correct, self.num_examples + other.num_examples
        )

    def to_dict(self) -> dict[str, Any]:
        """The sums, and the two quotients for the reader of the JSON."""
        return {**asdict(self), "loss": self.loss, "accuracy": self.accuracy}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Metrics":
        """The inverse of to_dict(); a loss that was not finite has become null in JSON and is NaN again."""
        loss_sum = record["loss_sum"]
        return cls(math.nan if loss_sum is None else loss_sum, record["num_correct"], record["num_examples"])


@dataclass(frozen=True)
class Cost:
    """Work done, in counts that can be added; passes() makes them comparable between methods."""

    num_forward: int = 0  # examples passed forward
    num_backward: int = 0  # examples passed backward
    num_steps: int = 0  # optimizer steps
    device_s: float = 0.0  # seconds devices were held, summed over devices

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.num_forward + other.num_forward,
            self.num_backward + other.num_backward,
            self.num_steps + other.num_steps,
            self.device_s + other.device_s,
        )

    def passes(self, num_train: int, forward_share: float = FORWARD_SHARE) -> float:
        """Return forward and backward work over as many examples as the full set has.

        Args:
            num_train: examples of the full set.
            forward_share: what forward alone counts: the network's own, training.forward_share().
        """
        return (forward_share * self.num_forward + (1 - forward_share) * self.num_backward) / num_train

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Any) -> "Cost":
        """The inverse of to_dict(); ValueError for what is none."""
        return from_tree(cls, record, noun="value of a cost")


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

    # "epochs", "tolerance", "gradient" (within its tolerance), "target", "diverged" (best weights restored), "stopped"
    outcome: str
    history: tuple[EpochRecord, ...]  # from the first epoch, also when resumed
    cost: Cost  # of this call alone, of all shards together
    optimizer: dict[str, Any]  # the optimizer's state dict
