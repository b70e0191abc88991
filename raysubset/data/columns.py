"""Reads the files of tables, with columns to learn or with columns of images."""

import dataclasses
from collections.abc import Sequence
from functools import partial

import numpy as np
import pyarrow as pa

from raysubset.config import TABLE_SUFFIXES, DataConfig
from raysubset.data.files import describe_files, not_streamed, read_files, read_named_file, read_schema
from raysubset.data.finding import DataFiles, find_files
from raysubset.data.image_columns import image_column, images_of, plain, with_full_paths
from raysubset.data.images import EncodedImages
from raysubset.data.layout import Placed, some
from raysubset.data.row_groups import ImageGroups, RowGroups, TableGroups, concatenated
from raysubset.data.split import SplitName
from raysubset.data.tables import (
    ROW_NUMBERS,
    Choice,
    Tables,
    choose_columns,
    holds_images,
    join_splits,
    refuse_absent,
    refuse_unreadable,
    split_names,
)
from raysubset.events import Note
from raysubset.tasks.column_values import is_string
from raysubset.tasks.columns import TableInputs


def is_of_columns(files: DataFiles, config: DataConfig) -> bool:
    """Return True if a path holds tables to learn columns from: without an image column, or with data.columns set.

    Raises:
        ValueError: for a damaged first file.
    """
    if files.kind != "tables" or config.columns is not None:
        return files.kind == "tables"
    return not holds_images(read_schema(files, files.layout["train"][0]), config)


def read_tables(files: DataFiles, config: DataConfig, task: str = "classification") -> Tables:
    """Read the files of a path as tables of columns, or of images and their targets.

    Raises:
        ValueError: with the file, if there is nothing to read, or it is damaged or ambiguous.
    """
    _refuse_no_tables(files)
    notes, streamed = list[Note](), None
    first = files.layout["train"][0]
    choice = choose_columns(read_schema(files, first), files.full_path(first), config, task)
    by_split: dict[SplitName, dict[str, pa.Table]] = {}
    for split, members in files.layout.items():
        if split == "train" and config.streamed:
            tables, streamed = _stream(files, members, choice, config, task)
        else:
            needed = partial(choice.needed, is_train=split == "train")
            texts = choice.features if choice.are_images else _texts([*by_split.get("train", {}).values()])
            tables = read_files(files, members, needed, texts=texts)
            if choice.are_images:
                tables = {path: with_full_paths(table, config.image_column, path) for path, table in tables.items()}
        by_split[split] = tables
        num = sum(table.num_rows for table in tables.values())
        notes.append(Note(f"{split} split: {num} examples of {describe_files(files, members)}"))
    read_file = partial(read_named_file, files.system, config.name)
    tables = join_splits(by_split, choice, config, (*notes, *files.notes), streamed)
    return dataclasses.replace(tables, read_file=read_file)


def read_columns(files: DataFiles, config: DataConfig) -> tuple[dict[SplitName, pa.Table], tuple[Note, ...]]:
    """Read the columns of a path's files for a user's own task: those of data.columns, by default all.

    Raises:
        ValueError: as read_tables() does, and for data.streamed.
    """
    if config.streamed:
        raise ValueError("a task of your own has its table in memory: leave --data.streamed out")
    splits, notes = dict[SplitName, pa.Table](), list[Note]()

    def needed(schema: pa.Schema, path: str) -> list[str]:
        names = split_names("columns", config.columns, schema.names)
        refuse_absent(names, schema.names, path, option="columns")
        columns = [*names] or [name for name in schema.names if not ROW_NUMBERS.fullmatch(name)]
        refuse_unreadable(schema, columns, path)
        return columns

    for split, members in files.layout.items():
        tables = read_files(files, members, needed, texts=_texts([splits["train"]] if splits else []))
        splits[split] = concatenated([*tables.values()], f"the {split} split of {config.name}")
        notes.append(Note(f"{split} split: {splits[split].num_rows} examples of {describe_files(files, members)}"))
    return splits, (*notes, *files.notes)


def _texts(tables: Sequence[pa.Table]) -> tuple[str, ...]:
    """Return the names of columns of texts: what was text in training stays text in CSV files of other splits."""
    return tuple({field.name for table in tables for field in table.schema if is_string(field.type)})


def _stream(
    files: DataFiles, members: Sequence[Placed], choice: Choice, config: DataConfig, task: str
) -> tuple[dict[str, pa.Table], RowGroups]:
    """Return a streamed split's tables by file, without their features, and the files of the features."""
    for path in map(files.full_path, members):
        if not path.lower().endswith(".parquet"):
            raise not_streamed(f"{path} is none")
    where, schemas = f"the train split of {config.name}", list[pa.Table]()
    if choice.are_images and task in ("regression", "segmentation"):
        raise ValueError(
            f"data.streamed reads images with classes, and --task {task} learns something else: leave --data.streamed "
            "out to read them into memory"
        )

    def needed(schema: pa.Schema, path: str) -> list[str]:
        names = choice.needed(schema, path)
        if not choice.are_images:
            schemas.append(plain(schema.empty_table().select(choice.features), config, path))
        elif is_string(schema.field(config.image_column).type):
            raise not_streamed(f"{path} holds the paths of images")
        return names

    tables = read_files(files, members, needed, left_out=choice.features)
    if choice.are_images:
        return tables, ImageGroups.of_files(config, where, [*tables])
    schema = concatenated(schemas, where).schema
    return tables, TableGroups.of_files(config, where, [*tables], members=tuple(members), schema=schema)


def _refuse_no_tables(files: DataFiles) -> None:
    first = files.layout["train"][0].path
    if files.kind == "images":
        raise ValueError(f"{files.root} is a folder of image files, without columns: give a table")
    if files.kind == "texts" and first:
        text = f"{files.root} holds no tables or images, only {some(files.paths)}"
        raise ValueError(f"{text}: use --task next_token to learn text")
    if files.kind == "texts":
        text = f"{files.root} should end in {', '.join(TABLE_SUFFIXES)}, or be a folder"
        raise ValueError(f"{text}; use --task next_token to learn text")


def read_rows(path: str, inputs: TableInputs) -> pa.Table:
    """Read the columns that the inputs encode from a file or folder of tables.

    A CSV column that was text in training is read as text, even if its values are numbers.

    Raises:
        ValueError: if a table cannot be read.
    """
    texts = tuple(column.name for column in inputs.columns if column.kind == "category")
    return _read_named_columns(path, [column.name for column in inputs.columns], texts)[1]


def read_image_rows(path: str, column: str, *, image_size: int | None) -> EncodedImages | np.ndarray:
    """Read the images in the rows of a Parquet, Arrow or CSV file, for predictions: uint8 [N, H, W, C], or encoded.

    Args:
        image_size: the side in pixels to which tensors are resized; None keeps their size.

    Raises:
        ValueError: if the file cannot be read or has no such column, no rows, nulls, or values that are no images.
    """
    files, table = _read_named_columns(path, [column], (column,))
    if not table.num_rows:
        raise ValueError(f"{path} has no rows: give a table with images")
    table, read_file = with_full_paths(table, column, files.root), partial(read_named_file, files.system, path)
    return images_of(image_column(table, column, path), path, image_size=image_size, read_file=read_file)[0]


def _read_named_columns(path: str, names: Sequence[str], texts: tuple[str, ...]) -> tuple[DataFiles, pa.Table]:
    files = find_files(DataConfig(name=path))
    _refuse_no_tables(files)

    def needed(schema: pa.Schema, path: str) -> list[str]:
        refuse_absent(names, schema.names, path)
        columns = [name for name in schema.names if name in names]
        refuse_unreadable(schema, columns, path)
        return columns

    members = [member for each in files.layout.values() for member in each]
    return files, concatenated([*read_files(files, members, needed, texts=texts).values()], path)
