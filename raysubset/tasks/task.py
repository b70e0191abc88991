"""Task: what is learned, with defaults for every method that a user's own task can leave out."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, SupportsIndex, TypeVar

import numpy as np
import pyarrow as pa
import torch.nn.functional as F
from torch import Generator, Tensor

from raysubset.tasks.losses import Loss, SquaredError, mean_outputs
from raysubset.tasks.spec import Spec
from raysubset.user_code.given import held_objects, is_given

L = TypeVar("L", bound=Loss)
Rows = Mapping[str, Tensor]  # stored examples: named tensors [n, …]
_SQUARES = "_squares_sum"
OutputsOf = Callable[[np.ndarray], Tensor]  # maps positions of examples, int64 [n], to a network's outputs [n, …]


class Task:
    """Defines what a network takes and gives, which loss is minimized, and how quality is measured.

    A user's task is a class "package.module:Class" that is constructed without arguments. It defines `quality`,
    fit(), spec(), batch(), loss() and measure(). model.json keeps the attributes that fit() sets, so they must be
    numbers, words, lists and dicts. Every actor uses the task: it must not change after fit().

    Attributes:
        name: the task's name in config.task.name.
        quality: the metric that verdicts go by, a key of values().
        loss_name: the loss in words, with its unit.
        margin: the margin of non-inferiority, in the quality's units; None: the user gives it.
        class_names: the names of the classes, if there are classes that every subset should contain.
        augmentation: the kind of augmentation that each epoch draws; "none" for no augmentation.
        compares_examples: loss() and measure() of an example depend on the others of its batch, as contrastive, ranking
            and Cox losses do. What would part batches is refused. Evaluation has equal batches of at most 500.
    """

    name: str = "task"
    quality: str = ""
    higher_is_better: bool = True
    is_share: bool = False  # the quality is in [0, 1] and shown in per cent
    unit: str = ""
    loss_name: str = "loss"
    margin: float | None = None
    class_names: tuple[str, ...] = ()
    augmentation: str = "none"
    compares_examples: bool = False

    # Methods that every task defines

    def fit(self, train: Mapping[str, np.ndarray]) -> "Task":
        """Set what only training rows may decide: class numbering, mean, standard deviation, vocabulary."""
        return self

    def spec(self) -> Spec:
        """Return the shapes that a network takes and gives for one example."""
        raise NotImplementedError

    def batch(self, rows: Rows, draws: Tensor | None) -> tuple[Tensor, Tensor]:
        """Turn stored rows, on any device, into a network's inputs [n, *spec.inputs] and targets [n, …].

        Args:
            rows: the stored tensors, which may be read-only memory: never write to them.
            draws: the rows of draw() for these examples; None: no augmentation, and nothing drawn at random, so that a
                row becomes the same in every batch.
        """
        raise NotImplementedError

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss to minimize, summed over examples: outputs float [n, *spec.outputs], targets of batch()."""
        raise NotImplementedError

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return named measures: one number an example, [n], or a vector, [n, k]; truth values are counted.

        No name begins with num_ or ends in _sum, and "loss" is reported_loss().
        """
        raise NotImplementedError

    # Methods with a default

    def reported_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss to report, summed over examples: without label smoothing and the like."""
        return self.loss(outputs, targets)

    def values(self, sums: Mapping[str, Any], num: int) -> dict[str, float]:
        """Return qualities by name from the sums of measure() over `num` examples: x_sum, or num_x of truth values."""
        return {
            key.removesuffix("_sum").removeprefix("num_"): total / num
            for key, total in sums.items()
            if not isinstance(total, list) and not key.endswith(_SQUARES)
        }

    def draw(self, num: int, seed: int) -> Tensor | None:
        """Draw an epoch's augmentation: one row an example, on the CPU; None if the task has no augmentation."""
        return None

    def targets(self, rows: Rows) -> Tensor:
        """Return the targets of stored rows, without their inputs."""
        return self.batch(rows, None)[1]

    def combine(self, outputs: Iterable[Tensor]) -> Tensor:
        """Return an ensemble's outputs: the mean of its members', which are read one at a time."""
        return mean_outputs(outputs)

    def distance(self, outputs: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
        """Return the loss of distillation, summed over examples: the squared error to the teacher's outputs."""
        return F.mse_loss(outputs, teacher, reduction="sum") / outputs[0].numel()

    def curvature(self, outputs: Tensor, change: Tensor, targets: Tensor) -> Tensor:
        """Return H·change for each example, [n, …], with H the second derivative of its loss by its outputs.

        H must be positive semi-definite.

        Raises:
            ValueError: if the task does not define it.
        """
        raise ValueError(f"the task {self.name} does not say how its loss curves: give it curvature(), or use lbfgs")

    def residuals(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the numbers of each example, [n, …], whose squares sum to its loss, for levenberg_marquardt.

        Raises:
            ValueError: if the task does not define them, or its loss is no sum of squares.
        """
        raise ValueError(f"the task {self.name} does not give residuals(): use gauss_newton or lbfgs")

    def fisher_terms(self, outputs: Tensor, targets: Tensor, *, labels: str, generator: Generator) -> Tensor:
        """Return directions of outputs, [n, T, …], whose squared gradients sum to the curvature's diagonal.

        Raises:
            ValueError: if the task does not define them.
        """
        raise ValueError(f"the task {self.name} does not give fisher_terms(): use another aggregation.method")

    def num_fisher_terms(self, *, labels: str) -> int:
        """Return T of fisher_terms()."""
        return 1

    def watched(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the score, [n], that weight update skipping watches: at most 1, higher is better.

        Raises:
            ValueError: if the task does not define it.
        """
        raise ValueError(f"the task {self.name} does not say what to watch: give it watched(), or leave skipping out")

    def strata(self, rows: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """Return the stratum of each example, int64 [N] from 0: stratified cuts keep proportions. None: one stratum."""
        return None

    def tabulate(self, outputs: Tensor, targets: Tensor) -> dict[str, np.ndarray]:
        """Return columns, [N] each, for the table of predictions on the test split."""
        return {}

    def mistakes(self, predictions: pa.Table, rows: Rows, outputs_of: OutputsOf) -> pa.Table | None:
        """Return the rows of the table that a report shows, with what it draws of them; None to show nothing."""
        return None

    def describe(self) -> dict[str, Any]:
        """Return the description of the data for a report, as JSON."""
        spec = self.spec()
        return {"inputs": list(spec.inputs), "outputs": list(spec.outputs)}

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Pickle a user's task by its name, so that the loading process looks for the module where this one did.

        A task that run() or load_model() was given pickles as itself once they returned: nobody holds it by name then.
        """
        if ":" not in self.name or (is_given(self.name) and self.name not in held_objects().objects):
            return super().__reduce_ex__(protocol)
        from raysubset.tasks.records import own_task  # which knows all tasks, and so this file

        return own_task, (self.name, {key: value for key, value in vars(self).items() if key != "name"})

    def to_dict(self) -> dict[str, Any]:
        """Return the task as model.json holds it, from which another process can rebuild it.

        Raises:
            ValueError: if JSON cannot hold an attribute of a user's task.
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
    """A task whose loss is one of losses.py. That loss computes everything that methods need from a loss."""

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
    """A task whose `inputs` turn stored columns into a network's inputs and augment them."""

    inputs: Any  # ImageInputs, TableInputs or TensorInputs: each task says which

    def spec_of(self, num_outputs: int) -> Spec:
        """Return the Spec for these inputs and `num_outputs` numbers an example."""
        return Spec(tuple(self.inputs.shape), (num_outputs,), getattr(self.inputs, "num_values", None))

    def batch(self, rows: Rows, draws: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.inputs.batch(rows, draws), self.targets(rows)

    @property
    def augmentation(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inputs.augmentation

    def draw(self, num: int, seed: int) -> Tensor | None:
        return None if self.augmentation == "none" else self.inputs.draw(num, seed)


def sums_of(task: Task, outputs: Tensor, targets: Tensor) -> dict[str, Any]:
    """Sum task.measure() over a batch: num_x for truth values and counts, x_sum and x_squares_sum for floats.

    A vector is summed to a list, without squares.
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
    """Return x_error, the standard error of the mean over `num` examples, for each x with a sum of squares."""
    errors = {}
    for key, squares in sums.items():
        name = key.removesuffix(_SQUARES)
        if name != key and num > 1:
            variance = max(squares / num - (sums[f"{name}_sum"] / num) ** 2, 0.0) * num / (num - 1)
            errors[f"{name}_error"] = math.sqrt(variance / num)
    return errors


def added(sums: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Add the sums_of() of two batches."""
    if not sums:
        return dict(more)
    return {
        key: [a + b for a, b in zip(total, more[key], strict=True)] if isinstance(total, list) else total + more[key]
        for key, total in sums.items()
    }
