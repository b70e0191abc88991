"""Networks that give numbers for every pixel of an image."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raysubset.models.images import two_convolutions
from raysubset.tasks import Spec


class UNet(nn.Module):
    """A small U-Net (Ronneberger et al. 2015, arXiv:1505.04597): `depth` halvings of the map, and as many doublings.

    Each level has two convolutions of width·2^i channels on the way down, and on the way up two more of the level
    below, doubled by nearest neighbours, beside those of the way down. Images are padded by zeros at the right and the
    bottom to a multiple of 2^depth, and outputs are cropped, so any size will do.
    """

    def __init__(self, spec: Spec, width: int, depth: int, norm: str) -> None:
        super().__init__()
        channels = [width * 2**i for i in range(depth + 1)]
        self.down = _blocks(zip([spec.inputs[0], *channels[:-2]], channels[:-1], strict=True), norm)
        self.bottom = two_convolutions(channels[-2] if depth else spec.inputs[0], channels[-1], norm)
        self.up = _blocks(((channels[i] + channels[i + 1], channels[i]) for i in reversed(range(depth))), norm)
        self.head = nn.Conv2d(width, spec.outputs[0], 1)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        multiple = 2 ** len(self.down)
        features = F.pad(images, (0, -width % multiple, 0, -height % multiple))
        levels = []
        for block in self.down:
            levels.append(block(features))
            features = F.max_pool2d(levels[-1], 2)
        features = self.bottom(features)
        for block in self.up:
            features = block(torch.cat([levels.pop(), F.interpolate(features, scale_factor=2.0)], 1))
        return self.head(features)[:, :, :height, :width]


def _blocks(channels: Iterable[tuple[int, int]], norm: str) -> nn.ModuleList:
    return nn.ModuleList(two_convolutions(before, after, norm) for before, after in channels)
