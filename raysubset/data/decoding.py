"""Decodes a source's images, in memory or in one pass over streamed ones, with one range of greys for all splits."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from raysubset.data.findings import FULL_RANGE, Findings, GreyRange, choose_grey_range, level_notes
from raysubset.data.full_set import count_levels
from raysubset.data.images import EncodedImages, decode
from raysubset.data.row_groups import ImageGroups
from raysubset.data.split import SplitName, origin_of
from raysubset.events import Note


@dataclass(frozen=True)
class SourceSplit:
    """The images of a source's own split, as the source stores them, before further splits are carved."""

    images: np.ndarray | EncodedImages | ImageGroups  # uint8 [N, H, W, C], contiguous; ImageGroups if streamed
    where: str  # the name of the split in messages
    table: pa.Table = field(default_factory=lambda: pa.table({}))  # further columns, N rows
    findings: Findings = field(default_factory=Findings)  # in images that are decoded


Source = dict[SplitName, SourceSplit]


@dataclass(frozen=True)
class DecodedImages:
    """The images of a full set, all of one shape."""

    images: dict[SplitName, np.ndarray]  # uint8 [n, H, W, C], of each split's rows, but not of streamed training rows
    groups: ImageGroups | None  # streamed training images
    image_shape: tuple[int, int, int]  # (H, W, C)
    levels: np.ndarray  # int64 [C, 256], the pixels of each grey level in training images
    grey_range: GreyRange
    notes: tuple[Note, ...]


def decode_source(source: Source, rows: Mapping[SplitName, np.ndarray], image_size: int | None) -> DecodedImages:
    """Decode the images of all splits with one range of greys: that of the bits that all of them use.

    The range is known only after all images were read, so sets with deep greys of fewer than 16 bits are decoded twice.
    Grey splits become coloured if another one is.

    Args:
        rows: the rows of each split, in its own source or in the training split's.

    Raises:
        ValueError: for images that cannot be decoded or differ in height or width.
    """
    decoded = _decode_all(source, rows, image_size, None)
    grey_range = choose_grey_range(sum(decoded.findings.values(), start=Findings()))
    if grey_range != FULL_RANGE:
        del decoded  # frees its memory before the second decoding
        decoded = _decode_all(source, rows, image_size, grey_range)
    if len({shape[:2] for shape in decoded.shapes.values()}) > 1:
        summary = ", ".join(f"{name} {shape[0]}x{shape[1]}" for name, shape in decoded.shapes.items())
        raise ValueError(f"the splits' images differ in shape ({summary}): give --data.image-size to resize them")
    notes = [note for name, split in source.items() for note in decoded.findings[name].notes(split.where, grey_range)]
    image_shape = height, width, channels = max(decoded.shapes.values())
    grey = [name for name, shape in decoded.shapes.items() if shape[2] < channels]
    notes += [Note(f"the {name} split is grey, others have colours: repeated to three channels") for name in grey]
    has_rounded = bool(decoded.findings["train"].num_rounded or decoded.findings["train"].greys)
    notes += level_notes(levels := decoded.levels[:channels], has_rounded=has_rounded)
    images: dict[SplitName, np.ndarray] = {}
    for name, parts in decoded.parts.items():
        images[name] = _joined(parts, (len(rows[name]), height, width, channels))
    groups = source["train"].images
    is_streamed = isinstance(groups, ImageGroups)
    groups = dataclasses.replace(groups, grey_range=grey_range, image_shape=image_shape) if is_streamed else None
    return DecodedImages(images, groups, image_shape, levels, grey_range, tuple(notes))


@dataclass
class _Decoded:
    """The results of one pass over all images."""

    parts: dict[SplitName, list[np.ndarray]] = field(default_factory=dict)  # of a split's rows, uint8 [n, H, W, C]
    shapes: dict[SplitName, tuple[int, int, int]] = field(default_factory=dict)  # (H, W, C) of the source's splits
    findings: dict[SplitName, Findings] = field(default_factory=dict)  # likewise
    levels: np.ndarray = field(default_factory=lambda: np.zeros((3, 256), np.int64))  # as three channels


def _decode_all(
    source: Source, rows: Mapping[SplitName, np.ndarray], image_size: int | None, grey_range: GreyRange | None
) -> _Decoded:
    """Decode every image once, and keep all but streamed training rows.

    Raises:
        ValueError: for images that cannot be decoded, of streamed ones those of the first such row group, or that
            differ in height or width.
    """
    decoded = _Decoded()
    for name, split in source.items():
        decoded.findings[name], first = split.findings, 0
        of_split: dict[SplitName, np.ndarray] = {each: rows[each] for each in rows if origin_of(each, source) == name}
        for images, findings in _blocks(split, image_size, grey_range):
            decoded.findings[name] += findings
            shape = decoded.shapes.setdefault(name, images.shape[1:])
            if images.shape[1:3] != shape[:2]:
                sizes = " and ".join(f"{height}x{width}" for height, width in (shape[:2], images.shape[1:3]))
                raise ValueError(
                    f"images of {split.where} differ in shape ({sizes}): give --data.image-size to resize them"
                )
            decoded.shapes[name] = (*shape[:2], max(shape[2], images.shape[3]))
            for each, numbers in of_split.items():
                low, high = np.searchsorted(numbers, (first, first + len(images)))
                part = images if high - low == len(images) else images[numbers[low:high] - first]
                if each == "train":
                    decoded.levels += count_levels(part)
                if each != "train" or not isinstance(split.images, ImageGroups):
                    decoded.parts.setdefault(each, []).append(part)
            first += len(images)
    return decoded


def _blocks(
    split: SourceSplit, image_size: int | None, grey_range: GreyRange | None
) -> Iterator[tuple[np.ndarray, Findings]]:
    """Yield a split's images, uint8 [n, H, W, 1 or 3], with what is found while they are decoded."""
    if isinstance(split.images, ImageGroups):
        yield from dataclasses.replace(split.images, grey_range=grey_range).blocks()
    elif isinstance(split.images, EncodedImages):
        yield decode(split.images, image_size, grey_range)
    else:
        yield split.images, Findings()


def _joined(parts: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Join the parts into one array, with grey repeated to its channels. The parts are freed one by one."""
    if len(parts) == 1 and parts[0].shape == shape:
        return parts[0]
    joined, filled = np.empty(shape, dtype=np.uint8), 0
    parts.reverse()
    while parts:
        part = parts.pop()
        joined[filled : filled + len(part)] = part
        filled += len(part)
    return joined
