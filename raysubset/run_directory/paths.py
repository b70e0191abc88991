"""Where things lie in a run, relative to it: each path is spelled here and nowhere else.

A minimum's folder is minimum_folder(round, subset), or the stage that makes only one ("trunk", "fine_tuning").
"""

import re

CONFIG_PATH = "config.json"
IDENTITY_PATH = "identity.parquet"  # digests of the data and code that names in the config stand for
ENVIRONMENT_PATH = "environment.json"
LEASE_PATH = "lease.json"
DECISIONS_PATH = "decisions.json"  # what was measured or counted once and holds for the rest of the run
SESSIONS_PATH = "sessions.json"  # when each driver began and how long it worked
RESULT_PATH = "result.json"
REPORT_PATH = "report.json"
SWEEP_PATH = "sweep.json"
COMPARISON_PATH = "comparison.json"
TRACES_FOLDER = "profiles"
TRACKING_FOLDER = "tracking"  # a JSON a tracker, and what wandb keeps beside what it sends
PREDICTIONS_PATH = "test_predictions.parquet"  # of the final model on the test split
MISTAKES_PATH = "test_mistakes.parquet"  # some that are wrong, with their images
MODEL_PATH = "model.safetensors"  # the final weights
MODEL_RECORD_PATH = "model.json"  # what load_model() needs beside the weights
SAMPLES_PATH = "samples.json"  # texts that the final model writes on from a prompt


def minima_folder(round: int) -> str:
    """The folder of a round's minima."""
    return f"rounds/{round:04d}/minima"


def minimum_folder(round: int, subset: int) -> str:
    """The folder of a subset's minimum."""
    return f"{minima_folder(round)}/{subset:04d}"


def minimum_path(folder: str) -> str:
    """JSON: a finished minimum; written after its weights."""
    return f"{folder}/minimum.json"


def weights_path(folder: str) -> str:
    """safetensors: a minimum's weights."""
    return f"{folder}/weights.safetensors"


def outputs_path(folder: str) -> str:
    """safetensors: what a minimum makes of the validation split."""
    return f"{folder}/outputs.safetensors"


def statistics_path(folder: str, kind: str) -> str:
    """safetensors: what the actor took of a minimum for the aggregation, of the kinds that its record names."""
    return f"{folder}/{kind}.safetensors"


def subsamples_folder(round: int) -> str:
    """The folder of a round's minima on parts of subsets, as savgm needs them."""
    return f"rounds/{round:04d}/subsamples"


def subsample_folder(round: int, subset: int) -> str:
    """The folder of the minimum on a part of a subset."""
    return f"{subsamples_folder(round)}/{subset:04d}"


def history_path(folder: str) -> str:
    """JSON: the epochs so far."""
    return f"{folder}/history.json"


def trace_path(stage: str) -> str:
    """gzip of JSON: what torch's profiler saw of some steps of a stage."""
    return f"{TRACES_FOLDER}/{stage}.json.gz"


def left_out_path(folder: str) -> str:
    """JSON: that steps of the stage's Ray Train workers leave out parameters."""
    return f"{folder}/left_out.json"


def optimizer_path(folder: str) -> str:
    """A checkpoint file: the optimizer's state at the minimum, for the next round."""
    return f"{folder}/optimizer.pt"


def mean_optimizer_path(round: int) -> str:
    """A checkpoint file: the mean of a round's optimizer states, for all members of the next."""
    return f"rounds/{round:04d}/optimizer.pt"


def checkpoint_path(folder: str, attempt: int) -> str:
    """Each attempt has its own, so that a lost actor cannot overwrite its successor's."""
    return f"{folder}/checkpoint-{attempt:02d}.pt"


def subsets_path(round: int) -> str:
    """Parquet: the manifest of a round."""
    return f"rounds/{round:04d}/subsets.parquet"


def aggregate_path(round: int) -> str:
    """JSON: a finished aggregate; written after its weights."""
    return f"rounds/{round:04d}/aggregate.json"


def aggregate_weights_path(round: int) -> str:
    """safetensors."""
    return f"rounds/{round:04d}/aggregate.safetensors"


def momentum_path(round: int) -> str:
    """safetensors: of the outer step, after a round."""
    return f"rounds/{round:04d}/momentum.safetensors"


def naming_records(path: str) -> tuple[str, ...]:
    """The records that stand on a file of a stage; the file itself where it is in no record.

    A round's aggregate is made of its minima, so it stands on what they left.
    """
    folder, _, name = path.rpartition("/")
    in_round = re.fullmatch(r"rounds/(\d+)(/.+)?", folder)
    if not in_round:
        return (minimum_path(folder),) if name.endswith(".safetensors") else (path,)
    round, aggregate = int(in_round[1]), aggregate_path(int(in_round[1]))
    if in_round[2]:
        return (minimum_path(folder), aggregate)
    return (path,) if path == subsets_path(round) else (aggregate,)
