"""Training on the full set across the cluster by Ray Train: the last stage, and a trunk of several workers.

    fine_tune(run, piece, num_gpus=1)

The driver's side is in `driver`. Its `trainer`, whose controller the `lookout` watches, is imported when a job begins,
because Ray Train takes seconds to load. A worker's side is in `worker`. A subset actor that does such a stage alone
minimizes as for any other piece, in Ray Train's `local_mode`.
"""

from raysubset.fine_tuning.driver import fine_tune, refuse_old_ray_train
from raysubset.fine_tuning.job import FineTuningFailed, Job
