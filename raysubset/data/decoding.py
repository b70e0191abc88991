"""Decodes a source's images, in memory or in one pass over streamed ones, with one range of greys for all splits."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from raysubset.data.findings import FULL_RANGE, Findings, GreyRange, choose_grey_range
from raysubset.data.full_set import count_levels
from raysubset.data.images import DamagedImages, EncodedImages, decode
from raysubset.data.row_groups import ImageGroups
from raysubset.data.sources import Source
from raysubset.data.split import SplitName
from raysubset.events import Note

_SLICE_ROWS = 1024  # decoded at a time

# The decoded size from which a row group is reported: reading one of its examples may hold all of it in memory.
LARGE_ROW_GROUP_BYTES = 2**30


@dataclass(frozen=True)
class Scan:
    """The results of one pass over streamed images."""

    groups: ImageGroups  # with their image_shape
    levels: np.ndarray  # int64 [C, 256], pixels of each grey level
    kept: dict[SplitName, np.ndarray]  # uint8 [n, H, W, C]
    findings: Findings


def scan(groups: ImageGroups, *, counted: np.ndarray, kept: Mapping[SplitName, np.ndarray]) -> Scan:
    """Decode every image once, a slice of a row group at a time, and keep the `kept` ones in memory.

    Args:
        counted: the rows whose grey levels are counted: the training split's.
        kept: the ascending rows of each split that is held in memory.

    Raises:
        ValueError: for images that cannot be decoded or differ in height or width.
    """
    is_counted = np.zeros(groups.starts[-1], dtype=bool)
    is_counted[counted] = True
    levels: dict[int, np.ndarray] = {channels: np.zeros((channels, 256), dtype=np.int64) for channels in (1, 3)}
    parts: defaultdict[SplitName, list[np.ndarray]] = defaultdict(list)
    shape, has_colours, findings = None, False, Findings()
    for first, images, slice_findings in _slices(groups):
        findings += slice_findings
        if shape is not None and images.shape[1:3] != shape:
            sizes = " and ".join(f"{height}x{width}" for height, width in (shape, images.shape[1:3]))
            turned = f", {findings.num_turned} or more turned as EXIF's orientation says" if findings.num_turned else ""
            raise ValueError(
                f"images of {groups.where} differ in shape ({sizes}{turned}): give --data.image-size to resize them"
            )
        shape = images.shape[1:3]
        channels = images.shape[3]
        has_colours = has_colours or channels == 3
        levels[channels] += count_levels(images[is_counted[first : first + len(images)]])
        for name, rows in kept.items():
            low, high = np.searchsorted(rows, (first, first + len(images)))
            parts[name].append(images[rows[low:high] - first])
    assert shape is not None
    image_shape = (*shape, 3 if has_colours else 1)
    return Scan(
        groups=dataclasses.replace(groups, image_shape=image_shape),
        levels=levels[3] + np.repeat(levels[1], 3, axis=0) if has_colours else levels[1],
        kept={name: _joined(parts[name], (len(rows), *image_shape)) for name, rows in kept.items()},
        findings=findings,
    )


def size_notes(num_bytes_of_largest: int, where: str) -> tuple[Note, ...]:
    """Warn if a decoded row group is larger than LARGE_ROW_GROUP_BYTES."""
    if num_bytes_of_largest <= LARGE_ROW_GROUP_BYTES:
        return ()
    size, limit = num_bytes_of_largest / 1e9, LARGE_ROW_GROUP_BYTES / 1e9
    text = (
        f"a row group of {where} takes {size:.1f} GB decoded, and is held whole while it is read: write the "
        f"files with fewer rows a group (row_group_size of pyarrow's write_table), {limit:.1f} GB at most"
    )
    return (Note(text, is_warning=True),)


def _slices(groups: ImageGroups) -> Iterator[tuple[int, np.ndarray, Findings]]:
    """Yield (first row, uint8 [n, H, W, 1 or 3], findings) of all rows in order, up to the first damaged image.

    Raises:
        DamagedImages: with the damaged images, at the end or once it names enough of them.
    """
    damages: list[tuple[str, str]] = []
    filled = np.flatnonzero(np.diff(groups.starts)).tolist()
    for group, table in zip(filled, groups.tables(filled), strict=True):
        column = groups.encoded(table, group)
        path = groups.paths[groups.files[group]]
        file_start = groups.starts[
            np.flatnonzero(groups.files == groups.files[group])[0]
        ]  # the row that the file begins with
        for start in range(0, len(column), _SLICE_ROWS):
            first = int(groups.starts[group]) + start
            part = column.slice(start, _SLICE_ROWS)
            try:
                images, findings = groups.decode(part, path, first_row=first - int(file_start))
            except DamagedImages as error:
                damages += error.args
                if error.is_enough:
                    raise DamagedImages(*damages) from error
                continue
            if not damages:
                yield first, images, findings
    if damages:
        raise DamagedImages(*damages)


def _joined(parts: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Join the parts into one array, with grey repeated to its channels. The parts are freed one by one."""
    joined, filled = np.empty(shape, dtype=np.uint8), 0
    parts.reverse()
    while parts:
        part = parts.pop()
        joined[filled : filled + len(part)] = part
        filled += len(part)
    return joined


def decode_source(
    source: Source, rows: Mapping[SplitName, np.ndarray], image_size: int | None
) -> tuple[Source, Scan | None, GreyRange]:
    """Decode the images of all splits with one range of greys: that of the bits that all of them use.

    Images become uint8 [N, H, W, C]. Streamed ones stay ImageGroups, with their image_shape, and are scanned.

    The range is known only after all images were read, so sets with deep greys of fewer than 16 bits are decoded twice.

    Args:
        rows: the rows of each split, in its own source or in the training split's.

    Raises:
        ValueError: for images that cannot be decoded or differ in shape.
    """
    decoded, scanned = _decode_all(source, rows, image_size, None)
    grey_range = choose_grey_range(sum((split.findings for split in decoded.values()), start=Findings()))
    if grey_range != FULL_RANGE:
        del decoded, scanned  # frees their memory before the second decoding
        decoded, scanned = _decode_all(source, rows, image_size, grey_range)
    splits: Source = {
        name: dataclasses.replace(split, notes=(*split.notes, *split.findings.notes(split.where, grey_range)))
        for name, split in decoded.items()
    }
    if scanned:
        train, groups = splits["train"], dataclasses.replace(scanned.groups, grey_range=grey_range)
        notes = (*train.notes, *size_notes(groups.num_bytes_of_largest(), groups.where))
        splits["train"] = dataclasses.replace(train, images=groups, notes=notes)
    return splits, scanned, grey_range


def _decode_all(
    source: Source, rows: Mapping[SplitName, np.ndarray], image_size: int | None, grey_range: GreyRange | None
) -> tuple[Source, Scan | None]:
    decoded: Source = {}
    scanned = None
    for name, split in source.items():
        images, findings = split.images, split.findings
        if isinstance(images, ImageGroups):
            groups = dataclasses.replace(images, grey_range=grey_range)
            carved: dict[SplitName, np.ndarray] = {each: kept for each, kept in rows.items() if each not in source}
            scanned = scan(groups, counted=rows["train"], kept=carved)
            images, findings = scanned.groups, scanned.findings
        elif isinstance(images, EncodedImages):
            images, findings = decode(images, image_size, grey_range)
        decoded[name] = dataclasses.replace(split, images=images, findings=findings)
    return decoded, scanned
