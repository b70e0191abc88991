"""Estimate of the device memory that a minimization takes, from two forward passes on the CPU."""

import math

import torch
from torch import Tensor, nn

from raysubset.config import WHOLE_SUBSET, MinimizeConfig
from raysubset.models import copied, dtype_of
from raysubset.tasks import Spec
from raysubset.training.devices import mixed_precision
from raysubset.training.evaluation import evaluation_batch
from raysubset.training.whole_subset.objective import CHUNK_BATCHES

_PROBED = (2, 4)  # examples of the two forward passes; their difference is per example. Batch normalisation needs two

# Copies of the parameters that an optimizer holds, beside weights, gradient and the best epoch's weights
_OPTIMIZER_COPIES = {
    "sgd": 1,  # momentum
    "adam": 2,  # two moments
    "adamw": 2,
    "muon": 1,  # momentum
    "lbfgs": 2 * 20 + 3,  # 20 pairs of vectors; direction, last gradient and line search
    "cg": 3,  # direction, last gradient and line search
    "levenberg_marquardt": 5,  # and its matrices, below
    "gauss_newton": 5,  # gradient, solution, residual, direction and product
}
_OWN_COPIES = 2  # of a user's own optimizer: as many moments as adam's


def minimizing_bytes(model: nn.Module, recipe: MinimizeConfig, spec: Spec, *, num_examples: int) -> int:
    """Return the memory that minimize() and evaluate() take on a device, in bytes: tensors alone, without torch itself.

    It counts examples (images as uint8) and their targets, weights with gradient, best epoch and optimizer state, and
    the greater of what a batch saves for its backward pass and what evaluation passes from layer to layer. Gradients of
    activations, the allocator's gaps and the copies that techniques hold (averages) come on top.

    Args:
        model: on the CPU; left as it is.
        recipe: precision=auto is counted as float32; bfloat16 takes about half.
        num_examples: on the device at a time, to train and to validate on.
    """
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    parameters = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    copies = 2 * weights + (1 + _OPTIMIZER_COPIES.get(recipe.optimizer, _OWN_COPIES)) * parameters
    if recipe.optimizer == "levenberg_marquardt":  # the matrix, the one with damping, and its factor
        copies += 3 * 8 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) ** 2
    batch = math.ceil(recipe.batch_size / recipe.accumulation)
    batch *= CHUNK_BATCHES if recipe.optimizer in WHOLE_SUBSET else 1
    (few, _), (more, largest) = (_saved_bytes(model, recipe, num, spec) for num in _PROBED)
    saved = (more - few) // (_PROBED[1] - _PROBED[0])  # per example
    activations = max(few + (batch - _PROBED[0]) * saved, 2 * evaluation_batch(spec, largest // 4) * largest)
    return num_examples * _example_bytes(spec) + copies + activations


def _example_bytes(spec: Spec) -> int:
    """Return the bytes of an example's inputs and target: one number for outputs [M], else one per token or pixel."""
    inputs = spec.zeros(1).to(torch.uint8) if spec.is_image else spec.zeros(1)
    num_targets = math.prod(spec.outputs[1:]) if spec.is_image else math.prod(spec.outputs[:-1])
    return inputs.nbytes + 8 * num_targets


def _saved_bytes(model: nn.Module, recipe: MinimizeConfig, num: int, spec: Spec) -> tuple[int, int]:
    """Return (all, the largest per example) bytes that a forward pass of `num` examples saves for the backward pass.

    Autograd's own hooks report them, so functions called within forward() count like modules.
    """
    probe = copied(model).train()
    own_storages = {tensor.untyped_storage().data_ptr() for tensor in (*probe.parameters(), *probe.buffers())}
    saved: dict[int, int] = {}  # bytes by storage
    largest = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal largest
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own_storages:
            saved[storage.data_ptr()] = storage.nbytes()
            if tensor.ndim and len(tensor) == num:
                largest = max(largest, storage.nbytes())
        return tensor

    dtype = dtype_of(probe)
    inputs = spec.zeros(num) if spec.are_integers else spec.zeros(num).to(dtype)
    with (
        torch.random.fork_rng(devices=[]),
        torch.enable_grad(),
        mixed_precision(inputs.device, dtype, recipe.precision),
        torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
    ):
        outputs = probe(inputs)  # held until all is counted, so that no storage is reused
    del outputs
    return sum(saved.values()), largest // num
