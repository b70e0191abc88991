"""Reads images, targets, and scalars by which subsets can be cut, from Arrow tables."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from raysubset.config import DataConfig, nearest
from raysubset.data.image_columns import ReadFile, images_of, masks_of, plain, with_full_paths
from raysubset.data.images import EncodedImages
from raysubset.data.labels import UNLABELLED, named_labels
from raysubset.data.layout import some
from raysubset.data.row_groups import ImageGroups, concatenated
from raysubset.data.sources import SourceSplit
from raysubset.data.split import is_scalar
from raysubset.events import Note
from raysubset.tasks import target_numbers

_MOST_COLUMNS = 50  # listed in one message

# The usual names of targets that tasks other than classification learn from images; the full set uses the first.
IMAGE_TARGETS = {"regression": ("target", "label"), "segmentation": ("mask", "label")}


def needed_columns(schema: pa.Schema, where: str, config: DataConfig, task: str) -> list[str]:
    """Return the columns to read: images, a task's targets, and scalars by which subsets can be cut.

    Raises:
        ValueError: for a missing image or target column, with the nearest name, and for two columns of one name.
    """
    targets = image_targets(schema.names, config, task, where)
    refuse_absent([config.image_column], schema.names, where, option="image_column")
    refuse_absent(targets, schema.names, where, option="target")
    if config.image_column in targets:
        raise ValueError(
            f"{config.image_column} is --data.image_column and --data.target: it cannot be learned from itself"
        )
    learned = (config.image_column, *targets)
    needed = [field.name for field in schema if field.name in learned or is_scalar(field.type)]
    refuse_unreadable(schema, needed, where)
    return needed


def image_targets(columns: Sequence[str], config: DataConfig, task: str, where: str) -> tuple[str, ...]:
    """Return the columns that a task learns from images: those of data.target, or the one with a usual name.

    Raises:
        ValueError: if data.target names no column; if it is None and not exactly one column has a usual name; and for
            several columns of masks.
    """
    if task not in IMAGE_TARGETS:
        return (config.label_column,)
    names = split_names("target", config.target, columns) or (usual_target(columns, IMAGE_TARGETS[task], where),)
    if task == "segmentation" and len(names) > 1:
        raise ValueError(f"segmentation learns one column of masks, not {some(names)}: set --data.target to one")
    return names


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


def usual_target(columns: Sequence[str], usual: Sequence[str], where: str) -> str:
    """Return the one column that has a usual name.

    Raises:
        ValueError: if none or several have one.
    """
    targets = [name for name in usual if name in columns]
    if len(targets) != 1:
        problem = f"both columns {' and '.join(targets)}" if targets else f"neither a column {' nor '.join(usual)}"
        raise ValueError(
            f"{where} has {problem}: set --data.target to the one to learn, of {some(columns, most=_MOST_COLUMNS)}"
        )
    return targets[0]


def usual_note(name: str) -> Note:
    """Return the note on a target that data.target does not name."""
    return Note(f"the column {name} is learned; --data.target names another")


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


def from_tables(
    tables: Mapping[str, pa.Table], config: DataConfig, where: str, task: str, read_file: ReadFile | None = None
) -> SourceSplit:
    """Read a split of images for a task from the tables of its files, given by file name.

    Args:
        read_file: reads the files that a column of texts names by their paths; None: such a column is refused.

    Raises:
        ValueError: for missing columns, nulls, values that are no images or no targets of the task, and if there are
            no rows.
    """
    for path, table in tables.items():
        needed_columns(table.schema, path, config, task)
    if read_file is not None:
        tables = {path: with_full_paths(table, config.image_column, path) for path, table in tables.items()}
    names = image_targets(next(iter(tables.values())).column_names, config, task, where)
    table, notes = join_tables(tables, dataclasses.replace(config, target=names[0]), where)
    column = table.column(config.image_column)
    images, findings = images_of(column, where, image_size=config.image_size, read_file=read_file)
    split = image_split(images, table, notes, names, config, where, task)
    return dataclasses.replace(split, findings=findings)


def image_split(
    images: np.ndarray | EncodedImages | ImageGroups,
    table: pa.Table,
    notes: tuple[Note, ...],
    names: tuple[str, ...],
    config: DataConfig,
    where: str,
    task: str = "classification",
) -> SourceSplit:
    """Build a split of these images with a task's targets, the columns `names`, and further scalars of their table.

    Raises:
        ValueError: for values that are no targets of the task.
    """
    targets: pa.ChunkedArray | np.ndarray = table.column(names[0])
    if task == "regression":
        targets = target_numbers(table, names, where=where)
    elif task == "segmentation":
        assert not isinstance(images, ImageGroups)
        targets = masks_of(table.column(names[0]), images, where, image_size=config.image_size)
    further = [field.name for field in table.schema if is_scalar(field.type)]
    further = [name for name in further if name not in (config.image_column, *names)]
    reserved = ("image", IMAGE_TARGETS.get(task, ("label",))[0], "row")
    if clashing := [name for name in further if name in reserved]:
        notes += (Note(f"{where}: column {', '.join(clashing)} left out, since the full set has its own"),)
    columns = {name: table.column(name) for name in further if name not in clashing}
    target_names = names if task in IMAGE_TARGETS else ()
    return SourceSplit(images, targets, columns, notes, where=where, target_names=target_names, is_by_name=True)


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
