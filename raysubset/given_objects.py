"""Objects that a program gives in place of names: a config says given:Net, and the run's processes have the object.

They live in memory alone: nothing of them is written but their digests, and whoever resumes gives them again.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

PREFIX = "given:"


@dataclass(frozen=True)
class Instance:
    """An object where a function is called for: gives it, or a copy of its own to each caller."""

    value: Any
    copied: Callable[[Any], Any] | None = None

    def __call__(self) -> Any:
        return self.value if self.copied is None else self.copied(self.value)


@dataclass(frozen=True)
class Given:
    """What is in hand, by what configs call it."""

    objects: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    fingerprints: Mapping[str, pa.Table] = field(default_factory=dict)  # of those that data's own do not stand for
    here: frozenset[str] = frozenset()  # what no other process needs: data are put as the full set
    load: "Callable[[], Given] | None" = None  # how other processes get it, once it is put where they can

    def for_others(self) -> "Given":
        """What other processes need of it."""
        return Given({name: value for name, value in self.objects.items() if name not in self.here}, self.fingerprints)


_in_hand = Given()


def in_hand() -> Given:
    """What this process has."""
    return _in_hand


def take(given: Given) -> None:
    """Have these in this process from now on: in one that works for another."""
    global _in_hand
    _in_hand = given


@contextlib.contextmanager
def holding(given: Given) -> Iterator[None]:
    """Have these too, as long as the block."""
    before = _in_hand
    objects, fingerprints = {**before.objects, **given.objects}, {**before.fingerprints, **given.fingerprints}
    load = None if given.objects else before.load  # where they are put already, they need not be again
    take(Given(objects, fingerprints, before.here | given.here, load))
    try:
        yield
    finally:
        take(before)


def is_given(reference: str) -> bool:
    """Whether a name stands for an object."""
    return reference.startswith(PREFIX)


def is_instance(reference: str) -> bool:
    """Whether it stands for one that is there already, as a network with its weights, and is not made by a call."""
    return isinstance(_in_hand.objects.get(reference), Instance)


def given_object(field: str, reference: str) -> Callable[..., Any]:
    """The object that a field's given:Name stands for.

    Raises:
        ValueError: if this process was not given it.
    """
    if reference not in _in_hand.objects:
        argument = field.partition(".")[0]
        raise ValueError(
            f"{field} = {reference!r} stands for an object that a Python program had in hand: give it again, "
            f"{argument}=…, beside the config"
        )
    return _in_hand.objects[reference]


def given_fingerprint(field: str, reference: str) -> pa.Table:
    """Digests of a network or a task; data are known by what is read of them."""
    given_object(field, reference)
    return _in_hand.fingerprints[reference]
