"""Late averaging (SWAP, arXiv:2001.02312): members that part late, on the whole set, against a trunk that goes on.

    python jobs/late_averaging.py --data.root ~/data [--members 4] [--seeds 3] [--steps 4]

A ResNet-20 learns CIFAR-10 with large batches (1,024, as eight workers would in data parallel). Then members go on from
there, each on the whole set with small batches in an order of its own, and their mean is taken, its batch-norm
statistics anew. Against it stand one member alone (the trunk that goes on), and large batches for as long as trunk and
member together. One process does all, one after the other: the critical path is what a device a member would take.
--steps tries every stage for so many steps, which a CPU can do.

Hardware: one GPU; a CPU only for a trial. Time: about a minute a seed on an H100 or H200 (an estimate).
Result:   NOT MEASURED YET: no GPU was at hand. One step a stage on a CPU came to the table.
"""

import argparse
import copy
import dataclasses
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout is enough

import numpy as np
import torch
from torch import nn

from raysubset.aggregation import merge
from raysubset.config import DataConfig, MinimizeConfig, ModelConfig, derive_seed
from raysubset.data import FullSet, load_full_set
from raysubset.models import build_model
from raysubset.training import Progress, evaluate, minimize, place, recompute_batch_norm, use_device

DATA_ROOT = Path(os.environ.get("RAYSUBSET_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
LARGE, SMALL = 1024, 128
TRIAL = 200  # examples that a trial of a few steps is tested on
TRUNK_EPOCHS, MEMBER_EPOCHS = 16.0, 4.0
TRUNK = MinimizeConfig(batch_size=LARGE, learning_rate=0.8, epochs=TRUNK_EPOCHS, schedule="warmup_linear")
MEMBER = MinimizeConfig(batch_size=SMALL, learning_rate=0.05, epochs=MEMBER_EPOCHS, schedule="cosine")


class Stages:
    """What is done with one seed, each stage for at most `steps` steps where that is given."""

    def __init__(self, full_set: FullSet, device: torch.device, seed: int, steps: int | None) -> None:
        self._full_set, self._device, self._seed, self._steps = full_set, device, seed, steps
        self._examples = full_set.examples("train", device=device, augment=True)
        self._test = full_set.examples("test", np.arange(len(full_set.test) if steps is None else TRIAL), device=device)
        calibration = np.arange(len(full_set.train) if steps is None else TRIAL)
        self._calibration = full_set.examples("train", calibration, device=device, augment=True)

    def fresh(self) -> nn.Module:
        model = build_model(ModelConfig(name="cifar_resnet"), self._full_set.spec, seed=self._seed)
        return place(model, self._device, channels_last=True)

    def minimized(self, model: nn.Module, recipe: MinimizeConfig, stage: str, number: int = 0) -> float:
        """Seconds that the stage took."""
        began, seed = time.perf_counter(), derive_seed(self._seed, stage, number)

        def is_enough(progress: Progress) -> bool:
            return self._steps is not None and progress.step >= self._steps

        minimize(model, self._examples, recipe, seed=seed, on_step=is_enough)
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def tested(self, model: nn.Module) -> float:
        return evaluate(model, self._test, MEMBER).accuracy

    def rows(self, num_members: int) -> dict[str, tuple[float, float]]:
        """Test accuracy and seconds on the critical path, by what was done."""
        trunk = self.fresh()
        trunk_s = self.minimized(trunk, TRUNK, "trunk")
        rows = {"large batches, 16 epochs (the trunk)": (self.tested(trunk), trunk_s)}
        members, member_s = [copy.deepcopy(trunk) for _ in range(num_members)], 0.0
        for number, member in enumerate(members):
            member_s = max(member_s, self.minimized(member, MEMBER, "member", number))
        accuracies = [self.tested(member) for member in members]
        rows["the trunk goes on in small batches (a member)"] = statistics.fmean(accuracies), trunk_s + member_s
        mean, began = members[0], time.perf_counter()
        mean.load_state_dict(merge([member.state_dict() for member in members]))
        recompute_batch_norm(mean, self._calibration, MEMBER)
        took = time.perf_counter() - began
        rows[f"mean of {num_members} members"] = self.tested(mean), trunk_s + member_s + took
        longer, model = dataclasses.replace(TRUNK, epochs=TRUNK_EPOCHS + MEMBER_EPOCHS), self.fresh()
        long_s = self.minimized(model, longer, "trunk")
        rows["large batches, 20 epochs"] = self.tested(model), long_s
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data.root", dest="root", default=str(DATA_ROOT))
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="at most so many a stage")
    options = parser.parse_args()
    device = use_device(num_gpus=float(torch.cuda.is_available()), num_threads=os.cpu_count() or 1)
    full_set = load_full_set(DataConfig(name="cifar10", root=options.root, validation_fraction=0.02))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}; torch {torch.__version__}; ResNet-20, {len(full_set.train)} examples")
    seeds = [Stages(full_set, device, seed, options.steps).rows(options.members) for seed in range(options.seeds)]
    for row in seeds[0]:
        accuracies, seconds = zip(*(rows[row] for rows in seeds), strict=True)
        spread = f" ± {statistics.stdev(accuracies):.2%}" if len(seeds) > 1 else ""
        print(f"{row:46}  test {statistics.fmean(accuracies):.2%}{spread}  {statistics.fmean(seconds):7.1f} s")


if __name__ == "__main__":
    main()
