"""Numbers the labels of a source from 0 to num_classes - 1, alike in every split: integers, truth values or names.

A dictionary of names has an order of its own, as the class names in a file's metadata do: see named_labels().
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
from pyarrow import compute

from raysubset.config import nearest
from raysubset.data.image_columns import refuse_nulls
from raysubset.data.split import SplitName
from raysubset.events import Note
from raysubset.tasks.columns import is_string, places, such_as

UNLABELLED = -1  # stands for a missing label, as in the `datasets` library

_MOST_INTEGERS = 100  # different integers with gaps that are read as the names of classes


def named_labels(numbers: np.ndarray, names: Sequence[str], where: str) -> pa.ChunkedArray:
    """Return labels, int [N], that are numbers of `names` as a dictionary of these names, with nulls for UNLABELLED.

    A name that several classes have becomes one for each, with its number: "crane (134)".

    Raises:
        ValueError: for a number without a name.
    """
    wrong = np.flatnonzero((numbers < UNLABELLED) | (numbers >= len(names)))
    if len(wrong):
        raise ValueError(
            f"label {numbers[wrong[0]]} in row {wrong[0]} of {where} is out of range: {len(names)} are named"
        )
    counts = Counter(names)
    unique = [name if counts[name] == 1 else f"{name} ({number})" for number, name in enumerate(names)]
    indices = pa.array(numbers, pa.int64(), mask=numbers == UNLABELLED)
    return pa.chunked_array([pa.DictionaryArray.from_arrays(indices, pa.array(unique, pa.string()))])


def number_classes(
    source: Mapping[SplitName, pa.ChunkedArray],
) -> tuple[dict[SplitName, np.ndarray], tuple[str, ...], tuple[Note, ...]]:
    """Return the labels of each split, int64 [N] from 0 to num_classes - 1, the name of each class, and notes.

    The training split decides which classes there are. They are in the order of its dictionary, or else ascending. The
    labels of other splits are matched by name; integers are names, too. A split without labels is left out, with a
    note. Names are converted to Unicode's composed form (NFC).

    Raises:
        ValueError: for a null among other labels, numbers that are no classes, labels of no training class, and if
            there is only one class.
    """
    texts: dict[SplitName, pa.ChunkedArray] = {}
    notes: list[Note] = []
    for name, values in source.items():
        if not _has_labels(values):
            if name == "train":
                raise ValueError(f"none of the {len(values)} examples of the train split has a label: give some")
            text = (
                f"the {name} split is left out, since none of its {len(values)} examples has a label: --data.ignored "
                f"{name} leaves it unread"
            )
            notes.append(Note(text, is_warning=True))
        else:
            texts[name] = _as_texts(values, f"the {name} split")
    present = texts["train"].unique()
    if len(present) < 2:
        raise ValueError(
            f"all {len(texts['train'])} training examples of data.name are of class {present[0]}: at least two are "
            "needed"
        )
    names, naming = _class_names(source["train"], present)
    numbers: dict[SplitName, np.ndarray] = {name: places(values, names) for name, values in texts.items()}
    for name, values in texts.items():
        if len(unknown := np.flatnonzero(numbers[name] < 0)):
            text = values[int(unknown[0])].as_py()
            raise ValueError(
                f"class {text} in row {unknown[0]} of the {name} split is not in the train split: leave such rows out, "
                f"or the split with --data.ignored {name}{nearest(text, names)}"
            )
    return numbers, names, (*notes, *naming)


def _has_labels(values: pa.ChunkedArray) -> bool:
    if values.null_count == len(values):
        return False
    return not pa.types.is_integer(values.type) or values.unique().to_pylist() != [UNLABELLED]


def _as_texts(values: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    if pa.types.is_dictionary(values.type):
        values = pa.chunked_array([chunk.dictionary_decode() for chunk in values.chunks])
    refuse_nulls(values, "label", where)
    if not (is_string(values.type) or pa.types.is_integer(values.type) or pa.types.is_boolean(values.type)):
        example = such_as(values) if pa.types.is_floating(values.type) else ""
        text = "they must be integers or class names; --task regression learns numbers, --task segmentation masks"
        raise ValueError(f"labels of {where} are {values.type}{example}: {text}")
    return _composed(values.cast(pa.string()))


def _composed(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    return compute.call_function("utf8_normalize", [texts], compute.Utf8NormalizeOptions("NFC"))


def _class_names(labels: pa.ChunkedArray, present: pa.Array) -> tuple[tuple[str, ...], tuple[Note, ...]]:
    """Return the names of the training split's classes in their order, and a note on those that may be none.

    Args:
        labels: as the source stores them.
        present: the distinct names among them.
    """
    is_dictionary = pa.types.is_dictionary(labels.type)
    kind = labels.type.value_type if is_dictionary else labels.type
    if is_dictionary and is_string(kind):
        dictionaries = pa.chunked_array([chunk.dictionary.cast(pa.string()) for chunk in labels.chunks])
        return tuple(_composed(dictionaries.drop_null()).unique().to_pylist()), ()
    if not pa.types.is_integer(kind):
        return tuple(sorted(present.to_pylist())), ()
    integers = sorted(map(int, present.to_pylist()))
    is_plain = integers == list(range(len(integers)))
    if not is_plain and len(integers) > min(_MOST_INTEGERS, len(labels) // 2):
        raise ValueError(
            f"labels of the train split are {len(integers)} different integers in {len(labels)} rows, from "
            f"{integers[0]} to {integers[-1]}: use --task regression, or number classes from 0 without gaps"
        )
    notes = ()
    if integers == list(range(UNLABELLED, len(integers) - 1)) and len(integers) > 2:
        text = "label -1 is read as a class of its own: leave such rows out if it means that they have no label"
        notes = (Note(text, is_warning=True),)
    return tuple(map(str, integers)), notes
