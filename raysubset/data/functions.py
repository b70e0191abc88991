"""Reads data sets that a user's own `package.module:function` returns."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raysubset.config import DataConfig, nearest
from raysubset.data.columns import read_columns
from raysubset.data.finding import DataFiles, Ignored
from raysubset.data.split import SPLITS, SplitName
from raysubset.data.tables import Tables, holds_images, holds_lists, tables_in_memory
from raysubset.errors import first_line, with_article
from raysubset.events import Note
from raysubset.tasks.column_values import array_of_lists, is_string
from raysubset.user_code.functions import call_function
from raysubset.user_code.given import is_given

_SERIES = "dict(inputs=…, label=…)"
_WANTED = "an Arrow table, a pair (inputs, targets) or a dict of arrays, a torch Dataset, or a dict of splits of these"


@dataclass(frozen=True)
class Arrays:
    """A data set of named arrays, [N, …] each, that is not of images with labels."""

    splits: Mapping[SplitName, Mapping[str, np.ndarray]]  # numbers or texts, finite, contiguous; alike in all splits
    notes: tuple[Note, ...]


def read_returned(config: DataConfig, task: str) -> Tables | Arrays:
    """Call the function of data.name without arguments, and recognise what it returns for a task.

    It returns one of the following; or a dict of them with "train" and perhaps "validation" and "test"; or two pairs,
    train and test, as Keras does:

    - an Arrow table, or another library's frame: of images if it has an image column, else of columns, which a user's
      own task gets as arrays;
    - a pair of arrays, inputs and targets, which are then named "inputs" ("image" for images) and "target" ("label"
      for a class for each image, "mask" for an integer for each pixel). Floats or truth values [N, A, B] beside labels
      are images only if A = B;
    - a dict of named arrays;
    - a torch Dataset with a length, whose items are such pairs or dicts.

    Raises:
        ValueError: if there is no such function, for what it raises, and if it returns anything else.
    """
    tables, arrays = dict[SplitName, tuple[str, pa.Table]](), dict[SplitName, dict[str, np.ndarray]]()
    notes: list[Note] = []
    for name, (value, where) in _splits_of(call_function("data.name", config.name), config).items():
        split = _recognise(value, config, where, task)
        read_as = ""
        if isinstance(split, dict):
            arrays[name], num = split, len(next(iter(split.values())))
            image = split.get("image", np.empty(0))
            is_grey = image.dtype.kind == "f" and image.ndim == 4 and image.shape[3] == 1
            if is_grey and ":" not in task and not isinstance(value, Mapping):
                read_as = f", {_shown(image)} as grey images (series go by name: {_SERIES})"
        else:
            tables[name], num = (f"the {name} split of {origin(config)}", split), split.num_rows
        notes.append(Note(f"{name} split: {num} examples of {origin(config)}{read_as}"))
    if tables and arrays:
        text = f"{_shown_name(config)} has a table as its {', '.join(tables)} split and arrays as {', '.join(arrays)}"
        raise ValueError(f"{text}: give all splits alike")
    if arrays:
        image = None if ":" in task else config.image_column  # images of other sizes may be resized
        _refuse_unlike(arrays, config, image)
        return Arrays(arrays, tuple(notes))
    return tables_in_memory(tables, config, task, notes)


def read_table_arrays(files: DataFiles, config: DataConfig) -> Arrays:
    """Read the columns of a path's files as arrays, for a user's own task, like those of a frame that is returned.

    Raises:
        ValueError: as read_columns() does, and for columns that are no arrays of numbers.
    """
    tables, notes = read_columns(files, config)
    arrays: dict[SplitName, dict[str, np.ndarray]] = {
        split: _table_arrays(table, f"the {split} split of {config.name}") for split, table in tables.items()
    }
    _refuse_unlike(arrays, config)
    return Arrays(arrays, notes)


def _table_arrays(table: pa.Table, where: str) -> dict[str, np.ndarray]:
    arrays = dict[str, np.ndarray]()
    for field, column in zip(table.schema, table.columns, strict=True):
        if holds_lists(field):
            values = array_of_lists(column, f"{field.name} of {where}", lambda row: f"in row {row}")
        else:
            values = column.to_numpy()
        arrays[field.name] = values.astype(str) if is_string(field.type) else values
    return _named_arrays(arrays, where)


def read_returned_texts(config: DataConfig) -> tuple[dict[SplitName, list[str]], tuple[Note, ...]]:
    """Call the function of data.name, which returns a text, a list of documents, or a dict of splits of these.

    Raises:
        ValueError: as read_returned() does, and if it returns anything but texts.
    """
    texts: dict[SplitName, list[str]] = {}
    for name, (value, where) in _splits_of(call_function("data.name", config.name), config).items():
        if not _is_text(value):
            raise ValueError(
                f"{where} is {with_article(value)}: for --task next_token give a text, a list of texts, "
                "or a dict of splits of these"
            )
        texts[name] = [value] if isinstance(value, str) else [*value]
    counts = {name: sum(map(len, documents)) for name, documents in texts.items()}
    notes = (f"{name} split: {num} characters of {origin(config)}" for name, num in counts.items())
    return texts, tuple(map(Note, notes))


def origin(config: DataConfig) -> str:
    """Return the origin of the data in words."""
    return "the data given" if is_given(config.name) else f"what {config.name} returned"


def _shown_name(config: DataConfig) -> str:
    """Return the data's name in messages: "data" for an object given as run(…, data=…)."""
    return "data" if is_given(config.name) else config.name


def _splits_of(returned: Any, config: DataConfig) -> dict[SplitName, tuple[Any, str]]:
    """Return each split's value and its name in messages, train first. A result without splits is training data."""
    if _is_pair(returned) and (all(map(_is_pair_of_arrays, returned)) or all(map(_is_dataset, returned))):
        returned = dict(zip(("train", "test"), returned, strict=True))
    ignored = Ignored(config)
    if not isinstance(returned, Mapping) or (returned and not {*returned} & {*SPLITS} and _are_arrays(returned)):
        ignored.refuse_unmatched(())
        return {"train": (returned, _shown_name(config))}
    splits, shown = ignored.chosen(returned), _shown_name(config)
    for name in splits:
        if name not in SPLITS:
            hint = nearest(str(name), SPLITS)
            raise ValueError(f"{shown} has a split {name!r}, not one of {', '.join(SPLITS)}{hint}")
    if "train" not in splits:
        raise ValueError(f"{shown} has no train split, only {', '.join(splits)}")
    return {name: (splits[name], f"{shown}'s {name} split") for name in SPLITS if name in splits}


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2


def _is_text(value: Any) -> bool:
    """Return True for a text or a list of texts."""
    texts = [value] if isinstance(value, str) else value
    return isinstance(texts, tuple | list) and bool(texts) and all(isinstance(text, str) for text in texts)


def _is_pair_of_arrays(value: Any) -> bool:
    """Return True for two arrays of one length, such as inputs and targets."""
    return _is_pair(value) and all(getattr(part, "ndim", 0) for part in value) and len(value[0]) == len(value[1])


def _are_arrays(values: Mapping[Any, Any]) -> bool:
    return all(isinstance(value, list) or getattr(value, "ndim", 0) for value in values.values())


def _recognise(value: Any, config: DataConfig, where: str, task: str) -> pa.Table | dict[str, np.ndarray]:
    """Read a split as a table, or as named arrays."""
    if _is_dataset(value):
        value = _stacked(value, where)
    if hasattr(value, "__arrow_c_stream__") and not isinstance(value, pa.Table):
        try:
            value = pa.table(value)
        except pa.ArrowException as error:  # such as a column of numbers and texts, or of complex numbers
            text = f"{where} does not make an Arrow table: {'; '.join(map(str, error.args))}"
            raise ValueError(f"{text}: give each column values of one type that Arrow has") from error
    if isinstance(value, pa.Table):
        if ":" not in task or holds_images(value.schema, config):
            return value
        return _table_arrays(value, where)
    if isinstance(value, Mapping):
        return _named_arrays(value, where)
    if _is_text(value):
        raise ValueError(f"{where} is text: use --task next_token to learn it")
    if not _is_pair(value):
        raise ValueError(f"{where} is {with_article(value)}: give {_WANTED}")
    inputs, targets = (_array(part, where) for part in value)
    if not inputs.ndim or targets.shape[:1] != inputs.shape[:1]:
        raise ValueError(
            f"{where} has {len(inputs) if inputs.ndim else 'no'} {'images' if inputs.ndim in (3, 4) else 'inputs'} but "
            f"labels of shape {targets.shape}: give one for each"
        )
    is_uint8_image = inputs.dtype == np.uint8 and (inputs.ndim == 3 or (inputs.ndim == 4 and inputs.shape[3] in (1, 3)))
    is_label = targets.dtype.kind in "iuUOb" and targets.size == len(targets)  # Keras has CIFAR's labels as [N, 1]
    is_mask = inputs.ndim in (3, 4) and targets.dtype.kind in "iub" and targets.shape == inputs.shape[:3]
    if inputs.ndim == 3 and inputs.dtype.kind in "fb" and is_label and len({*inputs.shape[1:]}) > 1 and ":" not in task:
        raise ValueError(
            f"{where} has {_shown(inputs)} beside labels, which may be series or grey images: name them, {_SERIES} for "
            "numbers that are standardised, dict(image=…, label=…) for pixels in [0, 1], which become 8 bits"
        )
    name, target = "inputs", "mask" if is_mask else "target"
    if is_uint8_image or (inputs.ndim in (3, 4) and is_label):
        name, inputs = "image", inputs[..., np.newaxis] if inputs.ndim == 3 else inputs
        target, targets = ("label", targets.reshape(-1)) if is_label else (target, targets)
    inputs = inputs[:, np.newaxis] if inputs.ndim == 1 else inputs
    return _named_arrays({name: inputs, target: targets}, where)


def _named_arrays(values: Mapping[Any, Any], where: str) -> dict[str, np.ndarray]:
    """Return the arrays, contiguous and in the machine's byte order, with truth values as numbers.

    Raises:
        ValueError: for arrays that differ in length, have no rows, hold objects, or have values that are not finite.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, value in values.items():
        if not isinstance(name, str) or not name.isidentifier() or name == "row":
            raise ValueError(f"{where} names an array {name!r}: give it the name of a Python variable, other than row")
        array = _array(value, f"{name} of {where}")
        if not array.ndim or not len(array):
            raise ValueError(f"{name} of {where} has shape {array.shape}: give one entry an example, and one example")
        if array.dtype.kind == "O" and all(isinstance(text, str) for text in array.flat):
            array = array.astype(str)
        if array.dtype.kind not in "biufU":
            raise ValueError(f"{name} of {where} has type {array.dtype}: it must be numbers or texts")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            row = int(np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1))[0])
            bad = array[row].ravel()[~np.isfinite(array[row].ravel())][0]
            raise ValueError(f"{name} of {where} has {bad} in row {row}: leave such rows out, or fill them in")
        truth = np.float32 if name == "inputs" else np.uint8  # integers as inputs are tokens
        kind = truth if array.dtype.kind == "b" else array.dtype.newbyteorder("=")
        arrays[name] = np.ascontiguousarray(array, dtype=kind)
    lengths = {name: len(array) for name, array in arrays.items()}
    if len({*lengths.values()}) != 1:
        summary = ", ".join(f"{name} {length}" for name, length in lengths.items()) or "no arrays"
        raise ValueError(f"the arrays of {where} differ in length ({summary}): give one row an example in each")
    return arrays


def _refuse_unlike(
    arrays: Mapping[SplitName, Mapping[str, np.ndarray]], config: DataConfig, image: str | None = None
) -> None:
    """Refuse splits whose arrays differ in names, in the kind of their numbers, or in shape, except that of `image`."""
    train, shown = arrays["train"], _shown_name(config)
    for split, other in arrays.items():
        if {*other} != {*train}:
            raise ValueError(
                f"{shown} gives {', '.join(train)} as train split and {', '.join(other)} as {split} split: "
                "give all splits alike"
            )
        for name, array in train.items():
            is_same_shape = name == image or array.shape[1:] == other[name].shape[1:]
            if array.dtype.kind != other[name].dtype.kind or not is_same_shape:
                raise ValueError(
                    f"{name} of {shown} is {_shown(array)} in the train split and {_shown(other[name])} in the "
                    f"{split} split: give all splits alike"
                )


def _shown(array: np.ndarray) -> str:
    return f"{array.dtype} [{', '.join(('N', *map(str, array.shape[1:])))}]"


def _is_dataset(value: Any) -> bool:
    torch = sys.modules.get("torch.utils.data")  # if it was not imported, there is no Dataset
    return torch is not None and isinstance(value, torch.Dataset)


def _stacked(dataset: Any, where: str) -> Any:
    """Read all items of a torch Dataset once, into a pair of arrays or a dict of them.

    Raises:
        ValueError: for a dataset without a length, for what reading an item raises, and for items that are unlike.
    """
    items: list[Any] = []
    try:
        for number in range(len(dataset)):
            items.append(dataset[number])
    except Exception as error:
        text = f"reading item {len(items)} of {where} raised {type(error).__name__}: {first_line(error)}"
        raise ValueError(f"{text}; a Dataset needs a length, and items by their numbers") from error
    if not items:
        raise ValueError(f"{where} has no items: give at least one")
    names = ("input", "target")
    rows: list[Mapping[str, Any]] = [
        item if isinstance(item, Mapping) else dict(zip(names, item, strict=True)) if _is_pair(item) else {}
        for item in items
    ]
    unlike = next((number for number, row in enumerate(rows) if not row or [*row] != [*rows[0]]), None)
    if unlike is not None:
        shown = f"{with_article(items[unlike])}{f' with {[*rows[unlike]]}' if rows[unlike] else ''}"
        raise ValueError(
            f"item {unlike} of {where} is {shown}: all should be pairs (input, target), or dicts with the same names"
        )
    arrays = {name: _array([_array(row[name], where) for row in rows], f"{name} of {where}") for name in rows[0]}
    return arrays if isinstance(items[0], Mapping) else (*arrays.values(),)


def _array(values: Any, where: str) -> np.ndarray:
    """Convert a numpy array, tensor or list to a numpy array, without a copy if possible."""
    try:
        return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    except ValueError as error:  # numpy's, for nested sequences of differing lengths
        unlike = _first_unlike(values)
        raise ValueError(
            f"{where} does not make one array, as where examples differ in shape{unlike or f': {first_line(error)}'}"
        ) from error
    except TypeError as error:  # torch's, for a type that numpy lacks: bfloat16
        raise ValueError(
            f"{where} does not make an array of numpy's: {first_line(error)}: give another type"
        ) from error


def _first_unlike(values: Any) -> str:
    """Return ': row 3 has shape (5,), row 0 (4,)' for a list of arrays or lists, else ''."""
    try:
        shapes = [np.shape(value) for value in values]
    except ValueError:
        return ""
    row = next((row for row, shape in enumerate(shapes) if shape != shapes[0]), None)
    if row is None:
        return ""
    return f": row {row} has shape {shapes[row]}, row 0 {shapes[0]}; give all one shape, padded if they differ in size"
