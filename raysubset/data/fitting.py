"""Builds full sets from images, tables, texts and arrays: carves splits, fits the task on training rows, stores all."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa

from raysubset.config import DataConfig, TaskConfig, nearest
from raysubset.data.columns import Tables, class_numbers
from raysubset.data.decoding import decode_source, size_notes
from raysubset.data.findings import level_notes
from raysubset.data.full_set import FullSet, count_levels, statistics_of_levels
from raysubset.data.images import as_images
from raysubset.data.labels import Labels, number_classes
from raysubset.data.layout import some
from raysubset.data.row_groups import ImageGroups, TrainingColumns
from raysubset.data.sources import Source, SourceSplit
from raysubset.data.split import Split, SplitName, carve_splits, is_scalar
from raysubset.data.streamed import StreamedSplit, streaming_note
from raysubset.data.tables import split_names, usual_note
from raysubset.data.targets import Targets, alike, mask_in_row, mask_targets
from raysubset.errors import listed
from raysubset.events import Note
from raysubset.tasks import (
    CrossEntropy,
    ImageInputs,
    NextToken,
    Task,
    Vocabulary,
    fit_columns,
    fit_own_task,
    fit_tensors,
    fit_vocabulary,
    target_numbers,
    windows_of,
)

# The sets in which a shifted or mirrored image shows the same thing; digits do not.
_AUGMENTED_NAMES = ("cifar10", "cifar100")

_MOST_LISTED = 10  # classes named in one message

SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")


def of_tables(tables: Tables, config: DataConfig, task: TaskConfig) -> FullSet:
    """Build the full set of tables, which learns from their columns.

    Raises:
        ValueError: for columns that cannot be features or targets, with the way out.
    """
    targets = _targets_of_tables(tables, config, task)
    rows, carving = carve_splits(targets.strata, config)
    carved: list[SplitName] = [split for split in SPLITS[1:] if split not in targets.values]
    streamed = tables.streamed and TrainingColumns(tables.streamed, rows, kept=carved)
    inputs, fitted = fit_columns(
        streamed or tables.splits["train"].take(pa.array(rows["train"])),
        tables.features,
        missing=config.missing,
        where="the train split",
        rows=rows["train"],
    )
    learned = targets.task(inputs, targets.values["train"][rows["train"]], task)
    splits, notes = {}, [*tables.notes, *targets.notes, *carving, *fitted]
    for split in SPLITS:
        origin = _origin(split, targets.values)  # targets have no values of splits without labels
        table, tensors = tables.splits[origin].take(pa.array(rows[split])), targets.stored(origin, rows[split], learned)
        if streamed is None or split != "train":
            columns = streamed.kept(split) if streamed and split in carved else table
            features, encoding = inputs.encode(columns, where=f"the {split} split", rows=rows[split])
            notes += encoding if split != "train" else ()  # fit_columns() noted what it filled in
            tensors = {"inputs": features, **tensors}
        splits[split] = Split.from_arrays(tensors, rows[split], _attributes(table, tensors))
    train = splits["train"]
    if tables.streamed is not None:
        groups = dataclasses.replace(tables.streamed, inputs=inputs)
        train, num_held = StreamedSplit(train, groups), splits["validation"].num_bytes + splits["test"].num_bytes
        notes += (streaming_note(train, num_held), *size_notes(groups.num_bytes_of_largest(), groups.where))
    return FullSet(config.name, train, splits["validation"], splits["test"], learned, tuple(notes))


def of_texts(
    texts: Mapping[SplitName, Sequence[str]], notes: Sequence[Note], config: DataConfig, task: TaskConfig
) -> FullSet:
    """Build the full set of texts, cut into windows for next-token prediction.

    Raises:
        ValueError: for texts shorter than a window.
    """
    vocabulary, windows, cutting = fit_vocabulary(config.vocabulary, texts["train"]), dict[SplitName, np.ndarray](), []
    for split, documents in texts.items():
        windows[split], split_notes = windows_of(documents, vocabulary, config.window, where=f"the {split} split")
        cutting += split_notes
    if (num := len(windows["train"])) < (needed := len(SPLITS) + 1 - len(windows)):
        raise ValueError(
            f"the train split has {num} window(s) of {config.window} tokens, too few to hold any out: give "
            f"--data.window {max(1, config.window * num // needed)} or less, or more text"
        )
    rows, carving = carve_splits(alike(windows), config, at_end=True)
    vocabulary, table = _of_training(vocabulary, windows["train"][rows["train"]])
    learned = NextToken(vocabulary, config.window, CrossEntropy(task.label_smoothing, class_dim=2))

    def stored(split: SplitName) -> dict[str, np.ndarray]:
        return {"tokens": table[windows[_origin(split, windows)][rows[split]]]}

    return _of_tensors(config, rows, stored, learned, [*notes, *cutting, *carving])


def _of_training(vocabulary: Vocabulary, windows: np.ndarray) -> tuple[Vocabulary, np.ndarray]:
    """Drop characters that no training window has: return the vocabulary, and the new number of each old one."""
    kind = np.uint8 if len(vocabulary) <= 2**8 else np.int32
    if vocabulary.kind == "bytes":
        return vocabulary, np.arange(len(vocabulary), dtype=kind)
    present = np.unique(windows)
    present = present[present < len(vocabulary.characters)]
    fitted = Vocabulary("characters", "".join(vocabulary.characters[number] for number in present))
    new_numbers = np.full(len(vocabulary), len(present), dtype=kind)
    new_numbers[present] = np.arange(len(present))
    return fitted, new_numbers


def of_arrays(
    arrays: Mapping[SplitName, Mapping[str, np.ndarray]], config: DataConfig, task: TaskConfig, notes: Sequence[Note]
) -> FullSet:
    """Build the full set of named arrays, [N, …] each. A user's own task gets them unchanged.

    For other tasks, the inputs are "inputs" (floats, or integers of tokens) or "image" (uint8 [N, H, W, C]), unless
    data.image_column names images. The targets are "label" (classes), "target" (numbers) or "mask" (a class for each
    pixel), unless data.target names them.

    Raises:
        ValueError: for arrays that the task cannot use.
    """
    named = () if task.is_class else split_names("target", config.target, [*arrays["train"]])
    texts = (*named, "label", "target")
    arrays = {
        split: {name: _storable(values, name, texts, config) for name, values in split_arrays.items()}
        for split, split_arrays in arrays.items()
    }
    train = arrays["train"]
    if task.is_class:
        firsts: dict[SplitName, np.ndarray] = {
            split: next(iter(split_arrays.values())) for split, split_arrays in arrays.items()
        }
        rows, carving = carve_splits(alike(firsts), config)
        learned = fit_own_task(task.name, {key: values[rows["train"]] for key, values in train.items()})

        def unchanged(split: SplitName) -> dict[str, np.ndarray]:
            return {name: values[rows[split]] for name, values in arrays[_origin(split, arrays)].items()}

        return _of_tensors(config, rows, unchanged, learned, [*notes, *carving])
    is_image = config.image_column in train or config.image_column != DataConfig.image_column
    column = config.image_column if is_image else "inputs"
    if absent := [name for name in (column, *named) if name not in train]:
        hint = nearest(absent[0], [*train])
        raise ValueError(
            f"{config.name} gives {', '.join(train)}, and {task.name} takes inputs or image beside label, target or "
            f"mask, here {absent[0]}: name them so, or by --data.image-column and --data.target, or give --task "
            f"package.module:Class{hint}"
        )
    if column in named:
        raise ValueError(f"{column} is the input and --data.target: it cannot be learned from itself")
    is_masks = task.name == "segmentation" or ("mask" in train and not named)
    source = _images_of(arrays, column, config, with_masks=is_masks) if is_image else {}
    if is_masks:
        learned_names = named or ("mask",)
        masks = _masks_of(arrays, column, learned_names, config)
        targets = mask_targets(masks, task, config.name)
    else:
        learned_names = named or ("target" if "target" in train else "label",)
        targets = _targets_of_arrays(arrays, learned_names, config, task)
    if unread := [name for name in train if name not in (column, *learned_names)]:
        verb = "are" if len(learned_names) > 1 else "is"
        text = f"{', '.join(learned_names)} {verb} learned from {column}"
        notes = [*notes, Note(f"arrays that are not used: {', '.join(unread)} ({text})")]
    if is_image:
        source["train"] = dataclasses.replace(source["train"], notes=tuple(notes))
        return of_images(source, config, task, targets)
    rows, carving = carve_splits(targets.strata, config)
    inputs = fit_tensors(train[column], rows["train"])
    if inputs.num_values is not None:
        text = f"integers are tokens, here {inputs.num_values} of them: give floats if they are numbers"
        carving = [*carving, Note(text)]
    learned = targets.task(inputs, targets.values["train"][rows["train"]], task)

    def stored(split: SplitName) -> dict[str, np.ndarray]:
        origin = _origin(split, targets.values)
        values = arrays[origin][column][rows[split]]
        values = inputs.standardised(values, where=f"the {split} split", rows=rows[split])
        return {inputs.column: values, **targets.stored(origin, rows[split], learned)}

    return _of_tensors(config, rows, stored, learned, [*notes, *targets.notes, *carving])


def _shown(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _storable(values: np.ndarray, name: str, texts: Sequence[str], config: DataConfig) -> np.ndarray:
    """Convert an array to a type that torch can index; refuse texts except in the arrays named by `texts`."""
    if values.dtype.kind == "U" and name not in texts:
        raise ValueError(f"{name} of {config.name} are texts: give numbers, of which tensors are made")
    wider = {"uint16": np.int32, "uint32": np.int64, "uint64": np.int64}
    return values.astype(wider.get(values.dtype.name, values.dtype), copy=False)


def _masks_of(
    arrays: Mapping[SplitName, Mapping[str, np.ndarray]], column: str, names: Sequence[str], config: DataConfig
) -> dict[SplitName, np.ndarray]:
    """Return each split's masks, [N, H, W], a class for each pixel of the images in `column`."""
    (name, *others), train = names, arrays["train"]
    if others:
        raise ValueError(f"segmentation learns one array of masks, not {', '.join(names)}: set --data.target to one")
    wanted = ("image" if column == "inputs" else column, name)
    if missing := [each for each in wanted if each not in train]:
        text = f"{config.name} gives {', '.join(train)}: segmentation needs {missing[0]} too"
        if missing == [name] and "target" in train:
            shape = list(train[column].shape[:3])
            text += f", integers for each pixel of {shape}; target is {_shown(train['target'])}"
        raise ValueError(text)
    for split, split_arrays in arrays.items():
        mask, shape = split_arrays[name], split_arrays[column].shape[:3]
        if mask.dtype.kind not in "iub" or mask.shape != shape:
            text = f"{name} of the {split} split is {_shown(mask)}"
            raise ValueError(f"{text}: give a class for each pixel of images {list(shape)}")
    return {split: split_arrays[name] for split, split_arrays in arrays.items()}


def _images_of(
    arrays: Mapping[SplitName, Mapping[str, np.ndarray]], column: str, config: DataConfig, *, with_masks: bool
) -> Source:
    """Return the images in `column`, resized to data.image_size, without targets.

    Raises:
        ValueError: for arrays that are no images, and for images with masks, which are not resized.
    """
    source: Source = {}
    for split, split_arrays in arrays.items():
        images, size, where = split_arrays[column], config.image_size, f"the {split} split of {config.name}"
        if images.ndim != 4 or images.dtype != np.uint8:
            raise ValueError(f"{column} of {where} is {_shown(images)}: give uint8 [N, H, W, C]")
        if size is not None and with_masks and images.shape[1:3] != (size, size):
            raise ValueError(
                f"{column} of the {split} split is {_shown(images)}, and --data.image-size resizes no arrays with "
                "masks: resize both before, and leave it out"
            )
        source[split] = SourceSplit(as_images(images, where, size)[0], np.empty(0), where=where)
    return source


def _targets_of_tables(tables: Tables, config: DataConfig, task: TaskConfig) -> Targets:
    if task.name == "regression":
        values: dict[SplitName, np.ndarray] = {
            split: target_numbers(table, tables.targets, where=f"the {split} split")
            for split, table in tables.splits.items()
        }
        return Targets("numbers", values, tables.targets)
    if task.name != "classification":
        raise ValueError(
            f"{config.name} is a table, and --task {task.name} cannot be learned from its columns: use classification "
            "or regression, name the column of its images with --data.image-column, or give data.name a function that "
            "returns arrays"
        )
    labels, names, notes = class_numbers(tables)
    return Targets("classes", labels, names, notes)


def _targets_of_arrays(
    arrays: Mapping[SplitName, Mapping[str, np.ndarray]], names: Sequence[str], config: DataConfig, task: TaskConfig
) -> Targets:
    """Read the named arrays as the targets of a table without features."""
    train = arrays["train"]
    if absent := [name for name in names if name not in train]:
        raise ValueError(
            f"{config.name} gives {', '.join(train)}, no {absent[0]}: name what is to be learned label or target, or "
            "by --data.target"
        )
    tables: dict[SplitName, pa.Table] = {
        split: pa.table(dict(pair for name in names for pair in _columns_of(split_arrays[name], name)))
        for split, split_arrays in arrays.items()
    }
    return _targets_of_tables(Tables(tables, (), tuple(tables["train"].column_names), ()), config, task)


def _columns_of(values: np.ndarray, name: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the named columns of an array [N] or [N, K]. The names of several columns end in their numbers."""
    columns = values.reshape(len(values), 1 if values.ndim == 1 else values.shape[1]).T
    return zip((name,) if len(columns) == 1 else (f"{name}_{k}" for k in range(len(columns))), columns, strict=True)


def _origin(split: SplitName, source: Mapping[SplitName, object]) -> SplitName:
    """Return the split of the source that holds a split's rows."""
    return split if split in source else "train"


def _attributes(table: pa.Table, tensors: Mapping[str, object]) -> dict[str, pa.Array]:
    """Return the table's columns by which subsets can be cut."""
    names = [field.name for field in table.schema if is_scalar(field.type)]
    return {name: table.column(name).combine_chunks() for name in names if name not in {*tensors, "row"}}


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
    origins: dict[SplitName, SplitName] = {name: _origin(name, source) for name in rows}
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
        labels: dict[SplitName, Labels] = {}
        for name, split in source.items():
            assert isinstance(split.targets, Labels)
            labels[name] = split.targets
        return Targets("classes", *number_classes(labels))
    if isinstance(train.targets, Labels):
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


def _of_tensors(
    config: DataConfig,
    rows: Mapping[SplitName, np.ndarray],
    stored: Callable[[SplitName], Mapping[str, np.ndarray]],
    task: Task,
    notes: Sequence[Note],
) -> FullSet:
    """Build the full set of the tensors that `stored` returns of each split's rows."""
    train, validation, test = (
        Split.from_arrays({k: np.ascontiguousarray(v) for k, v in stored(split).items()}, rows[split], {})
        for split in SPLITS
    )
    return FullSet(config.name, train, validation, test, task, tuple(notes))
