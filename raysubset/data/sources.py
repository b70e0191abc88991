"""The result of every reader: a source's own splits, before classes are numbered and further splits are carved."""

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from raysubset.data.findings import Findings
from raysubset.data.images import EncodedImages
from raysubset.data.row_groups import ImageGroups
from raysubset.data.split import SplitName
from raysubset.events import Note


@dataclass(frozen=True)
class SourceSplit:
    """A split of the source: its images and targets as the source stores them."""

    images: np.ndarray | EncodedImages | ImageGroups  # uint8 [N, H, W, C], contiguous; ImageGroups if streamed
    targets: pa.ChunkedArray | np.ndarray | None  # classes, or masks, integers [N, …]; None if given otherwise
    columns: dict[str, pa.ChunkedArray] = field(default_factory=dict)  # further scalars, [N] each
    notes: tuple[Note, ...] = ()  # decisions made for the user
    findings: Findings = field(default_factory=Findings)  # in images that are decoded
    where: str = ""  # the name of the split in messages


Source = dict[SplitName, SourceSplit]
