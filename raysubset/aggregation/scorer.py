"""Scorer: what weights are worth, on one device, with all forward work counted."""

import time
from collections.abc import Sequence
from typing import Any

from torch import nn

from raysubset.aggregation.records import Aggregate, Context, Minimum
from raysubset.aggregation.soups import ensemble_outputs
from raysubset.config import AggregationConfig, MinimizeConfig
from raysubset.data import Examples
from raysubset.models import trainable_names
from raysubset.training import (
    Cost,
    Metrics,
    Weights,
    ensemble_sample,
    evaluate,
    metrics_of_outputs,
    recompute_batch_norm,
)


class Scorer:
    """Scores weights on validation data and on a sample of training data (`calibration`), and keeps count of the work.

    Batch-norm statistics are recomputed on that sample, without which a mean's would be wrong; those that training
    leaves alone stay.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        calibration: Examples,
        validation: Examples,
        minimize: MinimizeConfig,
        measure_training: bool = True,
    ) -> None:
        self._measure_training = measure_training
        self._model, self._calibration, self._validation, self._minimize = model, calibration, validation, minimize
        self._num_forward, self._started = 0, time.perf_counter()

    def refreshed(self, weights: Weights) -> Weights:
        """The weights with batch-norm statistics of the calibration examples."""
        self._model.load_state_dict(weights)
        self._num_forward += recompute_batch_norm(self._model, self._calibration, self._minimize)
        return {key: value.detach().to("cpu", copy=True) for key, value in self._model.state_dict().items()}

    def score(self, weights: Weights) -> Metrics:
        """Validation metrics of the weights, refreshed first."""
        return self.score_as_is(self.refreshed(weights))

    def score_as_is(self, weights: Weights) -> Metrics:
        """Validation metrics of the weights with the statistics they carry."""
        self._model.load_state_dict(weights)
        self._num_forward += len(self._validation)
        return evaluate(self._model, self._validation, self._minimize)

    def training(self, weights: Weights) -> Metrics | None:
        """Metrics of the weights on the calibration examples; None where the report is not to pay for them."""
        if not self._measure_training:
            return None
        self._model.load_state_dict(weights)
        self._num_forward += len(self._calibration)
        return evaluate(self._model, self._calibration, self._minimize)

    def ensemble(self, minima: Sequence[Minimum]) -> Metrics:
        """Validation metrics of the mean of the members' predictions, which they left behind: no forward work."""
        task, targets = self._validation.task, ensemble_sample(self._validation).targets().cpu()
        return metrics_of_outputs(ensemble_outputs(minima, task), targets, task)

    def context(self, config: AggregationConfig, *, start: Weights | None, seed: int) -> Context:
        """What a method has in hand, with this scorer's score."""

        def align(minima: Sequence[Minimum]) -> Aggregate:
            from raysubset.aggregation.alignment import aligned_soup  # scipy is slow to import, and seldom needed

            options: dict[str, Any] = {"matching": config.matching, "repair": config.repair}
            made = aligned_soup(minima, self._model, self._calibration, self._minimize, **options)
            assert made.alignment is not None
            self._num_forward += made.alignment["num_forward"]
            return made

        return Context(start, self.parameter_names, self.score, align, seed)

    @property
    def parameter_names(self) -> frozenset[str]:
        """models.trainable_names()."""
        return trainable_names(self._model)

    def cost(self) -> Cost:
        """Of all work so far."""
        return Cost(num_forward=self._num_forward, device_s=time.perf_counter() - self._started)
