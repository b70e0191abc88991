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
from typing import Annotated, Any, Literal, TypeVar

from raysubset.uris import shown


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


def check_fields(record: Any, prefix: str) -> None:
    """Refuse values of the wrong type, numbers out of their field's range, empty texts and texts of several lines.

    Ints become floats where floats are due, so that equal configs have equal JSON. The type of a number's field has its
    range: Annotated[float, "[0, 1)"]. ∞ is never in it, nor is NaN, and whole numbers end below 2^63. None is what its
    field says it is.

    Raises:
        ValueError: with the field's dotted name, the value and what it may be.
    """
    for name, hint in _hints(type(record)).items():
        value = getattr(record, name)
        if dataclasses.is_dataclass(hint):
            kind = typing.cast(type, hint)
            if not isinstance(value, kind):
                way_out = f"give a {kind.__name__}, or single fields by Config.with_overrides()"
                raise ValueError(f"{prefix}{name} = {_shown(value)} is no {kind.__name__}: {way_out}")
            continue
        if type(value) is not hint:
            value = _checked(hint, value, prefix + name)
            object.__setattr__(record, name, value)
        if isinstance(value, str):
            _check_text(prefix + name, value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            check_number(prefix + name, value, ranges_of(type(record))[name])


def check_number(name: str, value: float, range: str) -> None:
    """Refuse a number that is not in the range, which check_fields() describes."""
    low, high = _ends(range)
    above = value >= low if range[0] == "[" else value > low
    below = value <= high if range[-1] == "]" else value < high
    finite = -(2**63) <= value < 2**63 if isinstance(value, int) else math.isfinite(value)
    if above and below and finite:
        return
    words = range_in_words(range) or "a number"
    if not (finite or math.isnan(value) or high < math.inf):
        words += " and finite" if isinstance(value, float) else " and below 2^63"
    raise ValueError(f"{name} = {value} must be {words}")


def range_in_words(range: str) -> str:
    """'in [0, 1)', 'at least 1', 'positive' or '0 or more'; '' where every number is in it."""
    low, high = _ends(range)
    if high < math.inf:
        return f"in {range}"
    if low == -math.inf:
        return ""
    return f"at least {low:g}" if low else "positive" if range[0] == "(" else "0 or more"


@functools.cache
def _ends(range: str) -> tuple[float, float]:
    low, high = (float(end.replace("∞", "inf")) for end in range[1:-1].split(", "))
    return low, high


def _check_text(name: str, text: str) -> None:
    need(bool(text.strip()), f"{name} is empty: give it a value, or leave it out")
    control = next((char for char in text if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp")), None)
    if control is not None:
        raise ValueError(f"{name} = {shown(text)!r} holds {control!r}, which is no character of a name: leave it out")


_hints = functools.cache(typing.get_type_hints)  # without what Annotated adds


@functools.cache
def ranges_of(cls: type) -> dict[str, str]:
    """The ranges of fields that are Annotated with one."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items() if typing.get_origin(hint) is Annotated}


T = TypeVar("T")


def from_tree(cls: type[T], tree: Any, prefix: str = "", *, noun: str = "config field") -> T:
    """A dataclass of what JSON holds, each value of its field's type; fields left out keep their defaults.

    Types may be numbers, which are finite, words, truth values, None, Literals, lists, tuples, dicts by name,
    dataclasses, and unions of one of these with None. Classes that check their fields themselves are left to it.

    Args:
        prefix: of the dotted names that messages show.
        noun: what messages call a field.

    Raises:
        ValueError: for a tree of another shape, an unknown or missing field, or a value of another type.
    """
    need(isinstance(tree, Mapping), f"{prefix.rstrip('.') or noun.split()[0]} should be an object, not {_shown(tree)}")
    hints, checks_itself = _hints(cls), hasattr(cls, "__post_init__")
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if key not in hints:  # not need(): looking for the nearest word would be most of the time a config takes
            raise ValueError(f"there is no {noun} {prefix}{key}{nearest(key, hints)}")
        if not checks_itself or dataclasses.is_dataclass(hints[key]):
            value = _checked(hints[key], value, prefix + key, noun)
        values[key] = value
    for field in dataclasses.fields(typing.cast(Any, cls)):
        if field.name not in tree and field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"the {noun} {prefix}{field.name} is missing")
    return cls(**values)


def _checked(hint: Any, value: Any, name: str, noun: str = "") -> Any:
    """The value as its field has it, an int widened where a float is due; refused where type or word are others.

    Args:
        noun: as from_tree() takes it; without, numbers may be infinite: their ranges tell.
    """
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    for option in options:
        origin, parts = typing.get_origin(option) or option, typing.get_args(option)
        if option is Any:
            return value
        if origin is Literal:
            if isinstance(value, str) and value in parts:
                return value
        elif dataclasses.is_dataclass(option):
            if isinstance(value, Mapping) or len(options) == 1:
                return from_tree(typing.cast(type, option), value, f"{name}.", noun=noun)
        elif origin in (list, tuple) and parts:
            any_number = origin is list or parts[-1] is ...
            if isinstance(value, list | tuple) and (any_number or len(parts) == len(value)):
                kinds = parts[:1] * len(value) if any_number else parts
                items = enumerate(zip(kinds, value, strict=True))
                return origin(_checked(kind, item, f"{name}[{i}]", noun) for i, (kind, item) in items)
        elif origin is dict and parts:
            if isinstance(value, Mapping):
                return {key: _checked(parts[1], item, f"{name}.{key}", noun) for key, item in value.items()}
        elif option is float and isinstance(value, int | float) and not isinstance(value, bool):
            huge = isinstance(value, int) and abs(value) >= 2**1023
            number = math.copysign(math.inf, 1 if value > 0 else -1) if huge else float(value)
            need(not noun or math.isfinite(number), f"{name} = {number} is no finite number")
            return number
        elif isinstance(value, option) and not (option is int and isinstance(value, bool)):
            return value
    literals = [option for option in options if typing.get_origin(option) is Literal]
    words = [str(word) for literal in literals for word in typing.get_args(literal)]
    if words:
        raise ValueError(f"{name} = {_shown(value)} is not one of {', '.join(words)}{nearest(str(value), words)}")
    kinds = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    raise ValueError(f"{name} = {_shown(value)} should be {kinds}")


def _shown(value: Any) -> str:
    """A value from a file in a few words."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


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
    return dict(leaves(tree, prefix))


def leaves(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """flatten()'s names and values, one after another: a name may come twice where some are dotted already."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


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
        "actors.on_step",
        "actors.profile",
        "actors.checkpoint_",
        "rounds.keep_minima",
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
