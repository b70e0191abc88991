"""Scorer measures weights on one device, and counts all its forward work."""

import time
from collections.abc import Sequence

from torch import nn

from raysubset.aggregation.records import Aggregate, Context, Minimum
from raysubset.aggregation.soups import ensemble_outputs
from raysubset.config import AggregationConfig, MinimizeConfig
from raysubset.data import Examples
from raysubset.models import tied_names, trainable_names
from raysubset.training import (
    Cost,
    Metrics,
    Weights,
    ensemble_positions,
    evaluate,
    metrics_of_outputs,
    recompute_batch_norm,
)


class Scorer:
    """Scores weights on validation data and on a sample of training data (`calibration`), and counts the work.

    Batch-norm statistics are recomputed on that sample, as a mean's would be wrong. Those that training leaves alone
    stay.
    """

    def __init__(
        self, model: nn.Module, *, calibration: Examples, validation: Examples, minimize: MinimizeConfig
    ) -> None:
        self._model, self._calibration, self._validation, self._minimize = model, calibration, validation, minimize
        self._num_forward, self._started = 0, time.perf_counter()
        self.parameter_names = trainable_names(model)

    def refreshed(self, weights: Weights) -> Weights:
        """Return the weights with batch-norm statistics of the calibration examples."""
        self._model.load_state_dict(weights)
        self._num_forward += recompute_batch_norm(self._model, self._calibration, self._minimize)
        return self._weights()

    def _weights(self) -> Weights:
        return {key: value.detach().to("cpu", copy=True) for key, value in self._model.state_dict().items()}

    def score(self, weights: Weights) -> Metrics:
        """Return validation metrics of the weights, after refreshed()."""
        return self.score_as_is(self.refreshed(weights))

    def score_as_is(self, weights: Weights) -> Metrics:
        """Return validation metrics of the weights with their own statistics."""
        self._model.load_state_dict(weights)
        self._num_forward += len(self._validation)
        return evaluate(self._model, self._validation, self._minimize)

    def training(self, weights: Weights) -> Metrics:
        """Return metrics of the weights on the calibration examples."""
        self._model.load_state_dict(weights)
        self._num_forward += len(self._calibration)
        return evaluate(self._model, self._calibration, self._minimize)

    def ensemble(self, minima: Sequence[Minimum]) -> Metrics:
        """Return validation metrics of the members' combined predictions, which they left: there is no forward work."""
        sample = self._validation.select(ensemble_positions(self._validation))
        return metrics_of_outputs(ensemble_outputs(minima, sample.task), sample.targets().cpu(), sample.task)

    def context(self, config: AggregationConfig, *, start: Weights | None, seed: int) -> Context:
        """Return the context that a method receives, with this scorer's score."""

        def align(minima: Sequence[Minimum]) -> Aggregate:
            from raysubset.aggregation.alignment import aligned_soup  # scipy is slow to import, and rarely needed

            place = self._model, self._calibration, self._minimize
            soup = aligned_soup(minima, *place, matching=config.matching, repair=config.repair)
            assert soup.alignment is not None
            self._num_forward += soup.alignment["num_forward"]
            return soup

        tied = tied_names(self._model.state_dict(keep_vars=True))
        return Context(start, self.parameter_names, self.score, align, seed, tied)

    def cost(self) -> Cost:
        """Return the cost of all work so far."""
        return Cost(num_forward=self._num_forward, device_s=time.perf_counter() - self._started)
