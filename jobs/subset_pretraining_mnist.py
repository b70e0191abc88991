"""Subset pretraining of a small CNN on MNIST: 5,178 parameters, Q = 26 for each of four quarter subsets.

Command:    python jobs/subset_pretraining_mnist.py --data.root ~/data    (or --data.download where there is a network)
Hardware:   two CPU cores, shared and loaded; actors and workers take GPUs where the cluster has them.
Time:       1.5 to 2.5 minutes.
Result:     97.36 % ± 0.06 of the test examples (mean and standard error, seeds 0 to 2), for 12.3 passes, 4.8 of them on
            the critical path. Plain runs of as many passes in total: 97.78 % ± 0.06; as on that path: 97.25 % ± 0.04
            (jobs/equal_cost.py).
"""

import sys
from pathlib import Path

# A checkout is enough: raysubset need not be installed where `ray job submit --working-dir .` runs this
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raysubset.cli import run_job
from raysubset.config import (
    Config,
    DataConfig,
    FineTuningConfig,
    MinimizeConfig,
    ModelConfig,
    SubsetsConfig,
    TrunkConfig,
)

CONFIG = Config(
    data=DataConfig(name="mnist"),
    model=ModelConfig(name="cnn", width=16, depth=2),
    trunk=TrunkConfig(epochs=1),
    subsets=SubsetsConfig(num=4),
    minimize=MinimizeConfig(optimizer="sgd", learning_rate=0.1, batch_size=64, epochs=8),
    fine_tuning=FineTuningConfig(epochs=2),
)


if __name__ == "__main__":
    sys.exit(run_job(sys.argv[1:], default=CONFIG, description=__doc__))
