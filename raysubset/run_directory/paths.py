"""The paths of all files in a run, relative to it. Each path is spelled here and nowhere else.

A minimum's folder is minimum_folder(round, subset), or the name of a stage with a single minimum ("trunk").
"""

from collections.abc import Callable

CONFIG_PATH = "config.json"
IDENTITY_PATH = "identity.parquet"  # digests of the data and code that names in the config stand for
ENVIRONMENT_PATH = "environment.json"
LEASE_PATH = "lease.json"
DECISIONS_PATH = "decisions.json"  # what was measured or counted once, and holds for the rest of the run
SESSIONS_PATH = "sessions.json"  # when each driver began and how long it worked
RESULT_PATH = "result.json"
REPORT_PATH = "report.json"
SWEEP_PATH = "sweep.json"
COMPARISON_PATH = "comparison.json"
TRACES_FOLDER = "profiles"
TRACKING_FOLDER = "tracking"  # one JSON per tracker, and wandb's local files
PREDICTIONS_PATH = "test_predictions.parquet"  # of the final model on the test split
MISTAKES_PATH = "test_mistakes.parquet"  # some wrongly predicted test examples, with their images
MODEL_PATH = "model.safetensors"  # the final weights
MODEL_RECORD_PATH = "model.json"  # what load_model() needs besides the weights
FROZEN_FOLDER = "frozen"  # tensors that no training has changed, which files of weights share, by their digest
SAMPLES_PATH = "samples.json"  # texts with which the final model continues a prompt


def _of_folder(name: str) -> Callable[[str], str]:
    return lambda folder: f"{folder}/{name}"


def _of_round(name: str) -> Callable[[int], str]:
    return lambda round: f"rounds/{round:04d}/{name}"


minimum_path = _of_folder("minimum.json")  # of a finished minimum, written after its weights
weights_path = _of_folder("weights.safetensors")
outputs_path = _of_folder("outputs.safetensors")  # of a minimum on the validation split
history_path = _of_folder("history.json")  # of the epochs so far
left_out_path = _of_folder("left_out.json")  # notes that steps of the stage's Ray Train workers leave out parameters
optimizer_path = _of_folder("optimizer.pt")  # the optimizer's state at the minimum, for the next round

minima_folder = _of_round("minima")
subsamples_folder = _of_round("subsamples")  # of minima on parts of subsets, which savgm needs
subsets_path = _of_round("subsets.parquet")  # the manifest
aggregate_path = _of_round("aggregate.json")  # of a finished aggregate, written after its weights
aggregate_weights_path = _of_round("aggregate.safetensors")
mean_optimizer_path = _of_round("optimizer.pt")  # the mean of the optimizers' states, for the next round's members
momentum_path = _of_round("momentum.safetensors")  # of the outer step, after the round


def minimum_folder(round: int, subset: int) -> str:
    """Return the folder of a subset's minimum."""
    return f"{minima_folder(round)}/{subset:04d}"


def subsample_folder(round: int, subset: int) -> str:
    """Return the folder of the minimum on a part of a subset."""
    return f"{subsamples_folder(round)}/{subset:04d}"


def statistics_path(folder: str, kind: str) -> str:
    """Return the path of one kind of statistics that the aggregation needs of a minimum (safetensors)."""
    return f"{folder}/{kind}.safetensors"


def checkpoint_path(folder: str, attempt: int) -> str:
    """Return the path of an attempt's own checkpoint, so that a lost actor cannot overwrite its successor's."""
    return f"{folder}/checkpoint-{attempt:02d}.pt"


def trace_path(stage: str) -> str:
    """Return the path of torch's profile of some steps of a stage (gzip of JSON)."""
    return f"{TRACES_FOLDER}/{stage}.json.gz"
