"""leave_test(): scores weights on the test split, in this process."""

import time
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from raysubset.config import Config
from raysubset.data import FullSet
from raysubset.run_directory import MISTAKES_PATH, PREDICTIONS_PATH
from raysubset.run_directory.ledger import Ledger
from raysubset.tasks import added
from raysubset.training import Cost, Metrics, Weights, device_name, metrics_of_outputs, predict
from raysubset.work.aggregating import placed_model
from raysubset.work.pieces import TEST_PATH, TestPiece

MOST_OUTPUT_BYTES = 2**26  # of outputs that are kept at a time


def leave_test(
    full_set: FullSet, num_gpus: float, piece: TestPiece, weights: Weights | None = None, **place: Any
) -> dict[str, Any]:
    """Score weights on the test split, on the device Ray gave this process, and write what the piece leaves.

    Args:
        weights: of the piece's output, if they are loaded already.
        place: node, and if it is known attempt and waited_s, of the ledger entry.

    Returns:
        The metrics; of a final reading "metrics", and "files", the seals of the tables by path.
    """
    config, directory = piece.config, piece.directory
    placed = placed_model(full_set, num_gpus, config)
    weights = piece.of.weights() if weights is None else weights
    if not piece.is_final:
        record = test_weights(full_set, placed, config, weights)[0].to_dict()
        directory.write_json(TEST_PATH, record)
        return record
    with Ledger(directory).recorded("test", 0, device=device_name(placed[1]), **place) as close:
        metrics, cost, tables = test_weights(full_set, placed, config, weights)
        files = {path: directory.write_table(path, table) for path, table in tables.items()}
        close(cost)
    return {"metrics": metrics.to_dict(), "files": files}


def test_weights(
    full_set: FullSet, placed: tuple[nn.Module, torch.device], config: Config, weights: Weights
) -> tuple[Metrics, Cost, dict[str, pa.Table]]:
    """Return metrics on the test split with a placed_model(), the cost, and tables by path.

    The table of predictions is the task's tabulate(): a row per example in the split's order, with "row" of the source.
    That of mistakes, if the task has one, has some of its rows, with what is needed to draw them.
    """
    start_s, (model, device), task = time.perf_counter(), placed, full_set.task
    model.load_state_dict(weights)
    num, loss_sum, sums, tables = len(full_set.test), 0.0, dict[str, Any](), list[pa.Table]()
    size = max(1, MOST_OUTPUT_BYTES // (4 * full_set.spec.num_outputs))

    def outputs_of(positions: np.ndarray) -> Tensor:
        return predict(model, full_set.examples("test", positions, device=device), config.minimize)

    for start in range(0, num, size):
        positions = np.arange(start, min(start + size, num))
        outputs, targets = outputs_of(positions), task.targets(full_set.test.take(positions))
        part = metrics_of_outputs(outputs, targets, task)
        loss_sum, sums = loss_sum + part.loss_sum, added(sums, part.sums)
        tables.append(pa.table(task.tabulate(outputs, targets)))
    cost = Cost(num_forward=num, device_s=time.perf_counter() - start_s)
    table = pa.concat_tables(tables)
    columns = {name: table.column(name) for name in table.column_names}
    predictions = pa.table({"row": full_set.test.table.column("row"), **columns}).combine_chunks()
    found = {PREDICTIONS_PATH: predictions}
    if (mistakes := task.mistakes(predictions, full_set.test.take(), outputs_of)) is not None:
        found[MISTAKES_PATH] = mistakes
    return Metrics.of_sums(task, loss_sum, sums, num), cost, found
