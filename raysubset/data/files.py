"""Data sets by path or URI: Parquet and Arrow files, or a folder with one folder of images per class."""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs, ipc

from raysubset.config import DataConfig
from raysubset.data.finding import DataFiles, find_files
from raysubset.data.images import EncodedImages
from raysubset.data.layout import Placed, some
from raysubset.data.row_groups import RowGroups
from raysubset.data.sources import Source, SourceSplit
from raysubset.data.tables import from_tables, join_tables, needed_columns, with_scalars
from raysubset.errors import first_line
from raysubset.events import Note

_NULL = "__HIVE_DEFAULT_PARTITION__"  # Hive's, Spark's and Arrow's name of the folder of nulls


def read_path(config: DataConfig) -> Source:
    """Read a file, or a folder with all below it, from any filesystem pyarrow knows.

    Raises:
        ValueError: if nothing readable is there, or what is there is damaged or ambiguous; with the file.
    """
    files = find_files(config)
    if files.kind == "images" and config.streamed:
        raise not_streamed(f"{config.name} is a folder of image files")
    source: Source = {}
    for split, members in files.layout.items():
        where = f"the {split} split of {config.name}" if members[0].path else config.name
        if files.kind == "images":
            read, origin = _read_images(files, members, where), _describe_classes(members)
        elif split == "train" and config.streamed:
            read, origin = _read_streamed(files, members, config, where), _describe_tables(files, members)
        else:
            read, origin = _read_tables(files, members, config, where), _describe_tables(files, members)
        note = Note(f"{split} split: {len(read.labels)} examples of {origin}")
        source[split] = dataclasses.replace(read, notes=(note, *read.notes))
    source["train"] = dataclasses.replace(source["train"], notes=(*source["train"].notes, *files.notes))
    return source


def _describe_tables(files: DataFiles, members: Sequence[Placed]) -> str:
    names = some(member.path or files.root.rpartition("/")[2] for member in members)
    return f"{len(members)} file{'s' if len(members) > 1 else ''} ({names})"


def _describe_classes(members: Sequence[Placed]) -> str:
    names = list(dict.fromkeys(str(member.class_name) for member in members))
    return f"{len(names)} class folders ({some(names)}), such as {members[0].path}"


def not_streamed(what: str) -> ValueError:
    """The refusal of a source that cannot be streamed."""
    return ValueError(
        f"data.streamed reads row groups of Parquet files, but {what}: write the training split as Parquet, or leave "
        "--data.streamed out to read it into memory"
    )


def _read_streamed(files: DataFiles, members: Sequence[Placed], config: DataConfig, where: str) -> SourceSplit:
    """The split's labels and scalars, and where its images lie."""
    paths = [files.full_path(member) for member in members]
    if others := [path for path in paths if not path.lower().endswith(".parquet")]:
        raise not_streamed(f"{others[0]} is none")
    kinds = _column_kinds(files)
    tables, num_rows = [], []
    for path, member in zip(paths, members, strict=True):
        with _opened(files.system, path) as file:
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            names = _needed(parquet.schema_arrow, member, kinds, config, path)
            table = parquet.read([name for name in names if name != config.image_column])
            tables.append(_with_folder_columns(table, member, kinds))
            metadata = parquet.metadata
            num_rows.append([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)])
    joined = join_tables(dict(zip(paths, tables, strict=True)), config, where)
    return with_scalars(RowGroups.of_files(config, where, paths, num_rows), joined, config, where)


def _read_tables(files: DataFiles, members: Sequence[Placed], config: DataConfig, where: str) -> SourceSplit:
    kinds = _column_kinds(files)
    tables = {files.full_path(member): _read_table(files, member, kinds, config) for member in members}
    return from_tables(tables, config, where)


def _column_kinds(files: DataFiles) -> dict[str, pa.DataType]:
    """Types of the columns that hive folders name, key=value: integers if all their values are, else strings."""
    values: defaultdict[str, set[str]] = defaultdict(set)
    for members in files.layout.values():
        for member in members:
            for key, value in member.columns.items():
                values[key].add(value)
    is_integer = {
        key: all(re.fullmatch(r"-?(0|[1-9]\d{0,17})", v) for v in found - {_NULL}) for key, found in values.items()
    }
    return {key: pa.int64() if integer else pa.string() for key, integer in is_integer.items()}


def _needed(
    schema: pa.Schema, member: Placed, kinds: Mapping[str, pa.DataType], config: DataConfig, path: str
) -> list[str]:
    """The columns worth reading of a file, given those that its folders name, which it may lack."""
    named = [pa.field(key, kinds[key]) for key in member.columns if key not in schema.names]
    needed = needed_columns(pa.schema([*schema, *named]), config, path)
    return [name for name in needed if name in schema.names]


def _with_folder_columns(table: pa.Table, member: Placed, kinds: Mapping[str, pa.DataType]) -> pa.Table:
    for key, value in member.columns.items():
        if key not in table.column_names:
            scalar = pa.scalar(None if value == _NULL else value, pa.string()).cast(kinds[key])
            table = table.append_column(key, pa.repeat(scalar, table.num_rows))
    return table


def _read_table(files: DataFiles, member: Placed, kinds: Mapping[str, pa.DataType], config: DataConfig) -> pa.Table:
    """Read the columns that are of use."""
    path = files.full_path(member)
    with _opened(files.system, path) as file:
        if path.lower().endswith(".parquet"):
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            table = parquet.read(_needed(parquet.schema_arrow, member, kinds, config, path))
        else:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            reader = ipc.open_file(file) if is_file else ipc.open_stream(file)  # `datasets` caches streams
            table = reader.read_all().select(_needed(reader.schema, member, kinds, config, path))
        table.validate(full=True)  # IPC is taken as it is: damaged offsets would end in a segmentation fault
        return _with_folder_columns(table, member, kinds)


@contextmanager
def _opened(system: fs.FileSystem, path: str) -> Iterator[pa.NativeFile]:
    """The file; what goes wrong while it is read is told as a ValueError that names it."""
    try:
        with system.open_input_file(path) as file:
            if not file.size():
                raise ValueError(f"{path} is empty (0 bytes)")
            yield file
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise ValueError(f"{path} cannot be read, perhaps it is damaged or cut short: {first_line(error)}") from error


def _read_images(files: DataFiles, members: Sequence[Placed], where: str) -> SourceSplit:
    def read(number: int) -> bytes:
        with files.system.open_input_stream(files.full_path(members[number])) as file:
            return file.read()

    paths = [member.path for member in members]
    images = EncodedImages(len(paths), read, describe=lambda number: paths[number])
    labels = pa.chunked_array([pa.array([member.class_name for member in members])])
    return SourceSplit(images, labels, columns={"file": pa.chunked_array([pa.array(paths)])}, where=where)
