"""A task of your own: the box of a bright rectangle in a noisy image, judged by intersection over union.

Command:    cd jobs/own_code && raysubset run --task own_task:Boxes --data.name own_task:rectangles --model.name own_task:network
Result:     test iou 57.3 ± 0.8 %, 13.6 passes (n = 1, two CPU cores)
"""  # noqa: E501

import numpy as np
import torch
from torch import nn

from raysubset.tasks import Spec, Task


class Boxes(Task):
    quality, is_share, margin = "iou", True, 0.02

    def spec(self):
        return Spec(inputs=(1, 16, 16), outputs=(4,))

    def batch(self, rows, draws):
        return rows["image"], rows["box"] / 16

    def loss(self, outputs, targets):
        return (outputs - targets).abs().sum()  # over the examples

    def measure(self, outputs, targets):
        low, high = torch.maximum(outputs[:, :2], targets[:, :2]), torch.minimum(outputs[:, 2:], targets[:, 2:])
        both = (high - low).clamp(min=0).prod(1)
        areas = sum((box[:, 2:] - box[:, :2]).clamp(min=0).prod(1) for box in (outputs, targets))
        return {"iou": both / (areas - both).clamp(min=1e-6)}  # one number an example


def rectangles(num=2000):
    draws = np.random.default_rng(0)
    low = draws.integers(0, 10, (num, 2))
    box = np.concatenate([low, low + draws.integers(3, 7, (num, 2))], axis=1)
    x, y = np.arange(16)[None, None, :], np.arange(16)[None, :, None]
    x0, y0, x1, y1 = (box[:, i, None, None] for i in range(4))
    image = (x >= x0) & (x < x1) & (y >= y0) & (y < y1)
    image = image + 0.2 * draws.standard_normal((num, 16, 16))
    return {"image": image[:, None].astype(np.float32), "box": box.astype(np.float32)}


def network(spec):
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, *spec.outputs))
