"""Data sets by path or URI: Parquet and Arrow files, or a folder with one folder of images per class."""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs, ipc

from raysubset.config import DataConfig
from raysubset.data.images import decode_images
from raysubset.data.locations import locate
from raysubset.data.row_groups import RowGroups
from raysubset.data.sources import Source, SourceSplit
from raysubset.data.split import SplitName
from raysubset.data.tables import from_table, needed_columns, with_scalars
from raysubset.errors import first_line

TABLE_SUFFIXES = (".parquet", ".arrow", ".feather", ".ipc")
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")

# As the `datasets` library takes them out of file and folder names.
_SPLIT_WORDS: dict[str, SplitName] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}


def read_path(config: DataConfig) -> Source:
    """Read a file, or a folder with all below it, from any filesystem pyarrow knows.

    Raises:
        ValueError: if nothing readable is there, or what is there is damaged; with the file.
    """
    system, root = locate(config.name)
    info = system.get_file_info(root)
    if info.type == fs.FileType.NotFound:
        raise ValueError(f"data.name = {config.name}: there is no file or folder {root}")
    if info.type == fs.FileType.File:
        return {"train": _read_training_tables(system, [root], config, config.name)}
    found = system.get_file_info(fs.FileSelector(root, recursive=True))
    files = sorted(_below(root, each.path) for each in found if each.type == fs.FileType.File)
    files = [file for file in files if not any(part.startswith((".", "_")) for part in PurePosixPath(file).parts)]
    tables = [file for file in files if file.lower().endswith(TABLE_SUFFIXES)]
    if tables:
        return _read_table_folder(system, root, tables, config)
    images = [file for file in files if file.lower().endswith(_IMAGE_SUFFIXES)]
    if images and config.streamed:
        raise not_streamed(f"{config.name} is a folder of image files")
    if images:
        return _read_image_folder(system, root, images, config)
    raise ValueError(
        f"data.name = {config.name}: the folder holds neither {', '.join(TABLE_SUFFIXES)} files nor folders of images"
    )


def split_of(file: str) -> SplitName | None:
    """The split that a file's own name, or else its innermost folder's, speaks of."""
    path = PurePosixPath(file)
    for part in (path.stem, *reversed(path.parent.parts)):
        for word in re.split(r"[-._ 0-9]+", part.lower()):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return None


def _below(root: str, path: str) -> str:
    return path[len(root) :].lstrip("/")


def _read_table_folder(system: fs.FileSystem, root: str, files: list[str], config: DataConfig) -> Source:
    """Read the tables of each split; a file that names none is training data, as a note says where others do."""
    by_split: defaultdict[SplitName, list[str]] = defaultdict(list)
    for file in files:
        by_split[split_of(file) or "train"].append(file)
    if "train" not in by_split:
        raise ValueError(f"data.name = {config.name}: no training files, only {', '.join(files[:5])}")
    source: Source = {}
    for split, members in by_split.items():
        paths = [f"{root}/{file}" for file in members]
        read = _read_training_tables if split == "train" else _read_tables
        source[split] = read(system, paths, config, f"the {split} split of {config.name}")
    unnamed = [file for file in files if split_of(file) is None]
    if unnamed and len(unnamed) < len(files):
        note = f"read as training data, since they name no split: {', '.join(unnamed)}"
        source["train"] = dataclasses.replace(source["train"], notes=(*source["train"].notes, note))
    return source


def not_streamed(what: str) -> ValueError:
    """The refusal of a source that cannot be streamed."""
    return ValueError(
        f"data.streamed reads row groups of Parquet files, but {what}: write the training split as Parquet, or leave "
        "--data.streamed out to read it into memory"
    )


def _read_training_tables(system: fs.FileSystem, paths: list[str], config: DataConfig, where: str) -> SourceSplit:
    """The split in memory; or where it is streamed, its labels and scalars, and where its images lie."""
    if not config.streamed:
        return _read_tables(system, paths, config, where)
    if others := [path for path in paths if not path.lower().endswith(".parquet")]:
        raise not_streamed(f"{others[0]} is none")
    tables, num_rows = [], []
    for path in paths:
        with _opened(system, path) as file:
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            names = needed_columns(parquet.schema_arrow, config, path)
            tables.append(parquet.read([name for name in names if name != config.image_column]))
            metadata = parquet.metadata
            num_rows.append([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)])
    table = _concatenated(tables, where)
    if not table.num_rows:
        raise ValueError(f"{where} has no rows")
    return with_scalars(RowGroups.of_files(config, where, paths, num_rows), table, config, where)


def _read_tables(system: fs.FileSystem, paths: list[str], config: DataConfig, where: str) -> SourceSplit:
    return from_table(_concatenated([_read_table(system, path, config) for path in paths], where), config, where)


def _concatenated(tables: list[pa.Table], where: str) -> pa.Table:
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"the {len(tables)} files of {where} do not go together: {error}") from error


def _read_table(system: fs.FileSystem, path: str, config: DataConfig) -> pa.Table:
    """Read the columns that are of use."""
    if not path.lower().endswith(TABLE_SUFFIXES):
        raise ValueError(f"{path} should end in {', '.join(TABLE_SUFFIXES)}, or be a folder")
    with _opened(system, path) as file:
        if path.lower().endswith(".parquet"):
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            table = parquet.read(needed_columns(parquet.schema_arrow, config, path))
        else:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            reader = ipc.open_file(file) if is_file else ipc.open_stream(file)  # `datasets` caches streams
            table = reader.read_all().select(needed_columns(reader.schema, config, path))
        table.validate(full=True)  # IPC is taken as it is: damaged offsets would end in a segmentation fault
        return table


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


def _read_image_folder(system: fs.FileSystem, root: str, files: list[str], config: DataConfig) -> Source:
    """Read root/class/… or, where all top folders are named as splits are, root/train/class/… and root/test/class/…"""
    top = {PurePosixPath(file).parts[0] for file in files}
    depth = 1 if {folder.lower() for folder in top} <= _SPLIT_WORDS.keys() else 0
    by_split: defaultdict[SplitName, list[str]] = defaultdict(list)
    for file in files:
        parts = PurePosixPath(file).parts
        if len(parts) < depth + 2:
            raise ValueError(f"data.name = {config.name}: {file} lies in no class's folder")
        by_split[_SPLIT_WORDS[parts[0].lower()] if depth else "train"].append(file)
    if "train" not in by_split:
        raise ValueError(f"data.name = {config.name}: no train folder, only {', '.join(sorted(top))}")
    return {split: _read_images(system, root, members, depth, config) for split, members in by_split.items()}


def _read_images(system: fs.FileSystem, root: str, files: list[str], depth: int, config: DataConfig) -> SourceSplit:
    def read(number: int) -> bytes:
        with system.open_input_stream(f"{root}/{files[number]}") as file:
            return file.read()

    images = decode_images(len(files), read, describe=lambda number: files[number], image_size=config.image_size)
    labels = pa.chunked_array([pa.array([PurePosixPath(file).parts[depth] for file in files])])
    return SourceSplit(images, labels, columns={"file": pa.chunked_array([pa.array(files)])})
