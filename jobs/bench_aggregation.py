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
Hardware:   one of 2 cores (AMD EPYC, Zen 4) of a virtual machine, 23 GiB, alone (2026-11-30); torch 2.14, Linux.
Time:       1 minute.
Result:     n = 7 rounds of 16 members; median and quartiles of the ratio; memory is the growth of the process's peak in
            sizes of a member, with 4 members and with 16. Half of copy_() is reached by most means, where members are
            resident (on 2026-11-29, with torch 2.15 under load, by fisher, too: 0.58). Not by DARE and TIES, whose
            operations each pass over blocks in cache. In place of blocks whole task vectors were tried: 187 ms for
            TIES and 95 for DARE, and memory of 7.0 and 3.3 members. Of TIES' time the exact quantile by a partition of
            all takes more than half; a sample that bounded it, until it went for its lines, made 40 ms of the whole.

                          MiB a member      ms   resident              files                 memory
            uniform_soup          42.7     7.5   0.73 [0.72 to 0.76]   0.48 [0.46 to 0.56]   1.0, 1.0
            weighted_soup         42.7     7.3   0.74 [0.64 to 0.78]   0.44 [0.38 to 0.51]   1.0, 1.0
            fisher                85.3    31.1   0.36 [0.27 to 0.40]   0.22 [0.20 to 0.28]   3.2, 3.2
            regmean               43.7    10.8   0.53 [0.52 to 0.54]   0.36 [0.36 to 0.38]   1.3, 1.3
            ties                  42.7   100.1   0.05 [0.05 to 0.05]   0.05 [0.05 to 0.05]   4.3, 4.1
            dare                  42.7    25.1   0.22 [0.20 to 0.22]   0.17 [0.16 to 0.19]   2.0, 2.0
            savgm                 85.4    18.1   0.58 [0.54 to 0.58]   0.38 [0.32 to 0.40]   1.0, 1.0
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
