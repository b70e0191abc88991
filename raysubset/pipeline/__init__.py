"""One run, from config to report: read `stages` first, whose run() does the stages in order.

`rounds` finds and aggregates subset minima. `decisions` are made once, some by `node_speeds`. `run_report` sums up.
"""

from raysubset.pipeline.run_report import RunReport
from raysubset.pipeline.stages import run
