"""Does subset pretraining pay for text? Python's own help topics by bytes, an LSTM, bits a byte.

The rival is conventional training at equal passes (B); weights are exchanged once or 8 times. A Transformer:
--model.name transformer.

Command:    python jobs/tasks/text.py
Hardware:   two CPU cores; nothing is downloaded.
Time:       4.4 minutes.
Result:     n = 3 seeds: "vacuous", a smoke test; it does not pay here. Test bits a byte (less is better),
            ± 95 % by Student's t, at a budget of 2 passes in total; passes on the critical path (49,920 parameters):
            B  conventional              3.22 ± 0.08    2.0
            G  mean of 4, fine-tuned     3.95 ± 0.12    0.8
            H  trunk, then G             3.60 ± 0.19    1.0
            H  in eight rounds           3.83 ± 0.13    1.2 (3.6 in total, as every round is measured)
            All rates are at the upper edge of their grid (0.01): a wider grid may tell otherwise.
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
