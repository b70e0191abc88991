"""The paths of all files in a run, relative to it. Each path is spelled here and nowhere else.

A minimum's folder is minimum_folder(round, subset), or the name of a stage with a single minimum ("trunk").
"""

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


def minima_folder(round: int) -> str:
    """Return the folder of a round's minima."""
    return f"rounds/{round:04d}/minima"


def minimum_folder(round: int, subset: int) -> str:
    """Return the folder of a subset's minimum."""
    return f"{minima_folder(round)}/{subset:04d}"


def minimum_path(folder: str) -> str:
    """Return the path of a finished minimum's JSON, which is written after its weights."""
    return f"{folder}/minimum.json"


def weights_path(folder: str) -> str:
    """Return the path of a minimum's weights (safetensors)."""
    return f"{folder}/weights.safetensors"


def outputs_path(folder: str) -> str:
    """Return the path of a minimum's outputs on the validation split (safetensors)."""
    return f"{folder}/outputs.safetensors"


def statistics_path(folder: str, kind: str) -> str:
    """Return the path of one kind of statistics that the aggregation needs of a minimum (safetensors)."""
    return f"{folder}/{kind}.safetensors"


def subsamples_folder(round: int) -> str:
    """Return the folder of a round's minima on parts of subsets, which savgm needs."""
    return f"rounds/{round:04d}/subsamples"


def subsample_folder(round: int, subset: int) -> str:
    """Return the folder of the minimum on a part of a subset."""
    return f"{subsamples_folder(round)}/{subset:04d}"


def history_path(folder: str) -> str:
    """Return the path of the history of epochs so far (JSON)."""
    return f"{folder}/history.json"


def trace_path(stage: str) -> str:
    """Return the path of torch's profile of some steps of a stage (gzip of JSON)."""
    return f"{TRACES_FOLDER}/{stage}.json.gz"


def left_out_path(folder: str) -> str:
    """Return the path of the note that steps of the stage's Ray Train workers leave out parameters (JSON)."""
    return f"{folder}/left_out.json"


def optimizer_path(folder: str) -> str:
    """Return the path of the optimizer's state at the minimum, for the next round (a checkpoint file)."""
    return f"{folder}/optimizer.pt"


def mean_optimizer_path(round: int) -> str:
    """Return the path of the mean of a round's optimizer states, for the next round's members (a checkpoint file)."""
    return f"rounds/{round:04d}/optimizer.pt"


def checkpoint_path(folder: str, attempt: int) -> str:
    """Return the path of an attempt's own checkpoint, so that a lost actor cannot overwrite its successor's."""
    return f"{folder}/checkpoint-{attempt:02d}.pt"


def subsets_path(round: int) -> str:
    """Return the path of a round's manifest (Parquet)."""
    return f"rounds/{round:04d}/subsets.parquet"


def aggregate_path(round: int) -> str:
    """Return the path of a finished aggregate's JSON, which is written after its weights."""
    return f"rounds/{round:04d}/aggregate.json"


def aggregate_weights_path(round: int) -> str:
    """Return the path of an aggregate's weights (safetensors)."""
    return f"rounds/{round:04d}/aggregate.safetensors"


def momentum_path(round: int) -> str:
    """Return the path of the outer step's momentum after a round (safetensors)."""
    return f"rounds/{round:04d}/momentum.safetensors"
