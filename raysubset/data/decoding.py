"""Decodes a source's images, in memory or in one pass over streamed ones, with one range of greys for all splits."""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from raysubset.data.findings import FULL_RANGE, Findings, GreyRange, choose_grey_range, level_notes
from raysubset.data.full_set import count_levels
from raysubset.data.images import EncodedImages, decode
from raysubset.data.row_groups import ImageGroups
from raysubset.data.split import SplitName
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
    decoded, findings, scanned = _decode_all(source, rows, image_size, None)
    grey_range = choose_grey_range(sum(findings.values(), start=Findings()))
    if grey_range != FULL_RANGE:
        del decoded, scanned  # frees their memory before the second decoding
        decoded, findings, scanned = _decode_all(source, rows, image_size, grey_range)
    shapes = {name: images.shape[1:] for name, images in decoded.items() if name in source}
    if scanned:
        shapes = {"train": scanned.image_shape, **shapes}
    if len({shape[:2] for shape in shapes.values()}) > 1:
        summary = ", ".join(f"{name} {shape[0]}x{shape[1]}" for name, shape in shapes.items())
        raise ValueError(f"the splits' images differ in shape ({summary}): give --data.image-size to resize them")
    notes = [note for name in findings for note in findings[name].notes(source[name].where, grey_range)]
    height, width, channels = max(shapes.values())
    grey = [name for name, shape in shapes.items() if shape[2] < channels]
    notes += [Note(f"the {name} split is grey, others have colours: repeated to three channels") for name in grey]
    images: dict[SplitName, np.ndarray] = {}
    for name in rows:
        if name in decoded or scanned is None:
            values = decoded[name if name in decoded else "train"]
            values = values if len(values) == len(rows[name]) else values[rows[name]]
            images[name] = _repeated(values, channels, axis=3)
    levels = scanned.levels if scanned else count_levels(images["train"])
    notes += level_notes(levels, has_rounded=findings["train"].has_rounded)
    image_shape, groups = (height, width, channels), source["train"].images
    if isinstance(groups, ImageGroups):
        groups = dataclasses.replace(groups, grey_range=grey_range, image_shape=image_shape)
    else:
        groups = None
    return DecodedImages(images, groups, image_shape, _repeated(levels, channels, axis=0), grey_range, tuple(notes))


@dataclass(frozen=True)
class _Scan:
    """The results of one pass over streamed images."""

    image_shape: tuple[int, int, int]  # (H, W, C)
    levels: np.ndarray  # int64 [C, 256], pixels of each grey level
    kept: dict[SplitName, np.ndarray]  # uint8 [n, H, W, C]
    findings: Findings


def _decode_all(
    source: Source, rows: Mapping[SplitName, np.ndarray], image_size: int | None, grey_range: GreyRange | None
) -> tuple[dict[SplitName, np.ndarray], dict[SplitName, Findings], _Scan | None]:
    """Return the images of each split of the source; if training images are streamed, of the carved splits instead."""
    decoded: dict[SplitName, np.ndarray] = {}
    findings: dict[SplitName, Findings] = {}
    scanned = None
    for name, split in source.items():
        findings[name] = split.findings
        if isinstance(split.images, ImageGroups):
            groups = dataclasses.replace(split.images, grey_range=grey_range)
            carved: dict[SplitName, np.ndarray] = {each: kept for each, kept in rows.items() if each not in source}
            scanned = _scan(groups, counted=rows["train"], kept=carved)
            findings[name] = scanned.findings
            decoded |= scanned.kept
        elif isinstance(split.images, EncodedImages):
            decoded[name], findings[name] = decode(split.images, image_size, grey_range)
        else:
            decoded[name] = split.images
    return decoded, findings, scanned


def _scan(groups: ImageGroups, *, counted: np.ndarray, kept: Mapping[SplitName, np.ndarray]) -> _Scan:
    """Decode every image once, a row group at a time, and keep the `kept` ones in memory.

    Args:
        counted: the rows whose grey levels are counted: the training split's.
        kept: the ascending rows of each split that is held in memory.

    Raises:
        ValueError: for images that cannot be decoded, those of the first such row group, or differ in height or width.
    """
    is_counted = np.zeros(groups.starts[-1], dtype=bool)
    is_counted[counted] = True
    levels: dict[int, np.ndarray] = {channels: np.zeros((channels, 256), dtype=np.int64) for channels in (1, 3)}
    parts: defaultdict[SplitName, list[np.ndarray]] = defaultdict(list)
    shape, num_channels, findings = None, 1, Findings()
    filled = np.flatnonzero(np.diff(groups.starts)).tolist()
    for group, table in zip(filled, groups.tables(filled), strict=True):
        first = int(groups.starts[group])
        file_start = int(groups.starts[np.flatnonzero(groups.files == groups.files[group])[0]])
        path = groups.paths[groups.files[group]]
        images, group_findings = groups.decode(groups.encoded(table, group), path, first_row=first - file_start)
        findings += group_findings
        if shape is not None and images.shape[1:3] != shape:
            sizes = " and ".join(f"{height}x{width}" for height, width in (shape, images.shape[1:3]))
            raise ValueError(
                f"images of {groups.where} differ in shape ({sizes}): give --data.image-size to resize them"
            )
        shape, num_channels = images.shape[1:3], max(num_channels, images.shape[3])
        levels[images.shape[3]] += count_levels(images[is_counted[first : first + len(images)]])
        for name, rows in kept.items():
            low, high = np.searchsorted(rows, (first, first + len(images)))
            parts[name].append(images[rows[low:high] - first])
    assert shape is not None
    image_shape = (*shape, num_channels)
    return _Scan(
        image_shape,
        levels=levels[3] + np.repeat(levels[1], 3, axis=0) if num_channels == 3 else levels[1],
        kept={name: _joined(parts[name], (len(rows), *image_shape)) for name, rows in kept.items()},
        findings=findings,
    )


def _joined(parts: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Join the parts into one array, with grey repeated to its channels. The parts are freed one by one."""
    joined, filled = np.empty(shape, dtype=np.uint8), 0
    parts.reverse()
    while parts:
        part = parts.pop()
        joined[filled : filled + len(part)] = part
        filled += len(part)
    return joined


def _repeated(values: np.ndarray, channels: int, *, axis: int) -> np.ndarray:
    """Repeat the values of one channel to `channels`, unless there are as many already."""
    return values if values.shape[axis] == channels else np.repeat(values, channels, axis=axis)
