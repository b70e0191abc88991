"""Sweeps by Ray Tune over subset sizes, or any field of the config. Each trial is a whole run; seeds give error bars.

    report = sweep(Config(), {"subsets.size": [100, 200, 400]}, seeds=3)
    report.recommendation          # the smallest subset within one standard error of the best, in words

plan.py draws up the trials, trials.py runs one inside Tune, records.py sums up the results, and driver.py joins them.
"""

from raysubset import cluster as cluster  # before anything imports Ray: it sets how Ray authenticates
from raysubset.sweeping.driver import sweep
from raysubset.sweeping.records import SweepReport
