"""What a step with frozen weights saves (minimize.skipping), the convolutions' biases inside or outside of them.

    python jobs/bench_skipping.py

Hardware: 1 thread of a shared virtual machine of 2 cores, load 32 to 270 while it ran; torch 2.15. Wall time: 4 min.
Expected, as shares of a step with moving weights (medians and quartiles of n = 30, CPU time, batches of 64):
                                            biases inside          outside, as skipping does it
    cnn 28×28×1 norm none  depth 2      0.97 [0.87 to 1.16]     0.90 [0.78 to 0.99]
    cnn 32×32×3 norm none  depth 3      0.99 [0.93 to 1.03]     0.90 [0.86 to 0.94]
    cnn 32×32×3 norm batch depth 3      0.72 [0.62 to 0.76]     0.73 [0.67 to 0.80]
    lenet5 28×28×1                      0.97 [0.95 to 1.01]     0.85 [0.83 to 0.90]
An earlier run (n = 60, load 15 to 20) had 0.89, 0.78, 0.66 and 0.86 outside.
With batch-norm the convolutions have no biases, so both columns measure the same thing: their difference is the
machine's noise. The passes that are counted say 0.67. CUDA is measured too where there is a card: not yet.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from raysubset.config import ModelConfig, SkippingConfig
from raysubset.models import build_model
from raysubset.tasks import Classification, ImageInputs, Spec
from raysubset.training import Shard
from raysubset.training.techniques.skipping import Skipping

BATCH = 64


@dataclass(frozen=True)
class Case:
    model: ModelConfig
    image_shape: tuple[int, int, int]


CASES = (
    Case(ModelConfig(name="cnn", width=16, depth=2, norm="none"), (28, 28, 1)),
    Case(ModelConfig(name="cnn", width=16, depth=3, norm="none"), (32, 32, 3)),
    Case(ModelConfig(name="cnn", width=16, depth=3, norm="batch"), (32, 32, 3)),
    Case(ModelConfig(name="lenet5"), (28, 28, 1)),
)


class Steps:
    """Forward and backward passes of one network on one batch, its weights moving or frozen."""

    def __init__(self, case: Case, device: str) -> None:
        height, width, channels = case.image_shape
        model = build_model(case.model, Spec((channels, height, width), (10,)), seed=0).to(device)
        self.model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        images = torch.randn(BATCH, channels, height, width, device=device)
        self.images = images.to(memory_format=torch.channels_last)
        self.labels = torch.arange(BATCH, device=device) % 10
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, fused=True)
        inputs = ImageInputs(case.image_shape, (0.0,) * channels, (1.0,) * channels)
        task = Classification(inputs, tuple(map(str, range(10))))
        self.skipping = Skipping(SkippingConfig(kind="wus"), model, task, Shard(), num_steps_per_epoch=1)

    def moving(self) -> None:
        self._step()

    def frozen_bias_inside(self) -> None:
        weights = [p for p in self.model.parameters() if p.ndim > 1]
        for weight in weights:
            weight.requires_grad_(False)
        self._step()
        for weight in weights:
            weight.requires_grad_(True)

    def frozen(self) -> None:
        self.skipping.freeze()
        self._step()
        self.skipping.thaw()

    def _step(self) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.images), self.labels).backward()
        self.optimizer.step()


def seconds(step: Callable[[], None], device: str, num: int) -> float:
    """Of one step: CPU time on a CPU, which others use as well; wall time on a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()
        started = time.perf_counter()
    else:
        started = time.process_time()
    for _ in range(num):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
        return (time.perf_counter() - started) / num
    return (time.process_time() - started) / num


def compare(case: Case, device: str, *, num_repeats: int, num_steps: int) -> str:
    """Medians of ratios to a step with moving weights, each measured between two of those."""
    steps = Steps(case, device)
    kinds = (steps.frozen_bias_inside, steps.frozen)
    for step in (steps.moving, *kinds):  # warm up
        seconds(step, device, num_steps)
    ratios: tuple[list[float], ...] = ([], [])
    full_s = []
    for _ in range(num_repeats):
        for found, step in zip(ratios, kinds, strict=True):
            before = seconds(steps.moving, device, num_steps)
            took = seconds(step, device, num_steps)
            after = seconds(steps.moving, device, num_steps)
            found.append(2 * took / (before + after))
            full_s.append(before)
    told = []
    for found in ratios:
        low, _, high = statistics.quantiles(found, n=4)
        told.append(f"{statistics.median(found):.2f} [{low:.2f} to {high:.2f}]")
    name = f"{case.model.name} {'×'.join(map(str, case.image_shape))}"
    name += f" norm {case.model.norm} depth {case.model.depth}" if case.model.name == "cnn" else ""
    return f"{name:34}  {statistics.median(full_s) * 1e3:6.2f} ms  {told[0]:22}  {told[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num-repeats", type=int, default=30)
    parser.add_argument("--num-steps", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        print(f"{device}, batch {BATCH}: time of a step with moving weights; of a frozen one, as shares of it (medians")
        print(f"and quartiles, n = {arguments.num_repeats}), biases inside and outside the convolutions")
        for case in CASES:
            print(" ", compare(case, device, **vars(arguments)), flush=True)


if __name__ == "__main__":
    main()
