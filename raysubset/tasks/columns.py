"""A table's columns as numbers: features fitted on training rows, and targets of regression. No files are read."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import torch
from pyarrow import compute
from torch import Tensor

from raysubset.config import from_tree, nearest
from raysubset.errors import listed
from raysubset.events import Note

Missing = Literal["refuse", "mean"]

MOST_VALUES = 100  # of a column of texts, one feature each

_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_DAY_S = 86400
_TEXTS: tuple[Callable[[pa.DataType], bool], ...] = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_dictionary,
)
_NUMBERS: tuple[Callable[[pa.DataType], bool], ...] = (
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_boolean,
    pa.types.is_decimal,
)


@dataclass(frozen=True)
class InputColumn:
    """How one column of a table becomes features: a standardised number, or one feature a category."""

    name: str
    kind: Literal["number", "time", "category"]  # a time is read as seconds
    mean: float = 0.0  # over training rows
    deviation: float = 1.0  # standard deviation over training rows, not of a sample (divided by N)
    values: tuple[str, ...] = ()  # of a category, as in training rows, in sorted order
    has_missing: bool = False  # whether a category's missing values are a category, the last

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The number's name, or "colour=red" for each category."""
        if self.kind != "category":
            return (self.name,)
        return tuple(f"{self.name}={value}" for value in self.values) + ((f"{self.name}=",) if self.has_missing else ())


@dataclass(frozen=True)
class TableInputs:
    """What makes features, float32 [N, F], of a table's columns; fit_columns() fits it on training rows."""

    columns: tuple[InputColumn, ...]
    missing: Missing

    column = "inputs"
    augmentation = "none"

    @property
    def shape(self) -> tuple[int]:
        """(F,): what a network takes of one row."""
        return (self.num_features,)

    def batch(self, rows: Mapping[str, Tensor], draws: Tensor | None) -> Tensor:
        """[n, F]: stored rows are encoded already."""
        return rows[self.column]

    def draw(self, num: int, seed: int) -> Tensor | None:
        return None

    def scaling(self) -> tuple[Tensor, Tensor]:
        """(shift, scale), float64 [F]: what a feature is lessened by and then divided by; categories are 0 or 1."""
        numbers = [
            (column.mean, column.deviation) if column.kind != "category" else (0.0, 1.0)
            for column in self.columns
            for _ in column.feature_names
        ]
        shift, scale = torch.tensor(numbers, dtype=torch.float64).unbind(1)
        return shift, scale

    @property
    def feature_names(self) -> tuple[str, ...]:
        return tuple(name for column in self.columns for name in column.feature_names)

    @property
    def num_features(self) -> int:
        return len(self.feature_names)

    def encode(
        self, table: pa.Table, *, where: str = "the table", rows: np.ndarray | None = None
    ) -> tuple[np.ndarray, tuple[Note, ...]]:
        """Return the features of a table's rows, float32 [N, F], and notes on missing and unknown values.

        Args:
            where: names the table in messages.
            rows: int64 [N], numbers that messages show for the rows.

        Raises:
            ValueError: for a column that is not there or of another kind, missing values that are not to be filled,
                and infinite values.
        """
        place = _Place(where, rows)
        features = np.zeros((table.num_rows, self.num_features), np.float32)
        filled: list[str] = []
        unknown: list[str] = []
        first = 0
        for column in self.columns:
            values = _column(table, column.name, where)
            if column.kind == "category":
                numbers = _category_numbers(values, column, self.missing, place, unknown)
                known = np.flatnonzero(numbers >= 0)
                features[known, first + numbers[known]] = 1
            else:
                numbers = _numbers(values, column.name, column.kind, place)
                absent = np.isnan(numbers)
                if absent.any():
                    if self.missing == "refuse":
                        raise place.missing(column.name, absent)
                    filled.append(f"{column.name} ({absent.sum()})")
                    numbers[absent] = column.mean
                with np.errstate(over="ignore"):
                    features[:, first] = (numbers - column.mean) / column.deviation
                if len(far := np.flatnonzero(~np.isfinite(features[:, first]))):
                    raise ValueError(
                        f"column {column.name} {place.of(far[0])} is {numbers[far[0]]:g}, too far from the training "
                        f"rows' mean of {column.mean:g} (standard deviation {column.deviation:g}): leave the row out"
                    )
            first += len(column.feature_names)
        notes = []
        if filled:
            notes.append(_filled_note(filled, where))
        if unknown:
            text = f"values of {where} that no training row has count as no category: {listed(unknown)}"
            notes.append(Note(text, is_warning=True))
        return features, tuple(notes)

    @classmethod
    def from_dict(cls, tree: Any) -> "TableInputs":
        """The inverse of dataclasses.asdict().

        Raises:
            ValueError: for anything that it does not give.
        """
        inputs = from_tree(cls, tree, "inputs.", noun="field")
        names = [column.name for column in inputs.columns]
        if not names or len({*names}) < len(names):
            raise ValueError(f"inputs.columns should be columns of different names, not {listed(names) or 'none'}")
        for column in inputs.columns:
            is_category, values = column.kind == "category", list(column.values)
            if is_category != bool(values) or values != sorted({*values}) or len(values) > MOST_VALUES:
                raise ValueError(f"inputs.columns: {column.name} has no list of distinct, sorted values")
            if not column.deviation > 0 or (column.has_missing and not is_category):
                raise ValueError(f"inputs.columns: {column.name} has a deviation of {column.deviation:g}")
        return inputs


class Columns(Protocol):
    """A table, or what reads one column of it after another."""

    @property
    def num_rows(self) -> int: ...

    @property
    def column_names(self) -> list[str]: ...

    def column(self, name: str, /) -> pa.ChunkedArray: ...


def fit_columns(
    table: Columns,
    names: Sequence[str],
    *,
    missing: Missing,
    where: str = "the table",
    rows: np.ndarray | None = None,
) -> tuple[TableInputs, tuple[Note, ...]]:
    """Decide by training rows how columns become features, with notes on what was decided.

    Numbers, truth values and times (as seconds) are standardised; texts become a feature for each of their values in
    sorted order. A column of one value only is left out.

    Args:
        table: training rows only; each column is asked for once, in the order of the names.
        names: the columns, in the order of their features.
        where: names the table in messages.
        rows: int64 [N], numbers that messages show for the rows.

    Raises:
        ValueError: for a column that is not there, or cannot be a feature, with the way out.
    """
    place = _Place(where, rows)
    if not table.num_rows:
        raise ValueError(f"{where} has no rows: give a table with examples")
    columns: list[InputColumn] = []
    constant: list[str] = []
    times: list[str] = []
    own: list[str] = []
    filled: list[str] = []
    notes: list[Note] = []
    for name in dict.fromkeys(names):
        values = _column(table, name, where)
        if _is_any(values.type, _TEXTS):
            column = _fit_category(values, name, missing, place)
            if column and (stray := _stray_text(_texts(values), place)):
                text = f"column {name} is read as {len(column.values)} categories, not as numbers: {stray}"
                notes.append(Note(text, is_warning=True))
        elif pa.types.is_null(values.type) or _is_any(values.type, _NUMBERS) or is_time(values.type):
            kind = "time" if is_time(values.type) else "number"
            column, num_missing = _fit_number(values, name, kind, missing, place)
            if column and num_missing:
                filled.append(f"{name} ({num_missing})")
        else:
            raise ValueError(
                f"column {name} of {where} holds {values.type}, which is no number, time or text: leave it out of "
                "--data.columns; a column of images is named by --data.image-column"
            )
        if column is None:
            constant.append(name)
            continue
        columns.append(column)
        if column.kind == "time":
            times.append(name)
        if column.has_missing:
            own.append(f"{name} ({_texts(values).null_count})")
    if constant:
        notes.append(Note(f"columns that are the same in all training rows are left out: {listed(constant)}"))
    if times:
        notes.append(Note(f"dates and times are read as numbers of seconds: {listed(times)}"))
    if own:
        notes.append(Note(f"missing texts of training rows are a category of their own: {listed(own)}"))
    if filled:
        notes.append(_filled_note(filled, where))
    if not columns:
        raise ValueError(
            f"no column of {where} tells its rows apart ({listed(constant) or 'none is left'}): set "
            "--data.columns to others"
        )
    return TableInputs(tuple(columns), missing), tuple(notes)


def target_numbers(
    table: pa.Table, names: Sequence[str], *, where: str = "the table", rows: np.ndarray | None = None
) -> np.ndarray:
    """Columns as the targets of regression, float64 [N, K]; for where and rows see fit_columns().

    Raises:
        ValueError: for a column that is not there, texts, and missing or infinite values.
    """
    place = _Place(where, rows)
    targets = np.empty((table.num_rows, len(names)))
    for number, name in enumerate(names):
        values = _column(table, name, where)
        if _is_any(values.type, _TEXTS):
            raise ValueError(
                f"the target {name} of {where} is text{_such_as(values)}: regression needs numbers, and texts are "
                "classes: use --task classification, or set --data.target to another column"
            )
        if not (_is_any(values.type, _NUMBERS) or pa.types.is_null(values.type)):
            raise ValueError(f"the target {name} of {where} holds {values.type}: give numbers for regression")
        targets[:, number] = _numbers(values, name, "number", place)
        if (absent := np.isnan(targets[:, number])).any():
            raise place.missing(name, absent, out="leave such rows out, a target cannot be filled in")
    return targets


def refuse_constant(targets: np.ndarray, names: Sequence[str]) -> None:
    """Refuse training targets, [N, K], of which one is the same in all rows.

    Raises:
        ValueError: naming the target and its value.
    """
    for number, name in enumerate(names):
        values = targets[:, number]
        if len(values) and values.min() == values.max():
            raise ValueError(
                f"the target {name} is {values[0]:g} in all {len(values)} training examples: there is nothing to "
                "learn; set --data.target to another column"
            )


@dataclass(frozen=True)
class _Place:
    """Where a table's rows lie, in words for messages."""

    where: str
    rows: np.ndarray | None

    def of(self, position: int) -> str:
        row = position if self.rows is None else self.rows[position]
        return f"in row {row} of {self.where}"

    def missing(self, name: str, absent: np.ndarray, *, out: str | None = None) -> ValueError:
        """The refusal of missing values: absent is bool [N]."""
        num, first = int(absent.sum()), int(np.flatnonzero(absent)[0])
        more = f", and in {num - 1} more rows" if num > 1 else ""
        out = out or "--data.missing mean fills it in; or leave such rows or the column (--data.columns) out"
        return ValueError(f"column {name} has no value {self.of(first)}{more}: {out}")


def _column(table: Columns, name: str, where: str) -> pa.ChunkedArray:
    match table.column_names.count(name):
        case 1:
            return table.column(name)
        case 0:
            known = table.column_names
            raise ValueError(f"{where} should have a column {name}, and has {listed(known)}{nearest(name, known)}")
        case _:
            raise ValueError(f"{where} has several columns {name}: give each a name of its own")


def is_time(type_: pa.DataType) -> bool:
    """Whether values are dates, times or spans of time, which are numbers of seconds; months are none."""
    return pa.types.is_temporal(type_) and not pa.types.is_interval(type_)


def _is_any(type_: pa.DataType, kinds: Sequence[Callable[[pa.DataType], bool]]) -> bool:
    return any(kind(type_) for kind in kinds)


def _fit_number(
    values: pa.ChunkedArray, name: str, kind: Literal["number", "time"], missing: Missing, place: _Place
) -> tuple[InputColumn | None, int]:
    """The column, or None if it does not vary, and how many values are missing."""
    numbers = _numbers(values, name, kind, place)
    absent = np.isnan(numbers)
    if absent.any() and missing == "refuse":
        raise place.missing(name, absent)
    there = numbers[~absent]
    if not len(there) or there.min() == there.max():
        return None, 0
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        mean, deviation = float(there.mean()), float(there.std())
    if not math.isfinite(mean) or not math.isfinite(deviation) or deviation == 0:
        raise ValueError(
            f"column {name} of {place.where} runs from {there.min():g} to {there.max():g}, which 64-bit floats cannot "
            "standardise: give it in another unit, or leave it out with --data.columns"
        )
    if deviation <= 10 * np.finfo(np.float64).eps * abs(mean):  # rounding, as of 0.1 + 0.2 beside 0.3
        return None, 0
    return InputColumn(name, kind, mean, deviation), len(numbers) - len(there)


def _filled_note(filled: Sequence[str], where: str) -> Note:
    return Note(f"missing values of {where} filled with the training mean: {listed(filled)}")


def _fit_category(values: pa.ChunkedArray, name: str, missing: Missing, place: _Place) -> InputColumn | None:
    """The column, or None if it does not vary."""
    texts = _texts(values)
    absent = texts.is_null().to_numpy()
    if absent.any() and missing == "refuse":
        raise place.missing(name, absent)
    found = sorted(texts.drop_null().unique().to_pylist())
    has_missing = bool(absent.any())
    if len(found) + has_missing < 2:
        return None
    num = len(texts) - int(absent.sum())
    if len(found) > MOST_VALUES or len(found) == num:
        stray = _stray_text(texts, place)
        what = f"{len(found)} different texts" if len(found) < num else "another text in each row"
        out = f"{'mend it, or ' if stray else ''}leave the column out with --data.columns"
        raise ValueError(
            f"column {name} of {place.where} has {what} ({stray or f'such as {found[0]!r}'}), and texts become a "
            f"feature each, of at most {MOST_VALUES} that come again: {out}"
        )
    return InputColumn(name, "category", values=tuple(found), has_missing=has_missing)


def _stray_text(texts: pa.ChunkedArray, place: _Place) -> str:
    """ "'?' in row 7 of … stands among numbers" where half of the texts, at least, are numbers, else ""."""
    strange = [text for text in texts.unique().to_pylist() if text is not None and not is_number(text)]
    stray = np.flatnonzero(_places(texts, strange) >= 0)
    if not len(stray) or len(stray) > len(texts) / 2:
        return ""
    return f"{texts[stray[0]].as_py()!r} {place.of(stray[0])} stands among numbers"


def is_number(text: str) -> bool:
    """Whether a text says one."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _category_numbers(
    values: pa.ChunkedArray, column: InputColumn, missing: Missing, place: _Place, unknown: list[str]
) -> np.ndarray:
    """The number of each row's category, int64 [N], -1 for none; values that are not known are added to `unknown`."""
    if not (_is_any(values.type, _TEXTS) or pa.types.is_null(values.type)):
        raise ValueError(f"column {column.name} of {place.where} holds {values.type}; in training it was text")
    texts = _texts(values)
    absent = texts.is_null().to_numpy()
    if absent.any() and missing == "refuse":
        raise place.missing(column.name, absent)
    numbers = _places(texts, column.values)
    if column.has_missing:
        numbers[absent] = len(column.values)
    if len(others := np.flatnonzero(numbers < 0)):
        example = texts[others[0]].as_py()
        unknown.append(
            f"{column.name} ({len(others)}, such as {'a missing one' if example is None else repr(example)})"
        )
    return numbers


def _places(texts: pa.ChunkedArray, values: Sequence[str]) -> np.ndarray:
    """Where each text stands in the values, int64 [N], -1 if it does not."""
    options = compute.SetLookupOptions(pa.array(values, pa.string()))
    return np.array(compute.call_function("index_in", [texts], options).fill_null(-1), np.int64)


def _texts(values: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_dictionary(values.type):
        chunks = [chunk.dictionary_decode().cast(pa.string()) for chunk in values.chunks]
        return pa.chunked_array(chunks, pa.string())
    return values.cast(pa.string())


def _numbers(values: pa.ChunkedArray, name: str, kind: Literal["number", "time"], place: _Place) -> np.ndarray:
    """The values as float64 [N], NaN where one is missing; times as seconds.

    Raises:
        ValueError: for values of another kind, or infinite ones.
    """
    type_ = values.type
    if pa.types.is_null(type_):
        return np.full(len(values), np.nan)
    if (kind == "time") != is_time(type_) or not (kind == "time" or _is_any(type_, _NUMBERS)):
        due = "dates or times" if kind == "time" else "numbers"
        raise ValueError(f"column {name} of {place.where} holds {type_}{_such_as(values)}; in training it was {due}")
    if kind == "time":
        numbers = _seconds(values)
    else:
        plain = values.cast(pa.int8()) if pa.types.is_boolean(type_) else values
        numbers = _float64(plain)
    if len(infinite := np.flatnonzero(np.isinf(numbers))):
        raise ValueError(
            f"column {name} is {numbers[infinite[0]]} {place.of(infinite[0])}: leave such rows out, or the column with "
            "--data.columns"
        )
    return numbers


def _seconds(values: pa.ChunkedArray) -> np.ndarray:
    type_ = values.type
    if pa.types.is_date32(type_):
        return _float64(values.cast(pa.int32())) * _DAY_S
    unit = "ms" if pa.types.is_date64(type_) else type_.unit
    width = pa.int32() if pa.types.is_time32(type_) else pa.int64()
    return _float64(values.cast(width)) / _PER_SECOND[unit]


def _float64(values: pa.ChunkedArray) -> np.ndarray:
    """A copy, NaN for nulls."""
    return np.array(values.cast(pa.float64(), safe=False).to_numpy(), dtype=np.float64)


def _such_as(values: pa.ChunkedArray) -> str:
    there = values.drop_null()
    return f", such as {there[0].as_py()!r}" if len(there) else ""
