"""Training on the full set across the cluster by Ray Train: the last stage, and a trunk of several workers.

    weights, record = fine_tune(run, weights, num_workers=2, num_gpus=1, …)

The driver's side is in `driver`, with a `trainer` whose controller can be watched and what the `lookout` sees; that of
each Ray Train worker is in `worker`.
"""

from raysubset.fine_tuning.driver import FineTuningFailed, fine_tune, refuse_old_ray_train

__all__ = ["fine_tune", "refuse_old_ray_train", "FineTuningFailed"]
