"""Does subset pretraining pay for boxes? MNIST's digits on patches of photographs, a CNN, a task of our own: IoU.

Command:    RAYSUBSET_DATA=~/data python jobs/tasks/localisation.py      (from the root of the checkout; MNIST is there)
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
    name="localisation-scenes",
    data=DataConfig(name="jobs.tasks.scenes:localisation"),
    task=TaskConfig(name="jobs.tasks.scenes:Localisation"),
    model=ModelConfig(name="cnn", width=16, depth=3),
    subsets=SubsetsConfig(num=4),
    trunk=TrunkConfig(epochs=0.5),
    minimize=MinimizeConfig(optimizer="adam", batch_size=32, epochs=4),
    fine_tuning=FineTuningConfig(epochs=0.5),
    actors=ActorsConfig(max_num=2),
)
ARMS = ("B", "G", "H", "H:rounds.num=8")

if __name__ == "__main__":
    sys.exit(
        run_comparison_job(
            sys.argv[1:],
            default=CONFIG,
            description=__doc__,
            seeds=3,
            budgets=(2.0,),
            arms=ARMS,
            learning_rates=(0.002, 0.006),
            margin=0.01,
        )
    )
