"""Machines that come and go: what do lost nodes cost rounds of subset minima, and what data-parallel training?

Command:    RAYSUBSET_DATA=~/data python jobs/spot_machines.py (from the root of the checkout; MNIST's files lie under
            RAYSUBSET_DATA). --arms rounds and --seeds 1 measure less; results gather in --out, which --table shows.
Hardware:   two CPU cores that have nothing else to do.
Method:     A Ray head without CPUs and two nodes of one CPU on this machine. From the start of training each node lives
            for a time drawn from an exponential distribution of mean LIFE_S. Then all its processes are killed without
            a warning, and GONE_S later a new node takes its place. The times are drawn by seed, and are the same for
            all arms. Each arm trains PASSES passes over slow_links.py's data with its network and recipe, and writes a
            checkpoint after each epoch: rounds of two subsets; data-parallel training of two workers; and the same,
            elastic, which continues with one worker where it has no second one.
Result:     One schedule (seed 0), and none; seconds from the first work's start to the last one's end:
            arm            nodes lost  seconds of undisturbed  passes  validation  bits
            rounds                  0      132           1.00    16.0      97.4 %
            data-parallel           0      154           1.00    16.0      97.7 %
            elastic                 0      141           1.00    16.0      97.9 %
            rounds                 10      288           2.18    17.8      97.4 %  the same
            elastic                24      803           5.70    17.9      98.0 %  others
            data-parallel        > 24   > 1200          > 7.8              14 of 16 epochs were done after 1200 s
            A lost node ends the work of the whole group, which takes some 10 s to start anew, and loses its epoch. Here
            that is most of a node's life of a minute: machines that live longer make less of a difference. The last two
            ran at the highest priority beside other work (nice -15, loads of 8 to 23), the others alone. Before
            2026-11-29 data-parallel runs ended with the fourth lost node, or with an actor that Ray Train's controller
            lost, or waited for places that a forgotten group of workers held; and rounds took 347 s, before actors
            that later rounds need were requested.
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# A checkout is enough: raysubset need not be installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.slow_links import BASE, BATCH, CELLS, NUM_NODES, NUM_TRAIN
from raysubset.config import Config
from raysubset.pipeline import run
from raysubset.run_directory import RunDirectory
from raysubset.run_directory.ledger import Ledger, Work

ROOT = Path(__file__).resolve().parents[1]
PASSES, NUM_ROUNDS = 16.0, 16
LIFE_S, GONE_S = 60.0, 20.0
LOOK_S = 0.5  # between two looks at nodes and ledger
DATA_PARALLEL = CELLS["I"] | {"conventional.epochs": PASSES}
ARMS: dict[str, dict[str, Any]] = {
    "rounds": CELLS["rounds-16"] | {"minimize.epochs": PASSES / NUM_ROUNDS, "rounds.num": NUM_ROUNDS},
    "data-parallel": DATA_PARALLEL,
    "elastic": {
        "minimize.batch_size": BATCH * NUM_NODES,
        "minimize.epochs": 0.0625,  # of subsets, which a run has: two steps, whose minima are thrown away
        "fine_tuning.epochs": PASSES,
        "fine_tuning.start": "reinit",
        "fine_tuning.num_workers": NUM_NODES,
        "fine_tuning.min_workers": 1,
    },
}
STAGES = {"rounds": ("subsets", "aggregation"), "data-parallel": ("conventional",), "elastic": ("fine_tuning",)}


def config_of(arm: str, storage_path: str, address: str) -> Config:
    place = {"name": arm, "storage_path": storage_path, "cluster.address": address, "actors.max_attempts": 1000}
    return Config().with_overrides(BASE | ARMS[arm] | place)


def losses(seed: int, node: int) -> Iterator[tuple[float, bool]]:
    """When a node is lost (False) and replaced (True), in turn: seconds since the start of training."""
    draw, at = random.Random(f"{seed}-{node}"), 0.0
    while True:
        at += draw.expovariate(1 / LIFE_S)
        yield at, False
        at += GONE_S
        yield at, True


def training_of(directory: RunDirectory, arm: str) -> list[Work]:
    """The ledger entries of an arm's training."""
    return [work for work in Ledger(directory).read() if work.stage in STAGES[arm]]


def measure(arm: str, seed: int | None, folder: Path, *, limit_s: float) -> dict[str, Any]:
    """Run an arm by a driver of its own, while nodes come and go by the seed (None: they stay); what came of it."""
    from ray.cluster_utils import Cluster  # add_node() works in the main thread alone

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    storage_path = str(folder / f"{arm}-{seed}-{time.time():.0f}")
    directory, num_lost, began = RunDirectory(storage_path, arm), 0, None
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(NUM_NODES)]
        plan = [] if seed is None else [losses(seed, node) for node in range(NUM_NODES)]
        due = [next(times) for times in plan]
        command = [sys.executable, "-m", "jobs.spot_machines", "--drive", arm, storage_path, cluster.address]
        output = folder / "output"  # Ray writes what its workers say there too, more than a pipe holds
        with output.open("w") as file:
            driver = subprocess.Popen(command, cwd=ROOT, stdout=file)
        try:
            while driver.poll() is None:
                time.sleep(LOOK_S)
                if began is None:
                    began = min((work.started_at for work in training_of(directory, arm)), default=None)
                    continue
                if time.time() - began > limit_s:
                    raise RuntimeError(f"{arm}, seed {seed}: not done after {limit_s:g} s")
                for number, (at, is_back) in enumerate(due):
                    if time.time() - began < at:
                        continue
                    if is_back:
                        nodes[number] = cluster.add_node(num_cpus=1)
                    else:
                        cluster.remove_node(nodes[number], allow_graceful=False)
                        num_lost += 1
                    due[number] = next(plan[number])
        finally:
            driver.kill()
            driver.wait()
        if driver.returncode:
            raise RuntimeError(f"{arm}, seed {seed}: its driver ended with {driver.returncode}")
    finally:
        cluster.shutdown()
    works = training_of(directory, arm)
    return {
        "arm": arm,
        "seed": seed,
        "seconds": max(work.ended_at or 0.0 for work in works) - min(work.started_at for work in works),
        "num_lost": num_lost,
        "passes": sum(work.cost.num_backward for work in works) / NUM_TRAIN,
        "load": os.getloadavg()[0],
        **json.loads(next(line for line in output.read_text().splitlines() if line.startswith("{"))),
    }


def drive(arm: str, storage_path: str, address: str) -> None:
    """Run an arm, and print what it ends at as JSON."""
    config = config_of(arm, storage_path, address)
    report = run(config, on_event=lambda event: print(f"  {arm}: {event}", file=sys.stderr, flush=True))
    weights = report.load_model().state_dict()
    digest = hashlib.blake2b(b"".join(value.numpy().tobytes() for value in weights.values()), digest_size=8).hexdigest()
    print(json.dumps({"accuracy": report.validation.accuracy, "digest": digest}))


def table(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line a measurement."""
    undisturbed = {one["arm"]: one for one in records if one["seed"] is None}
    yield "arm            seed nodes lost  seconds of undisturbed  passes  val %  bits"
    for one in records:
        seconds, passes, whole = one["seconds"], one["passes"], undisturbed.get(one["arm"])
        share, bits = "–", ""
        if whole is not None:
            share, bits = f"{seconds / whole['seconds']:.2f}", "same" if one["digest"] == whole["digest"] else "others"
        seed = "none" if one["seed"] is None else str(one["seed"])
        yield (
            f"{one['arm']:14s} {seed:>4s} {one['num_lost']:10d} {seconds:8.0f} {share:>14s} {passes:7.2f} "
            f"{100 * one['accuracy']:6.2f}  {bits}"
        )


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Measure what lost nodes cost rounds and data-parallel training.")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3, help="schedules of losses, beside one without")
    parser.add_argument("--limit-s", type=float, default=1200.0, help="of a run's training")
    parser.add_argument("--out", type=Path, default=Path("spot_machines.jsonl"), help="a record a run is added here")
    parser.add_argument("--table", action="store_true", help="only show what --out holds")
    parser.add_argument("--drive", nargs=3, metavar=("ARM", "STORAGE", "ADDRESS"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.drive:
        drive(*options.drive)
        return 0
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if not options.table:
        with tempfile.TemporaryDirectory(prefix="spot-") as folder:
            for seed in (None, *range(options.seeds)):
                for arm in options.arms:
                    record = measure(arm, seed, Path(folder), limit_s=options.limit_s)
                    with options.out.open("a") as file:
                        file.write(json.dumps(record) + "\n")
    records = [json.loads(line) for line in options.out.read_text().splitlines()]
    print("\n".join(table(records)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
