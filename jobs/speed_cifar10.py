"""CIFAR-10 to 94 % by the known short recipe: inside our loop, and in a bare loop of the same steps.

    python jobs/speed_cifar10.py --data.root ~/data [--seeds 3] [--steps 20]

The network is a ResNet of nine layers and 6.6 M parameters (after D. Page's "How to train your ResNet"): SGD with
Nesterov momentum, batch 512, 24 epochs, the learning rate up linearly and down again, label smoothing 0.2, random crop
and flip, bfloat16, channels last. Both loops begin at the same weights. The bare one is torch and nothing else: no
checkpoints, no ledger, no order that survives a restart. --steps tries both for so many steps, which a CPU can do.

Hardware: one GPU; a CPU only for a trial. Time: about 2 minutes on an H100 or H200 (an estimate).
Result:   NOT MEASURED YET: no GPU was at hand. One step on a CPU went through both loops.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout is enough

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysubset.config import DataConfig, MinimizeConfig, ModelConfig, TaskConfig
from raysubset.data import Examples, FullSet, load_full_set
from raysubset.models import build_model
from raysubset.tasks import Spec
from raysubset.training import Progress, evaluate, minimize, place, use_device

DATA_ROOT = Path(os.environ.get("RAYSUBSET_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
EPOCHS, BATCH, PADDING = 24, 512, 4
RECIPE = MinimizeConfig(
    learning_rate=0.4,
    momentum=0.9,
    weight_decay=5e-4,
    batch_size=BATCH,
    epochs=EPOCHS,
    schedule="warmup_linear",
    warmup_fraction=5 / EPOCHS,
)
SMOOTHING = 0.2
TRIAL_STEPS, TRIAL_TESTED = 100, 200  # a trial of so few steps is tested on so few examples


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*_block(channels, channels), *_block(channels, channels))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.layers(inputs)


class _Scaled(nn.Module):
    """Logits times an eighth, without which large ones come too early."""

    def forward(self, inputs: Tensor) -> Tensor:
        return 0.125 * inputs


def _block(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def resnet9(spec: Spec) -> nn.Module:
    """The network, from normalised float [N, 3, 32, 32] to [N, classes]."""
    return nn.Sequential(
        *_block(spec.inputs[0], 64),
        *(*_block(64, 128), nn.MaxPool2d(2), _Residual(128)),
        *(*_block(128, 256), nn.MaxPool2d(2)),
        *(*_block(256, 512), nn.MaxPool2d(2), _Residual(512)),
        *(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(512, spec.outputs[0], bias=False), _Scaled()),
    )


def bare_loop(model: nn.Module, examples: Examples, scaling: tuple[Tensor, Tensor], num_steps: int, seed: int) -> None:
    """The same steps without us: `scaling` is the pixels' mean and standard deviation."""
    device = examples.device
    images, labels = examples.rows["image"].permute(0, 3, 1, 2), examples.rows["label"]
    mean, std = (values.to(device).view(1, -1, 1, 1) for values in scaling)
    inputs = F.pad(images.float().sub_(mean).div_(std), (PADDING,) * 4)
    inputs = inputs.to(torch.bfloat16 if device.type == "cuda" else torch.float32, memory_format=torch.channels_last)
    decayed, spared = [], []
    for parameter in model.parameters():
        (decayed if parameter.ndim > 1 else spared).append(parameter)
    groups = [{"params": decayed, "weight_decay": RECIPE.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=RECIPE.momentum, nesterov=True, fused=True)
    all_steps, rise = EPOCHS * (len(labels) // BATCH), RECIPE.warmup_fraction
    generator = torch.Generator(device).manual_seed(seed)
    step, side = 0, images.shape[-1]
    offsets = torch.arange(side, device=device)
    model.train()
    while True:
        for rows in torch.randperm(len(labels), generator=generator, device=device).split(BATCH):
            if len(rows) < BATCH:
                continue
            if step == num_steps:
                return
            done = step / all_steps
            rate = done / rise if done < rise else (1 - done) / (1 - rise)
            for group in optimizer.param_groups:
                group["lr"] = 0.4 * rate
            at = torch.randint(2 * PADDING + 1, (2, BATCH, 1), generator=generator, device=device) + offsets
            flips = torch.rand(BATCH, 1, generator=generator, device=device) < 0.5
            columns = torch.where(flips, at[1].flip(1), at[1])
            batch = inputs[rows[:, None, None], :, at[0][:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                outputs = model(batch)
            F.cross_entropy(outputs.float(), labels[rows], label_smoothing=SMOOTHING).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1


def timed(full_set: FullSet, device: torch.device, *, is_bare: bool, seed: int, num_steps: int) -> tuple[float, float]:
    """Seconds of training, and the test accuracy."""
    model = build_model(ModelConfig(name="jobs.speed_cifar10:resnet9"), full_set.spec, seed=seed)
    model = place(model, device, channels_last=True)
    examples = full_set.examples("train", device=device, augment=not is_bare)
    assert isinstance(examples, Examples)

    def is_enough(progress: Progress) -> bool:
        return progress.step >= num_steps

    began = time.perf_counter()
    if is_bare:
        bare_loop(model, examples, full_set.task.inputs.scaling(), num_steps, seed)  # pyright: ignore
    else:
        minimize(model, examples, RECIPE, seed=seed, on_step=is_enough)
    if device.type == "cuda":
        torch.cuda.synchronize()
    took = time.perf_counter() - began
    tested = np.arange(len(full_set.test) if num_steps > TRIAL_STEPS else TRIAL_TESTED)
    return took, evaluate(model, full_set.examples("test", tested, device=device), RECIPE).accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data.root", dest="root", default=str(DATA_ROOT))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="stop both loops after so many")
    options = parser.parse_args()
    device = use_device(num_gpus=float(torch.cuda.is_available()), num_threads=os.cpu_count() or 1)
    data = DataConfig(name="cifar10", root=options.root, validation_fraction=0.02)
    full_set = load_full_set(data, TaskConfig(label_smoothing=SMOOTHING))
    num_steps = options.steps or EPOCHS * (len(full_set.train) // BATCH)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}; torch {torch.__version__}; {len(full_set.train)} examples, {num_steps} steps of {BATCH}")
    warm_up = {"seed": 0, "num_steps": min(num_steps, 20)}
    seconds: dict[bool, list[float]] = {True: [], False: []}
    accuracies: dict[bool, list[float]] = {True: [], False: []}
    for is_bare in (True, False):
        timed(full_set, device, is_bare=is_bare, **warm_up)
    for seed in range(options.seeds):
        for is_bare in (True, False) if seed % 2 else (False, True):
            took, accuracy = timed(full_set, device, is_bare=is_bare, seed=seed, num_steps=num_steps)
            seconds[is_bare].append(took)
            accuracies[is_bare].append(accuracy)
            print(f"seed {seed}, {'bare' if is_bare else 'ours'}: {took:.2f} s, test {accuracy:.2%}", flush=True)
    ratios = [bare / ours for bare, ours in zip(seconds[True], seconds[False], strict=True)]
    for is_bare in (False, True):
        mean = statistics.fmean(accuracies[is_bare])
        spread = statistics.stdev(accuracies[is_bare]) if options.seeds > 1 else float("nan")
        print(f"{'bare' if is_bare else 'ours'}: test {mean:.2%} ± {spread:.2%} (n = {options.seeds})")
    print(f"speed of ours ÷ bare: {statistics.median(ratios):.3f} (median, n = {options.seeds})")


if __name__ == "__main__":
    main()
