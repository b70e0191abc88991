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
from raysubset.run_directory.directory import FORMAT, RunDirectory, at_once
from raysubset.run_directory.lease import Lease
from raysubset.run_directory.paths import *  # noqa: F403  the paths of all files
from raysubset.run_directory.patience import StorageLost, is_unusable
from raysubset.run_directory.seals import Seal, size_of
