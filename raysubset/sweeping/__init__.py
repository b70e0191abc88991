"""Sweeps by Ray Tune over subset sizes, or any field of the config: each trial a whole run, with seeds as error bars.

    report = sweep(Config(), {"subsets.size": [100, 200, 400]}, seeds=3)
    report.recommendation          # the smallest subset within one standard error of the best, in words

plan.py says what is run, trials.py runs one of it inside Tune, records.py what came of it; driver.py joins them.
"""

from raysubset import cluster as cluster  # first, before anything imports Ray: it says how Ray authenticates
from raysubset.sweeping.driver import sweep
from raysubset.sweeping.records import SweepReport
