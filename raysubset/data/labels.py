"""Labels of a source, integers or names, made 0 to num_classes - 1 alike in every split."""

import numpy as np
import pyarrow as pa

from raysubset.config import nearest
from raysubset.data.sources import Source, SourceSplit
from raysubset.data.split import SplitName


def as_labels(values: pa.ChunkedArray, where: str) -> tuple[pa.ChunkedArray, tuple[str, ...] | None]:
    """Return labels as int64 or as strings, with the class names in a dictionary's order if they have one.

    There is one label at least.

    Raises:
        ValueError: for a null, or anything but integers and strings.
    """
    names = None
    if pa.types.is_dictionary(values.type):
        if _is_string(values.type.value_type):
            names = tuple(values.unify_dictionaries().chunk(0).dictionary.to_pylist())
        values = values.cast(values.type.value_type)
    if values.null_count:
        row = values.is_null().index(True).as_py()
        raise ValueError(f"the label in row {row} of {where} is null: leave such rows out")
    if _is_string(values.type):
        return values.cast(pa.string()), names
    if not pa.types.is_integer(values.type):
        found = f"{values.type}, such as {values[0].as_py()!r}"
        raise ValueError(f"labels of {where} are {found}: they must be integers or class names")
    try:
        return values.cast(pa.int64()), None
    except pa.ArrowInvalid as error:  # uint64 beyond int64
        raise ValueError(f"labels of {where} are out of range: {error}") from error


def number_classes(source: Source) -> tuple[dict[SplitName, np.ndarray], tuple[str, ...]]:
    """Return the labels of each split, int64 [N] from 0 to num_classes - 1, and the name of each class.

    The training split decides what classes there are. Without names they are those up to its largest label.

    Raises:
        ValueError: for labels that no class of the training split has, gaps between unnamed classes, or one class only.
    """
    train = source["train"]
    present = train.labels.unique()
    if len(present) < 2:
        raise ValueError(
            f"all {len(train.labels)} training examples of data.name are of class {present[0]}: at least two are needed"
        )
    names = train.class_names or _names(present)
    for name, split in source.items():
        if _is_string(train.labels.type) and not _is_string(split.labels.type):
            raise ValueError(f"labels of the train split are class names, those of the {name} split integers")
    return {name: _numbers(split, names, name) for name, split in source.items()}, names


def _names(labels: pa.Array) -> tuple[str, ...]:
    """Names of classes that the source leaves unnamed, from their distinct labels."""
    present = labels.sort().to_pylist()
    if _is_string(labels.type):
        return tuple(present)
    if present[0] < 0:
        raise ValueError(
            f"label {present[0]} of the train split is negative: labels must run from 0 to num_classes - 1"
        )
    gap = next((number for number, label in enumerate(present) if number != label), None)
    if gap is not None:
        raise ValueError(
            f"training labels run from {present[0]} to {present[-1]} but none is {gap}: "
            "number the classes from 0 without gaps, or use class names as labels"
        )
    return tuple(map(str, present))


def _numbers(split: SourceSplit, names: tuple[str, ...], name: SplitName) -> np.ndarray:
    labels = split.labels
    if split.class_names and set(split.class_names) - set(names):
        extra = sorted(set(split.class_names) - set(names))
        raise ValueError(f"the {name} split has classes that the train split has not: {', '.join(extra[:5])}")
    if _is_string(labels.type):
        positions = {each: number for number, each in enumerate(names)}
        found = labels.to_pylist()
        unknown = next((label for label in found if label not in positions), None)
        if unknown is not None:
            raise ValueError(f"class {unknown} of the {name} split is not in the train split{nearest(unknown, names)}")
        return np.array([positions[label] for label in found], dtype=np.int64)
    numbers = labels.to_numpy()
    wrong = np.flatnonzero((numbers < 0) | (numbers >= len(names)))
    if len(wrong):
        raise ValueError(
            f"label {numbers[wrong[0]]} in row {wrong[0]} of the {name} split is out of range: "
            f"the train split's {len(names)} classes have labels 0 to {len(names) - 1}"
        )
    if split.class_names and split.class_names != names:
        raise ValueError(f"the {name} split orders its classes unlike the train split: write them alike")
    return numbers


def _is_string(type_: pa.DataType) -> bool:
    return pa.types.is_string(type_) or pa.types.is_large_string(type_)
