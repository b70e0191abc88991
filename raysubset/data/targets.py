"""The targets of every row of a source, classes, numbers or masks, and the task that learns them.

Classes are numbered from 0 to num_classes - 1, alike in every split: integers, truth values or names. A dictionary of
names has an order of its own, as the class names in a file's metadata do: see named_labels().
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from pyarrow import compute

from raysubset.config import DataConfig, TaskConfig, nearest
from raysubset.data.full_set import count_levels
from raysubset.data.image_columns import refuse_nulls
from raysubset.data.split import SplitName
from raysubset.events import Note
from raysubset.tasks import (
    AbsoluteError,
    Classification,
    CrossEntropy,
    Huber,
    ImageInputs,
    Regression,
    Segmentation,
    SquaredError,
    TableInputs,
    Task,
    TensorInputs,
    balanced_weights,
    scales_of_targets,
    strata_of_numbers,
)
from raysubset.tasks.column_values import alike_but_for_case, is_string, places, such_as

_LOSSES = {"absolute_error": AbsoluteError(), "huber": Huber()}  # of numbers; all others are the squared error


UNLABELLED = -1  # stands for a missing label, as in the `datasets` library

_MOST_INTEGERS = 100  # different integers with gaps that are read as the names of classes


@dataclass(frozen=True)
class Targets:
    """The targets of every row of the source's splits."""

    kind: Literal["classes", "numbers", "masks"]
    values: dict[SplitName, np.ndarray]  # classes: int64 [N]; numbers: float64 [N, K]; masks: uint8 [N, …]
    names: tuple[str, ...]  # of the classes, or of the numbers
    notes: tuple[Note, ...] = ()

    @property
    def strata(self) -> dict[SplitName, np.ndarray]:
        """The stratum of each example of each split, int64 [N]."""
        if self.kind == "classes":
            return self.values
        if self.kind == "masks":
            return alike(self.values)
        return {split: strata_of_numbers(values) for split, values in self.values.items()}

    def task(self, inputs: ImageInputs | TableInputs | TensorInputs, train: np.ndarray, config: TaskConfig) -> Task:
        """Build the task that learns these targets from the inputs, given the training rows' values."""
        if self.kind == "numbers":
            mean, std = (tuple(values.tolist()) for values in scales_of_targets(train, self.names))
            return Regression(inputs, self.names, mean, std, _LOSSES.get(config.loss, SquaredError()))
        if self.kind == "classes" and config.loss == "squared_error":
            return Classification(inputs, self.names, SquaredError(is_one_hot=True))
        ignored = config.ignored if self.kind == "masks" else None
        weights = None
        if config.class_weights == "balanced":
            counted = train.ravel() if ignored is None else train[train != ignored]
            weights = balanced_weights(counted, len(self.names))
        objective = CrossEntropy(config.label_smoothing, ignored=ignored, class_weights=weights)
        if self.kind == "classes":
            return Classification(inputs, self.names, objective)
        assert isinstance(inputs, ImageInputs)
        return Segmentation(inputs, self.names, ignored, objective)

    def stored(self, split: SplitName, rows: np.ndarray, task: Task) -> dict[str, np.ndarray]:
        """Return the column of targets that a split stores for some rows, by its name."""
        values = self.values[split][rows]
        if isinstance(task, Regression):
            return {"target": task.standardised(values, where=f"the {split} split", rows=rows)}
        return {"mask" if self.kind == "masks" else "label": np.ascontiguousarray(values)}


def class_targets(labels: Mapping[SplitName, pa.ChunkedArray], config: DataConfig, task: TaskConfig) -> Targets:
    """Number the classes of images as number_classes() does, which see.

    Raises:
        ValueError: also if the task learns something else.
    """
    if task.name != "classification" and not task.is_class:
        raise ValueError(
            f"{config.name} has images with classes, and --task {task.name} learns something else: give data.name "
            "a Parquet or Arrow file with a column of numbers for regression, of masks for segmentation, a folder "
            'of images/ and masks/, or a function of arrays, {"image": …, "target": …} or {"image": …, "mask": …}'
        )
    return Targets("classes", *number_classes(labels))


def mask_in_row(split: SplitName, row: int) -> str:
    """Return a mask's name in messages."""
    return f"the mask in row {row} of the {split} split"


def mask_targets(
    masks: Mapping[SplitName, np.ndarray],
    names: Sequence[str],
    task: TaskConfig,
    where: str,
    name: Callable[[SplitName, int], str] = mask_in_row,
) -> Targets:
    """Read masks as targets: classes from 0 to the largest in training masks, and perhaps an ignored value.

    Black and white masks, which hold only 0 and 255, become the classes 0 and 1, with a note.

    Args:
        masks: integers [N, …] for each split.
        names: the columns of masks, of which there may be one.
        where: the name of the source in messages.
        name: returns the name in messages of a split's mask in some row.

    Raises:
        ValueError: for several columns, values that are no classes, classes that no training mask has, and if there
            is only one class.
    """
    if len(names) > 1:
        raise ValueError(f"segmentation learns one column of masks, not {', '.join(names)}: set --data.target to one")
    values: dict[SplitName, np.ndarray] = {}
    classes: dict[SplitName, np.ndarray] = {}
    notes: tuple[Note, ...] = ()
    if task.ignored is None and _are_black_and_white(masks):
        masks = {split: numbers // 255 for split, numbers in masks.items()}
        notes = (Note("masks hold 0 and 255 alone: 255 is read as class 1"),)
    for split, numbers in masks.items():
        if numbers.dtype.kind not in "iub":
            raise ValueError(f"masks of the {split} split are {numbers.dtype}: give the number of each pixel's class")
        counted = numbers if task.ignored is None else numbers[numbers != task.ignored]
        if counted.size and not 0 <= counted.min() <= counted.max() < 255:
            wrong = counted[(counted < 0) | (counted > 254)][0]
            row = _first_row(numbers == wrong)
            raise ValueError(
                f"{name(split, row)} has {wrong}: 0 to 254 are classes; number them so, and name "
                "one value of 0 to 255 that counts nowhere with --task.ignored"
            )
        values[split] = numbers.astype(np.uint8, copy=False)
        present = np.flatnonzero(count_levels(values[split].reshape(len(numbers), -1, 1, 1))[0])
        classes[split] = present if task.ignored is None else present[present != task.ignored]
    largest = int(classes["train"].max(initial=0))
    if not largest:
        raise ValueError(f"all pixels of {where}'s training masks are of class 0: at least two classes are needed")
    for split, present in classes.items():
        if len(unknown := np.setdiff1d(present, classes["train"])):
            row = _first_row(values[split] == unknown[0])
            raise ValueError(
                f"{name(split, row)} has class {unknown[0]}, which no training mask has: leave the split out with "
                f"--data.ignored {split}, or give masks whose classes training has"
            )
    return Targets("masks", values, tuple(map(str, range(largest + 1))), notes)


def _are_black_and_white(masks: Mapping[SplitName, np.ndarray]) -> bool:
    """Return True if masks hold no values but 0 and 255, and at least one 255."""
    if max(int(numbers.max(initial=0)) for numbers in masks.values()) != 255:
        return False
    return all(bool(((numbers == 0) | (numbers == 255)).all()) for numbers in masks.values())


def _first_row(matches: np.ndarray) -> int:
    """Return the first row of bool [N, …] with a true value."""
    return int(np.flatnonzero(matches.reshape(len(matches), -1).any(axis=1))[0])


def alike(values: Mapping[SplitName, np.ndarray]) -> dict[SplitName, np.ndarray]:
    """Put all examples of each split into one stratum."""
    return {split: np.zeros(len(each), dtype=np.int64) for split, each in values.items()}


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
        is_integer = pa.types.is_integer(values.type)
        if values.null_count == len(values) or (is_integer and values.unique().to_pylist() == [UNLABELLED]):
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
    if pair := alike_but_for_case(names):
        notes.append(Note(f"classes {pair} differ in white space or case alone, and are two classes", is_warning=True))
    numbers: dict[SplitName, np.ndarray] = {name: places(values, names) for name, values in texts.items()}
    for name, values in texts.items():
        if len(unknown := np.flatnonzero(numbers[name] < 0)):
            text = values[int(unknown[0])].as_py()
            raise ValueError(
                f"class {text} in row {unknown[0]} of the {name} split is not in the train split: leave such rows out, "
                f"or the split with --data.ignored {name}{nearest(text, names)}"
            )
    return numbers, names, (*notes, *naming)


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
