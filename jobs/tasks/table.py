"""Does subset pretraining pay for a table's classes? scikit-learn's breast_cancer, an MLP, accuracy.

Command:    python jobs/tasks/table.py
Hardware:   two CPU cores; nothing is downloaded.
Time:       not measured yet.
Result:     not measured yet.
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
