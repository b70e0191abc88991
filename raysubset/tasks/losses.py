"""The losses: the value that is minimized, a distance for distillation, and the curvature in the outputs.

A loss takes outputs, float [n, …], and targets [n, …]. An example's loss is the mean over its positions (tokens,
pixels) or numbers; a batch's loss is the sum over its examples. A loss without the derivative that a method needs
raises a ValueError.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

EXACT_OUTPUTS = 100  # the Fisher's sum over outputs is exact up to this many of them
SAMPLED_TERMS = 16  # drawn for each example if there are more outputs


@dataclass(frozen=True)
class CrossEntropy:
    """The cross-entropy over classes, for an example or for each of its positions."""

    label_smoothing: float = 0.0
    class_dim: int = 1  # of outputs [n, M], [n, M, H, W]; 2 of [n, T, M]
    ignored: int | None = None  # positions with this target do not count
    class_weights: tuple[float, ...] | None = None  # for the minimized loss, not for the reported one

    name = "cross-entropy, nats"

    def summed(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss to minimize, summed over examples."""
        weight = self._weight(outputs)
        return self._summed(outputs, targets, weight=weight, label_smoothing=self.label_smoothing)

    def reported(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss to report, summed over examples: without label smoothing and class weights."""
        return self._summed(outputs, targets)

    def _summed(self, outputs: Tensor, targets: Tensor, **options: object) -> Tensor:
        if outputs.ndim == 2 and self.ignored is None:
            return F.cross_entropy(outputs, targets, reduction="sum", **options)  # pyright: ignore[reportArgumentType]
        return self.by_example(outputs, targets, **options).sum()

    def by_example(self, outputs: Tensor, targets: Tensor, **options: object) -> Tensor:
        """Return each example's loss, [n]: the mean over the positions that count, 0 if none does."""
        positions = outputs.movedim(self.class_dim, -1)  # flat: torch's for [n, M, H, W] is not deterministic on CUDA
        losses = F.cross_entropy(
            positions.reshape(-1, positions.shape[-1]),
            targets.reshape(-1),
            reduction="none",
            ignore_index=-100 if self.ignored is None else self.ignored,
            **options,  # pyright: ignore[reportArgumentType]
        ).view(targets.shape)
        if self.ignored is None:
            return losses.flatten(1).mean(1) if losses.ndim > 1 else losses
        num_counted = (targets != self.ignored).reshape(len(targets), -1).sum(1)
        return losses.reshape(len(targets), -1).sum(1) / num_counted.clamp(min=1)

    def combine(self, outputs: Iterable[Tensor]) -> Tensor:
        """Return an ensemble's outputs: the logarithm of the mean of its members' probabilities."""
        total, num = torch.empty(0), 0
        for num, output in enumerate(outputs, start=1):
            output = output.log_softmax(self.class_dim)
            total = output if num == 1 else torch.logaddexp(total, output)
        return total - math.log(num)

    def distance(self, outputs: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
        """Return T² · KL(teacher ‖ student), both at temperature T, summed over examples, averaged over positions."""
        student, expected = ((values / temperature).log_softmax(self.class_dim) for values in (outputs, teacher))
        positions = outputs[0].numel() // outputs.shape[self.class_dim]
        return F.kl_div(student, expected, reduction="sum", log_target=True) * temperature**2 / positions

    def curvature(self, outputs: Tensor, change: Tensor, targets: Tensor) -> Tensor:
        """Return H·change for each example, [n, …], with H the second derivative of its loss by its outputs.

        At each position H is w (diag(p) − ppᵀ) / positions, with p the softmax and w the target's class weight or 1.
        Label smoothing s makes it (1 - s) w plus s times the mean class weight.
        """
        p = F.softmax(outputs, dim=self.class_dim)
        weighted = p * change
        product = weighted - p * weighted.sum(self.class_dim, keepdim=True)
        return product * self._scale(outputs, targets, smoothing=self.label_smoothing)

    def fisher_terms(self, outputs: Tensor, targets: Tensor, *, labels: str, generator: torch.Generator) -> Tensor:
        """Return directions of outputs, [n, T, …], whose squared gradients sum to the Fisher's diagonal.

        Args:
            labels: "model": the expectation over labels that the model predicts. It is exact for one position and at
                most EXACT_OUTPUTS classes, else estimated from SAMPLED_TERMS draws. "true": at the targets (the
                empirical Fisher).
        """
        moved = outputs.movedim(self.class_dim, -1)  # [n, …, M]
        p = moved.softmax(-1)
        unit = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
        if labels == "true":
            terms = (unit[self._labels(targets)] - p).unsqueeze(1)
        elif outputs.ndim == 2 and p.shape[-1] <= EXACT_OUTPUTS:
            terms = p.sqrt().unsqueeze(2) * (unit - p.unsqueeze(1))
        else:
            flat = p.reshape(-1, p.shape[-1]).cpu()
            classes = flat.multinomial(SAMPLED_TERMS, replacement=True, generator=generator).to(p.device)
            classes = classes.view(*p.shape[:-1], SAMPLED_TERMS).movedim(-1, 1)  # [n, T, …]
            terms = (unit[classes] - p.unsqueeze(1)) / math.sqrt(SAMPLED_TERMS)
        scale = self._scale(outputs, targets).movedim(self.class_dim, -1)
        return (terms * scale.sqrt().unsqueeze(1)).movedim(-1, self.class_dim + 1)

    def num_fisher_terms(self, outputs: tuple[int, ...], *, labels: str) -> int:
        """Return T of fisher_terms() for a network with these outputs for one example."""
        if labels == "true":
            return 1
        return outputs[0] if len(outputs) == 1 and outputs[0] <= EXACT_OUTPUTS else SAMPLED_TERMS

    def _weight(self, outputs: Tensor) -> Tensor | None:
        if self.class_weights is None:
            return None
        return torch.tensor(self.class_weights).to(outputs, non_blocking=True)  # else each step waits for a card

    def _labels(self, targets: Tensor) -> Tensor:
        """Return the targets with class 0 at ignored positions, whose value may be no class."""
        return targets if self.ignored is None else targets.masked_fill(targets == self.ignored, 0)

    def _scale(self, outputs: Tensor, targets: Tensor, *, smoothing: float = 0.0) -> Tensor:
        """Return the weight of each position in its example's loss: [n, …] with a dimension of 1 for the classes."""
        is_counted = torch.ones_like(targets, dtype=outputs.dtype)
        if self.ignored is not None:
            is_counted = (targets != self.ignored).to(outputs.dtype)
        share = is_counted
        if targets.ndim > 1:
            share = is_counted / is_counted.flatten(1).sum(1).clamp(min=1).view(-1, *[1] * (targets.ndim - 1))
        if (weight := self._weight(outputs)) is not None:
            share = share * torch.lerp(weight, weight.mean(), smoothing)[self._labels(targets)]
        return share.unsqueeze(self.class_dim)


def mean_outputs(outputs: Iterable[Tensor]) -> Tensor:
    """Return the mean of several members' outputs, which are read one at a time."""
    total, num = torch.empty(0), 0
    for num, output in enumerate(outputs, start=1):
        total = output if num == 1 else total + output
    return total / num


class _NumbersLoss:
    """A loss of numbers: a function of output and target, averaged over an example's outputs."""

    _function: Callable[..., Tensor]  # of torch.nn.functional
    combine = staticmethod(mean_outputs)

    def summed(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss, summed over examples."""
        return self._function(outputs, targets.to(outputs.dtype), reduction="sum") / outputs[0].numel()

    def reported(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss to report, which is the one that is minimized."""
        return self.summed(outputs, targets)

    def distance(self, outputs: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
        """Return the loss with the teacher's outputs as targets. The temperature has no effect."""
        return self._function(outputs, teacher, reduction="sum") / outputs[0].numel()

    def num_fisher_terms(self, outputs: tuple[int, ...], *, labels: str) -> int:
        """Return T of fisher_terms() for a network with these outputs for one example."""
        num = math.prod(outputs)
        return num if num <= EXACT_OUTPUTS else SAMPLED_TERMS


@dataclass(frozen=True)
class SquaredError(_NumbersLoss):
    """The squared error, averaged over an example's outputs; classes become one-hot targets."""

    is_one_hot: bool = False

    name = "squared error"
    _function = staticmethod(F.mse_loss)

    def summed(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.is_one_hot:
            targets = F.one_hot(targets, outputs.shape[1])
        return super().summed(outputs, targets)

    def residuals(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the numbers, [n, …], whose squares sum to each example's loss."""
        if self.is_one_hot:
            targets = targets.unsqueeze(1) == torch.arange(outputs.shape[1], device=targets.device)  # vmap can do this
        return (outputs - targets.to(outputs.dtype)) / math.sqrt(outputs[0].numel())

    def curvature(self, outputs: Tensor, change: Tensor, targets: Tensor) -> Tensor:
        """Return H·change for each example: 2/M times its change."""
        return change * (2 / outputs[0].numel())

    def fisher_terms(self, outputs: Tensor, targets: Tensor, *, labels: str, generator: torch.Generator) -> Tensor:
        """Return directions whose squared gradients sum to the Gauss-Newton diagonal, 2/M Σ_m (∂f_m/∂θ)².

        They do not depend on the labels. They are exact up to EXACT_OUTPUTS; beyond, random signs (Hutchinson).
        """
        return _terms_of_squares(outputs, math.sqrt(2 / outputs[0].numel()), generator)


@dataclass(frozen=True)
class Huber(_NumbersLoss):
    """Huber's loss of differences r, averaged over an example's outputs: r²/2 up to |r| = 1, then |r| − 1/2."""

    name = "Huber's loss"
    _function = staticmethod(F.huber_loss)

    def curvature(self, outputs: Tensor, change: Tensor, targets: Tensor) -> Tensor:
        """Return H·change for each example: 1/M times its change where |r| is at most 1, else 0."""
        return change * ((outputs - targets).abs() <= 1) / outputs[0].numel()

    def fisher_terms(self, outputs: Tensor, targets: Tensor, *, labels: str, generator: torch.Generator) -> Tensor:
        """Return directions as SquaredError does, scaled for this curvature: 1/M where |r| is at most 1, else 0."""
        terms = _terms_of_squares(outputs, math.sqrt(1 / outputs[0].numel()), generator)
        return terms * ((outputs - targets).abs() <= 1).unsqueeze(1)


@dataclass(frozen=True)
class AbsoluteError(_NumbersLoss):
    """The absolute error, averaged over an example's outputs."""

    name = "absolute error"
    _function = staticmethod(F.l1_loss)

    def curvature(self, *arguments: object, **options: object) -> Tensor:
        raise ValueError("the absolute error has no curvature: use --task.loss huber or squared_error")

    fisher_terms = curvature


Loss = CrossEntropy | SquaredError | Huber | AbsoluteError


def _terms_of_squares(outputs: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    """Return terms, [n, T, …], whose outer products sum to scale² times the identity, exactly or in expectation."""
    num, shape = len(outputs), outputs.shape[1:]
    num_outputs = shape.numel()
    if num_outputs <= EXACT_OUTPUTS:
        unit = torch.eye(num_outputs, dtype=outputs.dtype, device=outputs.device)
        terms = scale * unit.expand(num, -1, -1)
    else:
        signs = torch.randint(2, (num, SAMPLED_TERMS, num_outputs), generator=generator).to(outputs) * 2 - 1
        terms = signs * scale / math.sqrt(SAMPLED_TERMS)
    return terms.unflatten(2, shape)
