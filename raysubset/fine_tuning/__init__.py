"""Training on the full set across the cluster by Ray Train: the last stage, and a trunk of several workers.

    record = fine_tune(run, piece, num_workers=2, num_gpus=1)

The driver's side is in `driver`, with a `trainer` whose controller can be watched and what the `lookout` sees: loaded
when there is a job, as Ray Train takes seconds. A worker's is in `worker`, also where a subset actor is the only one.
"""

from raysubset.fine_tuning.driver import fine_tune, refuse_old_ray_train
from raysubset.fine_tuning.epochs import Epochs
from raysubset.fine_tuning.job import FOLDER, FineTuningFailed, Job
