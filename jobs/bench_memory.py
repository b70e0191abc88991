"""What one more actor on a node costs in memory, with CIFAR-10 in the object store: its subset's bytes, at best.

    python jobs/bench_memory.py

Private bytes (USS: what would be freed if the process ended) of a subset actor while it trains, less those of a bare
process that runs the same loop on the same batches from a set of one batch's examples: the torch runtime, the model
and its activations are in both. What is left is the subset, and what Ray and Arrow keep in a process; two sizes of
subset tell one from the other. The bare process trains on while the actor is measured, so that both share torch's code.

Hardware: 2 cores of a shared virtual machine; Ray 2.60, torch 2.15, Python 3.11. Wall time: 1 min.
Result:   an actor adds 1.17 × its subset's bytes, and 33 MiB for Ray and Arrow in its process (n = 1 run of two sizes,
          5.9 and 64.6 MiB; the goal is the subset's bytes).
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path

import psutil

MIB = 2**20
SAMPLE_S = 4.0
SIZES = (2_000, 22_000)
EXAMPLE_BYTES = 32 * 32 * 3 + 8
OVERRIDES = {
    "data.name": "cifar10",
    "data.root": os.environ.get("RAYSUBSET_DATA", str(Path(__file__).resolve().parents[2] / "shared" / "data")),
    "model.width": 16,
    "model.depth": 3,
    "subsets.num": 2,
    "minimize.epochs": 1000.0,
    "trunk.epochs": 0.0,
    "actors.checkpoint_epochs": 1000.0,
    "actors.checkpoint_s": 1e6,
}


def private_bytes(pid: int) -> float:
    """The median of a process's private bytes while it trains."""
    process, samples, until = psutil.Process(pid), [], time.monotonic() + SAMPLE_S
    while time.monotonic() < until:
        samples.append(process.memory_full_info().uss)
        time.sleep(0.1)
    return statistics.median(samples)


def bare(answers: "multiprocessing.Queue[float]", stop: "threading.Event") -> None:
    """The loop in a process of its own, on one batch of random examples; it measures itself from a thread."""
    import torch

    from raysubset import Config
    from raysubset.data import Examples
    from raysubset.models import build_model
    from raysubset.tasks import Classification, ImageInputs, Spec
    from raysubset.training import minimize, place, use_device

    device = use_device(num_gpus=0, num_threads=1)
    config = Config().with_overrides(OVERRIDES)
    num = config.minimize.batch_size
    images, labels = torch.randint(256, (num, 32, 32, 3), dtype=torch.uint8), torch.randint(10, (num,))
    inputs = ImageInputs((32, 32, 3), (0.5,) * 3, (0.25,) * 3, "crop_flip")
    task = Classification(inputs, tuple(map(str, range(10))))
    examples = Examples({"image": images, "label": labels}, task, augment=True)
    network = build_model(config.model, Spec((3, 32, 32), (10,)), seed=0)
    model = place(network, device, channels_last=config.minimize.channels_last)

    def measure() -> None:
        while not stop.is_set():
            answers.put(private_bytes(os.getpid()))

    threading.Thread(target=measure).start()
    minimize(model, examples, config.stage("subsets", epochs=1e6), seed=0, on_step=lambda progress: stop.is_set())


def in_actor(size: int) -> float:
    """Private bytes of a subset actor in the middle of its work."""
    from raysubset import Config, run
    from raysubset.events import Event, Progress

    measured: list[float] = []

    class Enough(Exception):
        pass

    def listen(event: Event) -> None:
        if isinstance(event, Progress) and event.epoch > 0.2:
            measured.append(private_bytes(event.attempt.pid))
            raise Enough

    with tempfile.TemporaryDirectory() as folder:
        config = Config(storage_path=folder).with_overrides(OVERRIDES | {"subsets.size": size, "cluster.num_cpus": 1})
        try:
            run(config, on_event=listen)
        except Enough:
            return measured[0]
    raise AssertionError("the run ended before it was measured")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    context = multiprocessing.get_context("spawn")
    answers, stop = context.Queue(), context.Event()
    process = context.Process(target=bare, args=(answers, stop))
    process.start()
    beyond = {}
    try:
        for size in SIZES:
            actor_bytes = in_actor(size)
            bare_bytes = answers.get(timeout=60)
            while not answers.empty():
                bare_bytes = answers.get()
            beyond[size] = actor_bytes - bare_bytes
            parts = (actor_bytes, bare_bytes, beyond[size], size * EXAMPLE_BYTES)
            actor, loop, more, subset = (part / MIB for part in parts)
            print(
                f"subset {subset:6.1f} MiB: actor {actor:6.1f}, bare loop {loop:6.1f}, beyond it {more:6.1f} MiB",
                flush=True,
            )
    finally:
        stop.set()
        process.join()
    small, large = SIZES
    slope = (beyond[large] - beyond[small]) / ((large - small) * EXAMPLE_BYTES)
    fixed = beyond[small] - slope * small * EXAMPLE_BYTES
    print(f"An actor adds {slope:.2f} × its subset's bytes, and {fixed / MIB:.0f} MiB for Ray and Arrow in its process")


if __name__ == "__main__":
    main()
