"""Jᵀr and JᵀJ over a subset, with J the derivative of the residuals r by a network's trainable parameters."""

from collections.abc import Callable, Iterable
from itertools import combinations_with_replacement

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from raysubset.training.devices import widest_dtype
from raysubset.training.evaluation import widened

CPU_ELEMENTS = 2**18  # of the products of one part's examples, so that they stay in a CPU's cache
MOST_ELEMENTS = 2**24  # likewise on a GPU

Residuals = Callable[[Tensor, Tensor], Tensor]  # of outputs [n, …] and targets: [n, …], whose squares sum to the loss
Factors = tuple[Tensor, Tensor]  # a [n, I] and d [n, M, O] of a layer, in the dtype of the sums


class NormalSums:
    """Sums Jᵀr [P] and JᵀJ [P, P] of a network, in float64 (in float32 on Apple's GPUs, which have no float64).

    If all its parameters belong to dense layers, no Jacobian is computed. Let a be an example's input of a layer,
    followed by a 1 for the bias, and d_m the derivative of its m-th residual by the layer's output. The layer's part of
    a row of J is d_m aᵀ, and the block of JᵀJ of two layers is the sum over examples of (Σ_m d_m d'_mᵀ) ⊗ (a a'ᵀ), a
    matrix product without the factor M. The Jacobian of any other network is torch.func's.
    """

    def __init__(self, model: nn.Module, residuals: Residuals, inputs: Tensor, targets: Tensor) -> None:
        """Check on one or two examples whether the layers' factors make up the whole Jacobian.

        Args:
            model: in evaluation mode. Each call uses its current weights.

        Raises:
            RuntimeError: torch's, if vmap cannot follow the network.
        """
        self._model, self._residuals = model, residuals
        self._dtype = widest_dtype(inputs.device)
        jacobian, _ = self._jacobian(inputs, targets)
        self.num_residuals, self._size = jacobian.shape[1:]
        self.layers, self._order = _dense_layers(model), torch.arange(self._size)
        if self.layers and (factors := self._factors(inputs, targets)[0]):
            order = _places_in_layers(self.layers, model)
            rows = [(d.unsqueeze(-1) * a[:, None, None]).flatten(2) for a, d in factors]
            if torch.allclose(torch.cat(rows, dim=2)[:, :, order], jacobian, rtol=1e-3, atol=1e-6):
                self._order = order.to(inputs.device)
                return
        self.layers = ()

    def over(self, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return Jᵀr and JᵀJ over batches of inputs and targets, at the current weights."""
        return self._over_factors(batches) if self.layers else self._over_jacobians(batches)

    def _over_jacobians(self, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        gradient = matrix = torch.zeros((), dtype=self._dtype)
        for inputs, targets in self._parts(batches, self.num_residuals * self._size):
            jacobian, residuals = self._jacobian(inputs, targets)
            jacobian, residuals = jacobian.flatten(0, 1), residuals.flatten()
            gradient, matrix = gradient + jacobian.T @ residuals, matrix + jacobian.T @ jacobian
        return gradient, matrix

    def _over_factors(self, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        pairs = list(combinations_with_replacement(range(len(self.layers)), 2))
        sides = [(layer.out_features, layer.in_features + (layer.bias is not None)) for layer in self.layers]
        slopes = [torch.zeros((), dtype=self._dtype) for _ in sides]
        sums = [torch.zeros((), dtype=self._dtype) for _ in pairs]
        for inputs, targets in self._parts(batches, max(out**2 + width**2 for out, width in sides)):
            factors, residuals = self._factors(inputs, targets)
            for number, (a, d) in enumerate(factors):
                slopes[number] = slopes[number] + torch.einsum("nmo,nm->no", d, residuals).T @ a
            for number, (i, j) in enumerate(pairs):
                sums[number] = sums[number] + _product(factors[i], factors[j], is_one=i == j)
        starts = [sum(out * width for out, width in sides[:i]) for i in range(len(sides) + 1)]
        matrix = sums[0].new_zeros(starts[-1], starts[-1])
        for (i, j), total in zip(pairs, sums, strict=True):
            block = _block(total, sides[i], sides[j], is_one=i == j)
            matrix[starts[i] : starts[i + 1], starts[j] : starts[j + 1]] = block
            matrix[starts[j] : starts[j + 1], starts[i] : starts[i + 1]] = block.T
        gradient = torch.cat([slope.flatten() for slope in slopes])
        order = self._order
        return gradient[order], matrix.index_select(0, order).index_select(1, order)

    def _parts(self, batches: Iterable[tuple[Tensor, Tensor]], num_elements: int) -> Iterable[tuple[Tensor, Tensor]]:
        """Split the batches into parts that stay within the limit if each example takes so many elements."""
        for inputs, targets in batches:
            most = max(1, (CPU_ELEMENTS if inputs.device.type == "cpu" else MOST_ELEMENTS) // num_elements)
            yield from zip(inputs.split(most), targets.split(most), strict=True)

    def _jacobian(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return J [n, M, P] and r [n, M]."""
        parameters = {name: p.detach() for name, p in self._model.named_parameters() if p.requires_grad}

        def of_example(example: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            def residuals_at(values: dict[str, Tensor]) -> Tensor:
                outputs = widened(functional_call(self._model, values, (example.unsqueeze(0),)))
                return self._residuals(outputs, target.unsqueeze(0)).flatten()

            residuals, pull_back = vjp(residuals_at, parameters)  # pyright: ignore[reportAssignmentType]
            unit = torch.eye(len(residuals), dtype=residuals.dtype, device=residuals.device)
            (rows,) = vmap(pull_back)(unit)
            return torch.cat([rows[name].reshape(len(unit), -1) for name in parameters], dim=1), residuals

        with sdpa_kernel(SDPBackend.MATH):  # vmap takes other attention one by one
            jacobian, residuals = vmap(of_example)(inputs, targets)
        return jacobian.to(self._dtype), residuals.to(self._dtype)

    def _factors(self, inputs: Tensor, targets: Tensor) -> tuple[list[Factors], Tensor]:
        """Return each layer's a and d, and r [n, M]; no factors unless each layer is called exactly once, on [n, I]."""
        calls = list[tuple[nn.Module, Tensor, Tensor]]()

        def record_call(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            probe = torch.zeros_like(output, requires_grad=True)  # later operations may change the output in place
            calls.append((layer, inputs[0].detach(), probe))
            return output + probe

        hooks = [layer.register_forward_hook(record_call) for layer in self.layers]
        try:
            with torch.enable_grad():
                residuals = self._residuals(widened(self._model(inputs)), targets).reshape(len(inputs), -1)
        finally:
            for hook in hooks:
                hook.remove()
        by_layer = {layer: (a, probe) for layer, a, probe in calls}
        if not len(by_layer) == len(calls) == len(self.layers) or any(a.ndim != 2 for _, a, _ in calls):
            return [], residuals
        probes = [by_layer[layer][1] for layer in self.layers]
        num = residuals.shape[1]
        slopes = [
            torch.autograd.grad(residuals[:, m].sum(), probes, retain_graph=m + 1 < num, materialize_grads=True)
            for m in range(num)
        ]
        factors = list[Factors]()
        for number, layer in enumerate(self.layers):
            a = by_layer[layer][0].to(self._dtype)
            a = a if layer.bias is None else nn.functional.pad(a, (0, 1), value=1.0)
            factors.append((a, torch.stack([of_residual[number] for of_residual in slopes], dim=1).to(self._dtype)))
        return factors, residuals.detach().to(self._dtype)


def _dense_layers(model: nn.Module) -> tuple[nn.Linear, ...]:
    """Return the dense layers with trainable parameters, or none if other modules have some."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    dense = {id(p) for layer in layers for p in (layer.weight, layer.bias)}
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    return tuple(layers) if trainable <= dense else ()


def _places_in_layers(layers: tuple[nn.Linear, ...], model: nn.Module) -> Tensor:
    """Return the position of each trainable element, int64 [P], among the layers' weights and biases [O, I + 1]."""
    places, first = dict[int, Tensor](), 0
    for layer in layers:
        width = layer.in_features + (layer.bias is not None)
        positions = torch.arange(first, first + layer.out_features * width).view(layer.out_features, width)
        places[id(layer.weight)] = positions[:, : layer.in_features]
        if layer.bias is not None:
            places[id(layer.bias)] = positions[:, -1]
        first += positions.numel()
    return torch.cat([places[id(p)].flatten() for p in model.parameters() if p.requires_grad])


def _product(first: Factors, second: Factors, *, is_one: bool) -> Tensor:
    """Return Σ (Σ_m d_m d'_mᵀ) ⊗ (a a'ᵀ) as a matrix [O·O', I·I']; for one layer only what is above the diagonals."""
    (a, d), (other_a, other_d) = first, second
    slopes, inputs = torch.bmm(d.mT, other_d).flatten(1), (a.unsqueeze(2) * other_a.unsqueeze(1)).flatten(1)
    if is_one:
        slopes = slopes.index_select(1, _upper(d.shape[2]).to(d.device))
        inputs = inputs.index_select(1, _upper(a.shape[1]).to(a.device))
    return slopes.T @ inputs


def _block(total: Tensor, sides: tuple[int, int], other_sides: tuple[int, int], *, is_one: bool) -> Tensor:
    """Return the layers' block of JᵀJ [O·I, O'·I'] from the sum of their products."""
    (out, width), (other_out, other_width) = sides, other_sides
    if is_one:
        places, other_places = (_mirrored(side).to(total.device) for side in sides)
        total = total.index_select(0, places).index_select(1, other_places)
    return total.view(out, other_out, width, other_width).transpose(1, 2).reshape(out * width, other_out * other_width)


def _upper(side: int) -> Tensor:
    """Return the positions of the upper triangle in a flattened square."""
    rows, columns = torch.triu_indices(side, side)
    return rows * side + columns


def _mirrored(side: int) -> Tensor:
    """Return for each element of a flattened symmetric square its position in the upper triangle."""
    places = torch.zeros(side * side, dtype=torch.int64)
    places[_upper(side)] = torch.arange(side * (side + 1) // 2)
    square = places.view(side, side)
    return square.maximum(square.T).flatten()
