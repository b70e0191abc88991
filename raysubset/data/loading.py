"""Loads every data set: finds its reader, and builds the FullSet from what it reads."""

import dataclasses
import logging
import time

import pyarrow as pa

from raysubset.config import TEXT_SUFFIXES, DataConfig, TaskConfig, kind_of
from raysubset.data.columns import is_of_columns, read_tables
from raysubset.data.contents import (
    Kind,
    array_fingerprint,
    digested_again,
    file_fingerprint,
    repeated_files,
    unused_settings,
)
from raysubset.data.examples import OwnAugmentation
from raysubset.data.files import not_streamed, read_image_folders, read_texts
from raysubset.data.finding import DataFiles, find_files
from raysubset.data.fitting import of_arrays, of_images, of_tables, of_texts
from raysubset.data.full_set import FullSet
from raysubset.data.functions import read_returned, read_returned_texts, read_table_arrays
from raysubset.data.named import TABLE_NAMES, TEXT_NAMES, read_named, read_named_table, read_named_texts
from raysubset.data.split import SplitName
from raysubset.data.tables import Tables
from raysubset.errors import listed
from raysubset.events import Note
from raysubset.tasks import ImageInputs, Regression

_logger = logging.getLogger(__name__)


def load_full_set(config: DataConfig, task: TaskConfig | None = None, *, known: pa.Table | None = None) -> FullSet:
    """Read a data set into memory once, and decide what the config leaves open. `advice` records the decisions.

    Args:
        task: what to learn; by default the task that the data are for.
        known: an earlier fingerprint of the set. Files that are unchanged since are not digested again.

    Raises:
        ValueError: in one line with the way out, for data that cannot be read or trained on, and for files that change
            while they are read.
    """
    start_s = time.perf_counter()
    files = find_files(config) if kind_of(config.name) == "path" else None  # once: it takes long on object storage
    before = file_fingerprint(config, known, files)
    full_set, kind = _load(config, task or TaskConfig(), files)
    if before is None:
        fingerprint = array_fingerprint(full_set)
    elif len(before):
        fingerprint = digested_again(config.name, before)
    else:  # the files were downloaded since
        fingerprint = file_fingerprint(config)
    repeated = repeated_files(files, fingerprint) if files else ()
    full_set = dataclasses.replace(
        full_set,
        augmentation=OwnAugmentation(config.own_augmentation) if config.own_augmentation else None,
        is_ever_augmented=config.augmentation != "none",
        advice=(*full_set.advice, *repeated, *_constant_targets(full_set), *unused_settings(config, kind)),
        fingerprint=fingerprint,
    )
    sizes = " + ".join(str(len(split)) for split in (full_set.train, full_set.validation, full_set.test))
    _logger.info("%s: %s examples read in %.1f s", config.name, sizes, time.perf_counter() - start_s)
    return full_set


def _constant_targets(full_set: FullSet) -> list[Note]:
    """Warn of numbers that are the same in all examples of a split, where there is no variance to explain."""
    if not isinstance(full_set.task, Regression):
        return []
    notes = list[Note]()
    for where, split in (("validation", full_set.validation), ("test", full_set.test)):
        values = split.arrays()["target"]
        if names := [full_set.task.target_names[k] for k in (values == values[0]).all(axis=0).nonzero()[0]]:
            text = f"{listed(names)} is the same in all {len(values)} {where} examples, of which there is no r2"
            notes.append(Note(text, is_warning=True))
    return notes


def _load(config: DataConfig, task: TaskConfig, files: DataFiles | None) -> tuple[FullSet, Kind]:
    """Build the full set with the reader of its source, and return it with the kind of its data."""
    kind, name = kind_of(config.name), config.name
    task = dataclasses.replace(task, name=_task_name(config, task))
    if config.streamed and kind != "path":
        raise not_streamed(f"{name} is a {'function' if kind == 'function' else 'named set'}")
    if task.name == "next_token":
        return of_texts(*_read_texts(config, files), config, task), "texts"
    if name in TEXT_NAMES:
        raise ValueError(f"{name} is text: its --task is next_token, not {task.name}")
    if kind == "named" and name not in TABLE_NAMES:
        source, targets, notes = read_named(config, task)
        return of_images(source, targets, config, task, notes), "images"
    if files and files.kind == "images":
        source, targets, notes = read_image_folders(files, config, task)
        return of_images(source, targets, config, task, notes), "images"
    if files and task.is_class and is_of_columns(files, config):
        returned = read_table_arrays(files, config)
    elif files:
        returned = read_tables(files, config, task.name)
    elif name in TABLE_NAMES:
        returned = read_named_table(config)
    else:
        returned = read_returned(config, task.name)
    if isinstance(returned, Tables):
        return of_tables(returned, config, task), "images by name" if returned.choice.are_images else "columns"
    full_set = of_arrays(returned.splits, config, task, returned.notes)
    if task.is_class:
        return full_set, "columns as arrays" if files else "arrays"
    is_image = isinstance(getattr(full_set.task, "inputs", None), ImageInputs)
    return full_set, "images by name" if is_image else "arrays by name"


def _task_name(config: DataConfig, task: TaskConfig) -> str:
    """Return the config's task, or for "auto" the task that the data are for."""
    if task.name != "auto":
        return task.name
    if config.name in TEXT_NAMES or config.name.lower().endswith(TEXT_SUFFIXES):
        return "next_token"
    return "regression" if config.name == "diabetes" else "classification"


def _read_texts(config: DataConfig, files: DataFiles | None) -> tuple[dict[SplitName, list[str]], tuple[Note, ...]]:
    if config.name in TEXT_NAMES:
        return read_named_texts(config)
    if config.streamed:
        raise ValueError(
            "data.streamed reads images and tables, and next_token is learned from text, which is held in memory: "
            "leave --data.streamed out"
        )
    if files:
        return read_texts(files, config)
    if kind_of(config.name) == "function":
        return read_returned_texts(config)
    raise ValueError(
        f"next_token is learned from text files and python_docs, not from {config.name}: give a path of text"
    )
