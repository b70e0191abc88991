"""Images made uint8 [N, H, W, C] of one shape: decoded, resized, quantised, or refused by name."""

import io
import struct
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

_DEEP_GREY = ("I;16", "I;16L", "I;16B", "I;16N")  # Pillow's modes of 16 bits

# What Pillow's decoders raise on damaged files, found by damaging thousands of each format at random.
_DAMAGE = (OSError, SyntaxError, TypeError, ValueError, struct.error)

_BLOCK = 16  # images that a thread does at a time
_BLOCKS_AHEAD = 64  # that may wait, decoded, to be taken

T = TypeVar("T")


def as_images(values: np.ndarray, where: str, image_size: int | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return an array of images as uint8 [N, H, W, C] of the wanted size, and notes on what was done to them.

    Args:
        values: uint8, or floats in [0, 1] which are rounded to 256 levels; [N, H, W] or [N, H, W, C], C = 1 or 3.
        where: names them in messages.
        image_size: side in pixels; None leaves them as they are.

    Raises:
        ValueError: for other shapes and types, no images, NaN, or floats beyond [0, 1].
    """
    array = values[..., np.newaxis] if values.ndim == 3 else values
    if array.ndim != 4 or array.shape[3] not in (1, 3):
        raise ValueError(
            f"images of {where} have shape {array.shape}: they must be [N, H, W] or [N, H, W, C], C = 1 or 3"
        )
    if array.size == 0:
        raise ValueError(f"{where} holds no images: its shape is {array.shape}; give at least one of a pixel")
    notes = ()
    if array.dtype.kind == "f":
        array = _quantise(array, where)
        notes = (rounding_note(where),)
    if array.dtype != np.uint8:
        raise ValueError(f"images of {where} are {array.dtype}: they must be uint8, or floats in [0, 1]")
    if image_size is not None and array.shape[1:3] != (image_size, image_size):
        array = _resize_all(array, image_size)
    return np.ascontiguousarray(array), notes


def rounding_note(where: str) -> str:
    """What is said where floats were quantised."""
    return f"float pixels of {where} rounded to 8 bits"


def decode_images(
    num: int, read: Callable[[int], bytes], describe: Callable[[int], str], image_size: int | None
) -> np.ndarray:
    """Decode images once, in threads, into uint8 [N, H, W, C]: C = 1 if all are grey, else 3.

    Args:
        num: number of images, one at least.
        read: the encoded bytes of an image by number; called from several threads.
        describe: names an image in messages.
        image_size: side in pixels; None demands that all have one shape.

    Raises:
        ValueError: naming an image that cannot be decoded, or two of differing shapes.
    """

    def decode(number: int) -> np.ndarray:
        data = read(number)
        try:
            return _decode(data, image_size)
        except _DAMAGE as error:
            why = str(error).partition(" <_io")[0] or type(error).__name__  # Pillow names the buffer it read from
            raise ValueError(f"{describe(number)} cannot be decoded: {why}") from error

    images: np.ndarray | None = None
    with closing(_in_threads(decode, num)) as decoded:
        for number, image in enumerate(decoded):
            height, width, channels = image.shape
            if images is None:
                images = np.empty((num, height, width, channels), dtype=np.uint8)
            if (height, width) != images.shape[1:3]:
                raise ValueError(
                    f"images differ in shape: {describe(0)} is {images.shape[1]}x{images.shape[2]}, {describe(number)} "
                    f"{height}x{width}: give --data.image-size to resize them"
                )
            if channels > images.shape[3]:  # the first that is not grey
                images = np.repeat(images, channels, axis=3)
            images[number] = image
    assert images is not None
    return images


def _in_threads(work: Callable[[int], T], num: int) -> Generator[T, None, None]:
    """What the work makes of 0 … num - 1, in this order; threads are some blocks ahead of whoever takes it."""
    pool = ThreadPoolExecutor()
    ahead: deque[Future[list[T]]] = deque()
    try:
        for start in range(0, num, _BLOCK):
            numbers = range(start, min(start + _BLOCK, num))
            ahead.append(pool.submit(lambda numbers: [work(number) for number in numbers], numbers))
            if len(ahead) > _BLOCKS_AHEAD:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _decode(data: bytes, image_size: int | None) -> np.ndarray:
    """Decode to uint8 [H, W, 1] if the file is grey, else [H, W, 3]; turned as its EXIF orientation says."""
    from PIL import Image, ImageOps

    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error
    if image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels (mode {image.mode}): save it with 8 or 16 bits")
    if image.mode in _DEEP_GREY:
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    pixels = np.asarray(image if image_size is None else _resize(image, image_size))
    return pixels if pixels.ndim == 3 else pixels[..., np.newaxis]


def _resize(image: "Image.Image", side: int) -> "Image.Image":
    """Resize the shorter side and crop the centre, in one antialiased pass."""
    from PIL import Image, ImageOps

    return ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR)


def _resize_all(images: np.ndarray, side: int) -> np.ndarray:
    from PIL import Image

    num, _, _, channels = images.shape
    resized = np.empty((num, side, side, channels), dtype=np.uint8)

    def resize(number: int) -> np.ndarray:
        image = images[number, ..., 0] if channels == 1 else images[number]
        return np.asarray(_resize(Image.fromarray(image), side)).reshape(side, side, channels)

    for number, image in enumerate(_in_threads(resize, num)):
        resized[number] = image
    return resized


def _quantise(pixels: np.ndarray, where: str) -> np.ndarray:
    """Floats in [0, 1] as uint8, with no more memory than that."""
    low, high = pixels.min(), pixels.max()  # NaN where there is one
    if not np.isfinite([low, high]).all():
        bad = np.flatnonzero(~np.isfinite(pixels).all(axis=(1, 2, 3)))
        raise ValueError(
            f"image {bad[0]} of {where} has pixels that are NaN or infinite ({len(bad)} such images): give finite ones"
        )
    if low < 0 or high > 1:
        raise ValueError(f"pixels of {where} run from {low:g} to {high:g}: floats must lie in [0, 1], or give uint8")
    quantised = np.empty(pixels.shape, dtype=np.uint8)
    for image, own in zip(pixels, quantised, strict=True):
        own[:] = np.rint(image * 255)
    return quantised
