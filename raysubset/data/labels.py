"""Numbers the labels of a source, integers or names, from 0 to num_classes - 1, alike in every split."""

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from pyarrow import compute

from raysubset.config import nearest
from raysubset.data.image_columns import refuse_nulls
from raysubset.data.split import SplitName
from raysubset.events import Note
from raysubset.tasks.columns import is_string, places, such_as

UNLABELLED = -1  # stands for a missing label, as in the `datasets` library

_MOST_LISTED = 5  # names in one line


@dataclass(frozen=True)
class Labels:
    """The classes of a split's examples, as its source stores them."""

    values: pa.ChunkedArray  # [N], at least one: int64 or strings, without nulls
    names: tuple[str, ...] | None = None  # of the classes, in the order of the numbers; None if the source has none
    where: str = ""  # the name of the split in messages

    def __len__(self) -> int:
        return len(self.values)

    @property
    def are_texts(self) -> bool:
        return is_string(self.values.type)


def as_labels(values: pa.ChunkedArray, where: str) -> Labels:
    """Read labels, and, if they are a dictionary, its class names in its order.

    There must be at least one label. If all are null, all become UNLABELLED.

    Raises:
        ValueError: for a null among other labels, and for anything but integers and strings.
    """
    names = None
    if values.null_count == len(values):
        return Labels(pa.chunked_array([np.full(len(values), UNLABELLED)]), None, where)
    if pa.types.is_dictionary(values.type):
        if is_string(values.type.value_type):
            dictionary_names = [name for chunk in values.chunks for name in chunk.dictionary.to_pylist()]
            names = tuple(dict.fromkeys(name for name in dictionary_names if name is not None))
        values = pa.chunked_array([chunk.dictionary_decode() for chunk in values.chunks])
    refuse_nulls(values, "label", where)
    if is_string(values.type):
        return Labels(values.cast(pa.string()), names, where)
    if not pa.types.is_integer(values.type):
        example = such_as(values) if pa.types.is_floating(values.type) else ""
        text = "they must be integers or class names; --task regression learns numbers, --task segmentation masks"
        raise ValueError(f"labels of {where} are {values.type}{example}: {text}")
    try:
        return Labels(values.cast(pa.int64()), None, where)
    except pa.ArrowInvalid as error:  # uint64 beyond int64
        raise ValueError(f"labels of {where} are out of range: {error}") from error


def number_classes(
    source: Mapping[SplitName, Labels],
) -> tuple[dict[SplitName, np.ndarray], tuple[str, ...], tuple[Note, ...]]:
    """Return the labels of each split, int64 [N] from 0 to num_classes - 1, the name of each class, and notes.

    The training split decides which classes there are. If it does not name them, they are the numbers up to its
    largest label. If another split names its classes too, its labels are matched by name, whatever their order. A
    split without labels is left out, with a note. Names are converted to Unicode's composed form (NFC).

    Raises:
        ValueError: for labels of no training class, for gaps between unnamed classes, and if there is only one class.
    """
    splits: dict[SplitName, Labels] = {}
    notes: list[Note] = []
    for name, labels in source.items():
        if labels.are_texts or labels.values.unique().to_pylist() != [UNLABELLED]:
            splits[name], composing = _composed(labels, name)
            notes += composing
        elif name == "train":
            where = labels.where or "the train split"
            raise ValueError(f"no example of {where} has a label: all {len(labels)} are -1 or null; give some")
        else:
            text = (
                f"the {name} split is left out, since none of its {len(labels)} examples has a label "
                f"(all are -1 or null): --data.ignored {name} leaves it unread"
            )
            notes.append(Note(text, is_warning=True))
    train = splits["train"]
    present = train.values.unique()
    if len(present) < 2:
        raise ValueError(
            f"all {len(train)} training examples of data.name are of class {present[0]}: at least two are needed"
        )
    names = train.names or _names(present)
    notes += _naming_notes(splits, names)
    return {name: _numbers(labels, train, names, name) for name, labels in splits.items()}, names, tuple(notes)


def _composed(labels: Labels, name: SplitName) -> tuple[Labels, tuple[Note, ...]]:
    """Convert a split's class names to Unicode's composed form, with a note if some were in another."""
    names, values = labels.names, labels.values
    old_names = {*(values.unique().to_pylist() if labels.are_texts else ()), *(names or ())}
    changed = sorted({_nfc(each) for each in old_names if _nfc(each) != each})
    if not changed:
        return labels, ()
    names = names and tuple(map(_nfc, names))
    if labels.are_texts:
        values = compute.call_function("utf8_normalize", [values], compute.Utf8NormalizeOptions("NFC"))
        names = names and tuple(dict.fromkeys(names))  # a dictionary may have both forms of a name
    examples = ", ".join(changed[:_MOST_LISTED])
    note = f"class names of the {name} split that Unicode writes in several ways are read as composed (NFC): {examples}"
    return Labels(values, names, labels.where), (Note(note),)


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _naming_notes(splits: Mapping[SplitName, Labels], names: tuple[str, ...]) -> Iterator[Note]:
    """Yield notes on class names that occur twice, and on splits that order or name their classes differently."""
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        yield Note(f"several classes have one name: {', '.join(duplicates[:_MOST_LISTED])}", is_warning=True)
    for name, labels in splits.items():
        if labels.are_texts or name == "train":
            continue
        if labels.names and labels.names != names:
            yield Note(f"the {name} split orders its classes unlike the train split: its labels are taken by name")
        if not labels.names and splits["train"].names:
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


def _numbers(labels: Labels, train: Labels, names: tuple[str, ...], name: SplitName) -> np.ndarray:
    """Return a split's labels as numbers of the training classes, whose names are `names`."""
    way_out = "" if name == "train" else f", or leave the split out with --data.ignored {name}"
    if labels.names and labels.names != names and (extra := sorted(set(labels.names) - set(names))):
        examples = ", ".join(extra[:_MOST_LISTED])
        unnamed = "" if train.names or train.are_texts else ", which has numbers only"
        raise ValueError(f"the {name} split has classes that the train split has not{unnamed}: {examples}")
    if labels.are_texts:
        numbers = places(labels.values, names)
        if not len(unknown := np.flatnonzero(numbers < 0)):
            return numbers
        text = labels.values[int(unknown[0])].as_py()
        if name == "train":
            raise ValueError(
                f"label {text} of the train split is not among the class names of its metadata: write them alike"
            )
        raise ValueError(f"class {text} of the {name} split is not in the train split{nearest(text, names) or way_out}")
    if not labels.names and train.are_texts:
        raise ValueError(f"labels of the train split are class names, those of the {name} split integers")
    numbers, class_names = labels.values.to_numpy(), labels.names or names
    wrong = np.flatnonzero((numbers < 0) | (numbers >= len(class_names)))
    if len(wrong):
        remedy = f": leave such rows out{way_out}" if numbers[wrong[0]] == UNLABELLED else ""
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
