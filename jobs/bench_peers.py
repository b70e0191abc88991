"""The same network trained on MNIST four ways, from the start of a process to its end: CPU seconds of all it starts.

    python jobs/bench_peers.py [--epochs 2] [--repeats 3] [--only hand loop]    (MNIST under $RAYSUBSET_DATA)

hand   a plain PyTorch script, in one process: tensors normalised once, no resume, no guard, no record
loop   raysubset's data, network, minimize() and evaluate(), in one process
run    `raysubset run --method conventional`, whole: Ray, checkpoints, ledger, report, page
train  Ray Train's TorchTrainer with the hand-written loop in one worker, and a checkpoint an epoch

Each trains 54,000 examples in batches of 64 by Nesterov steps with a cosine, on one thread, in channels-last layout,
and measures training, validation and test data once. Repeats alternate; wall times of a shared machine say little, so
CPU seconds of the whole process tree are compared. Every process is looked at each 0.1 s: the last of its 0.1 s at most
is missing. No other library is installed for this: a rival beyond these is not measured.

Hardware: 2 cores of a shared virtual machine, load 17 to 28; Ray 2.60, torch 2.14, Python 3.11. Wall time: 15 min.
Result:   --epochs 1, n = 1: CPU seconds of the tree, ratio to hand; of the first two their parts
          hand    20.4   1.00   imports 2.9, reading 3.4, training 9.4, measuring 3.2
          loop    20.8   1.02   imports 3.6, reading 3.4, training 9.0, measuring 3.3 (6.1 before freed memory was kept,
                                commit 29a11c3: 25.2 in all, 1.16 of the 21.8 that hand took beside it)
          run     46.8   2.29   Ray, actor, checkpoints and page are some 26 s, whatever the training takes
          train   68.6   3.59   to a hand of 19.1, at another time, load 16 to 24: with one worker some 49 s are Ray and
                                Ray Train: controller, helpers, each of which imports Ray, and workers before work
"""

import argparse
import ctypes
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import psutil

DATA_ROOT = Path(os.environ.get("RAYSUBSET_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
NUM_TRAIN, BATCH_SIZE, PEAK, EVALUATION_BATCH = 54_000, 64, 0.1, 500
WAYS = ("hand", "loop", "run", "train")
LOOK_S, GRACE_S = 0.1, 15.0
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: whose parent ends stays below this process


def process_tree(command: list[str]) -> tuple[dict[str, float], float, str]:
    """(CPU seconds of a command and of all processes below it, by their names; wall seconds; what it printed)."""
    ctypes.CDLL(None).prctl(_SUBREAPER, 1)
    used, began = dict[tuple[int, float], tuple[str, float]](), time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _look_until(used, lambda: process.poll() is not None)
        wall_s = time.perf_counter() - began
        ended = time.perf_counter()
        _look_until(used, lambda: not _are_left() or time.perf_counter() - ended > GRACE_S)
        output.seek(0)
        text = output.read()
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{text[-3000:]}")
    by_name = defaultdict[str, float](float)
    for name, cpu_s in used.values():
        by_name[name] += cpu_s
    return by_name, wall_s, text


def _look_until(used: dict[tuple[int, float], tuple[str, float]], is_over: Callable[[], bool]) -> None:
    """Note name and CPU seconds of every process below this one, by pid and start, until it is over."""
    while not is_over():
        for process in psutil.Process().children(recursive=True):
            try:
                times = process.cpu_times()
                name = (process.cmdline() or [process.name()])[0].rpartition("/")[2].partition("(")[0]
                used[process.pid, process.create_time()] = name, times.user + times.system
            except psutil.NoSuchProcess:
                continue
        time.sleep(LOOK_S)


def _are_left() -> bool:
    """Whether processes are left below this one, once those that have ended are taken away."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def network() -> Any:
    """What `--model.name cnn --model.width 8 --model.depth 2` is, by hand."""
    from torch import nn

    def block(channels: int, out: int) -> list[nn.Module]:
        convolution = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(out), nn.MaxPool2d(2), nn.ReLU(inplace=True)]

    layers = [*block(1, 8), *block(8, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)]
    return nn.Sequential(*layers)


@cache
def mnist(root: str) -> dict[str, tuple[Any, Any]]:
    """Images, float32 [N, 1, 28, 28], and labels of the three splits; a process reads them once."""
    from torchvision.datasets import MNIST

    train, test = MNIST(root, train=True), MNIST(root, train=False)
    mean, std = train.data[:NUM_TRAIN].float().mean(), train.data[:NUM_TRAIN].float().std()

    def images(data: Any) -> Any:
        return ((data.float() - mean) / std).unsqueeze(1)

    return {
        "train": (images(train.data[:NUM_TRAIN]), train.targets[:NUM_TRAIN]),
        "validation": (images(train.data[NUM_TRAIN:]), train.targets[NUM_TRAIN:]),
        "test": (images(test.data), test.targets),
    }


def trained_by_hand(root: str, epochs: int, end_epoch: Callable[[Any, float], None] | None = None) -> dict[str, float]:
    """Train and measure as a script of a page does; `end_epoch` is called with the model and the epoch's loss."""
    import torch
    import torch.nn.functional as F

    moments = [time.process_time()]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    splits, model = mnist(root), network().to(memory_format=torch.channels_last)
    moments.append(time.process_time())
    images, labels = splits["train"]
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 5e-4},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=PEAK, momentum=0.9, nesterov=True, fused=True)
    num_steps, step = epochs * math.ceil(len(images) / BATCH_SIZE), 0
    for _ in range(epochs):
        model.train()
        total = 0.0
        for indices in torch.randperm(len(images)).split(BATCH_SIZE):
            for group in optimizer.param_groups:
                group["lr"] = PEAK * (1 + math.cos(math.pi * step / num_steps)) / 2
            loss = F.cross_entropy(model(images[indices]), labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(indices)
            step += 1
        if end_epoch:
            end_epoch(model, total / len(images))
    moments.append(time.process_time())
    model.eval()
    found = {}
    with torch.inference_mode():
        for name, (images, labels) in splits.items():
            batches = zip(images.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH), strict=True)
            found[name] = sum((model(own).argmax(1) == right).sum().item() for own, right in batches) / len(images)
    return found | parts(moments)


def parts(moments: list[float]) -> dict[str, float]:
    """CPU seconds of a process by what it did, told once it has measured."""
    ends = [0.0, *moments, time.process_time()]
    names = ("imports", "reading", "training", "measuring")
    return {
        f"{name}_cpu_s": round(after - before, 2)
        for name, before, after in zip(names, ends[:-1], ends[1:], strict=True)
    }


def by_loop(root: str, epochs: int) -> dict[str, float]:
    """raysubset's own loop, without Ray and without a run directory."""
    import torch

    from raysubset.config import DataConfig, MinimizeConfig, ModelConfig
    from raysubset.data import load_full_set
    from raysubset.models import build_model
    from raysubset.training import evaluate, minimize, use_device

    moments = [time.process_time()]
    use_device(num_gpus=0, num_threads=1)
    full_set = load_full_set(DataConfig(name="mnist", root=root))
    model = build_model(ModelConfig(width=8, depth=2), full_set.spec, seed=0).to(memory_format=torch.channels_last)
    moments.append(time.process_time())
    recipe = MinimizeConfig(epochs=epochs, learning_rate=PEAK)
    minimize(model, full_set.examples("train", augment=True), recipe, seed=0)
    moments.append(time.process_time())
    splits = ("train", "validation", "test")
    return {name: evaluate(model, full_set.examples(name), recipe).accuracy for name in splits} | parts(moments)


def by_ray_train(root: str, epochs: int) -> dict[str, float]:
    """The hand-written loop in one worker of a TorchTrainer."""
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")  # a machine that others use may take minutes
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as storage:
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"root": root, "epochs": epochs},
            scaling_config=ray.train.ScalingConfig(num_workers=1),
            run_config=ray.train.RunConfig(storage_path=storage),
        )
        metrics: Any = trainer.fit().metrics
    ray.shutdown()
    return metrics


def train_worker(settings: dict[str, Any]) -> None:
    """What each worker of Ray Train does: here there is one."""
    import ray.train
    import torch

    def end_epoch(model: Any, loss: float) -> None:
        with tempfile.TemporaryDirectory() as folder:
            torch.save(model.state_dict(), Path(folder, "model.pt"))
            ray.train.report({"loss": loss}, checkpoint=ray.train.Checkpoint.from_directory(folder))

    ray.train.report(trained_by_hand(settings["root"], settings["epochs"], end_epoch))


def command_of(way: str, root: str, epochs: int, storage: str) -> list[str]:
    if way != "run":
        return [sys.executable, __file__, "--child", way, "--root", root, "--epochs", str(epochs)]
    settings = {
        "--method": "conventional",
        "--data.name": "mnist",
        "--data.root": root,
        "--model.width": "8",
        "--model.depth": "2",
        "--minimize.learning-rate": str(PEAK),
        "--conventional.epochs": str(epochs),
        "--cluster.num-cpus": "2",
        "--storage-path": storage,
    }
    return [sys.executable, "-m", "raysubset", "run", *(word for pair in settings.items() for word in pair)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--root", default=str(DATA_ROOT))
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        work = {"hand": trained_by_hand, "loop": by_loop, "train": by_ray_train}[arguments.child]
        return print(json.dumps(work(arguments.root, arguments.epochs)))
    cpu_s: dict[str, list[float]] = {way: [] for way in arguments.only}
    for repeat in range(arguments.repeats):
        for way in arguments.only if repeat % 2 == 0 else arguments.only[::-1]:
            with tempfile.TemporaryDirectory() as storage:
                used, wall_s, text = process_tree(command_of(way, arguments.root, arguments.epochs, storage))
            cpu_s[way].append(sum(used.values()))
            quality = next((line for line in reversed(text.splitlines()) if "est" in line), "")
            print(f"{way:6} {cpu_s[way][-1]:6.1f} CPU s {wall_s:6.1f} s   {quality.strip()[:200]}", flush=True)
            most = sorted(used.items(), key=lambda item: -item[1])[:6] if len(used) > 1 else []
            print(*(f"         {own:6.1f} {name}" for name, own in most), sep="\n", flush=True)
    first = arguments.only[0]
    print(f"\nCPU seconds, median of {arguments.repeats}, and the median of each repeat's ratio to {first}:")
    for way, own in cpu_s.items():
        ratios = [mine / theirs for mine, theirs in zip(own, cpu_s[first], strict=True)]
        print(f"  {way:6} {statistics.median(own):6.1f}   {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
