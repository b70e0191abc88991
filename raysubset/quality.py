"""The quality of a task: the metric that verdicts use, its direction, and how it is shown. Imports no torch."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Quality:
    """The metric that tells a better model from a worse one. Metrics records hold its value under `name`."""

    name: str  # "accuracy", "r2", "bits", "iou"
    higher_is_better: bool = True
    is_share: bool = False  # True if values are shares in [0, 1], which are shown in per cent
    unit: str = ""  # of a value, in words: "bits a token"
    margin: float | None = None  # of non-inferiority, in the value's own units; None: the user sets it

    def gain(self, value: float) -> float:
        """Return the value so that more is better: the value itself, or its negative."""
        return value if self.higher_is_better else -value

    @property
    def needs_margin(self) -> bool:
        """True if only the user can say how much worse still counts as good. For accuracy there is a usual margin."""
        return self.margin is None and self.name != "accuracy"

    @property
    def scale(self) -> int:
        """The factor for values that are drawn on an axis titled `label`."""
        return 100 if self.is_share else 1

    def number(self, value: float | None, *, sign: str = "", digits: int = 4) -> str:
        """Return the value in the unit of label and change_label: '97.31', '1.834'; '-' for None or not finite."""
        if value is None or not math.isfinite(value):
            return "-"
        return format(self.scale * value, f"{sign}z.2f" if self.is_share else f"{sign}z.{digits}g")  # z: no -0

    def error(self, value: float) -> str:
        """Return the error that follows a value: ' ± 0.12'."""
        return f" ± {self.number(value, digits=2)}"

    def show(self, value: float | None) -> str:
        """Return the value with its unit: '97.31%', '1.834 bits a token'; '-' for None or not finite."""
        number = self.number(value)
        return number if number == "-" else f"{number}%" if self.is_share else f"{number} {self.unit}".rstrip()

    def cell(self, value: float | None) -> str:
        """Return the value for a column headed by `heading`: '97.31%', '1.834'."""
        return self.show(value) if self.is_share else self.number(value)

    def phrase(self, value: float | None) -> str:
        """Return the value with its name: 'accuracy 97.31%', 'rmse 53.2 mg/dl', '1.834 bits a token'."""
        return self.show(value) if self._is_named_by_unit else f"{self.name} {self.show(value)}"

    def change(self, value: float | None) -> str:
        """Return the difference of two values with its name: 'accuracy +2.40 points', '-0.012 bits a token'."""
        unit = "points" if self.is_share else self.unit
        return f"{'' if self._is_named_by_unit else self.name} {self.number(value, sign='+')} {unit}".strip()

    @property
    def _is_named_by_unit(self) -> bool:
        return self.unit.startswith(self.name)

    @property
    def label(self) -> str:
        """The title of an axis or column: 'accuracy, %', 'rmse, mg/dl', 'bits a token'."""
        unit = "%" if self.is_share else self.unit
        return self.unit if self._is_named_by_unit else f"{self.name}, {unit}" if unit else self.name

    @property
    def heading(self) -> str:
        """The title of a column of cell() values: 'accuracy', 'bits a token'."""
        return self.name if self.is_share else self.label

    @property
    def change_label(self) -> str:
        """The title of a column of differences: 'points', 'bits a token'."""
        return "points" if self.is_share else self.label

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


ACCURACY = Quality("accuracy", is_share=True)


def metrics_in_words(metrics: Mapping[str, Any], quality: Quality) -> str:
    """Return 'loss 0.1234, accuracy 97.31%' for a metrics record."""
    loss = metrics["loss"]  # null in JSON where it was not finite
    text = "loss not finite" if loss is None or not math.isfinite(loss) else f"loss {loss:.4f}"
    return text + ("" if quality.name == "loss" else f", {quality.phrase(metrics[quality.name])}")


def quality_of(record: Mapping[str, Any]) -> Quality:
    """Return the quality of the task in a record of a report, comparison or sweep.

    Records from before tasks existed name no task; all of them are image classification, so the quality is accuracy.
    """
    task = record.get("task")
    return Quality(**task["quality"]) if task else ACCURACY
