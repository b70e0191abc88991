"""Chooses which columns of tables are images or features, which are targets, and joins the tables of some files."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from raysubset.config import DataConfig, nearest
from raysubset.data.image_columns import ReadFile, plain
from raysubset.data.labels import UNLABELLED, named_labels
from raysubset.data.layout import some
from raysubset.data.row_groups import ImageGroups, RowGroups, concatenated
from raysubset.data.split import SplitName
from raysubset.events import Note
from raysubset.tasks.columns import kind_of_column

_MOST_COLUMNS = 50  # listed in one message

# The usual names of targets, if data.target names none: of features, and by task of images.
_TARGETS = ("target", "label")
_IMAGE_TARGETS = {"regression": ("target", "label"), "segmentation": ("mask", "label")}

# The names of row numbers that pandas writes beside a table, in CSV and in Parquet: an index without a name.
ROW_NUMBERS = re.compile(r"|Unnamed: \d+|__index_level_\d+__")


@dataclass(frozen=True)
class Tables:
    """A data set of tables, and which of their columns are features and targets."""

    splits: Mapping[SplitName, pa.Table]  # features, targets, and further scalars
    features: tuple[str, ...]  # if they are images, their column alone
    targets: tuple[str, ...]  # more than one for regression only
    notes: tuple[Note, ...]
    streamed: RowGroups | None = None  # the files of the training features, if those are not held in memory
    are_images: bool = False
    read_file: ReadFile | None = None  # reads the images whose paths a column of texts holds


def holds_images(schema: pa.Schema, config: DataConfig) -> bool:
    """Return True if a table is read as images: it has the image column, or a column that can only hold images.

    So a mistyped data.image_column is reported, instead of learning from the other columns of a set of images.
    """
    if config.columns is not None:
        return False
    is_named = config.image_column in schema.names or config.image_column != DataConfig.image_column
    return is_named or not all(_is_plain(field.type) for field in schema)


def needed_columns(schema: pa.Schema, path: str, config: DataConfig, task: str) -> list[str]:
    """Return the columns to read: images, a task's targets, those of data.columns, and all numbers, texts and times.

    Raises:
        ValueError: for a missing image column, with the nearest name, and for columns that cannot be read.
    """
    are_images = holds_images(schema, config)
    if are_images:
        refuse_absent([config.image_column], schema.names, path, option="image_column")
    targets = split_names("target", config.target, schema.names) or _usual_targets(task, are_images=are_images)
    chosen = split_names("columns", config.columns, schema.names) or ((config.image_column,) if are_images else ())
    needed = [field.name for field in schema if field.name in (*targets, *chosen) or _is_plain(field.type)]
    refuse_unreadable(schema, needed, path)
    return needed


def choose_columns(
    by_split: Mapping[SplitName, Mapping[str, pa.Table]],
    config: DataConfig,
    task: str,
    streamed: RowGroups | None = None,
) -> Tables:
    """Join the tables of each split, and decide which columns are targets and features.

    Args:
        by_split: for each split, tables by file name; the first of "train" decides.
        streamed: the features of the training tables, if those do not hold them.

    Raises:
        ValueError: for a missing column, with the nearest name, and for tables that cannot be joined.
    """
    path, first = next(iter(by_split["train"].items()))
    streamed_names = [*streamed.columns] if streamed else []
    are_images = isinstance(streamed, ImageGroups) or (streamed is None and holds_images(first.schema, config))
    targets, features, notes = learned_columns(
        [*first.column_names, *streamed_names], config, task, path, are_images=are_images
    )
    splits: dict[SplitName, pa.Table] = {}
    for split, files in by_split.items():
        where = f"the {split} split of {config.name}"
        for path, table in files.items():
            names = [*table.column_names, *(streamed_names if split == "train" else ())]
            refuse_absent((*targets, *features), names, path, is_train=split == "train")
        splits[split], joining = join_tables(files, dataclasses.replace(config, target=targets[0]), where)
        notes += joining
    return Tables(splits, features, targets, tuple(notes), streamed, are_images)


def learned_columns(
    names: Sequence[str], config: DataConfig, task: str, path: str, *, are_images: bool
) -> tuple[tuple[str, ...], tuple[str, ...], list[Note]]:
    """Return the targets and the features among a table's columns, and notes on those that the config does not name.

    Raises:
        ValueError: for columns that are missing, and if none is left for a feature or none or several may be targets.
    """
    notes: list[Note] = []
    if targets := split_names("target", config.target, names):
        refuse_absent(targets, names, path, option="target")
    else:
        usual = _usual_targets(task, are_images=are_images)
        targets = tuple(name for name in usual if name in names)
        if len(targets) != 1:
            problem = f"both columns {' and '.join(targets)}" if targets else f"no column {' or '.join(usual)}"
            known = some(names, most=_MOST_COLUMNS)
            raise ValueError(f"{path} has {problem}: set --data.target to the one to learn, of {known}")
        if len(usual) > 1:
            notes.append(Note(f"the column {targets[0]} is learned; --data.target names another"))
    features = (config.image_column,) if are_images else split_names("columns", config.columns, names)
    if overlap := [name for name in features if name in targets]:
        option = "image-column" if are_images else "columns"
        raise ValueError(f"{overlap[0]} is in --data.{option} and --data.target: it cannot be learned from itself")
    if features:
        refuse_absent(features, names, path, option="image_column" if are_images else "columns")
        return targets, features, notes
    others = [name for name in names if name not in targets]
    row_numbers = [name for name in others if ROW_NUMBERS.fullmatch(name)]
    features = tuple(name for name in others if name not in row_numbers)
    if not features:
        raise ValueError(
            f"{path} has no columns beside {', '.join((*targets, *row_numbers))}: give it some to learn from"
        )
    if row_numbers:
        left_out = some(repr(name) for name in row_numbers)
        notes.append(Note(f"row numbers that pandas wrote are left out: {left_out}; --data.columns names them"))
    return targets, features, notes


def _usual_targets(task: str, *, are_images: bool) -> tuple[str, ...]:
    return _IMAGE_TARGETS.get(task, ("label",)) if are_images else _TARGETS


def _is_plain(type_: pa.DataType) -> bool:
    return kind_of_column(type_.value_type if pa.types.is_dictionary(type_) else type_) is not None


def split_names(option: str, text: str | None, columns: Sequence[str]) -> tuple[str, ...]:
    """Split an option's names at commas, unless the whole text is the name of a column."""
    if text is None or text in columns:
        return () if text is None else (text,)
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise ValueError(
            f"data.{option} = {text!r} names no column: set it to some of {some(columns, most=_MOST_COLUMNS)}"
        )
    return names


def refuse_absent(
    names: Sequence[str], columns: Sequence[str], where: str, *, option: str | None = None, is_train: bool = True
) -> None:
    """Refuse a table of these columns if it lacks one of the names, which an option of data may set.

    Raises:
        ValueError: with the column's name and the nearest one.
    """
    if absent := next((name for name in names if name not in columns), None):
        known = f"{some(columns, most=_MOST_COLUMNS)}{nearest(absent, columns)}"
        if option:
            raise ValueError(f"{where} has no column {absent}: set --data.{option} to some of {known}")
        remedy = "" if is_train else "; or leave the split out with --data.ignored"
        raise ValueError(f"{where} has no column {absent}, only {known}{remedy}")


def refuse_unreadable(schema: pa.Schema, names: Sequence[str], where: str) -> None:
    """Refuse to read columns whose values may be unpickled, and two columns of one name.

    Raises:
        ValueError: with the column's name.
    """
    for field in schema:
        if field.name in names and _unpickles(field.type):
            raise ValueError(f"column {field.name} of {where} holds pickled Python objects, whose reading runs code")
    if duplicates := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{where} has several columns {duplicates[0]!r}: give each a name of its own")


def _unpickles(kind: pa.DataType) -> bool:
    """Return True if reading a value of the type may unpickle it: ray.data's objects, also within other types."""
    if isinstance(kind, pa.BaseExtensionType):
        return "pickle" in kind.extension_name or _unpickles(kind.storage_type)
    return any(_unpickles(kind.field(number).type) for number in range(kind.num_fields))


def join_tables(tables: Mapping[str, pa.Table], config: DataConfig, where: str) -> tuple[pa.Table, tuple[Note, ...]]:
    """Join the tables of some files, one after another.

    Files of the `datasets` library may name their classes, each in its own order. Their integer labels become a
    dictionary of these names.

    Args:
        tables: the tables by file name.

    Raises:
        ValueError: for files that cannot be joined, and if there are no rows.
    """
    notes: list[Note] = []
    orders: set[tuple[str, ...]] = set()
    consistent = []
    for path, table in tables.items():
        names, problem = _declared_names(table.schema, config.label_column)
        if problem:
            notes.append(Note(f"metadata of {path} is ignored: {problem}", is_warning=True))
        table = plain(table, config, path)
        labels = table.column(config.label_column)
        if names and pa.types.is_integer(labels.type):
            numbers = labels.fill_null(UNLABELLED).cast(pa.int64()).to_numpy()
            place = table.column_names.index(config.label_column)
            table = table.set_column(place, config.label_column, named_labels(numbers, names, path))
            orders.add(names)
        consistent.append(table)
    if len(orders) > 1:
        notes.append(Note(f"files of {where} order their classes differently: labels are taken by name"))
    joined = concatenated(consistent, where)
    if not joined.num_rows:
        raise ValueError(f"{where} has no rows: give a table with examples")
    return joined, tuple(notes)


def _declared_names(schema: pa.Schema, label_column: str) -> tuple[tuple[str, ...] | None, str | None]:
    """Return the class names of a ClassLabel in the schema metadata of the `datasets` library, or what is wrong."""
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None:
        return None, None
    try:
        feature: Any = json.loads(text)
    except ValueError:
        return None, "its value of huggingface is not JSON"
    for key in ("info", "features", label_column):
        feature = feature.get(key) if isinstance(feature, dict) else None
    if not isinstance(feature, dict) or feature.get("_type") != "ClassLabel":
        return None, None
    names = feature.get("names")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        return None, f"its ClassLabel {label_column} has no list of names"
    return tuple(names), None
