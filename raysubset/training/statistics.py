"""Statistics of a minimum on its subset, for merging weighted by them: diagonal Fisher and Gram matrices."""

import math
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from raysubset.config import MinimizeConfig
from raysubset.costs import Cost
from raysubset.data import Examples
from raysubset.models import has_dropout
from raysubset.tasks import Task
from raysubset.training.evaluation import EVALUATION_BATCH, batch_of, evaluation_mode, layout_of, widened

MOST_ELEMENTS = 2**24  # of per-example gradients, or of unfolded inputs, held at a time
CPU_EXAMPLES = 16  # whose gradients a CPU computes at a time: a quarter of the time that 300 take each (MNIST CNN)


def diagonal_fisher(
    model: nn.Module,
    examples: Examples,
    recipe: MinimizeConfig,
    *,
    labels: str = "model",
    num_examples: int | None = None,
    seed: int = 0,
) -> tuple[dict[str, Tensor], Cost]:
    """Return the diagonal of the loss's curvature at the weights, from per-example gradients (arXiv:2111.09832).

    Under cross-entropy it is the Fisher information: squared gradients of log p(y), expected over labels y that the
    model itself predicts, or at the true labels (the empirical Fisher, which vanishes once the examples are fitted).
    Under squared error it is the loss's own Gauss-Newton diagonal, 2/M Σ_m (∂f_m/∂θ)²; for a linear model that is the
    Hessian's. The sum over M outputs is exact up to EXACT_OUTPUTS. Beyond, SAMPLED_TERMS an example estimate it without
    bias: labels drawn from the model's predictions, or random signs (Hutchinson). Label smoothing is left out.

    Batch-norm statistics are held fixed, and the model is left as it was. Memory: MOST_ELEMENTS of gradients.

    Args:
        model: on the examples' device; torch.func.vmap must be able to follow its forward pass.
        examples: un-augmented.
        labels: "model" or "true"; without meaning under squared error.
        num_examples: the size of a sample to use; None: all.
        seed: of the sample, and of the labels or signs drawn.

    Returns:
        The mean over examples by name of trainable parameter, in its shape; tied parameters under each of their names.
        And the cost, as fisher_cost() gives it.

    Raises:
        ValueError: if the network has dropout or the examples are augmented, because the curvature would be of another
            loss; or if the task does not define its loss's curvature.
    """
    start_s = time.perf_counter()
    if has_dropout(model):
        raise ValueError("the Fisher needs a loss without noise, but the network has dropout: use regmean or a soup")
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        raise ValueError("torch cannot take recurrent layers' gradients of single examples")
    if examples.is_augmented:
        raise ValueError("the Fisher needs a loss without noise, but the examples are augmented")
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    num_parameters = sum(p.numel() for p in parameters.values())
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    generator = torch.Generator().manual_seed(seed)

    def squared_gradients(example: Tensor, terms: Tensor) -> dict[str, Tensor]:
        """Return the squared gradients for one example's inputs and its terms [T, …]."""

        def outputs_at(values: dict[str, Tensor]) -> Tensor:
            return widened(functional_call(model, values, (example.unsqueeze(0),)))[0]

        (gradients,) = vmap(vjp(outputs_at, parameters)[1])(terms)
        return {name: gradient.square().sum(0) for name, gradient in gradients.items()}

    num_used, task = 0, examples.task
    most = CPU_EXAMPLES if examples.device.type == "cpu" else EVALUATION_BATCH
    with evaluation_mode(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # vmap takes other attention one by one
        for inputs, targets in _sampled_batches(model, examples, recipe, num_examples, seed):
            outputs = widened(model(inputs))
            num_used += len(inputs)
            terms = task.fisher_terms(outputs, targets, labels=labels, generator=generator)
            per_call = _terms_per_call(terms.shape[1], num_parameters)
            chunk = max(1, min(most, MOST_ELEMENTS // (num_parameters * per_call)))
            for chunk_inputs, chunk_terms in zip(inputs.split(chunk), terms.split(chunk), strict=True):
                for block in chunk_terms.split(per_call, dim=1):
                    for name, squares in vmap(squared_gradients)(chunk_inputs, block).items():
                        sums[name] += squares.sum(0)
    means = {id(p): (sums[name] / num_used).cpu() for name, p in model.named_parameters() if p.requires_grad}
    cost = fisher_cost(num_used, num_parameters, task, labels=labels)
    return (
        {name: means[id(p)] for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad},
        cost + Cost(device_s=time.perf_counter() - start_s),
    )


def fisher_cost(num_examples: int, num_parameters: int, task: Task, *, labels: str) -> Cost:
    """Return diagonal_fisher()'s cost: a backward pass per term, a forward pass for the terms and for each block of
    them."""
    num_terms = task.num_fisher_terms(labels=labels)
    num_blocks = math.ceil(num_terms / _terms_per_call(num_terms, num_parameters))
    return Cost(num_forward=num_examples * (1 + num_blocks), num_backward=num_examples * num_terms)


def gram_matrices(
    model: nn.Module, examples: Examples, recipe: MinimizeConfig, *, num_examples: int | None = None, seed: int = 0
) -> tuple[dict[str, Tensor], Cost]:
    """Return XᵀX of the inputs of each linear and convolution layer, per example (RegMean, arXiv:2212.09849).

    A convolution's inputs are the patches that its filters see, one row per position; each of its groups has its own
    matrix. A bias is the weight of one more input, the last, that is always 1. The network is in evaluation mode,
    without augmentation, and is left as it was. Layers whose forward() is not called, as in attention, have no matrix,
    nor have those whose weight or bias is computed from other parameters, as by weight_norm().
    num_examples and seed are those of diagonal_fisher().

    Returns:
        By layer's name, [groups, K, K] with K = inputs of a unit (+ 1 with a bias), a linear layer as one group; shared
        layers under each of their names. And the cost: forward passes.
    """
    start_s = time.perf_counter()
    grams: dict[nn.Module, Tensor] = {}

    def add(layer: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        for rows in _rows(layer, inputs[0] if inputs else named["input"]):
            gram = rows @ rows.mT
            grams[layer] = grams[layer] + gram if layer in grams else gram

    layers = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and {"weight", "bias"} <= module._parameters.keys()
    ]
    batches = _sampled_batches(model, examples, recipe, num_examples, seed)  # may call the model: no hooks yet
    hooks = [layer.register_forward_pre_hook(add, with_kwargs=True) for layer in layers]
    num_used = 0
    try:
        with evaluation_mode(model), torch.no_grad():
            for inputs, _ in batches:
                model(inputs)
                num_used += len(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    means = {layer: (gram / num_used).cpu() for layer, gram in grams.items()}
    return (
        {name: means[layer] for name, layer in model.named_modules(remove_duplicate=False) if layer in means},
        Cost(num_forward=num_used, device_s=time.perf_counter() - start_s),
    )


def _sampled_batches(
    model: nn.Module, examples: Examples, recipe: MinimizeConfig, num_examples: int | None, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return batches of inputs and targets of a sample of the examples, in the order of the examples."""
    num = len(examples) if num_examples is None else min(num_examples, len(examples))
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    size = batch_of(model, examples, recipe)
    parts = order[:num].sort().values.to(examples.device).split(size)
    layout = layout_of(model, recipe)
    return (examples.batch(indices, **layout) for indices in parts)


def _terms_per_call(num_terms: int, num_parameters: int) -> int:
    return min(num_terms, max(1, MOST_ELEMENTS // num_parameters))


def _rows(layer: nn.Module, inputs: Tensor) -> Iterator[Tensor]:
    """Yield [groups, K, rows], the inputs of a unit's weights; for convolutions, of a few examples at a time."""
    if isinstance(layer, nn.Linear):
        yield _with_constant(layer, inputs.flatten(0, -2).mT.unsqueeze(0))
        return
    assert isinstance(layer, nn.Conv2d)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(inputs, layer._reversed_padding_repeated_twice, mode)  # as Conv2d itself pads, "same" included
    for images in padded.split(max(1, MOST_ELEMENTS // (padded[0].numel() * math.prod(layer.kernel_size)))):
        patches = F.unfold(images, layer.kernel_size, layer.dilation, 0, layer.stride)  # [n, C * kernel, positions]
        grouped = patches.unflatten(1, (layer.groups, -1)).permute(1, 2, 0, 3)
        yield _with_constant(layer, grouped.flatten(2))


def _with_constant(layer: nn.Linear | nn.Conv2d, rows: Tensor) -> Tensor:
    return rows if layer.bias is None else F.pad(rows, (0, 0, 0, 1), value=1.0)
