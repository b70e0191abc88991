"""Examples/s of a subset actor's loop ÷ a bare hand-written PyTorch loop: model, data, batches, threads are the same.

    python jobs/bench_loop.py --num-pairs 20        (MNIST from $RAYSUBSET_DATA or ../shared/data, else digits enlarged)
    torchrun --standalone --nproc-per-node 2 jobs/bench_loop.py        (data-parallel: a worker's loop ÷ a bare loop
        with DistributedDataParallel; CPU time of both processes, gloo)

Hardware: 1 thread of a shared virtual machine of 2 AMD EPYC cores, load 23 to 41 while it ran; torch 2.15. Wall time:
10 min there for 20 pairs (2 min of a core).
Expected, MNIST, cnn of width 16, CPU time (medians and quartiles of n = 20 pairs, interleaved A B B A; goal 0.98):
    depth 2, batch  64: 0.975 [0.957 to 0.993]        depth 2, batch 256: 1.051 [0.853 to 1.182]
    depth 3, batch  64: 0.983 [0.952 to 1.012]        depth 3, batch 256: 0.990 [0.950 to 1.060]
Since then zero_grad() has become cheaper: depth 2, batch 64: 0.977 [0.959 to 0.979], n = 7 pairs at load 18.
Two workers, a share of each batch each, CPU time of both (load 2; medians and quartiles of n = 10 pairs; goal 0.98):
    depth 2, batch  64: 0.937 [0.891 to 0.986]        depth 2, batch 256: 1.000 [0.928 to 1.062]
    depth 3, batch  64: 1.014 [0.954 to 1.038]        depth 3, batch 256: 1.008 [0.954 to 1.022]
    The first again, n = 30: 0.975 [0.936 to 1.025].
The spread is the machine's. Beside a network of one linear layer minimize() took 0.03 ms more a step than the bare
loop in CPU time at load 3, and 0.1 ms at load 23, where a step of depth 2 and batch 64 takes 7 and 11 ms.
CUDA is measured too where there is a card: not yet.
"""

import argparse
import math
import os
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raysubset.config import DataConfig, MinimizeConfig, ModelConfig, derive_seed
from raysubset.data import Examples, load_full_set
from raysubset.models import build_model
from raysubset.tasks import Classification, Spec
from raysubset.training import Progress, Shard, minimize
from raysubset.training.shards import SYNC_BUFFERS

DATA_ROOT = Path(os.environ.get("RAYSUBSET_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
SIZE = 3_328  # examples of a subset, some 0.4 s each: whole batches of 64 and of 256
SHARD = Shard(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))  # torchrun says which


def mnist_or_digits(device: str) -> tuple[Examples, str]:
    """A subset of MNIST, or scikit-learn's digits made as large where MNIST is missing."""
    indices = np.arange(SIZE)
    if (DATA_ROOT / "MNIST").exists():
        full_set = load_full_set(DataConfig(name="mnist", root=str(DATA_ROOT)))
        return full_set.examples("train", indices, device=device, augment=True), "MNIST"
    full_set = load_full_set(DataConfig())
    own = full_set.examples("train", indices % len(full_set.train), device=device)
    task, images = own.task, own.rows["image"]
    assert isinstance(task, Classification)
    enlarged = F.interpolate(images.permute(0, 3, 1, 2).float(), size=(28, 28)).permute(0, 2, 3, 1)
    rows = {**own.rows, "image": enlarged.to(torch.uint8).contiguous()}
    task = replace(task, inputs=replace(task.inputs, image_shape=(28, 28, 1)))
    return replace(own, rows=rows, task=task), f"digits enlarged to 28×28 (no {DATA_ROOT})"


def bare_loop(model: nn.Module, examples: Examples, config: MinimizeConfig, seed: int) -> None:
    """What minimize() does, as one writes it for this case alone: no resume, no history, no guard."""
    device, images, labels = examples.device, examples.rows["image"], examples.rows["label"]
    num, height, width, channels = images.shape
    pixels = images.flatten(1)
    assert isinstance(examples.task, Classification)
    mean, std = (values.to(device).flatten() for values in examples.task.inputs.scaling())
    scale = (1 / (255 * std)).repeat(height * width)
    shift = (-mean / std).repeat(height * width)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    peak = config.peak_learning_rate()
    optimizer = torch.optim.SGD(groups, lr=peak, momentum=config.momentum, nesterov=True, fused=True)
    num_steps, step = round(config.epochs) * (num // config.batch_size), 0
    options: Any = {SYNC_BUFFERS: False}  # as in our workers
    network = model if SHARD.num == 1 else DistributedDataParallel(model, **options)
    network.train()
    for epoch in range(round(config.epochs)):
        generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
        for indices in torch.randperm(num, generator=generator).to(device).split(config.batch_size):
            indices = indices[SHARD.rank :: SHARD.num]
            rate = peak * (1 + math.cos(math.pi * step / num_steps)) / 2
            for group in optimizer.param_groups:
                group["lr"] = rate
            images = torch.addcmul(shift, pixels.index_select(0, indices).float(), scale)
            images = images.view(-1, height, width, channels).permute(0, 3, 1, 2)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bfloat16"):
                outputs = network(images)
            F.cross_entropy(outputs.float(), labels.index_select(0, indices)).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    if device.type == "cuda":
        torch.cuda.synchronize()


def actors_loop(model: nn.Module, examples: Examples, config: MinimizeConfig, seed: int) -> None:
    """minimize() with a subset actor's on_step, no checkpoint falling due."""
    stop = threading.Event()
    last_step, last_at = 0, time.perf_counter()
    newest: Progress | None = None

    def on_step(progress: Progress) -> bool:
        nonlocal newest
        newest = progress
        due = progress.step - last_step >= 10**9 or time.perf_counter() - last_at >= 1e9
        assert not due
        return stop.is_set()

    minimize(model, examples, config, seed=seed, on_step=on_step, shard=SHARD)


def seconds(loop: Callable[..., None], examples: Examples, config: MinimizeConfig, depth: int) -> tuple[float, float]:
    """Time of one run, and the sum of the weights' magnitudes it ends at: CPU time on a CPU, which others use too.

    Of several workers it is the sum of their times.
    """
    model = build_model(ModelConfig(width=16, depth=depth), Spec((1, 28, 28), (10,)), seed=0)
    model.to(device=examples.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    clock = time.process_time if examples.device.type == "cpu" else time.perf_counter
    started = clock()
    loop(model, examples, config, 1)
    took = SHARD.sum(torch.tensor(clock() - started)).item()
    return took, sum(p.abs().sum().item() for p in model.parameters())


def compare(examples: Examples, *, depth: int, batch_size: int, num_pairs: int, num_epochs: int) -> str:
    """Interleaved pairs, A B B A, so that a drift of the machine's speed cancels."""
    precision = "bfloat16" if examples.device.type == "cuda" else "float32"
    config = MinimizeConfig(batch_size=batch_size, epochs=num_epochs, precision=precision)
    for loop in (bare_loop, actors_loop):  # warm up
        seconds(loop, examples, config, depth)
    ratios, speeds = [], []
    for pair in range(num_pairs):
        loops = (bare_loop, actors_loop) if pair % 2 == 0 else (actors_loop, bare_loop)
        took = {loop: seconds(loop, examples, config, depth) for loop in loops}
        (bare_s, bare_norm), (actors_s, actors_norm) = took[bare_loop], took[actors_loop]
        assert abs(bare_norm - actors_norm) < 1e-3 * bare_norm, "the loops did not do the same work"
        ratios.append(bare_s / actors_s)
        speeds.append(num_epochs * len(examples) / actors_s)
    low, _, high = statistics.quantiles(ratios, n=4)
    return (
        f"depth {depth}, batch {batch_size:3}: {statistics.median(ratios):.3f} [quartiles {low:.3f} to {high:.3f}], "
        f"n = {num_pairs} pairs, {statistics.median(speeds):,.0f} examples/s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num-pairs", type=int, default=40)
    parser.add_argument("--num-epochs", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if SHARD.num > 1:
        dist.init_process_group("gloo")
    for device in ["cpu"] + ["cuda"] * (torch.cuda.is_available() and SHARD.num == 1):
        examples, name = mnist_or_digits(device)
        lines = [f"{name} on {device}, cnn of width 16, {SHARD.num} workers; our loop ÷ bare loop, in examples/s"]
        for depth in (2, 3):
            for batch_size in (64, 256):
                lines.append("  " + compare(examples, depth=depth, batch_size=batch_size, **vars(arguments)))
                if SHARD.rank == 0:
                    print(*lines, sep="\n", flush=True)
                lines.clear()
    if SHARD.num > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
