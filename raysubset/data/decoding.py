"""Decoding a source's images, in memory or in one pass over streamed ones, with deep greys read alike in all splits."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from raysubset.data.findings import FULL_RANGE, Findings, GreyRange, choose_grey_range
from raysubset.data.images import EncodedImages, decode
from raysubset.data.row_groups import RowGroups
from raysubset.data.scanning import Scan, scan
from raysubset.data.sources import Source, SourceSplit
from raysubset.data.split import SplitName


@dataclass(frozen=True)
class DecodedSource:
    """A source whose images are decoded, or scanned."""

    splits: Source  # images uint8 [N, H, W, C], or RowGroups with their image_shape
    scan: Scan | None  # of the training split, where it is streamed
    grey_range: GreyRange


def decode_source(source: Source, rows: Mapping[SplitName, np.ndarray], image_size: int | None) -> DecodedSource:
    """Decode the images of all splits, which have one range of greys: that of the bits that all of them use.

    The range is known after all were read, so that sets with deep greys that do not use 16 bits are decoded twice.

    Args:
        rows: of each split, in its own source or in the training split's.

    Raises:
        ValueError: for images that cannot be decoded, or differ in shape.
    """
    decoded, scanned = _decode_all(source, rows, image_size, None)
    grey_range = choose_grey_range(sum((split.findings for split in decoded.values()), start=Findings()))
    if grey_range != FULL_RANGE:
        del decoded, scanned  # before others take their place
        decoded, scanned = _decode_all(source, rows, image_size, grey_range)
    if scanned:
        groups = dataclasses.replace(scanned.groups, grey_range=grey_range)
        decoded["train"] = dataclasses.replace(decoded["train"], images=groups)
    splits: Source = {name: _with_notes(split, grey_range) for name, split in decoded.items()}
    if scanned:
        train = splits["train"]
        splits["train"] = dataclasses.replace(train, notes=(*train.notes, *scanned.notes))
    return DecodedSource(splits, scanned, grey_range)


def _decode_all(
    source: Source, rows: Mapping[SplitName, np.ndarray], image_size: int | None, grey_range: GreyRange | None
) -> tuple[Source, Scan | None]:
    decoded: Source = {}
    scanned = None
    for name, split in source.items():
        images, findings = split.images, split.findings
        if isinstance(images, RowGroups):
            groups = dataclasses.replace(images, grey_range=grey_range)
            carved: dict[SplitName, np.ndarray] = {each: own for each, own in rows.items() if each not in source}
            scanned = scan(groups, counted=rows["train"], kept=carved)
            images, findings = scanned.groups, scanned.findings
        elif isinstance(images, EncodedImages):
            images, findings = decode(images, image_size, grey_range)
        decoded[name] = dataclasses.replace(split, images=images, findings=findings)
    return decoded, scanned


def _with_notes(split: SourceSplit, grey_range: GreyRange) -> SourceSplit:
    return dataclasses.replace(split, notes=(*split.notes, *split.findings.notes(split.where, grey_range)))
