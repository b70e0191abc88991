"""Settings of what is learned: the task and its loss."""

from collections.abc import Iterator
from typing import Annotated, Literal

from raysubset.config.trees import Part

TASK_NAMES = ("classification", "regression", "segmentation", "next_token")

LossName = Literal["auto", "cross_entropy", "squared_error", "absolute_error", "huber"]

_WEIGHTED = ("classification", "segmentation")
_SMOOTHED = (*_WEIGHTED, "next_token")

_LOSSES: dict[str, tuple[LossName, ...]] = {
    "classification": ("cross_entropy", "squared_error"),
    "regression": ("squared_error", "absolute_error", "huber"),
    "segmentation": ("cross_entropy",),
    "next_token": ("cross_entropy",),
}


class TaskConfig(Part, prefix="task."):
    name: Annotated[str, ("auto", *TASK_NAMES, "package.module:Class")] = "auto"
    """classification, regression, segmentation, next_token, or package.module:Class, a raysubset.tasks.Task of
    your own. auto: the usual task of a named set, classification for other data. --task is short for it."""
    loss: LossName = "auto"
    """auto: cross_entropy for classes, squared_error for numbers. For classes squared_error is the mean over examples
    and outputs of (output - one-hot)²; for numbers it is, like absolute_error and huber, of standardised targets."""
    label_smoothing: Annotated[float, "[0, 1)"] = 0.0
    """Label smoothing of cross-entropy."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: cross-entropy weights a class by the inverse of its share of the training set (segmentation: of the
    pixels)."""
    ignored: Annotated[int | None, "[0, 255]"] = None
    """For segmentation: a value of masks that is left out of loss and metrics."""

    def problems(self) -> Iterator[str]:
        losses = _LOSSES.get(self.name, sum(_LOSSES.values(), ()))
        if self.is_class and self.loss != "auto":
            yield f"task.loss={self.loss} is for built-in tasks, and {self.name} has a loss of its own: leave it out"
        if self.loss not in ("auto", *losses):
            yield f"task.loss={self.loss} is not one of {self.name}: use {' or '.join(losses)}"
        for field, tasks in (("label_smoothing", _SMOOTHED), ("class_weights", _WEIGHTED)):
            if getattr(self, field) in (0.0, "none"):
                continue
            if self.loss not in ("auto", "cross_entropy"):
                yield f"task.{field} belongs to cross_entropy: leave it out with {self.loss}"
            if self.name not in ("auto", *tasks):
                yield f"task.{field} is for {', '.join(tasks)}, not for {self.name}: leave it out"
        if self.ignored is not None and self.name not in ("auto", "segmentation") and not self.is_class:
            yield f"task.ignored is a value of masks, and {self.name} has no masks: leave it out"

    @property
    def is_class(self) -> bool:
        """Return True if the task is the user's own: package.module:Class."""
        return ":" in self.name
