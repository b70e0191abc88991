"""Experiment trackers that follow a run: MLflow and Weights & Biases, if installed and requested.

refuse_missing(config.tracking)                          # before anything is run
with tracked(config, directory, tell) as tell: ...       # sends the run's events, and its report when the block ends
"""

from raysubset.tracking.following import refuse_missing, track_comparison, track_finished, tracked
