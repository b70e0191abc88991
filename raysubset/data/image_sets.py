"""Full sets of images and their classes: classes numbered, splits carved, images decoded or left where they lie."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from raysubset.config import DataConfig, TaskConfig
from raysubset.data.decoding import decode_source
from raysubset.data.findings import level_notes
from raysubset.data.full_set import FullSet, count_levels, statistics_of_levels
from raysubset.data.labels import number_classes
from raysubset.data.row_groups import RowGroups
from raysubset.data.sources import Source, SourceSplit
from raysubset.data.split import Split, SplitName
from raysubset.data.splitting import carve_splits
from raysubset.data.streamed import StreamedSplit
from raysubset.events import Note
from raysubset.tasks import ImageInputs, classification, fit_own_task

# Where a shifted or mirrored image shows the same thing: not digits.
_AUGMENTED_NAMES = ("cifar10", "cifar100")

_MOST_LISTED = 10  # classes named in one line


def of_images(read: Source, config: DataConfig, task: TaskConfig) -> FullSet:
    """The full set of images and their classes.

    Where config.streamed, training images are decoded once, for their shape and statistics, and not held.

    Raises:
        ValueError: for images or labels that cannot be used, with the way out.
    """
    if task.name not in ("classification", "auto") and not task.is_class:
        raise ValueError(
            f"{config.name} has images with classes, and --task {task.name} learns something else: give data.name a "
            'function that returns arrays, {"image": …, "target": …} for regression, {"image": …, "mask": …} for '
            "segmentation"
        )
    labels, class_names, naming = number_classes(read)
    source: Source = {name: split for name, split in read.items() if name in labels}
    rows, carving = carve_splits(labels, config)
    decoded = decode_source(source, rows, config.image_size)
    source, scanned = _of_one_shape(decoded.splits), decoded.scan

    def build(name: SplitName) -> Split:
        origin: SplitName = name if name in source else "train"
        kept = scanned.kept.get(name) if scanned else None
        return _build(source[origin], labels[origin], rows[name], kept)

    validation, test = build("validation"), build("test")
    notes = [*(note for split in source.values() for note in split.notes), *naming, *carving]
    notes += _lacking({name: labels[name if name in source else "train"][rows[name]] for name in rows}, class_names)
    if scanned is None:
        train = build("train")
        levels = count_levels(train.arrays()["image"])
    else:
        groups, own = source["train"].images, rows["train"]
        assert isinstance(groups, RowGroups)
        held = Split.from_arrays({"label": labels["train"][own]}, own, _columns(source["train"], own))
        train = StreamedSplit(held, groups)
        levels = _repeated(scanned.levels, train.image_shape[2], axis=0)
        notes.append(_streaming_note(train, validation.num_bytes + test.num_bytes))
    notes += level_notes(levels, has_rounded=source["train"].findings.has_rounded)
    mean, std = statistics_of_levels(levels)
    height, width, channels = train.shapes["image"] if isinstance(train, Split) else train.image_shape
    cropped = config.augmentation == "crop_flip" or (config.augmentation == "auto" and config.name in _AUGMENTED_NAMES)
    inputs = ImageInputs(
        image_shape=(height, width, channels),
        mean=mean,
        std=std,
        augmentation="crop_flip" if cropped else "none",
        grey_range=decoded.grey_range,
    )
    learned = classification(inputs, class_names, task, train.arrays()["label"])
    full_set = FullSet(config.name, train, validation, test, learned, tuple(notes))
    if not task.is_class:
        return full_set
    if scanned is not None:
        raise ValueError(f"{task.name} is fitted on training rows, and data.streamed holds none: leave it out")
    return dataclasses.replace(full_set, task=fit_own_task(task.name, train.arrays()))


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
    if isinstance(images := split.decoded, RowGroups):
        images = dataclasses.replace(images, image_shape=(*images.shape[1:3], 3))
    else:
        images = np.repeat(images, 3, axis=3)
    return dataclasses.replace(split, images=images, notes=(*split.notes, Note(note)))


def _repeated(values: np.ndarray, channels: int, *, axis: int) -> np.ndarray:
    """The values of one channel for each of so many, unless there are as many already."""
    return values if values.shape[axis] == channels else np.repeat(values, channels, axis=axis)


def _build(source: SourceSplit, labels: np.ndarray, rows: np.ndarray, kept: np.ndarray | None) -> Split:
    """A split of some of the source's rows, in memory of its own unless it is all of them.

    Args:
        kept: the images of these rows, uint8 [n, H, W, 1 or C], where the source's are streamed.
    """
    if kept is not None:
        images, labels = _repeated(kept, source.decoded.shape[3], axis=3), labels[rows]
    else:
        assert isinstance(source.images, np.ndarray)
        is_whole = len(rows) == len(labels)
        images = source.images if is_whole else source.images[rows]
        labels = np.ascontiguousarray(labels) if is_whole else labels[rows]
    return Split.from_arrays({"image": images, "label": labels}, rows, _columns(source, rows))


def _columns(source: SourceSplit, rows: np.ndarray) -> dict[str, pa.Array]:
    # take() copies: a slice's buffers would bring the whole column along when the table is pickled.
    return {name: column.take(pa.array(rows)).combine_chunks() for name, column in source.columns.items()}


def _streaming_note(train: StreamedSplit, num_held: int) -> Note:
    groups = train.groups
    size = len(train) * train.num_bytes_per_example / 1e6
    return Note(
        f"streamed: the {len(train)} training examples ({size:,.0f} MB as tensors) stay in {len(groups.numbers)} row "
        f"groups of {len(groups.paths)} file(s), which every node must see; held in memory are their labels and "
        f"{num_held / 1e6:,.0f} MB of validation and test examples"
    )
