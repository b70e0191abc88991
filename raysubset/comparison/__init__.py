"""compare() shows whether subset pretraining pays for a data set and model, against conventional training and controls.

report = compare(Config(), seeds=5, budgets=[1, 2, 4, 8, 16])
report.verdicts["total"]["text"], report.verdicts["critical_path"]["text"]

arms → legs (shared where equal) → Ray tasks → costs on two clocks → speed-ups over seeds → verdict
"""

from raysubset.comparison.advice import Advice, advise, measured_lines
from raysubset.comparison.arms import ALL_ARMS
from raysubset.comparison.driver import compare
from raysubset.comparison.records import ComparisonReport
from raysubset.comparison.sizes import sizes_of
