"""Records to plain trees and back, with mistakes told in the user's words."""

import dataclasses
import difflib
import functools
import math
import types
import typing
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Literal, TypeVar


def nearest(word: str, known: Iterable[str]) -> str:
    """'; did you mean mnist?' where a known word is near, else ''. Words that look the same are spelled out."""
    found = next(iter(difflib.get_close_matches(word, list(known), n=1)), None)
    if found is None:
        return ""
    if unicodedata.normalize("NFC", found) == unicodedata.normalize("NFC", word):
        return f"; did you mean {found!a}, of other Unicode characters than {word!a}?"
    return f"; did you mean {found}?"


def need(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_fields(record: Any, prefix: str, **ranges: str) -> None:
    """Refuse values of the wrong type, numbers out of their field's range, empty texts and texts of several lines.

    Ints become floats where floats are due, so that equal configs have equal JSON. A range is written "[0, 1)"; ∞ is
    never in it, nor is NaN, and whole numbers end below 2^63. None is what its field says it is.

    Raises:
        ValueError: with the field's dotted name, the value and what it may be.
    """
    for name, hint in _hints(type(record)).items():
        value = getattr(record, name)
        if dataclasses.is_dataclass(hint):
            assert isinstance(value, typing.cast(type, hint)), f"{prefix}{name} is a {type(value).__name__}"
            continue
        value = _checked(hint, value, prefix + name)
        object.__setattr__(record, name, value)
        if isinstance(value, str):
            _check_text(prefix + name, value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            check_number(prefix + name, value, ranges[name])


def check_number(name: str, value: float, range: str) -> None:
    """Refuse a number that is not in the range, which check_fields() describes."""
    low, high = (float(end.replace("∞", "inf")) for end in range[1:-1].split(", "))
    above = value >= low if range[0] == "[" else value > low
    below = value <= high if range[-1] == "]" else value < high
    finite = -(2**63) <= value < 2**63 if isinstance(value, int) else math.isfinite(value)
    if above and below and finite:
        return
    if high < math.inf:
        words = f"in {range}"
    elif low > -math.inf:
        words = f"at least {low:g}" if low else "positive" if range[0] == "(" else "0 or more"
    else:
        words = "a number"
    if not (finite or math.isnan(value) or high < math.inf):
        words += " and finite" if isinstance(value, float) else " and below 2^63"
    raise ValueError(f"{name} = {value} must be {words}")


def _check_text(name: str, text: str) -> None:
    need(bool(text.strip()), f"{name} is empty: give it a value, or leave it out")
    control = next((char for char in text if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp")), None)
    if control is not None:
        raise ValueError(f"{name} = {text!r} holds {control!r}, which is no character of a name: leave it out")


_hints = functools.cache(typing.get_type_hints)

T = TypeVar("T")


def from_tree(cls: type[T], tree: Mapping[str, Any], prefix: str) -> T:
    need(isinstance(tree, Mapping), f"{prefix or 'config'} should be an object, not {tree!r}")
    hints = _hints(cls)
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if key not in hints:  # not need(): looking for the nearest word would be most of the time a config takes
            raise ValueError(f"there is no config field {prefix}{key}{nearest(key, hints)}")
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            value = from_tree(typing.cast(type, hint), value, f"{prefix}{key}.")
        values[key] = value
    return cls(**values)


def _checked(hint: Any, value: Any, name: str) -> Any:
    """The value, an int widened where a float is due; refused where its type or its word is not the field's."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if typing.get_origin(option) is Literal:
            if value in typing.get_args(option):
                return value
        elif option is float and isinstance(value, int | float) and not isinstance(value, bool):
            huge = isinstance(value, int) and abs(value) >= 2**1023
            return math.copysign(math.inf, 1 if value > 0 else -1) if huge else float(value)
        elif isinstance(value, option) and not (option is int and isinstance(value, bool)):
            return value
    words = [str(word) for option in options for word in typing.get_args(option)]
    if words:
        raise ValueError(f"{name} = {value!r} is not one of {', '.join(words)}{nearest(str(value), words)}")
    raise ValueError(f"{name} = {value!r} should be {' or '.join(getattr(o, '__name__', str(o)) for o in options)}")


def parse_value(word: str) -> Any:
    """The number, truth value, None or word that a field's value is written as: 100, 0.05, true, None, cosine."""
    words = {"True": True, "true": True, "False": False, "false": False, "None": None}
    if word in words:
        return words[word]
    for kind in (int, float):
        with suppress(ValueError):
            return kind(word)
    return word


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names to values, of to_dict()'s nested dicts."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def shapes_result(key: str) -> bool:
    """Whether a dotted field may change a number of the result; the others may differ when a run resumes."""
    free = (
        "name",
        "storage_path",
        "cluster.",
        "tracking.",
        "actors.max_num",
        "actors.max_attempts",
        "actors.stall_s",
        "actors.checkpoint_",
        "data.root",
        "data.download",
    )
    return not key.startswith(free)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, old value, new value) of every field that shapes the result and differs."""
    a, b = flatten(old), flatten(new)
    for key in sorted(a.keys() | b.keys()):
        if shapes_result(key) and a.get(key) != b.get(key):
            yield key, a.get(key), b.get(key)
