"""Reads images and masks from Arrow columns: encoded images, their paths, Hugging Face's structs, or tensors."""

import json
import math
from collections.abc import Callable

import numpy as np
import pyarrow as pa

from raysubset.config import DataConfig
from raysubset.data.findings import Findings
from raysubset.data.images import EncodedImages, as_images, decode_masks
from raysubset.errors import listed
from raysubset.tasks.column_values import is_string

# The extension types that ray.data writes. Arrow knows them only in processes that import ray.data.
_RAY_TENSORS = ("ray.data.arrow_tensor", "ray.data.arrow_tensor_v2")
_RAY_VARIABLE_TENSORS = "ray.data.arrow_variable_shaped_tensor"

ReadFile = Callable[[str], bytes]  # of the file system that the table is in


def image_column(table: pa.Table, name: str, where: str) -> pa.ChunkedArray:
    """Return a file's column of images or masks in a layout that can be concatenated with those of other files.

    ray.data's tensors become Arrow's own, whose type has the shape.

    Raises:
        ValueError: for tensors of ray.data whose shape differs from the one in the metadata.
    """
    column, field = table.column(name), table.schema.field(name)
    if pa.types.is_binary_view(column.type):
        return column.cast(pa.large_binary())
    kind, shape = _kind_of_tensors(field)
    if isinstance(column.type, pa.BaseExtensionType) and kind.startswith("ray.data."):
        column = _storage(column)
    is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    if kind in _RAY_TENSORS and is_list:
        return _fixed_shape_tensors(column, _ray_shape(shape, where), where)
    if kind == _RAY_VARIABLE_TENSORS:
        shapes = {tuple(shape) for chunk in column.chunks for shape in chunk.field("shape").to_pylist() if shape}
        if len(shapes) == 1 and not column.null_count:
            pixels = pa.chunked_array([chunk.field("data") for chunk in column.chunks])
            return _fixed_shape_tensors(pixels, list(shapes.pop()), where)
    return column


def _kind_of_tensors(field: pa.Field) -> tuple[str, bytes]:
    """Return the name of an extension type and its parameters, also where Arrow does not know the type."""
    if isinstance(field.type, pa.FixedShapeTensorType):
        return field.type.extension_name, json.dumps(field.type.shape).encode()
    if isinstance(field.type, pa.ExtensionType):
        return field.type.extension_name, field.type.__arrow_ext_serialize__()
    metadata = field.metadata or {}
    return metadata.get(b"ARROW:extension:name", b"").decode(), metadata.get(b"ARROW:extension:metadata", b"")


def _storage(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)


def with_lists(table: pa.Table) -> pa.Table:
    """Return a table whose columns of tensors in one dimension, Arrow's or ray.data's, are lists."""
    for place, field in enumerate(table.schema):
        kind, shape = _kind_of_tensors(field)
        if kind not in (*_RAY_TENSORS, "arrow.fixed_shape_tensor"):
            continue
        try:
            lengths = json.loads(shape)
        except ValueError:  # pickled, which image_column() refuses
            continue
        if isinstance(lengths, list) and len(lengths) == 1:
            column = table.column(place)
            lists = _storage(column) if isinstance(field.type, pa.BaseExtensionType) else column
            table = table.set_column(place, pa.field(field.name, lists.type), lists)
    return table


def plain(table: pa.Table, config: DataConfig, path: str) -> pa.Table:
    """Convert a table's columns to layouts that can be concatenated with those of other files."""
    for place, field in enumerate(table.schema):
        if pa.types.is_string_view(field.type):
            column = table.column(place).cast(pa.string())
        elif field.name in (config.image_column, config.label_column):
            column = image_column(table, field.name, path)
        else:
            continue
        table = table.set_column(place, field.name, column)
    return table


def with_full_paths(table: pa.Table, name: str, where: str) -> pa.Table:
    """Return the table, with paths in a column of texts below the folder of the table's file, unless they are absolute.

    Args:
        name: the column of images. A table without it, or whose images are no texts, stays.
        where: the path of the table's file.
    """
    if name not in table.column_names or not is_string(table.schema.field(name).type):
        return table
    folder = where.rpartition("/")[0]
    texts = table.column(name).to_pylist()
    paths = [text if text is None or text.startswith("/") else f"{folder}/{text}" for text in texts]
    return table.set_column(table.column_names.index(name), name, pa.array(paths, pa.large_string()))


def _ray_shape(text: bytes, where: str) -> list[int]:
    try:
        shape = json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"the shape of ray.data's tensors in {where} is pickled, as Ray 2.49 to 2.54 wrote it, and nothing is "
            "unpickled here: write the files with a newer Ray"
        ) from error
    if not isinstance(shape, list) or not all(isinstance(length, int) and length > 0 for length in shape):
        raise ValueError(f"ray.data's tensors in {where} have shape {shape}: write the files again")
    return shape


def _fixed_shape_tensors(column: pa.ChunkedArray, shape: list[int], where: str) -> pa.ChunkedArray:
    """Convert lists of pixels to tensors in the same memory."""
    refuse_nulls(column, "image", where)
    size = math.prod(shape)
    type_ = pa.fixed_shape_tensor(column.type.value_type, shape)
    chunks = []
    for chunk in column.chunks:
        lengths = chunk.value_lengths()
        if not all(length == size for length in set(lengths.unique().to_pylist())):
            raise ValueError(
                f"images of {where} do not have the shape {shape} that ray.data wrote: write the files again"
            )
        flat = pa.FixedSizeListArray.from_arrays(chunk.flatten(), size)
        chunks.append(pa.ExtensionArray.from_storage(type_, flat))
    return pa.chunked_array(chunks, type_)


def images_of(
    column: pa.ChunkedArray,
    where: str,
    *,
    image_size: int | None,
    first_row: int = 0,
    read_file: ReadFile | None = None,
) -> tuple[np.ndarray | EncodedImages, Findings]:
    """Return a column's images, uint8 [n, H, W, C] or encoded, with findings. The column must not be empty.

    Args:
        where: the name of the file or files in messages.
        first_row: the number of the column's first row in these files.
        read_file: reads the files whose full paths a column of texts holds; None: such a column is refused.

    Raises:
        ValueError: for nulls and values that are no images.
    """
    encoded = _encoded_or_chunks(column, "image", where, first_row, read_file)
    if isinstance(encoded, EncodedImages):
        return encoded, Findings()
    if pa.types.is_struct(column.type) and [field.name for field in column.type] == ["data", "shape"]:
        return _of_variable_shapes(encoded, where, image_size)
    tensors = _tensors(encoded, "image", where)
    is_flat = tensors.ndim == 2
    if is_flat:
        tensors = tensors.reshape(-1, *_square(tensors.shape[1], where))
    images, findings = as_images(tensors, where, image_size)
    if is_flat and images.shape[3] == 3:
        findings += Findings(flat_shape=tensors.shape[1:])
    return images, findings


def masks_of(
    column: pa.ChunkedArray, images: np.ndarray | EncodedImages, where: str, *, image_size: int | None
) -> np.ndarray:
    """Return a column's masks, integers [n, H, W], or [n, H * W] for flat lists. The column must not be empty.

    Args:
        images: the images of the masks. If both are encoded, each mask must be as large as its image, and is resized
            as the image is.
        where: the name of the file or files in messages.

    Raises:
        ValueError: for nulls and values that are no masks of these images.
    """
    encoded = _encoded_or_chunks(column, "mask", where)
    if isinstance(encoded, EncodedImages):
        return decode_masks(encoded, images, where, image_size)
    masks = _tensors(encoded, "mask", where)
    return masks[..., 0] if masks.ndim == 4 and masks.shape[3] == 1 else masks


def _encoded_or_chunks(
    column: pa.ChunkedArray, noun: str, where: str, first_row: int = 0, read_file: ReadFile | None = None
) -> EncodedImages | list[pa.Array]:
    """Return a column's encoded images or masks, or else its chunks that are not empty."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    refuse_nulls(column, noun, where, first_row)
    if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
        column = pa.chunked_array([chunk.field("bytes") for chunk in column.chunks])
        refuse_nulls(column, noun, where, first_row, text=f"a path without bytes: embed the {noun}s")
    if any(is_kind(column.type) for is_kind in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)):
        return EncodedImages(
            len(column),
            read=lambda row: column[row].as_py(),
            describe=lambda row: f"the {noun} in row {first_row + row} of {where}",
        )
    if read_file is not None and is_string(column.type):
        return EncodedImages(
            len(column), read=lambda row: read_file(column[row].as_py()), describe=lambda row: column[row].as_py()
        )
    return [chunk for chunk in column.chunks if len(chunk)]


def _of_variable_shapes(chunks: list[pa.Array], where: str, image_size: int | None) -> tuple[np.ndarray, Findings]:
    """Read ray.data's tensors of several shapes, resizing them one by one."""
    if image_size is None:
        raise ValueError(f"images of {where} differ in shape: give --data.image-size to resize them")
    images, findings = [], Findings()
    for chunk in chunks:
        for pixels, shape in zip(chunk.field("data"), chunk.field("shape").to_pylist(), strict=True):
            values = pixels.values.to_numpy(zero_copy_only=False).reshape(1, *shape)
            image, image_findings = as_images(values, where, image_size)
            images.append(image)
            findings += image_findings
    channels = max(image.shape[3] for image in images)
    return np.concatenate([np.broadcast_to(image, (*image.shape[:3], channels)) for image in images]), findings


def _tensors(chunks: list[pa.Array], noun: str, where: str) -> np.ndarray:
    """Join chunks of tensors of one shape to [n, …]. A single chunk is not copied."""
    tensors = [_tensors_of_chunk(chunk, noun, where) for chunk in chunks]
    return tensors[0] if len(tensors) == 1 else np.concatenate(tensors)


def _tensors_of_chunk(chunk: pa.Array, noun: str, where: str) -> np.ndarray:
    refusal = f"{noun}s of {where} are {chunk.type}: need encoded bytes, fixed_shape_tensor or fixed_size_list<uint8>"
    if isinstance(chunk.type, pa.FixedShapeTensorType):
        if not _is_number(chunk.type.value_type):
            raise ValueError(refusal)
        order = chunk.type.permutation or []
        if any(order[place] != number for number, place in enumerate(order)):  # pyarrow 26 has other strides for it
            raise ValueError(
                f"{noun}s of {where} are tensors whose dimensions are permuted by {order}, which writers take in two "
                "ways: write them in the order [H, W, C], without a permutation"
            )
        if chunk.storage.flatten().null_count:
            raise ValueError(f"{noun}s of {where} hold null pixels: give each a number")
        return chunk.to_numpy_ndarray()
    shape, values = [len(chunk)], chunk
    while pa.types.is_fixed_size_list(values.type):
        shape.append(values.type.list_size)
        values = values.flatten()
        if values.null_count:
            raise ValueError(f"{noun}s of {where} hold null pixels: give each a number")
    if len(shape) == 1 or not _is_number(values.type):
        raise ValueError(refusal)
    return values.to_numpy().reshape(shape)


def _is_number(type_: pa.DataType) -> bool:
    return pa.types.is_integer(type_) or pa.types.is_floating(type_)


def _square(size: int, where: str) -> tuple[int, int, int]:
    """Return [H, W, C] of a flat image: a square, grey or with colours; no size can be both."""
    for channels in (1, 3):
        side = math.isqrt(size // channels)
        if side * side * channels == size:
            return side, side, channels
    raise ValueError(f"images of {where} are flat lists of {size} pixels, no square: use arrow.fixed_shape_tensor")


def refuse_nulls(
    column: pa.ChunkedArray, noun: str, where: str, first_row: int = 0, *, text: str = "null: leave such rows out"
) -> None:
    """Refuse nulls in a column. Of many rows, the message names some and counts all."""
    if not column.null_count:
        return
    rows = [str(row + first_row) for row in np.flatnonzero(column.is_null().to_numpy())]
    if len(rows) == 1:
        raise ValueError(f"the {noun} in row {rows[0]} of {where} is {text}")
    raise ValueError(f"the {noun}s in rows {listed(rows)} of {where} are {text}")
