"""Reads files by path or URI: Parquet, Arrow, CSV and text files, and folders of images."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs, ipc

from raysubset.config import DELIMITERS, TEXT_SUFFIXES, DataConfig, TaskConfig
from raysubset.data.csv_files import HEADER_BYTES, header, read_csv, types_in_all
from raysubset.data.decoding import Source, SourceSplit
from raysubset.data.finding import DataFiles
from raysubset.data.image_columns import with_full_paths
from raysubset.data.images import EncodedImages, decode_masks
from raysubset.data.layout import Placed, some
from raysubset.data.split import SplitName
from raysubset.data.targets import Targets, class_targets, mask_targets
from raysubset.errors import first_line
from raysubset.events import Note
from raysubset.tasks.column_values import is_string

Needed = Callable[[pa.Schema, str], Sequence[str]]  # maps a file's schema and path to the columns to read

_BOM = b"\xef\xbb\xbf"


def read_image_folders(
    files: DataFiles, config: DataConfig, task: TaskConfig
) -> tuple[Source, Targets, tuple[Note, ...]]:
    """Read a folder of images with a folder for each class, or beside folders of masks.

    Raises:
        ValueError: if the task does not learn masks, or a mask does not fit its image.
    """
    if config.columns is not None:
        raise ValueError(f"{config.name} is a folder of image files, without columns: leave --data.columns out")
    if config.streamed:
        raise not_streamed(f"{config.name} is a folder of image files")
    source, notes = Source(), list[Note]()
    labels, masks = dict[SplitName, pa.ChunkedArray](), dict[SplitName, np.ndarray]()
    for split, members in files.layout.items():
        where, paths = f"the {split} split of {config.name}", [member.path for member in members]
        source[split] = SourceSplit(_encoded(files, paths), where, pa.table({"file": paths}))
        if mask_paths := [member.mask for member in members if member.mask]:
            example = f"images with masks, such as {paths[0]} with {mask_paths[0]}"
            if task.name != "segmentation":
                raise ValueError(
                    f"{config.name} holds {example}, which --task {task.name} does not learn: use --task segmentation"
                )
            images = _encoded(files, paths)
            masks[split] = decode_masks(_encoded(files, mask_paths), images, where, config.image_size)
        else:
            names = [str(member.class_name) for member in members]
            distinct, labels[split] = list(dict.fromkeys(names)), pa.chunked_array([names])
            example = f"{len(distinct)} class folders ({some(distinct)}), such as {paths[0]}"
        notes.append(Note(f"{split} split: {len(members)} examples of {example}"))
    if labels:
        return source, class_targets(labels, config, task), (*notes, *files.notes)

    def mask_name(split: SplitName, row: int) -> str:
        return f"the mask of {files.layout[split][row].path}"

    return source, mask_targets(masks, ("mask",), task, config.name, mask_name), (*notes, *files.notes)


def read_named_file(system: fs.FileSystem, where: str, path: str) -> bytes:
    """Return the bytes of an image that a table names."""
    try:
        with system.open_input_stream(path) as file:
            return file.read()
    except FileNotFoundError as error:
        raise ValueError(
            f"there is no image {path}, which {where} names: paths are relative to the table's folder; --data.columns "
            "learns from columns instead"
        ) from error


def named_images(files: DataFiles, config: DataConfig) -> list[str]:
    """Return the full paths of the images that tables of images name; none if the images are in the tables."""
    column, paths = config.image_column, dict[str, None]()
    for members in files.layout.values():
        for member in members:
            schema = read_schema(files, member)
            place = schema.get_field_index(column)  # -1 for none, and for several, which are refused later
            if place < 0 or not is_string(schema.field(place).type):
                break  # all files of a split have columns of one kind
            for path, table in read_files(files, [member], lambda _, __: [column], texts=(column,)).items():
                paths |= dict.fromkeys(with_full_paths(table, column, path).column(column).to_pylist())
    return [path for path in paths if path is not None]


def describe_files(files: DataFiles, members: Sequence[Placed]) -> str:
    """Return '2 files (a.parquet, b.parquet)'."""
    names = some(member.path or files.root.rpartition("/")[2] for member in members)
    return f"{len(members)} file{'s' if len(members) > 1 else ''} ({names})"


def not_streamed(reason: str) -> ValueError:
    """Return the error that refuses to stream a source."""
    return ValueError(
        f"data.streamed reads row groups of Parquet files, but {reason}: write the training split as Parquet, or leave "
        "--data.streamed out to read it into memory"
    )


def read_files(
    files: DataFiles,
    members: Sequence[Placed],
    needed: Needed,
    *,
    texts: tuple[str, ...] = (),
    left_out: Collection[str] = (),
) -> dict[str, pa.Table]:
    """Read the needed columns of files, except those left out: tables by their full paths.

    In a CSV file, `texts` are read as texts even if their values are numbers, and so are columns that another file has
    as texts: types_in_all().

    Raises:
        ValueError: with the file, if one is damaged.
    """

    def read(member: Placed, types: Mapping[str, pa.DataType]) -> pa.Table:
        path = files.full_path(member)

        def stored(schema: pa.Schema) -> list[str]:
            names = dict.fromkeys(needed(member.with_fields(schema), path))
            return [name for name in names if name in schema.names and name not in left_out]

        with opened(files.system, path) as file:
            if path.lower().endswith(".parquet"):
                parquet = pq.ParquetFile(file, page_checksum_verification=True)
                table = parquet.read(stored(parquet.schema_arrow))
            else:
                is_csv = path.lower().endswith(tuple(DELIMITERS))
                table = read_csv(file.read(), path, types=types) if is_csv else _arrow_reader(file).read_all()
                table = table.select(stored(table.schema))
            table.validate(full=True)  # IPC is not checked on reading: damaged offsets would cause a segmentation fault
        return member.with_columns(table, left_out=left_out)

    types = dict.fromkeys(texts, pa.string())
    tables = {files.full_path(member): read(member, types) for member in members}
    types |= types_in_all(tables.values())
    for member in members:
        path = files.full_path(member)
        fields = [field for field in tables[path].schema if not pa.types.is_null(field.type)]
        is_inferred = path.lower().endswith(tuple(DELIMITERS))
        if is_inferred and any(types.get(field.name, field.type) != field.type for field in fields):
            tables[path] = read(member, types)
    return tables


def read_schema(files: DataFiles, member: Placed) -> pa.Schema:
    """Return the schema of a file, with the columns that its folders name. All columns of a CSV file are texts.

    Raises:
        ValueError: with the file, if it is damaged.
    """
    path = files.full_path(member)
    with opened(files.system, path) as file:
        if path.lower().endswith(".parquet"):
            schema = pq.ParquetFile(file).schema_arrow
        elif path.lower().endswith(tuple(DELIMITERS)):
            schema = pa.schema([(name, pa.string()) for name in header(file.read(HEADER_BYTES), path)])
        else:
            schema = _arrow_reader(file).schema
        return member.with_fields(schema)


def _arrow_reader(file: pa.NativeFile) -> ipc.RecordBatchFileReader | ipc.RecordBatchStreamReader:
    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    return ipc.open_file(file) if is_file else ipc.open_stream(file)  # `datasets` writes streams to its cache


@contextmanager
def opened(system: fs.FileSystem, path: str) -> Iterator[pa.NativeFile]:
    """Open a file. Errors while it is read become a ValueError that names it."""
    try:
        with system.open_input_file(path) as file:
            if not file.size():
                raise ValueError(f"{path} is empty (0 bytes): give files that hold something")
            yield file
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise ValueError(f"{path} cannot be read, perhaps it is damaged or cut short: {first_line(error)}") from error


def _encoded(files: DataFiles, paths: Sequence[str]) -> EncodedImages:
    def read(number: int) -> bytes:
        with files.system.open_input_stream(files.full_path(Placed(paths[number]))) as file:
            return file.read()

    return EncodedImages(len(paths), read, describe=paths.__getitem__)


def read_texts(files: DataFiles, config: DataConfig) -> tuple[dict[SplitName, list[str]], tuple[Note, ...]]:
    """Read the text files of a path, one document each, and return them with notes on which they are.

    If the path is a file, it is read whatever its suffix. If it is a folder, its .txt files are read.

    Raises:
        ValueError: if there is nothing to read, or a file is not UTF-8, with the place.
    """
    if files.kind != "texts" and files.paths != [""]:
        raise ValueError(
            f"{config.name} holds {files.kind} ({some(files.paths)}), and text is read from "
            f"{', '.join(TEXT_SUFFIXES)} files: give data.name a folder of those, or leave the others out with "
            "--data.ignored"
        )
    texts: dict[SplitName, list[str]] = {}
    notes: list[Note] = []
    for split, members in files.layout.items():
        texts[split] = []
        for member in members:
            path = files.full_path(member)
            with opened(files.system, path) as file:
                texts[split].append(text_of(file.read(), path))
        num = sum(map(len, texts[split]))
        notes.append(Note(f"{split} split: {num} characters of {describe_files(files, members)}"))
    return texts, (*notes, *files.notes)


def text_of(data: bytes, path: str) -> str:
    """Return the text in a file's bytes, without a byte order mark, its line ends as they are.

    Raises:
        ValueError: if it is not UTF-8, with the place.
    """
    data = data.removeprefix(_BOM)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"byte {error.start} of {path}, in line {line}, is not UTF-8 (0x{data[error.start]:02x}): write it as UTF-8"
        ) from error
