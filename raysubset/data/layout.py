"""Decides by names alone which files of a folder are read as which split, class or mask. Refuses ambiguous names."""

import dataclasses
import re
import shlex
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import NoReturn
from urllib.parse import unquote

import pyarrow as pa

from raysubset.data.image_columns import with_lists
from raysubset.data.split import SplitName
from raysubset.events import Note

# The words by which the `datasets` library recognises splits in file and folder names.
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
_ANY_WORD = "|".join(sorted(_SPLIT_WORDS, key=len, reverse=True))
_MASKS = ("mask", "masks", "label", "labels")  # the words that mark a folder of masks, unless data.target names one
_NULL = "__HIVE_DEFAULT_PARTITION__"  # the folder of nulls in Hive, Spark and Arrow
_INTEGER = re.compile(r"-?(0|[1-9]\d{0,17})")
_SPLIT_KEYS = ("split", "set", "subset", "partition", "fold", "phase", "part")  # keys of hive folders: split=train


@dataclass(frozen=True)
class Placed:
    """A file, and its class or columns as the folders around it name them."""

    path: str
    class_name: str | None = None  # of an image
    mask: str | None = None  # of an image: the path of its mask
    columns: Mapping[str, str | int | None] = field(default_factory=dict)  # of a table in hive folders, key=value

    def with_fields(self, schema: pa.Schema) -> pa.Schema:
        """Add the columns that the file's folders name to its schema, in which vectors are lists."""
        # Not schema.empty_table(), which cannot make columns of unions
        empty = pa.table([pa.nulls(0, kind) for kind in schema.types], schema=schema)
        return self.with_columns(empty).schema

    def with_columns(self, table: pa.Table, *, left_out: Collection[str] = ()) -> pa.Table:
        """Add the columns that the file's folders name to its table, except those left out. Vectors become lists."""
        table = with_lists(table)
        for key, value in self.columns.items():
            if key not in {*table.column_names, *left_out}:
                table = table.append_column(key, pa.repeat(pa.scalar(value), table.num_rows))
        return table


Layout = dict[SplitName, list[Placed]]


def some(names: Iterable[str], *, most: int = 4) -> str:
    """List the first few names for a message. Characters that are not printable are escaped."""
    names = list(names)
    return ", ".join(name if name.isprintable() else ascii(name) for name in names[:most]) + (
        ", …" if len(names) > most else ""
    )


def words_of_splits(name: str) -> dict[SplitName, str]:
    """Return the splits that a file's or folder's name contains, each with its word.

    Words end at anything but letters and before a capital: seg_train, train2017, "Test Data", trainImages, testset.
    """
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
    words = (re.sub(r"(?<=.)(data)?(set)?$", "", word) for word in re.split(r"[\W\d_]+", spaced))
    return {_SPLIT_WORDS[word]: word for word in words if word in _SPLIT_WORDS}


def alike_but_for_split(names: Iterable[str]) -> list[str]:
    """Return names that differ only in the word of a split, even within a word: mytrain and mytest."""
    by_pattern: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        pattern, num = re.subn(_ANY_WORD, "*", name.lower(), count=1)
        if num:
            by_pattern[pattern].append(name)
    return next((group for group in by_pattern.values() if len(group) > 1), [])


def lay_out_tables(paths: Sequence[str], *, where: str, label_column: str) -> Layout:
    """Assign each table to a split by its name and its folders' names. If none names a split, all are training data.

    Raises:
        ValueError: for ambiguous names.
    """
    by_stem: dict[str, str] = {}
    for path in paths:
        if (other := by_stem.setdefault(str(PurePosixPath(path).with_suffix("")), path)) != path:
            refuse(where, f"{other} and {path} may be one table in two formats", "remove one", ignore=path)
    names = {path: _read_names(path, where, label_column) for path in paths}
    splits = _split_of_each({path: splits for path, (splits, _) in names.items()}, where)
    layout: Layout = defaultdict(list)
    for path, (_, columns) in names.items():
        layout[splits[path]].append(Placed(path, columns=columns))
    return dict(layout)


def _split_of_each(words: Mapping[str, Mapping[SplitName, str]], where: str) -> dict[str, SplitName]:
    """Return the one split that each file or folder names. If none names one, all are training data.

    Args:
        words: for each path, the splits that its names contain, each with its word.
    """
    unnamed = [path for path, splits in words.items() if not splits]
    if pair := alike_but_for_split(dict.fromkeys(part for path in unnamed for part in path.split("/"))):
        refuse(where, f"{some(pair)} may name splits", "separate the word by a dash (my-train)", ignore=None)
    examples: dict[SplitName, tuple[str, str]] = {}  # for each split, its word and the first path
    for path, splits in words.items():
        if len(splits) > 1:
            refuse(where, f"{path} names several splits ({', '.join(splits)})", "rename it", ignore=path)
        for split, word in splits.items():
            first_word, first = examples.setdefault(split, (word, path))
            if word != first_word:
                refuse(where, f"{first} and {path} both name the {split} split", "rename one", ignore=path)
    if unnamed and examples:
        verb, example = "names" if len(unnamed) == 1 else "name", next(path for path in words if words[path])
        text = f"{some(unnamed)} {verb} no split, as {example} does"
        refuse(where, text, "rename it, as my-train does", ignore=unnamed[0])
    return {path: next(iter(splits)) if splits else "train" for path, splits in words.items()}


def with_values(layout: Layout) -> Layout:
    """Convert the texts of hive folders to values: a key's to integers if all of them are, and nulls to None."""
    members = [member for files in layout.values() for member in files]
    texts = {(key, text) for member in members for key, text in member.columns.items() if text != _NULL}
    words = {key for key, text in texts if not _INTEGER.fullmatch(str(text))}

    def value(key: str, text: str) -> str | int | None:
        return None if text == _NULL else text if key in words else int(text)

    return {
        split: [
            dataclasses.replace(file, columns={key: value(key, str(text)) for key, text in file.columns.items()})
            for file in files
        ]
        for split, files in layout.items()
    }


def _read_names(path: str, where: str, label_column: str) -> tuple[dict[SplitName, str], dict[str, str]]:
    """Return the splits, with their words, and the columns that a table's name and its folders' names contain."""
    splits: dict[SplitName, str] = {}
    columns: dict[str, str] = {}
    for folder in PurePosixPath(path).parent.parts:
        key, is_hive, value = folder.partition("=")
        if not is_hive:
            splits |= words_of_splits(folder)
            continue
        value = unquote(value)
        value_splits = words_of_splits(value) if key.lower() in _SPLIT_KEYS or value.lower() in _SPLIT_WORDS else {}
        if key == label_column or not (value_splits or key.lower() == "split" or words_of_splits(key)):
            columns[key] = value
        elif value_splits and not words_of_splits(key):
            splits |= value_splits
        else:
            text = f"{folder} may name a split, but not which"
            refuse(where, text, "rename it (split=train, split=test)", ignore=folder)
    return splits | words_of_splits(PurePosixPath(path).stem), columns


def lay_out_images(paths: Sequence[str], *, empty: Sequence[str], where: str, label_column: str) -> Layout:
    """Assign each image to a split and class. Folders are classes, or splits that hold a folder for each class.

    A split's folder holds folders of classes, and a class's folder holds images, so a class may be named "test".

    Args:
        empty: the folders that hold no image.

    Raises:
        ValueError: for ambiguous names, images in no folder, and, as torchvision's ImageFolder does, empty folders of
            classes: their images are missing, and the classes would be numbered differently.
    """
    tops = _by_folder(paths, "", where)
    if not _has_splits(tops, depth=0):
        return {"train": _classes(tops, "", empty, where, label_column)}
    split_of = _split_of_each({folder: words_of_splits(folder) for folder in tops}, where)
    layout: Layout = {}
    for folder, members in tops.items():
        split = split_of[folder]
        if split in layout:
            other = next(other for other in tops if split_of[other] == split)
            refuse(where, f"{other} and {folder} both name the {split} split", "put them together", ignore=folder)
        inner = _by_folder(members, folder, where)
        if len(inner) == 1 and [*words_of_splits(next(iter(inner)))] == [split]:  # seg_train/seg_train, as zips unpack
            folder = f"{folder}/{next(iter(inner))}"
            inner = _by_folder(members, folder, where)
        if _has_splits(inner, depth=folder.count("/") + 1):
            text = f"folder {folder} names a split, and so do folders in it ({some(inner)})"
            refuse(where, text, "give data.name that folder, or leave one level", ignore=next(iter(inner)))
        layout[split] = _classes(inner, folder, empty, where, label_column)
    if unread := [folder for folder in empty if "/" not in folder and words_of_splits(folder)]:
        refuse(where, f"folder {unread[0]} names a split and holds no image", "remove it", ignore=unread[0])
    return layout


def lay_out_masks(
    paths: Sequence[str], *, image_word: str, mask_word: str | None, where: str
) -> tuple[Layout, list[str]] | None:
    """Pair the images of each split with their masks. Return also masks without an image; None if there are no masks.

    There are masks if each file lies in a folder whose name contains a word for images or a word for masks. A mask's
    path is its image's except for that word and the suffix, and may end in _mask: train/images/a.jpg and
    train/masks/a_mask.png. The layout also has images without a mask.

    Args:
        image_word: the word for images; its plural is one as well.
        mask_word: the word for masks, likewise; None for the usual words.

    Raises:
        ValueError: for two files that could be one image or mask, and for names that do not decide the split.
    """
    masks_words = (mask_word, f"{mask_word}s") if mask_word else _MASKS
    words = {"image": (image_word, f"{image_word}s"), "mask": masks_words}
    by_kind: dict[str, dict[str, str]] = {"image": {}, "mask": {}}  # paths by the part that image and mask share
    doubles: list[tuple[str, str, str]] = []
    for path in paths:
        found = [(kind, common) for kind in words if (common := _without_word(path, words[kind])) is not None]
        if len(found) != 1:
            return None
        ((kind, common),) = found
        if (other := by_kind[kind].setdefault(common, path)) != path:
            doubles.append((other, path, kind))
    images, masks = by_kind["image"], by_kind["mask"]
    if not images or not masks:
        return None
    for other, path, kind in doubles[:1]:
        refuse(where, f"{other} and {path} may be one {kind}", "remove one, or rename it", ignore=path)
    folders = dict.fromkeys(path.rpartition("/")[0] for path in images.values())
    split_of = _split_of_each({folder: words_of_splits(folder) for folder in folders}, where)
    layout: Layout = defaultdict(list)
    for common, path in images.items():
        names = (common, *(f"{common}_{each}" for each in masks_words))
        mask = next((masks.pop(name) for name in names if name in masks), None)
        layout[split_of[path.rpartition("/")[0]]].append(Placed(path, mask=mask))
    return dict(layout), sorted(masks.values())


def refuse_without_masks(layout: Layout, *, where: str) -> None:
    """Refuse images without a mask.

    Raises:
        ValueError: with the first few of them.
    """
    if unmasked := [image.path for members in layout.values() for image in members if image.mask is None]:
        example = next((image for members in layout.values() for image in members if image.mask), None)
        comparison = f", as {example.path} has {example.mask}" if example else ""
        text = f"{some(unmasked)} {'has' if len(unmasked) == 1 else 'have'} no mask{comparison}"
        refuse(where, text, "add what is missing", ignore=unmasked[0])


def _without_word(path: str, words: Sequence[str]) -> str | None:
    """Remove the suffix from a path, and one of the words from a folder's name; return None if no folder has one."""
    *folders, name = PurePosixPath(path).with_suffix("").parts
    word = "|".join(map(re.escape, words))
    for place, folder in enumerate(folders):
        remainder, num = re.subn(rf"(?i)(?<![^\W_])({word})(?![^\W_])", "", folder)
        if num:
            return "/".join([*folders[:place], *filter(None, [remainder.strip("-_ ")]), *folders[place + 1 :], name])
    return None


def folders_shared_by_classes(layout: Layout, *, where: str) -> tuple[Note, ...]:
    """Warn if all class folders hold folders of the same names: those may be the classes, and their parents splits.

    Raises:
        ValueError: if the class folders' names also contain a word of a split.
    """
    for split, files in layout.items():
        inner: defaultdict[str, set[str]] = defaultdict(set)
        for file in files:
            inner[str(file.class_name)].add(file.path.rsplit("/", 2)[-2])
        first, *others = inner.values()
        if others and len(first) > 1 and all(names == first for names in others):
            names = some(sorted(first))
            text = f"class folders {some(inner)} of the {split} split hold folders of the same names ({names})"
            if any(re.search(_ANY_WORD, name.lower()) for name in inner):
                refuse(where, text, "name splits by words of their own, as my-train and my-test do", ignore=None)
            text += ": if those are the classes, give data.name a folder that holds them directly"
            return (Note(text, is_warning=True),)
    return ()


def refuse_copies(sizes: Mapping[str, int], *, where: str) -> None:
    """Refuse a folder that is a copy of what lies beside it, such as an archive that was unpacked twice.

    Args:
        sizes: the bytes of each file by path.
    """
    tops: defaultdict[str, list[str]] = defaultdict(list)
    for path in sizes:
        top, _, member = path.partition("/")
        tops[top].append(member)
    for top, members in tops.items():
        if all(member and sizes.get(member) == sizes[f"{top}/{member}"] for member in members):
            text = f"{top} holds {some(members)} once more, with the same sizes"
            refuse(where, text, "remove the copy", ignore=top)


def _by_folder(paths: Sequence[str], above: str, where: str) -> dict[str, list[str]]:
    """Group images by the folder that is directly below `above` and contains them."""
    depth = above.count("/") + 1 if above else 0
    folders: defaultdict[str, list[str]] = defaultdict(list)
    for path in paths:
        parts = path.split("/", depth + 1)
        if len(parts) < depth + 2:
            in_none = all("/" not in path for path in paths)
            ignore = None if in_none else above or path
            refuse(where, f"{path} lies in no class's folder", "move it into one", ignore=ignore)
        folders[parts[depth]].append(path)
    return dict(folders)


def _has_splits(folders: Mapping[str, Sequence[str]], *, depth: int) -> bool:
    """Return True if folders at this depth may be splits: by a pair of names, or because one of them has folders."""
    if alike_but_for_split(folders):
        return True
    return any(
        words_of_splits(folder) and any(path.count("/") > depth + 1 for path in paths)
        for folder, paths in folders.items()
    )


def _classes(
    folders: Mapping[str, Sequence[str]], above: str, empty: Sequence[str], where: str, label_column: str
) -> list[Placed]:
    """Return the images of the class folders below `above`, each with its class."""
    if not above and len(folders) == 1:
        (folder,) = folders
        if all(path.count("/") > 1 for path in folders[folder]):
            remedy = f"set data.name to {where.rstrip('/')}/{folder}"
            raise ValueError(f"data.name = {where}: {folder} is its only folder, and one class is too few: {remedy}")
    prefix = f"{above}/" if above else ""
    for folder in empty:
        if folder.startswith(prefix) and "/" not in folder[len(prefix) :]:
            refuse(where, f"folder {folder} holds no image", "remove it", ignore=folder)
    files = []
    for folder, paths in folders.items():
        _refuse_splits_of_a_class(paths, f"{prefix}{folder}", where)
        files += [Placed(path, folder.removeprefix(f"{label_column}=")) for path in paths]
    return sorted(files, key=lambda file: file.path)


def _refuse_splits_of_a_class(paths: Sequence[str], folder: str, where: str) -> None:
    inner: defaultdict[str, set[str]] = defaultdict(set)
    for innermost in {path.rpartition("/")[0] for path in paths}:
        while innermost != folder:
            parent, _, name = innermost.rpartition("/")
            inner[parent].add(name)
            innermost = parent
    for parent, names in inner.items():
        if pair := alike_but_for_split(sorted(names)):
            text = f"{some(pair)} in the class folder {parent} name splits"
            refuse(where, text, f"put the classes into the splits ({pair[0]}/{folder})", ignore=pair[0])


def refuse(where: str, text: str, remedy: str, *, ignore: str | None) -> NoReturn:
    """Raise the error that refuses a folder, with the ways out."""
    option = f", or leave it out with --data.ignored {shlex.quote(ignore.replace(',', '?'))}" if ignore else ""
    message = f"data.name = {where}: {text}: {remedy}{option}"
    raise ValueError("".join(char if char.isprintable() else ascii(char)[1:-1] for char in message))
