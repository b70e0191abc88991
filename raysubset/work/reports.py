"""Report: how far a minimization is, as a process tells it to the driver."""

import math
from dataclasses import dataclass

from raysubset import events
from raysubset.errors import per_second
from raysubset.training import Cost, Progress


@dataclass(frozen=True)
class Report:
    """The progress of a process's current work."""

    epoch: float
    num_epochs: float
    loss: float  # of the last complete epoch
    running_loss: float  # of the epoch so far; NaN before its first step
    examples_per_s: float
    cost: Cost

    @classmethod
    def of(cls, progress: Progress) -> "Report":
        """Return the report of a minimization's progress, which may go on meanwhile."""
        cost = progress.cost
        per_s = cost.num_forward / max(cost.device_s, 1e-9)
        num_epochs = progress.num_steps / progress.num_steps_per_epoch
        losses = (progress.loss, progress.running_loss())
        return cls(progress.epoch, num_epochs, *losses, per_s, cost)

    def event(
        self, attempt: events.Attempt, *, worker: int | None = None, measured: tuple[int, int] | None = None
    ) -> events.Progress:
        """Return the event that tells of it.

        Args:
            worker: rank of a Ray Train worker, whose losses are those of its share.
            measured: of its process's pulse.
        """
        loss, running_loss = (number if math.isfinite(number) else None for number in (self.loss, self.running_loss))
        who = attempt.label if worker is None else f"{attempt.label}, worker {worker}"
        loss_text = "" if running_loss is None else f", loss {running_loss:.4f}"
        speed = per_second(self.examples_per_s)
        text = f"{who}: epoch {self.epoch:.1f} of {self.num_epochs:g}{loss_text}, {speed} examples/s"
        if measured:
            text = f"{who} is measured; {measured[0]} of {measured[1]} examples"
        whole_loss = loss if worker is None else None
        numbers = (self.epoch, self.num_epochs, whole_loss, self.examples_per_s, running_loss)
        return events.Progress(text, attempt, *numbers, worker=worker, measured=measured)
