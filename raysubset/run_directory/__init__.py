"""Everything a run leaves behind, written atomically on a local path or any pyarrow.fs URI; resuming reads it.

    directory = RunDirectory("s3://bucket/results?endpoint_override=host:9000&scheme=http", "cifar10-cnn")
    directory.check_writable()
    with Lease(directory) as lease:                      # refuses a second driver
        resumed = directory.open(config.to_dict(), environment)
        folder = minimum_folder(0, 7)
        directory.write_weights(weights_path(folder), weights)
        directory.write_json(minimum_path(folder), record)  # last: a record stands for weights that exist

Paths are relative to the run, with "/". A reader sees either the old or the new content of a file, never a part: if a
process dies while writing, the old content stays. Requests to remote storage that does not answer are repeated.
"""

from raysubset.errors import CorruptFile
from raysubset.run_directory.directory import FORMAT, RunDirectory, load_checkpoint, save_checkpoint
from raysubset.run_directory.lease import Lease
from raysubset.run_directory.paths import (
    COMPARISON_PATH,
    CONFIG_PATH,
    DECISIONS_PATH,
    ENVIRONMENT_PATH,
    IDENTITY_PATH,
    MISTAKES_PATH,
    MODEL_PATH,
    MODEL_RECORD_PATH,
    PREDICTIONS_PATH,
    REPORT_PATH,
    RESULT_PATH,
    SAMPLES_PATH,
    SESSIONS_PATH,
    SWEEP_PATH,
    TRACES_FOLDER,
    TRACKING_FOLDER,
    aggregate_path,
    aggregate_weights_path,
    checkpoint_path,
    history_path,
    left_out_path,
    mean_optimizer_path,
    minima_folder,
    minimum_folder,
    minimum_path,
    momentum_path,
    optimizer_path,
    outputs_path,
    statistics_path,
    subsample_folder,
    subsamples_folder,
    subsets_path,
    trace_path,
    weights_path,
)
from raysubset.run_directory.patience import StorageLost
from raysubset.run_directory.seals import Seal, Sink, size_of
