"""Objects that a program gives in place of names: a config says given:Net, and the run's processes hold the object.

The objects live in memory only. Their digests are all that is written, and whoever resumes gives the objects again.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

PREFIX = "given:"
GIVEN_DATA = f"{PREFIX}data"


@dataclass(frozen=True)
class Instance:
    """An object in the place of a function. A call returns the object, or a copy of it for each caller."""

    value: Any
    copied: Callable[[Any], Any] | None = None

    def __call__(self) -> Any:
        return self.value if self.copied is None else self.copied(self.value)


@dataclass(frozen=True)
class Given:
    """The objects that a process holds, by the names that configs have for them."""

    objects: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    fingerprints: Mapping[str, pa.Table] = field(default_factory=dict)  # of networks and tasks; data have their own
    load: "Callable[[], Given] | None" = None  # loads the objects in other processes, once they are put for them

    def for_others(self) -> "Given":
        """Return the objects that other processes need: all but data, which are put as the full set."""
        return Given({name: value for name, value in self.objects.items() if name != GIVEN_DATA}, self.fingerprints)


_held = ContextVar[Given]("held")  # in a holding() block, of its thread alone: others may run with other objects
_held_by_process = Given()  # in all other threads


def held_objects() -> Given:
    """Return the objects that this thread holds."""
    return _held.get(_held_by_process)


def hold(given: Given) -> None:
    """Hold these objects in this process from now on; in a holding() block, in this thread until the block ends."""
    global _held_by_process
    if _held.get(None) is None:
        _held_by_process = given
    else:
        _held.set(given)


@contextlib.contextmanager
def holding(given: Given) -> Iterator[None]:
    """Hold these objects too, for the length of the block."""
    previous = held_objects()
    objects, fingerprints = {**previous.objects, **given.objects}, {**previous.fingerprints, **given.fingerprints}
    load = None if given.objects else previous.load  # new objects are not in what is already put for other processes
    token = _held.set(Given(objects, fingerprints, load))
    try:
        yield
    finally:
        _held.reset(token)


def is_given(reference: str) -> bool:
    """Return True if the name stands for an object."""
    return reference.startswith(PREFIX)


def is_instance(reference: str) -> bool:
    """Return True if the name stands for an existing object, such as a network with its weights, and not a function."""
    return isinstance(held_objects().objects.get(reference), Instance)


def given_object(field: str, reference: str) -> Callable[..., Any]:
    """Return the object that a field's given:Name stands for.

    Raises:
        ValueError: if this process does not hold it.
    """
    if reference not in held_objects().objects:
        argument = field.partition(".")[0]
        raise ValueError(
            f"{field} = {reference!r} stands for an object that a Python program gave: give it again, "
            f"{argument}=…, beside the config"
        )
    return held_objects().objects[reference]


def given_fingerprint(field: str, reference: str) -> pa.Table:
    """Return the digests of a network or a task. Data have none here: they are known by what is read of them."""
    given_object(field, reference)
    return held_objects().fingerprints[reference]
