"""The user's own data, models and subsets: functions that a config names as package.module:function."""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from raysubset.config import nearest


def load_function(field: str, reference: str) -> Callable[..., Any]:
    """The function that a field's "package.module:function" names; its module may lie in the working directory.

    Raises:
        ValueError: if there is no such module or function. Errors inside the module pass through.
    """
    module_name, _, name = reference.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), name)):
        raise ValueError(f"{field} = {reference!r} should be package.module:function")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"{field} = {reference!r}: no module {error.name} in {here} or installed") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{field} = {reference!r}: {module_name} has no function {name}{nearest(name, vars(module))}")
    return function
