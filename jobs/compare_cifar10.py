"""How often must four devices exchange weights? CIFAR-10, a CNN of 24,346 parameters (Q = 18), against DDP.

Subset pretraining in 1, 4, 8, 16 and 32 rounds with longer member steps and an outer Nesterov step (lr 0.4, outer 1.0
and 0.6, after the pilot in single runs), beside conventional training (B) and data-parallel training (I) at equal
passes in total; wall times at several network speeds are computed from the bytes.

Command:    python jobs/compare_cifar10.py --data.root ~/data
Hardware:   four CPUs, or two with --cluster.num-cpus 4.
Time:       not known; about 110 passes of 20 core-seconds each.
Result:     none yet, as it has not been run. The pilot's single runs are in the README's text.
"""

import sys
from pathlib import Path

# A checkout is enough: raysubset need not be installed where `ray job submit --working-dir .` runs this
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raysubset.cli import run_comparison_job
from raysubset.config import (
    Config,
    DataConfig,
    FineTuningConfig,
    MinimizeConfig,
    ModelConfig,
    RoundsConfig,
    SubsetsConfig,
    TrunkConfig,
)

CONFIG = Config(
    name="compare-cifar10",
    data=DataConfig(name="cifar10"),
    model=ModelConfig(name="cnn", width=16, depth=3),
    subsets=SubsetsConfig(num=4),
    trunk=TrunkConfig(epochs=0),
    minimize=MinimizeConfig(optimizer="sgd", batch_size=64, epochs=1),
    rounds=RoundsConfig(learning_rate_scale=4.0, outer_learning_rate=1.0, outer_momentum=0.6),
    fine_tuning=FineTuningConfig(epochs=0),
)
ROUNDS = (4, 8, 16, 32)  # G alone is one round, a plain mean

if __name__ == "__main__":
    sys.exit(
        run_comparison_job(
            sys.argv[1:],
            default=CONFIG,
            description=__doc__,
            seeds=2,
            budgets=(8.0,),
            arms=("B", "G:rounds.outer_momentum=0", *(f"G:rounds.num={num}" for num in ROUNDS), "I"),
            learning_rates=(0.1,),
            num_workers=4,
        )
    )
