"""Subset pretraining beside conventional runs of the same cost: jobs/README.md's table.

Command:    python jobs/equal_cost.py --sets digits mnist cifar10 --seeds 3 --root ~/data
Arms:       subsets     trunk of one epoch, four minima of eight subset epochs, their mean, two epochs of fine-tuning
            total       one plain run on one device with the same passes in total
            critical    one plain run on one device with the same passes as the critical path of `subsets`
            Every arm has the same network, batch size, optimizer, peak learning rate (0.1, not tuned for any arm) and
            cosine schedule, and pays for its own evaluation. Seeds are paired; splits are the same for all.
Hardware:   two CPU cores, shared and loaded; digits took 4 minutes for 5 seeds, mnist 14 for 3, cifar10 27 for 2.
Result:     test accuracy in %, mean ± standard error over n seeds; passes of `subsets`, total / critical path
            digits    n = 5    subsets 97.33 ± 0.45    total 98.05 ± 0.23    critical 97.05 ± 0.31    13.4 / 5.7
            mnist     n = 3    subsets 97.36 ± 0.06    total 97.78 ± 0.06    critical 97.25 ± 0.04    12.3 / 4.8
            cifar10   n = 2    subsets 68.47 ± 0.68    total 73.91 ± 0.37    critical 68.74 ± 0.01    12.4 / 4.9
            (In the first two networks had ReLU before the pooling instead of after it: the same function. cifar10 is of
            2026-11-30; before batch-norm statistics were taken of augmented batches `subsets` had 66.80 ± 0.06.)
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout is enough

from raysubset import Config, RunReport, run
from raysubset.training import Cost

SETS = {
    "digits": {},
    "mnist": {"data.name": "mnist", "model.width": 16},
    "cifar10": {"data.name": "cifar10", "model.width": 16, "model.depth": 3},
}
ARMS = ("subsets", "total", "critical")


def run_arms(config: Config) -> dict[str, RunReport]:
    """The three arms of one seed; each is a run that resumes under its own name."""
    subsets = run(config)
    data, share = subsets.record["data"], subsets.record["model"]["forward_share"]
    evaluation = Cost(num_forward=data["num_train"] + data["num_validation"] + data["num_test"])
    own = evaluation.passes(data["num_train"], share)
    plain = config.with_overrides({"method": "conventional"})
    lengths = {"total": subsets.passes - own, "critical": subsets.critical_path_passes - own}
    arms = {arm: run(plain.with_overrides({"conventional.epochs": epochs})) for arm, epochs in lengths.items()}
    return {"subsets": subsets, **arms}


def spread(values: Sequence[float]) -> str:
    """Mean and its standard error over seeds."""
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=sorted(SETS), default=["digits"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--root", default=Config().data.root, help="torchvision's files of mnist and cifar10")
    parser.add_argument("--storage-path", default=Config().storage_path)
    arguments = parser.parse_args()
    for name in arguments.sets:
        reports: dict[str, list[RunReport]] = {arm: [] for arm in ARMS}
        for seed in range(arguments.seeds):
            config = Config(seed=seed, storage_path=arguments.storage_path)
            config = config.with_overrides({"data.root": arguments.root, **SETS[name]})
            for arm, report in run_arms(config).items():
                reports[arm].append(report)
                told = {"set": name, "seed": seed, "arm": arm, "test": report.test.accuracy, "passes": report.passes}
                print(json.dumps(told), file=sys.stderr, flush=True)
        print(f"\n{name}, n = {arguments.seeds}: test accuracy in %, passes in total and on the critical path")
        for arm in ARMS:
            runs = reports[arm]
            passes = [statistics.mean(getattr(r, key) for r in runs) for key in ("passes", "critical_path_passes")]
            accuracy = spread([100 * r.test.accuracy for r in runs])
            print(f"  {arm:9} {accuracy:15} {passes[0]:6.2f} {passes[1]:6.2f}", flush=True)


if __name__ == "__main__":
    main()
