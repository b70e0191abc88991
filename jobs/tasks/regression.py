"""Does subset pretraining pay for a regression? scikit-learn's diabetes, an MLP, r2.

Command:    python jobs/tasks/regression.py
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
