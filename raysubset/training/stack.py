"""Stack: the weights, buffers and optimizer states of several members of one architecture, one row each."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raysubset.config import MinimizeConfig
from raysubset.training.devices import placed
from raysubset.training.grouped import forward_of_all
from raysubset.training.muon import REST_FACTOR, scaled_polar
from raysubset.training.optimizers import load_optimizer_state, make_optimizer, moment_names

_WEIGHTS = "weights"  # the key, among the buffers' names, of all trained parameters
_LEAST_LENGTH = 1e-6  # torch.nn.utils.clip_grad_norm_()'s, added to a gradient's length


class Stack:
    """Members that step together. All trained parameters are one matrix [K, P], so that an update is a few kernels.

    Arguments and results are those of one member: the module, state dicts, and torch.optim's own state dict. Members
    may therefore enter and leave between any two steps. Updates are those of torch.optim's SGD with Nesterov momentum,
    Adam and AdamW, and of our Muon, with a learning rate and a step count for each member.
    """

    def __init__(
        self, models: Sequence[nn.Module], recipe: MinimizeConfig, optimizer_states: Sequence[dict[str, Any] | None]
    ) -> None:
        """Copy the tensors of members of one architecture on one device. weights() changes the modules.

        Args:
            recipe: with the optimizer sgd, adam, adamw or muon.
            optimizer_states: state dicts to continue with; None: new ones.
        """
        self._recipe, first = recipe, models[0]
        groups, names = make_optimizer(first, recipe).param_groups, {p: name for name, p in first.named_parameters()}
        trained = [p for group in groups for p in group["params"]]  # matrices and kernels first
        self._names = [names[p] for p in trained]
        self._shapes = [p.shape for p in trained]
        self._sizes = [p.numel() for p in trained]
        self._num_decayed = sum(p.numel() for p in trained if p.ndim > 1)
        self._matrices = [(len(p), p.numel()) for p in trained if p.ndim > 1]  # rows and elements, for muon
        self._forward = forward_of_all(first)
        self._moment_names = moment_names(recipe)
        self._models = list(models)
        self._rates = [recipe.peak_learning_rate()] * len(models)
        self._steps = [0] * len(models)  # of each member's optimizer
        with torch.no_grad():
            tensors = [self._tensors(model) for model in models]
            self._now = {name: torch.stack([row[name] for row in tensors]) for name in tensors[0]}
            moments = [self._read_optimizer(row, state) for row, state in enumerate(optimizer_states)]
            self._moments = [torch.stack(rows) for rows in zip(*moments, strict=True)]
        self._now[_WEIGHTS].requires_grad_()

    def __len__(self) -> int:
        return len(self._models)

    def _tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Return a row of the stack: trained parameters as one vector, everything else by name."""
        named = dict(model.named_parameters())
        others = {name: p.detach() for name, p in named.items() if not p.requires_grad} | dict(model.named_buffers())
        return {_WEIGHTS: torch.cat([named[name].detach().flatten() for name in self._names]), **others}

    def _read_optimizer(self, row: int, state: dict[str, Any] | None) -> list[Tensor]:
        """Return a member's moments, each as one vector, and set its step count."""
        optimizer = make_optimizer(self._models[row], self._recipe)
        if state is not None:
            load_optimizer_state(optimizer, state)
        moments = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
        self._steps[row] = int(moments[0].get("step", 0))  # adam's
        return [torch.cat([values[name].flatten() for values in moments]) for name in self._moment_names]

    # Steps

    def outputs(self, inputs: Tensor, rows: Sequence[int]) -> Tensor:
        """Return the networks' outputs [N, k, …] in train mode on inputs [N, k, …], for the members in these rows."""
        is_all = len(rows) == len(self)
        index = self._index(rows)
        selected = self._now if is_all else {name: value[index] for name, value in self._now.items()}
        parts = selected[_WEIGHTS].split(self._sizes, dim=1)
        tensors = {name: p.view(-1, *s) for name, p, s in zip(self._names, parts, self._shapes, strict=True)}
        buffers = {name: value for name, value in selected.items() if name != _WEIGHTS}
        outputs = self._forward(tensors | buffers, inputs)
        if not is_all:
            for name, value in buffers.items():
                self._now[name][index] = value
        return outputs

    @torch.no_grad()
    def update(self, rates: Sequence[float]) -> None:
        """Make an optimizer step of all members with the gradients that backward() left, and clear these."""
        recipe, weights = self._recipe, self._now[_WEIGHTS]
        gradient = weights.grad
        assert gradient is not None
        self._rates, self._steps = list(rates), [step + 1 for step in self._steps]
        if recipe.clip_norm is not None:
            lengths = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
            gradient.mul_((recipe.clip_norm / (lengths + _LEAST_LENGTH)).clamp(max=1))
        if recipe.optimizer == "adamw":
            decays = self._column([1 - rate * recipe.weight_decay for rate in rates])
            weights[:, : self._num_decayed].mul_(decays)
        elif recipe.weight_decay:
            gradient[:, : self._num_decayed].add_(weights[:, : self._num_decayed], alpha=recipe.weight_decay)
        if recipe.optimizer in ("sgd", "muon"):
            if recipe.momentum:
                (momentum,) = self._moments
                momentum.mul_(recipe.momentum).add_(gradient)
                gradient.add_(momentum, alpha=recipe.momentum)
            if recipe.optimizer == "muon":
                self._make_orthogonal(gradient)
            weights.addcmul_(gradient, self._column(rates), value=-1)
        else:
            mean, square = self._moments
            beta1, beta2, epsilon = 0.9, 0.999, 1e-8  # torch's defaults, which make_optimizer() keeps
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            scales = self._column([1 / math.sqrt(1 - beta2**step) for step in self._steps])
            lengths = self._column([rate / (1 - beta1**step) for rate, step in zip(rates, self._steps, strict=True)])
            weights.addcdiv_(mean * lengths, (square.sqrt() * scales).add_(epsilon), value=-1)
        weights.grad = None

    def _make_orthogonal(self, gradient: Tensor) -> None:
        """Replace the gradients [K, P], which include their momentum, by Muon's directions, in place."""
        end = 0
        for num_rows, size in self._matrices:
            part = gradient[:, end : end + size]
            part.copy_(scaled_polar(part.reshape(len(gradient), num_rows, -1)).flatten(1))
            end += size
        gradient[:, end:].mul_(REST_FACTOR)

    def are_finite(self) -> list[bool]:
        """Return for each member whether all its trained parameters are finite."""
        return torch.linalg.vector_norm(self._now[_WEIGHTS].detach(), math.inf, dim=1).isfinite().tolist()

    def _column(self, values: Sequence[float]) -> Tensor:
        """Return the values as [K, 1], in the weights' dtype."""
        weights = self._now[_WEIGHTS]
        return placed(values, weights.device, weights.dtype)[:, None]

    # Members

    def _index(self, rows: Sequence[int]) -> Tensor:
        return placed(rows, self._now[_WEIGHTS].device)

    @torch.no_grad()
    def weights(self, row: int) -> dict[str, Tensor]:
        """Put a member's tensors into its module, and return a copy of its state dict."""
        model = self._models[row]
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        parts = dict(zip(self._names, self._now[_WEIGHTS][row].split(self._sizes), strict=True))
        for name, tensor in named.items():
            tensor.copy_(parts[name].view(tensor.shape) if name in parts else self._now[name][row])
        return {key: value.detach().clone() for key, value in model.state_dict().items()}

    @torch.no_grad()
    def restart(self, row: int, weights: dict[str, Tensor]) -> None:
        """Give a member these weights, a state dict, and a new optimizer, because the old moments may be NaN."""
        self._models[row].load_state_dict(weights)
        for name, value in self._tensors(self._models[row]).items():
            self._now[name][row] = value
        for moment in self._moments:
            moment[row] = 0
        self._steps[row], self._rates[row] = 0, self._recipe.peak_learning_rate()

    def optimizer_state(self, row: int) -> dict[str, Any]:
        """Return a copy of a member's optimizer state, as torch.optim's own state dict."""
        optimizer = make_optimizer(self._models[row], self._recipe)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for group in optimizer.param_groups:
            group["lr"] = self._rates[row]
        for name, moment in zip(self._moment_names, self._moments, strict=True):
            for p, part in zip(parameters, moment[row].split(self._sizes), strict=True):
                optimizer.state[p][name].copy_(part.view(p.shape))
        if "exp_avg" in self._moment_names:
            for p in parameters:
                optimizer.state[p]["step"].fill_(self._steps[row])
        return optimizer.state_dict()

    @torch.no_grad()
    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other members."""
        index = self._index(rows)
        self._now = {name: value.detach()[index] for name, value in self._now.items()}
        self._now[_WEIGHTS].requires_grad_()
        self._moments = [moment[index] for moment in self._moments]
        self._models = [self._models[row] for row in rows]
        self._rates, self._steps = [self._rates[row] for row in rows], [self._steps[row] for row in rows]
