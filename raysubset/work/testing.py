"""leave_test(): the final model scored on the test split, in this process."""

import time
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import nn

from raysubset.config import Config
from raysubset.data import FullSet
from raysubset.ledger import Ledger
from raysubset.run_directory import MISTAKES_PATH, PREDICTIONS_PATH, RunDirectory, Seal
from raysubset.training import Cost, Metrics, Weights, device_name, metrics_of_outputs, predict
from raysubset.work.aggregating import placed_model
from raysubset.work.pieces import TEST_PATH, TestPiece


@dataclass(frozen=True)
class Tested:
    """What one reading of the test split gave."""

    metrics: Metrics
    cost: Cost
    predictions: pa.Table  # a row an example in the split's order, "row" in the source's: the task's tabulate()
    mistakes: pa.Table | None  # some of its rows, with what draws them: the task's mistakes()


def leave_test(
    full_set: FullSet, num_gpus: float, config: Config, directory: RunDirectory, weights: Weights, *, node: str
) -> tuple[Metrics, dict[str, Seal]]:
    """Score the final model on the test split, as leave_aggregate() works, and leave ledger entry and predictions.

    Returns:
        The metrics, and the seals of the tables by path.
    """
    placed = placed_model(full_set, num_gpus, config)
    with Ledger(directory).recorded("test", 0, device=device_name(placed[1]), node=node) as close:
        tested = test_weights(full_set, placed, config, weights)
        close(tested.cost)
    tables = {PREDICTIONS_PATH: tested.predictions, MISTAKES_PATH: tested.mistakes}
    written = {path: directory.write_table(path, table) for path, table in tables.items() if table is not None}
    return tested.metrics, written


def leave_metrics(full_set: FullSet, num_gpus: float, piece: TestPiece) -> dict[str, Any]:
    """Score weights that another piece of work left on the test split, and leave the metrics beside them."""
    placed = placed_model(full_set, num_gpus, piece.config)
    record = test_weights(full_set, placed, piece.config, piece.of.weights()).metrics.to_dict()
    piece.directory.write_json(TEST_PATH, record)
    return record


def test_weights(full_set: FullSet, placed: tuple[nn.Module, torch.device], config: Config, weights: Weights) -> Tested:
    """Metrics and predictions on the test split, by a placed_model()."""
    started, (model, device) = time.perf_counter(), placed
    model.load_state_dict(weights)
    outputs = predict(model, full_set.examples("test", device=device), config.minimize)
    rows, task = full_set.test.take(), full_set.task
    targets = task.targets(rows)
    metrics = metrics_of_outputs(outputs, targets, task)
    cost = Cost(num_forward=metrics.num_examples, device_s=time.perf_counter() - started)
    predictions = pa.table({"row": full_set.test.table.column("row"), **task.tabulate(outputs, targets)})
    return Tested(metrics, cost, predictions, task.mistakes(predictions, rows, outputs))
