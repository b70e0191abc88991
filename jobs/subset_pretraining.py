"""Subset pretraining of a small CNN on digits: a short trunk, four minima on Ray actors, their mean, fine-tuning.

Command:    python jobs/subset_pretraining.py --seed 3
            ray job submit --working-dir . -- python jobs/subset_pretraining.py --storage-path s3://bucket/results
            Any flag of `raysubset run` changes a field of the config below; --help lists them.
Hardware:   two CPU cores are enough; actors and workers take GPUs where the cluster has them.
Time:       24 s on two idle CPU cores (n = 3), of which 19 s are Ray's.
Result:     97.3 % ± 0.5 of 359 test examples (mean and standard error, seeds 0 to 4), for 13.4 passes, 5.7 of them
            on the critical path. Plain runs of as many passes in total: 98.1 % ± 0.2; as on that path: 97.1 % ± 0.3.
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
    data=DataConfig(name="digits"),
    model=ModelConfig(name="cnn", width=8, depth=2),
    trunk=TrunkConfig(epochs=1),
    subsets=SubsetsConfig(num=4),
    minimize=MinimizeConfig(optimizer="sgd", learning_rate=0.1, batch_size=64, epochs=8),
    fine_tuning=FineTuningConfig(epochs=2),
)

if __name__ == "__main__":
    sys.exit(run_job(sys.argv[1:], default=CONFIG, description=__doc__))
