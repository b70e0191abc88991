"""Converts images to uint8 [N, H, W, C] of one shape: decodes, resizes and quantises them, or refuses them by name."""

import io
import struct
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps

from raysubset.data.findings import FULL_RANGE, Findings, GreyRange

_DEEP_GREY = ("I", "I;16", "I;16L", "I;16B", "I;16N")  # Pillow's modes of more than 8 bits
_WIDEST = (-(2**15), 2**16 - 1)  # the range of 16 bits, signed or unsigned
_WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
_GREY = ("1", "L", "LA", "La")
_MASK_MODES = ("1", "L", "P", *_DEEP_GREY)  # a palette's colours do not matter, its numbers are the classes
_FEW_GREYS = ("L;2", "L;4")  # the beginnings of raw modes: Pillow reads a mask's 1 as 85, or as 17
_LOSSY = ("JPEG", "MPO")
_WITH_FRAMES = ("GIF", "TIFF", "WEBP", "PNG", "AVIF")  # not MPO, whose further pictures are previews of the photo
_ORIENTATION = 0x0112  # EXIF's tag; 1 is upright

# The errors of Pillow's decoders on damaged files, found by damaging thousands of each format at random,
# and its refusal of images of more than 179 million pixels.
_DAMAGE = (OSError, SyntaxError, TypeError, ValueError, struct.error, Image.DecompressionBombError)
_MOST_NAMED = 10  # damaged images; after so many, reading stops

_BLOCK = 16  # images that a thread decodes at a time
_NUM_AHEAD = 1024  # images that are decoded ahead

T = TypeVar("T")


def _damaged(damages: list[tuple[str, str]]) -> ValueError:
    """Return the error for images that cannot be decoded, given a name and a reason for each."""
    if len(damages) == 1:
        return ValueError(" cannot be decoded: ".join(damages[0]))
    prefix = "at least " if len(damages) >= _MOST_NAMED else ""
    summary = ", ".join(f"{image} ({reason})" for image, reason in damages)
    if len(reasons := {reason for _, reason in damages}) == 1:
        summary = f"{', '.join(image for image, _ in damages)}: {reasons.pop()}"
    return ValueError(f"{prefix}{len(damages)} images cannot be decoded: {summary}")


@dataclass(frozen=True)
class EncodedImages:
    """The encoded images of a source. They are decoded once the whole set is known."""

    num: int  # at least one
    read: Callable[[int], bytes]  # returns the encoded bytes of an image by number; called from several threads
    describe: Callable[[int], str]  # returns the name of an image in messages

    def __len__(self) -> int:
        return self.num


def as_images(values: np.ndarray, where: str, image_size: int | None) -> tuple[np.ndarray, Findings]:
    """Convert an array of images to uint8 [N, H, W, C] of a size, and return findings.

    Args:
        values: uint8, or floats in [0, 1], which are rounded to 256 levels; [N, H, W] or [N, H, W, C], C = 1 or 3.
        where: the name of the images in messages.
        image_size: the side in pixels; None keeps the size.

    Raises:
        ValueError: for other shapes and types, no images, NaN, or floats outside [0, 1].
    """
    array = values[..., np.newaxis] if values.ndim == 3 else values
    if array.ndim != 4 or array.shape[3] not in (1, 3):
        is_channels_first = array.ndim == 4 and array.shape[1] in (1, 3)
        hint = ": transpose(0, 2, 3, 1) puts the channels last" if is_channels_first else ""
        raise ValueError(
            f"images of {where} have shape {array.shape}: they must be [N, H, W] or [N, H, W, C], C = 1 or 3{hint}"
        )
    if array.size == 0:
        raise ValueError(f"{where} holds no images: its shape is {array.shape}; give at least one of a pixel")
    findings = Findings()
    if array.dtype.kind == "f":
        array = _quantise(array, where)
        findings = Findings(num_rounded=len(array))
    if array.dtype != np.uint8:
        raise ValueError(
            f"images of {where} are {array.dtype}: they must be uint8, or floats in [0, 1]: divide them by the value "
            "that is white (4095 where 12 bits are used)"
        )
    if image_size is not None and array.shape[1:3] != (image_size, image_size):
        array = _resize_all(array, image_size)
    return np.ascontiguousarray(array), findings


def decode(
    encoded: EncodedImages, image_size: int | None, grey_range: GreyRange | None = FULL_RANGE
) -> tuple[np.ndarray, Findings]:
    """Decode images once, in threads, into uint8 [N, H, W, C], C = 1 if all are grey, else 3; and return findings.

    Args:
        encoded: at least one image.
        image_size: the side in pixels; None: all images must have one shape.
        grey_range: the full set's black and white, for pixels of more than 8 bits. None if it is not chosen yet: they
            are then read as if they used all 16.

    Raises:
        ValueError: with the names of images that cannot be decoded, or of two that differ in shape.
    """
    return _decode_all(encoded, lambda data, _: _decode(data, image_size, grey_range))


def decode_masks(
    masks: EncodedImages, images: EncodedImages | np.ndarray, where: str, image_size: int | None
) -> np.ndarray:
    """Decode masks once, in threads, into uint8 [N, H, W] of their stored values.

    Args:
        images: the images of the masks. An encoded image must be as large as its mask.
        where: the name of the masks in messages.
        image_size: the side in pixels; masks are resized and cropped as their images are, to the nearest pixel.

    Raises:
        ValueError: with the names of masks that cannot be decoded or differ in size from their image, or of two that
            differ in shape.
    """
    if image_size is not None and not isinstance(images, EncodedImages):
        raise ValueError(
            f"images of {where} are tensors, whose size before --data.image-size is not compared with their masks': "
            "resize both before, or encode the images as PNG"
        )

    def decode_one(data: bytes, number: int) -> tuple[np.ndarray, Findings]:
        size = _size(images.read(number)) if isinstance(images, EncodedImages) else None
        return _decode_mask(data, size, image_size), Findings()

    return _decode_all(masks, decode_one)[0][..., 0]


def _decode_all(
    encoded: EncodedImages, decode_one: Callable[[bytes, int], tuple[np.ndarray, Findings]]
) -> tuple[np.ndarray, Findings]:
    """Decode all images to uint8 [N, H, W, C], with findings.

    Args:
        decode_one: decodes an image, given its bytes and number, to [H, W, C], with findings.
    """

    def decode_or_name(number: int) -> tuple[np.ndarray, Findings] | str:
        data = encoded.read(number)
        try:
            return decode_one(data, number)
        except _DAMAGE as error:
            return str(error).partition(" <_io")[0] or type(error).__name__  # without the buffer that Pillow names

    images: np.ndarray | None = None
    findings, damages = Findings(), list[tuple[str, str]]()
    with closing(_in_threads(decode_or_name, encoded.num)) as decoded:
        for number, image in enumerate(decoded):
            if isinstance(image, str):
                damages.append((encoded.describe(number), image))
                if len(damages) == _MOST_NAMED:
                    break
            if isinstance(image, str) or damages:
                continue
            pixels, image_findings = image
            if images is None:
                images = np.empty((encoded.num, *pixels.shape), dtype=np.uint8)
            if pixels.shape[:2] != images.shape[1:3]:
                first, other = (f"{height}x{width}" for height, width in (images.shape[1:3], pixels.shape[:2]))
                raise ValueError(
                    f"images differ in shape: {encoded.describe(0)} is {first}, {encoded.describe(number)} {other}: "
                    "give --data.image-size to resize them"
                )
            if pixels.shape[2] > images.shape[3]:  # the first image with colours
                images = np.repeat(images, pixels.shape[2], axis=3)
            images[number] = pixels
            findings += image_findings
    if damages:
        raise _damaged(damages)
    assert images is not None
    return images, findings


def _in_threads(work: Callable[[int], T], num: int) -> Generator[T, None, None]:
    """Yield work(0) … work(num - 1) in order. Threads compute some blocks ahead of the consumer."""
    with ThreadPoolExecutor() as pool:
        for first in range(0, num, _NUM_AHEAD):
            end = min(first + _NUM_AHEAD, num)
            blocks = [range(start, min(start + _BLOCK, end)) for start in range(first, end, _BLOCK)]
            for values in pool.map(lambda numbers: [work(number) for number in numbers], blocks):
                yield from values


def _decode(data: bytes, image_size: int | None, grey_range: GreyRange | None) -> tuple[np.ndarray, Findings]:
    """Decode to uint8 [H, W, 1] if the file is grey, else [H, W, 3], turned by its EXIF orientation."""
    opened = Image.open(io.BytesIO(data))
    # True if Pillow reads only the upper byte of 16 bits a channel.
    has_deep_colours = opened.mode not in _DEEP_GREY and any(";16" in raw_mode for raw_mode in _raw_modes(opened))
    image = ImageOps.exif_transpose(opened)
    findings = Findings()
    if image.mode == "F":
        raise ValueError("32-bit pixels (mode F): save it with 8 or 16 bits")
    if image.mode in _DEEP_GREY:
        image, grey_findings = _as_eight_bits(image, grey_range)
        findings += grey_findings
    elif has_deep_colours:
        findings += Findings(num_rounded=1)
        if isinstance(transparent := image.info.get("transparency"), tuple):
            image.info["transparency"] = tuple(value >> 8 for value in transparent)
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        image, is_transparent = _on_white(image)
        findings += Findings(num_transparent=int(is_transparent))
    image = image.convert("L" if image.mode in _GREY else "RGB")
    pixels = np.asarray(image if image_size is None else _resize(image, image_size))
    if _has_further_frames(opened):
        findings += Findings(num_animated=1)
    return pixels if pixels.ndim == 3 else pixels[..., np.newaxis], findings


def _size(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) of an image after turning it by its EXIF orientation; None if it cannot be opened."""
    try:
        image = Image.open(io.BytesIO(data))
        is_on_its_side = image.getexif().get(_ORIENTATION, 1) in range(5, 9)
    except _DAMAGE:
        return None
    width, height = image.size
    return (height, width) if is_on_its_side else (width, height)


def _decode_mask(data: bytes, size: tuple[int, int] | None, image_size: int | None) -> np.ndarray:
    """Decode a mask to uint8 [H, W, 1] of its greys or palette numbers.

    Args:
        size: (width, height) of the mask's image.
    """
    mask = Image.open(io.BytesIO(data))
    if mask.format in _LOSSY or mask.mode not in _MASK_MODES:
        raise ValueError(f"{mask.format} of mode {mask.mode}: save the number of each pixel's class in a grey PNG")
    if any(raw_mode.startswith(_FEW_GREYS) for raw_mode in _raw_modes(mask)):
        raise ValueError(f"{mask.format} of 2 or 4 bits a pixel, which are read as greys of 8: save it with 8 bits")
    if size is not None and mask.size != size:
        raise ValueError(f"it is {mask.size[1]}x{mask.size[0]}, its image {size[1]}x{size[0]}: give both one size")
    numbers = np.asarray(mask)
    if numbers.max() > 255:
        raise ValueError(f"it has {numbers.max()}: 0 to 254 are classes")
    if image_size is not None:
        resized = Image.fromarray(numbers.astype(np.uint8))
        numbers = np.asarray(ImageOps.fit(resized, (image_size, image_size), Image.Resampling.NEAREST))
    return numbers.astype(np.uint8)[..., np.newaxis]


def _raw_modes(image: Image.Image) -> Iterator[str]:
    """Yield how the pixels lie in the file, such as "L;4" for greys of 4 bits."""
    for tile in getattr(image, "tile", ()):
        raw_mode = tile[3][0] if isinstance(tile[3], tuple) and tile[3] else tile[3]
        if isinstance(raw_mode, str):
            yield raw_mode


def _has_further_frames(image: Image.Image) -> bool:
    try:
        return image.format in _WITH_FRAMES and bool(getattr(image, "is_animated", False))
    except (*_DAMAGE, EOFError):  # damage after the first frame, which is intact
        return False


def _as_eight_bits(image: Image.Image, grey_range: GreyRange | None) -> tuple[Image.Image, Findings]:
    """Convert an image of deep greys to 256 of them, with findings.

    Raises:
        ValueError: for greys outside 16 bits, or outside the chosen range.
    """
    values = np.asarray(image)  # uint16 or int32
    lowest, highest = int(values.min()), int(values.max())
    if lowest < _WIDEST[0] or highest > _WIDEST[1]:
        raise ValueError(f"32-bit pixels (mode {image.mode}): save it with 8 or 16 bits")
    black, white = grey_range or FULL_RANGE
    if grey_range and not (black <= lowest and highest <= white):
        raise ValueError(
            f"its greys run from {lowest} to {highest}, beyond {black} to {white}, which the full set uses"
        )
    levels = np.rint((values.astype(np.float64) - black) / ((white - black) / 255)).clip(0, 255).astype(np.uint8)
    is_clear = values == image.info.get("transparency")
    if np.any(is_clear):
        levels[is_clear] = 255
    return Image.fromarray(levels), Findings(greys=(lowest, highest), num_transparent=int(np.any(is_clear)))


def _on_white(image: Image.Image) -> tuple[Image.Image, bool]:
    """Lay an image on white. Return it, and True unless its alpha is opaque everywhere."""
    layer = image.convert("RGBA")
    if layer.getchannel("A").getextrema()[0] == 255:
        return image, False
    ground = Image.new("RGBA", layer.size, "white")
    ground.alpha_composite(layer)
    return ground.convert("L" if image.mode in _GREY else "RGB"), True


def _resize(image: Image.Image, side: int) -> Image.Image:
    """Resize the shorter side and crop the centre, in one antialiased pass."""
    return ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR)


def _resize_all(images: np.ndarray, side: int) -> np.ndarray:
    num, _, _, channels = images.shape
    resized = np.empty((num, side, side, channels), dtype=np.uint8)

    def resize(number: int) -> np.ndarray:
        image = images[number, ..., 0] if channels == 1 else images[number]
        return np.asarray(_resize(Image.fromarray(image), side)).reshape(side, side, channels)

    for number, image in enumerate(_in_threads(resize, num)):
        resized[number] = image
    return resized


def _quantise(pixels: np.ndarray, where: str) -> np.ndarray:
    """Convert floats in [0, 1] to uint8, one image at a time to save memory."""
    low, high = pixels.min(), pixels.max()  # NaN if any pixel is
    if not np.isfinite([low, high]).all():
        bad = np.flatnonzero(~np.isfinite(pixels).all(axis=(1, 2, 3)))
        raise ValueError(
            f"image {bad[0]} of {where} has pixels that are NaN or infinite ({len(bad)} such images): give finite ones"
        )
    if low < 0 or high > 1:
        raise ValueError(f"pixels of {where} run from {low:g} to {high:g}: floats must lie in [0, 1], or give uint8")
    quantised = np.empty(pixels.shape, dtype=np.uint8)
    for image, levels in zip(pixels, quantised, strict=True):
        levels[:] = np.rint(image * 255)
    return quantised
