"""Converts tasks to the JSON of model.json and back. A stranger's file may hold anything, so all is checked."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from raysubset.config import from_tree
from raysubset.tasks.classification import Classification
from raysubset.tasks.columns import TableInputs
from raysubset.tasks.images import ImageInputs
from raysubset.tasks.next_token import NextToken
from raysubset.tasks.regression import Regression
from raysubset.tasks.segmentation import Segmentation
from raysubset.tasks.task import Task
from raysubset.tasks.tensors import TensorInputs
from raysubset.tasks.vocabulary import Vocabulary
from raysubset.user_code.functions import call_function
from raysubset.user_code.given import held_objects, is_given

_MOST_PIXELS = 2**28  # of an image: 16,384×16,384
_MOST_NAMES = 2**20
_LARGE = 1e6  # for a mean or a standard deviation of pixels in [0, 1]
_INPUTS = {"images": ImageInputs, "table": TableInputs, "tensors": TensorInputs}


def task_to_dict(task: Task) -> dict[str, Any]:
    """Return a task as JSON: what its inputs and outputs mean, without its loss.

    Raises:
        ValueError: if JSON cannot hold an attribute of a user's task.
    """
    match task:
        case Classification(inputs=ImageInputs()):  # the flat form, which names no task
            inputs = dataclasses.asdict(task.inputs)
            del inputs["augmentation"]
            return {"num_classes": len(task.class_names), "class_names": task.class_names, **inputs}
        case Classification() | Segmentation():
            fields: dict[str, Any] = {"class_names": task.class_names}
        case Regression():
            fields = {"target_names": task.target_names, "mean": task.mean, "std": task.std}
        case NextToken():
            fields = {"vocabulary": dataclasses.asdict(task.vocabulary), "window": task.window}
        case _:
            return {"task": task.to_dict()}
    if not isinstance(task, NextToken):
        (kind,) = (name for name, cls in _INPUTS.items() if isinstance(task.inputs, cls))
        fields["inputs"] = {"kind": kind, **dataclasses.asdict(task.inputs)}
    return {"task": {"name": task.name, **fields}}


def task_from_dict(record: Mapping[str, Any], *, trust_code: bool = False) -> Task:
    """Rebuild a task from the record of task_to_dict().

    Args:
        trust_code: allow importing the module of a user's own task.

    Raises:
        ValueError: if a value is missing or has the wrong type or range, or if the record names a user's task and
            trust_code is False.
    """
    if "task" not in record:
        return _image_classification(record)
    tree = record["task"]
    if not isinstance(tree, dict) or not isinstance(tree.get("name"), str):
        raise ValueError("its task has no name")
    name, fields = tree["name"], {key: value for key, value in tree.items() if key != "name"}
    if ":" in name:
        if is_given(name):
            if name not in held_objects().objects:
                raise ValueError(f"its task, {name}, was an object in Python: give it again, load_model(…, task=…)")
        elif not trust_code:
            raise ValueError(
                f"its task is code that it only names, {name}: if you trust whoever made this directory, give "
                "trust_code=True or --trust-code"
            )
        return own_task(name, fields.get("state") or {})
    readers: dict[str, Callable[[dict[str, Any]], Task]] = {
        "classification": _classification,
        "regression": _regression,
        "segmentation": _segmentation,
        "next_token": _next_token,
    }
    if name not in readers:
        raise ValueError(f"this version does not know its task {name!r}: update raysubset")
    return readers[name](fields)


def own_task(name: str, state: Mapping[str, Any] | None = None) -> Task:
    """Construct a user's task of class package.module:Class and set the attributes that fit() left.

    Raises:
        ValueError: if there is no such class, or it is no Task.
    """
    task = call_function("task.name", name)
    if not isinstance(task, Task):
        raise ValueError(f"task.name = {name!r} made a {type(task).__name__}: it should be a raysubset.tasks.Task")
    vars(task).update(state or {})
    vars(task)["name"] = name
    return task


@dataclasses.dataclass(frozen=True)
class _ClassesRecord:
    class_names: tuple[str, ...]
    inputs: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _NumbersRecord:
    target_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    inputs: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _TokensRecord:
    vocabulary: dict[str, Any]
    window: int


def _classification(tree: dict[str, Any]) -> Task:
    record = from_tree(_ClassesRecord, tree, "task.", noun="field")
    return Classification(_inputs(record.inputs), _names(record.class_names))


def _segmentation(tree: dict[str, Any]) -> Task:
    record = from_tree(_ClassesRecord, tree, "task.", noun="field")
    inputs = _inputs(record.inputs)
    if not isinstance(inputs, ImageInputs):
        raise ValueError("task.inputs of a segmentation should be images")
    return Segmentation(inputs, _names(record.class_names))


def _regression(tree: dict[str, Any]) -> Task:
    record = from_tree(_NumbersRecord, tree, "task.", noun="field")
    num = len(_names(record.target_names))
    if len(record.mean) != num or len(record.std) != num or min(record.std) <= 0:
        raise ValueError(f"task.mean and task.std should be {num} numbers, deviations positive")
    return Regression(_inputs(record.inputs), record.target_names, record.mean, record.std)


def _next_token(tree: dict[str, Any]) -> Task:
    record = from_tree(_TokensRecord, tree, "task.", noun="field")
    if not 1 <= record.window < 2**20:
        raise ValueError(f"task.window = {record.window} is no number of tokens")
    return NextToken(Vocabulary.from_dict(record.vocabulary), record.window)


def _names(names: tuple[str, ...]) -> tuple[str, ...]:
    if not 0 < len(names) <= _MOST_NAMES:
        raise ValueError(f"task has {len(names)} names")
    return names


def _inputs(tree: dict[str, Any]) -> ImageInputs | TableInputs | TensorInputs:
    kind, fields = tree.get("kind"), {key: value for key, value in tree.items() if key != "kind"}
    if kind == "images":
        return _images(fields)
    if kind == "table":
        return TableInputs.from_dict(fields)
    if kind != "tensors":
        raise ValueError(f"task.inputs.kind = {kind!r} is not one of {', '.join(_INPUTS)}")
    inputs = from_tree(TensorInputs, fields, "task.inputs.", noun="field")
    lengths = (1, inputs.shape[0]) if len(inputs.shape) == 1 else (1,)
    has_sizes = inputs.shape and min(inputs.shape) > 0 and math.prod(inputs.shape) <= _MOST_PIXELS
    if not has_sizes or len(inputs.mean) not in lengths or len(inputs.std) != len(inputs.mean) or min(inputs.std) <= 0:
        raise ValueError("task.inputs holds no shape with its means and positive deviations")
    if inputs.num_values is not None and not 0 < inputs.num_values <= _MOST_NAMES:
        raise ValueError(f"task.inputs.num_values = {inputs.num_values} is out of range")
    return inputs


def _image_classification(record: Mapping[str, Any]) -> Task:
    """Read the flat record of an image classification, which names no task."""
    inputs = {"kind": "images", **{key: record[key] for key in ("image_shape", "mean", "std", "grey_range")}}
    task = _classification({"class_names": record["class_names"], "inputs": inputs})
    num_classes = record["num_classes"]
    if type(num_classes) is not int or num_classes != len(task.class_names):
        raise ValueError(f"num_classes = {num_classes!r:.80} is not the number of class_names")
    return task


def _images(tree: dict[str, Any]) -> ImageInputs:
    inputs = from_tree(ImageInputs, tree | {"augmentation": "none"}, noun="field")
    shape = inputs.image_shape
    if min(shape) < 1 or math.prod(shape) > _MOST_PIXELS:
        raise ValueError(f"image_shape = {list(shape)!r:.80} is no [H, W, C]")
    for name, values in (("mean", inputs.mean), ("std", inputs.std)):
        if len(values) != shape[2] or not all(-_LARGE < value < _LARGE for value in values):
            raise ValueError(f"{name} = {list(values)!r:.80} should be {shape[2]} numbers, one a channel")
    if not -_LARGE < inputs.grey_range[0] < inputs.grey_range[1] < _LARGE:
        raise ValueError(f"grey_range = {inputs.grey_range!r:.80} should be black and white, of pixels of over 8 bits")
    if min(inputs.std) <= 0:
        raise ValueError(f"std = {list(inputs.std)} must be positive")
    return inputs
