"""Distillation of an ensemble (Hinton et al. 2015, arXiv:1503.02531): its predictions as a part of the loss."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysubset.config import MinimizeConfig
from raysubset.training.evaluation import mean_prediction, widened


class Distillation:
    """The loss (1 − share) · recipe's + share · distance from the teachers' mean prediction.

    Under cross-entropy the distance is T² · KL(ensemble ‖ model), both at temperature T; the ensemble's prediction is
    the mean of its members' probabilities. Under squared error it is the squared distance from their mean outputs, as
    the recipe's loss is from the labels.

    Args:
        teachers: networks on the device of the examples; put into evaluation mode. Every one costs a forward pass.
        share: in [0, 1].
        temperature: T.
    """

    def __init__(self, teachers: Sequence[nn.Module], *, share: float, temperature: float) -> None:
        self._teachers = [teacher.eval() for teacher in teachers]
        self._share, self._temperature = share, temperature

    @property
    def num_teachers(self) -> int:
        return len(self._teachers)

    @torch.no_grad()
    def targets(self, images: Tensor, loss: str) -> Tensor:
        """The ensemble's outputs [n, M] for a batch: log-probabilities for cross-entropy."""
        return mean_prediction((widened(teacher(images)) for teacher in self._teachers), loss)

    def mixed(self, loss: Tensor, outputs: Tensor, targets: Tensor, recipe: MinimizeConfig) -> Tensor:
        """The loss, like `loss` summed over the batch.

        Args:
            loss: the recipe's own, summed.
            outputs: the model's [n, M].
            targets: targets() of the same images.
            recipe: the recipe.
        """
        if recipe.loss == "cross_entropy":
            student, teacher = ((values / self._temperature).log_softmax(1) for values in (outputs, targets))
            distance = F.kl_div(student, teacher, reduction="sum", log_target=True) * self._temperature**2
        else:
            distance = F.mse_loss(outputs, targets, reduction="sum") / outputs.shape[1]
        return (1 - self._share) * loss + self._share * distance
