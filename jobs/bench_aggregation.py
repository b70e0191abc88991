"""Speed and memory of aggregation against the machine's copy bandwidth.

Command:    python jobs/bench_aggregation.py
Measure:    the time in which torch's copy_() copies what a method has to read, into tensors that are there, over the
            time of the method, allocations included. It has to read each member's weights and statistics once; that it
            also reads and writes accumulators, and TIES and DARE the start, each as long as a member and longer than
            the cache, is not counted in its favour. One thread, and its own seconds on the processor, so that other
            work takes part through caches and bandwidth only; copies and the method take turns.
Members:    ResNet-18's weights, three sets in turn. "resident": tensors in memory, so the arithmetic alone. "files":
            read from a local run directory as the driver does, from a warm page cache. RegMean has the Gram matrix of
            the linear layer alone: a convolution's products, 2K²M operations each, are no matter of bandwidth.
Hardware:   one of 2 cores (AMD EPYC, Zen 4) of a virtual machine, 23 GiB, under a load of 23 to 42; torch 2.15, Linux.
Time:       1 minute under that load.
Result:     n = 7 rounds of 16 members; median and quartiles of the ratio; memory is the growth of the process's peak in
            sizes of a member, with 4 members and with 16. Half of copy_() is reached by all that are means, where
            members are resident. Not by DARE and TIES, whose rows are of 2026-11-29, when each of their operations
            passed over blocks in cache. They pass over whole task vectors since: 0.20 s of CPU a member for TIES where
            it took 0.15, 0.10 s for DARE where it took 0.04 (11 M parameters, drop = 0.5, one thread of 2 shared
            cores under load, best of 3, both ways one after the other), and 7 and 4.25 sizes of a member.

                          MiB a member      ms   resident              files                 memory
            uniform_soup          42.7     5.6   0.93 [0.91 to 0.93]   0.70 [0.69 to 0.70]   1.0, 1.0
            weighted_soup         42.7     5.8   0.91 [0.90 to 0.97]   0.69 [0.68 to 0.81]   1.0, 1.0
            fisher                85.3    17.5   0.58 [0.58 to 0.58]   0.56 [0.55 to 0.57]   2.8, 2.9
            regmean               43.7     8.7   0.62 [0.61 to 0.64]   0.59 [0.56 to 0.60]   1.4, 1.4
            ties                  42.7    39.5   0.13 [0.12 to 0.14]   0.13 [0.12 to 0.13]   3.7, 3.7
            dare                  42.7    15.1   0.36 [0.35 to 0.36]   0.31 [0.31 to 0.33]   2.0, 2.1
            savgm                 85.4    11.7   0.90 [0.88 to 0.92]   0.76 [0.74 to 0.79]   1.1, 1.1
"""

import argparse
import ctypes
import itertools
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import psutil
import torch

# A checkout is enough: raysubset need not be installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raysubset.aggregation import (
    Aggregate,
    Minimum,
    dare,
    fisher_merge,
    regmean,
    savgm,
    ties,
    uniform_soup,
    weighted_soup,
)
from raysubset.config import ModelConfig
from raysubset.models import build_model
from raysubset.run_directory import RunDirectory
from raysubset.tasks import Spec
from raysubset.training import Cost, Metrics, Weights

MIB = 2**20
NUM_SETS = 3  # different members, taken in turn
MEMORY_MEMBERS = (4, 16)
Method = Callable[[Sequence[Minimum]], Aggregate]
Member = dict[str, Weights]  # "weights", and statistics by kind
READ = {  # of each member
    "uniform_soup": ("weights",),
    "weighted_soup": ("weights",),
    "fisher": ("weights", "fisher"),
    "regmean": ("weights", "gram"),
    "ties": ("weights",),
    "dare": ("weights",),
    "savgm": ("weights", "subsample"),
}


def member(seed: int) -> Member:
    generator = torch.Generator().manual_seed(seed)
    model, part = (
        build_model(ModelConfig(name="resnet18"), Spec((3, 32, 32), (10,)), seed=s) for s in (seed, seed + 100)
    )
    fisher = {name: torch.rand(p.shape, generator=generator) for name, p in model.named_parameters()}
    inputs = torch.rand(1, 513, 513, generator=generator)
    gram = {"fc": inputs @ inputs.mT}
    return {"weights": model.state_dict(), "fisher": fisher, "gram": gram, "subsample": part.state_dict()}


def minimum(subset_id: int, load: Callable[[str], Weights]) -> Minimum:
    metrics = Metrics(1.0, 2, {"num_correct": 1}, {"accuracy": 0.5})
    return Minimum(
        subset_id=subset_id,
        num_examples=10,
        start_id="initial",
        outcome="epochs",
        training=metrics,
        validation=metrics,
        cost=Cost(),
        load_weights=lambda: load("weights"),
        load_outputs=lambda: torch.zeros(0),
        load_statistics=load,
    )


def minima_of(loads: Sequence[Callable[[str], Weights]], num: int) -> list[Minimum]:
    return [minimum(i, load) for i, load in zip(range(num), itertools.cycle(loads), strict=False)]


def from_files(run: RunDirectory, members: Sequence[Member]) -> list[Callable[[str], Weights]]:
    """The members written as a run writes them, each with how the driver reads it."""

    def read(i: int, kind: str) -> Weights:
        return run.read_weights(f"{i}/{kind}.safetensors", files)

    files = {}
    for i, own in enumerate(members):
        for kind, tensors in own.items():
            path = f"{i}/{kind}.safetensors"
            files[path] = run.write_weights(path, tensors)
    return [partial(read, i) for i in range(len(members))]


def seconds(work: Callable[[], object]) -> float:
    """Of this thread on a processor."""
    started = time.thread_time()
    work()
    return time.thread_time() - started


def peak_growth(work: Callable[[], object]) -> int:
    """Bytes by which the resident memory rose at most while it ran."""
    process, stop = psutil.Process(), threading.Event()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # else what was freed before would be used again, unseen
    before = most = process.memory_info().rss

    def watch() -> None:
        nonlocal most
        while not stop.is_set():
            most = max(most, process.memory_info().rss)
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        work()
    finally:
        stop.set()
        thread.join()
    return most - before


def main(*, num_rounds: int, num_members: int, storage_path: str) -> None:
    torch.set_num_threads(1)
    members = [member(seed) for seed in range(NUM_SETS)]
    start, names = members[0]["subsample"], frozenset(members[0]["fisher"])
    sizes = {kind: sum(value.nbytes for value in tensors.values()) for kind, tensors in members[0].items()}
    targets = {kind: {k: torch.empty_like(v) for k, v in own.items()} for kind, own in members[0].items()}

    def copy(kinds: Sequence[str]) -> None:
        for i, kind in itertools.product(range(num_members), kinds):
            for key, value in members[i % NUM_SETS][kind].items():
                targets[kind][key].copy_(value)

    methods: dict[str, Method] = {
        "uniform_soup": uniform_soup,
        "weighted_soup": partial(weighted_soup, weight_by="examples"),
        "fisher": partial(fisher_merge, floor=1e-6),
        "regmean": partial(regmean, factor=0.9),
        "ties": partial(ties, start=start, density=0.2, scale=1.0, parameter_names=names),
        "dare": partial(dare, start=start, drop=0.5, scale=1.0, seed=0, parameter_names=names),
        "savgm": partial(savgm, fraction=0.25, parameter_names=names),
    }
    print(f"ResNet-18, {sizes['weights'] / MIB:.1f} MiB a member, n = {num_rounds} rounds of {num_members} members")
    print("method         MiB read  ms     GB/s  of copy_() [quartiles]       from files [quartiles]       memory")
    resident = [own.__getitem__ for own in members]
    filed = from_files(RunDirectory(storage_path, "members"), members)
    for name, method in methods.items():
        size = sum(sizes[kind] for kind in READ[name])
        ratios: dict[str, list[float]] = {"resident": [], "filed": []}
        times: list[float] = []
        for _ in range(num_rounds + 1):
            copied_s = seconds(partial(copy, READ[name]))
            for place, loads in (("resident", resident), ("filed", filed)):
                took_s = seconds(partial(method, minima_of(loads, num_members)))
                ratios[place].append(copied_s / took_s)
                times += [took_s] if place == "resident" else []
        took_s = statistics.median(times[1:]) / num_members  # the first round warms up
        grown = [peak_growth(partial(method, minima_of(resident, num))) / sizes["weights"] for num in MEMORY_MEMBERS]
        shares = "  ".join(
            "{1:.2f} [{0:.2f} to {2:.2f}]        ".format(*statistics.quantiles(own[1:], n=4))
            for own in ratios.values()
        )
        memory = ", ".join(f"{size:.1f}" for size in grown)
        print(
            f"{name:14} {size / MIB:5.1f}  {1000 * took_s:6.1f}  {size / took_s / 1e9:6.2f}  {shares}  {memory}",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-rounds", type=int, default=7)
    parser.add_argument("--num-members", type=int, default=16)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        main(num_rounds=arguments.num_rounds, num_members=arguments.num_members, storage_path=folder)
