"""An Arrow column as images: encoded images, Hugging Face's structs, or tensors of one shape."""

import math

import numpy as np
import pyarrow as pa

from raysubset.config import DataConfig
from raysubset.data.images import as_images, decode_images


def images_of(column: pa.ChunkedArray, config: DataConfig, where: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return a column's images, uint8 [n, H, W, C], and notes on what was done to them; there is one at least.

    Raises:
        ValueError: for nulls, or what is no image.
    """
    if column.null_count:
        raise ValueError(f"the image in row {_first_null(column)} of {where} is null: leave such rows out")
    if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
        column = pa.chunked_array([chunk.field("bytes") for chunk in column.chunks])
        if column.null_count:
            row = _first_null(column)
            raise ValueError(f"the image in row {row} of {where} is a path without bytes: embed the images")
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        return _decoded(column, config, where), ()
    chunks = [_tensors(chunk, where) for chunk in column.chunks if len(chunk)]
    return as_images(chunks[0] if len(chunks) == 1 else np.concatenate(chunks), where, config.image_size)


def _decoded(column: pa.ChunkedArray, config: DataConfig, where: str) -> np.ndarray:
    return decode_images(
        len(column),
        read=lambda row: column[row].as_py(),
        describe=lambda row: f"the image in row {row} of {where}",
        image_size=config.image_size,
    )


def _tensors(chunk: pa.Array, where: str) -> np.ndarray:
    """A chunk of equal tensors as a view [n, …] of its memory."""
    if isinstance(chunk.type, pa.FixedShapeTensorType):
        if chunk.storage.flatten().null_count:
            raise ValueError(f"images of {where} hold null pixels")
        return chunk.to_numpy_ndarray()
    shape, values = [len(chunk)], chunk
    while pa.types.is_fixed_size_list(values.type):
        shape.append(values.type.list_size)
        values = values.flatten()
        if values.null_count:
            raise ValueError(f"images of {where} hold null pixels")
    if len(shape) == 1 or not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        raise ValueError(
            f"images of {where} are {chunk.type}: need encoded bytes, fixed_shape_tensor or fixed_size_list<uint8>"
        )
    if len(shape) == 2:
        shape[1:] = _square(shape[1], where)
    return values.to_numpy().reshape(shape)


def _square(size: int, where: str) -> tuple[int, int, int]:
    """[H, W, C] of a flat image: a grey or a coloured square, which no size can both be."""
    for channels in (1, 3):
        side = math.isqrt(size // channels)
        if side * side * channels == size:
            return side, side, channels
    raise ValueError(f"images of {where} are flat lists of {size} pixels, no square: use arrow.fixed_shape_tensor")


def _first_null(column: pa.ChunkedArray) -> int:
    return column.is_null().index(True).as_py()
