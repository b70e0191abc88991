"""What every reader returns: a source's splits as it has them, before classes are numbered and splits carved."""

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
    """A split of the source: images decoded or still encoded, or where they lie; targets as found."""

    images: np.ndarray | EncodedImages | ImageGroups  # uint8 [N, H, W, C], contiguous; the last of a streamed split
    targets: pa.ChunkedArray | np.ndarray  # see labels; or numbers, float64 [N, K], or masks, integers [N, …]
    class_names: tuple[str, ...] | None = None  # in the order of the labels, where the source gives them
    columns: dict[str, pa.ChunkedArray] = field(default_factory=dict)  # further scalars, [N] each
    notes: tuple[Note, ...] = ()  # what was decided for the user
    findings: Findings = field(default_factory=Findings)  # in images that are decoded
    where: str = ""  # names it in messages
    target_names: tuple[str, ...] = ()  # columns of numbers or masks

    @property
    def labels(self) -> pa.ChunkedArray:
        """Of classes: [N], integers or class names, without nulls."""
        assert isinstance(self.targets, pa.ChunkedArray)
        return self.targets

    @property
    def decoded(self) -> np.ndarray | ImageGroups:
        """The images, after decode_source()."""
        assert not isinstance(self.images, EncodedImages)
        return self.images


Source = dict[SplitName, SourceSplit]
