"""Arrow tables as images, labels, and scalars that could tell subsets apart."""

import dataclasses
import json

import numpy as np
import pyarrow as pa

from raysubset.config import DataConfig, nearest
from raysubset.data.image_columns import images_of
from raysubset.data.labels import as_labels
from raysubset.data.row_groups import RowGroups
from raysubset.data.sources import SourceSplit
from raysubset.data.split import RESERVED_COLUMNS


def needed_columns(schema: pa.Schema, config: DataConfig, where: str) -> list[str]:
    """The columns worth reading: images, labels, and scalars that could tell subsets apart.

    Raises:
        ValueError: for a missing image or label column, with the nearest one, or two columns of one name.
    """
    for option in ("image_column", "label_column"):
        column = getattr(config, option)
        if column not in schema.names:
            known = ", ".join(schema.names)
            hint = nearest(column, schema.names)
            raise ValueError(f"{where} has no column {column}: set --data.{option} to one of {known}{hint}")
    wanted = (config.image_column, config.label_column)
    needed = [field.name for field in schema if field.name in wanted or _is_scalar(field.type)]
    if twice := [name for name in needed if needed.count(name) > 1]:
        raise ValueError(f"{where} has several columns {twice[0]}: give each a name of its own")
    return needed


def from_table(table: pa.Table, config: DataConfig, where: str) -> SourceSplit:
    """Read a split from its table.

    Raises:
        ValueError: for no rows, missing columns, nulls, or what is neither an image nor a label.
    """
    needed_columns(table.schema, config, where)
    if not table.num_rows:
        raise ValueError(f"{where} has no rows: give a table with examples")
    images, notes = images_of(table.column(config.image_column), config, where)
    split = with_scalars(images, table, config, where)
    return dataclasses.replace(split, notes=(*notes, *split.notes))


def with_scalars(images: np.ndarray | RowGroups, table: pa.Table, config: DataConfig, where: str) -> SourceSplit:
    """A split of these images, and of the labels and further columns of a table that may lack the images.

    Raises:
        ValueError: for labels that are none.
    """
    labels, class_names = as_labels(table.column(config.label_column), where)
    scalars = [field.name for field in table.schema if _is_scalar(field.type)]
    further = [name for name in scalars if name not in (config.image_column, config.label_column)]
    notes = ()
    clashing = [name for name in further if name in RESERVED_COLUMNS]
    if clashing:
        notes = (f"{where}: column {', '.join(clashing)} left out, since the full set has its own",)
    columns = {name: table.column(name) for name in further if name not in clashing}
    return SourceSplit(images, labels, _hugging_face_names(table.schema, config) or class_names, columns, notes)


def _is_scalar(type_: pa.DataType) -> bool:
    kinds = (pa.types.is_integer, pa.types.is_boolean, pa.types.is_string, pa.types.is_large_string)
    return any(is_kind(type_) for is_kind in kinds)


def _hugging_face_names(schema: pa.Schema, config: DataConfig) -> tuple[str, ...] | None:
    """Class names out of the `datasets` library's schema metadata, where it wrote a ClassLabel."""
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None:
        return None
    feature = json.loads(text).get("info", {}).get("features", {}).get(config.label_column, {})
    return tuple(feature["names"]) if feature.get("_type") == "ClassLabel" else None
