"""What Arrow's columns hold, and their values as arrays."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
from pyarrow import compute

NumberKind = Literal["number", "time"]  # a time is read as seconds
Kind = NumberKind | Literal["category", "list"]  # lists of numbers, as many in each row

OF_LISTS = "; give each number of the lists a column, or return arrays from a function (--data.name module:function)"
_ONE_LENGTH = "give all rows one length, padded if need be, here or as arrays of a package.module:function"
_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def is_string(type_: pa.DataType) -> bool:
    """Return True for texts in any of Arrow's layouts."""
    return pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_)


def kind_of_column(type_: pa.DataType) -> Kind | None:
    """Return what values of a type can be learned as; None if they cannot. Nulls alone count as numbers.

    Dates, times and durations convert to seconds; spans of months do not.
    """
    if pa.types.is_dictionary(type_):
        return "category" if kind_of_column(type_.value_type) not in (None, "list") else None
    if is_string(type_):
        return "category"
    if pa.types.is_temporal(type_) and not pa.types.is_interval(type_):
        return "time"
    if is_list(type_):
        return "list" if kind_of_column(type_.value_type) == "number" else None
    is_any = (pa.types.is_null, pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
    return "number" if any(is_kind(type_) for is_kind in is_any) else None


def is_list(type_: pa.DataType) -> bool:
    """Return True for lists of any length, and of a fixed one."""
    return pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_)


def array_of_lists(column: pa.ChunkedArray, name: str, place: Callable[[int], str]) -> np.ndarray:
    """Convert lists, also of lists, to an array [N, …].

    Args:
        name: the column's, in messages.
        place: returns "in row 7 …" of a row.

    Raises:
        ValueError: with a row whose list is missing or differs in length from the first row's.
    """
    values, shape = column.combine_chunks(), [len(column)]
    while is_list(values.type):
        lengths = np.asarray(compute.call_function("list_value_length", [values]).fill_null(-1))
        unlike = np.flatnonzero((lengths != lengths[:1]) | (lengths < 0))
        if len(unlike):
            row, length = place(int(unlike[0]) // math.prod(shape[1:])), int(lengths[unlike[0]])
            problem = f"has no list {row}" if length < 0 else f"has a list of {length} {row}, not {lengths[0]}"
            raise ValueError(f"{name} {problem}: {_ONE_LENGTH}")
        values, shape = values.flatten(), [*shape, int(lengths[0]) if len(lengths) else 0]
    return values.to_numpy(zero_copy_only=False).reshape(shape)


def remedy_of(type_: pa.DataType) -> str:
    """Return what messages advise for a column of lists that cannot be learned as they are, or ""."""
    return OF_LISTS if is_list(type_) else ""


def is_number(text: str) -> bool:
    """Return True if float() reads the text."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def places(texts: pa.ChunkedArray, values: Sequence[str]) -> np.ndarray:
    """Return the position of each text in the values, int64 [N], -1 if it is not among them."""
    options = compute.SetLookupOptions(pa.array(values, pa.string()))
    return np.array(compute.call_function("index_in", [texts], options).fill_null(-1), np.int64)


def seconds(values: pa.ChunkedArray) -> np.ndarray:
    """Copy dates, times or durations as seconds, float64, with NaN for nulls."""
    if pa.types.is_date(values.type):
        values = values.cast(pa.timestamp("ms"))
    elif pa.types.is_time32(values.type):
        values = values.cast(pa.time64("us"))
    return float64(values.cast(pa.int64())) / _PER_SECOND[values.type.unit]


def float64(values: pa.ChunkedArray) -> np.ndarray:
    """Copy the values as float64, with NaN for nulls."""
    values = values.cast(pa.int8()) if pa.types.is_boolean(values.type) else values
    return np.array(values.cast(pa.float64(), safe=False).to_numpy(), dtype=np.float64)


def such_as(values: pa.ChunkedArray) -> str:
    """Return ", such as 7" with the first value that is not missing, or "" if there is none."""
    present = values.drop_null()
    return f", such as {present[0].as_py()!r}" if len(present) else ""


def alike_but_for_case(names: Sequence[str]) -> str:
    """Return "'cat' and 'Cat '" for the first two names that differ in white space or case alone, or ""."""
    known = dict[str, str]()
    for name in names:
        other = known.setdefault("".join(name.split()).casefold(), name)
        if other != name:
            return f"{other!r} and {name!r}"
    return ""
