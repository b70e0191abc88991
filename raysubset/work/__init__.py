"""The work itself, done in this process with its results in a run directory. It needs no Ray, and is tested without.

minimizer = Minimizer(lambda: full_set, num_gpus=0, node="here")
(record,) = minimizer.minimize([Piece(config, directory, "trunk")], None, attempts=[0], waited_s=0.0)
aggregation, record = leave_aggregate(full_set, 0, AggregatePiece(config, directory, members), node="here")
record = leave_test(full_set, 0, TestPiece(config, output, "test", is_final=True), node="here")
"""

from raysubset.work.aggregating import leave_aggregate, placed_model
from raysubset.work.cutting import (
    CALIBRATION_EXAMPLES,
    calibration_examples,
    cut_subsample,
    cut_subsets,
    subsample_size,
)
from raysubset.work.minimizing import Minimizer
from raysubset.work.pieces import (
    TEST_PATH,
    AggregatePiece,
    AnyPiece,
    Output,
    Piece,
    TestPiece,
    TrialPiece,
    perturbed,
    zeros_of,
)
from raysubset.work.reports import Report
from raysubset.work.run import Run
from raysubset.work.spans import round_spans
from raysubset.work.starting import (
    fixed_weights,
    restore_frozen,
    seeded_model,
    start_note,
    weights_fingerprint,
    weights_name,
)
from raysubset.work.testing import leave_test, test_weights
from raysubset.work.trained import distillation_of, leave_trained
