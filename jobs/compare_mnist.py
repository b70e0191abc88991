"""Does subset pretraining pay on MNIST? All arms and controls, a CNN of 9,640 parameters (Q = 56, subsets 14).

Command:    python jobs/compare_mnist.py --data.root ~/data --seeds 5
Hardware:   two CPU cores do, with four logical ones for arm I (--cluster.num-cpus 4).
Time:       not known: on two loaded cores 95 of 342 legs of a reduced form (arms B D G H H:rounds.num=4, budgets 1 2 4,
            n = 3) took 17 minutes, and it was stopped there. The same command goes on.
Result:     none yet, as it has not been run to its end.
"""

import sys
from pathlib import Path

# A checkout is enough: raysubset need not be installed where `ray job submit --working-dir .` runs this
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raysubset.cli import run_comparison_job
from raysubset.config import Config, DataConfig, FineTuningConfig, MinimizeConfig, ModelConfig, SubsetsConfig

CONFIG = Config(
    name="compare-mnist",
    data=DataConfig(name="mnist"),
    model=ModelConfig(name="cnn", width=10, depth=3),
    subsets=SubsetsConfig(num=4),
    minimize=MinimizeConfig(optimizer="sgd", batch_size=64, epochs=8),
    fine_tuning=FineTuningConfig(epochs=2),
)
ARMS = ("A", "B", "C", "D", "E", "F", "G", "H", "H:rounds.num=4", "I")

if __name__ == "__main__":
    sys.exit(
        run_comparison_job(
            sys.argv[1:],
            default=CONFIG,
            description=__doc__,
            seeds=5,
            budgets=(1.0, 2.0, 4.0),
            arms=ARMS,
            learning_rates=(0.03, 0.1, 0.3),
        )
    )
