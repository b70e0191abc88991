"""How often must four devices exchange weights? CIFAR-10, a CNN of 24,346 parameters (Q = 18), against DDP.

Subset pretraining in 1, 4, 8, 16 and 32 rounds with longer member steps and an outer Nesterov step (4 times the rate,
outer 1.0 and 0.6, after the pilot in single runs), beside conventional training (B) and data-parallel training (I) at
equal passes in total; wall times at several network speeds are computed from the bytes.

Command:    python jobs/compare_cifar10.py --data.root ~/data --cluster.num-cpus 4
Hardware:   two CPU cores, four actors on them.
Time:       about 100 minutes, most of them beside other work, for 3,063 legs.
Result:     a reduced form: a budget of 4 passes in total, that is 1 on each of four devices, n = 3 seeds (± 95 %
            intervals by Student's t), learning rates tuned for each arm on validation data with a seed of its own
            (members' are four times what is shown). Passes on the critical path with all evaluation, of which rounds
            have one, after the last; seconds on it at 29.8 s a pass, with the bytes at 0.1, 1, 10 and 100 Gbit/s.
                                 test accuracy, %    rate  critical path  exchanges     sent  seconds
            B  conventional         68.39 ± 1.59     0.2            4.04          0      0 B  120.4 120.4 120.4 120.4
            G  one round, mean      48.41 ± 5.28  0.00625           1.15          1   786 kB   34.3  34.2  34.2  34.2
            G  4 rounds             55.53 ± 0.06  0.0125            1.26          4  3.15 MB   37.8  37.6  37.6  37.6
            G  8 rounds             56.89 ± 1.27  0.0125            1.26          8  6.29 MB   38.1  37.6  37.6  37.6
            G  16 rounds            59.61 ± 3.29   0.05             1.26         16  12.6 MB   38.6  37.7  37.6  37.6
            G  32 rounds            60.31 ± 0.76   0.05             1.26         32  25.2 MB   39.6  37.8  37.6  37.6
            I  4 workers            63.76 ± 2.36    0.1             1.08        704   103 MB   40.5  33.1  32.4  32.3
            More exchanges help, the first most. Data-parallel training is ahead of any number of rounds by 3.5 points
            or more, in as many seconds at 0.1 Gbit/s and fewer above; with a latency of 10 ms its exchanges take 7 s
            more. The rate of one round's mean is the lowest of the grid: a lower one may do better. With every round
            measured, 32 rounds took 9.3 passes on the critical path.
            G and I were measured with batch-norm statistics of images without crops and flips, which cost such networks
            2 to 4 points (muon_rounds.py has both): they are mended since, and these rows not measured again yet.
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
