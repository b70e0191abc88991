"""Data sets out of the user's own `package.module:function`."""

from collections.abc import Mapping
from typing import Any, get_args

import numpy as np
import pyarrow as pa

from raysubset.config import DataConfig, nearest
from raysubset.data.ignored import Ignored
from raysubset.data.images import as_images
from raysubset.data.labels import as_labels
from raysubset.data.sources import Source, SourceSplit
from raysubset.data.split import SplitName
from raysubset.data.tables import from_tables
from raysubset.user_functions import call_function


def read_function(config: DataConfig) -> Source:
    """Call the function that data.name names, without arguments, and read what it returns.

    That is an Arrow table, a pair (images, labels) of arrays, a dict with "train" and perhaps "validation" and "test"
    of either, or a pair of pairs, train and test, as Keras gives them.

    Raises:
        ValueError: for a name that does not lead to a function, what it raises, or anything else returned.
    """
    returned = call_function("data.name", config.name)
    if _is_pair(returned) and all(map(_is_labelled, returned)):
        returned = dict(zip(("train", "test"), returned, strict=True))
    ignored = Ignored(config)
    if not isinstance(returned, Mapping):
        ignored.refuse_unmet(())
        return {"train": _split(returned, config, config.name)}
    known, splits = get_args(SplitName), ignored.without(returned)
    ignored.refuse_unmet(returned)
    for name in splits:
        if name not in known:
            raise ValueError(
                f"{config.name} returned a split {name!r}, not one of {', '.join(known)}{nearest(str(name), known)}"
            )
    if "train" not in splits:
        raise ValueError(f"{config.name} returned no train split, only {', '.join(splits)}")
    return {name: _split(value, config, f"{config.name}'s {name} split") for name, value in splits.items()}


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2


def _is_labelled(value: Any) -> bool:
    """Whether it is a pair of arrays, of images and their labels."""
    return _is_pair(value) and [getattr(part, "ndim", 0) for part in value] in ([3, 1], [4, 1], [3, 2], [4, 2])


def _split(value: Any, config: DataConfig, where: str) -> SourceSplit:
    if isinstance(value, pa.Table):
        return from_tables({where: value}, config, where)
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ValueError(
            f"{where} is a {type(value).__name__}: it should return an Arrow table or a pair (images, labels)"
        )
    pixels, numbers = (_array(part, where) for part in value)
    images, findings = as_images(pixels, where, config.image_size)
    if numbers.ndim == 2 and numbers.shape[1] == 1:  # as Keras has CIFAR's
        numbers = numbers[:, 0]
    if numbers.ndim != 1 or len(numbers) != len(images):
        raise ValueError(f"{where} has {len(images)} images but labels of shape {numbers.shape}: give one an image")
    try:
        found = pa.chunked_array([pa.array(numbers)])
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:  # objects of several types
        raise ValueError(f"labels of {where} must be integers or class names: {error}") from error
    labels, class_names = as_labels(found, where)
    return SourceSplit(images, labels, class_names, findings=findings, where=where)


def _array(values: Any, where: str) -> np.ndarray:
    """A numpy array of numpy arrays, tensors or lists, without copying where that can be."""
    try:
        return np.asarray(values)
    except ValueError as error:  # numpy's, for nested sequences of differing lengths
        raise ValueError(f"{where} does not make one array, as where images differ in shape: {error}") from error
