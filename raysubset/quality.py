"""The quality of a task: the metric that verdicts go by, its direction, and how a person reads it. No torch."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Quality:
    """What tells a better model from a worse one; metrics records hold its value under its name."""

    name: str  # "accuracy", "r2", "bits", "iou"
    higher_is_better: bool = True
    is_share: bool = False  # of a whole, in [0, 1]: shown in per cent
    unit: str = ""  # of a value, in words: "bits a token"
    margin: float | None = None  # of non-inferiority, in the value's own units; None: the user gives it

    def gain(self, value: float) -> float:
        """The value so that more is better: itself, or its negative."""
        return value if self.higher_is_better else -value

    def show(self, value: float | None) -> str:
        """'97.31 %', '1.8342 bits a token'; '-' where there is none."""
        if value is None or not math.isfinite(value):
            return "-"
        if self.is_share:
            return f"{value:.2%}".replace("%", " %")
        return f"{value:.4g} {self.unit}".rstrip()

    @property
    def label(self) -> str:
        """An axis's or column's title: 'accuracy, %', 'bits a token'."""
        return f"{self.name}, %" if self.is_share else self.unit or self.name

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


ACCURACY = Quality("accuracy", is_share=True)


def quality_of(record: Mapping[str, Any]) -> Quality:
    """The quality of the task that a report's, comparison's or sweep's record is of.

    Records of before tasks, all of image classification, name none: accuracy.
    """
    task = record.get("task")
    return Quality(**task["quality"]) if task else ACCURACY
