"""Arrays, networks and tasks that a program gives as objects instead of names: run(config, data=…, model=…)."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar

import pyarrow as pa
from torch import nn
from torch.nn.parameter import is_lazy

from raysubset.config import Config
from raysubset.errors import with_article
from raysubset.models import copied, lost_in_copies, torch_as_new, unwrapped
from raysubset.tasks import Task
from raysubset.user_code.given import PREFIX, Given, Instance, holding, is_given
from raysubset.user_code.object_digests import importable, object_fingerprint

P = ParamSpec("P")
T = TypeVar("T")

_UNNAMED = Config()  # has the default names


def accepts_objects(function: Callable[P, T]) -> Callable[P, T]:
    """Wrap a function of a config so that it accepts data, model and task as objects, which it holds by name.

    It computes as a new process does, whatever the caller has set in torch.
    """

    @functools.wraps(function)
    def call(config: Config, *arguments: Any, data: Any = None, model: Any = None, task: Any = None, **more: Any) -> T:
        if not isinstance(config, Config):
            raise ValueError(
                f"config is {with_article(config)}: give a raysubset.Config, such as "
                'Config().with_overrides({"minimize.epochs": 4.0})'
            )
        with torch_as_new(), hold_objects(config, data=data, model=model, task=task) as config:
            return function(config, *arguments, **more)  # pyright: ignore[reportCallIssue]

    return call  # pyright: ignore[reportReturnType]


@contextlib.contextmanager
def hold_objects(config: Config, *, data: Any = None, model: Any = None, task: Any = None) -> Iterator[Config]:
    """Hold the objects for the length of the block. Yield the config that names them.

    A function or class that its module has by name becomes package.module:name, as if the config named it. Other
    objects become given:Name in the config and config.json: whoever resumes gives them again, and their digests show
    what differs.

    Args:
        data: what a function that data.name names may return, or such a function.
        model: an nn.Module, whose weights are those of the shared start; or a function or class, called with the Spec.
        task: a raysubset.tasks.Task, or a class of it.

    Raises:
        ValueError: for an object beside a name, or one that cannot be used or given to other processes.
    """
    objects, fingerprints, names = dict[str, Any](), dict[str, pa.Table](), dict[str, str]()
    for argument, value in (("data", data), ("model", model), ("task", task)):
        if value is None:
            continue
        checked, config_name = _checked(argument, value), getattr(config, argument).name
        if not isinstance(checked, Instance) and (reference := importable(checked)):
            name = reference
        else:
            name = f"{PREFIX}{argument if argument == 'data' else _name_of(value)}"
            if name in objects:  # two lambdas have the same name
                name = f"{PREFIX}{argument}"
            objects[name] = checked
            if argument != "data":  # data are known by what is read of them
                fingerprints[name] = object_fingerprint(name, checked)
        if config_name not in (getattr(_UNNAMED, argument).name, name):
            raise ValueError(
                f"{argument} is given as an object, and {argument}.name = {config_name!r} too: leave one of them out"
            )
        names[f"{argument}.name"] = name
    with holding(Given(objects, fingerprints)):
        yield config.with_overrides(names)


@contextlib.contextmanager
def hold_objects_of(given: Mapping[str, Any], record: Any) -> Iterator[None]:
    """Hold objects by the names that a model's record has for them. The record may hold anything.

    Raises:
        ValueError: for an object that the record has no such name for.
    """
    objects = {}
    for argument, value in given.items():
        if value is None:
            continue
        tree = record.get(argument) if isinstance(record, dict) else None
        name = tree.get("name") if isinstance(tree, dict) else None
        if not isinstance(name, str) or not is_given(name):
            raise ValueError(f"the run was given no {argument} as an object, but one by name: leave {argument} out")
        objects[name] = _checked(argument, value)
    with holding(Given(objects)):
        yield


def _checked(argument: str, value: Any) -> Any:
    """Return the function, class or Instance that stands for the object in place of the function that a config names.

    Raises:
        ValueError: if the value cannot be used so.
    """
    if isinstance(value, str):
        hint = "; texts are given in a list" if argument == "data" else ""
        raise ValueError(f"{argument} = {value!r} is a name, or a path: set {argument}.name of the config{hint}")
    if argument == "data":
        return value if callable(value) and not hasattr(value, "__getitem__") else Instance(value)
    if argument == "task":
        if isinstance(value, Task):
            return Instance(value, copy.deepcopy)
        if not callable(value):
            raise ValueError(f"task is {with_article(value)}: give a raysubset.tasks.Task, or a class of it")
        return value
    value = unwrapped(value)
    if isinstance(value, nn.Module):
        if lazy := [name for name, tensor in (*value.named_parameters(), *value.named_buffers()) if is_lazy(tensor)]:
            text = f"model has parameters without a shape yet ({', '.join(lazy[:3])}{', …' if len(lazy) > 3 else ''})"
            raise ValueError(f"{text}: pass a batch through it first, or give a function that creates it")
        if hook := lost_in_copies(value):
            text = f"model has {hook}, which does not work in copies of it"
            raise ValueError(f"{text}: give a function that creates the network with it")
        return Instance(copied(value).cpu().train(), copied)
    if not callable(value):
        raise ValueError(f"model is {with_article(value)}: give an nn.Module, or a function of a Spec that creates one")
    return value


def _name_of(value: Any) -> str:
    """Return the name of a class or function, or of the object's class."""
    value = unwrapped(value)
    name = getattr(value, "__name__", type(value).__name__)
    return name if name.isidentifier() else "function"
