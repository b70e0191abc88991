"""One trial inside Ray Tune: a whole run, which reports its epochs and stages to the scheduler."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import ray
from ray import tune

from raysubset.cluster import get_shared
from raysubset.config import Config
from raysubset.events import AggregateDone, EpochDone, Event, MinimumDone, Progress
from raysubset.pipeline import run
from raysubset.quality import Quality
from raysubset.run_directory import RunDirectory
from raysubset.run_directory.ledger import Ledger, total_cost
from raysubset.sweeping.lookout import trial_seen
from raysubset.training import Cost


@dataclass(frozen=True)
class Task:
    """What a trial's process receives. The full set travels by reference."""

    config: Config
    full_set_ref: Sequence[ray.ObjectRef]
    trunk: RunDirectory | None  # whose trunk the trial takes over
    forward_share: float  # of a pass, in its network
    accept_changed_code: bool


def run_trial(parameters: Mapping[str, Any], *, tasks: Mapping[str, Task], pulses: str) -> None:
    """Run one trial. Tune calls this. If its process dies, the trial has failed; sweeping again resumes its run.

    A process that stands still is killed by a TrialsLookout, whose key is `pulses`.
    """
    name = parameters["trial"]["name"]
    task = tasks[name]
    with trial_seen(pulses, name):
        full_set, config = get_shared(task.full_set_ref), task.config
        directory = RunDirectory(config.storage_path, config.run_name())
        reports = Reports(directory, full_set.quality, num_train=len(full_set.train), forward_share=task.forward_share)
        objects = {"full_set_ref": task.full_set_ref, "trunk": task.trunk}
        report = run(config, on_event=reports, accept_changed_code=task.accept_changed_code, **objects)
        reports.flush()
        passes = {"passes": report.passes, "critical_path_passes": report.critical_path_passes}
        tune.report({"stage": "done", **passes, **_measured(report.record["validation"], full_set.quality)})


class Reports:
    """A listener of run() that reports each epoch and stage to Tune.

    passes are the run's total so far, by its ledger. ASHA should count by them, as epochs of unequal subsets cannot be
    compared. validation_loss is reported whenever something was validated: the trunk, the mean minimum so far, the
    aggregate, and each epoch of fine-tuning.

    Reports of Ray Train's epochs are held back until other work reports, or the run has ended. A scheduler may answer a
    report by ending the trial's process, and a job whose driver ends leaves its placement group behind, and with it the
    devices: Ray 2.60's clean-up requests the dashboard, which a local cluster may lack. So a trial is stopped between
    epochs of its subsets and before fine-tuning, never in a Ray Train job.
    """

    def __init__(self, directory: RunDirectory, quality: Quality, *, num_train: int, forward_share: float) -> None:
        self._directory, self._quality = directory, quality
        self._num_train, self._forward_share = num_train, forward_share
        self._epochs: dict[Any, int] = {}  # whole epochs reported, by piece of work
        self._minima: dict[Any, list[dict[str, float]]] = {}  # validation of the minima, by stage and round
        self._held_back: list[dict[str, Any]] = []  # reports, while a Ray Train job may run

    def __call__(self, event: Event) -> None:
        match event:
            case EpochDone(stage=stage, record=record):
                self._held_back.append(self._epoch_of_train(stage, record))
            case Progress(attempt=attempt, worker=None):
                key, epoch = (attempt.stage, attempt.round, attempt.subset), int(event.epoch)
                if epoch > self._epochs.get(key, 0):
                    self._epochs[key] = epoch
                    self._send(attempt.stage, epoch=epoch, subset=attempt.subset, training_loss=event.loss)
            case MinimumDone(stage=stage, record=record):
                minima = self._minima.setdefault((stage, record["round"]), [])
                if record["validation"]:
                    minima.append(_measured(record["validation"], self._quality))
                mean = {name: fmean(minimum[name] for minimum in minima) for name in (minima[0] if minima else ())}
                self._send(stage, subset=record["subset_id"], **mean)
            case AggregateDone(record=record):
                self._send("aggregation", **_measured(record["validation"], self._quality))

    def _epoch_of_train(self, stage: str, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return the report of an epoch. Its passes are computed, as the ledger may be ahead when the event arrives."""
        epoch, validation = record["epoch"], record["validation"]
        earlier_cost = total_cost(work for work in Ledger(self._directory).read() if work.stage != stage)
        num_trained = round(epoch * self._num_train)
        num_forward = num_trained + math.ceil(epoch) * validation["num_examples"]
        passes = self._passes(earlier_cost + Cost(num_forward=num_forward, num_backward=num_trained))
        metrics = _measured(validation, self._quality)
        return {"stage": stage, "passes": passes, "epoch": epoch, "training_loss": record["loss"], **metrics}

    def flush(self) -> None:
        """Send the reports that were held back."""
        while self._held_back:
            tune.report(self._held_back.pop(0))

    def _send(self, stage: str, **values: Any) -> None:
        self.flush()
        passes = self._passes(total_cost(Ledger(self._directory).read()))
        tune.report({"stage": stage, "passes": passes, **values})

    def _passes(self, cost: Cost) -> float:
        return cost.passes(self._num_train, self._forward_share)


def _measured(validation: Mapping[str, Any] | None, quality: Quality) -> dict[str, float]:
    """Return loss and quality by Tune's names for them; {} if nothing was measured."""
    if validation is None:
        return {}
    values = {f"validation_{key}": validation[key] for key in ("loss", quality.name)}
    return {key: math.nan if value is None else value for key, value in values.items()}  # JSON has no NaN
