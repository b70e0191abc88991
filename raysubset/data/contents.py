"""Fingerprints of data sets: digests of the files that a set is read from, or else of its arrays."""

import hashlib
import json
import os
import posixpath
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import pyarrow as pa
from pyarrow import fs

from raysubset.config import DATA_NAMES, EMBEDDED_NAMES, DataConfig, kind_of
from raysubset.data.columns import is_of_columns
from raysubset.data.files import named_images
from raysubset.data.finding import DataFiles, find_files
from raysubset.data.full_set import FullSet
from raysubset.data.listing import locate
from raysubset.data.named import torchvision_files
from raysubset.data.split import SPLITS
from raysubset.data.streamed import StreamedSplit
from raysubset.errors import ChangedFile, listed
from raysubset.events import Note
from raysubset.fingerprints import MOST_NAMED, Entry, changes, entries, fingerprint, hasher
from raysubset.tasks import task_to_dict
from raysubset.user_code.given import is_given

_SETTLED_NS = 2 * 10**9  # a file that changed more recently than this may change again and keep its times
_NUM_READERS = 16

# The kinds of data, and the settings that apply to each.
_KINDS = {
    "images": ("image_size", "augmentation"),  # without names: in a named set, folders of classes, or a pair of arrays
    "images by name": ("image_size", "augmentation", "image_column", "target"),
    "columns": ("target", "columns", "missing"),
    "texts": ("window", "vocabulary"),
    "arrays by name": ("target",),
    "arrays": (),  # unchanged, for a user's own task
    "columns as arrays": ("columns",),  # likewise
}
Kind = Literal["images", "images by name", "columns", "texts", "arrays by name", "arrays", "columns as arrays"]
_DOWNLOADED = ("root", "download")


def file_fingerprint(
    config: DataConfig, known: pa.Table | None = None, files: DataFiles | None = None
) -> pa.Table | None:
    """Return digests of a data set's files by their paths below its folder; None if it is not read from files.

    Args:
        known: an earlier fingerprint of the set. A file whose size and times are unchanged is not read again. A file
            on object storage that has an ETag is not read at all.
        files: the files of a path, if they were found before.

    Raises:
        ValueError: for what kind_of() and find_files() refuse.
        OSError: if the storage fails.
    """
    if (kind := kind_of(config.name)) == "function" or config.name in EMBEDDED_NAMES:
        return None
    if kind == "named":
        root = os.path.abspath(os.path.expanduser(config.root))
        paths = [os.path.relpath(path, root) for path in torchvision_files(config.name, root)]
        return _digests(fs.LocalFileSystem(), root, paths, known)
    files = files or find_files(config)
    root, paths = files.root, files.paths
    if paths == [""]:
        root, _, file = root.rpartition("/")
        paths = [file]
    if files.kind == "tables" and not is_of_columns(files, config):
        paths += [posixpath.relpath(path, root) for path in named_images(files, config)]
    return _digests(files.system, root, paths, known)


def repeated_files(files: DataFiles, digests: pa.Table) -> tuple[Note, ...]:
    """Warn about files of equal bytes, such as copies, given file_fingerprint(). Masks may be equal."""
    known, first, repeated = entries(digests), dict[str, str](), list[tuple[str, str]]()
    for file in (member.path for members in files.layout.values() for member in members):
        if file in known and (other := first.setdefault(known[file].digest, file)) != file:
            repeated.append((other, file))
    if not repeated:
        return ()
    noun, text = "file has" if len(repeated) == 1 else "files have", " and ".join(repeated[0])
    text = f"{len(repeated)} {noun} the bytes of another ({text}): what is trained on may be tested on; remove copies"
    return (Note(text, is_warning=True),)


def unused_settings(config: DataConfig, kind: Kind) -> tuple[Note, ...]:
    """Warn about settings that do not apply to this kind of data. A user's own augmentation applies to every kind."""
    exempt = ("none", config.own_augmentation)
    names = dict.fromkeys((*_DOWNLOADED, *(name for names in _KINDS.values() for name in names)))
    applicable = (*_KINDS[kind], *(_DOWNLOADED if config.name in {*DATA_NAMES} - {*EMBEDDED_NAMES} else ()))
    changed = [name for name in names if getattr(config, name) not in (getattr(DataConfig, name), *exempt)]
    if unused := [f"data.{name}" for name in changed if name not in applicable]:
        read_as = kind.removesuffix(" by name")
        text = f"{config.name} is read as {read_as}, to which {', '.join(unused)} does not apply"
        return (Note(text, is_warning=True),)
    return ()


def array_fingerprint(full_set: FullSet) -> pa.Table:
    """Return digests of a full set's contents: the tensors and further columns of each split."""
    names = full_set.task.class_names
    contents = [Entry("classes", len(names), hasher("\0".join(names).encode()).hexdigest())]
    if is_given(full_set.name):  # an entry more for a function's sets would refuse to resume their earlier runs
        fitted = json.dumps(task_to_dict(full_set.task)).encode()
        contents.append(Entry("what training rows decide", len(fitted), hasher(fitted).hexdigest()))
    for name in SPLITS:
        split = getattr(full_set, name)
        tensors = split.arrays()
        for column in split.table.column_names:
            if column in tensors:
                values = tensors[column]
            elif pa.types.is_primitive(split.table.schema.field(column).type):
                values = split.table.column(column).to_numpy()
            else:
                values = np.frombuffer("\0".join(map(str, split.table.column(column).to_pylist())).encode(), np.uint8)
            digest = hasher()
            digest.update(f"{values.dtype} {values.shape}".encode())
            digest.update(np.ascontiguousarray(values).data)
            contents.append(Entry(f"{name} {column}", values.nbytes, digest.hexdigest()))
    return fingerprint(contents)


def refuse_changed_files(full_set: FullSet) -> None:
    """Refuse a streamed split whose files changed since their rows were counted.

    Raises:
        ChangedFile: with the difference.
    """
    if isinstance(full_set.train, StreamedSplit):
        digested_again(full_set.train.groups.config.name, full_set.fingerprint)


def digested_again(name: str, old: pa.Table) -> pa.Table:
    """Digest the files of a set's fingerprint again, as far as they may have changed.

    Raises:
        ChangedFile: with the difference, if they did.
    """
    root = (old.schema.metadata or {})[b"root"].decode()
    new = _digests(locate(name)[0], root, list(entries(old)), old)
    if difference := changes(old, new):
        raise ChangedFile(
            f"{name} changed while it was in use: {listed(difference, most=MOST_NAMED)}: do not change data while "
            "training on them, and start over with --fresh, or under another --name"
        )
    return new


def _digests(system: fs.FileSystem, root: str, files: list[str], old: pa.Table | None) -> pa.Table:
    infos = system.get_file_info([f"{root}/{file}" for file in files])
    files_present = [(file, info) for file, info in zip(files, infos, strict=True) if info.type == fs.FileType.File]
    earlier = {} if old is None else entries(old)
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        contents = fingerprint(
            pool.map(lambda pair: _entry(system, pair[0], pair[1], earlier.get(pair[0])), files_present)
        )
    return contents.replace_schema_metadata({"root": root})


def _entry(system: fs.FileSystem, file: str, info: fs.FileInfo, old: Entry | None) -> Entry:
    stamp = _stamp(system, info)
    if old and stamp and (old.size, old.stamp) == (info.size, stamp):
        return old
    with system.open_input_file(info.path) as opened:
        tags = {key.lower(): value for key, value in (opened.metadata() or {}).items()}
        if tag := tags.get("etag"):
            return Entry(file, info.size, f"ETag {tag.decode()}", stamp)
        return Entry(file, info.size, hashlib.file_digest(opened, hasher).hexdigest(), stamp)


def _stamp(system: fs.FileSystem, info: fs.FileInfo) -> str:
    """Return a text that changes whenever the file does, even if its times are set back.

    Return "" for a file so new that another change might leave its times unchanged.
    """
    times = [info.mtime_ns or 0]
    if isinstance(system, fs.LocalFileSystem):
        status = os.stat(info.path)
        times = [status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    return "" if max(times[:2]) > time.time_ns() - _SETTLED_NS else " ".join(map(str, times))
