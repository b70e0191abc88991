"""Scenes for segmentation and localisation: a handwritten digit on a patch of a photograph, and its mask and box.

MNIST lies under RAYSUBSET_DATA (torchvision's layout; ~/.cache/raysubset/data by default); the photographs are
scikit-learn's two sample images. Drawn once, seeded: the same scenes in every process.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from raysubset.tasks import ImageInputs, Spec, Task

SIDE, NUM_TRAIN, NUM_TEST = 40, 6000, 1000
_DIGIT, _INK = 28, 96  # pixels of a digit's side; grey from which a pixel is the digit's
_SEED = 0


def segmentation() -> dict[str, dict[str, np.ndarray]]:
    """Images uint8 [N, 40, 40, 3] and masks uint8 [N, 40, 40]: 1 is the digit, 0 background."""
    return {split: {"image": image, "mask": mask} for split, (image, mask, _, _) in _scenes().items()}


def localisation() -> dict[str, dict[str, np.ndarray]]:
    """The same images with the digit, int64 [N], and its box (top, left, bottom, right) in pixels, float32 [N, 4]."""
    return {split: {"image": image, "digit": digit, "box": box} for split, (image, _, digit, box) in _scenes().items()}


class Localisation(Task):
    """Which digit, and where: ten logits and a box, by cross-entropy and the box's squared error."""

    quality, is_share, margin = "iou", True, 0.01

    def fit(self, train: Mapping[str, np.ndarray]) -> "Localisation":
        pixels = train["image"].reshape(-1, 3) / 255
        self.mean, self.std = pixels.mean(0).tolist(), pixels.std(0).tolist()
        return self

    def spec(self) -> Spec:
        return Spec((3, SIDE, SIDE), (14,))

    def batch(self, rows: Mapping[str, Tensor], draws: Tensor | None) -> tuple[Tensor, Tensor]:
        inputs = ImageInputs((SIDE, SIDE, 3), tuple(self.mean), tuple(self.std))
        return inputs.batch(rows, None), torch.cat([rows["digit"][:, None], rows["box"] / SIDE], dim=1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        of_boxes = F.mse_loss(outputs[:, 10:], targets[:, 1:].to(outputs.dtype), reduction="sum")
        return F.cross_entropy(outputs[:, :10], targets[:, 0].long(), reduction="sum") + 10 * of_boxes

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        boxes, wanted = outputs[:, 10:].double(), targets[:, 1:].double()
        low, high = torch.maximum(boxes[:, :2], wanted[:, :2]), torch.minimum(boxes[:, 2:], wanted[:, 2:])
        both = (high - low).clamp(min=0).prod(1)
        areas = sum((one[:, 2:] - one[:, :2]).clamp(min=0).prod(1) for one in (boxes, wanted))
        return {"iou": both / (areas - both).clamp(min=1e-9), "accuracy": outputs[:, :10].argmax(1) == targets[:, 0]}


def _scenes() -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    from sklearn.datasets import load_sample_images
    from torchvision import datasets

    root = Path(os.environ.get("RAYSUBSET_DATA", "~/.cache/raysubset/data")).expanduser()
    photographs = load_sample_images().images
    generator, scenes = np.random.default_rng(_SEED), {}
    for split, num in (("train", NUM_TRAIN), ("test", NUM_TEST)):
        mnist = datasets.MNIST(root, train=split == "train")
        digits, labels = np.asarray(mnist.data)[:num], np.asarray(mnist.targets)[:num].astype(np.int64)
        images = np.empty((num, SIDE, SIDE, 3), dtype=np.uint8)
        masks, boxes = np.zeros((num, SIDE, SIDE), dtype=np.uint8), np.empty((num, 4), dtype=np.float32)
        for i in range(num):
            photograph = photographs[generator.integers(len(photographs))]
            y, x = (generator.integers(size - SIDE) for size in photograph.shape[:2])
            images[i] = photograph[y : y + SIDE, x : x + SIDE]
            top, left = generator.integers(0, SIDE - _DIGIT + 1, 2)
            is_ink = digits[i] >= _INK
            colour = generator.integers(0, 256, 3)
            images[i, top : top + _DIGIT, left : left + _DIGIT][is_ink] = colour
            masks[i, top : top + _DIGIT, left : left + _DIGIT][is_ink] = 1
            rows, columns = np.flatnonzero(is_ink.any(1)), np.flatnonzero(is_ink.any(0))
            boxes[i] = top + rows[0], left + columns[0], top + rows[-1] + 1, left + columns[-1] + 1
        scenes[split] = images, masks, labels, boxes
    return scenes
