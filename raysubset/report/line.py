"""Measure the loss on the straight line between two minima of a finished run, for its report."""

import math
from typing import Any

import numpy as np

from raysubset.config import DATA_NAMES, Config
from raysubset.report.figures import Record
from raysubset.run_directory import RunDirectory, minimum_folder, weights_path

LINE_PATH = "report/line.json"

_NUM_POINTS = 11
_MOST_EXAMPLES = 1000  # of validation data, and of training data for batch-norm statistics
_MOST_PARAMETERS = 1_000_000  # they take a second or two on a CPU


def line_between_minima(directory: RunDirectory, record: Record) -> list[dict[str, Any]]:
    """Return the validation loss at points between the first two minima of the last round, weights mixed linearly.

    The round has two minima or more.

    It is measured once, on up to 1000 validation examples, and kept in the run directory. Batch-norm statistics are
    recomputed at each point on up to 1000 training examples (Jordan et al. 2023, arXiv:2211.08403).

    Returns:
        A row for each point: share (of the second minimum, 0 to 1), loss, num_examples.

    Raises:
        ValueError: with the reason, if it cannot be measured: the network is too large, or weights or data are missing.
    """
    if (line := directory.read_json_or_none(LINE_PATH)) is not None:
        return line
    config, minima = Config.from_dict(record["config"]), record["stages"]["rounds"][-1]["minima"][:2]
    folders = [minimum_folder(minimum["round"], minimum["subset_id"]) for minimum in minima]
    if record["model"]["num_parameters"] > _MOST_PARAMETERS:
        raise ValueError(f"it costs forward passes, so only networks of up to {_MOST_PARAMETERS:,} parameters have it")
    if config.data.name not in DATA_NAMES:
        raise ValueError(f"it is measured only on data that load quickly: {', '.join(DATA_NAMES)}")
    if not all(directory.exists(weights_path(folder)) for folder in folders):
        raise ValueError("the minima's weights are not in the run directory")
    if config.rounds.overlaps:
        raise ValueError("with rounds.overlap minima are stored as displacements from different starts")
    from raysubset.data import load_full_set  # loads torch, which takes seconds: refusals and kept lines need none
    from raysubset.models import averaged_names, build_model
    from raysubset.training import evaluate, recompute_batch_norm
    from raysubset.work.identity import identify

    config = config.with_overrides({"data.download": False})
    full_set = load_full_set(*config.learned)
    identity = identify([config], {config.learned: full_set}, None)
    if changes := identity.changed(directory.read_identity() or identity):
        raise ValueError("; ".join(changes))
    model = build_model(config.model, full_set.spec)
    files = minima[0]["files"] | minima[1]["files"]
    first, second = (directory.read_weights(weights_path(folder), files) for folder in folders)
    held_out = full_set.examples("validation", _spread(len(full_set.validation)))
    training = full_set.examples("train", _spread(len(full_set.train)), augment=True)
    points, averaged = [], averaged_names(model)
    for number in range(_NUM_POINTS):
        share = number / (_NUM_POINTS - 1)
        model.load_state_dict(
            {
                name: tensor.lerp(second[name], share) if name in averaged and tensor.is_floating_point() else tensor
                for name, tensor in first.items()
            }
        )
        recompute_batch_norm(model, training, config.minimize)
        metrics = evaluate(model, held_out, config.minimize)
        loss = metrics.loss if math.isfinite(metrics.loss) else None
        points.append({"share": share, "loss": loss, "num_examples": metrics.num_examples})
    directory.write_json(LINE_PATH, points)
    return points


def _spread(num: int) -> np.ndarray:
    """Return positions of up to 1000 of `num` examples, evenly spaced, as a split may be sorted."""
    return np.linspace(0, num - 1, min(num, _MOST_EXAMPLES)).astype(np.int64)
