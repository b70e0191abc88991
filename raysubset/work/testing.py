"""leave_test(): the final model scored on the test split, in this process."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from raysubset.config import Config
from raysubset.data import FullSet
from raysubset.ledger import Ledger
from raysubset.run_directory import MISTAKES_PATH, PREDICTIONS_PATH, RunDirectory, Seal
from raysubset.training import Cost, Metrics, Weights, device_name, metrics_of_outputs, predict
from raysubset.work.aggregating import placed_model
from raysubset.work.pieces import TEST_PATH, TestPiece

# What is kept of the images that the final model gets wrong, for the report: so many, and no more bytes than that
_MOST_MISTAKES, _MISTAKES_BYTES = 24, 4 * 2**20


@dataclass(frozen=True)
class Tested:
    """What one reading of the test split gave."""

    metrics: Metrics
    cost: Cost
    predictions: pa.Table  # a row an example in the split's order: tabulate_predictions()
    mistakes: pa.Table  # its rows with the largest margins, each with its image: pick_mistakes()


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
    return tested.metrics, {path: directory.write_table(path, table) for path, table in tables.items()}


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
