"""A network of which a part is never trained. It imports nothing of ours, which a run would digest with it."""

from typing import Any

import torch
from torch import nn


class Adapter(nn.Module):
    """A network of 74 kB of which the last layer is trained, 5 kB."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(64, 256).requires_grad_(False)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 256))
        self.head = nn.Linear(256, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.scale * self.backbone(images.flatten(1)).tanh())


def adapter(spec: Any) -> nn.Module:
    return Adapter()
