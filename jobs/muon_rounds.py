"""Do a few exchanges of Muon's minima replace data-parallel training's hundreds? CIFAR-10, a CNN of 24,346 parameters.

Arms at equal passes in total, with SGD and with Muon: one device (B), rounds of 4, 16 and 64 exchanges from a fresh
shared start with an outer Nesterov step of 1.0 and 0.6 (G), and data-parallel training (I), on four or eight devices.
Learning rates are tuned for each arm on validation data; the grid is wide enough that none should end at its edge.

Command:    python jobs/muon_rounds.py --data.root ~/data --num-workers 4       (eight: --subsets.num 8
            --num-workers 8 --name muon-rounds-8)
            RAYSUBSET_QUICK=1 python jobs/muon_rounds.py … tries it in minutes: one rate, two arms, one pass.
Hardware:   two CPU cores need about a night for three seeds of one width; a GPU an hour for five.
Result:     Test accuracy in % (± 95 % by Student's t), n = 3 seeds, 8 passes in total, 2026-11-30:
                                       SGD                              Muon
                            exchanges  rate        test                 rate         test
            B  one device           0  0.4 (edge)  72.1 ± 5.7           0.05         75.6 ± 1.8
                                                   (73.6, 73.3, 69.4)                (76.4, 75.2, 75.1)
            G                       4  0.2         65.1 ± 1.1           0.1          69.9 ± 1.7
                                                   (64.8, 65.6, 64.8)                (70.2, 70.3, 69.1)
            G                      16  0.2         68.0 ± 1.6           0.05         72.3 ± 0.8
                                                   (68.2, 68.6, 67.3)                (72.0, 72.3, 72.7)
            G                      64  0.2         69.7 ± 0.8           0.1          74.0 ± 0.6
                                                   (69.6, 70.1, 69.5)                (73.8, 74.3, 74.0)
            I  data-parallel    1,408  0.1         71.0 ± 2.5           0.05         74.7 ± 1.5
                                                   (71.7, 71.4, 69.9)                (74.8, 75.2, 74.1)
            Four devices pass over the data twice each, one device 8 times. Rates were tuned by a seed of its own: SGD's
            of 0.1, 0.2 and 0.4 for B and G, Muon's of 0.025, 0.05 and 0.1 at least, I's of 0.05 to 0.4; I trains at
            four times the rate, with four times the batch. Its legs were run by `raysubset run --method conventional
            --conventional.num-workers 4`.
            Paired by seed, 64, 16 and 4 exchanges end below data-parallel training's 1,408 by 0.7 ± 1.3, 2.4 ± 2.1 and
            4.9 ± 0.5 points with Muon, by 1.3 ± 2.2, 3.0 ± 1.3 and 5.9 ± 2.4 with SGD. At half its rate data-parallel
            Muon has 74.9 ± 0.3 (74.9, 74.8, 75.0; mean validation loss 0.7115 where 0.7111 was), so its rate is no edge
            any more, and 64 exchanges are 0.9 ± 0.7 points below that. Muon is ahead of SGD by 4.3 ± 0.4 points with 64
            exchanges, 4.3 ± 2.2 with 16, 4.8 ± 1.4 with 4 and 3.7 ± 1.4 in data-parallel training: the gain is Muon's,
            whatever the way of training, and fewer exchanges cost it as much as SGD. 64 exchanges of Muon's minima are
            3.1 ± 2.6 points above data-parallel SGD.
            SGD's validation accuracy with 64 exchanges at rates of 0.05, 0.1, 0.2 and 0.4 was 67.9, 69.4, 70.5 and
            68.0 %; at 0.1, 0.2 and 0.4 with 16 exchanges 66.5, 69.4 and 66.1, with 4 65.7, 66.6 and 63.7.
            Eight devices that pass over the data once each (8 passes in total, by `raysubset run` with --subsets.num 8,
            batches of 512 for data-parallel training), 2026-12-01:
                            exchanges  Muon: rate  test                     SGD: rate   test
            G                       4  0.1         65.2 ± 0.9               0.2         58.6 (n = 1)
                                                   (65.1, 65.5, 64.8)
            G                      16  0.05        68.5 ± 0.9               0.2         63.1 (n = 1)
                                                   (68.3, 68.9, 68.2)
            G                      64  0.1         71.8 ± 1.2               0.2         65.4 ± 1.6
                                                   (71.3, 72.0, 72.2)                   (65.3, 66.1, 64.8)
            I  data-parallel      704  0.025       74.6 ± 0.7               0.05        69.2 (n = 1)
                                                   (74.2, 74.6, 74.8)
            Rates were chosen by validation with seed 0, of 0.05, 0.1 and 0.2 for Muon's 64 exchanges (70.4, 72.8 and
            71.6 %), of 0.2 and 0.4 for SGD's (66.2 and 57.2), of 0.025 and 0.05 for data-parallel Muon (74.5 and 72.9),
            of 0.05 and 0.1 for data-parallel SGD (70.2 and 67.4), which trains at eight times the rate. Of those, all
            but Muon's 64 exchanges may have a better rate below; 16 and 4 exchanges have the rates of four devices.
            Paired by seed, 64, 16 and 4 exchanges of Muon's minima end 2.7 ± 0.4, 6.1 ± 1.1 and 9.4 ± 1.3 points below
            data-parallel Muon, where with four devices it is 0.7 ± 1.3, 2.4 ± 2.1 and 4.9 ± 0.5: a member has half as
            many steps between two exchanges, and half as many in all.
"""

import os
import sys
from pathlib import Path

# A checkout is enough: raysubset need not be installed where `ray job submit --working-dir .` runs this
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raysubset.cli import run_comparison_job
from raysubset.config import Config

CONFIG = Config(name="muon-rounds").with_overrides(
    {
        "data.name": "cifar10",
        "model.name": "cnn",
        "model.width": 16,
        "model.depth": 3,
        "subsets.num": 4,
        "trunk.epochs": 0.0,
        "minimize.epochs": 1.0,
        "rounds.outer_learning_rate": 1.0,
        "rounds.outer_momentum": 0.6,
        "rounds.evaluate_every": 64,
        "fine_tuning.epochs": 0.0,
    }
)
QUICK = "RAYSUBSET_QUICK" in os.environ
EXCHANGES = (4,) if QUICK else (4, 16, 64)
MUON = "minimize.optimizer=muon"
ARMS = (
    *("B", f"B:{MUON}", "I", f"I:{MUON}"),
    *(f"G:rounds.num={num}" for num in EXCHANGES),
    *(f"G:rounds.num={num},{MUON}" for num in EXCHANGES),
)

if __name__ == "__main__":
    sys.exit(
        run_comparison_job(
            sys.argv[1:],
            default=CONFIG,
            description=__doc__,
            seeds=2 if QUICK else 3,
            budgets=(1.0,) if QUICK else (8.0,),
            arms=("B", f"G:rounds.num=4,{MUON}") if QUICK else ARMS,
            learning_rates=(0.1,) if QUICK else (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8),
            num_workers=4,
        )
    )
