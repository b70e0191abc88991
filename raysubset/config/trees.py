"""Turn records into plain trees and back, and report mistakes in the user's words."""

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

T = TypeVar("T")


def nearest(word: str, known: Iterable[str]) -> str:
    """Return '; did you mean mnist?' if a known word is close, else ''. Words that look alike are shown escaped."""
    match = next(iter(difflib.get_close_matches(word, list(known), n=1)), None)
    if match is None:
        return ""
    if unicodedata.normalize("NFC", match) == unicodedata.normalize("NFC", word):
        return f"; did you mean {match!a}, of other Unicode characters than {word!a}?"
    return f"; did you mean {match}?"


def need(condition: object, message: str) -> None:
    if not condition:
        raise ValueError(message)


@typing.dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,))
class Part:
    """A group of settings that checks itself: each subclass is a frozen dataclass, made by keywords.

    `prefix` is the start of its fields' dotted names.
    """

    prefix = ""

    def __init_subclass__(cls, prefix: str = "") -> None:
        cls.prefix = prefix
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)

    def __post_init__(self) -> None:
        check_fields(self, self.prefix)
        for problem in self.problems():
            raise ValueError(problem)

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with values that do not go together, each in a line with the way out."""
        return iter(())


def check_fields(record: Any, prefix: str) -> None:
    """Refuse values of the wrong type, numbers outside their field's range, and empty, multi-line or unknown words.

    Ints in float fields become floats, so that equal configs have equal JSON. A number's range stands in its field's
    type: Annotated[float, "[0, 1)"]. No range includes infinity or NaN, and ints must be below 2^63. So do the names of
    a field that may also name the user's own code: Annotated[str, ("sgd", "adam", "package.module:function")]. What
    None means is documented at each field.

    Raises:
        ValueError: with the field's dotted name, its value and the values it may have.
    """
    annotations = _annotations(type(record))
    for name, hint, kind, plain in _kinds(type(record)):
        value = getattr(record, name)
        if kind:
            if not isinstance(value, kind):
                way_out = f"give a {kind.__name__}, or single fields by Config.with_overrides()"
                raise ValueError(f"{prefix}{name} = {_shown(value)} is no {kind.__name__}: {way_out}")
            continue
        if type(value) not in plain:
            value = _checked(hint, value, prefix + name)
            object.__setattr__(record, name, value)
        if isinstance(value, str):
            _check_text(prefix + name, value, annotations.get(name))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            check_number(prefix + name, value, annotations[name])


def check_number(name: str, value: float, range: str) -> None:
    """Refuse a number outside the range, such as "[0, 1)"; check_fields() says what ranges mean."""
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


def list_of(name: str, values: Any, kind: type[T]) -> list[T]:
    """Return an argument's values, those of numpy as Python's own. A single one, a text above all, is a list of one.

    Raises:
        ValueError: if one is not of this kind: float, which an int is too, int or str.
    """
    is_single = isinstance(values, str) or not isinstance(values, Iterable)
    items: list[Any] = [values] if is_single else list(values)
    items = [item.item() if hasattr(item, "item") else item for item in items]
    for item in items:
        if isinstance(item, bool) or not isinstance(item, (int, float) if kind is float else kind):
            noun = {float: "a number", int: "a whole number", str: "a text"}[kind]
            raise ValueError(f"{name}: {item!r} should be {noun}")
    return items


def range_in_words(range: str) -> str:
    """Return 'in [0, 1)', 'at least 1', 'positive' or '0 or more'; '' if the range includes every number."""
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


def _check_text(name: str, text: str, words: Any) -> None:
    """Refuse a text that is empty or not one line, or, given the names it may be and the form of others, is neither."""
    need(bool(text.strip()), f"{name} is empty: give it a value, or leave it out")
    control = next((char for char in text if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp")), None)
    if control is not None:
        raise ValueError(f"{name} = {shown(text)!r} holds {control!r}, which names cannot have: leave it out")
    if isinstance(words, tuple) and text not in words[:-1] and ":" not in text:
        *names, own = words
        wanted = f"is not one of {', '.join(names)}, nor a {own}" if names else f"should be {own}"
        raise ValueError(f"{name} = {text!r} {wanted}{nearest(text, names)}")


_hints = functools.cache(typing.get_type_hints)  # without what Annotated adds


@functools.cache
def _annotations(cls: type) -> dict[str, Any]:
    """Return what fields are Annotated with: a number's range, or the names that a text may be."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items() if typing.get_origin(hint) is Annotated}


@functools.cache
def _kinds(cls: type) -> list[tuple[str, Any, type | None, tuple[type, ...]]]:
    """Return of each field its name and type, the latter also apart: a dataclass, or types whose values are as they
    should be. Of union with floats, ints are not."""
    kinds = []
    for name, hint in _hints(cls).items():
        options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
        plain = tuple(option for option in options if option in (str, bool, int, float, types.NoneType))
        plain = tuple(option for option in plain if not (option is int and float in plain))
        kinds.append((name, hint, hint if dataclasses.is_dataclass(hint) else None, plain))
    return kinds


def ranges_of(cls: type) -> dict[str, str]:
    """Return the ranges of a class's numbers, by field."""
    return {name: range for name, range in _annotations(cls).items() if isinstance(range, str)}


def from_tree(cls: type[T], tree: Any, prefix: str = "", *, noun: str = "config field") -> T:
    """Build a dataclass from parsed JSON and check each value's type; fields left out keep their defaults.

    Fields may be finite numbers, strings, booleans, None, Literals, tuples, dataclasses, and unions of one of these
    with None. A Part checks its fields itself.

    Args:
        prefix: the start of the dotted names in messages.
        noun: what messages call a field.

    Raises:
        ValueError: if the tree is no mapping, a field is unknown or missing, or a value has the wrong type.
    """
    need(isinstance(tree, Mapping), f"{prefix.rstrip('.') or noun.split()[0]} should be an object, not {_shown(tree)}")
    hints, checks_itself = _hints(cls), issubclass(cls, Part)
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
    """Return the value in its field's type, with ints in float fields widened; refuse other types and words.

    Args:
        noun: as in from_tree(). If empty, numbers may be infinite: check_number() refuses them.
    """
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    for option in options:
        origin, parts = typing.get_origin(option), typing.get_args(option)
        if origin is Literal:
            if isinstance(value, str) and value in parts:
                return value
        elif origin is tuple:
            kinds = parts[:1] * len(value) if parts[-1] is ... and isinstance(value, list | tuple) else parts
            if isinstance(value, list | tuple) and len(kinds) == len(value):
                items = enumerate(zip(kinds, value, strict=True))
                return tuple(_checked(kind, item, f"{name}[{i}]", noun) for i, (kind, item) in items)
        elif dataclasses.is_dataclass(option):
            if isinstance(value, typing.cast(type, option)):
                return value
            if isinstance(value, Mapping) or len(options) == 1:
                return from_tree(typing.cast(type, option), value, f"{name}.", noun=noun)
        elif option is float and isinstance(value, int | float) and not isinstance(value, bool):
            huge = isinstance(value, int) and abs(value) >= 2**1023
            number = math.copysign(math.inf, 1 if value > 0 else -1) if huge else float(value)
            need(not noun or math.isfinite(number), f"{name} = {number} is no finite number")
            return number
        elif isinstance(value, option) and not (option is int and isinstance(value, bool)):
            return value
    literals = [option for option in options if typing.get_origin(option) is Literal]
    words = [word for literal in literals for word in typing.get_args(literal)]
    if words:
        raise ValueError(f"{name} = {_shown(value)} is not one of {', '.join(words)}{nearest(str(value), words)}")
    kinds = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    raise ValueError(f"{name} = {_shown(value)} should be {kinds}")


def _shown(value: Any) -> str:
    """Return the value's repr, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def field_type(cls: type, name: str) -> Any:
    """Return the type of a field of a class, or of the classes of its fields, by dotted name; None if there is none."""
    kind: Any = cls
    for part in name.split("."):
        kind = _hints(kind).get(part) if dataclasses.is_dataclass(kind) else None
    return kind


def parse_value(word: str, kind: Any = None) -> Any:
    """Parse a field's value as a number, boolean, None or word: 100, 0.05, true, None, cosine.

    Args:
        kind: the field's type. A value that may be any text, such as a column's name, stays one, but for None.
    """
    options = (kind, *typing.get_args(kind))
    if str in options and not (word == "None" and types.NoneType in options):
        return word
    words = {"True": True, "true": True, "False": False, "false": False, "None": None}
    if word in words:
        return words[word]
    for kind in (int, float):
        with suppress(ValueError):
            return kind(word)
    return word


_CAME_LATER = (("rounds.overlap", False),)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Map dotted names to values, from nested dicts such as to_dict() returns."""
    return dict(leaves(tree, prefix))


def leaves(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield flatten()'s names and values: a name may come twice if some keys are dotted already."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


_FREE = (  # settings that cannot change the result
    *("name", "storage_path", "cluster.", "tracking.", "data.root", "data.download", "rounds.keep_minima"),
    *("actors.max_num", "actors.max_attempts", "actors.stall_s", "actors.on_step", "actors.profile"),
    "actors.checkpoint_",
)


def shapes_result(key: str) -> bool:
    """Return True if a dotted field may change the result; the other fields may change when a run resumes."""
    return not key.startswith(_FREE)


def shaping(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that shape a config's result, for digests. A field that was added later is left out while it
    is off, so that earlier names and keys stay."""
    return {key: value for key, value in leaves(tree) if shapes_result(key) and (key, value) not in _CAME_LATER}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted name, old value, new value) of every field that shapes the result and differs."""
    old_values, new_values = flatten(old), flatten(new)
    for key in sorted(old_values.keys() | new_values.keys()):
        if shapes_result(key) and old_values.get(key) != new_values.get(key):
            yield key, old_values.get(key), new_values.get(key)
