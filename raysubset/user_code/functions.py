"""The user's own data, models and subsets: functions that a config names as package.module:function."""

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from raysubset.config import nearest
from raysubset.errors import first_line, place_of
from raysubset.user_code.given import given_object, is_given
from raysubset.user_code.source_files import search_here

_GUARD = 'under `if __name__ == "__main__":`'

_imported = ContextVar[str]("imported", default="")  # the user's module that this thread is importing


def call_function(field: str, reference: str, *arguments: Any) -> Any:
    """Call the function that a field names, and return its result.

    Raises:
        ValueError: if there is no such function, or it raises or ends the process. The message says what happened and
            at which line of the user's file.
    """
    function = load_function(field, reference)
    with in_a_line(field, reference):
        return function(*arguments)


def load_function(field: str, reference: str) -> Callable[..., Any]:
    """Import the function that a field's "package.module:function" names. The working directory is searched too.

    Raises:
        ValueError: if there is no such module or function, or the module raises or ends the process on import.
    """
    if is_given(reference):
        return given_object(field, reference)
    module_name, _, name = reference.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), name)):
        raise ValueError(f"{field} = {reference!r} should be package.module:function")
    if module_name == "__main__":
        raise ValueError(
            f"{field} = {reference!r}: other processes cannot import what a script or notebook defines: write {name} "
            f"into a file of its own, such as network.py, and name network:{name}, or give run() the object itself"
        )
    search_here()
    token = _imported.set(module_name)
    try:
        with in_a_line(field, reference):
            module = importlib.import_module(module_name)
    except ValueError as error:
        missing = error.__cause__
        if isinstance(missing, ModuleNotFoundError) and f"{module_name}.".startswith(f"{missing.name}."):
            text = f"{field} = {reference!r}: no module {missing.name} in {os.getcwd()} or installed: put it there"
            raise ValueError(text) from missing
        raise
    finally:
        _imported.reset(token)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(
            f"{field} = {reference!r}: {module_name} has no function {name}"
            f"{nearest(name, vars(module)) or '; write package.module:function'}"
        )
    return function


def refuse_import(what: str) -> None:
    """Refuse to begin a run, sweep or comparison while load_function() imports the user's module.

    Raises:
        ValueError: if a module is being imported: its script has no main guard.
    """
    if module := _imported.get():
        raise _NoMainGuard(
            f"{module} calls {what} when it is imported, as every actor does for a function of it: put the call "
            f"{_GUARD}"
        )


class _NoMainGuard(ValueError):
    """A script begins a run whenever it is imported."""


@contextlib.contextmanager
def in_a_line(field: str, reference: str) -> Iterator[None]:
    """Turn into a one-line ValueError what the user's code raises, and an exit of the process.

    A failure of a device or of another worker (torch.AcceleratorError, torch.distributed.DistError) passes unchanged:
    it is no mistake of the user's, and the next attempt may do the work. So does torch's error for a card that is full,
    which one_line() describes.
    """
    try:
        yield
    except _NoMainGuard:
        raise
    except (Exception, SystemExit) as error:
        torch = sys.modules.get("torch")
        if torch and isinstance(error, torch.AcceleratorError | torch.OutOfMemoryError | torch.distributed.DistError):
            raise
        text = f"raised {type(error).__name__}: {first_line(error)}"
        if isinstance(error, SystemExit):
            code = "" if error.code is None else repr(error.code)
            text = f"ended the process (sys.exit({code})): put what a script does, such as parsing flags, {_GUARD}"
        place = place_of(error) or "see what it is called with"
        raise misfit(field, reference, f"{text}; {place}") from error


def misfit(field: str, reference: str, text: str) -> ValueError:
    """Return the error for the user's code that does not fit; the text says what it did, and the way out."""
    return ValueError(f"{field} = {reference!r} {text}")
