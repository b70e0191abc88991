"""Tables whose columns are learned from: which columns are features, which the target, and the target's classes."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from raysubset.config import DataConfig, nearest
from raysubset.data.csv_files import DELIMITERS
from raysubset.data.files import (
    column_kinds,
    describe_files,
    no_table,
    parquet_paths,
    read_held,
    read_schema,
    read_table,
)
from raysubset.data.finding import DataFiles, find_files
from raysubset.data.labels import UNLABELLED, as_labels, is_string, number_classes
from raysubset.data.layout import Placed, some
from raysubset.data.sources import Source, SourceSplit
from raysubset.data.split import SplitName
from raysubset.data.table_groups import TableGroups
from raysubset.data.tables import (
    MOST_COLUMNS,
    JoinedTables,
    concatenated,
    join_tables,
    numbers_of,
    plain,
    refuse_unreadable,
    split_names,
    usual_note,
    usual_target,
)
from raysubset.events import Note
from raysubset.tasks.columns import TableInputs, is_time

_TARGETS = ("target", "label")  # what a target is called where data.target names none

# Row numbers that pandas writes beside a table: an index without a name, in CSV and in Parquet.
_ROW_NUMBERS = re.compile(r"|Unnamed: \d+|__index_level_\d+__")
_MOST_INTEGERS = 100  # of a target that are taken as the names of classes


@dataclass(frozen=True)
class Tables:
    """A data set of tables: what is learned from which columns."""

    splits: Mapping[SplitName, pa.Table]  # with the features, the targets, and further scalars
    features: tuple[str, ...]
    targets: tuple[str, ...]  # several of regression only
    notes: tuple[Note, ...]
    streamed: TableGroups | None = None  # where the training features lie, if they are not held


def is_of_columns(config: DataConfig) -> bool:
    """Whether a path is learned from a table's columns: there is no image column, or data.columns says so.

    Raises:
        ValueError: for what find_files() refuses, or a first file that is damaged.
    """
    files = find_files(config)
    if files.kind != "tables" or config.columns is not None:
        return files.kind == "tables"
    first = files.layout["train"][0]
    return files.full_path(first).lower().endswith(tuple(DELIMITERS)) or not holds_images(
        read_schema(files, first), config
    )


def holds_images(schema: pa.Schema, config: DataConfig) -> bool:
    """Whether a table is read as images: it has the image column, or one that only an image could be in.

    So a slip in data.image_column is told as one, and does not turn a set of images into one of its other columns.
    """
    if config.columns is not None:
        return False
    is_named = config.image_column in schema.names or config.image_column != DataConfig.image_column
    return is_named or not all(_is_plain(field.type) for field in schema)


def read_tables(config: DataConfig) -> Tables:
    """Read the files that a path stands for as tables of columns.

    Raises:
        ValueError: if nothing readable is there, or what is there is damaged or ambiguous; with the file.
    """
    files = find_files(config)
    if files.kind != "tables":
        raise no_table(files) if files.kind == "texts" else _no_columns(config)
    kinds, notes, streamed = column_kinds(files), [], None
    read: dict[SplitName, dict[str, pa.Table]] = {}

    def needed(schema: pa.Schema, path: str) -> list[str]:
        return _needed(schema, config, path)

    for split, members in files.layout.items():
        if split == "train" and config.streamed:
            read[split], streamed = _stream(files, members, kinds, config)
        else:
            read[split] = {files.full_path(member): read_table(files, member, kinds, needed) for member in members}
        num = sum(table.num_rows for table in read[split].values())
        notes.append(Note(f"{split} split: {num} examples of {describe_files(files, members)}"))
    tables = choose_columns(read, config, streamed)
    return dataclasses.replace(tables, notes=(*notes, *files.notes, *tables.notes))


def _stream(
    files: DataFiles, members: Sequence[Placed], kinds: Mapping[str, pa.DataType], config: DataConfig
) -> tuple[dict[str, pa.Table], TableGroups]:
    """The tables of a streamed split without their features, by file, and where the features lie."""
    features: tuple[str, ...] = ()
    schemas: list[pa.Table] = []

    def needed(schema: pa.Schema, path: str) -> list[str]:
        names = _needed(schema, config, path)
        _refuse_absent(features, names, path)
        schemas.append(plain(schema.empty_table().select(features), config, path))
        return names

    path, *_ = parquet_paths(files, members)
    schema = read_schema(files, members[0])
    known, where = _needed(schema, config, path), f"the train split of {config.name}"
    features, _ = _features(known, _targets(known, config, path)[0], config, path)
    tables, num_rows = read_held(files, members, kinds, needed, streamed=features)
    groups = TableGroups.of_files(
        config,
        where,
        [*tables],
        num_rows,
        members=tuple(members),
        kinds=kinds,
        schema=concatenated(schemas, where).schema,
    )
    return tables, groups


def _no_columns(config: DataConfig) -> ValueError:
    return ValueError(f"{config.name} is a folder of image files, without columns: leave --data.columns out")


def read_rows(path: str, inputs: TableInputs, *, targets: Sequence[str] = ()) -> pa.Table:
    """The columns that inputs encode, of a file or a folder of tables, with the targets if they are there.

    In CSV files a column that was text in training is text, whatever it looks like.

    Raises:
        ValueError: if it cannot be read.
    """
    files = find_files(DataConfig(name=path))
    if files.kind != "tables":
        raise no_table(files) if files.kind == "texts" else _no_columns(DataConfig(name=path))
    names = [column.name for column in inputs.columns]
    texts = tuple(column.name for column in inputs.columns if column.kind == "category")
    kinds, tables = column_kinds(files), []

    def needed(schema: pa.Schema, path: str) -> list[str]:
        _refuse_absent(names, schema.names, path)
        wanted = [name for name in schema.names if name in {*names, *targets}]
        refuse_unreadable(schema, wanted, path)
        return wanted

    for members in files.layout.values():
        tables += [read_table(files, member, kinds, needed, texts=texts) for member in members]
    return pa.concat_tables(tables, promote_options="permissive")


def choose_columns(
    read: Mapping[SplitName, Mapping[str, pa.Table]], config: DataConfig, streamed: TableGroups | None = None
) -> Tables:
    """Join the tables of each split, and decide which columns are targets and features.

    Args:
        read: tables by the name of their file, by split; that of "train" decides.
        streamed: the features of the training tables, which lack them.

    Raises:
        ValueError: for a column that is not there, with the nearest name, and tables that do not go together.
    """
    path, first = next(iter(read["train"].items()))
    left = streamed.schema.names if streamed else []
    targets, notes = _targets([*first.column_names, *left], config, path)
    features, more = _features([*first.column_names, *left], targets, config, path)
    notes += more
    splits: dict[SplitName, pa.Table] = {}
    for split, files in read.items():
        where = f"the {split} split of {config.name}"
        for path, table in files.items():
            known = [*table.column_names, *(left if split == "train" else ())]
            _refuse_absent((*targets, *features), known, path, is_train=split == "train")
        joined = join_tables(files, dataclasses.replace(config, target=targets[0]), where)
        notes += joined.notes
        splits[split] = _with_class_names(joined, targets[0], where)
    return Tables(splits, features, targets, tuple(notes), streamed)


def class_numbers(tables: Tables) -> tuple[dict[SplitName, np.ndarray], tuple[str, ...], tuple[Note, ...]]:
    """The target as classes: number_classes()' labels, int64 [N] from 0 to num_classes - 1, class names and notes.

    Truth values are the classes false and true, in this order. Integers that do not run from 0 without gaps are names,
    in their order.

    Raises:
        ValueError: for several targets, numbers that are no classes, and what number_classes() refuses.
    """
    target, *others = tables.targets
    if others:
        raise ValueError(
            f"classification learns one column, not {some(tables.targets)}: set --data.target to one, or use --task "
            "regression"
        )
    columns: dict[SplitName, pa.ChunkedArray] = {split: table.column(target) for split, table in tables.splits.items()}
    names = _integer_names(columns["train"], target)
    source: Source = {}
    for split, values in columns.items():
        where = f"the {split} split"
        type_ = values.type
        if pa.types.is_boolean(type_):
            values = _dictionary(values.cast(pa.int64()), ("false", "true"))
        elif names is not None and pa.types.is_integer(type_):
            values = values.cast(pa.int64()).cast(pa.string())
        elif pa.types.is_floating(type_) or pa.types.is_decimal(type_):
            raise ValueError(
                f"the target {target} holds {type_}, such as {_example(values)}, and classes are integers or names: "
                "use --task regression, or set --data.target to another column"
            )
        labels, found = as_labels(values, where)
        nothing = np.empty((len(labels), 0, 0, 0), np.uint8)
        source[split] = SourceSplit(nothing, labels, names if is_string(labels.type) and names else found)
    return number_classes(source)


def _needed(schema: pa.Schema, config: DataConfig, path: str) -> list[str]:
    """The columns worth reading: those that are named, and all numbers, texts and times."""
    targets = split_names("target", config.target, schema.names) or _TARGETS
    named = {*targets, *split_names("columns", config.columns, schema.names)}
    needed = [field.name for field in schema if field.name in named or _is_plain(field.type)]
    refuse_unreadable(schema, needed, path)
    return needed


def _is_plain(type_: pa.DataType) -> bool:
    kinds = (pa.types.is_null, pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
    if pa.types.is_dictionary(type_):
        return _is_plain(type_.value_type)
    return is_string(type_) or is_time(type_) or any(kind(type_) for kind in kinds)


def _targets(known: Sequence[str], config: DataConfig, path: str) -> tuple[tuple[str, ...], list[Note]]:
    if named := split_names("target", config.target, known):
        _refuse_absent(named, known, path, option="--data.target")
        return named, []
    name = usual_target(known, _TARGETS, path)
    return (name,), [usual_note(name)]


def _features(
    known: Sequence[str], targets: Sequence[str], config: DataConfig, path: str
) -> tuple[tuple[str, ...], list[Note]]:
    if named := split_names("columns", config.columns, known):
        _refuse_absent(named, known, path, option="--data.columns")
        if both := [name for name in named if name in targets]:
            raise ValueError(f"{both[0]} is in --data.columns and --data.target: it cannot be learned from itself")
        return named, []
    others = [name for name in known if name not in targets]
    numbers = [name for name in others if _ROW_NUMBERS.fullmatch(name)]
    features = tuple(name for name in others if name not in numbers)
    if not features:
        raise ValueError(f"{path} has no columns beside {', '.join((*targets, *numbers))}: give it some to learn from")
    if not numbers:
        return features, []
    text = (
        f"row numbers that pandas wrote are left out: {some(repr(name) for name in numbers)}; --data.columns names them"
    )
    return features, [Note(text)]


def _refuse_absent(
    names: Sequence[str], known: Sequence[str], path: str, *, option: str | None = None, is_train: bool = True
) -> None:
    if absent := [name for name in names if name not in known]:
        hint = nearest(absent[0], known)
        if option:
            raise ValueError(
                f"{path} has no column {absent[0]}: set {option} to some of {some(known, most=MOST_COLUMNS)}{hint}"
            )
        out = "" if is_train else "; or leave the split out with --data.ignored"
        raise ValueError(f"{path} has no column {absent[0]}, only {some(known, most=MOST_COLUMNS)}{hint}{out}")


def _with_class_names(joined: JoinedTables, target: str, where: str) -> pa.Table:
    """The table with integer targets as a dictionary of the names that its files' metadata give them."""
    values = joined.table.column(target)
    if joined.class_names is None or not pa.types.is_integer(values.type):
        return joined.table
    numbers = numbers_of(joined.class_names, values, where)
    named = _dictionary(pa.chunked_array([pa.array(numbers, mask=numbers == UNLABELLED)]), joined.class_names)
    return joined.table.set_column(joined.table.column_names.index(target), target, named)


def _dictionary(numbers: pa.ChunkedArray, names: Sequence[str]) -> pa.ChunkedArray:
    """Numbers, int64, as texts of a dictionary."""
    indices = numbers.combine_chunks() if numbers.num_chunks != 1 else numbers.chunk(0)
    return pa.chunked_array([pa.DictionaryArray.from_arrays(indices, pa.array(names, pa.string()))])


def _integer_names(values: pa.ChunkedArray, target: str) -> tuple[str, ...] | None:
    """Names of the classes where training targets are integers, in their order, unless they run from 0 without gaps."""
    if not pa.types.is_integer(values.type):
        return None
    present = sorted(values.drop_null().unique().to_pylist())
    if present in ([], [UNLABELLED]) or present == list(range(len(present))):
        return None
    if len(present) > min(_MOST_INTEGERS, len(values) // 2):
        raise ValueError(
            f"the target {target} has {len(present)} different integers in {len(values)} training rows, from "
            f"{present[0]} to {present[-1]}: use --task regression, or number classes from 0 without gaps"
        )
    return tuple(map(str, present))


def _example(values: pa.ChunkedArray) -> str:
    there = values.drop_null()
    return repr(there[0].as_py()) if len(there) else "null"
