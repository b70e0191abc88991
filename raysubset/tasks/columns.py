"""Turns a table's columns into numbers: features fitted on training rows, and targets of regression. Reads no files."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raysubset.config import nearest
from raysubset.config.trees import need
from raysubset.errors import listed
from raysubset.events import Note
from raysubset.tasks.column_values import (
    Kind,
    NumberKind,
    alike_but_for_case,
    array_of_lists,
    float64,
    is_number,
    is_string,
    kind_of_column,
    places,
    remedy_of,
    seconds,
    such_as,
)
from raysubset.tasks.inputs import LEAST_DEVIATION, too_wide

Missing = Literal["refuse", "mean"]

_IN_WORDS = {"number": "numbers", "time": "dates or times", "category": "text", "list": "lists of numbers"}

_OF_TEXTS = "; or learn texts as rows of tokens from a function (jobs/own_code/own_texts.py)"
_REMEDY = "--data.missing mean fills it in; or leave such rows or the column (--data.columns) out"

MOST_VALUES = 100  # different texts in a column, each of which becomes a feature

# A number or a date that is not read as one: 1,5 and 1.5 of texts, 12 %, $3, 31/12/2026.
_WRITTEN_NUMBER = re.compile(r"[-+]?[$€£¥]?\s?\d[\d.,' /:]*[%$€£¥]?")
_FAR = 1000  # standard deviations: seconds beside milliseconds, dates beside times of day, -9999 for missing values
_MOST_CODES = 20  # different texts of digits alone that are read as categories in silence


@dataclass(frozen=True)
class InputColumn:
    """A column of a table and how it becomes features: standardised numbers, or one feature a category.

    A column of lists has a mean and a deviation for each place in the lists.
    """

    name: str
    kind: Kind
    mean: float | tuple[float, ...] = 0.0  # over training rows
    deviation: float | tuple[float, ...] = 1.0  # the standard deviation over training rows, divided by N, not N - 1
    values: tuple[str, ...] = ()  # the categories in training rows, sorted
    has_missing: bool = False  # missing values are one more category, the last

    def __post_init__(self) -> None:
        is_category, values = self.kind == "category", list(self.values)
        are_values = is_category == bool(values) and values == sorted({*values}) and len(values) <= MOST_VALUES
        need(are_values, f"inputs.columns: {self.name} has no list of distinct, sorted values")
        means, deviations = np.atleast_1d(self.mean), np.atleast_1d(self.deviation)
        are_lists = {isinstance(self.mean, tuple), isinstance(self.deviation, tuple)} == {self.kind == "list"}
        fits = are_lists and len(means) == len(deviations) > 0
        need(fits, f"inputs.columns: {self.name} has no mean and deviation for each number")
        fits = (deviations > 0).all() and (is_category or not self.has_missing)
        need(fits, f"inputs.columns: {self.name} has a deviation of {deviations.min():g}")

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The column's name, "colour=red" for each category, or "embedding[0]" for each place in the lists."""
        if self.kind == "category":
            names = tuple(f"{self.name}={value}" for value in self.values)
            return names + ((f"{self.name}=",) if self.has_missing else ())
        if isinstance(self.mean, tuple):
            return tuple(f"{self.name}[{place}]" for place in range(len(self.mean)))
        return (self.name,)

    @property
    def scales(self) -> list[tuple[float, float]]:
        """Each feature's mean and deviation; of categories, which are 0 or 1, these are 0 and 1."""
        num = 1 if self.kind == "list" else len(self.feature_names)
        return [*zip(np.atleast_1d(self.mean).tolist(), np.atleast_1d(self.deviation).tolist(), strict=True)] * num


@dataclass(frozen=True)
class TableInputs:
    """Turns a table's columns into features, float32 [N, F]. fit_columns() fits it on training rows."""

    columns: tuple[InputColumn, ...]
    missing: Missing

    column = "inputs"
    augmentation = "none"

    def __post_init__(self) -> None:
        names = [column.name for column in self.columns]
        fits = names and len({*names}) == len(names)
        need(fits, f"inputs.columns should be columns of different names, not {listed(names) or 'none'}")

    @property
    def shape(self) -> tuple[int]:
        """(F,), the shape of one row that a network takes."""
        return (len(self.feature_names),)

    def batch(self, rows: Mapping[str, Tensor], draws: Tensor | None) -> Tensor:
        """Return the features [n, F]: stored rows are already encoded."""
        return rows[self.column]

    def scaling(self) -> tuple[Tensor, Tensor]:
        """Return (shift, scale), float64 [F]: a number is standardised as (number - shift) / scale.

        Features of categories, which are 0 or 1, have shift 0 and scale 1.
        """
        scales = [scale for column in self.columns for scale in column.scales]
        shift, scale = torch.tensor(scales, dtype=torch.float64).unbind(1)
        return shift, scale

    @property
    def feature_names(self) -> tuple[str, ...]:
        return tuple(name for column in self.columns for name in column.feature_names)

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
        reader, first = _Reader(table, where, rows, self.missing, remedy), 0
        features = np.zeros((table.num_rows, *self.shape), np.float32)
        for column in self.columns:
            values, num = reader.column(column.name), len(column.feature_names)
            if column.kind == "category":
                numbers = reader.categories(column, values)
                rows_known = np.flatnonzero(numbers >= 0)
                features[rows_known, first + numbers[rows_known]] = 1
            else:
                parts = reader.parts(column.name, values, column.kind, num)
                for place, ((name, numbers), scale) in enumerate(zip(parts, column.scales, strict=True), first):
                    features[:, place] = reader.standardised(name, numbers, *scale)
            first += num
        return features, reader.notes()


class Columns(Protocol):
    """A table, or a reader that reads a table column by column."""

    @property
    def column_names(self) -> list[str]: ...

    def column(self, name: str, /) -> pa.ChunkedArray: ...


def fit_columns(
    table: Columns, names: Sequence[str], *, missing: Missing, where: str = "the table", rows: np.ndarray | None = None
) -> tuple[TableInputs, tuple[Note, ...]]:
    """Decide from training rows how columns become features, and return notes on what was decided.

    Numbers, truth values and times (as seconds) are standardised. Texts become one feature for each value, in sorted
    order. A column with only one value is left out.

    Args:
        table: training rows only, at least one; each column is read once, in the order of the names.
        names: the columns, in the order of their features.
        where: the name of the table in messages.
        rows: int64 [N], the row numbers that messages show.

    Raises:
        ValueError: for a column that is missing or cannot be a feature, with the way out.
    """
    reader = _Reader(table, where, rows, missing)
    columns: list[InputColumn] = []
    for name in dict.fromkeys(names):
        if column := reader.fit(name):
            columns.append(column)
        else:
            reader.note("columns that are the same in all training rows are left out", name)
    if not columns:
        text = f"no column of {where} differs between rows ({listed(names) or 'none is left'})"
        raise ValueError(f"{text}: set --data.columns to others")
    return TableInputs(tuple(columns), missing), reader.notes()


def target_numbers(
    table: pa.Table, names: Sequence[str], *, where: str = "the table", num: int | None = None
) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the names of the targets of regression, and their numbers, float64 [N, K].

    A column is one target, or one for each place in its lists: "box[0]", "box[1]".

    Args:
        where: the table's name in messages.
        num: K of the training table.

    Raises:
        ValueError: for a column that is missing or of text, for missing or infinite values, and if lists have other
            lengths than in training.
    """
    reader = _Reader(table, where, None, "refuse", "leave such rows out, a target cannot be filled in")
    targets = list[tuple[str, np.ndarray]]()
    for name in names:
        values = reader.column(name)
        if (kind := kind_of_column(values.type)) == "category":
            raise ValueError(
                f"the target {name} of {where} is text{such_as(values)}: regression needs numbers, and texts are "
                "classes: use --task classification, or set --data.target to another column"
            )
        if kind is None or kind == "time":
            raise ValueError(
                f"the target {name} of {where} holds {values.type}: give numbers for regression{remedy_of(values.type)}"
            )
        targets += reader.parts(name, values, kind)
    if num not in (None, len(targets)):
        raise ValueError(f"{where} has {len(targets)} targets, and training {num}: give lists of one length")
    if not targets:
        raise ValueError(f"the lists of {listed(names)} of {where} are empty: give numbers for regression")
    return tuple(name for name, _ in targets), np.stack([numbers for _, numbers in targets], axis=1)


def scales_of_targets(targets: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the means and standard deviations of training targets [N, K], float64 [K] each.

    Raises:
        ValueError: with the target's name and values, if it is the same in all rows but for rounding, or floats of 64
            bits cannot hold its deviation.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        means, deviations = targets.mean(axis=0), targets.std(axis=0)
    for number, name in enumerate(names):
        lowest, highest, deviation = targets[:, number].min(), targets[:, number].max(), deviations[number]
        if lowest == highest or 0 < deviation <= LEAST_DEVIATION * abs(means[number]):
            raise ValueError(
                f"the target {name} is {lowest:g} in all {len(targets)} training examples: there is nothing to "
                "learn; set --data.target to another column"
            )
        if not 0 < deviation < math.inf:
            remedy = "leave rows out whose value stands for a missing one"
            raise too_wide(f"the target {name} runs", targets[:, number], remedy)
    return means, deviations


@dataclass(frozen=True)
class _Reader:
    """Reads a table column by column; messages show its name and the numbers of its rows."""

    table: Columns
    where: str
    rows: np.ndarray | None
    missing: Missing
    remedy: str = _REMEDY
    noted: defaultdict[tuple[str, bool], list[str]] = field(default_factory=lambda: defaultdict(list))

    def note(self, text: str, column: str, *, is_warning: bool = False) -> None:
        """Note something of a column. Columns of which the same is noted share a note."""
        self.noted[text, is_warning].append(column)

    def notes(self) -> tuple[Note, ...]:
        return tuple(Note(f"{text}: {listed(names)}", is_warning) for (text, is_warning), names in self.noted.items())

    def absent(self, name: str, numbers: np.ndarray) -> np.ndarray:
        """Return where numbers are missing, bool [N], and note that they are filled in."""
        absent = np.isnan(numbers)
        if num := int(absent.sum()):
            self.note(f"missing values of {self.where} filled with the training mean", f"{name} ({num})")
        return absent

    def place(self, position: int) -> str:
        return f"in row {position if self.rows is None else self.rows[position]} of {self.where}"

    def column(self, name: str) -> pa.ChunkedArray:
        names = self.table.column_names
        if name not in names:
            text = f"{self.where} should have a column {name}, and has {listed(names)}{nearest(name, names)}"
            raise ValueError(text)
        if names.count(name) > 1:
            raise ValueError(f"{self.where} has several columns {name}: give each a name of its own")
        return self.table.column(name)

    def fit(self, name: str) -> InputColumn | None:
        """Return how a training column becomes features; None if it does not vary.

        Raises:
            ValueError: if it cannot be a feature.
        """
        values = self.column(name)
        kind = kind_of_column(values.type)
        if kind is None:
            raise ValueError(
                f"column {name} of {self.where} holds {values.type}, which is no number, time or text: leave it out of "
                f"--data.columns{remedy_of(values.type) or '; a column of images is named by --data.image-column'}"
            )
        if kind == "category":
            return self._fit_category(name, values)
        scales = [self._scale(part, numbers) for part, numbers in self.parts(name, values, kind)]
        if not any(deviation for _, deviation in scales):
            return None
        if kind == "list":
            self.note("each number of a list is a feature", f"{name} ({len(scales)})")
            means, deviations = zip(*scales, strict=True)  # 1 is for numbers that are the same in all rows
            return InputColumn(name, kind, means, tuple(deviation or 1.0 for deviation in deviations))
        if kind == "time":
            self.note("dates and times are read as numbers of seconds", name)
        elif self.rows is not None and pa.types.is_integer(values.type) and not np.ptp(float64(values) - self.rows):
            text = "columns that count the rows, and tell the targets if those are sorted; --data.columns names others"
            self.note(text, name, is_warning=True)
        return InputColumn(name, kind, *scales[0])

    def _scale(self, name: str, numbers: np.ndarray) -> tuple[float, float]:
        """Return the mean and standard deviation of training numbers, and note the missing; 0 if they do not vary.

        Raises:
            ValueError: if floats of 64 bits cannot hold the deviation.
        """
        present = numbers[~np.isnan(numbers)]
        if not len(present) or present.min() == present.max():
            return float(present[0]) if len(present) else 0.0, 0.0
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            mean, deviation = float(present.mean()), float(present.std())
        if not 0 < deviation < math.inf:
            raise too_wide(f"column {name} of {self.where} runs", present, "leave it out with --data.columns")
        if deviation <= LEAST_DEVIATION * abs(mean):
            return mean, 0.0
        self.absent(name, numbers)
        return mean, deviation

    def standardised(self, name: str, numbers: np.ndarray, mean: float, deviation: float) -> np.ndarray:
        """Return numbers standardised, float64 [N], the missing ones filled in, and note those far from the mean.

        Raises:
            ValueError: for a number whose distance float32 cannot hold.
        """
        numbers[self.absent(name, numbers)] = mean
        with np.errstate(over="ignore"):
            feature = (numbers - mean) / deviation
        if len(far := np.flatnonzero(np.abs(feature) > np.finfo(np.float32).max)):
            raise ValueError(
                f"column {name} {self.place(far[0])} is {numbers[far[0]]:g}, too far from the training rows' mean of "
                f"{mean:g} ± {deviation:g}: leave the row out"
            )
        if len(far := np.flatnonzero(np.abs(feature) > _FAR)):
            text = f"values of {self.where} lie over {_FAR} deviations from the training mean: are their units alike?"
            self.note(text, f"{name} ({len(far)}, such as {numbers[far[0]]:g})", is_warning=True)
        return feature

    def _fit_category(self, name: str, values: pa.ChunkedArray) -> InputColumn | None:
        texts = self._texts(name, values)
        categories, num_missing = sorted(texts.drop_null().unique().to_pylist()), texts.null_count
        if len(categories) + (num_missing > 0) < 2:
            return None
        stray, has_one_each = self._stray_text(texts), len(categories) == len(texts) - num_missing
        if len(categories) > MOST_VALUES or has_one_each:
            contents = "another text in each row" if has_one_each else f"{len(categories)} different texts"
            raise ValueError(
                f"column {name} of {self.where} has {contents} ({stray or f'such as {categories[0]!r}'}); each text "
                f"becomes a feature, so there may be at most {MOST_VALUES} and not one for every row: correct it, or "
                f"leave the column out with --data.columns{'' if stray else _OF_TEXTS}"
            )
        is_meant = pa.types.is_dictionary(values.type)
        if stray := stray or ("" if is_meant else _written_number(categories)):
            self.note(f"column {name} is read as {len(categories)} categories, not as numbers", stray, is_warning=True)
        if pair := alike_but_for_case(categories):
            self.note(f"values of column {name} differ in white space or case alone", pair, is_warning=True)
        if num_missing:
            self.note("missing texts of training rows are a category of their own", f"{name} ({num_missing})")
        return InputColumn(name, "category", values=tuple(categories), has_missing=num_missing > 0)

    def _stray_text(self, texts: pa.ChunkedArray) -> str:
        """Return "'?' in row 7 of … stands among numbers" if at least half of the texts are numbers, else ""."""
        strange = [text for text in texts.unique().to_pylist() if text is not None and not is_number(text)]
        stray = np.flatnonzero(places(texts, strange) >= 0)
        if not len(stray) or len(stray) > len(texts) / 2:
            return ""
        return f"{texts[stray[0]].as_py()!r} {self.place(stray[0])} stands among numbers"

    def categories(self, column: InputColumn, values: pa.ChunkedArray) -> np.ndarray:
        """Return the number of each row's category, int64 [N], -1 for none, and note unknown values."""
        texts = self._texts(column.name, values)
        numbers = places(texts, column.values)
        if column.has_missing:
            numbers[texts.is_null().to_numpy()] = len(column.values)
        if len(unknown := np.flatnonzero(numbers < 0)):
            example = texts[unknown[0]].as_py()
            such = "a missing one" if example is None else repr(example)
            text = f"values of {self.where} that no training row has count as no category"
            self.note(text, f"{column.name} ({len(unknown)}, such as {such})", is_warning=True)
        return numbers

    def _texts(self, name: str, values: pa.ChunkedArray) -> pa.ChunkedArray:
        self._refuse_other(name, values, "category")
        if pa.types.is_dictionary(values.type):
            chunks = [chunk.dictionary_decode() for chunk in values.chunks]
            values = pa.chunked_array(chunks, values.type.value_type)
        texts = values.cast(pa.string())
        self._refuse_missing(name, texts.is_null().to_numpy())
        return texts

    def parts(
        self, name: str, values: pa.ChunkedArray, kind: NumberKind | Literal["list"], num: int | None = None
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the name and numbers, float64 [N], of a column, or of each place in its lists.

        Times become seconds, missing values NaN.

        Args:
            num: how many numbers a list had in training.

        Raises:
            ValueError: for values of another kind, infinite ones, missing ones that are refused, and lists of another
                length.
        """
        self._refuse_other(name, values, kind)
        if kind != "list":
            is_time = kind_of_column(values.type) == "time"
            yield name, self._finite(name, seconds(values) if is_time else float64(values))
            return
        absent = values.is_null().to_numpy()
        self._refuse_missing(name, absent)
        present = np.flatnonzero(~absent)
        lists = array_of_lists(values.drop_null(), f"column {name}", lambda row: self.place(present[row]))
        if not len(present):
            lists = np.empty((0, num or 0))
        if num not in (None, lists.shape[1]):
            text = f"column {name} of {self.where} has lists of {lists.shape[1]} numbers; in training they had {num}"
            raise ValueError(text)
        for place in range(lists.shape[1]):
            numbers = np.full(len(absent), math.nan)
            numbers[present] = lists[:, place]
            yield f"{name}[{place}]", self._finite(f"{name}[{place}]", numbers)

    def _finite(self, name: str, numbers: np.ndarray) -> np.ndarray:
        if len(infinite := np.flatnonzero(np.isinf(numbers))):
            text = f"column {name} is {numbers[infinite[0]]} {self.place(infinite[0])}"
            raise ValueError(f"{text}: leave such rows out, or the column with --data.columns")
        self._refuse_missing(name, np.isnan(numbers))
        return numbers

    def _refuse_other(self, name: str, values: pa.ChunkedArray, kind: Kind) -> None:
        if kind_of_column(values.type) != kind and not pa.types.is_null(values.type):
            stray = self._stray_text(values.cast(pa.string())) if is_string(values.type) else ""
            text = f"column {name} of {self.where} holds {values.type}{'' if stray else such_as(values)}"
            stray = f" ({stray}: correct it)" if stray else ""
            raise ValueError(f"{text}; in training it was {_IN_WORDS[kind]}{stray}")

    def _refuse_missing(self, name: str, absent: np.ndarray) -> None:
        if self.missing == "refuse" and (num := int(absent.sum())):
            more = f", and in {num - 1} more rows" if num > 1 else ""
            first = self.place(int(np.flatnonzero(absent)[0]))
            raise ValueError(f"column {name} has no value {first}{more}: {self.remedy}")


def _written_number(categories: Sequence[str]) -> str:
    """Return "such as '1,5' …" if most texts are numbers or dates in a form that is not read as such, else ""."""
    written = [text for text in categories if _WRITTEN_NUMBER.fullmatch(text.strip())]
    are_codes = all(map(str.isdigit, written)) and len(written) <= _MOST_CODES
    if len(written) <= len(categories) / 2 or are_codes:
        return ""
    example = next((text for text in written if not text.isdigit()), written[0])
    return f"such as {example!r}; give numbers as numbers, in CSV as 1.5, and dates as 2026-12-31"
