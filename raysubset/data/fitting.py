"""Builds full sets of images, tables, texts and arrays: carves splits, fits the task on training rows, stores all."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa

from raysubset.config import DataConfig, TaskConfig, nearest
from raysubset.data.decoding import Source, SourceSplit, decode_source
from raysubset.data.findings import Findings
from raysubset.data.full_set import FullSet, assembled, statistics_of_levels
from raysubset.data.image_columns import images_of, masks_of
from raysubset.data.images import as_images
from raysubset.data.layout import some
from raysubset.data.row_groups import ImageGroups, TableGroups, TrainingColumns
from raysubset.data.split import SPLITS, SplitName, carve_splits, origin_of
from raysubset.data.tables import Tables, split_names
from raysubset.data.targets import Targets, alike, mask_targets, number_classes
from raysubset.errors import counted, listed
from raysubset.events import Note
from raysubset.tasks import (
    CrossEntropy,
    ImageInputs,
    NextToken,
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


def of_images(
    source: Source, targets: Targets, config: DataConfig, task: TaskConfig, notes: Sequence[Note] = ()
) -> FullSet:
    """Build the full set of images and their targets. Splits of the source that have no targets are left out.

    If config.streamed, training images are decoded once, for their shape and statistics, and not kept in memory.

    Raises:
        ValueError: for images or targets that cannot be used, with the way out.
    """
    source = {name: split for name, split in source.items() if name in targets.values}
    rows, carving = carve_splits(targets.strata, config)
    decoded = decode_source(source, rows, config.image_size)
    height, width, _ = decoded.image_shape
    if targets.kind == "masks":
        targets = dataclasses.replace(targets, values=_masks_in_shape(targets.values, height, width))
    mean, std = statistics_of_levels(decoded.levels)
    cropped = config.augmentation == "crop_flip" or (config.augmentation == "auto" and config.name in _AUGMENTED_NAMES)
    augmentation = "crop_flip" if cropped else "none"
    inputs = ImageInputs(decoded.image_shape, mean, std, augmentation, decoded.grey_range)
    learned = targets.task(inputs, targets.values["train"][rows["train"]], task)

    def stored(split: SplitName) -> dict[str, np.ndarray]:
        images = {"image": decoded.images[split]} if split in decoded.images else {}
        return images | targets.stored(origin_of(split, source), rows[split], learned)

    notes = [*notes, *targets.notes, *carving, *decoded.notes]
    notes += _lacking(targets, rows)
    tables: dict[SplitName, pa.Table] = {name: split.table for name, split in source.items()}
    full_set = assembled(config, rows, stored, learned, notes, tables=tables, groups=decoded.groups)
    if not task.is_class:
        return full_set
    if decoded.groups is not None:
        raise ValueError(f"{task.name} is fitted on training rows, and data.streamed holds none: leave it out")
    return dataclasses.replace(full_set, task=fit_own_task(task.name, full_set.train.arrays()))


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


def _lacking(targets: Targets, rows: Mapping[SplitName, np.ndarray]) -> Iterator[Note]:
    """Yield a note on each split without examples of some classes."""
    for name, numbers in rows.items() if targets.kind == "classes" else ():
        labels = targets.values[origin_of(name, targets.values)][numbers]
        absent = np.flatnonzero(np.bincount(labels, minlength=len(targets.names)) == 0)
        if len(absent):
            examples = listed([targets.names[number] for number in absent], most=_MOST_LISTED)
            yield Note(f"the {name} split has no example of class {examples}", is_warning=True)


def of_tables(tables: Tables, config: DataConfig, task: TaskConfig) -> FullSet:
    """Build the full set of tables, which learns from their columns, or from their images.

    Raises:
        ValueError: for columns that cannot be features or targets, with the way out.
    """
    choice = tables.choice
    if choice.are_images:
        return _of_image_tables(tables, config, task)
    targets = targets_of_tables(tables.splits, choice.targets, config, task)
    rows, carving = carve_splits(targets.strata, config)
    assert isinstance(tables.streamed, TableGroups | None)
    carved: list[SplitName] = [split for split in SPLITS[1:] if split not in targets.values]
    streamed = tables.streamed and TrainingColumns(tables.streamed, rows, kept=carved)
    inputs, fitted = fit_columns(
        streamed or tables.splits["train"].take(pa.array(rows["train"])),
        choice.features,
        missing=config.missing,
        where="the train split",
        rows=rows["train"],
    )
    learned = targets.task(inputs, targets.values["train"][rows["train"]], task)
    notes = [*tables.notes, *targets.notes, *carving, *_lacking(targets, rows), *fitted]

    def stored(split: SplitName) -> dict[str, np.ndarray]:
        origin = origin_of(split, targets.values)
        tensors = targets.stored(origin, rows[split], learned)
        if streamed and split == "train":
            return tensors
        table = tables.splits[origin].take(pa.array(rows[split]))
        table = streamed.kept(split) if streamed and split in carved else table
        features, encoding = inputs.encode(table, where=f"the {split} split", rows=rows[split])
        notes.extend(encoding if split != "train" else ())  # fit_columns() noted what it filled in
        return {"inputs": features, **tensors}

    groups = tables.streamed and dataclasses.replace(tables.streamed, inputs=inputs)
    labelled: dict[SplitName, pa.Table] = {split: tables.splits[split] for split in targets.values}
    return assembled(config, rows, stored, learned, notes, tables=labelled, groups=groups)


def _of_image_tables(tables: Tables, config: DataConfig, task: TaskConfig) -> FullSet:
    source, masks, choice = Source(), dict[SplitName, np.ndarray](), tables.choice
    for split, table in tables.splits.items():
        where, findings = f"the {split} split of {config.name}", Findings()
        if split == "train" and isinstance(tables.streamed, ImageGroups):
            images = tables.streamed
        else:
            column = table.column(config.image_column)
            images, findings = images_of(column, where, image_size=config.image_size, read_file=tables.read_file)
            if task.name == "segmentation":
                column = table.column(choice.targets[0])
                masks[split] = masks_of(column, images, where, image_size=config.image_size)
        names = [name for name in table.column_names if name not in ("image", *choice.features, *choice.targets)]
        source[split] = SourceSplit(images, where, table.select(names), findings)
    if task.name == "segmentation":
        targets = mask_targets(masks, choice.targets, task, config.name)
    else:
        targets = targets_of_tables(tables.splits, choice.targets, config, task)
    return of_images(source, targets, config, task, tables.notes)


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
            f"the train split has {counted(num, 'window')} of {config.window} tokens, too few to hold any out: give "
            f"--data.window {max(1, config.window * num // needed)} or less, or more text"
        )
    rows, carving = carve_splits(alike(windows), config, at_end=True)
    whole = vocabulary
    vocabulary, table = _of_training(whole, windows["train"][rows["train"]])
    for split in SPLITS[1:] if vocabulary.kind == "characters" else ():
        tokens = windows[origin_of(split, windows)][rows[split]][:, 1:]
        if len(lost := tokens[(table[tokens] == vocabulary.unknown) & (tokens != whole.unknown)]):
            text = f"{len(lost)} of {tokens.size} characters of the {split} split are in no training window"
            cutting.append(Note(f"{text} (such as {whole.decode(lost[:1])!r}): unknown", is_warning=True))
    learned = NextToken(vocabulary, config.window, CrossEntropy(task.label_smoothing, class_dim=2))

    def stored(split: SplitName) -> dict[str, np.ndarray]:
        return {"tokens": table[windows[origin_of(split, windows)][rows[split]]]}

    return assembled(config, rows, stored, learned, [*notes, *cutting, *carving])


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
    texts = () if task.is_class else (*named, "label", "target")
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
            return {name: values[rows[split]] for name, values in arrays[origin_of(split, arrays)].items()}

        return assembled(config, rows, unchanged, learned, [*notes, *carving])
    is_masks = task.name == "segmentation" or ("mask" in train and not named)
    is_image = is_masks or config.image_column in train or config.image_column != DataConfig.image_column
    column = config.image_column if is_image else "inputs"
    learned_names = named or (("mask",) if is_masks else ("target",) if "target" in train else ("label",))
    if absent := [name for name in (column, *learned_names) if name not in train]:
        hint = nearest(absent[0], [*train])
        given = ", ".join(f"{name} ({values.dtype} {list(values.shape)})" for name, values in train.items())
        raise ValueError(
            f"{config.name} gives {given}, and {task.name} takes inputs or image beside label, target or "
            f"mask, here {absent[0]}: name them so, or by --data.image-column and --data.target, or give --task "
            f"package.module:Class{hint}"
        )
    if column in named:
        raise ValueError(f"{column} is the input and --data.target: it cannot be learned from itself")
    if is_masks:
        masks: dict[SplitName, np.ndarray] = {split: each[learned_names[0]] for split, each in arrays.items()}
        targets = mask_targets(masks, learned_names, task, config.name)
    else:  # as those of a table without features
        tables: dict[SplitName, pa.Table] = {
            split: pa.table(dict(pair for name in learned_names for pair in _columns_of(split_arrays[name], name)))
            for split, split_arrays in arrays.items()
        }
        targets = targets_of_tables(tables, tables["train"].column_names, config, task)
    if unread := [name for name in train if name not in (column, *learned_names)]:
        verb = "are" if len(learned_names) > 1 else "is"
        text = f"{', '.join(learned_names)} {verb} learned from {column}"
        notes = [*notes, Note(f"arrays that are not used: {', '.join(unread)} ({text})")]
    if is_image:
        source: Source = {split: _source_of_array(each[column], split, config) for split, each in arrays.items()}
        return of_images(source, targets, config, task, notes)
    rows, carving = carve_splits(targets.strata, config)
    inputs = fit_tensors(train[column], rows["train"])
    if inputs.num_values is not None:
        text = f"integers are tokens, here {inputs.num_values} of them: give floats if they are numbers"
        carving = [*carving, Note(text)]
    learned = targets.task(inputs, targets.values["train"][rows["train"]], task)

    def stored(split: SplitName) -> dict[str, np.ndarray]:
        origin = origin_of(split, targets.values)
        values = arrays[origin][column][rows[split]]
        values = inputs.standardised(values, where=f"the {split} split", rows=rows[split])
        return {inputs.column: values, **targets.stored(origin, rows[split], learned)}

    return assembled(config, rows, stored, learned, [*notes, *targets.notes, *carving, *_lacking(targets, rows)])


def _source_of_array(values: np.ndarray, split: SplitName, config: DataConfig) -> SourceSplit:
    where = f"the {split} split of {config.name}"
    try:
        images, findings = as_images(values, where, config.image_size)
    except ValueError as error:
        raise ValueError(f"{error}; arrays that are no images go by name: dict(inputs=…, label=…)") from error
    return SourceSplit(images, where, findings=findings)


def _storable(values: np.ndarray, name: str, texts: Sequence[str], config: DataConfig) -> np.ndarray:
    """Convert an array to a type that torch can index; refuse texts except in the arrays named by `texts`."""
    if values.dtype.kind == "U" and name not in texts:
        remedy = "" if ":" in config.name else ", and the names of the others to --data.columns"
        raise ValueError(f"{name} of {config.name} are texts: give numbers, of which tensors are made{remedy}")
    if values.dtype == np.uint64 and values.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name} of {config.name} has {values.max()}, beyond 64-bit integers with a sign: give floats")
    wider = {"uint16": np.int32, "uint32": np.int64, "uint64": np.int64}
    return values.astype(wider.get(values.dtype.name, values.dtype), copy=False)


def targets_of_tables(
    tables: Mapping[SplitName, pa.Table], names: Sequence[str], config: DataConfig, task: TaskConfig
) -> Targets:
    """Read columns of each split's table as targets: numbers, or classes, which number_classes() numbers.

    Raises:
        ValueError: for columns that the task cannot learn.
    """
    if task.name == "regression":
        target_names, train = target_numbers(tables["train"], names, where="the train split")
        numbers: dict[SplitName, np.ndarray] = {"train": train}
        for split, table in tables.items():
            if split != "train":
                _, numbers[split] = target_numbers(table, names, where=f"the {split} split", num=len(target_names))
        return Targets("numbers", numbers, target_names)
    if task.name != "classification" and not task.is_class:
        raise ValueError(
            f"{config.name} is a table, and --task {task.name} cannot be learned from its columns: use classification "
            "or regression, name the column of its images with --data.image-column, or give data.name a function that "
            "returns arrays"
        )
    if len(names) > 1:
        raise ValueError(
            f"classification learns one column, not {some(names)}: set --data.target to one, use --task regression, or "
            "write a task of your own, which may learn several labels"
        )
    return Targets("classes", *number_classes({split: table.column(names[0]) for split, table in tables.items()}))


def _columns_of(values: np.ndarray, name: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the named columns of an array [N] or [N, …], flattened. The names of several end in their numbers."""
    columns = values.reshape(len(values), -1).T
    return zip((name,) if len(columns) == 1 else (f"{name}_{k}" for k in range(len(columns))), columns, strict=True)
