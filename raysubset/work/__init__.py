"""The work itself, done in this process and left in a run directory: no Ray, so it is tested without.

minimizer = Minimizer(config, lambda: full_set, directory, num_gpus=0, node="here")
(record,) = minimizer.minimize([piece], start, attempts=[0], waited_s=0.0)
aggregation, record = leave_aggregate(full_set, 0, config, directory, Round(0, minima, …), node="here")
metrics, files = leave_test(full_set, 0, config, directory, aggregation.aggregate.weights, node="here")
"""

from raysubset.work.aggregating import Round, leave_aggregate, placed_model
from raysubset.work.calibration import CALIBRATION_EXAMPLES, calibration_examples
from raysubset.work.minimizing import Minimizer
from raysubset.work.pieces import Piece, Report
from raysubset.work.run import Run
from raysubset.work.testing import leave_test, pick_mistakes, tabulate_predictions, test_weights

__all__ = [
    "Run",
    "Minimizer",
    "Piece",
    "Report",
    "Round",
    "CALIBRATION_EXAMPLES",
    "calibration_examples",
    "leave_aggregate",
    "leave_test",
    "placed_model",
    "test_weights",
    "tabulate_predictions",
    "pick_mistakes",
]
