"""A subset's mean loss as a function of a flat vector of weights: losses, gradients and curvature, all counted."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from raysubset.config import MinimizeConfig
from raysubset.data import Examples
from raysubset.errors import first_line
from raysubset.models import dtype_of
from raysubset.training.devices import widest_dtype
from raysubset.training.evaluation import widened

CHUNK_BATCHES = 16  # batches of a chunk of the subset, so that memory stays bounded
JACOBIAN_ELEMENTS = 2**20  # of a Jacobian of a part of the examples: a CPU takes no less time with more
COLUMNS = 192  # of a Jacobian that are multiplied at once; 64 to 256 took as long


def dot(a: Tensor, b: Tensor) -> float:
    """Return the scalar product of two vectors, summed in float64 (float32 on Apple's GPUs, which lack float64)."""
    wide = widest_dtype(a.device)
    return torch.dot(a.to(wide), b.to(wide)).item()


@dataclass(frozen=True)
class Evaluation:
    """The values of a function and its gradient at some weights."""

    loss: float  # mean over the subset; may be infinite or NaN
    gradient: Tensor  # [P], of the trainable parameters one after the other, in their dtype

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.largest_slope)

    @property
    def largest_slope(self) -> float:
        """The largest absolute value in the gradient."""
        return self.gradient.abs().max().item()


class Objective:
    """The mean loss over a subset as a function of a network's P trainable parameters, everything else held fixed.

    It is deterministic: the network stays in evaluation mode, and nothing is augmented. Each call goes over the
    examples in chunks, so memory does not grow with the subset, and adds to the counts. A loss passes each example
    forward; a gradient forward and backward; a Gauss-Newton product twice forward (outputs and their change) and once
    backward.
    """

    def __init__(self, model: nn.Module, examples: Examples, recipe: MinimizeConfig) -> None:
        """Start from the weights in the model, which must be in evaluation mode. move_to() changes them."""
        self.num_forward = 0  # examples
        self.num_backward = 0  # examples
        self.num_gradients = 0
        self.worked_before = 0  # of earlier processes, in the units of `worked`
        self.model, self.recipe, self._examples = model, recipe, examples
        self._forward = torch.compile(model) if recipe.compile else model
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._sizes = [p.numel() for p in self._named.values()]
        self.device, self._dtype = examples.device, dtype_of(model)
        self.resolution = torch.finfo(self._dtype).eps  # of a loss, relatively; smaller differences are rounding errors
        self._chunks = torch.arange(len(examples), device=examples.device).split(recipe.batch_size * CHUNK_BATCHES)
        self._last: tuple[Tensor, Evaluation] | None = None  # weights and their gradient, the last computed

    @property
    def thirds(self) -> int:
        """Work done, in thirds of a pass over the subset: a forward pass is one, a backward pass two."""
        return self.worked // len(self._examples)

    @property
    def worked(self) -> int:
        """Work done, in thirds of an example's pass, including that of earlier processes."""
        return self.worked_before + self.num_forward + 2 * self.num_backward

    def weights(self) -> Tensor:
        """Return a copy of the trainable parameters, [P]."""
        return torch.cat([p.detach().reshape(-1) for p in self._named.values()])

    @torch.no_grad()
    def move_to(self, weights: Tensor) -> None:
        """Set the network's weights, [P]."""
        for parameter, part in zip(self._named.values(), weights.split(self._sizes), strict=True):
            parameter.copy_(part.view_as(parameter))

    @torch.no_grad()
    def loss(self) -> float:
        """Return the loss at the current weights. It costs a third of a pass."""
        total = torch.zeros((), dtype=widest_dtype(self.device), device=self.device)
        for inputs, targets in self._batches(self._chunks):
            total += self._share(self._forward(inputs), targets)
        self.num_forward += len(self._examples)
        return total.item()

    def evaluate(self) -> Evaluation:
        """Return loss and gradient, which also stays in the parameters. It costs a pass; repeated in place, nothing."""
        weights = self.weights()
        if self._last is not None and torch.equal(weights, self._last[0]):
            return self._last[1]
        for parameter in self._named.values():
            parameter.grad = torch.zeros_like(parameter)
        total = torch.zeros((), dtype=widest_dtype(self.device), device=self.device)
        with torch.enable_grad():
            for inputs, targets in self._batches(self._chunks):
                loss = self._share(self._forward(inputs), targets)
                loss.backward()
                total += loss.detach()
        self.num_forward += len(self._examples)
        self.num_backward += len(self._examples)
        self.num_gradients += 1
        gradients = [p.grad.reshape(-1) for p in self._named.values() if p.grad is not None]
        self._last = weights, Evaluation(total.item(), torch.cat(gradients))
        return self._last[1]

    def recall(self, loss: float, gradient: Tensor) -> Evaluation:
        """Restore the evaluation that an earlier process had at these weights, its gradient on any device."""
        evaluation = Evaluation(loss, gradient.to(self.device))
        self._last = self.weights(), evaluation
        for parameter, part in zip(self._named.values(), evaluation.gradient.split(self._sizes), strict=True):
            parameter.grad = part.view_as(parameter).clone()
        return evaluation

    def gauss_newton_product(self, vector: Tensor) -> Tensor:
        """Return G v for v [P], with G the mean of JᵀHJ: J of outputs by weights, H of the loss by outputs.

        G is positive semi-definite for our losses (Schraudolph 2002). It is counted as 4/3 passes: the outputs and
        their derivative along v are two forward passes, then one backward. On a CPU thread it takes the time of 1.9
        gradients of our CNN without normalisation, 2.4 with batch and 3.5 with group normalisation. The network runs
        uncompiled, even if it is compiled for losses and gradients.

        Raises:
            ValueError: if an operation of the network has no forward-mode derivative, or the task's loss no curvature.
        """
        parameters = {name: p.detach() for name, p in self._named.items()}
        parts = zip(parameters.items(), vector.split(self._sizes), strict=True)
        change = {name: part.view_as(p) for (name, p), part in parts}
        total = torch.zeros_like(vector)
        for inputs, targets in self._batches(self._chunks):

            def outputs_and_change(weights: dict[str, Tensor], inputs: Tensor = inputs) -> tuple[Tensor, Tensor]:
                return jvp(lambda w: widened(functional_call(self.model, w, (inputs,))), (weights,), (change,))  # pyright: ignore[reportReturnType]

            try:
                with sdpa_kernel(SDPBackend.MATH):  # other attention has no forward-mode derivative
                    outputs, pull_back, moved = vjp(outputs_and_change, parameters, has_aux=True)  # pyright: ignore[reportAssignmentType]
            except RuntimeError as error:
                has_derivative = not isinstance(error, NotImplementedError)
                if has_derivative and not (self.recipe.channels_last and str(error).startswith("view size")):
                    raise
                # torch 2.10's derivative of group norm takes images in torch's default layout alone
                way_out = "set --minimize.channels-last=false" if has_derivative else "use lbfgs or cg"
                raise ValueError(
                    f"gauss_newton cannot differentiate this network: {way_out} ({first_line(error)})"
                ) from error
            (products,) = pull_back(self._examples.task.curvature(outputs, moved, targets) / len(self._examples))
            total += torch.cat([products[name].reshape(-1) for name in parameters])
        self.num_forward += 2 * len(self._examples)
        self.num_backward += len(self._examples)
        return total

    def jacobian(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the derivatives J [n·M, P] of the residuals, whose squares sum to the loss, and these [n·M].

        They are in float64 (in float32 on Apple's GPUs, which lack float64). The network runs uncompiled.

        Raises:
            ValueError: if the loss is no sum of squares, or torch cannot differentiate single examples' outputs.
        """
        parameters = {name: p.detach() for name, p in self._named.items()}

        def residuals_at(weights: dict[str, Tensor], example: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            outputs = widened(functional_call(self.model, weights, (example.unsqueeze(0),)))
            residuals = self._examples.task.residuals(outputs, target.unsqueeze(0)).flatten()
            return residuals, residuals

        try:
            with sdpa_kernel(SDPBackend.MATH):  # vmap takes other attention one by one
                derivatives = vmap(jacrev(residuals_at, has_aux=True), in_dims=(None, 0, 0))
                parts, residuals = derivatives(parameters, inputs, targets)
        except RuntimeError as error:
            raise ValueError(
                "levenberg_marquardt cannot take single examples' gradients of this network: use lbfgs or cg "
                f"({first_line(error)})"
            ) from error
        wide = widest_dtype(self.device)
        rows = torch.cat([parts[name].reshape(*residuals.shape, -1) for name in parameters], dim=2)
        return rows.flatten(0, 1).to(wide), residuals.flatten().to(wide)

    def num_residuals(self) -> int:
        """Return M, the number of residuals of an example; raise the errors of jacobian()."""
        inputs, targets = next(self._batches([self._chunks[0][:1]]))
        return len(self.jacobian(inputs, targets)[1])

    def normal_equations(self, num_residuals: int) -> tuple[Tensor, Tensor]:
        """Return gradient [P] and Gauss-Newton matrix [P, P] of a loss that is a sum of squares, as jacobian() does.

        It costs a forward pass and, with M residuals an example, M backward passes.
        """
        num, num_parameters = len(self._examples), sum(self._sizes)
        gradient = torch.zeros(num_parameters, dtype=widest_dtype(self.device), device=self.device)
        matrix = gradient.new_zeros(num_parameters, num_parameters)
        part = max(1, JACOBIAN_ELEMENTS // (num_residuals * num_parameters))
        for inputs, targets in self._batches(torch.arange(num, device=self.device).split(part)):
            jacobian, residuals = self.jacobian(inputs, targets)
            gradient.addmv_(jacobian.T, residuals)
            for begin in range(0, num_parameters, COLUMNS):  # the matrix is symmetric: nearly half of the products
                end = begin + COLUMNS
                matrix[begin:end, begin:].addmm_(jacobian[:, begin:end].T, jacobian[:, begin:])
        self.num_forward += num
        self.num_backward += num * num_residuals
        self.num_gradients += 1
        return gradient * (2 / num), (matrix.triu() + matrix.triu(1).T) * (2 / num)

    def _batches(self, chunks: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for indices in chunks:
            yield self._examples.batch(indices, channels_last=self.recipe.channels_last, dtype=self._dtype)

    def _share(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return a chunk's part of the mean loss."""
        return self._examples.task.loss(widened(outputs), targets) / len(self._examples)
