"""A network of a user's that never comes back."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

NUM_STEPS = 3  # that it makes before: less than an epoch, so that it leaves no checkpoint


class _Endless(nn.Module):
    def __init__(self, num_inputs: int, num_classes: int) -> None:
        super().__init__()
        self.linear, self.num_calls = nn.Linear(num_inputs, num_classes), 0

    def forward(self, images: Tensor) -> Tensor:
        self.num_calls += self.training
        while self.num_calls > NUM_STEPS:
            torch.ones(1)
        return self.linear(images.flatten(1))


def network(num_classes: int, image_shape: Sequence[int]) -> nn.Module:
    height, width, channels = image_shape
    return _Endless(height * width * channels, num_classes)
