"""Does subset pretraining pay for a regression? scikit-learn's diabetes, an MLP, r2.

Command:    python jobs/tasks/regression.py
Hardware:   two CPU cores; nothing is downloaded.
Time:       1.1 minutes.
Result:     n = 3 seeds: "inconclusive", a smoke test; all is within the noise of 88 test examples. Test r2, ± 95 % by
            Student's t, at budgets of 8 and 24 passes; critical-path passes (97 parameters, Q = 3.3, subsets 0.8):
            B  conventional              0.537 ± 0.085  0.497 ± 0.091    8.1  24.1
            C  RS2                       0.522 ± 0.063  0.501 ± 0.051    8.1  24.1
            D  one subset, fine-tuned    0.546 ± 0.044  0.494 ± 0.080    8.1  24.1
            G  mean of 4, fine-tuned     0.536 ± 0.093  0.528 ± 0.031    3.4   9.8
            H  trunk, then G             0.542 ± 0.110  0.514 ± 0.140    3.9  11.2
            H  in four rounds            0.517 ± 0.058  0.533 ± 0.041    3.0   8.2
            Rates are at the edge of their grid (0.1) but for D (0.03).
"""

import sys
from pathlib import Path

# A checkout is enough: raysubset need not be installed where `ray job submit --working-dir .` runs this
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from raysubset.cli import run_comparison_job
from raysubset.config import (
    ActorsConfig,
    Config,
    DataConfig,
    FineTuningConfig,
    MinimizeConfig,
    ModelConfig,
    SubsetsConfig,
    TaskConfig,
    TrunkConfig,
)

CONFIG = Config(
    name="regression-diabetes",
    data=DataConfig(name="diabetes"),
    task=TaskConfig(name="regression"),
    model=ModelConfig(name="mlp", width=8),
    subsets=SubsetsConfig(num=4),
    trunk=TrunkConfig(epochs=2),
    minimize=MinimizeConfig(optimizer="sgd", learning_rate=0.03, batch_size=16, epochs=16),
    fine_tuning=FineTuningConfig(epochs=4),
    actors=ActorsConfig(max_num=2),
)
ARMS = ("B", "C", "D", "G", "H", "H:rounds.num=4")

if __name__ == "__main__":
    sys.exit(
        run_comparison_job(
            sys.argv[1:],
            default=CONFIG,
            description=__doc__,
            seeds=3,
            budgets=(8.0, 24.0),
            arms=ARMS,
            learning_rates=(0.01, 0.03, 0.1),
            margin=0.02,
        )
    )
