"""fine_tune(): the driver's side of a Ray Train job."""

import os
from typing import Any

from raysubset.cluster import put_once, refuse_unplaceable, workplace
from raysubset.data import refuse_changed_files
from raysubset.fine_tuning.job import Job
from raysubset.fine_tuning.streaming import refuse_without_readers
from raysubset.work import Piece, Run, seeded_model


def refuse_old_ray_train() -> None:
    """Refuse Ray Train's first version, which our jobs do not support.

    Raises:
        ValueError: if the environment requests it.
    """
    setting = os.environ.get("RAY_TRAIN_V2_ENABLED", "1")
    if setting.lower() not in ("1", "true"):  # as Ray reads it
        raise ValueError(f"RAY_TRAIN_V2_ENABLED={setting} requests the old Ray Train, which cannot fine-tune: unset it")


def fine_tune(run: Run, piece: Piece, *, num_gpus: float) -> dict[str, Any]:
    """Minimize on the full set by a Ray Train job of piece.num_workers in data parallel, and return the record.

    The global batch is config.minimize.batch_size whatever the number of workers. If a worker dies, or stalls and is
    killed (actors.stall_s), the group restarts from the last checkpoint, with fewer workers if fine_tuning.min_workers
    is set, until actors.max_attempts in a row have left no new checkpoint. The same happens if a controller dies. A
    diverging loss, and errors of a worker's own work, are not tried again. If the driver dies, the same call resumes
    from the last checkpoint, which Ctrl-C has the first worker write; a finished stage is left as it is.

    Raises:
        ValueError: if the workers can never be placed, the loss diverges, or the files of a streamed set have changed.
        FineTuningFailed: if the job failed more often than allowed.
        TimeoutError: if the workers have no place for cluster.wait_timeout_s.
    """
    if (record := piece.record()) is not None:
        return record
    refuse_changed_files(run.full_set)
    config, stage, num_workers = piece.config, piece.stage, piece.num_workers
    request = {"CPU": config.actors.num_cpus, "GPU": num_gpus}
    least = (config.fine_tuning.min_workers if stage == "fine_tuning" else None) or num_workers
    refuse_unplaceable(request, f"{stage} workers", num=least)
    if config.data.streamed:
        refuse_without_readers(config, stage, num_workers=num_workers)
    from raysubset.fine_tuning.trainer import fit  # takes two seconds of a CPU, and most runs do not need it

    start = piece.start_weights(run.full_set)
    if start is None:
        start = seeded_model(config, run.full_set, piece.start_id).state_dict()
    fit(Job(piece, run.full_set_ref, put_once(start), num_gpus, workplace()), tell=run.tell)
    return piece.directory.read_json(piece.output.record_path)
