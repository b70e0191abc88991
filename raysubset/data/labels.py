"""Numbers the labels of a source, integers or names, from 0 to num_classes - 1, alike in every split."""

import dataclasses
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from raysubset.config import nearest
from raysubset.data.image_columns import is_string, rows_of
from raysubset.data.sources import Source, SourceSplit
from raysubset.data.split import SplitName
from raysubset.events import Note

UNLABELLED = -1  # stands for a missing label, as in the `datasets` library

_MOST_LISTED = 5  # names in one line


def as_labels(values: pa.ChunkedArray, where: str) -> tuple[pa.ChunkedArray, tuple[str, ...] | None]:
    """Return labels as int64 or strings, and, if they are a dictionary, its class names in its order.

    There must be at least one label. If all are null, all become UNLABELLED.

    Raises:
        ValueError: for a null among other labels, and for anything but integers and strings.
    """
    names = None
    if values.null_count == len(values):
        return pa.chunked_array([np.full(len(values), UNLABELLED)]), None
    if pa.types.is_dictionary(values.type):
        if is_string(values.type.value_type):
            dictionary_names = [name for chunk in values.chunks for name in chunk.dictionary.to_pylist()]
            names = tuple(dict.fromkeys(name for name in dictionary_names if name is not None))
        values = pa.chunked_array([chunk.dictionary_decode() for chunk in values.chunks])
    if values.null_count:
        rows = rows_of(np.flatnonzero(values.is_null().to_numpy()), "label", where)
        raise ValueError(f"{rows} null: leave such rows out")
    if is_string(values.type):
        return values.cast(pa.string()), names
    if not pa.types.is_integer(values.type):
        example = f", such as {values[0].as_py()!r}" if pa.types.is_floating(values.type) else ""
        text = "they must be integers or class names; --task regression learns numbers, --task segmentation masks"
        raise ValueError(f"labels of {where} are {values.type}{example}: {text}")
    try:
        return values.cast(pa.int64()), None
    except pa.ArrowInvalid as error:  # uint64 beyond int64
        raise ValueError(f"labels of {where} are out of range: {error}") from error


def number_classes(source: Source) -> tuple[dict[SplitName, np.ndarray], tuple[str, ...], tuple[Note, ...]]:
    """Return the labels of each split, int64 [N] from 0 to num_classes - 1, the name of each class, and notes.

    The training split decides which classes there are. If it does not name them, they are the numbers up to its
    largest label. If another split names its classes too, its labels are matched by name, whatever their order. A
    split without labels is left out, with a note. Names are converted to Unicode's composed form (NFC).

    Raises:
        ValueError: for labels of no training class, for gaps between unnamed classes, and if there is only one class.
    """
    splits: Source = {}
    notes: list[Note] = []
    for name, split in source.items():
        if not _is_unlabelled(split.labels):
            splits[name], composing = _composed(split, name)
            notes += composing
        elif name == "train":
            origin = f" of {split.where}" if split.where else ""
            raise ValueError(
                f"no example of the train split{origin} has a label: all {len(split.labels)} are -1 or null; give some"
            )
        else:
            text = (
                f"the {name} split is left out, since none of its {len(split.labels)} examples has a label "
                f"(all are -1 or null): --data.ignored {name} leaves it unread"
            )
            notes.append(Note(text, is_warning=True))
    train = splits["train"]
    present = train.labels.unique()
    if len(present) < 2:
        raise ValueError(
            f"all {len(train.labels)} training examples of data.name are of class {present[0]}: at least two are needed"
        )
    names = train.class_names or _names(present)
    notes += _naming_notes(splits, names)
    return {name: _numbers(split, train, names, name) for name, split in splits.items()}, names, tuple(notes)


def _is_unlabelled(labels: pa.ChunkedArray) -> bool:
    return pa.types.is_integer(labels.type) and labels.unique().to_pylist() == [UNLABELLED]


def _composed(split: SourceSplit, name: SplitName) -> tuple[SourceSplit, tuple[Note, ...]]:
    """Convert a split's class names to Unicode's composed form, with a note if some were in another."""
    labels_present = split.labels.unique().to_pylist() if is_string(split.labels.type) else []
    changed = {
        each: composed for each in (*labels_present, *(split.class_names or ())) if (composed := _nfc(each)) != each
    }
    if not changed:
        return split, ()
    class_names, labels = split.class_names and tuple(map(_nfc, split.class_names)), split.labels
    if labels_present:
        labels = pa.chunked_array(list(_renamed(labels)), pa.string())
        class_names = class_names and tuple(dict.fromkeys(class_names))  # a dictionary may have both forms of a name
    examples = ", ".join(sorted(set(changed.values()))[:_MOST_LISTED])
    note = f"class names of the {name} split that Unicode writes in several ways are read as composed (NFC): {examples}"
    return dataclasses.replace(split, targets=labels, class_names=class_names), (Note(note),)


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _renamed(labels: pa.ChunkedArray) -> Iterator[pa.Array]:
    for chunk in labels.dictionary_encode().chunks:
        yield pa.array([_nfc(name) for name in chunk.dictionary.to_pylist()], pa.string()).take(chunk.indices)


def _naming_notes(source: Source, names: tuple[str, ...]) -> Iterator[Note]:
    """Yield notes on class names that occur twice, and on splits that order or name their classes differently."""
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        yield Note(f"several classes have one name: {', '.join(duplicates[:_MOST_LISTED])}", is_warning=True)
    for name, split in source.items():
        if is_string(split.labels.type) or name == "train":
            continue
        if split.class_names and split.class_names != names:
            yield Note(f"the {name} split orders its classes unlike the train split: its labels are taken by name")
        if not split.class_names and source["train"].class_names:
            yield Note(f"the {name} split does not name its classes: its labels are taken as the train split's numbers")


def _names(labels: pa.Array) -> tuple[str, ...]:
    """Return names for classes that the source does not name, from their distinct labels."""
    distinct = labels.sort().to_pylist()
    if is_string(labels.type):
        return tuple(distinct)
    if distinct[0] < 0:
        raise ValueError(
            f"label {distinct[0]} of the train split is negative: labels must run from 0 to num_classes - 1"
        )
    gap = next((number for number, label in enumerate(distinct) if number != label), None)
    if gap is not None:
        raise ValueError(
            f"training labels run from {distinct[0]} to {distinct[-1]} but none is {gap}: "
            "number the classes from 0 without gaps, or use class names as labels"
        )
    return tuple(map(str, distinct))


def _numbers(split: SourceSplit, train: SourceSplit, names: tuple[str, ...], name: SplitName) -> np.ndarray:
    split_names = split.class_names
    if split_names and split_names != names and (extra := sorted(set(split_names) - set(names))):
        examples = ", ".join(extra[:_MOST_LISTED])
        unnamed = "" if train.class_names or is_string(train.labels.type) else ", which has numbers only"
        raise ValueError(f"the {name} split has classes that the train split has not{unnamed}: {examples}")
    if is_string(split.labels.type):
        return _numbers_of_names(split.labels, names, name)
    if not split_names and is_string(train.labels.type):
        raise ValueError(f"labels of the train split are class names, those of the {name} split integers")
    numbers, class_names = split.labels.to_numpy(), split_names or names
    wrong = np.flatnonzero((numbers < 0) | (numbers >= len(class_names)))
    if len(wrong):
        remedy = f": leave such rows out{_way_out(name)}" if numbers[wrong[0]] == UNLABELLED else ""
        raise ValueError(
            f"label {numbers[wrong[0]]} in row {wrong[0]} of the {name} split is out of range: "
            f"the train split's {len(names)} classes have labels 0 to {len(names) - 1}{remedy}"
        )
    return numbers if class_names == names else renumbered(numbers, class_names, names, f"the {name} split")


def renumbered(numbers: np.ndarray, old_names: Sequence[str], names: Sequence[str], where: str) -> np.ndarray:
    """Convert numbers of `old_names` to numbers of `names`, which include them. UNLABELLED stays.

    Raises:
        ValueError: if several classes have one name.
    """
    if duplicates := [name for name in old_names if old_names.count(name) > 1 or names.count(name) > 1]:
        raise ValueError(
            f"{where} orders its classes differently, and several are named {duplicates[0]}: give each its own name"
        )
    places = {name: number for number, name in enumerate(names)}
    table = np.array([*(places[name] for name in old_names), UNLABELLED])  # -1 indexes the last entry
    return table[numbers]


def _numbers_of_names(labels: pa.ChunkedArray, names: tuple[str, ...], name: SplitName) -> np.ndarray:
    places = {each: number for number, each in enumerate(names)}
    unknown = next((label for label in labels.unique().to_pylist() if label not in places), None)
    if unknown is not None and name == "train":
        raise ValueError(
            f"label {unknown} of the train split is not among the class names of its metadata: write them alike"
        )
    if unknown is not None:
        hint = nearest(unknown, names) or _way_out(name)
        raise ValueError(f"class {unknown} of the {name} split is not in the train split{hint}")
    numbers = []
    for chunk in labels.dictionary_encode().chunks:
        table = np.array([places[each] for each in chunk.dictionary.to_pylist()], dtype=np.int64)
        numbers.append(table[chunk.indices.to_numpy()])
    return np.concatenate(numbers)


def _way_out(name: SplitName) -> str:
    return "" if name == "train" else f", or leave the split out with --data.ignored {name}"
