"""Does subset pretraining pay for text? Python's own help topics by bytes, an LSTM, bits a byte.

The rival is conventional training at equal passes (B); rounds exchange weights 1 or 8 times, data-parallel training (I,
two workers) at every step. A Transformer: --model.name transformer.

Command:    python jobs/tasks/text.py
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
    name="text-python-docs",
    data=DataConfig(name="python_docs", window=64),
    task=TaskConfig(name="next_token"),
    model=ModelConfig(name="lstm"),
    subsets=SubsetsConfig(num=4),
    trunk=TrunkConfig(epochs=0.5),
    minimize=MinimizeConfig(optimizer="adamw", learning_rate=0.006, batch_size=32, epochs=4),
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
            learning_rates=(0.003, 0.01),
            margin=0.02,
        )
    )
