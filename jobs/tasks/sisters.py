"""The sister methods where their papers had them: a text in large batches, masks, and networks for 32 × 32 images.

Command:    python jobs/tasks/sisters.py extrapolation|sampling|skipping [--seeds 3] [--only NETWORK ...]
            (from the root of the checkout; RAYSUBSET_DATA=~/data has MNIST for sampling and CIFAR-10 for skipping)
            extrapolation  Extrap-SGD (arXiv:2006.05720): an LSTM and a Transformer learn Python's own help topics by
                           bytes, in batches of 512 where 32 is usual
            sampling       PSWA, PWALKS, PSWM (arXiv:1905.05774): a small U-Net, digits on photographs (scenes.py)
            skipping       Weight Update Skipping (arXiv:2012.02792): AlexNet, VGG-11, VGG-16 and ResNet-18, 300 steps
                           on 800 of CIFAR-10's images
Method:     one process, minimize() itself, no Ray. Each variation has the learning rate that ends with the
            least validation loss for a seed of its own (skipping tries one), then --seeds further ones. Cost is in
            passes over the set, forward and backward, and in CPU seconds of this thread.
Hardware:   two CPU cores, shared.
Result:     extrapolation, n = 3, test bits a byte after 4 passes (less is better; ± is the standard deviation), the
            best rate of 0.1 to 10 for the LSTM and of 0.03 to 1 for the Transformer (in two grids):
                            LSTM, 15 s of CPU            Transformer, 35 s
            none            4.24 ± 0.08   rate 3         4.55 ± 0.09   rate 0.1
            past_local      4.34 ± 0.01        3         4.65 ± 0.05        0.1
            isotropic       4.91 ± 0.02        1         4.81 ± 0.05        0.03
            filter_scaled   4.74 ± 0.01        1         4.70 ± 0.04        0.1
            No variation is ahead, and no rate is at the edge of its grid.

            sampling, n = 3, test IoU after 2 passes (more is better), 26 s of CPU each, rate 0.3 of 0.3, 1 and 3:
            none            0.920 ± 0.002
            pswa            0.881 ± 0.006
            pwalks          0.881 ± 0.006      one interval of averaging: no walk has begun from a mean
            pswm            0.844 ± 0.014
            Averaging is behind in so few passes, by as much as it averages over early weights. Rates are at the grid's
            lower edge; 0.1 was worse for plain steps (one seed), and is in the grid now.

            skipping, test accuracy after 300 steps (more is better), seconds of CPU, and passes of at most 24 and 12.
            All but AlexNet: --images 400 --batch-size 16 --epochs 12 --rates 0.01, n = 2, at loads of 5 to 30, which
            inflate seconds: passes are what is saved.
                            AlexNet, n = 3, rate 0.05    VGG-11                          VGG-16
            none            34.8 % ± 1.3   46.1 s        36.8 % ± 0.1   108.3 s  12.0    26.3 % ± 5.5   192.4 s  12.0
            wus             31.2 % ± 0.9   33.8 s        35.4 % ± 1.8    95.9 s  11.5    20.3 % ± 4.8   158.3 s  10.5
            wus_lr          26.3 % ± 2.8   31.9 s        33.8 % ± 4.1    89.7 s  11.2    17.0 % ± 0.4   153.6 s  10.3
                            ResNet-18
            none            36.6 % ± 1.0  290.5 s  12.0
            wus             36.5 % ± 0.8  288.8 s  11.7
            wus_lr          36.1 % ± 0.3  272.2 s  11.5
            What is saved costs accuracy: a quarter of AlexNet's time 3.6 points, an eighth of VGG-16's passes 6.0, and
            4 % of VGG-11's 1.4, which two seeds cannot tell from none. ResNet-18 skips 3 % for 0.1. (On 3,200 images
            AlexNet's accuracy rises in each of 6 epochs, and wus skips nothing: the same bits.)
"""

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

# A checkout is enough: raysubset need not be installed
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from raysubset.config import Config, MinimizeConfig
from raysubset.data import FullSet, SplitName, load_full_set
from raysubset.models import build_model
from raysubset.training import evaluate, forward_share, minimize, place

NUM_IMAGES, NUM_TESTED = 800, 2000  # of CIFAR-10, for skipping

TEXT = {"data.name": "python_docs", "data.window": 64, "task.name": "next_token"}
SCENES = {"data.name": "jobs.tasks.scenes:segmentation", "task.name": "segmentation", "model.name": "unet"}
IMAGES = {"data.name": "cifar10", "data.root": os.environ.get("RAYSUBSET_DATA", "~/.cache/raysubset/data")}
METHODS: dict[str, dict[str, Any]] = {
    "extrapolation": {
        "networks": {name: TEXT | {"model.name": name} for name in ("lstm", "transformer")},
        "recipe": {"minimize.batch_size": 512, "minimize.epochs": 4.0, "minimize.schedule": "warmup_linear"},
        "field": "minimize.extrapolation.kind",
        "kinds": ("none", "past_local", "isotropic", "filter_scaled"),
        "rates": (0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
    },
    "sampling": {
        "networks": {"unet": SCENES},
        "recipe": {"minimize.batch_size": 32, "minimize.epochs": 2.0},
        "field": "minimize.averaging.kind",
        "kinds": ("none", "pswa", "pwalks", "pswm"),
        "rates": (0.1, 0.3, 1.0, 3.0),
    },
    "skipping": {
        "networks": {f"{name}_32": IMAGES | {"model.name": f"{name}_32"} for name in ("alexnet", "vgg11", "vgg16")}
        | {"resnet18_32": IMAGES | {"model.name": "resnet18_32"}},
        "recipe": {"minimize.batch_size": 64, "minimize.epochs": 24.0},
        "field": "minimize.skipping.kind",
        "kinds": ("none", "wus", "wus_lr"),
        "rates": (0.05,),
    },
}


class Trials:
    """What a network comes to on one data set."""

    def __init__(self, config: Config, num: int | None) -> None:
        self._config, self._full_set = config, load_full_set(*config.learned)
        self._positions = np.arange(num or len(self._full_set.train))

    @property
    def full_set(self) -> FullSet:
        return self._full_set

    def of(self, recipe: MinimizeConfig, seed: int, split: SplitName) -> dict[str, float]:
        """Metrics on the split, passes and CPU seconds of one minimization."""
        full_set = self._full_set
        model = build_model(self._config.model, full_set.spec, seed=seed)
        model = place(model, torch.device("cpu"), channels_last=True)
        examples = full_set.examples("train", self._positions, augment=True)
        share, start_s = forward_share(model, full_set.spec), time.thread_time()
        cost = minimize(model, examples, recipe, seed=seed).cost
        seconds = time.thread_time() - start_s
        held_out = full_set.test if split == "test" else full_set.validation
        some = np.arange(min(NUM_TESTED, len(held_out)))
        metrics = evaluate(model, full_set.examples(split, some), recipe)
        quality = metrics.to_dict()[full_set.quality.name]
        passes = cost.passes(len(self._positions), share)
        return {"loss": metrics.loss, "quality": quality, "passes": passes, "seconds": seconds}


def best_rate(trials: Trials, recipe: MinimizeConfig, rates: Sequence[float]) -> float:
    """The rate that ends with the least validation loss, for a seed that is none of those reported."""

    def loss(rate: float) -> float:
        validation_loss = trials.of(replace(recipe, learning_rate=rate), 1000, "validation")["loss"]
        return validation_loss if math.isfinite(validation_loss) else math.inf

    return rates[0] if len(rates) == 1 else min(rates, key=loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="of the networks")
    parser.add_argument("--images", type=int, default=NUM_IMAGES, help="of CIFAR-10, for skipping")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--rates", type=float, nargs="+", help="tried for each variation")
    options = parser.parse_args()
    torch.set_num_threads(1)
    method = METHODS[options.method]
    if unknown := set(options.only or ()) - set(method["networks"]):
        parser.error(f"--only {' '.join(sorted(unknown))}: {options.method} has {', '.join(method['networks'])}")
    for network, settings in method["networks"].items():
        if options.only and network not in options.only:
            continue
        given = {"minimize.batch_size": options.batch_size, "minimize.epochs": options.epochs}
        recipe = method["recipe"] | {name: value for name, value in given.items() if value is not None}
        config = Config().with_overrides(settings | recipe)
        trials = Trials(config, options.images if options.method == "skipping" else None)
        quality = trials.full_set.quality
        print(f"{network}, {config.data.name}; test {quality.label}, n = {options.seeds}", flush=True)
        for kind in method["kinds"]:
            recipe = config.with_overrides({method["field"]: kind}).minimize
            rates = options.rates or method["rates"]
            rate = best_rate(trials, recipe, rates)
            edge = " (edge)" if len(rates) > 1 and rate in (rates[0], rates[-1]) else ""
            results = [trials.of(replace(recipe, learning_rate=rate), seed, "test") for seed in range(options.seeds)]
            values = [one["quality"] for one in results]
            spread = statistics.stdev(values) if len(values) > 1 else math.nan
            passes, seconds = (statistics.fmean(one[name] for one in results) for name in ("passes", "seconds"))
            mean = f"{statistics.fmean(values):.4f} ± {spread:.4f}"
            print(f"    {kind:14} {mean}  {passes:5.2f} passes {seconds:7.1f} s  rate {rate:g}{edge}", flush=True)


if __name__ == "__main__":
    main()
