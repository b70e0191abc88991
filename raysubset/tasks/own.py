"""Fits a user's own task and tries its methods on a few training rows, before anything runs."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raysubset.tasks.records import own_task
from raysubset.tasks.spec import Spec
from raysubset.tasks.task import LossTask, Task, sums_of
from raysubset.user_code.functions import in_a_line

_NUM_TRIED = 4  # rows
_COMPARES = "set compares_examples = True, if it compares the examples of a batch"


def fit_own_task(name: str, train: Mapping[str, np.ndarray]) -> Task:
    """Fit the task of class package.module:Class on named training rows, [N, …], and try it.

    Raises:
        ValueError: in one line, if the class is missing, lacks a method, or a method returns what does not fit.
    """
    task = own_task(name)
    with in_a_line("task.name", name):
        fitted = task.fit(train)
    if not isinstance(fitted, Task):
        raise _misfit(name, f"fit() returned a {type(fitted).__name__}: it should return the task")
    vars(fitted)["name"] = name
    fitted.to_dict()  # refuses what model.json could not hold
    rows = {key: torch.from_numpy(np.array(values[:_NUM_TRIED])) for key, values in train.items()}
    _try(fitted, rows)
    return fitted


def _try(task: Task, rows: Mapping[str, Tensor]) -> None:
    num = len(next(iter(rows.values())))
    spec = _called(task, "spec")
    if not isinstance(spec, Spec):
        raise _misfit(task.name, f"spec() returned a {type(spec).__name__}: it should be a raysubset.tasks.Spec")
    draws = _called(task, "draw", num, 0)
    pair = _called(task, "batch", rows, draws)
    if not isinstance(pair, tuple) or len(pair) != 2 or not all(isinstance(part, Tensor) for part in pair):
        text = "batch() should return (inputs, targets), two tensors"
        raise _misfit(task.name, f"{text}: join several by torch.cat, for forward() or loss() to take apart")
    inputs, targets = pair
    if tuple(inputs.shape) != (num, *spec.inputs) or inputs.is_floating_point() is spec.are_integers:
        kind = "integer" if spec.are_integers else "float"
        text = f"batch() gave inputs {inputs.dtype} {list(inputs.shape)}, where spec() says {kind} {list(spec.inputs)}"
        raise _misfit(task.name, f"{text} for each of {num} examples")
    if not len(targets) == num:
        raise _misfit(task.name, f"batch() gave targets {list(targets.shape)} for {num} examples: one an example")
    outputs = torch.randn(num, *spec.outputs, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = _called(task, "loss", outputs, targets)
    if not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad:
        raise _misfit(task.name, "loss() should return one number, a tensor that depends on the outputs")
    doubled = _called(task, "loss", torch.cat([outputs, outputs]), torch.cat([targets, targets]))
    is_sum = bool(torch.isclose(doubled, 2 * loss, rtol=1e-3, atol=1e-6))
    if torch.isfinite(loss) and not is_sum and (not task.compares_examples or doubled / loss < math.sqrt(2)):
        losses = f"{loss.item():g} and of the batch twice {doubled.item():g}"
        is_mean = task.compares_examples or torch.isclose(doubled, loss, rtol=1e-3)
        how = "not their mean" if is_mean else f"each alone and without draws; or {_COMPARES}"
        raise _misfit(task.name, f"loss() of a batch is {losses}: it should be summed over the examples, {how}")
    if type(task).residuals not in (Task.residuals, LossTask.residuals):
        each = _called(task, "residuals", outputs, targets)
        if not isinstance(each, Tensor) or not each.ndim or len(each) != num:
            shape = list(each.shape) if isinstance(each, Tensor) else type(each).__name__
            raise _misfit(task.name, f"residuals() gave {shape} of {num} examples: give numbers of each example")
        if not torch.isclose(squares := each.square().sum().to(loss), loss, rtol=1e-3, atol=1e-6, equal_nan=True):
            text = f"squares of residuals() sum to {squares.item():g}, and loss() of the same is {loss.item():g}"
            raise _misfit(task.name, f"{text}: they should be equal")
    with torch.no_grad():
        measured = _called(task, "measure", outputs, targets)
    if not isinstance(measured, Mapping) or not measured:
        raise _misfit(task.name, "measure() should return a dict of tensors, one number an example each")
    for key, each in measured.items():
        if not isinstance(each, Tensor) or each.ndim not in (1, 2) or len(each) != num:
            shape = list(each.shape) if isinstance(each, Tensor) else type(each).__name__
            raise _misfit(task.name, f"measure() gave {shape} for {key} of {num} examples: one number an example")
    with torch.no_grad():
        first = {} if task.compares_examples else _called(task, "measure", outputs[:1], targets[:1])
    for key, each in first.items():
        alike = measured[key][:1].double()
        if each.shape != alike.shape or not torch.allclose(each.double(), alike, rtol=1e-3, atol=1e-6, equal_nan=True):
            text = f"measure() gives another {key} of an example alone than in a batch: measure each alone, without"
            text += f" draws, and have values() compute from sums what only many have; or {_COMPARES}"
            raise _misfit(task.name, text)
    fisher = {"labels": "true", "generator": torch.Generator().manual_seed(0)}
    optional: list[tuple[str, tuple[Tensor, ...], dict[str, Any], int]] = [
        ("watched", (outputs, targets), {}, 1),
        ("curvature", (outputs, outputs, targets), {}, outputs.ndim),
        ("fisher_terms", (outputs, targets), fisher, outputs.ndim + 1),
    ]
    for method, arguments, options, ndim in optional:
        if getattr(type(task), method) is getattr(Task, method):
            continue
        each = _called(task, method, *arguments, **options)
        if not isinstance(each, Tensor) or each.ndim != ndim or len(each) != num:
            shape = list(each.shape) if isinstance(each, Tensor) else type(each).__name__
            raise _misfit(task.name, f"{method}() gave {shape} of {num} examples: give a tensor of {ndim} dimensions")
    if not task.quality:
        raise _misfit(task.name, f"quality is not set: name one of {', '.join(measured)}")
    with torch.no_grad():
        values = _called(task, "values", sums_of(task, outputs, targets), num)
        reported = float(_called(task, "reported_loss", outputs, targets)) / num
    for key in (*measured, *values):
        is_error = key.endswith("_error") and key.removesuffix("_error") in measured
        if key.startswith("num_") or key.endswith("_sum") or is_error:
            text = f"{key} is a name that records keep for a count, a sum or a standard error: give it another"
            raise _misfit(task.name, text)
    value = values.get("loss", reported)
    if math.isfinite(value - reported) and not math.isclose(value, reported, rel_tol=1e-3, abs_tol=1e-6):
        text = f"the quality loss is {value:g} where loss() is {reported:g} an example: give it another name"
        raise _misfit(task.name, text)
    if task.quality not in values:
        raise _misfit(task.name, f"quality is {task.quality!r}, and values() gives {', '.join(values)}")


def _called(task: Task, method: str, *arguments: Any, **options: Any) -> Any:
    """Call a method. What it raises, or that it is missing, becomes a ValueError of one line."""
    try:
        with in_a_line("task.name", task.name):
            return getattr(task, method)(*arguments, **options)
    except ValueError as error:
        if isinstance(error.__cause__, NotImplementedError):
            raise _misfit(task.name, f"it has no {method}()") from error
        raise


def _misfit(name: str, text: str) -> ValueError:
    return ValueError(f"task.name = {name!r}: {text}")
