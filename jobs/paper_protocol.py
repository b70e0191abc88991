"""The protocol of "Efficient Neural Network Training via Subset Pretraining" (arXiv:2410.16523), scaled down.

A VGG-style network, Adam at a constant 0.001: E epochs on one subset of 1/2 … 1/64 of the training set, then E/10 on
the full set; beside it conventional training of E epochs, of fewer at the same rate (stopped early), and of E/10 and
E/5 by a one-cycle schedule whose rate is tuned on validation data. The paper's E is 1,000, by a review of it that
nobody has verified.

Command:    python jobs/paper_protocol.py mnist --root ~/data        (or cifar10, cifar100; about an hour a data set)
            python jobs/paper_protocol.py cifar10 --epochs 1000 --seeds 5 --num-cpus 16
            The same command resumes. The sweep's page has the paper's figure; `raysubset sweep --baseline` draws it for
            any data.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout is enough

from raysubset import Config, RunReport, run, sweep
from raysubset.cli.screen import print_sections
from raysubset.cluster import connected
from raysubset.report import sweep_sections, write_files

FRACTIONS = tuple(2.0**-k for k in range(1, 7))
NETWORKS = {"mnist": (4, 3), "cifar10": (8, 3), "cifar100": (8, 3)}  # width and depth of the VGG
SHORT_RATES = (0.002, 0.006, 0.02)


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


def spread(values: Sequence[float], scale: float = 1.0, digits: int = 2) -> str:
    """'98.31 ± 0.05': mean and standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{scale * statistics.mean(values):.{digits}f} ± {scale * error:.{digits}f}"


def print_conventional(what: str, reports: Sequence[RunReport], long_passes: float) -> None:
    passes = statistics.mean(report.passes for report in reports)
    accuracy = spread([report.test.accuracy for report in reports], 100)
    loss = spread([report.validation.loss for report in reports], digits=3)
    print(f"{what:36s} {passes:6.1f} {passes / long_passes:6.2f} {loss:>14s} {accuracy:>14s}", flush=True)


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
        print(f"{'':36s} {'passes':>6s} {'share':>6s} {'validation':>14s} {'test %':>14s}")
        long_passes = statistics.mean(report.passes for report in long)
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
