"""Reads tables to learn from their columns: decides which are features, which the target, and the target's classes."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa

from raysubset.config import DataConfig
from raysubset.data.files import describe_files, no_table, read_files, read_schema, refuse_other_formats
from raysubset.data.finding import DataFiles, find_files
from raysubset.data.labels import number_classes
from raysubset.data.layout import Placed, some
from raysubset.data.row_groups import TableGroups, concatenated
from raysubset.data.split import SplitName
from raysubset.data.tables import (
    join_tables,
    plain,
    refuse_absent,
    refuse_unreadable,
    split_names,
    usual_note,
    usual_target,
)
from raysubset.events import Note
from raysubset.tasks.columns import TableInputs, kind_of_column

_TARGETS = ("target", "label")  # the usual names of a target, if data.target names none

# The names of row numbers that pandas writes beside a table, in CSV and in Parquet: an index without a name.
_ROW_NUMBERS = re.compile(r"|Unnamed: \d+|__index_level_\d+__")


@dataclass(frozen=True)
class Tables:
    """A data set of tables, and which of their columns are features and targets."""

    splits: Mapping[SplitName, pa.Table]  # features, targets, and further scalars
    features: tuple[str, ...]
    targets: tuple[str, ...]  # more than one for regression only
    notes: tuple[Note, ...]
    streamed: TableGroups | None = None  # the files of the training features, if those are not held in memory


def is_of_columns(config: DataConfig) -> bool:
    """Return True if a path holds tables to learn columns from: without an image column, or with data.columns set.

    Raises:
        ValueError: for what find_files() refuses, and for a damaged first file.
    """
    files = find_files(config)
    if files.kind != "tables" or config.columns is not None:
        return files.kind == "tables"
    return not holds_images(read_schema(files, files.layout["train"][0]), config)


def holds_images(schema: pa.Schema, config: DataConfig) -> bool:
    """Return True if a table is read as images: it has the image column, or a column that can only hold images.

    So a mistyped data.image_column is reported, instead of learning from the other columns of a set of images.
    """
    if config.columns is not None:
        return False
    is_named = config.image_column in schema.names or config.image_column != DataConfig.image_column
    return is_named or not all(_is_plain(field.type) for field in schema)


def read_tables(config: DataConfig) -> Tables:
    """Read the files of a path as tables of columns.

    Raises:
        ValueError: with the file, if there is nothing to read, or it is damaged or ambiguous.
    """
    files = _find_tables(config)
    notes, streamed = [], None
    by_split: dict[SplitName, dict[str, pa.Table]] = {}
    for split, members in files.layout.items():
        if split == "train" and config.streamed:
            by_split[split], streamed = _stream(files, members, config)
        else:
            by_split[split] = read_files(files, members, partial(_needed, config=config))
        num = sum(table.num_rows for table in by_split[split].values())
        notes.append(Note(f"{split} split: {num} examples of {describe_files(files, members)}"))
    tables = choose_columns(by_split, config, streamed)
    return dataclasses.replace(tables, notes=(*notes, *files.notes, *tables.notes))


def read_columns(config: DataConfig) -> tuple[dict[SplitName, pa.Table], tuple[Note, ...]]:
    """Read the columns of a path's files for a user's own task: those of data.columns, by default all.

    Raises:
        ValueError: as read_tables() does, and for data.streamed.
    """
    if config.streamed:
        raise ValueError("a task of your own has its table in memory: leave --data.streamed out")
    files, splits, notes = _find_tables(config), dict[SplitName, pa.Table](), list[Note]()

    def needed(schema: pa.Schema, path: str) -> list[str]:
        names = split_names("columns", config.columns, schema.names)
        refuse_absent(names, schema.names, path, option="columns")
        columns = [*names] or [name for name in schema.names if not _ROW_NUMBERS.fullmatch(name)]
        refuse_unreadable(schema, columns, path)
        return columns

    for split, members in files.layout.items():
        tables = read_files(files, members, needed)
        splits[split] = concatenated([*tables.values()], f"the {split} split of {config.name}")
        notes.append(Note(f"{split} split: {splits[split].num_rows} examples of {describe_files(files, members)}"))
    return splits, (*notes, *files.notes)


def _stream(files: DataFiles, members: Sequence[Placed], config: DataConfig) -> tuple[dict[str, pa.Table], TableGroups]:
    """Return a streamed split's tables by file, without their features, and the files of the features."""
    refuse_other_formats(files, members)
    path, where = files.full_path(members[0]), f"the train split of {config.name}"
    readable = _needed(read_schema(files, members[0]), path, config)
    features, _ = _features(readable, _targets(readable, config, path)[0], config, path)
    schemas: list[pa.Table] = []

    def needed(schema: pa.Schema, path: str) -> list[str]:
        names = _needed(schema, path, config)
        refuse_absent(features, names, path)
        schemas.append(plain(schema.empty_table().select(features), config, path))
        return names

    tables = read_files(files, members, needed, left_out=features)
    schema = concatenated(schemas, where).schema
    return tables, TableGroups.of_files(config, where, [*tables], members=tuple(members), schema=schema)


def _find_tables(config: DataConfig) -> DataFiles:
    files = find_files(config)
    if files.kind == "texts":
        raise no_table(files)
    if files.kind == "images":
        raise ValueError(f"{config.name} is a folder of image files, without columns: leave --data.columns out")
    return files


def read_rows(path: str, inputs: TableInputs) -> pa.Table:
    """Read the columns that the inputs encode from a file or folder of tables.

    A CSV column that was text in training is read as text, even if its values are numbers.

    Raises:
        ValueError: if a table cannot be read.
    """
    files = _find_tables(DataConfig(name=path))
    names = [column.name for column in inputs.columns]
    texts = tuple(column.name for column in inputs.columns if column.kind == "category")

    def needed(schema: pa.Schema, path: str) -> list[str]:
        refuse_absent(names, schema.names, path)
        columns = [name for name in schema.names if name in names]
        refuse_unreadable(schema, columns, path)
        return columns

    members = [member for each in files.layout.values() for member in each]
    tables = [*read_files(files, members, needed, texts=texts).values()]
    return concatenated(tables, path)


def choose_columns(
    by_split: Mapping[SplitName, Mapping[str, pa.Table]], config: DataConfig, streamed: TableGroups | None = None
) -> Tables:
    """Join the tables of each split, and decide which columns are targets and features.

    Args:
        by_split: for each split, tables by file name; the first of "train" decides.
        streamed: the features of the training tables, if those do not hold them.

    Raises:
        ValueError: for a missing column, with the nearest name, and for tables that cannot be joined.
    """
    path, first = next(iter(by_split["train"].items()))
    streamed_names = streamed.schema.names if streamed else []
    targets, notes = _targets([*first.column_names, *streamed_names], config, path)
    features, feature_notes = _features([*first.column_names, *streamed_names], targets, config, path)
    notes += feature_notes
    splits: dict[SplitName, pa.Table] = {}
    for split, files in by_split.items():
        where = f"the {split} split of {config.name}"
        for path, table in files.items():
            names = [*table.column_names, *(streamed_names if split == "train" else ())]
            refuse_absent((*targets, *features), names, path, is_train=split == "train")
        splits[split], joining = join_tables(files, dataclasses.replace(config, target=targets[0]), where)
        notes += joining
    return Tables(splits, features, targets, tuple(notes), streamed)


def class_numbers(tables: Tables) -> tuple[dict[SplitName, np.ndarray], tuple[str, ...], tuple[Note, ...]]:
    """Number the target's classes with number_classes().

    Raises:
        ValueError: for several targets, and for what number_classes() refuses.
    """
    target, *others = tables.targets
    if others:
        raise ValueError(
            f"classification learns one column, not {some(tables.targets)}: set --data.target to one, use --task "
            "regression, or write a task of your own, which may learn several labels"
        )
    return number_classes({split: table.column(target) for split, table in tables.splits.items()})


def _needed(schema: pa.Schema, path: str, config: DataConfig) -> list[str]:
    """Return the columns to read: those that the config names, and all numbers, texts and times."""
    targets = split_names("target", config.target, schema.names) or _TARGETS
    chosen_names = {*targets, *split_names("columns", config.columns, schema.names)}
    needed = [field.name for field in schema if field.name in chosen_names or _is_plain(field.type)]
    refuse_unreadable(schema, needed, path)
    return needed


def _is_plain(type_: pa.DataType) -> bool:
    return kind_of_column(type_.value_type if pa.types.is_dictionary(type_) else type_) is not None


def _targets(names: Sequence[str], config: DataConfig, path: str) -> tuple[tuple[str, ...], list[Note]]:
    if targets := split_names("target", config.target, names):
        refuse_absent(targets, names, path, option="target")
        return targets, []
    name = usual_target(names, _TARGETS, path)
    return (name,), [usual_note(name)]


def _features(
    names: Sequence[str], targets: Sequence[str], config: DataConfig, path: str
) -> tuple[tuple[str, ...], list[Note]]:
    if chosen := split_names("columns", config.columns, names):
        refuse_absent(chosen, names, path, option="columns")
        if overlap := [name for name in chosen if name in targets]:
            raise ValueError(f"{overlap[0]} is in --data.columns and --data.target: it cannot be learned from itself")
        return chosen, []
    others = [name for name in names if name not in targets]
    row_numbers = [name for name in others if _ROW_NUMBERS.fullmatch(name)]
    features = tuple(name for name in others if name not in row_numbers)
    if not features:
        raise ValueError(
            f"{path} has no columns beside {', '.join((*targets, *row_numbers))}: give it some to learn from"
        )
    if not row_numbers:
        return features, []
    left_out = some(repr(name) for name in row_numbers)
    return features, [Note(f"row numbers that pandas wrote are left out: {left_out}; --data.columns names them")]
