"""The targets of every row of a source: classes, numbers or masks; and the task that learns them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from raysubset.config import DataConfig, TaskConfig
from raysubset.data.full_set import count_levels
from raysubset.data.labels import number_classes
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
    refuse_constant,
    strata_of_numbers,
)

_LOSSES = {"absolute_error": AbsoluteError(), "huber": Huber()}  # of numbers; all others are the squared error


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
            refuse_constant(train, self.names)
            mean, std = (tuple(values.tolist()) for values in (train.mean(axis=0), train.std(axis=0)))
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
            return {"target": task.standardised(values)}
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
