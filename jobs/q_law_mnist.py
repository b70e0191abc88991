"""Does validation loss over own loss follow (Q+1)/(Q-1)? MNIST, squared error, one network on subsets of growing size.

A reduced form: an MLP of 27,040 parameters rather than a CNN, L-BFGS for 150 passes over a subset, weight decay 5e-4,
which need not be its minimum. For least squares at its minimum the ratio would be (Q+1)/(Q-1) with fixed inputs and
about (Q/(Q-1))^2 with Gaussian ones (recalled from the papers of the method's group); the network is not linear, its
labels have hardly any noise, and validation images are new ones.

Command:    python jobs/q_law_mnist.py --root ~/data
Hardware:   two CPU cores, shared with much other work (load 25).
Time:       under 10 minutes there, n = 1.
Result:     means over the minima of one run each, seed 0; ± is the standard deviation over the minima
                 Q minima  own loss validation        ratio (Q+1)/(Q-1) (Q/(Q-1))^2
              1.25      4   0.00430    0.02613  6.09 ± 0.35        9.06       25.30
              2.50      4   0.00708    0.01910  2.71 ± 0.22        2.34        2.78
              4.99      4   0.00931    0.01495  1.61 ± 0.02        1.50        1.56
              9.99      2   0.01049    0.01316  1.26 ± 0.02        1.22        1.23
             19.97      1   0.01140    0.01251         1.10        1.11        1.11
            From Q = 2.5 up the laws tell the gap before a run, within some tenths. At Q = 1.25 the ratio is below both:
            150 passes end before the minimum, where the law has its pole at Q = 1.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout is enough

from raysubset import Config, run

SHARES = ((4, 1 / 16), (4, 1 / 8), (4, 1 / 4), (2, 1 / 2), (1, 1.0))  # how many subsets, and what part of the set each
CONFIG = Config().with_overrides(
    {
        "data.name": "mnist",
        "model.name": "mlp",
        "model.width": 34,
        "trunk.epochs": 0.0,
        "task.loss": "squared_error",
        "minimize.optimizer": "lbfgs",
        "minimize.epochs": 150.0,
        "aggregation.method": "select_best",
        "fine_tuning.epochs": 0.0,
    }
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default=CONFIG.data.root, help="torchvision's files of mnist")
    parser.add_argument("--storage-path", default=CONFIG.storage_path)
    arguments = parser.parse_args()
    names = ("Q", "minima", "own loss", "validation", "ratio", "(Q+1)/(Q-1)", "(Q/(Q-1))^2")
    print(*(f"{name:>{width}}" for name, width in zip(names, (6, 6, 9, 10, 12, 11, 11), strict=True)))
    for num, fraction in SHARES:
        own = {"subsets.num": num, "subsets.fraction": fraction, "data.root": arguments.root}
        config = CONFIG.with_overrides(own | {"storage_path": arguments.storage_path})
        minima = run(config, on_event=None).record["stages"]["rounds"][-1]["minima"]
        q = statistics.mean(minimum["overdetermination_ratio"] for minimum in minima)
        losses = [(minimum["training"]["loss"], minimum["validation"]["loss"]) for minimum in minima]
        ratios = [validation / training for training, validation in losses]
        spread = f"{statistics.mean(ratios):.2f}" + (f" ± {statistics.stdev(ratios):.2f}" if num > 1 else "")
        means = [statistics.mean(column) for column in zip(*losses, strict=True)]
        print(
            f"{q:6.2f} {num:6d} {means[0]:9.5f} {means[1]:10.5f} {spread:>12} {(q + 1) / (q - 1):11.2f} "
            f"{(q / (q - 1)) ** 2:11.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
