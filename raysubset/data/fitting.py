"""Full sets of tables, texts and arrays: a task fitted on training rows, and the splits of what it stores."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from raysubset.config import DataConfig, TaskConfig
from raysubset.data.columns import Tables, class_numbers
from raysubset.data.decoding import size_notes
from raysubset.data.full_set import FullSet, count_levels, statistics_of_levels
from raysubset.data.split import Split, SplitName
from raysubset.data.splitting import carve_splits
from raysubset.data.streamed import StreamedSplit, streaming_note
from raysubset.data.table_groups import TrainingColumns
from raysubset.data.tables import is_scalar
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
    """The full set of named arrays, [N, …] each: for a user's own task as they are, for others by their names.

    Those are "inputs" (floats, or integers of tokens) or "image" (uint8 [N, H, W, C]), and "label" of classes, "target"
    of numbers, or "mask" of pixels.

    Raises:
        ValueError: for arrays that the task cannot use.
    """
    arrays = {
        split: {name: _storable(each, name, config) for name, each in own.items()} for split, own in arrays.items()
    }
    train = arrays["train"]
    if task.is_class:
        rows, carving = carve_splits(alike({split: next(iter(own.values())) for split, own in arrays.items()}), config)
        learned = fit_own_task(task.name, {key: values[rows["train"]] for key, values in train.items()})
        return _full_set(config, _as_they_are(arrays, rows), learned, [*notes, *carving])
    column = "image" if "image" in train else "inputs"
    if column not in train:
        raise ValueError(
            f"{config.name} gives {', '.join(train)}, and {task.name} takes inputs or image beside label, target or "
            "mask: name one so, or give --task package.module:Class"
        )
    if "mask" in train or task.name == "segmentation":
        targets = mask_targets(_masks_of(arrays, config), task, config.name)
    else:
        targets = _targets_of_arrays(arrays, config, task)
    rows, carving = carve_splits(targets.strata, config)
    if column == "image":
        inputs = _fit_images(train[column][rows["train"]], config)
    else:
        inputs = fit_tensors(train[column], rows["train"])
        if inputs.num_values is not None:
            text = f"integers are tokens, here {inputs.num_values} of them: give floats if they are numbers"
            carving = [*carving, Note(text)]
    learned = targets.task(inputs, targets.values["train"][rows["train"]], task)
    splits = {}
    for split in SPLITS:
        origin = _origin(split, targets.values)
        own = arrays[origin][column][rows[split]]
        if isinstance(inputs, ImageInputs):
            own = np.ascontiguousarray(own)
        else:
            own = inputs.standardised(own, where=f"the {split} split", rows=rows[split])
        tensors = {column: own, **targets.stored(origin, rows[split], learned)}
        splits[split] = Split.from_arrays(tensors, rows[split], {})
    return _full_set(config, splits, learned, [*notes, *targets.notes, *carving])


def _shown(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _storable(values: np.ndarray, name: str, config: DataConfig) -> np.ndarray:
    """An array in a type that torch takes examples of by index; texts are for labels alone."""
    if values.dtype.kind == "U" and name not in ("label", "target"):
        raise ValueError(f"{name} of {config.name} are texts: give numbers, of which tensors are made")
    wider = {"uint16": np.int32, "uint32": np.int64, "uint64": np.int64}
    return values.astype(wider.get(values.dtype.name, values.dtype), copy=False)


def _masks_of(arrays: Mapping[SplitName, Mapping[str, np.ndarray]], config: DataConfig) -> dict[SplitName, np.ndarray]:
    """The masks of arrays, of a class for each pixel of their images."""
    for split, own in arrays.items():
        if missing := [name for name in ("image", "mask") if name not in own]:
            text = f"{config.name} gives {', '.join(own)}: segmentation needs {missing[0]} too"
            if missing == ["mask"] and "target" in own:
                text += (
                    f", integers for each pixel of {list(own['image'].shape[:3])}; target is {_shown(own['target'])}"
                )
            raise ValueError(text)
        image, mask = own["image"], own["mask"]
        if image.ndim != 4 or image.dtype != np.uint8:
            raise ValueError(f"image of the {split} split is {_shown(image)}: give uint8 [N, H, W, C]")
        if mask.dtype.kind not in "iub" or mask.shape != image.shape[:3]:
            text = f"mask of the {split} split is {_shown(mask)}"
            raise ValueError(f"{text}: give a class for each pixel of images {list(image.shape[:3])}")
    return {split: own["mask"] for split, own in arrays.items()}


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
    arrays: Mapping[SplitName, Mapping[str, np.ndarray]], config: DataConfig, task: TaskConfig
) -> Targets:
    """Targets by their name: as those of a table that has nothing else."""
    train = arrays["train"]
    name = "target" if "target" in train else "label"
    if name not in train:
        raise ValueError(f"{config.name} gives {', '.join(train)}: name what is to be learned label or target")
    flat: dict[SplitName, np.ndarray] = {split: own[name] for split, own in arrays.items()}
    num = 1 if train[name].ndim == 1 else train[name].shape[1]
    names = (name,) if num == 1 else tuple(f"{name}_{number}" for number in range(num))
    tables: dict[SplitName, pa.Table] = {
        split: pa.table({key: values.reshape(len(values), num)[:, k] for k, key in enumerate(names)})
        for split, values in flat.items()
    }
    return _targets_of_tables(Tables(tables, (), names, ()), config, task)


def _fit_images(images: np.ndarray, config: DataConfig) -> ImageInputs:
    if images.ndim != 4 or images.dtype != np.uint8:
        raise ValueError(f"image of {config.name} is {_shown(images)}: give uint8 [N, H, W, C]")
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
