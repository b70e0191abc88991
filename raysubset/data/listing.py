"""Finds paths and URIs in pyarrow's file systems, and lists folders. It follows links, but never in a circle."""

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

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
class Listing:
    """All files and folders below a folder. Paths are relative to it, in their order, with "/" between the parts."""

    files: Mapping[str, int]  # the bytes of each file by path
    folders: tuple[str, ...]  # hidden ones are listed but not entered
    links: tuple[str, ...] = ()  # files and folders that are links, which are followed
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
    by_path = {info.path[len(root) :].lstrip("/"): info for info in sorted(infos, key=lambda info: info.path)}
    files = {path: info.size or 0 for path, info in by_path.items() if info.type == fs.FileType.File}
    return Listing(files, tuple(path for path, info in by_path.items() if info.type == fs.FileType.Directory))


def _list_local(root: str) -> Listing:
    files: dict[str, int] = {}
    folders, links, circles, dangling = list[str](), list[str](), list[str](), list[str]()

    def walk(folder: str) -> None:
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                path = os.path.join(folder, entry.name)
                _refuse_other_encodings(path)
                try:
                    status = entry.stat()
                except OSError:
                    if not entry.is_symlink():
                        raise
                    dangling.append(path)
                    continue
                if entry.is_symlink():
                    links.append(path)
                if stat.S_ISREG(status.st_mode):
                    files[path] = status.st_size
                elif stat.S_ISDIR(status.st_mode):
                    folders.append(path)
                    if entry.is_symlink() and _leads_back(entry.path):
                        circles.append(path)
                    elif not entry.name.startswith("."):
                        walk(path)

    walk("")
    return Listing(dict(sorted(files.items())), *(tuple(sorted(each)) for each in (folders, links, circles, dangling)))


def _leads_back(link: str) -> bool:
    """Return True if one of the folders that the link's path goes through, perhaps by links, lies in its target."""
    target = os.path.realpath(link)
    return any(Path(os.path.realpath(folder)).is_relative_to(target) for folder in Path(link).parents)


def _refuse_other_encodings(path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the file name {os.fsencode(path)!r} is not UTF-8: rename it") from None
