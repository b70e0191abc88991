"""Reads CSV files as Arrow tables: a header, commas (.csv) or tabs (.tsv), UTF-8. Errors name the damaged line."""

import codecs
import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.csv as pa_csv

from raysubset.config import DELIMITERS
from raysubset.tasks.column_values import is_number, is_string

_NAMES = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
HEADER_BYTES = 2**20  # in which the header ends
_LARGEST_BLOCK = 2**31 - 1  # bytes
_MOST_SHOWN = 60  # characters of a damaged line


def read_csv(data: bytes, path: str, *, types: Mapping[str, pa.DataType] | None = None) -> pa.Table:
    """Read a file. Empty cells and NA, NaN, null and the like become nulls, also in columns of texts.

    Args:
        data: the file's bytes.
        path: its suffix decides the delimiter; messages show it.
        types: of columns that are not to be inferred, such as texts whose values are numbers.

    Raises:
        ValueError: for a line with more or fewer values than the header, a missing header, or bytes that are not
            UTF-8.
    """
    header(data[:HEADER_BYTES], path)
    delimiter = DELIMITERS[PurePosixPath(path).suffix.lower()]
    # Arrow infers types from the first block alone, so the whole file is one block.
    read_options = pa_csv.ReadOptions(block_size=min(len(data) + 1, _LARGEST_BLOCK), use_threads=True)
    convert_options = pa_csv.ConvertOptions(strings_can_be_null=True, column_types=types)
    try:
        parse_options = pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
        table = pa_csv.read_csv(pa.BufferReader(data), read_options, parse_options, convert_options)
    except pa.ArrowInvalid:
        _refuse_damaged_line(data, delimiter, path)
        raise
    if data.count(b'"') % 2:
        _refuse_damaged_line(data, delimiter, path)
    for name, column in zip(table.column_names, table.columns, strict=True):
        if pa.types.is_binary(column.type):
            values = [value or b"" for value in column.to_pylist()]
            row = next(row for row, value in enumerate(values) if value.decode(errors="ignore").encode() != value)
            raise ValueError(f"column {name} of {path} is not UTF-8 in row {row}: write it as UTF-8")
    return table


def types_in_all(tables: Iterable[pa.Table]) -> dict[str, pa.DataType]:
    """Return the types of columns that differ between files and would be inferred of all files as one.

    A column that is text in one file is text, and one of dates and of timestamps without a zone is of timestamps. All
    else is left out: types that go together, such as integers and floats, and others that do not.
    """
    found = defaultdict[str, set[pa.DataType]](set)
    for field in (field for table in tables for field in table.schema):
        found[field.name].add(field.type)
    types: dict[str, pa.DataType] = {}
    for name, kinds in found.items():
        if any(map(is_string, kinds)):
            types[name] = pa.string()
        elif pa.date32() in kinds and pa.timestamp("s") in kinds:
            types[name] = pa.timestamp("s")
    return types


def header(data: bytes, path: str) -> list[str]:
    """Return the names of the columns, from the first bytes of a file.

    Raises:
        ValueError: if they are no names, or not UTF-8.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{path} is UTF-16: write it as UTF-8")
    delimiter, text = DELIMITERS[PurePosixPath(path).suffix.lower()], data.decode("utf-8-sig", errors="replace")
    try:
        names = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
    except csv.Error as error:  # a name of over 131,072 characters, as where a quote is not closed or lines have no end
        raise ValueError(f"the first line of {path} should name the columns ({error}): write a header there") from error
    if any("\ufffd" in name for name in names):
        raise ValueError(f"the first line of {path} is not UTF-8: write it as UTF-8")
    numbers = [name for name in names if is_number(name)]
    if numbers and (len(numbers) == len(names) or not all(name.isdigit() for name in numbers)):
        raise ValueError(
            f"the first line of {path} should name the columns, and holds {', '.join(names[:5])}: write a header there"
        )
    delimiters = [other for other in _NAMES if other != delimiter and names and other in names[0]]
    if len(names) == 1 and delimiters:
        raise ValueError(
            f"{path} has one column, {names[0][:_MOST_SHOWN]!r}, with {_NAMES[delimiters[0]]} in it: values are "
            "separated by commas in .csv, by tabs in .tsv; write it so, or as Parquet"
        )
    return names


def _refuse_damaged_line(data: bytes, delimiter: str, path: str) -> None:
    """Refuse the first row whose number of values differs from the header's, and a quote that is never closed."""
    text = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", errors="replace", newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=data.count(b'"') % 2 == 1)
    line, num_expected = 0, None
    try:
        for values in reader:
            num, num_expected = len(values), num_expected or len(values)
            if num not in (0, num_expected):  # an empty line is no row
                raise ValueError(
                    f"line {reader.line_num} of {path} has {num} value{'s' if num != 1 else ''} where the header has "
                    f"{num_expected} ({delimiter.join(values)[:_MOST_SHOWN]!r}): correct the line, or put values that "
                    "hold the delimiter in quotes"
                )
            line = reader.line_num
    except csv.Error as error:
        problem = f"a quote that line {line + 1} of {path} opens is not closed"
        raise ValueError(f"{problem}: write quotes inside of values twice") from error
