"""Task: what is learned, with defaults for all that a user's own task need not say."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, SupportsIndex, TypeVar

import numpy as np
import pyarrow as pa
import torch.nn.functional as F
from torch import Generator, Tensor

from raysubset.quality import Quality
from raysubset.tasks.losses import Loss, SquaredError, mean_outputs
from raysubset.tasks.spec import Spec

L = TypeVar("L", bound=Loss)
Rows = Mapping[str, Tensor]  # of some examples: named tensors [n, …], as they are stored
_SQUARES = "_squares_sum"
OutputsOf = Callable[[np.ndarray], Tensor]  # a network's outputs [n, …] for examples at some positions, int64 [n]


class Task:
    """Says what a network takes and gives, what is minimized, and how good it is: everything that is not the same for
    every kind of learning.

    A user's own is a class "package.module:Class" made without arguments, which gives `quality`, fit(), spec(),
    batch(), loss() and measure(); what fit() leaves in its attributes is kept in model.json, so these are numbers,
    words, lists and dicts. It is used in every actor: it must not change after fit().

    Attributes:
        name: as config.task.name has it.
        quality: the metric that verdicts go by, a key of values().
        margin: of non-inferiority, in the quality's units; None: the user gives it.
        class_names: where there are classes that subsets should see all of.
        augmentation: what is drawn anew in each epoch; "none" for nothing.
    """

    name: str = "task"
    quality: str = ""
    higher_is_better: bool = True
    is_share: bool = False  # the quality is in [0, 1], shown in per cent
    unit: str = ""
    margin: float | None = None
    class_names: tuple[str, ...] = ()
    augmentation: str = "none"

    # What every task says

    def fit(self, train: Mapping[str, np.ndarray]) -> "Task":
        """Take from the training rows what they alone decide: numbering of classes, mean and deviation, vocabulary."""
        return self

    def spec(self) -> Spec:
        """What a network takes and gives of one example."""
        raise NotImplementedError

    def batch(self, rows: Rows, draws: Tensor | None) -> tuple[Tensor, Tensor]:
        """Make some stored rows, on whatever device, a network's inputs [n, *spec.inputs] and targets [n, …].

        Args:
            rows: read-only memory may be among them: never write to it.
            draws: draw()'s rows of these examples; None: without augmentation.
        """
        raise NotImplementedError

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss that is minimized, summed over examples: outputs float [n, *spec.outputs], targets as batch()'s."""
        raise NotImplementedError

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """One number an example, [n], or a vector, [n, k], by name; truth values are counted."""
        raise NotImplementedError

    # What has a default

    def reported_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss that is reported, summed over examples: without smoothing and the like."""
        return self.loss(outputs, targets)

    def values(self, sums: Mapping[str, Any], num: int) -> dict[str, float]:
        """Qualities by name, given the sums of measure() over `num` examples: x_sum, or num_x of a truth value."""
        return {
            key.removesuffix("_sum").removeprefix("num_"): total / num
            for key, total in sums.items()
            if not isinstance(total, list) and not key.endswith(_SQUARES)
        }

    def draw(self, num: int, seed: int) -> Tensor | None:
        """Draw an epoch's augmentation: a row an example, on the CPU; None without."""
        return None

    def targets(self, rows: Rows) -> Tensor:
        """The targets of some rows alone."""
        return self.batch(rows, None)[1]

    def combine(self, outputs: Iterable[Tensor]) -> Tensor:
        """An ensemble's outputs from its members', one at a time: their mean."""
        return mean_outputs(outputs)

    def distance(self, outputs: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
        """How far outputs are from a teacher's, summed over examples, for distillation: the squared error."""
        return F.mse_loss(outputs, teacher, reduction="sum") / outputs[0].numel()

    def curvature(self, outputs: Tensor, change: Tensor, targets: Tensor) -> Tensor:
        """H u of each example, [n, …]: H the second derivative of its loss by its outputs, positive semi-definite.

        Raises:
            ValueError: for a task that does not say it.
        """
        raise ValueError(f"the task {self.name} does not say how its loss curves: give it curvature(), or use lbfgs")

    def residuals(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """[n, …]: numbers of each example whose squares sum up to its loss, for levenberg_marquardt.

        Raises:
            ValueError: for a task that does not say them, or whose loss is no sum of squares.
        """
        raise ValueError(f"the task {self.name} does not give residuals(): use gauss_newton or lbfgs")

    def fisher_terms(self, outputs: Tensor, targets: Tensor, *, labels: str, generator: Generator) -> Tensor:
        """[n, T, …]: directions of outputs whose gradients' squares sum up to the curvature's diagonal.

        Raises:
            ValueError: for a task that does not say them.
        """
        raise ValueError(f"the task {self.name} does not give fisher_terms(): use another aggregation.method")

    def num_fisher_terms(self, *, labels: str) -> int:
        """T of fisher_terms()."""
        return 1

    def watched(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """[n]: what weight update skipping watches, at most 1, more being better.

        Raises:
            ValueError: for a task that does not say it.
        """
        raise ValueError(f"the task {self.name} does not say what to watch: give it watched(), or leave skipping out")

    def strata(self, rows: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """Which examples stratified cuts keep in proportion: int64 [N] from 0 on; None: all are alike."""
        return None

    def tabulate(self, outputs: Tensor, targets: Tensor) -> dict[str, np.ndarray]:
        """Columns of the table of predictions on the test split, [N] each."""
        return {}

    def mistakes(self, predictions: pa.Table, rows: Rows, outputs_of: OutputsOf) -> pa.Table | None:
        """Rows of the table that a report shows, with what it needs to draw them; None for none."""
        return None

    def describe(self) -> dict[str, Any]:
        """What a report says of the data, for JSON."""
        spec = self.spec()
        return {"inputs": list(spec.inputs), "outputs": list(spec.outputs)}

    @property
    def loss_name(self) -> str:
        """The loss in words, with its unit."""
        return "loss"

    @property
    def measured_by(self) -> Quality:
        """The quality with its direction and how it reads."""
        return Quality(self.quality, self.higher_is_better, self.is_share, self.unit, self.margin)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Pickle a user's task by its name, so that a process that loads it looks for the module where this one did."""
        if ":" not in self.name:
            return super().__reduce_ex__(protocol)
        from raysubset.tasks.records import own_task  # which knows all tasks, and so this file

        return own_task, (self.name, {key: value for key, value in vars(self).items() if key != "name"})

    def to_dict(self) -> dict[str, Any]:
        """What model.json holds of it, all that another process needs to know it by.

        Raises:
            ValueError: for an attribute of a user's task that JSON cannot hold.
        """
        for key, value in vars(self).items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError) as error:
                kind = type(value).__name__
                raise ValueError(
                    f"{self.name}.{key} is a {kind}, which JSON cannot hold: keep a list ({error})"
                ) from error
        return {"name": self.name, "state": {key: value for key, value in vars(self).items() if key != "name"}}


class LossTask(Task, Generic[L]):
    """A task whose loss is one of losses.py, which knows all that methods ask of a loss."""

    objective: L

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.objective.summed(outputs, targets)

    def reported_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.objective.reported(outputs, targets)

    def combine(self, outputs: Iterable[Tensor]) -> Tensor:
        return self.objective.combine(outputs)

    def distance(self, outputs: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
        return self.objective.distance(outputs, teacher, temperature=temperature)

    def curvature(self, outputs: Tensor, change: Tensor, targets: Tensor) -> Tensor:
        return self.objective.curvature(outputs, change, targets)

    def residuals(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if not isinstance(self.objective, SquaredError):
            squared = "set --task.loss squared_error, or " if self.name in ("classification", "regression") else ""
            name = self.loss_name.split(",")[0]
            raise ValueError(f"{name} is no sum of squares: {squared}use gauss_newton or lbfgs")
        return self.objective.residuals(outputs, targets)

    def fisher_terms(self, outputs: Tensor, targets: Tensor, *, labels: str, generator: Generator) -> Tensor:
        return self.objective.fisher_terms(outputs, targets, labels=labels, generator=generator)

    def num_fisher_terms(self, *, labels: str) -> int:
        return self.objective.num_fisher_terms(self.spec().outputs, labels=labels)


class InputsTask(LossTask[L]):
    """A task whose inputs say how stored columns become them, and what is augmented."""

    inputs: Any  # ImageInputs, TableInputs or TensorInputs: what a task says

    def spec_of(self, num_outputs: int) -> Spec:
        """Of these inputs, where an example has one row of outputs."""
        return Spec(tuple(self.inputs.shape), (num_outputs,), getattr(self.inputs, "num_values", None))

    def batch(self, rows: Rows, draws: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.inputs.batch(rows, draws), self.targets(rows)

    @property
    def augmentation(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inputs.augmentation

    def draw(self, num: int, seed: int) -> Tensor | None:
        return self.inputs.draw(num, seed)


def sums_of(task: Task, outputs: Tensor, targets: Tensor) -> dict[str, Any]:
    """task.measure() summed over a batch: num_x of truth values and counts, x_sum and x_squares_sum else.

    Vectors have lists, and no squares.
    """
    sums: dict[str, Any] = {}
    for name, each in task.measure(outputs, targets).items():
        if not each.dtype.is_floating_point:
            sums[f"num_{name}"] = each.sum(0).tolist()
            continue
        wide = each.cpu().double()
        sums[f"{name}_sum"] = wide.sum(0).tolist()
        if wide.ndim == 1:
            sums[f"{name}{_SQUARES}"] = wide.square().sum().item()
    return sums


def errors_of(sums: Mapping[str, Any], num: int) -> dict[str, float]:
    """x_error of each x whose sum and squares there are: the standard error of its mean over `num` examples."""
    errors = {}
    for key, squares in sums.items():
        name = key.removesuffix(_SQUARES)
        if name != key and num > 1:
            variance = max(squares / num - (sums[f"{name}_sum"] / num) ** 2, 0.0) * num / (num - 1)
            errors[f"{name}_error"] = math.sqrt(variance / num)
    return errors


def added(sums: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """sums_of() two batches, of both together."""
    if not sums:
        return dict(more)
    return {
        key: [a + b for a, b in zip(total, more[key], strict=True)] if isinstance(total, list) else total + more[key]
        for key, total in sums.items()
    }
