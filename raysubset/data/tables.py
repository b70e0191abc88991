"""Chooses which columns of tables are images or features and which are targets, and joins tables."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from raysubset.config import DataConfig, nearest
from raysubset.data.image_columns import ReadFile, plain
from raysubset.data.layout import some
from raysubset.data.row_groups import RowGroups, TableGroups, concatenated
from raysubset.data.split import SplitName
from raysubset.data.targets import UNLABELLED, named_labels
from raysubset.events import Note
from raysubset.tasks.column_values import OF_LISTS, is_list, kind_of_column

_MOST_COLUMNS = 50  # listed in one message

# The usual names of targets, if data.target names none: of features, and by task of images.
_TARGETS = ("target", "label")
_IMAGE_TARGETS = {"regression": ("target", "label"), "segmentation": ("mask", "label")}

# The names of row numbers that pandas writes beside a table, in CSV and in Parquet: an index without a name.
ROW_NUMBERS = re.compile(r"|Unnamed: \d+|__index_level_\d+__")


@dataclass(frozen=True)
class Choice:
    """Which columns of tables are learned from, and which are learned."""

    features: tuple[str, ...]  # if they are images, their column alone
    targets: tuple[str, ...]  # more than one for regression only
    are_images: bool = False
    notes: tuple[Note, ...] = ()

    def needed(self, schema: pa.Schema, where: str, *, is_train: bool = True) -> list[str]:
        """Return the columns to read from a table: features, targets, and all numbers, texts and times.

        Raises:
            ValueError: for a column that is missing, with the nearest name, or cannot be read.
        """
        learned = (*self.targets, *self.features)
        refuse_absent(learned, schema.names, where, is_train=is_train)
        names = [field.name for field in schema if field.name in learned or _is_plain(field.type)]
        refuse_unreadable(schema, names, where)
        return names


@dataclass(frozen=True)
class Tables:
    """A data set of tables, and which of their columns are features and targets."""

    splits: Mapping[SplitName, pa.Table]  # features, targets, and further scalars
    choice: Choice
    notes: tuple[Note, ...] = ()
    streamed: RowGroups | None = None  # the files of the training features, if those are not held in memory
    read_file: ReadFile | None = None  # reads the images whose paths a column of texts holds


def holds_images(schema: pa.Schema, config: DataConfig) -> bool:
    """Return True if a table is read as images: it has the image column, or a column that can only hold images.

    So a mistyped data.image_column is reported, instead of learning from the other columns of a set of images.
    """
    if config.columns is not None:
        return False
    is_named = config.image_column in schema.names or config.image_column != DataConfig.image_column
    return is_named or not all(_is_plain(field.type) or holds_lists(field) for field in schema)


def choose_columns(schema: pa.Schema, where: str, config: DataConfig, task: str) -> Choice:
    """Decide by the first training table which columns are targets and features.

    Raises:
        ValueError: for columns that are missing, with the nearest name, or cannot be read, and if none is left for a
            feature or none or several may be targets.
    """
    notes: list[Note] = []
    are_images = holds_images(schema, config)
    if are_images:
        refuse_absent([config.image_column], schema.names, where, option="image-column")
    usual = _IMAGE_TARGETS.get(task, ("label",)) if are_images else _TARGETS
    targets = split_names("target", config.target, schema.names)
    features = (config.image_column,) if are_images else split_names("columns", config.columns, schema.names)
    named = (*(targets or usual), *features)
    learned = {field.name for field in schema if field.name in named or (not features and holds_lists(field))}
    names = [field.name for field in schema if field.name in learned or _is_plain(field.type)]
    refuse_unreadable(schema, names, where)
    if targets:
        refuse_absent(targets, names, where, option="target")
    else:
        targets = tuple(name for name in usual if name in names)
        if len(targets) != 1:
            problem = f"both columns {' and '.join(targets)}" if targets else f"no column {' or '.join(usual)}"
            known = some(names, most=_MOST_COLUMNS)
            raise ValueError(f"{where} has {problem}: set --data.target to the one to learn, of {known}")
        if len(usual) > 1:
            notes.append(Note(f"the column {targets[0]} is learned; --data.target names another"))
    if overlap := [name for name in features if name in targets]:
        option = "image-column" if are_images else "columns"
        raise ValueError(f"{overlap[0]} is in --data.{option} and --data.target: it cannot be learned from itself")
    if features:
        refuse_absent(features, names, where, option="columns")
        return Choice(features, targets, are_images, tuple(notes))
    others = [name for name in names if name not in targets]
    if other := next((field for field in schema if field.name in others and kind_of_column(field.type) is None), None):
        text = f"column {other.name} of {where} holds {other.type}, which is no number, time or text"
        raise ValueError(f"{text}{OF_LISTS}; --data.columns names the columns to learn from")
    row_numbers = [name for name in others if ROW_NUMBERS.fullmatch(name)]
    features = tuple(name for name in others if name not in row_numbers)
    if not features:
        left_out = ", ".join((*targets, *row_numbers))
        raise ValueError(f"{where} has no columns beside {left_out}: give it some to learn from")
    if row_numbers:
        left_out = some(repr(name) for name in row_numbers)
        notes.append(Note(f"row numbers that pandas wrote are left out: {left_out}; --data.columns names them"))
    return Choice(features, targets, are_images, tuple(notes))


def tables_in_memory(
    by_split: Mapping[SplitName, tuple[str, pa.Table]], config: DataConfig, task: str, notes: Sequence[Note] = ()
) -> Tables:
    """Choose the columns of tables in memory, each with its name in messages. Raises as choose_columns() does."""
    name, first = by_split["train"]
    choice = choose_columns(first.schema, name, config, task)
    chosen: dict[SplitName, dict[str, pa.Table]] = {
        split: {where: table.select(choice.needed(table.schema, where, is_train=split == "train"))}
        for split, (where, table) in by_split.items()
    }
    return join_splits(chosen, choice, config, notes)


def join_splits(
    by_split: Mapping[SplitName, Mapping[str, pa.Table]],
    choice: Choice,
    config: DataConfig,
    notes: Sequence[Note],
    streamed: RowGroups | None = None,
) -> Tables:
    """Join the tables of each split, which are given by file name.

    Args:
        notes: on the files.
        streamed: the features of the training tables, if those do not hold them.

    Raises:
        ValueError: for tables that cannot be joined.
    """
    splits, notes = dict[SplitName, pa.Table](), [*notes, *choice.notes]
    for split, tables in by_split.items():
        splits[split], joining = join_tables(tables, choice.targets[0], config, f"the {split} split of {config.name}")
        notes += joining
    schemas = {split: table.schema for split, table in splits.items()}
    if isinstance(streamed, TableGroups):
        schemas["train"] = streamed.schema
    for name in () if choice.are_images else choice.features:
        types = [schema.field(name).type for schema in schemas.values()]
        zones = {type_.tz is not None for type_ in types if pa.types.is_timestamp(type_)}
        if len(zones) > 1:
            text = f"times of column {name} have a zone in one split and none in another, where they count as UTC"
            notes.append(Note(text, is_warning=True))
    return Tables(splits, choice, tuple(notes), streamed)


def holds_lists(field: pa.Field) -> bool:
    """Return True for a column of lists, which are no tensors that ray.data wrote."""
    return is_list(field.type) and b"ARROW:extension:name" not in (field.metadata or {})


def _is_plain(type_: pa.DataType) -> bool:
    return kind_of_column(type_) not in (None, "list")


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


def join_tables(
    tables: Mapping[str, pa.Table], target: str, config: DataConfig, where: str
) -> tuple[pa.Table, tuple[Note, ...]]:
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
        names, problem = _declared_names(table.schema, target)
        if problem:
            notes.append(Note(f"metadata of {path} is ignored: {problem}", is_warning=True))
        table = plain(table, config, path)
        labels = table.column(target)
        if names and pa.types.is_integer(labels.type):
            numbers = labels.cast(pa.int64()).fill_null(UNLABELLED).to_numpy()
            place = table.column_names.index(target)
            table = table.set_column(place, target, named_labels(numbers, names, path))
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
