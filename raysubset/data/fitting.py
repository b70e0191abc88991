"""Builds full sets from tables, texts and arrays: fits the task on training rows, and stores the splits."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa

from raysubset.config import DataConfig, TaskConfig, nearest
from raysubset.data.columns import Tables, class_numbers
from raysubset.data.decoding import size_notes
from raysubset.data.full_set import FullSet, count_levels, statistics_of_levels
from raysubset.data.images import as_images
from raysubset.data.split import Split, SplitName
from raysubset.data.splitting import carve_splits
from raysubset.data.streamed import StreamedSplit, streaming_note
from raysubset.data.table_groups import TrainingColumns
from raysubset.data.tables import is_scalar, split_names
from raysubset.data.targets import Targets, alike, mask_targets
from raysubset.events import Note
from raysubset.tasks import (
    Augmentation,
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
    full_set = _full_set(config, splits, learned, notes)
    if tables.streamed is None:
        return full_set
    groups = dataclasses.replace(tables.streamed, inputs=inputs)
    train, num_held = StreamedSplit(splits["train"], groups), splits["validation"].num_bytes + splits["test"].num_bytes
    advice = (*notes, streaming_note(train, num_held), *size_notes(groups.num_bytes_of_largest(), groups.where))
    return dataclasses.replace(full_set, train=train, advice=advice)


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
    splits = {}
    for split in SPLITS:
        tokens = table[windows[_origin(split, windows)][rows[split]]]
        splits[split] = Split.from_arrays({"tokens": np.ascontiguousarray(tokens)}, rows[split], {})
    learned = NextToken(vocabulary, config.window, CrossEntropy(task.label_smoothing, class_dim=2))
    return _full_set(config, splits, learned, [*notes, *cutting, *carving])


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
        return _full_set(config, _as_they_are(arrays, rows), learned, [*notes, *carving])
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
    if task.name == "segmentation" or ("mask" in train and not named):
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
    rows, carving = carve_splits(targets.strata, config)
    if is_image:
        arrays = _of_one_size(arrays, column, targets, config)
        inputs = _fit_images(arrays["train"][column][rows["train"]], config)
    else:
        inputs = fit_tensors(train[column], rows["train"])
        if inputs.num_values is not None:
            text = f"integers are tokens, here {inputs.num_values} of them: give floats if they are numbers"
            carving = [*carving, Note(text)]
    learned = targets.task(inputs, targets.values["train"][rows["train"]], task)
    splits = {}
    for split in SPLITS:
        origin = _origin(split, targets.values)
        values = arrays[origin][column][rows[split]]
        if isinstance(inputs, ImageInputs):
            values = np.ascontiguousarray(values)
        else:
            values = inputs.standardised(values, where=f"the {split} split", rows=rows[split])
        tensors = {inputs.column: values, **targets.stored(origin, rows[split], learned)}
        splits[split] = Split.from_arrays(tensors, rows[split], {})
    return _full_set(config, splits, learned, [*notes, *targets.notes, *carving])


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
    name, *others = names
    if others:
        raise ValueError(f"segmentation learns one array of masks, not {', '.join(names)}: set --data.target to one")
    for split, split_arrays in arrays.items():
        wanted = ("image" if column == "inputs" else column, name)
        if missing := [each for each in wanted if each not in split_arrays]:
            text = f"{config.name} gives {', '.join(split_arrays)}: segmentation needs {missing[0]} too"
            if missing == [name] and "target" in split_arrays:
                shape = list(split_arrays[column].shape[:3])
                text += f", integers for each pixel of {shape}; target is {_shown(split_arrays['target'])}"
            raise ValueError(text)
        image, mask = split_arrays[column], split_arrays[name]
        if image.ndim != 4 or image.dtype != np.uint8:
            raise ValueError(f"{column} of the {split} split is {_shown(image)}: give uint8 [N, H, W, C]")
        if mask.dtype.kind not in "iub" or mask.shape != image.shape[:3]:
            text = f"{name} of the {split} split is {_shown(mask)}"
            raise ValueError(f"{text}: give a class for each pixel of images {list(image.shape[:3])}")
    return {split: split_arrays[name] for split, split_arrays in arrays.items()}


def _of_one_size(
    arrays: Mapping[SplitName, Mapping[str, np.ndarray]], column: str, targets: Targets, config: DataConfig
) -> dict[SplitName, dict[str, np.ndarray]]:
    """Resize the images of the arrays to data.image_size.

    Raises:
        ValueError: for arrays that are no images, and for images with masks, which are not resized.
    """
    resized: dict[SplitName, dict[str, np.ndarray]] = {}
    for split, split_arrays in arrays.items():
        images = split_arrays[column]
        if images.ndim != 4 or images.dtype != np.uint8:
            raise ValueError(f"{column} of {config.name} is {_shown(images)}: give uint8 [N, H, W, C]")
        size = config.image_size
        if size is not None and targets.kind == "masks" and images.shape[1:3] != (size, size):
            raise ValueError(
                f"{column} of the {split} split is {_shown(images)}, and --data.image-size resizes no arrays with "
                "masks: resize both before, and leave it out"
            )
        resized[split] = {**split_arrays, column: as_images(images, f"the {split} split of {config.name}", size)[0]}
    return resized


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


def _fit_images(images: np.ndarray, config: DataConfig) -> ImageInputs:
    mean, std = statistics_of_levels(count_levels(images))
    augmentation: Augmentation = "crop_flip" if config.augmentation == "crop_flip" else "none"
    height, width, channels = images.shape[1:]
    return ImageInputs((height, width, channels), mean, std, augmentation)


def _as_they_are(
    arrays: Mapping[SplitName, Mapping[str, np.ndarray]], rows: Mapping[SplitName, np.ndarray]
) -> dict[SplitName, Split]:
    splits = {}
    for split in SPLITS:
        named = arrays[_origin(split, arrays)]
        tensors = {name: np.ascontiguousarray(values[rows[split]]) for name, values in named.items()}
        splits[split] = Split.from_arrays(tensors, rows[split], {})
    return splits


def _origin(split: SplitName, source: Mapping[SplitName, object]) -> SplitName:
    """Return the split of the source that holds a split's rows."""
    return split if split in source else "train"


def _attributes(table: pa.Table, tensors: Mapping[str, object]) -> dict[str, pa.Array]:
    """Return the table's columns by which subsets can be cut."""
    names = [field.name for field in table.schema if is_scalar(field.type)]
    return {name: table.column(name).combine_chunks() for name in names if name not in {*tensors, "row"}}


def _full_set(config: DataConfig, splits: Mapping[SplitName, Split], task: Task, notes: Sequence[Note]) -> FullSet:
    return FullSet(config.name, splits["train"], splits["validation"], splits["test"], task, tuple(notes))
