"""Fits a user's own task and tries its methods on a few training rows, before anything runs."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raysubset.errors import with_article
from raysubset.tasks.records import own_task
from raysubset.tasks.spec import Spec
from raysubset.tasks.task import LossTask, Task, sums_of
from raysubset.user_code.functions import in_a_line

_NUM_TRIED = 4  # rows
_PAIR = "(inputs, targets), two tensors"
_COMPARES = "set compares_examples = True, if it compares the examples of a batch"


def fit_own_task(name: str, train: Mapping[str, np.ndarray]) -> Task:
    """Fit the task of class package.module:Class on named training rows, [N, …], and try it.

    Raises:
        ValueError: in one line, if the class is missing, lacks a method, or a method returns what does not fit.
    """
    task = own_task(name)
    with in_a_line("task.name", name):
        fitted = task.fit(train)
    _need(task, isinstance(fitted, Task), f"fit() returned {with_article(fitted)}: it should return the task")
    vars(fitted)["name"] = name
    fitted.to_dict()  # refuses what model.json could not hold
    _try(fitted, {key: torch.from_numpy(np.array(values[:_NUM_TRIED])) for key, values in train.items()})
    return fitted


def _try(task: Task, rows: Mapping[str, Tensor]) -> None:
    need, num = partial(_need, task), len(next(iter(rows.values())))
    spec = _called(task, "spec")
    need(isinstance(spec, Spec), f"spec() returned {with_article(spec)}: it should be a raysubset.tasks.Spec")
    _, targets = _try_batch(task, rows, spec)
    outputs = torch.randn(num, *spec.outputs, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = _called(task, "loss", outputs, targets)
    is_number = isinstance(loss, Tensor) and not loss.ndim and loss.requires_grad
    need(is_number, "loss() should return one number, a tensor that depends on the outputs")
    doubled = _called(task, "loss", torch.cat([outputs, outputs]), torch.cat([targets, targets]))
    is_sum = bool(torch.isclose(doubled, 2 * loss, rtol=1e-3, atol=1e-6)) or not torch.isfinite(loss)
    is_mean = task.compares_examples or bool(torch.isclose(doubled, loss, rtol=1e-3))
    need(
        is_sum or (task.compares_examples and doubled / loss >= math.sqrt(2)),
        f"loss() of a batch is {loss.item():g} and of the batch twice {doubled.item():g}: it should be summed over the "
        f"examples, {'not their mean' if is_mean else f'each alone and without draws; or {_COMPARES}'}",
    )
    if not task.compares_examples:
        pairs = zip(outputs.split(1), targets.split(1), strict=True)
        one_by_one = sum(_called(task, "loss", *pair).item() for pair in pairs)
        need(
            math.isclose(one_by_one, loss.item(), rel_tol=1e-3, abs_tol=1e-6) or not math.isfinite(loss.item()),
            f"loss() of a batch is {loss.item():g} and of its examples one by one {one_by_one:g} in sum: let it divide "
            f"by nothing that depends on the batch, such as a number of tokens or weights; or {_COMPARES}",
        )
    if type(task).residuals not in (Task.residuals, LossTask.residuals):
        each = _called(task, "residuals", outputs, targets)
        fits = isinstance(each, Tensor) and each.ndim and len(each) == num
        need(fits, f"residuals() gave {_shape(each)} of {num} examples: give numbers of each example")
        squares = each.square().sum().to(loss)
        text = f"squares of residuals() sum to {squares.item():g}, and loss() of the same is {loss.item():g}"
        is_equal = torch.isclose(squares, loss, rtol=1e-3, atol=1e-6, equal_nan=True)
        need(is_equal, f"{text}: they should be equal")
    with torch.no_grad():
        measured = _called(task, "measure", outputs, targets)
        is_dict = isinstance(measured, Mapping) and measured
        need(is_dict, "measure() should return a dict of tensors, one number an example each")
        for key, each in measured.items():
            fits = isinstance(each, Tensor) and each.ndim in (1, 2) and len(each) == num
            need(fits, f"measure() gave {_shape(each)} for {key} of {num} examples: one number an example")
        first = {} if task.compares_examples else _called(task, "measure", outputs[:1], targets[:1])
    for key, each in first.items():
        alike, alone = measured[key][:1].double(), each.double()
        need(
            alone.shape == alike.shape and torch.allclose(alone, alike, rtol=1e-3, atol=1e-6, equal_nan=True),
            f"measure() gives another {key} of an example alone than in a batch: measure each alone, without draws, "
            f"and have values() compute from sums what only many have; or {_COMPARES}",
        )
    fisher = {"labels": "true", "generator": torch.Generator().manual_seed(0)}
    optional: list[tuple[str, tuple[Tensor, ...], dict[str, Any], int]] = [
        ("watched", (outputs, targets), {}, 1),
        ("curvature", (outputs, outputs, targets), {}, outputs.ndim),
        ("fisher_terms", (outputs, targets), fisher, outputs.ndim + 1),
    ]
    for method, arguments, options, ndim in optional:
        if getattr(type(task), method) is not getattr(Task, method):
            each = _called(task, method, *arguments, **options)
            fits = isinstance(each, Tensor) and each.ndim == ndim and len(each) == num
            need(fits, f"{method}() gave {_shape(each)} of {num} examples: give a tensor of {ndim} dimensions")
    need(task.quality, f"quality is not set: name one of {', '.join(measured)}")
    with torch.no_grad():
        values = _called(task, "values", sums_of(task, outputs, targets), num)
        reported = float(_called(task, "reported_loss", outputs, targets)) / num
    for key in (*measured, *values):
        is_error = key.endswith("_error") and key.removesuffix("_error") in measured
        is_kept = key.startswith("num_") or key.endswith("_sum") or is_error
        need(not is_kept, f"{key} is a name that records keep for a count, a sum or an error: give it another")
    value = values.get("loss", reported)
    is_loss = not math.isfinite(value - reported) or math.isclose(value, reported, rel_tol=1e-3, abs_tol=1e-6)
    need(is_loss, f"the quality loss is {value:g} where loss() is {reported:g} an example: give it another name")
    need(task.quality in values, f"quality is {task.quality!r}, and values() gives {', '.join(values)}")


def _try_batch(task: Task, rows: Mapping[str, Tensor], spec: Spec) -> tuple[Tensor, Tensor]:
    """Try batch() without draws, as evaluation calls it, and with draws; return the inputs and targets with draws.

    Without draws, a row must be the same in any batch: outputs of many batches are measured against one targets().
    """
    last = {key: values[-1:] for key, values in rows.items()}
    together, alone = _pair_of(task, rows, None, spec), _pair_of(task, last, None, spec)
    pairs = {"targets": (_called(task, "targets", last), together[1]), "inputs": (alone[0], together[0])}
    if task.compares_examples:
        del pairs["inputs"]
    for kind, (one, all_rows) in pairs.items():
        alike = all_rows[-1:].double()
        is_same = one.shape == alike.shape and torch.allclose(one.double(), alike, rtol=1e-3, atol=1e-6, equal_nan=True)
        text = f"batch() without draws, as evaluation calls it, gives a row other {kind} alone than in a batch"
        remedy = "draw only in draw(), or compute noise from the row, such as an array of noise beside the data"
        _need(task, is_same, f"{text}: {remedy}")
    return _pair_of(task, rows, _called(task, "draw", len(together[0]), 0), spec)


def _pair_of(task: Task, rows: Mapping[str, Tensor], draws: Tensor | None, spec: Spec) -> tuple[Tensor, Tensor]:
    need, num = partial(_need, task), len(next(iter(rows.values())))
    pair = _called(task, "batch", rows, draws)
    are_two = isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(part, Tensor) for part in pair)
    need(are_two, f"batch() should return {_PAIR}: join several by torch.cat, for forward() or loss() to take apart")
    inputs, targets = pair
    kind = "integer" if spec.are_integers else "float"
    text = f"batch() gave inputs {inputs.dtype} {list(inputs.shape)}, where spec() says {kind} {list(spec.inputs)}"
    fits = tuple(inputs.shape) == (num, *spec.inputs) and inputs.is_floating_point() is not spec.are_integers
    need(fits, f"{text} for each of {num} examples{'' if draws is not None else ', without draws'}")
    need(len(targets) == num, f"batch() gave targets {list(targets.shape)} for {num} examples: one an example")
    return inputs, targets


def _called(task: Task, method: str, *arguments: Any, **options: Any) -> Any:
    """Call a method. What it raises, or that it is missing, becomes a ValueError of one line."""
    try:
        with in_a_line("task.name", task.name):
            return getattr(task, method)(*arguments, **options)
    except ValueError as error:
        _need(task, not isinstance(error.__cause__, NotImplementedError), f"it has no {method}()")
        raise


def _shape(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _need(task: Task, fits: Any, text: str) -> None:
    if not fits:
        raise ValueError(f"task.name = {task.name!r}: {text}")
