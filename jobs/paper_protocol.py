"""The protocol of "Efficient Neural Network Training via Subset Pretraining" (arXiv:2410.16523), scaled down.

A VGG-style network, Adam at a constant 0.001: E epochs on one subset of 1/2 … 1/64 of the training set, then E/10 on
the full set; beside it conventional training of E epochs, of fewer at the same rate (stopped early), and of E/10 and
E/5 by a one-cycle schedule whose rate is tuned on validation data. The paper's E is 1,000, by a review of it that
nobody has verified.

Command:    python jobs/paper_protocol.py mnist --root ~/data        (or cifar10, cifar100)
            python jobs/paper_protocol.py cifar10 --epochs 1000 --seeds 5 --num-cpus 16
            The same command resumes. The sweep's page has the paper's figure; `raysubset sweep --baseline` draws it for
            any data.
Hardware:   two cores of a shared virtual machine.
Time:       75 minutes there for MNIST, 55 for CIFAR-10, with three seeds beside another job.
Result:     MNIST, E = 20, a VGG of 9,582 parameters, n = 3 (mean ± 95 % by Student's t), 2026-12-01. Passes count all
            evaluation, shares are of the 20 conventional epochs. Own: of the subset's minimum on the subset, then on
            the full set and, before, on validation data; the last two columns are after fine-tuning.
            subset          Q  passes share  own loss       full set       before         validation     test %
            1/2 (27000)  28.3   12.5  0.61   0.013 ± 0.009  0.046 ± 0.029  0.068 ± 0.008  0.053 ± 0.033  98.43 ± 0.55
            1/4 (13500)  14.2    7.5  0.37   0.010 ± 0.006  0.077 ± 0.003  0.093 ± 0.007  0.060 ± 0.018  98.30 ± 0.46
            1/8 (6750)    7.1    4.9  0.24   0.019 ± 0.030  0.135 ± 0.067  0.144 ± 0.028  0.062 ± 0.018  98.08 ± 0.54
            1/16 (3375)   3.5    3.6  0.18   0.021 ± 0.025  0.201 ± 0.049  0.198 ± 0.057  0.068 ± 0.029  98.03 ± 0.87
            1/32 (1687)   1.8    3.0  0.15   0.023 ± 0.034  0.255 ± 0.065  0.263 ± 0.091  0.071 ± 0.022  97.91 ± 0.50
            1/64 (843)   0.88    2.7  0.13   0.066 ± 0.103  0.371 ± 0.191  0.369 ± 0.197  0.078 ± 0.027  97.66 ± 0.70
            conventional, 20    20.4  1.00                                                0.043 ± 0.005  98.74 ± 0.22
            stopped after 10    10.4  0.51                                                0.050 ± 0.018  98.41 ± 0.53
                           4     4.4  0.22                                                0.062 ± 0.019  98.06 ± 0.32
                           2     2.4  0.12                                                0.076 ± 0.021  97.72 ± 0.25
            one-cycle, 4         4.4  0.22                                                0.032 ± 0.008  98.97 ± 0.14
            one-cycle, 2         2.4  0.12                                                0.042 ± 0.006  98.77 ± 0.24
            Both one-cycle rates are 0.006, of 0.002, 0.006 and 0.02. At the paper's constant rate each subset with its
            fine-tuning is level with conventional training that is stopped at its cost or a little later (98.03 %
            after 3.6 passes, 98.06 % after 4.4), and short of 20 epochs by 0.3 points and more. The short schedule is
            ahead of all of them, and level with 20 epochs or above, with its tuning counted too (7.3 passes, three
            runs of 2 epochs): what looks like a tenth of the cost is a poor schedule's.
            CIFAR-10, E = 10, a VGG of 51,666 parameters (Q of the full set 8.7), n = 3 likewise:
            1/2 (22500)   4.4    6.6  0.63   1.038 ± 0.042  1.068 ± 0.038  1.080 ± 0.047  1.043 ± 0.075  62.84 ± 1.49
            1/4 (11250)   2.2    4.0  0.38   1.203 ± 0.066  1.251 ± 0.112  1.260 ± 0.119  1.165 ± 0.119  58.17 ± 4.92
            1/8 (5625)    1.1    2.7  0.26   1.338 ± 0.053  1.403 ± 0.080  1.408 ± 0.084  1.297 ± 0.087  53.67 ± 2.57
            1/16 (2812)  0.54    2.0  0.19   1.473 ± 0.070  1.554 ± 0.065  1.561 ± 0.078  1.380 ± 0.069  50.29 ± 4.94
            1/32 (1406)  0.27    1.7  0.16   1.623 ± 0.119  1.733 ± 0.026  1.731 ± 0.012  1.418 ± 0.100  49.07 ± 3.99
            1/64 (703)   0.14    1.5  0.15   1.779 ± 0.091  1.927 ± 0.041  1.933 ± 0.031  1.469 ± 0.119  47.13 ± 4.33
            conventional, 10    10.5  1.00                                                0.930 ± 0.056  66.60 ± 3.11
            stopped after 5      5.5  0.52                                                1.090 ± 0.030  60.56 ± 1.63
                          2      2.5  0.23                                                1.264 ± 0.054  54.26 ± 2.49
                          1      1.5  0.14                                                1.419 ± 0.084  48.40 ± 4.16
            one-cycle, 2         2.5  0.23                                                1.199 ± 0.007  56.79 ± 0.93
            one-cycle, 1         1.5  0.14                                                1.371 ± 0.007  49.04 ± 0.18
            Ten epochs are too few for this network. Each size is level, within the intervals, with conventional
            training that is stopped at its cost, and none is ahead of the short schedule.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout is enough

from raysubset import Config, RunReport, SweepReport, run, sweep
from raysubset.cli.screen import print_sections
from raysubset.cluster import connected
from raysubset.comparison.statistics import t_interval
from raysubset.report import sweep_sections, write_files

FRACTIONS = tuple(2.0**-k for k in range(1, 7))
NETWORKS = {"mnist": (4, 3), "cifar10": (8, 3), "cifar100": (8, 3)}  # width and depth of the VGG
SHORT_RATES = (0.002, 0.006, 0.02)
_STAGES = ("own", "full_set", "before", "validation")  # of a trial's losses: the minimum's, then the fine-tuned model's


def config_of(data: str, root: str, storage_path: str, epochs: float) -> Config:
    width, depth = NETWORKS[data]
    return Config(name=f"paper-{data}-{epochs:g}", storage_path=storage_path).with_overrides(
        {
            "data.name": data,
            "data.root": root,
            "model.name": "vgg",
            "model.width": width,
            "model.depth": depth,
            "model.norm": "none",
            "subsets.num": 1,
            "trunk.epochs": 0.0,
            "minimize.optimizer": "adam",
            "minimize.learning_rate": 0.001,
            "minimize.schedule": "constant",
            "minimize.weight_decay": 0.0,
            "minimize.epochs": float(epochs),
            "aggregation.method": "select_best",
            "fine_tuning.epochs": epochs / 10,
            "fine_tuning.num_workers": 1,
        }
    )


def conventional(config: Config, seed: int, epochs: float, **overrides: Any) -> RunReport:
    """A conventional run of so many epochs, kept beside the sweep's trials."""
    own = {"method": "conventional", "seed": seed} | ({} if epochs == config.minimize.epochs else {"epochs": epochs})
    words = {**own, **{key.rpartition(".")[2]: value for key, value in overrides.items()}}
    name = "_".join(f"{key}-{value}" for key, value in words.items() if key != "seed") + f"_seed-{seed}"
    place = {"name": name, "storage_path": f"{config.storage_path}/{config.name}/trials", "conventional.epochs": epochs}
    return run(config.with_overrides({"method": "conventional", "seed": seed} | place | overrides))


def tuned_short_runs(config: Config, seeds: Sequence[int], epochs: float) -> tuple[float, list[RunReport]]:
    """One-cycle runs at the rate that validates best with the first seed."""

    def short(seed: int, rate: float) -> RunReport:
        cycle = {"minimize.schedule": "one_cycle", "minimize.learning_rate": rate}
        return conventional(config, seed, epochs, **cycle)

    tried = {rate: short(seeds[0], rate) for rate in SHORT_RATES}
    best = min(tried, key=lambda rate: tried[rate].validation.loss)
    return best, [tried[best], *(short(seed, best) for seed in seeds[1:])]


def spread(values: Sequence[float], digits: int) -> str:
    """'98.31 ± 0.05': the mean and, of several, its 95 % interval by Student's t."""
    interval = t_interval(values)
    more = f" ± {interval.high - interval.estimate:.{digits}f}" if len(values) > 1 else ""
    return f"{interval.estimate:.{digits}f}{more}"


def print_subsets(swept: SweepReport, long_passes: float) -> None:
    heads = "".join(f" {head:>16s}" for head in ("own loss", "full set", "before", "validation", "test %"))
    print(f"{'':36s} {'Q':>5s} {'passes':>6s} {'share':>6s}{heads}")
    for overrides, trials in itertools.groupby(swept.trials, key=lambda trial: trial["overrides"]):
        group = [trial for trial in trials if trial["state"] == "done"]  # the sweep's page names those that failed
        if not group or "subsets.fraction" not in overrides:
            continue
        ratio = statistics.mean(trial["overdetermination_ratio"] for trial in group)
        passes = statistics.mean(trial["passes"] for trial in group)
        losses = (spread([trial[f"{where}_loss"] for trial in group], 3) for where in _STAGES)
        accuracy = spread([100 * trial["test_accuracy"] for trial in group], 2)
        cells = "".join(f" {cell:>16s}" for cell in (*losses, accuracy))
        what = f"1/{1 / overrides['subsets.fraction']:g} ({group[0]['subset_size']:g} examples), {len(group)} seeds"
        print(f"{what:36s} {ratio:5.2f} {passes:6.1f} {passes / long_passes:6.2f}{cells}", flush=True)


def print_conventional(what: str, reports: Sequence[RunReport], long_passes: float) -> None:
    passes = statistics.mean(report.passes for report in reports)
    accuracy = spread([100 * report.test.accuracy for report in reports], 2)
    loss = spread([report.validation.loss for report in reports], 3)
    print(f"{what:42s} {passes:6.1f} {passes / long_passes:6.2f} {loss:>67s} {accuracy:>16s}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=NETWORKS)
    parser.add_argument("--root", default=Config().data.root, help="torchvision's files")
    parser.add_argument("--storage-path", default=Config().storage_path)
    parser.add_argument("--epochs", type=int, default=20, help="E: of the subset, and of conventional training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num-cpus", type=int, default=2, help="of a cluster on this machine")
    arguments = parser.parse_args()
    epochs, seeds = arguments.epochs, range(arguments.seeds)
    config = config_of(arguments.data, arguments.root, arguments.storage_path, epochs)
    with connected(config.with_overrides({"cluster.num_cpus": arguments.num_cpus}).cluster):
        swept = sweep(config, {"subsets.fraction": FRACTIONS}, seeds=list(seeds), baseline=True)
        long = [conventional(config, seed, epochs) for seed in seeds]
        long_passes = statistics.mean(report.passes for report in long)
        print_subsets(swept, long_passes)
        print_conventional(f"conventional, {epochs} epochs", long, long_passes)
        for part in (10, 5, 2):
            reports = [conventional(config, seed, epochs / part) for seed in seeds]
            print_conventional(f"the same, stopped after {epochs / part:g}", reports, long_passes)
        for part in (10, 5):
            rate, reports = tuned_short_runs(config, seeds, epochs / part)
            print_conventional(f"one-cycle, {epochs / part:g} epochs, rate {rate:g}", reports, long_passes)
    print(write_files(swept.uri))
    print_sections(sweep_sections(swept.to_dict()))


if __name__ == "__main__":
    main()
