"""Does subset pretraining pay for a table's classes? scikit-learn's breast_cancer, an MLP, accuracy.

Command:    python jobs/tasks/table.py
Hardware:   two CPU cores; nothing is downloaded.
Time:       1.0 minute.
Result:     n = 3 seeds: "inconclusive", a smoke test; all is within the noise of 114 test examples. Test accuracy in %,
            ± 95 % by Student's t, at budgets of 4 and 12 passes; passes on the critical path (266 parameters, Q = 3.1,
            subsets 0.8):
            B  conventional              99.42 ± 1.26  98.54 ± 1.26    4.1  12.1
            C  RS2                       99.71 ± 1.26  98.83 ± 1.26    4.1  12.3
            D  one subset, fine-tuned    98.83 ± 1.26  98.83 ± 1.26    4.1  12.1
            G  mean of 4, fine-tuned     99.42 ± 1.26  99.12 ± 2.18    1.8   5.0
            H  trunk, then G             97.95 ± 8.81  98.83 ± 3.33    2.0   5.7
            H  in four rounds            99.42 ± 1.26  99.42 ± 1.26    1.8   4.3
            Rates of G and H are at the edge of their grid (0.3).
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
    TrunkConfig,
)

CONFIG = Config(
    name="table-breast-cancer",
    data=DataConfig(name="breast_cancer"),
    model=ModelConfig(name="mlp", width=8),
    subsets=SubsetsConfig(num=4),
    trunk=TrunkConfig(epochs=1),
    minimize=MinimizeConfig(optimizer="sgd", batch_size=16, epochs=8),
    fine_tuning=FineTuningConfig(epochs=2),
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
            budgets=(4.0, 12.0),
            arms=ARMS,
            learning_rates=(0.03, 0.1, 0.3),
            margin=0.01,
        )
    )
