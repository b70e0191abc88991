"""Does subset pretraining pay for other tasks than images? One comparison a task; what came of it stands below.

Command:    python jobs/tasks/compare.py TASK [flags of raysubset compare]        (from the root of the checkout)
            TASK is table, regression, text, segmentation or localisation. The last two need MNIST:
            RAYSUBSET_DATA=~/data python jobs/tasks/compare.py segmentation
Hardware:   two CPU cores; nothing is downloaded. Network and rates: below; all that is counted is in the passes.
Result:     n = 3 seeds, so smoke tests. ± is 95 % by Student's t; "critical" are passes on the critical path.

table: scikit-learn's breast_cancer, an MLP of 266 parameters (Q = 3.1, subsets 0.8). 1.0 minute. "Inconclusive": all is
within the noise of 114 test examples. Test accuracy in % at budgets of 4 and 12 passes; critical:
    B  conventional              99.42 ± 1.26  98.54 ± 1.26    4.1  12.1
    C  RS2                       99.71 ± 1.26  98.83 ± 1.26    4.1  12.3
    D  one subset, fine-tuned    98.83 ± 1.26  98.83 ± 1.26    4.1  12.1
    G  mean of 4, fine-tuned     99.42 ± 1.26  99.12 ± 2.18    1.8   5.0
    H  trunk, then G             97.95 ± 8.81  98.83 ± 3.33    2.0   5.7
    H  in four rounds            99.42 ± 1.26  99.42 ± 1.26    1.8   4.3
    Rates: 0.1 (B, C, D) and 0.3 of 0.03 to 1.

regression: scikit-learn's diabetes, an MLP of 97 parameters (Q = 3.3, subsets 0.8). 1.1 minutes. "Inconclusive": all is
within the noise of 88 test examples. Test r2 at budgets of 8 and 24 passes; critical:
    B  conventional              0.537 ± 0.085  0.497 ± 0.091    8.1  24.1
    C  RS2                       0.522 ± 0.063  0.501 ± 0.051    8.1  24.1
    D  one subset, fine-tuned    0.546 ± 0.044  0.494 ± 0.080    8.1  24.1
    G  mean of 4, fine-tuned     0.536 ± 0.093  0.528 ± 0.031    3.4   9.8
    H  trunk, then G             0.542 ± 0.110  0.514 ± 0.140    3.9  11.2
    H  in four rounds            0.517 ± 0.058  0.533 ± 0.041    3.0   8.2
    Rates: 0.1, of D 0.03, of 0.01 to 1; those above diverge, or end far worse.

text: Python's own help topics by bytes, an LSTM of 49,920 parameters (or --model.name transformer). 25 minutes on one
thread at loads of 5 to 20. "Vacuous": it does not pay here. Test bits a byte (less is better) at a budget of 2 passes;
critical; against B, paired by seed:
    B  conventional              2.91 ± 0.23    2.0
    G  mean of 4, fine-tuned     3.39 ± 0.05    0.8   +0.48 [+0.29, +0.67]
    H  trunk, then G             3.33 ± 0.12    1.0   +0.41 [+0.11, +0.71]
    H  in eight rounds           3.29 ± 0.10    1.2   +0.38 [+0.09, +0.67] (3.6 in total, as every round is measured)
    I  data-parallel, 2 workers  3.24 ± 0.25    1.2   +0.32 [-0.11, +0.76] (with I in --arms; 6 minutes more)
    Rates: 0.1, of rounds 0.03, of I 0.01 (times its workers), of 0.003 to 0.3. With the grid that ended at 0.01 it was
    3.22, 3.95, 3.60 and 3.83 for the first four.

text by a Transformer of 120,448 parameters (Q = 826, subsets 206), AdamW, --model.name transformer, --learning-rates
0.0003 to 0.03. 31 minutes at loads of 7 to 14. "Vacuous":
    B  conventional              3.30 ± 1.14    2.0         (its seeds: 2.80, 3.44 and 3.65)
    G  mean of 4, fine-tuned     3.83 ± 0.04    0.8   +0.53 [-0.53, +1.60]
    H  trunk, then G             3.74 ± 0.03    1.0   +0.44 [-0.63, +1.52]
    H  in eight rounds           3.86 ± 0.07    1.2   +0.57 [-0.47, +1.60] (3.6 in total)
    I  data-parallel, 2 workers  3.35 ± 0.19    1.2   +0.05 [-0.86, +0.97]
    Rates: 0.003, of B 0.01. Validation text is easier: 2.78, 3.24, 3.16, 3.28 and 2.82.

segmentation: MNIST's digits on patches of photographs, a U-Net of 29,930 parameters (Q = 577, subsets 144). 25 minutes
on one thread at load 2 to 6 (--cluster.num-cpus 1 --actors.max-num 1). "Vacuous": it does not pay here. Test IoU in %
(more is better) at a budget of 2 passes; critical; against B, paired by seed:
    B  conventional              92.67 ± 1.80   2.0
    G  mean of 4, fine-tuned     78.99 ± 1.49   1.1   -13.7 [-15.3, -12.1]
    H  trunk, then G             83.54 ± 7.36   1.3    -9.1 [-15.2, -3.1]
    H  in eight rounds           76.28 ± 12.11  3.9   -16.4 [-27.1, -5.6] (6.2 in total, as every round is measured)
    Rates: 0.006, of G 0.02, of 0.002 to 0.06, in two grids. (G's 0.02 was best by validation loss, not by IoU.)

localisation: the same scenes, digit and box, a CNN of 24,606 parameters (Q = 3.07, subsets 0.77) and a task of our own
(scenes.py). 12 minutes on one thread at load 4 to 10. "Vacuous": it does not pay here. Test IoU of the boxes in % at a
budget of 2 passes; critical; against B, paired by seed:
    B  conventional              48.65 ± 2.48   2.0
    G  mean of 4, fine-tuned     45.01 ± 0.35   1.1    -3.6 [-5.8, -1.5]
    H  trunk, then G             46.01 ± 1.76   1.3    -2.6 [-5.3, -0.0]
    H  in eight rounds           27.91 ± 38.96  4.1   -20.7 [-59.6, +18.1] (6.4 in total, as every round is measured)
    Rates: 0.002, of H 0.0006, of rounds 0.0002, of 0.00002 to 0.006, in two grids.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

# A checkout is enough: raysubset need not be installed where `ray job submit --working-dir .` runs this
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from raysubset.cli import run_comparison_job
from raysubset.config import Config

SHARED = {"subsets.num": 4, "actors.max_num": 2, "rounds.outer_momentum": 0.0}  # a plain mean, as measured
SETTINGS: dict[str, dict[str, Any]] = {
    "table": {
        "data.name": "breast_cancer",
        "model.name": "mlp",
        "model.width": 8,
        "trunk.epochs": 1.0,
        "minimize.batch_size": 16,
        "minimize.epochs": 8.0,
        "fine_tuning.epochs": 2.0,
    },
    "regression": {
        "data.name": "diabetes",
        "task.name": "regression",
        "model.name": "mlp",
        "model.width": 8,
        "trunk.epochs": 2.0,
        "minimize.learning_rate": 0.03,
        "minimize.batch_size": 16,
        "minimize.epochs": 16.0,
        "fine_tuning.epochs": 4.0,
    },
    "text": {
        "data.name": "python_docs",
        "data.window": 64,
        "task.name": "next_token",
        "model.name": "lstm",
        "trunk.epochs": 0.5,
        "minimize.optimizer": "adamw",
        "minimize.learning_rate": 0.006,
        "minimize.batch_size": 32,
        "minimize.epochs": 4.0,
        "fine_tuning.epochs": 0.5,
    },
    "segmentation": {
        "data.name": "jobs.tasks.scenes:segmentation",
        "task.name": "segmentation",
        "model.name": "unet",
        "trunk.epochs": 0.5,
        "minimize.optimizer": "adam",
        "minimize.batch_size": 32,
        "minimize.epochs": 4.0,
        "fine_tuning.epochs": 0.5,
    },
}
SETTINGS["localisation"] = SETTINGS["segmentation"] | {
    "data.name": "jobs.tasks.scenes:localisation",
    "task.name": "jobs.tasks.scenes:Localisation",
    "model.name": "cnn",
    "model.width": 16,
    "model.depth": 3,
}
SMALL = ("B", "C", "D", "G", "H", "H:rounds.num=4")
LARGE = ("B", "G", "H", "H:rounds.num=8")
OPTIONS: dict[str, dict[str, Any]] = {
    "table": {"budgets": (4.0, 12.0), "arms": SMALL, "learning_rates": (0.03, 0.1, 0.3, 1.0), "margin": 0.01},
    "regression": {
        "budgets": (8.0, 24.0),
        "arms": SMALL,
        "learning_rates": (0.01, 0.03, 0.1, 0.3, 1.0),
        "margin": 0.02,
    },
    "text": {"budgets": (2.0,), "arms": LARGE, "learning_rates": (0.003, 0.01, 0.03, 0.1, 0.3), "margin": 0.02},
    "segmentation": {"budgets": (2.0,), "arms": LARGE, "learning_rates": (0.002, 0.006, 0.02, 0.06), "margin": 0.01},
    "localisation": {
        "budgets": (2.0,),
        "arms": LARGE,
        "learning_rates": (0.00006, 0.0002, 0.0006, 0.002, 0.006),
        "margin": 0.01,
    },
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=SETTINGS)
    task = parser.parse_args(sys.argv[1:2]).task
    default = Config(name=f"task-{task}").with_overrides(SHARED | SETTINGS[task])
    sys.exit(run_comparison_job(sys.argv[2:], default=default, description=__doc__, seeds=3, **OPTIONS[task]))
