"""Converts tasks to the JSON of model.json and back. A stranger's file may hold anything, so all is checked."""

import dataclasses
from collections.abc import Mapping
from typing import Any, SupportsIndex

from raysubset.config import from_tree
from raysubset.config.trees import need
from raysubset.errors import with_article
from raysubset.tasks.classification import Classification
from raysubset.tasks.columns import TableInputs
from raysubset.tasks.inputs import ImageInputs, TensorInputs
from raysubset.tasks.next_token import NextToken
from raysubset.tasks.regression import Regression
from raysubset.tasks.segmentation import Segmentation
from raysubset.tasks.spec import Spec
from raysubset.tasks.task import Task
from raysubset.user_code.functions import call_function
from raysubset.user_code.given import held_objects, is_given

_MOST_NAMES = 2**20
_INPUTS = {"images": ImageInputs, "table": TableInputs, "tensors": TensorInputs}
_TASKS = {task.name: task for task in (Classification, Regression, Segmentation, NextToken)}
_OF_LOSS = ("objective", "ignored")  # fields that a record leaves out


def task_to_dict(task: Task) -> dict[str, Any]:
    """Return a task as JSON: what its inputs and outputs mean, without its loss.

    Raises:
        ValueError: if JSON cannot hold an attribute of a user's task.
    """
    if not isinstance(task, Classification | Regression | Segmentation | NextToken):
        return {"task": task.to_dict()}
    fields = {key: value for key, value in dataclasses.asdict(task).items() if key not in _OF_LOSS}
    if isinstance(task, NextToken):
        return {"task": {"name": task.name, **fields}}
    inputs = fields.pop("inputs")
    if isinstance(task, Classification) and isinstance(task.inputs, ImageInputs):  # the flat form, which names no task
        del inputs["augmentation"]
        return {"num_classes": len(task.class_names), **fields, **inputs}
    (kind,) = (name for name, cls in _INPUTS.items() if isinstance(task.inputs, cls))
    return {"task": {"name": task.name, **fields, "inputs": {"kind": kind, **inputs}}}


class RecordedTask(Task):
    """A user's task without its code: a record's shapes and names. They suffice for a network that is at hand."""

    def __init__(self, name: str, spec: Spec, class_names: tuple[str, ...]) -> None:
        self.name, self.class_names, self._spec = name, class_names, spec

    def spec(self) -> Spec:
        return self._spec

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        return RecordedTask, (self.name, self._spec, self.class_names)


def outline(task: Task) -> dict[str, Any]:
    """Return what a RecordedTask needs of a user's task, as JSON. A network's scaling needs the task itself: empty."""
    if ":" not in task.name or isinstance(getattr(task, "inputs", None), (*_INPUTS.values(),)):
        return {}
    return {"spec": dataclasses.asdict(task.spec()), "class_names": [*task.class_names]}


def task_from_dict(record: Mapping[str, Any], *, trust_code: bool = False) -> Task:
    """Rebuild a task from the record of task_to_dict().

    Args:
        trust_code: import the module of a user's own task. Otherwise the task is a RecordedTask.

    Raises:
        ValueError: if a value is missing or has the wrong type or range, or if the record names a user's task without
            outline(), and trust_code is False.
    """
    if "task" not in record:
        return _image_classification(record)
    tree = record["task"]
    if not isinstance(tree, dict) or not isinstance(tree.get("name"), str):
        raise ValueError("its task has no name")
    name, fields = tree["name"], {key: value for key, value in tree.items() if key != "name"}
    if ":" in name:
        is_held = name in held_objects().objects
        if "spec" in fields and not (is_held if is_given(name) else trust_code):
            return _recorded(name, fields)
        if is_given(name):
            if not is_held:
                raise ValueError(f"its task, {name}, was an object in Python: give it again, load_model(…, task=…)")
        elif not trust_code:
            raise ValueError(
                f"its task is code that it only names, {name}: if you trust whoever made this directory, give "
                "trust_code=True or --trust-code"
            )
        return own_task(name, fields.get("state") or {})
    if name not in _TASKS:
        raise ValueError(f"this version does not know its task {name!r}: update raysubset")
    return _task(_TASKS[name], fields)


@dataclasses.dataclass(frozen=True)
class _Outline:
    """The result of outline()."""

    spec: Spec
    class_names: tuple[str, ...]


def _recorded(name: str, fields: Mapping[str, Any]) -> RecordedTask:
    known = from_tree(_Outline, {key: fields.get(key) for key in ("spec", "class_names")}, "task.", noun="field")
    spec, kinds = known.spec, known.spec.num_values
    sizes = [*spec.inputs, *spec.outputs, *(kinds if isinstance(kinds, tuple) else (kinds,))]
    need(all(size is None or 0 < size < 2**63 for size in sizes), "task.spec should hold sizes")
    return RecordedTask(name, spec, known.class_names[:_MOST_NAMES])


def own_task(name: str, state: Mapping[str, Any] | None = None) -> Task:
    """Construct a user's task of class package.module:Class and set the attributes that fit() left.

    Raises:
        ValueError: if there is no such class, or it is no Task.
    """
    task = call_function("task.name", name)
    if not isinstance(task, Task):
        raise ValueError(f"task.name = {name!r} made {with_article(task)}: it should be a raysubset.tasks.Task")
    vars(task).update(state or {})
    vars(task)["name"] = name
    return task


def _task(cls: Any, fields: dict[str, Any]) -> Task:
    need(not fields.keys() & {*_OF_LOSS}, f"there is no field task.{' or task.'.join(_OF_LOSS)} in a record")
    if isinstance(inputs := fields.get("inputs"), dict):
        kind, of_inputs = str(inputs.get("kind")), {key: value for key, value in inputs.items() if key != "kind"}
        need(kind in _INPUTS, f"task.inputs.kind = {kind!r} is not one of {', '.join(_INPUTS)}")
        if kind == "images":
            of_inputs["augmentation"] = "none"  # the record is of the model, which draws none
        fields = {**fields, "inputs": from_tree(_INPUTS[kind], of_inputs, "task.inputs.", noun="field")}
    task = from_tree(cls, fields, "task.", noun="field")
    num = len(task.class_names or getattr(task, "target_names", ()))
    need(isinstance(task, NextToken) or 0 < num <= _MOST_NAMES, f"task has {num} names")
    return task


def _image_classification(record: Mapping[str, Any]) -> Task:
    """Read the flat record of an image classification, which names no task."""
    inputs = {"kind": "images", **{key: record[key] for key in ("image_shape", "mean", "std", "grey_range")}}
    task = _task(Classification, {"class_names": record["class_names"], "inputs": inputs})
    num_classes = record["num_classes"]
    is_count = type(num_classes) is int and num_classes == len(task.class_names)
    need(is_count, f"num_classes = {num_classes!r:.80} is not the number of class_names")
    return task
