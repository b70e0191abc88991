"""Subset pretraining of a CNN on CIFAR-100, with crops and flips; Q = 11 for each of four quarter subsets.

Command:    python jobs/subset_pretraining_cifar100.py --data.root ~/data    (or --data.download)
Hardware:   actors and workers take GPUs where the cluster has them; on two CPU cores about an hour.
Result:     not measured: the data were not at hand where this was written.
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
    data=DataConfig(name="cifar100"),
    model=ModelConfig(name="cnn", width=32, depth=3),
    trunk=TrunkConfig(epochs=2),
    subsets=SubsetsConfig(num=4),
    minimize=MinimizeConfig(optimizer="sgd", learning_rate=0.1, batch_size=128, epochs=16),
    fine_tuning=FineTuningConfig(epochs=4),
)


if __name__ == "__main__":
    sys.exit(run_job(sys.argv[1:], default=CONFIG, description=__doc__))
