"""How often must four devices exchange weights? CIFAR-10, a CNN of 24,346 parameters (Q = 18), against DDP.

Subset pretraining in 1, 4, 8, 16 and 32 rounds with longer member steps and an outer Nesterov step (4 times the rate,
outer 1.0 and 0.6, after the pilot in single runs), beside conventional training (B) and data-parallel training (I) at
equal passes in total; wall times at several network speeds are computed from the bytes.

Command:    python jobs/compare_cifar10.py --data.root ~/data --cluster.num-cpus 4
Hardware:   two CPU cores, four actors on them.
Time:       about two hours, all of them beside other work, for 3,063 legs.
Result:     a reduced form: a budget of 4 passes in total, that is 1 on each of four devices, n = 3 seeds (± 95 %
            intervals by Student's t), learning rates tuned for each arm on validation data with a seed of its own
            (members' are four times what is shown). Passes on the critical path with all evaluation, of which rounds
            have one, after the last; seconds on it at 62.9 s a pass (loads of 5 to 25), with the bytes at 0.1, 1, 10
            and 100 Gbit/s.
                                 test accuracy, %    rate  critical path  exchanges     sent  seconds
            B  conventional         69.12 ± 2.07     0.2            4.04          0      0 B  254.3 254.3 254.3 254.3
            G  one round, mean      48.35 ± 7.58  0.00625           1.16          1   1.4 MB   72.9  72.8  72.8  72.8
            G  4 rounds             57.95 ± 0.53    0.05            1.27          4  3.89 MB   80.5  80.2  80.2  80.2
            G  8 rounds             59.62 ± 1.92    0.05            1.27          8  7.09 MB   80.8  80.3  80.3  80.3
            G  16 rounds            61.15 ± 1.95    0.05            1.27         16  13.5 MB   81.3  80.4  80.3  80.3
            G  32 rounds            62.61 ± 1.99    0.05            1.27         32  26.3 MB   82.4  80.5  80.3  80.3
            I  4 workers            64.90 ± 1.53    0.05            1.09        704   103 MB   76.7  69.3  68.6  68.5
            More exchanges help, the first most. Data-parallel training is ahead of any number of rounds by 2.3 points
            or more, and takes fewer seconds at 0.1 Gbit/s and above; with a latency of 10 ms its exchanges take 7 s
            more. The rate of one round's mean is the lowest of the grid: a lower one may do better. With every round
            measured, 32 rounds took 9.3 passes on the critical path.
            Before batch-norm statistics of G and I were taken of augmented batches (2026-11-29) the rows below B were
            48.4, 55.5, 56.9, 59.6, 60.3 and 63.8 %.
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
    rounds=RoundsConfig(learning_rate_scale=4.0, outer_learning_rate=1.0, outer_momentum=0.6, evaluate_every=32),
    fine_tuning=FineTuningConfig(epochs=0),
)
ROUNDS = (4, 8, 16, 32)  # G alone is one round, a plain mean

if __name__ == "__main__":
    sys.exit(
        run_comparison_job(
            sys.argv[1:],
            default=CONFIG,
            description=__doc__,
            seeds=3,
            budgets=(4.0,),
            arms=("B", "G:rounds.outer_momentum=0", *(f"G:rounds.num={num}" for num in ROUNDS), "I"),
            learning_rates=(0.00625, 0.0125, 0.025, 0.05, 0.1, 0.2, 0.4),
            num_workers=4,
        )
    )
