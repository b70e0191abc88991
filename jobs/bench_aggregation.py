"""Speed and memory of aggregation: bytes of members read a second, against torch's copy_() on this machine.

    python jobs/bench_aggregation.py

Members are ResNet-18's weights, resident in memory (three sets, taken in turn), so that no disk is measured; one
thread. A method's rounds alternate with copies and the median of the ratios is taken, so that a drift of the machine's
speed cancels. Memory is how far the process's peak grows while so many members are aggregated.

Hardware: 1 of 2 cores of a shared virtual machine under a load of 20 to 25; torch 2.15, Python 3.11. Wall time: unknown
          for all methods under that load: it was ended after 230 s.
Result:   of copy_()'s speed uniform_soup 0.58, weighted_soup 0.67, fisher 0.06 (n = 3 rounds of 16 members, quartiles
          from 0.23 to 1.13 for the soups); ties, dare and savgm were not reached. Peak memory 0.9 of a member's size
          for the soups and 0.5 for fisher, with 4 members as with 32.
"""

import argparse
import itertools
import statistics
import threading
import time
from collections.abc import Callable, Sequence

import psutil
import torch

from raysubset.aggregation import Aggregate, Minimum, dare, fisher_merge, savgm, ties, uniform_soup, weighted_soup
from raysubset.config import ModelConfig
from raysubset.models import build_model
from raysubset.training import Cost, Metrics, Weights

MIB = 2**20
NUM_RESIDENT = 3
NUM_MEMBERS = 16  # in a timed round
MEMORY_MEMBERS = (4, 32)
Method = Callable[[Sequence[Minimum]], Aggregate]


def resident() -> list[Weights]:
    shape = (32, 32, 3)
    models = [build_model(ModelConfig(name="resnet18"), num_classes=10, image_shape=shape, seed=s) for s in range(3)]
    return [model.state_dict() for model in models]


def minima_of(sets: Sequence[Weights], fisher: Weights, num: int) -> list[Minimum]:
    left = {"fisher": fisher, "subsample": sets[0]}
    metrics = Metrics(1.0, 1, 2)
    return [
        Minimum(
            subset_id=i,
            num_examples=10,
            start_id="initial",
            outcome="epochs",
            training=metrics,
            validation=metrics,
            cost=Cost(),
            load_weights=lambda own=own: own,
            load_outputs=lambda: torch.zeros(0),
            load_statistics=left.__getitem__,
        )
        for i, own in zip(range(num), itertools.cycle(sets), strict=False)
    ]


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def peak_growth(work: Callable[[], object]) -> int:
    """Bytes by which the resident memory rose at most while it ran."""
    process, stop = psutil.Process(), threading.Event()
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num-rounds", type=int, default=9)
    num_rounds = parser.parse_args().num_rounds
    torch.set_num_threads(1)
    sets = resident()
    names = frozenset(key for key, value in sets[0].items() if value.is_floating_point() and "running" not in key)
    fisher = {name: torch.rand_like(sets[0][name]) for name in names}
    num_bytes = sum(value.nbytes for value in sets[0].values())
    target = {key: torch.empty_like(value) for key, value in sets[0].items()}

    def copy() -> None:
        for i in range(NUM_MEMBERS):
            for key, value in sets[i % NUM_RESIDENT].items():
                target[key].copy_(value)

    methods: dict[str, Method] = {
        "uniform_soup": uniform_soup,
        "weighted_soup": lambda minima: weighted_soup(minima, weight_by="examples"),
        "fisher": lambda minima: fisher_merge(minima, floor=1e-6),
        "ties": lambda minima: ties(minima, sets[0], density=0.2, scale=1.0, parameter_names=names),
        "dare": lambda minima: dare(minima, sets[0], drop=0.5, scale=1.0, seed=0, parameter_names=names),
        "savgm": lambda minima: savgm(minima, fraction=0.25, parameter_names=names),
    }
    print(f"ResNet-18, {num_bytes / MIB:.1f} MiB a member, {torch.get_num_threads()} thread, n = {num_rounds} rounds")
    minima = minima_of(sets, fisher, NUM_MEMBERS)
    for name, method in methods.items():
        ratios, rates = [], []
        method(minima)
        for _ in range(num_rounds):
            copied_s, took_s = seconds(copy), seconds(lambda method=method: method(minima))
            ratios.append(copied_s / took_s)
            rates.append(NUM_MEMBERS * num_bytes / took_s)
        low, middle, high = statistics.quantiles(ratios, n=4)
        grown = [
            peak_growth(lambda method=method, num=num: method(minima_of(sets, fisher, num))) for num in MEMORY_MEMBERS
        ]
        memory = ", ".join(
            f"{size / num_bytes:.1f} with {num}" for size, num in zip(grown, MEMORY_MEMBERS, strict=True)
        )
        print(
            f"{name:14} {statistics.median(rates) / 1e9:5.2f} GB/s, {middle:.2f} of copy_() "
            f"[quartiles {low:.2f} to {high:.2f}]; members' sizes of memory: {memory}",
            flush=True,
        )


if __name__ == "__main__":
    main()
