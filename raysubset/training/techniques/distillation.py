"""Distillation of an ensemble (Hinton et al. 2015, arXiv:1503.02531): its predictions as a part of the loss."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raysubset.tasks import Task
from raysubset.training.evaluation import widened


class Distillation:
    """The loss (1 − share) · task's + share · distance from the teachers' mean prediction.

    Under cross-entropy the distance is T² · KL(ensemble ‖ model), both at temperature T. The ensemble's prediction is
    the mean of its members' probabilities. Under squared error it is the squared distance from their mean outputs, just
    as the task's loss is from the targets.

    Args:
        teachers: networks on the device of the examples, put into evaluation mode. Each costs a forward pass.
        share: in [0, 1].
        temperature: T.
    """

    def __init__(self, teachers: Sequence[nn.Module], *, share: float, temperature: float) -> None:
        self._teachers = [teacher.eval() for teacher in teachers]
        self._share, self._temperature, self.num_teachers = share, temperature, len(teachers)

    @torch.no_grad()
    def targets(self, inputs: Tensor, task: Task) -> Tensor:
        """Return the ensemble's outputs [n, …] for a batch; under cross-entropy they are log-probabilities."""
        return task.combine(widened(teacher(inputs)) for teacher in self._teachers)

    def mixed(self, loss: Tensor, outputs: Tensor, targets: Tensor, task: Task) -> Tensor:
        """Return the mixed loss, summed over the batch as `loss` is, of the model's outputs and targets() [n, …]."""
        return (1 - self._share) * loss + self._share * task.distance(outputs, targets, temperature=self._temperature)
