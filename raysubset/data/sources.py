"""What every reader returns: a source's splits as it has them, before classes are numbered and splits carved."""

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from raysubset.data.findings import Findings
from raysubset.data.images import EncodedImages
from raysubset.data.row_groups import RowGroups
from raysubset.data.split import SplitName
from raysubset.events import Note


@dataclass(frozen=True)
class SourceSplit:
    """A split of the source: images decoded or still encoded, or where they lie; labels as found."""

    images: np.ndarray | EncodedImages | RowGroups  # uint8 [N, H, W, C], contiguous; the last of a streamed split
    labels: pa.ChunkedArray  # [N], integers or class names, without nulls
    class_names: tuple[str, ...] | None = None  # in the order of the labels, where the source gives them
    columns: dict[str, pa.ChunkedArray] = field(default_factory=dict)  # further scalars, [N] each
    notes: tuple[Note, ...] = ()  # what was decided for the user
    findings: Findings = field(default_factory=Findings)  # in images that are decoded
    where: str = ""  # names it in messages

    @property
    def decoded(self) -> np.ndarray | RowGroups:
        """The images, after decode_source()."""
        assert not isinstance(self.images, EncodedImages)
        return self.images


Source = dict[SplitName, SourceSplit]
