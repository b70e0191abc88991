"""Time of a step of K members packed ÷ the time of a step of one: what subsets.per_actor = K would gain.

python jobs/bench_packing.py [--members 1 2 4 8 16 32]        (MNIST from $RAYSUBSET_DATA or ../shared/data)
Both ways run the real loops, in turns, on copies of the same models, and the fastest of five repeats of eight steps
counts: it is the trial that a run with subsets.per_actor > 1 makes on its first actor. Batches of 64, sgd.

Hardware: 1 thread of a shared virtual machine of 2 cores, load 18 to 23 while it ran (up to 300 for K = 16);
torch 2.15. Wall time there: 2 min up to K = 8, over 5 min with 16 and 32.
Result there (n = 1 run, in that thread's own time): for the CNN of width 16 and depth 2, K = 1, 2, 4, 8, 16 take 1.2,
2.0, 5.0, 11.0, 28.7 times the time of one, so ratios to K single steps of 1.2, 1.0, 1.2, 1.4, 1.8; for the MLP,
K = 1, 2, 4, 8, ratios of 2.2, 1.6, 1.2, 0.9: on a CPU packing a CNN is at best even, and lost once activations leave
the cache. K = 32 was not timed this way; by the wall's clock it was 1.8 and 2.7 in two runs.
CUDA is measured where there is a card: not yet. The goal, on an H200: K = 8 in 1.5 times, K = 32 in 3 times.
"""

import argparse
import os
from pathlib import Path

import numpy as np
import torch

from raysubset.config import DataConfig, MinimizeConfig, ModelConfig
from raysubset.data import load_full_set
from raysubset.models import build_model
from raysubset.training import place, try_packing, use_device

DATA_ROOT = Path(os.environ.get("RAYSUBSET_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
SIZE = 1_664  # examples of a subset: 26 whole batches of 64
GOALS = {8: 1.5, 32: 3.0}  # of the CNN, on an H200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    options = parser.parse_args()

    device = use_device(num_gpus=float(torch.cuda.is_available()), num_threads=1)
    full_set = load_full_set(DataConfig(name="mnist", root=str(DATA_ROOT)))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, 1 thread"
    print(f"{name}; torch {torch.__version__}; load {os.getloadavg()[0]:.1f}; MNIST, batch 64, sgd")
    for model_config in (ModelConfig(width=16, depth=2), ModelConfig(name="mlp", width=32)):
        for num in options.members:
            models = [build_model(model_config, full_set.spec, seed=seed) for seed in range(num)]
            models = [place(model, device, channels_last=True) for model in models]
            subsets = [np.arange(SIZE) + SIZE * i for i in range(num)]
            examples = [full_set.examples("train", subset, device=device, augment=True) for subset in subsets]
            trial = try_packing(models, examples, MinimizeConfig())
            times, ratio = trial.packed_s / trial.single_s, trial.ratio
            aim = (
                f" (goal {GOALS[num]:g})"
                if device.type == "cuda" and model_config.name == "cnn" and num in GOALS
                else ""
            )
            verdict = "taken" if trial.pays and num > 1 else "not taken"
            steps = f"one {trial.single_s * 1e3:.2f} ms, packed {trial.packed_s * 1e3:.2f} ms"
            print(
                f"{model_config.name} K={num}: {steps} = {times:.2f} times{aim}; ratio {ratio:.2f}, {verdict}",
                flush=True,
            )


if __name__ == "__main__":
    main()
