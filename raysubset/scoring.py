"""Aggregates and test results, computed on the driver, or in a task on the cluster that has a GPU."""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raysubset.aggregation import Aggregation, Minimum, Scorer, Unmeasured, aggregate_round
from raysubset.cluster import call_on_cluster
from raysubset.config import Config
from raysubset.data import FullSet
from raysubset.events import OnEvent
from raysubset.models import averaged_names, new_model
from raysubset.training import MEASURES, Cost, Measure, Metrics, Weights, metrics_of_outputs, place, predict, use_device

# What is kept of the images that the final model gets wrong, for the report: so many, and no more bytes than that
_MOST_MISTAKES, _MISTAKES_BYTES = 24, 4 * 2**20


@dataclass(frozen=True)
class Tested:
    """What one reading of the test split gave."""

    metrics: Metrics
    cost: Cost
    predictions: pa.Table  # a row an example in the split's order: tabulate_predictions()
    mistakes: pa.Table  # its rows with the largest margins, each with its image: pick_mistakes()


class ScoringPlace:
    """Where forward work between the stages is done. A task that dies is run again by Ray; the driver's is not."""

    def __init__(
        self, config: Config, full_set: FullSet, full_set_ref: Sequence[Any], *, num_gpus: float, on_event: OnEvent
    ) -> None:
        """num_gpus 0 means the driver's CPU, with as many threads as an actor."""
        self._config, self._full_set, self._full_set_ref, self._num_gpus = config, full_set, full_set_ref, num_gpus
        self._on_event = on_event

    def aggregate(
        self,
        minima: Sequence[Minimum],
        *,
        calibration: np.ndarray,
        start: Weights,
        momentum: Weights,
        parameter_names: frozenset[str],
        seed: int,
        measures: Collection[Measure] = MEASURES,
    ) -> tuple[Aggregation | Unmeasured, Weights]:
        """aggregate_round() with the data's calibration and validation examples.

        Args:
            calibration: int64 positions in the training split.
            seed: of what the method draws at random.
            measures: what the aggregate is measured on.
        """
        given = (list(minima), calibration, start, momentum, parameter_names, seed, measures)
        return self._call(aggregate_minima, *given)

    def test(self, weights: Weights) -> Tested:
        """Metrics and predictions on the test split. To be called once, at the end."""
        return self._call(test_weights, weights)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if not self._num_gpus:
            num_threads = torch.get_num_threads()
            try:
                return function(self._full_set, 0, self._config, *arguments)
            finally:
                torch.set_num_threads(num_threads)  # the process is the caller's
        return call_on_cluster(
            function,
            self._full_set_ref,
            self._num_gpus,
            self._config,
            *arguments,
            request={"CPU": self._config.actors.num_cpus, "GPU": self._num_gpus},
            on_event=self._on_event,
            stall_s=self._config.actors.stall_s,
        )


def _model(full_set: FullSet, num_gpus: float, config: Config) -> tuple[torch.nn.Module, torch.device]:
    device = use_device(num_gpus=num_gpus, num_threads=config.actors.num_cpus)
    return place(new_model(config.model, full_set), device, channels_last=config.minimize.channels_last), device


def aggregate_minima(
    full_set: FullSet,
    num_gpus: float,
    config: Config,
    minima: Sequence[Minimum],
    calibration: np.ndarray,
    start: Weights,
    momentum: Weights,
    parameter_names: frozenset[str],
    seed: int,
    measures: Collection[Measure] = MEASURES,
) -> tuple[Aggregation | Unmeasured, Weights]:
    """ScoringPlace.aggregate(), in this process."""
    model, device = _model(full_set, num_gpus, config)
    averaged = averaged_names(model)
    scorer = Scorer(
        model,
        calibration=full_set.examples("train", calibration, device=device),
        validation=full_set.examples("validation", device=device),
        minimize=config.minimize,
        measure_training="training" in measures,
    )
    return aggregate_round(
        [replace(minimum, averaged=averaged) for minimum in minima],
        config,
        scorer,
        start=start,
        momentum=momentum,
        parameter_names=parameter_names,
        seed=seed,
        measured="validation" in measures,
    )


def test_weights(full_set: FullSet, num_gpus: float, config: Config, weights: Weights) -> Tested:
    """ScoringPlace.test(), in this process."""
    started = time.perf_counter()
    model, device = _model(full_set, num_gpus, config)
    model.load_state_dict(weights)
    outputs = predict(model, full_set.examples("test", device=device), config.minimize)
    images, labels = full_set.test.take()
    metrics = metrics_of_outputs(outputs, labels, config.minimize)
    cost = Cost(num_forward=metrics.num_examples, device_s=time.perf_counter() - started)
    predictions = tabulate_predictions(outputs, labels, full_set.test.table.column("row"))
    return Tested(metrics, cost, predictions, pick_mistakes(predictions, images))


def tabulate_predictions(outputs: Tensor, labels: Tensor, rows: pa.ChunkedArray) -> pa.Table:
    """Columns row, label and predicted, int64, and margin, float32: the predicted class's output less the label's.

    Args:
        outputs: float [N, M] of the network.
        labels: int64 [N].
        rows: int64 [N], the examples' row numbers in the source's split.
    """
    predicted = outputs.argmax(1)
    margin = (outputs.gather(1, predicted[:, None]) - outputs.gather(1, labels[:, None])).squeeze(1).float()
    columns = {"label": labels.numpy(), "predicted": predicted.numpy(), "margin": margin.numpy()}
    return pa.table({"row": rows, **columns})


def pick_mistakes(predictions: pa.Table, images: Tensor) -> pa.Table:
    """The rows that are wrong by the largest margins, with their images: uint8 of H*W*C in that order, as binary.

    Args:
        predictions: tabulate_predictions().
        images: uint8 [N, H, W, C].
    """
    labels, predicted = (predictions.column(name).to_numpy() for name in ("label", "predicted"))
    margins = predictions.column("margin").to_numpy()
    most = min(_MOST_MISTAKES, _MISTAKES_BYTES // max(1, images[:1].numel()))
    wrong = np.flatnonzero(labels != predicted)
    worst = wrong[np.argsort(-margins[wrong], kind="stable")[:most]]
    pixels = pa.array([images[int(position)].numpy().tobytes() for position in worst], pa.binary())
    return predictions.take(pa.array(worst)).append_column("image", pixels)
