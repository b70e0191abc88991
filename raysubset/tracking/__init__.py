"""Trackers that are told of a run as it goes: MLflow and Weights & Biases, where they are installed and asked for.

refuse_missing(config.tracking)                          # before anything is run
with tracked(config, directory, tell) as tell: ...       # a listener of the run's events; the report when it is left
"""

from raysubset.tracking.following import refuse_missing, track_comparison, track_finished, track_page, tracked
