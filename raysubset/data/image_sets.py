"""Builds full sets of images: carves splits, decodes, gives all one shape, fits the task on training rows."""

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa

from raysubset.config import DataConfig, TaskConfig
from raysubset.data.decoding import decode_source
from raysubset.data.full_set import FullSet, statistics_of_levels
from raysubset.data.labels import number_classes
from raysubset.data.sources import Source
from raysubset.data.split import Split, SplitName, carve_splits, origin_of
from raysubset.data.streamed import StreamedSplit, streaming_notes
from raysubset.data.targets import Targets, mask_targets
from raysubset.errors import listed
from raysubset.events import Note
from raysubset.tasks import ImageInputs, fit_own_task

# The sets in which a shifted or mirrored image shows the same thing; digits do not.
_AUGMENTED_NAMES = ("cifar10", "cifar100")

_MOST_LISTED = 10  # classes named in one message


def of_images(source: Source, config: DataConfig, task: TaskConfig, targets: Targets | None = None) -> FullSet:
    """Build the full set of images and their targets, which the source has if they are not given.

    If config.streamed, training images are decoded once, for their shape and statistics, and not kept in memory.

    Raises:
        ValueError: for images or targets that cannot be used, with the way out.
    """
    targets = targets or _targets_of_images(source, config, task)
    source = {name: split for name, split in source.items() if name in targets.values}
    rows, carving = carve_splits(targets.strata, config)
    decoded = decode_source(source, rows, config.image_size)
    height, width, _ = decoded.image_shape
    if targets.kind == "masks":
        targets = dataclasses.replace(targets, values=_masks_in_shape(targets.values, height, width))
    mean, std = statistics_of_levels(decoded.levels)
    cropped = config.augmentation == "crop_flip" or (config.augmentation == "auto" and config.name in _AUGMENTED_NAMES)
    inputs = ImageInputs(
        image_shape=decoded.image_shape,
        mean=mean,
        std=std,
        augmentation="crop_flip" if cropped else "none",
        grey_range=decoded.grey_range,
    )
    learned = targets.task(inputs, targets.values["train"][rows["train"]], task)
    splits: dict[SplitName, Split] = {}
    for name in rows:
        origin = origin_of(name, source)
        tensors = {"image": decoded.images[name]} if name in decoded.images else {}
        # take() copies: pickling a slice would include the buffers of the whole column.
        columns = source[origin].columns.items()
        columns = {column: values.take(pa.array(rows[name])).combine_chunks() for column, values in columns}
        splits[name] = Split.from_arrays(tensors | targets.stored(origin, rows[name], learned), rows[name], columns)
    train, validation, test = splits["train"], splits["validation"], splits["test"]
    notes = [*(note for split in source.values() for note in split.notes), *targets.notes, *carving, *decoded.notes]
    if targets.kind == "classes":
        notes += _lacking({name: split.arrays()["label"] for name, split in splits.items()}, targets.names)
    if decoded.groups is not None:
        train = StreamedSplit(train, decoded.groups)
        notes += streaming_notes(train, validation.num_bytes + test.num_bytes)
    full_set = FullSet(config.name, train, validation, test, learned, tuple(notes))
    if not task.is_class:
        return full_set
    if decoded.groups is not None:
        raise ValueError(f"{task.name} is fitted on training rows, and data.streamed holds none: leave it out")
    return dataclasses.replace(full_set, task=fit_own_task(task.name, train.arrays()))


def _targets_of_images(source: Source, config: DataConfig, task: TaskConfig) -> Targets:
    """Return the targets of each split of the source. Splits without labels of classes are left out."""
    if task.name == "classification" or task.is_class:
        labels: dict[SplitName, pa.ChunkedArray] = {}
        for name, split in source.items():
            assert isinstance(split.targets, pa.ChunkedArray)
            labels[name] = split.targets
        return Targets("classes", *number_classes(labels))
    masks: dict[SplitName, np.ndarray] = {}
    for name, split in source.items():
        if not isinstance(split.targets, np.ndarray):
            raise ValueError(
                f"{config.name} has images with classes, and --task {task.name} learns something else: give data.name "
                "a Parquet or Arrow file with a column of numbers for regression, of masks for segmentation, a folder "
                'of images/ and masks/, or a function of arrays, {"image": …, "target": …} or {"image": …, "mask": …}'
            )
        masks[name] = split.targets

    def mask_name(split: SplitName, row: int) -> str:
        return f"the mask of {source[split].columns['file'][row]}"

    return mask_targets(masks, ("mask",), task, config.name, mask_name)


def _masks_in_shape(masks: Mapping[SplitName, np.ndarray], height: int, width: int) -> dict[SplitName, np.ndarray]:
    """Reshape masks to [N, H, W], with the height and width of the images. Masks of flat lists are [N, H * W]."""
    for name, values in masks.items():
        if values.shape[1:] not in ((height, width), (height * width,)):
            shape = "x".join(map(str, values.shape[1:]))
            raise ValueError(
                f"masks of the {name} split are {shape}, its images {height}x{width}: give a class for each pixel; "
                "--data.image-size resizes only encoded masks with their images"
            )
    return {name: values.reshape(-1, height, width) for name, values in masks.items()}


def _lacking(labels: dict[SplitName, np.ndarray], class_names: tuple[str, ...]) -> Iterator[Note]:
    """Yield a note on each split without examples of some classes."""
    for name, numbers in labels.items():
        absent = np.flatnonzero(np.bincount(numbers, minlength=len(class_names)) == 0)
        if len(absent):
            examples = listed([class_names[number] for number in absent], most=_MOST_LISTED)
            yield Note(f"the {name} split has no example of class {examples}", is_warning=True)
