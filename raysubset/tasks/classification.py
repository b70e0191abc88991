"""Classification: one class for an image, a table's row, or a tensor."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from raysubset.tasks.columns import TableInputs
from raysubset.tasks.inputs import ImageInputs, TensorInputs
from raysubset.tasks.losses import CrossEntropy, SquaredError
from raysubset.tasks.spec import Spec
from raysubset.tasks.task import InputsTask, OutputsOf, Rows

# The most images that the report keeps of those that the final model gets wrong, and the most bytes of them
_MOST_MISTAKES, _MISTAKES_BYTES = 24, 4 * 2**20


@dataclass(frozen=True)
class Classification(InputsTask[CrossEntropy | SquaredError]):
    """The task of one class an example. Stored rows are the inputs' column and "label", int64 [N]."""

    inputs: ImageInputs | TableInputs | TensorInputs
    class_names: tuple[str, ...]
    objective: CrossEntropy | SquaredError = field(default_factory=CrossEntropy)

    name = "classification"
    quality = "accuracy"
    is_share = True

    def spec(self) -> Spec:
        return self.spec_of(len(self.class_names))

    def targets(self, rows: Rows) -> Tensor:
        return rows["label"]

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"correct": outputs.argmax(1) == targets}

    def values(self, sums: Mapping[str, Any], num: int) -> dict[str, float]:
        return {"accuracy": sums["num_correct"] / num}

    def watched(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.measure(outputs, targets)["correct"]

    def strata(self, rows: Mapping[str, np.ndarray]) -> np.ndarray:
        return rows["label"]

    @property
    def loss_name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.objective.name

    def tabulate(self, outputs: Tensor, targets: Tensor) -> dict[str, np.ndarray]:
        """Return label and predicted, int64, and margin, float32: the predicted class's output minus the label's."""
        predicted = outputs.argmax(1)
        margin = (outputs.gather(1, predicted[:, None]) - outputs.gather(1, targets[:, None])).squeeze(1).float()
        return {"label": targets.numpy(), "predicted": predicted.numpy(), "margin": margin.numpy()}

    def mistakes(self, predictions: pa.Table, rows: Rows, outputs_of: OutputsOf) -> pa.Table | None:
        """Return the wrong images of the largest margins, the largest first. "image" is binary: H*W*C uint8 values."""
        if not isinstance(self.inputs, ImageInputs):
            return None
        images = rows["image"]
        labels, predicted = (predictions.column(name).to_numpy() for name in ("label", "predicted"))
        margins = predictions.column("margin").to_numpy()
        num_kept = min(_MOST_MISTAKES, _MISTAKES_BYTES // max(1, images[:1].numel()))
        wrong = np.flatnonzero(labels != predicted)
        worst = wrong[np.argsort(-margins[wrong], kind="stable")[:num_kept]]
        pixels = pa.array([images[int(position)].numpy().tobytes() for position in worst], pa.binary())
        return predictions.take(pa.array(worst)).append_column("image", pixels)

    def describe(self) -> dict[str, Any]:
        description: dict[str, Any] = {"num_classes": len(self.class_names)}
        if isinstance(self.inputs, ImageInputs):
            return description | {"image_shape": list(self.inputs.image_shape), "augmentation": self.augmentation}
        return description | {"inputs": list(self.inputs.shape)}


def balanced_weights(labels: np.ndarray, num_classes: int) -> tuple[float, ...]:
    """Return class weights inverse to the classes' shares of the labels. Their mean over the examples is 1.

    A class without an example has weight 0.
    """
    counts = np.bincount(labels, minlength=num_classes)
    num_present = np.count_nonzero(counts)
    return tuple(float(len(labels) / (num_present * count)) if count else 0.0 for count in counts)
