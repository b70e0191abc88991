"""Finds the files of data.name: which are read for each split, and which are left out. It opens no file."""

import fnmatch
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal, TypeVar

from PIL import Image
from pyarrow import fs

from raysubset.config import (
    ARROW_SUFFIXES,
    DELIMITERS,
    TABLE_SUFFIXES,
    TEXT_SUFFIXES,
    DataConfig,
    nearest,
    nothing_there,
)
from raysubset.data.layout import (
    Layout,
    Placed,
    folders_shared_by_classes,
    lay_out_images,
    lay_out_masks,
    lay_out_tables,
    refuse,
    refuse_copies,
    refuse_without_masks,
    some,
    with_values,
)
from raysubset.data.listing import list_folder, locate
from raysubset.data.split import SPLITS, SplitName
from raysubset.errors import first_line
from raysubset.events import Note

# Folders that systems leave behind: a Mac's file attributes, thumbnails, byte code, files recovered by disk checks.
_LITTER = ("__macosx", "@eadir", "__pycache__", "lost+found", "$recycle.bin", "system volume information")

# Files that map() and filter() of the `datasets` library leave beside its tables, finished or not.
_CACHE = re.compile(r"(cache-[0-9a-f]+(_\d+_of_\d+)?|tmp\w{8,})\.arrow")

# Tables whose log says which files are live, and the folder or file by which they are recognised.
_LOGGED = {
    "a Delta table": re.compile(r"(^|/)_delta_log$"),
    "a Hudi table": re.compile(r"(^|/)\.hoodie$"),
    "an Iceberg table": re.compile(r"(^|/)metadata/[^/]*\.metadata\.json$"),
}
_MOST_REASONS = 8  # in one line

# Formats that Pillow recognises by their first bytes, and does not decode.
_NOT_DECODED = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}

Kind = Literal["tables", "images", "texts"]
LeftOut = defaultdict[str, list[str]]  # the paths that are left out, by reason
Value = TypeVar("Value")


@dataclass(frozen=True)
class DataFiles:
    """The files of a path, by split, and notes on the files that are left out."""

    system: fs.FileSystem
    root: str  # in that file system
    kind: Kind
    layout: Layout
    notes: tuple[Note, ...] = ()

    @property
    def paths(self) -> list[str]:
        """The paths of all files below the root, including masks. If the path is a file's, it is [""]."""
        files = [file for members in self.layout.values() for file in members]
        return [path for file in files for path in (file.path, file.mask) if path is not None]

    def full_path(self, file: Placed) -> str:
        """Return a file's path in the file system."""
        return f"{self.root}/{file.path}" if file.path else self.root


class Ignored:
    """The patterns of data.ignored. It records which of them matched, so that a mistyped pattern is refused."""

    def __init__(self, config: DataConfig) -> None:
        self._where = config.name
        self._patterns = [word.strip().rstrip("/") for word in (config.ignored or "").split(",") if word.strip()]
        self._matched: set[str] = set()

    def matches(self, path: str) -> bool:
        """Return True if a pattern names this file or folder, or one around it, by its name or path."""
        if not self._patterns:
            return False
        parts = path.split("/")
        names = {*parts, *("/".join(parts[: depth + 1]) for depth in range(len(parts)))}
        matching = {pattern for pattern in self._patterns for name in names if fnmatch.fnmatchcase(name, pattern)}
        self._matched |= matching
        return bool(matching)

    def chosen(self, splits: Mapping[SplitName, Value]) -> dict[SplitName, Value]:
        """Return the splits that no pattern names. Patterns may name nothing but splits.

        Raises:
            ValueError: as refuse_unmatched() does, and if the training split is named.
        """
        chosen = self.without(splits)
        if "train" in splits and "train" not in chosen:
            raise ValueError(f"data.ignored = train: {self._where} would have no training data left")
        self.refuse_unmatched(splits)
        return chosen

    def without(self, splits: Mapping[SplitName, Value]) -> dict[SplitName, Value]:
        """Return the splits that no pattern names."""
        self._matched |= {pattern for pattern in self._patterns if pattern in splits}
        return {split: value for split, value in splits.items() if split not in self._patterns}

    def refuse_unmatched(self, names: Iterable[str]) -> None:
        """Refuse patterns that matched nothing.

        Args:
            names: the names that the user may have meant.

        Raises:
            ValueError: with the pattern and the nearest name.
        """
        for pattern in self._patterns:
            if pattern not in self._matched:
                hint = nearest(pattern, names)
                raise ValueError(f"data.ignored = {pattern}: {self._where} has no such split, file or folder{hint}")


def find_files(config: DataConfig) -> DataFiles:
    """Find the files of data.name, and decide what each is read as.

    Raises:
        ValueError: if there is nothing to read, or the files are ambiguous, with the ways out.
    """
    system, root = locate(config.name)
    try:
        info = system.get_file_info(root)
    except OSError as error:
        raise ValueError(f"data.name = {config.name} cannot be reached: {first_line(error)}") from error
    if info.type == fs.FileType.NotFound:
        raise nothing_there(config.name, root)
    if info.type == fs.FileType.File:
        Ignored(config).refuse_unmatched([])
        kind = "tables" if root.lower().endswith(TABLE_SUFFIXES) else "texts"
        return DataFiles(system, root, kind, {"train": [Placed("")]})
    return _find_in_folder(system, root, config)


def image_suffixes() -> tuple[str, ...]:
    """Return the suffixes of the formats whose pixels Pillow can read here, including installed plugins."""
    suffixes = Image.registered_extensions()  # it also loads the plugins
    readable = {*Image.OPEN, "MPO"} - _NOT_DECODED  # MPO is opened by JPEG's reader
    return tuple(suffix for suffix, kind in suffixes.items() if kind in readable)


def _find_in_folder(system: fs.FileSystem, root: str, config: DataConfig) -> DataFiles:
    ignored, where, notes = Ignored(config), config.name, ()
    listing = list_folder(system, root)
    chosen, folders, circles, dangling = (
        [path for path in paths if not ignored.matches(path)]
        for paths in (listing.files, listing.folders, listing.circles, listing.dangling)
    )
    if broken := [link for link in dangling if not _is_hidden(link)]:
        refuse(where, f"links to nothing, {some(broken)}", "fetch what they stand for", ignore=broken[0])
    files = [path for path in chosen if not _is_hidden(path)]
    left_out: LeftOut = defaultdict(list)
    left_out["ignored"] = sorted(listing.files.keys() - chosen)
    left_out["hidden"] = [path for path in chosen if _is_hidden(path)]
    left_out["hidden"] += [folder for folder in folders if PurePosixPath(folder).name.startswith(".")]
    left_out["links back to a folder they lie in"] = circles
    kind, paths = _paths_by_kind(files, left_out, where)
    if not paths:
        ignored.refuse_unmatched([*folders, *files])
        contents = _in_words(left_out, files)
        raise ValueError(
            f"data.name = {where}: the folder holds neither {', '.join((*TABLE_SUFFIXES, *TEXT_SUFFIXES))} files nor "
            f"folders of images{f', only {contents}' if contents else ''}: give the path of either"
        )
    refuse_copies({path: listing.files[path] for path in paths}, where=where)
    visible = [folder for folder in folders if not _is_hidden(folder)]
    masks_layout = None
    if kind != "images":
        _refuse_logged([*visible, *files, *left_out["hidden"]], where)
        layout = lay_out_tables(paths, where=where, label_column=config.label_column)
    elif masks_layout := lay_out_masks(paths, image_word=config.image_column, mask_word=config.target, where=where):
        layout, left_out["masks without an image"] = masks_layout
    else:
        holding = {str(folder) for path in paths for folder in PurePosixPath(path).parents}
        empty = [folder for folder in visible if folder not in holding]
        layout = lay_out_images(paths, empty=empty, where=where, label_column=config.label_column)
    if listing.links:
        layout = _without_doubles(layout, root, where, left_out)
    in_order: Layout = {split: layout[split] for split in SPLITS if split in layout}
    chosen_layout = ignored.without(in_order)
    left_out["of ignored splits"] += [file.path for split in layout.keys() - chosen_layout for file in layout[split]]
    ignored.refuse_unmatched([*layout, *visible, *files])
    if kind == "images" and not masks_layout:
        notes = folders_shared_by_classes(chosen_layout, where=where)
    summary = _in_words(left_out, set(files).difference(paths))
    if "train" not in chosen_layout:
        missing, present = ("train folder", chosen_layout) if kind == "images" else ("training files", paths)
        suffix = f"; left out: {summary}" if summary else ""
        raise ValueError(f"data.name = {where}: no {missing}, only {some(present)}{suffix}")
    if masks_layout:
        refuse_without_masks(chosen_layout, where=where)
    notes = (Note(f"left out: {summary}"), *notes) if summary else notes
    return DataFiles(system, root, kind, with_values(chosen_layout), notes)


def _paths_by_kind(files: Sequence[str], left_out: LeftOut, where: str) -> tuple[Kind, list[str]]:
    """Return what a folder is read as, and the paths of those files; none if it holds nothing to read.

    Raises:
        ValueError: if it holds tables and folders of images.
    """
    images = [path for path in files if path.lower().endswith(image_suffixes())]
    in_folders = [path for path in images if "/" in path]
    tables = _sift_tables(files, left_out, ARROW_SUFFIXES)
    if not tables and not in_folders:  # beside Arrow tables and folders of images, CSV and text files describe those
        tables = _sift_tables(files, left_out, tuple(DELIMITERS))
    if tables and in_folders:
        raise ValueError(
            f"data.name = {where} holds tables ({some(tables)}) and folders of images ({some(in_folders)}): leave one "
            f"of them out, as with --data.ignored '*{PurePosixPath(tables[0]).suffix}'"
        )
    if tables or images:
        return ("tables", tables) if tables else ("images", images)
    return "texts", [path for path in files if path.lower().endswith(TEXT_SUFFIXES)]


def _refuse_logged(paths: Iterable[str], where: str) -> None:
    for path in paths:
        for kind, shows in _LOGGED.items():
            if shows.search(path):
                raise ValueError(
                    f"data.name = {where}: {path} makes it {kind}, whose log says which files are live; such tables "
                    "are not read: write the live rows to Parquet, or give data.name a function that returns them as "
                    "an Arrow table (for Delta, deltalake's DeltaTable(path).to_pyarrow_table())"
                )


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") or part.lower() in _LITTER for part in path.split("/"))


def _sift_tables(files: Iterable[str], left_out: LeftOut, suffixes: tuple[str, ...]) -> list[str]:
    """Return the tables of these suffixes, except those that other programs left, which go to `left_out`."""
    tables = []
    for path in files:
        parts = path.split("/")
        if not path.lower().endswith(suffixes):
            continue
        if _CACHE.fullmatch(parts[-1]):
            left_out["caches of the datasets library"].append(path)
        elif any(part.startswith("_") for part in parts):  # so Spark and Arrow name files that are not finished
            left_out["tables under names that begin with _"].append(path)
        else:
            tables.append(path)
    return tables


def _without_doubles(layout: Layout, root: str, where: str, left_out: LeftOut) -> Layout:
    """Return the layout with each file once, even if several links lead to it.

    Raises:
        ValueError: for a file that links put into two splits or classes.
    """
    placed: list[tuple[SplitName, Placed]] = [(split, file) for split, members in layout.items() for file in members]
    real_paths = {file.path: os.path.realpath(f"{root}/{file.path}") for _, file in placed}
    first_by_path: dict[str, tuple[SplitName, Placed]] = {}
    for split, file in sorted(placed, key=lambda pair: not real_paths[pair[1].path].endswith(f"/{pair[1].path}")):
        first_split, first = first_by_path.setdefault(real_paths[file.path], (split, file))
        if (first_split, first.class_name, first.columns) != (split, file.class_name, file.columns):
            text = f"{first.path} and {file.path} are one file by a link, in two splits or classes"
            refuse(where, text, "remove one", ignore=file.path)
        if first is not file:
            left_out["links to files that are read"].append(file.path)
    doubles = {*left_out["links to files that are read"]}
    return {split: [file for file in members if file.path not in doubles] for split, members in layout.items()}


def _in_words(left_out: LeftOut, others: Iterable[str]) -> str:
    """Return the reasons for leaving files out, with counts and names. For `others` the reason is their suffix."""
    by_reason: LeftOut = defaultdict(list)
    for path in sorted({*others}.difference(*left_out.values())):
        by_reason[PurePosixPath(path).suffix or "without a suffix"].append(path)
    reasons = [(reason, paths) for reason, paths in (left_out | by_reason).items() if paths]
    words = [f"{reason} ({len(paths)}: {some(paths, most=2)})" for reason, paths in reasons[:_MOST_REASONS]]
    if num_others := sum(len(paths) for _, paths in reasons[_MOST_REASONS:]):
        words.append(f"others ({num_others})")
    return ", ".join(words)
