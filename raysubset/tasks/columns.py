"""Turns a table's columns into numbers: features fitted on training rows, and targets of regression. Reads no files."""

import math
from collections.abc import Mapping, Sequence
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
Kind = Literal["number", "time", "category"]  # a time is read as seconds

_REMEDY = "--data.missing mean fills it in; or leave such rows or the column (--data.columns) out"

MOST_VALUES = 100  # different texts in a column, each of which becomes a feature

_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_DAY_S = 86400


@dataclass(frozen=True)
class InputColumn:
    """A column of a table and how it becomes features: one standardised number, or one feature a category."""

    name: str
    kind: Kind
    mean: float = 0.0  # over training rows
    deviation: float = 1.0  # the standard deviation over training rows, divided by N, not N - 1
    values: tuple[str, ...] = ()  # the categories in training rows, sorted
    has_missing: bool = False  # missing values are one more category, the last

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The column's name, or "colour=red" for each category."""
        if self.kind != "category":
            return (self.name,)
        return tuple(f"{self.name}={value}" for value in self.values) + ((f"{self.name}=",) if self.has_missing else ())


@dataclass(frozen=True)
class TableInputs:
    """Turns a table's columns into features, float32 [N, F]. fit_columns() fits it on training rows."""

    columns: tuple[InputColumn, ...]
    missing: Missing

    column = "inputs"
    augmentation = "none"

    @property
    def shape(self) -> tuple[int]:
        """(F,), the shape of one row that a network takes."""
        return (self.num_features,)

    def batch(self, rows: Mapping[str, Tensor], draws: Tensor | None) -> Tensor:
        """Return the features [n, F]: stored rows are already encoded."""
        return rows[self.column]

    def scaling(self) -> tuple[Tensor, Tensor]:
        """Return (shift, scale), float64 [F]: a number is standardised as (number - shift) / scale.

        Features of categories, which are 0 or 1, have shift 0 and scale 1.
        """
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
        self, table: pa.Table, *, where: str = "the table", rows: np.ndarray | None = None, remedy: str = _REMEDY
    ) -> tuple[np.ndarray, tuple[Note, ...]]:
        """Return the features of a table's rows, float32 [N, F], and notes on missing and unknown values.

        Args:
            where: the name of the table in messages.
            rows: int64 [N], the row numbers that messages show.
            remedy: what messages advise for missing values.

        Raises:
            ValueError: for a column that is missing or has another kind, for infinite values, and for missing values
                if `missing` is "refuse".
        """
        place = _Place(where, rows, self.missing, remedy)
        features = np.zeros((table.num_rows, self.num_features), np.float32)
        filled: list[str] = []
        unknown: list[str] = []
        first = 0
        for column in self.columns:
            values = _column(table, column.name, where)
            if column.kind == "category":
                numbers = _category_numbers(values, column, place, unknown)
                rows_known = np.flatnonzero(numbers >= 0)
                features[rows_known, first + numbers[rows_known]] = 1
            else:
                numbers = _numbers(values, column.name, column.kind, place)
                absent = np.isnan(numbers)
                if absent.any():
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
        """Rebuild inputs from dataclasses.asdict().

        Raises:
            ValueError: for a dict that asdict() cannot have returned.
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
    """A table, or a reader that reads a table column by column."""

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
    """Decide from training rows how columns become features, and return notes on what was decided.

    Numbers, truth values and times (as seconds) are standardised. Texts become one feature for each value, in sorted
    order. A column with only one value is left out.

    Args:
        table: training rows only; each column is read once, in the order of the names.
        names: the columns, in the order of their features.
        where: the name of the table in messages.
        rows: int64 [N], the row numbers that messages show.

    Raises:
        ValueError: for a column that is missing or cannot be a feature, with the way out.
    """
    place = _Place(where, rows, missing)
    if not table.num_rows:
        raise ValueError(f"{where} has no rows: give a table with examples")
    columns: list[InputColumn] = []
    constant: list[str] = []
    missing_texts: list[str] = []
    filled: list[str] = []
    notes: list[Note] = []
    for name in dict.fromkeys(names):
        values = _column(table, name, where)
        match kind_of_column(values.type):
            case "category":
                column, num_missing = _fit_category(values, name, place)
                if column and (stray := _stray_text(_texts(values), place)):
                    text = f"column {name} is read as {len(column.values)} categories, not as numbers: {stray}"
                    notes.append(Note(text, is_warning=True))
            case None:
                raise ValueError(
                    f"column {name} of {where} holds {values.type}, which is no number, time or text: leave it out of "
                    "--data.columns; a column of images is named by --data.image-column"
                )
            case kind:
                column, num_missing = _fit_number(values, name, kind, place)
        if column is None:
            constant.append(name)
            continue
        columns.append(column)
        if num_missing:
            (missing_texts if column.kind == "category" else filled).append(f"{name} ({num_missing})")
    times = [column.name for column in columns if column.kind == "time"]
    if constant:
        notes.append(Note(f"columns that are the same in all training rows are left out: {listed(constant)}"))
    if times:
        notes.append(Note(f"dates and times are read as numbers of seconds: {listed(times)}"))
    if missing_texts:
        notes.append(Note(f"missing texts of training rows are a category of their own: {listed(missing_texts)}"))
    if filled:
        notes.append(_filled_note(filled, where))
    if not columns:
        raise ValueError(
            f"no column of {where} differs between rows ({listed(constant) or 'none is left'}): set --data.columns to "
            "others"
        )
    return TableInputs(tuple(columns), missing), tuple(notes)


def target_numbers(
    table: pa.Table, names: Sequence[str], *, where: str = "the table", rows: np.ndarray | None = None
) -> np.ndarray:
    """Return columns as the targets of regression, float64 [N, K]. See fit_columns() for `where` and `rows`.

    Raises:
        ValueError: for a column that is missing or of text, and for missing or infinite values.
    """
    place = _Place(where, rows, "refuse", "leave such rows out, a target cannot be filled in")
    targets = np.empty((table.num_rows, len(names)))
    for number, name in enumerate(names):
        values = _column(table, name, where)
        kind = kind_of_column(values.type)
        if kind == "category":
            raise ValueError(
                f"the target {name} of {where} is text{such_as(values)}: regression needs numbers, and texts are "
                "classes: use --task classification, or set --data.target to another column"
            )
        if kind != "number":
            raise ValueError(f"the target {name} of {where} holds {values.type}: give numbers for regression")
        targets[:, number] = _numbers(values, name, "number", place)
    return targets


def refuse_constant(targets: np.ndarray, names: Sequence[str]) -> None:
    """Refuse training targets, [N, K], if one of them is the same in all rows.

    Raises:
        ValueError: with the target's name and value.
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
    """The name of a table and of its rows in messages, and whether values may be missing."""

    where: str
    rows: np.ndarray | None
    missing: Missing
    remedy: str = _REMEDY

    def of(self, position: int) -> str:
        row = position if self.rows is None else self.rows[position]
        return f"in row {row} of {self.where}"

    def check(self, name: str, absent: np.ndarray) -> None:
        """Refuse a column's missing values, those where absent, bool [N], is True, if none may be missing."""
        if self.missing == "refuse" and (num := int(absent.sum())):
            suffix = f", and in {num - 1} more rows" if num > 1 else ""
            first = self.of(int(np.flatnonzero(absent)[0]))
            raise ValueError(f"column {name} has no value {first}{suffix}: {self.remedy}")


def _column(table: Columns, name: str, where: str) -> pa.ChunkedArray:
    match table.column_names.count(name):
        case 1:
            return table.column(name)
        case 0:
            columns = table.column_names
            raise ValueError(f"{where} should have a column {name}, and has {listed(columns)}{nearest(name, columns)}")
        case _:
            raise ValueError(f"{where} has several columns {name}: give each a name of its own")


def is_string(type_: pa.DataType) -> bool:
    """Return True for texts in any of Arrow's layouts."""
    return pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_)


def kind_of_column(type_: pa.DataType) -> Kind | None:
    """Return what values of a type can be learned as; None if they cannot. Nulls alone count as numbers.

    Dates, times and durations convert to seconds; spans of months do not.
    """
    if is_string(type_) or pa.types.is_dictionary(type_):
        return "category"
    if pa.types.is_temporal(type_) and not pa.types.is_interval(type_):
        return "time"
    is_any = (pa.types.is_null, pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
    return "number" if any(is_kind(type_) for is_kind in is_any) else None


def _fit_number(
    values: pa.ChunkedArray, name: str, kind: Literal["number", "time"], place: _Place
) -> tuple[InputColumn | None, int]:
    """Fit a column of numbers: return it, or None if it does not vary, and how many values are missing."""
    numbers = _numbers(values, name, kind, place)
    present = numbers[~np.isnan(numbers)]
    num_missing = len(numbers) - len(present)
    if not len(present) or present.min() == present.max():
        return None, num_missing
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        mean, deviation = float(present.mean()), float(present.std())
    if not math.isfinite(mean) or not math.isfinite(deviation) or deviation == 0:
        raise ValueError(
            f"column {name} of {place.where} runs from {present.min():g} to {present.max():g}, which 64-bit floats "
            "cannot standardise: give it in another unit, or leave it out with --data.columns"
        )
    if deviation <= 10 * np.finfo(np.float64).eps * abs(mean):  # rounding, as of 0.1 + 0.2 beside 0.3
        return None, num_missing
    return InputColumn(name, kind, mean, deviation), num_missing


def _filled_note(filled: Sequence[str], where: str) -> Note:
    return Note(f"missing values of {where} filled with the training mean: {listed(filled)}")


def _fit_category(values: pa.ChunkedArray, name: str, place: _Place) -> tuple[InputColumn | None, int]:
    """Fit a column of texts: return it, or None if it does not vary, and how many values are missing."""
    texts = _texts(values)
    place.check(name, texts.is_null().to_numpy())
    categories, has_missing = sorted(texts.drop_null().unique().to_pylist()), texts.null_count > 0
    if len(categories) + has_missing < 2:
        return None, texts.null_count
    num = len(texts) - texts.null_count
    if len(categories) > MOST_VALUES or len(categories) == num:
        stray = _stray_text(texts, place)
        contents = f"{len(categories)} different texts" if len(categories) < num else "another text in each row"
        remedy = f"{'correct it, or ' if stray else ''}leave the column out with --data.columns"
        raise ValueError(
            f"column {name} of {place.where} has {contents} ({stray or f'such as {categories[0]!r}'}); each text "
            f"becomes a feature, so there may be at most {MOST_VALUES} and not one for every row: {remedy}"
        )
    return InputColumn(name, "category", values=tuple(categories), has_missing=has_missing), texts.null_count


def _stray_text(texts: pa.ChunkedArray, place: _Place) -> str:
    """Return "'?' in row 7 of … stands among numbers" if at least half of the texts are numbers, else ""."""
    strange = [text for text in texts.unique().to_pylist() if text is not None and not is_number(text)]
    stray = np.flatnonzero(places(texts, strange) >= 0)
    if not len(stray) or len(stray) > len(texts) / 2:
        return ""
    return f"{texts[stray[0]].as_py()!r} {place.of(stray[0])} stands among numbers"


def is_number(text: str) -> bool:
    """Return True if float() reads the text."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _category_numbers(values: pa.ChunkedArray, column: InputColumn, place: _Place, unknown: list[str]) -> np.ndarray:
    """Return the number of each row's category, int64 [N], -1 for none, and describe unknown values in `unknown`."""
    if kind_of_column(values.type) != "category" and not pa.types.is_null(values.type):
        raise ValueError(f"column {column.name} of {place.where} holds {values.type}; in training it was text")
    texts = _texts(values)
    absent = texts.is_null().to_numpy()
    place.check(column.name, absent)
    numbers = places(texts, column.values)
    if column.has_missing:
        numbers[absent] = len(column.values)
    if len(unknown_rows := np.flatnonzero(numbers < 0)):
        example = texts[unknown_rows[0]].as_py()
        unknown.append(
            f"{column.name} ({len(unknown_rows)}, such as {'a missing one' if example is None else repr(example)})"
        )
    return numbers


def places(texts: pa.ChunkedArray, values: Sequence[str]) -> np.ndarray:
    """Return the position of each text in the values, int64 [N], -1 if it is not among them."""
    options = compute.SetLookupOptions(pa.array(values, pa.string()))
    return np.array(compute.call_function("index_in", [texts], options).fill_null(-1), np.int64)


def _texts(values: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_dictionary(values.type):
        chunks = [chunk.dictionary_decode().cast(pa.string()) for chunk in values.chunks]
        return pa.chunked_array(chunks, pa.string())
    return values.cast(pa.string())


def _numbers(values: pa.ChunkedArray, name: str, kind: Literal["number", "time"], place: _Place) -> np.ndarray:
    """Return the values as float64 [N], times as seconds, missing values as NaN.

    Raises:
        ValueError: for values of another kind, infinite ones, and missing ones that are refused.
    """
    type_ = values.type
    if kind_of_column(type_) != kind and not pa.types.is_null(type_):
        expected = "dates or times" if kind == "time" else "numbers"
        raise ValueError(
            f"column {name} of {place.where} holds {type_}{such_as(values)}; in training it was {expected}"
        )
    if kind_of_column(type_) == "time":
        numbers = _seconds(values)
    else:
        numbers = _float64(values.cast(pa.int8()) if pa.types.is_boolean(type_) else values)
    if len(infinite := np.flatnonzero(np.isinf(numbers))):
        raise ValueError(
            f"column {name} is {numbers[infinite[0]]} {place.of(infinite[0])}: leave such rows out, or the column with "
            "--data.columns"
        )
    place.check(name, np.isnan(numbers))
    return numbers


def _seconds(values: pa.ChunkedArray) -> np.ndarray:
    type_ = values.type
    if pa.types.is_date32(type_):
        return _float64(values.cast(pa.int32())) * _DAY_S
    unit = "ms" if pa.types.is_date64(type_) else type_.unit
    width = pa.int32() if pa.types.is_time32(type_) else pa.int64()
    return _float64(values.cast(width)) / _PER_SECOND[unit]


def _float64(values: pa.ChunkedArray) -> np.ndarray:
    """Copy the values as float64, with NaN for nulls."""
    return np.array(values.cast(pa.float64(), safe=False).to_numpy(), dtype=np.float64)


def such_as(values: pa.ChunkedArray) -> str:
    """Return ", such as 7" with the first value that is not missing, or "" if there is none."""
    present = values.drop_null()
    return f", such as {present[0].as_py()!r}" if len(present) else ""
