"""Builds full sets of images: carves splits, decodes, gives all one shape, fits the task on training rows."""

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa

from raysubset.config import DataConfig, TaskConfig
from raysubset.data.decoding import decode_source
from raysubset.data.findings import level_notes
from raysubset.data.full_set import FullSet, count_levels, statistics_of_levels
from raysubset.data.labels import number_classes
from raysubset.data.layout import some
from raysubset.data.row_groups import ImageGroups
from raysubset.data.sources import Source, SourceSplit
from raysubset.data.split import Split, SplitName, carve_splits, origin_of
from raysubset.data.streamed import StreamedSplit, streaming_note
from raysubset.data.tables import usual_note
from raysubset.data.targets import Targets, mask_in_row, mask_targets
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
    decoded, scanned, grey_range = decode_source(source, rows, config.image_size)
    source = _of_one_shape(decoded)
    if targets.kind == "masks":
        targets = dataclasses.replace(targets, values=_masks_in_shape(targets.values, source))
    origins: dict[SplitName, SplitName] = {name: origin_of(name, source) for name in rows}
    images = {
        name: _images(source[origins[name]], rows[name], scanned.kept.get(name) if scanned else None)
        for name in rows
        if name != "train" or scanned is None
    }
    height, width, channels = source["train"].decoded.shape[1:]
    levels = _repeated(scanned.levels, channels, axis=0) if scanned else count_levels(images["train"])
    mean, std = statistics_of_levels(levels)
    cropped = config.augmentation == "crop_flip" or (config.augmentation == "auto" and config.name in _AUGMENTED_NAMES)
    inputs = ImageInputs(
        image_shape=(height, width, channels),
        mean=mean,
        std=std,
        augmentation="crop_flip" if cropped else "none",
        grey_range=grey_range,
    )
    learned = targets.task(inputs, targets.values["train"][rows["train"]], task)

    def build(name: SplitName, **held: np.ndarray) -> Split:
        tensors = held | targets.stored(origins[name], rows[name], learned)
        return Split.from_arrays(tensors, rows[name], _columns(source[origins[name]], rows[name]))

    validation, test = (build(name, image=images[name]) for name in ("validation", "test"))
    notes = [*(note for split in source.values() for note in split.notes), *targets.notes, *carving]
    if targets.kind == "classes":
        notes += _lacking({name: targets.values[origins[name]][rows[name]] for name in rows}, targets.names)
    if scanned is None:
        train = build("train", image=images["train"])
    else:
        groups = source["train"].images
        assert isinstance(groups, ImageGroups)
        train = StreamedSplit(build("train"), groups)
        notes.append(streaming_note(train, validation.num_bytes + test.num_bytes))
    notes += level_notes(levels, has_rounded=source["train"].findings.has_rounded)
    full_set = FullSet(config.name, train, validation, test, learned, tuple(notes))
    if not task.is_class:
        return full_set
    if scanned is not None:
        raise ValueError(f"{task.name} is fitted on training rows, and data.streamed holds none: leave it out")
    return dataclasses.replace(full_set, task=fit_own_task(task.name, train.arrays()))


def _targets_of_images(source: Source, config: DataConfig, task: TaskConfig) -> Targets:
    """Return the targets of each split of the source. Splits without labels of classes are left out."""
    train = source["train"]
    if task.name == "classification" or task.is_class:
        labels: dict[SplitName, pa.ChunkedArray] = {}
        for name, split in source.items():
            assert isinstance(split.targets, pa.ChunkedArray)
            labels[name] = split.targets
        return Targets("classes", *number_classes(labels))
    if isinstance(train.targets, pa.ChunkedArray):
        raise ValueError(
            f"{config.name} has images with classes, and --task {task.name} learns something else: give data.name a "
            "Parquet or Arrow file with a column of numbers for regression, of masks for segmentation, a folder of "
            'images/ and masks/, or a function of arrays, {"image": …, "target": …} or {"image": …, "mask": …}'
        )
    values: dict[SplitName, np.ndarray] = {}
    for name, split in source.items():
        assert isinstance(split.targets, np.ndarray)
        values[name] = split.targets
        if split.target_names != train.target_names:
            names = " and ".join(map(some, (train.target_names, split.target_names)))
            raise ValueError(f"the train and the {name} split have other targets ({names}): set --data.target to one")
    notes = () if config.target or not train.target_names else (usual_note(train.target_names[0]),)
    if task.name == "regression":
        return Targets("numbers", values, train.target_names, notes)

    def mask_name(split: SplitName, row: int) -> str:
        files = source[split].columns.get("file")
        return f"the mask of {files[row]}" if files and source[split].target_names == () else mask_in_row(split, row)

    targets = mask_targets(values, task, config.name, mask_name)
    return dataclasses.replace(targets, notes=(*notes, *targets.notes))


def _masks_in_shape(masks: Mapping[SplitName, np.ndarray], source: Source) -> dict[SplitName, np.ndarray]:
    """Reshape masks to [N, H, W] with the height and width of their images. Masks of flat lists are [N, H * W]."""
    shaped: dict[SplitName, np.ndarray] = {}
    for name, values in masks.items():
        height, width = source[name].decoded.shape[1:3]
        if values.shape[1:] not in ((height, width), (height * width,)):
            shape = "x".join(map(str, values.shape[1:]))
            raise ValueError(
                f"masks of the {name} split are {shape}, its images {height}x{width}: give a class for each pixel"
            )
        shaped[name] = values.reshape(-1, height, width)
    return shaped


def _lacking(labels: dict[SplitName, np.ndarray], class_names: tuple[str, ...]) -> Iterator[Note]:
    """Yield a note on each split without examples of some classes."""
    for name, numbers in labels.items():
        absent = np.flatnonzero(np.bincount(numbers, minlength=len(class_names)) == 0)
        if len(absent):
            examples = listed([class_names[number] for number in absent], most=_MOST_LISTED)
            yield Note(f"the {name} split has no example of class {examples}", is_warning=True)


def _of_one_shape(source: Source) -> Source:
    """Repeat grey splits to three channels if another split has colours.

    Raises:
        ValueError: if the splits' images differ in height or width.
    """
    shapes = {name: split.decoded.shape[1:] for name, split in source.items()}
    if len({shape[:2] for shape in shapes.values()}) > 1:
        summary = ", ".join(f"{name} {shape[0]}x{shape[1]}" for name, shape in shapes.items())
        raise ValueError(f"the splits' images differ in shape ({summary}): give --data.image-size to resize them")
    channels = max(shape[2] for shape in shapes.values())
    return {name: split if shapes[name][2] == channels else _coloured(name, split) for name, split in source.items()}


def _coloured(name: SplitName, split: SourceSplit) -> SourceSplit:
    note = f"the {name} split is grey, others have colours: repeated to three channels"
    if isinstance(images := split.decoded, ImageGroups):
        images = dataclasses.replace(images, image_shape=(*images.shape[1:3], 3))
    else:
        images = np.repeat(images, 3, axis=3)
    return dataclasses.replace(split, images=images, notes=(*split.notes, Note(note)))


def _repeated(values: np.ndarray, channels: int, *, axis: int) -> np.ndarray:
    """Repeat the values of one channel to `channels`, unless there are as many already."""
    return values if values.shape[axis] == channels else np.repeat(values, channels, axis=axis)


def _images(source: SourceSplit, rows: np.ndarray, kept: np.ndarray | None) -> np.ndarray:
    """Return the images of the source's rows, copied unless these are all of them.

    Args:
        kept: the images of these rows, uint8 [n, H, W, 1 or C], if the source's are streamed.
    """
    if kept is not None:
        return _repeated(kept, source.decoded.shape[3], axis=3)
    assert isinstance(source.images, np.ndarray)
    return source.images if len(rows) == len(source.images) else source.images[rows]


def _columns(source: SourceSplit, rows: np.ndarray) -> dict[str, pa.Array]:
    # take() copies: pickling a slice would include the buffers of the whole column.
    return {name: column.take(pa.array(rows)).combine_chunks() for name, column in source.columns.items()}
