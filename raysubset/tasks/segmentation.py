"""Segmentation: predicts the class of every pixel of an image."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raysubset.tasks.inputs import ImageInputs, crop_and_flip
from raysubset.tasks.losses import CrossEntropy
from raysubset.tasks.spec import Spec
from raysubset.tasks.task import InputsTask, OutputsOf, Rows

_MOST_MISTAKES = 12


@dataclass(frozen=True)
class Segmentation(InputsTask[CrossEntropy]):
    """The task of one mask an image. Stored rows are "image", uint8 [N, H, W, C], and "mask", uint8 [N, H, W].

    The loss of an image is the mean over its pixels, without those of the ignored class.
    """

    inputs: ImageInputs
    class_names: tuple[str, ...]
    ignored: int | None = None  # a mask value that neither the loss nor the qualities count
    objective: CrossEntropy = field(default_factory=CrossEntropy)

    name = "segmentation"
    quality = "iou"
    is_share = True
    loss_name = "cross-entropy, nats a pixel"

    def spec(self) -> Spec:
        height, width, _ = self.inputs.image_shape
        return Spec(self.inputs.shape, (len(self.class_names), height, width))

    def batch(self, rows: Rows, draws: Tensor | None) -> tuple[Tensor, Tensor]:
        """Turn stored rows into inputs and masks. A crop's black border gets the ignored class, or else class 0."""
        mask = rows["mask"]
        if draws is not None:
            shifted = crop_and_flip(mask.to(torch.int16).unsqueeze(3) + 1, draws).squeeze(3) - 1
            mask = torch.where(shifted < 0, self.ignored or 0, shifted)
        return self.inputs.batch(rows, draws), mask.long()

    def targets(self, rows: Rows) -> Tensor:
        return rows["mask"].long()

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return how many pixels count and how many are right, [n], and each class's intersection and union, [n, M]."""
        predicted = outputs.argmax(1)
        counts = torch.ones_like(targets, dtype=torch.bool) if self.ignored is None else targets != self.ignored
        intersections, unions = [], []
        for number in range(len(self.class_names)):
            is_class, is_predicted = (targets == number) & counts, (predicted == number) & counts
            intersections.append((is_class & is_predicted).flatten(1).sum(1))
            unions.append((is_class | is_predicted).flatten(1).sum(1))
        right = ((predicted == targets) & counts).flatten(1).sum(1)
        return {
            "pixels": counts.flatten(1).sum(1),
            "right": right,
            "intersection": torch.stack(intersections, 1),
            "union": torch.stack(unions, 1),
        }

    def values(self, sums: Mapping[str, Any], num: int) -> dict[str, float]:
        """Return iou, averaged over the classes that occur in targets or predictions, and pixel_accuracy."""
        pairs = zip(sums["num_intersection"], sums["num_union"], strict=True)
        shares = [intersection / union for intersection, union in pairs if union]
        return {
            "iou": sum(shares) / len(shares) if shares else 0.0,
            "pixel_accuracy": sums["num_right"] / max(1, sums["num_pixels"]),
        }

    def watched(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the share of each image's counted pixels that are right."""
        measured = self.measure(outputs, targets)
        return measured["right"].double() / measured["pixels"].clamp(min=1)

    def tabulate(self, outputs: Tensor, targets: Tensor) -> dict[str, np.ndarray]:
        """Return the pixel_accuracy of each image, float64."""
        return {"pixel_accuracy": self.watched(outputs, targets).numpy()}

    def mistakes(self, predictions: pa.Table, rows: Rows, outputs_of: OutputsOf) -> pa.Table | None:
        """Return the images with the smallest pixel accuracy, with true and predicted masks, as flat lists."""
        worst = np.argsort(predictions.column("pixel_accuracy").to_numpy(), kind="stable")[:_MOST_MISTAKES]
        positions, predicted = torch.from_numpy(worst), outputs_of(worst).argmax(1).to(torch.uint8)
        images = {"image": rows["image"], "mask": rows["mask"], "predicted": predicted}
        table = predictions.take(pa.array(worst))
        for name, values in images.items():
            flat = (values if name == "predicted" else values.index_select(0, positions)).flatten(1)
            lists = pa.FixedSizeListArray.from_arrays(pa.array(flat.numpy().reshape(-1)), flat.shape[1])
            table = table.append_column(name, lists)
        return table

    def describe(self) -> dict[str, Any]:
        shape = list(self.inputs.image_shape)
        return {"num_classes": len(self.class_names), "image_shape": shape, "augmentation": self.augmentation}
