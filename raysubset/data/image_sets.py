"""Full sets of images: their targets, splits carved, images decoded or left where they lie."""

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
from raysubset.data.split import Split, SplitName
from raysubset.data.splitting import carve_splits
from raysubset.data.streamed import StreamedSplit, streaming_note
from raysubset.data.tables import usual_note
from raysubset.data.targets import Targets, mask_targets
from raysubset.events import Note
from raysubset.tasks import ImageInputs, fit_own_task

# Where a shifted or mirrored image shows the same thing: not digits.
_AUGMENTED_NAMES = ("cifar10", "cifar100")

_MOST_LISTED = 10  # classes named in one line


def of_images(read: Source, config: DataConfig, task: TaskConfig) -> FullSet:
    """The full set of images and what is learned of them.

    Where config.streamed, training images are decoded once, for their shape and statistics, and not held.

    Raises:
        ValueError: for images or targets that cannot be used, with the way out.
    """
    targets = _targets(read, config, task)
    source: Source = {name: split for name, split in read.items() if name in targets.values}
    rows, carving = carve_splits(targets.strata, config)
    decoded = decode_source(source, rows, config.image_size)
    source, scanned = _of_one_shape(decoded.splits), decoded.scan
    if targets.kind == "masks":
        targets = dataclasses.replace(targets, values=_masks_in_shape(targets.values, source))
    origins: dict[SplitName, SplitName] = {name: name if name in source else "train" for name in rows}
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
        grey_range=decoded.grey_range,
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


def _targets(read: Source, config: DataConfig, task: TaskConfig) -> Targets:
    """What the task learns of each split of the source; of classes, of those that have a label."""
    train = read["train"]
    if task.name == "classification" or task.is_class:
        return Targets("classes", *number_classes(read))
    if isinstance(train.targets, pa.ChunkedArray):
        raise ValueError(
            f"{config.name} has images with classes, and --task {task.name} learns something else: give data.name a "
            "Parquet or Arrow file with a column of numbers for regression, of masks for segmentation, or a function "
            'that returns arrays, {"image": …, "target": …} or {"image": …, "mask": …}'
        )
    values: dict[SplitName, np.ndarray] = {}
    for name, split in read.items():
        assert isinstance(split.targets, np.ndarray)
        values[name] = split.targets
        if split.target_names != train.target_names:
            names = " and ".join(map(some, (train.target_names, split.target_names)))
            raise ValueError(f"the train and the {name} split have other targets ({names}): set --data.target to one")
    notes = () if config.target else (usual_note(train.target_names[0]),)
    if task.name == "regression":
        return Targets("numbers", values, train.target_names, notes)
    return dataclasses.replace(mask_targets(values, task, config.name), notes=notes)


def _masks_in_shape(masks: Mapping[SplitName, np.ndarray], source: Source) -> dict[SplitName, np.ndarray]:
    """Masks of the height and width of their images, [N, H, W]; those of flat lists have the number of pixels."""
    shaped: dict[SplitName, np.ndarray] = {}
    for name, own in masks.items():
        height, width = source[name].decoded.shape[1:3]
        if own.shape[1:] not in ((height, width), (height * width,)):
            shape = "x".join(map(str, own.shape[1:]))
            raise ValueError(
                f"masks of the {name} split are {shape}, its images {height}x{width}: give a class for each pixel"
            )
        shaped[name] = own.reshape(-1, height, width)
    return shaped


def _lacking(labels: dict[SplitName, np.ndarray], class_names: tuple[str, ...]) -> Iterator[Note]:
    """Notes on splits that lack classes, with which."""
    for name, numbers in labels.items():
        absent = np.flatnonzero(np.bincount(numbers, minlength=len(class_names)) == 0)
        if len(absent):
            listed = ", ".join(class_names[number] for number in absent[:_MOST_LISTED])
            more = f" and {len(absent) - _MOST_LISTED} more" if len(absent) > _MOST_LISTED else ""
            yield Note(f"the {name} split has no example of class {listed}{more}", is_warning=True)


def _of_one_shape(source: Source) -> Source:
    """The source with grey splits repeated to three channels where another split has colours.

    Raises:
        ValueError: if the splits' images differ in height or width.
    """
    shapes = {name: split.decoded.shape[1:] for name, split in source.items()}
    if len({shape[:2] for shape in shapes.values()}) > 1:
        listed = ", ".join(f"{name} {shape[0]}x{shape[1]}" for name, shape in shapes.items())
        raise ValueError(f"the splits' images differ in shape ({listed}): give --data.image-size to resize them")
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
    """The values of one channel for each of so many, unless there are as many already."""
    return values if values.shape[axis] == channels else np.repeat(values, channels, axis=axis)


def _images(source: SourceSplit, rows: np.ndarray, kept: np.ndarray | None) -> np.ndarray:
    """Images of some of the source's rows, in memory of their own unless it is all of them.

    Args:
        kept: the images of these rows, uint8 [n, H, W, 1 or C], where the source's are streamed.
    """
    if kept is not None:
        return _repeated(kept, source.decoded.shape[3], axis=3)
    assert isinstance(source.images, np.ndarray)
    return source.images if len(rows) == len(source.images) else source.images[rows]


def _columns(source: SourceSplit, rows: np.ndarray) -> dict[str, pa.Array]:
    # take() copies: a slice's buffers would bring the whole column along when the table is pickled.
    return {name: column.take(pa.array(rows)).combine_chunks() for name, column in source.columns.items()}
