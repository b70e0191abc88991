"""Loads every data set: finds its reader, and builds the FullSet from what it reads."""

import dataclasses
import logging
import time

import numpy as np
import pyarrow as pa

from raysubset.config import DataConfig, TaskConfig
from raysubset.data.columns import is_of_columns, read_tables
from raysubset.data.contents import Kind, array_fingerprint, file_fingerprint, kind_of, refuse_changed, unused_settings
from raysubset.data.examples import OwnAugmentation
from raysubset.data.files import not_streamed, read_image_folders, read_texts
from raysubset.data.finding import TEXT_SUFFIXES, find_files
from raysubset.data.fitting import of_arrays, of_tables, of_texts
from raysubset.data.full_set import FullSet
from raysubset.data.functions import Arrays, origin, read_returned, read_returned_texts, read_table_arrays
from raysubset.data.image_sets import of_images
from raysubset.data.named import TABLE_NAMES, TEXT_NAMES, read_named, read_named_table, read_named_texts
from raysubset.data.sources import Source
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
    before = file_fingerprint(config, known)
    full_set, kind = _load(config, task or TaskConfig())
    full_set = dataclasses.replace(
        full_set,
        augmentation=OwnAugmentation(config.own_augmentation) if config.own_augmentation else None,
        is_ever_augmented=config.augmentation != "none",
        advice=(*full_set.advice, *_constant_targets(full_set), *unused_settings(config, kind)),
        fingerprint=_fingerprint(full_set, config, before),
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


def _fingerprint(full_set: FullSet, config: DataConfig, before: pa.Table | None) -> pa.Table:
    """Return the fingerprint of the set's files, which must not have changed since `before`, or else of its arrays."""
    after = file_fingerprint(config, before)
    if after is None:
        return array_fingerprint(full_set)
    if before is not None and len(before):  # it is empty if the files were downloaded since
        refuse_changed(config.name, before, after)
    return after


def _load(config: DataConfig, task: TaskConfig) -> tuple[FullSet, Kind]:
    """Build the full set with the reader of its source, and return it with the kind of its data."""
    kind, name = kind_of(config.name), config.name
    task = dataclasses.replace(task, name=_task_name(config, task))
    if config.streamed and kind != "path":
        raise not_streamed(f"{name} is a {'function' if kind == 'function' else 'named set'}")
    if task.name == "next_token":
        texts = read_named_texts(config) if name in TEXT_NAMES else _read_texts(config)
        return of_texts(*texts, config, task), "texts"
    if name in TABLE_NAMES:
        return of_tables(read_named_table(config), config, task), "columns"
    if name in TEXT_NAMES:
        raise ValueError(f"{name} is text: its --task is next_token, not {task.name}")
    if kind == "named":
        images = _with_origin(read_named(config), f"the named set {name}")
    elif kind == "function":
        match read_returned(config, task.name):
            case Tables() as tables:
                return of_tables(tables, config, task), "images by name" if tables.are_images else "columns"
            case Arrays(splits=splits, notes=notes):
                full_set = of_arrays(splits, config, task, notes)
                if task.is_class:
                    return full_set, "arrays"
                is_image = isinstance(getattr(full_set.task, "inputs", None), ImageInputs)
                return full_set, "images by name" if is_image else "arrays by name"
            case returned:
                images = _with_origin(returned, origin(config))
    elif find_files(config).kind == "images":
        images = read_image_folders(config, task.name)
    elif task.is_class and is_of_columns(config):
        arrays = read_table_arrays(config)
        return of_arrays(arrays.splits, config, task, arrays.notes), "columns as arrays"
    else:
        tables = read_tables(config, task.name)
        return of_tables(tables, config, task), "images by name" if tables.are_images else "columns"
    return of_images(images, config, task), "images"


def _task_name(config: DataConfig, task: TaskConfig) -> str:
    """Return the config's task, or for "auto" the task that the data are for."""
    if task.name != "auto":
        return task.name
    if config.name in TEXT_NAMES or config.name.lower().endswith(TEXT_SUFFIXES):
        return "next_token"
    return "regression" if config.name == "diabetes" else "classification"


def _read_texts(config: DataConfig) -> tuple[dict[SplitName, list[str]], tuple[Note, ...]]:
    kind = kind_of(config.name)
    if kind == "named":
        raise ValueError(
            f"next_token is learned from text files and python_docs, not from {config.name}: give a path of text"
        )
    if config.streamed:
        raise ValueError(
            "data.streamed reads images and tables, and next_token is learned from text, which is held in memory: "
            "leave --data.streamed out"
        )
    return read_returned_texts(config) if kind == "function" else read_texts(config)


def _with_origin(source: Source, origin: str) -> Source:
    """Add a note to each split: how many examples were read, and from where."""
    for name, split in source.items():
        assert isinstance(split.images, np.ndarray)
        note = Note(f"{name} split: {len(split.images)} examples of {origin}")
        source[name] = dataclasses.replace(split, notes=(note, *split.notes))
    return source
