"""Finds paths and URIs in pyarrow's file systems, and lists folders. It follows links, but never in a circle."""

import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pyarrow as pa
from pyarrow import fs


def locate(name: str) -> tuple[fs.FileSystem, str]:
    """Return the file system of a path or URI, and the path in it.

    Raises:
        ValueError: for a URI that pyarrow cannot open.
    """
    if "://" not in name:
        return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(name))
    try:
        system, path = fs.FileSystem.from_uri(name)
    except (pa.ArrowInvalid, ImportError) as error:  # some schemes need a package
        raise ValueError(
            f"data.name = {name} is no URI that pyarrow can open: {error}; give a path, s3://… or gs://…"
        ) from error
    return system, path.rstrip("/")


@dataclass(frozen=True)
class ListedFile:
    """A file below a listed folder."""

    path: str  # relative to the listed folder, with "/" between its parts
    size: int  # bytes
    real_path: str | None = None  # the file that a link leads to; None without a link


@dataclass(frozen=True)
class Listing:
    """All files and folders below a folder. Paths are relative to it."""

    files: Mapping[str, ListedFile]  # by path, in its order
    folders: tuple[str, ...]  # ordered; hidden ones are listed but not entered
    circles: tuple[str, ...] = ()  # links to a folder that contains them, not entered
    dangling: tuple[str, ...] = ()  # links to nothing


def list_folder(system: fs.FileSystem, root: str) -> Listing:
    """List a folder with all below it.

    Raises:
        ValueError: for a folder that cannot be listed, or a name that is not UTF-8.
    """
    try:
        if isinstance(system, fs.LocalFileSystem):
            return _list_local(root)
        infos = system.get_file_info(fs.FileSelector(root, recursive=True))
    except OSError as error:
        raise ValueError(f"{error.filename or root} cannot be listed: {error.strerror or error}") from error
    files, folders = [], []
    for info in infos:
        path = info.path[len(root) :].lstrip("/")
        if info.type == fs.FileType.Directory:
            folders.append(path)
        elif info.type == fs.FileType.File:
            files.append(ListedFile(path, info.size or 0))
    return _ordered(files, folders)


def _list_local(root: str) -> Listing:
    files: list[ListedFile] = []
    folders: list[str] = []
    circles: list[str] = []
    dangling: list[str] = []

    def walk(folder: str, real_folder: str, entered: tuple[str, ...], through_link: bool) -> None:
        """List one folder. `entered` are its real path and those of the folders around it."""
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                path = os.path.join(folder, entry.name)
                _refuse_other_encodings(path)
                is_link = entry.is_symlink()
                try:
                    status = entry.stat()
                except OSError:
                    if not is_link:
                        raise
                    dangling.append(path)
                    continue
                real_path = os.path.realpath(entry.path) if is_link else os.path.join(real_folder, entry.name)
                if stat.S_ISREG(status.st_mode):
                    real = real_path if is_link or through_link else None
                    files.append(ListedFile(path, status.st_size, real))
                elif stat.S_ISDIR(status.st_mode):
                    folders.append(path)
                    if is_link and any(f"{around}/".startswith(f"{real_path.rstrip('/')}/") for around in entered):
                        circles.append(path)
                    elif not entry.name.startswith("."):
                        walk(path, real_path, (*entered, real_path), through_link or is_link)

    real_root = os.path.realpath(root)
    walk("", real_root, (real_root,), through_link=False)
    return _ordered(files, folders, circles, dangling)


def _ordered(files: Iterable[ListedFile], *paths: Iterable[str]) -> Listing:
    by_path = {file.path: file for file in sorted(files, key=lambda file: file.path)}
    return Listing(by_path, *(tuple(sorted(each)) for each in paths))


def _refuse_other_encodings(path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the file name {os.fsencode(path)!r} is not UTF-8: rename it") from None
