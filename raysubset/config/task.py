"""Settings of what is learned: the task and its loss."""

from dataclasses import dataclass
from typing import Annotated, Literal

from raysubset.config.trees import check_fields, need

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


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
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

    def __post_init__(self) -> None:
        check_fields(self, "task.")
        losses = _LOSSES.get(self.name, sum(_LOSSES.values(), ()))
        need(
            not self.is_class or self.loss == "auto",
            f"task.loss={self.loss} is for built-in tasks, and {self.name} has a loss of its own: leave it out",
        )
        need(
            self.loss == "auto" or self.loss in losses,
            f"task.loss={self.loss} is not one of {self.name}: use {' or '.join(losses)}",
        )
        of_classes = self.loss in ("auto", "cross_entropy")
        for field, tasks in (("label_smoothing", _SMOOTHED), ("class_weights", _WEIGHTED)):
            is_set = getattr(self, field) not in (0.0, "none")
            need(of_classes or not is_set, f"task.{field} belongs to cross_entropy: leave it out with {self.loss}")
            need(
                self.name in ("auto", *tasks) or not is_set,
                f"task.{field} is for {', '.join(tasks)}, not for {self.name}: leave it out",
            )
        need(
            self.ignored is None or self.name in ("auto", "segmentation") or self.is_class,
            f"task.ignored is a value of masks, and {self.name} has no masks: leave it out",
        )

    @property
    def is_class(self) -> bool:
        """Return True if the task is the user's own: package.module:Class."""
        return ":" in self.name
