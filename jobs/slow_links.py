"""Slow links, measured: data-parallel training and rounds on two Ray nodes whose links have a bandwidth of our choice.

Command:    sudo -E env PATH="$PATH" RAYSUBSET_DATA=~/data python jobs/slow_links.py --mbit 10 100 1000   (from the root
            of the checkout; MNIST's files lie under RAYSUBSET_DATA, and `pip install -e '.[test]'` brings moto)
            --cells I rounds-16 and one --mbit measure less, --seeds 0 1 2 more; results gather in --out, and --table
            shows them again.
Hardware:   Linux, root, two CPU cores that have nothing else to do.
Method:     Each Ray node lives in a network namespace of its own, joined by a bridge; `tc … tbf` limits what its link
            carries in each direction. At 10, 100 and 1000 Mbit/s a TCP stream got 9.4, 93 and 929. Storage is an S3
            server (moto) at the bridge, at the end of an unlimited link of its own. One worker or actor a node; the
            driver is on the first. 4,096 of MNIST's digits at 14 × 14 pixels, a CNN of 1,027,530 parameters, Muon, 8
            passes in total, batches of 64 a worker. The same bits at every bandwidth, so what a cell that was stopped
            at --limit-s would have reached is known from one that was not; its seconds are scaled by the exchanges that
            it made, and so marked (~).
Time:       A cell takes its start (a minute) and --limit-s at most. All have not been run in a row yet.
Result:     On a quiet machine, n = 1 where nothing else is said. A set of weights is 4.11 MB; MB are of an exchange and
            worker, out / in by the kernel, the mean of both nodes, beside the ledger's, which are out and in of rounds
            and out of I; seconds from the first worker's start; ~ is scaled from the exchanges made until the limit (62
            and 14):
            Mbit/s  cell                  exchanges  s, all  s to 97 %  validation  MB           ledger  advise/measured
            1000    I                           256      88         55      97.5 %   4.33 / 4.13   4.34    0.70
            1000    I-bf16-acc4                  64      54         34      97.2 %   2.81 / 2.10   2.89    1.21
            1000    rounds-16-int8               16     100        100      97.5 %   2.84 / 1.47   4.22    0.60
            100     I                           256     154         96      97.5 %   4.52 / 4.32   4.11    0.85
            100     I-bf16-acc4                  64      63         40      97.2 %   2.91 / 2.20   2.89    1.15
            100     rounds-16-int8               16     112        112      97.5 %   3.03 / 1.55   4.22    0.53
            100     rounds-64                    64     280        280      97.8 %   12.6 / 4.31  16.45    0.62
            10      I                           256   ~1191       ~744      97.5 %   4.65 / 4.65   4.60    0.82
            10      I-bf16-acc4                  64    ~246       ~154      97.2 %   2.96 / 2.26   2.88    0.97
            10      rounds-16-int8               16     181        181      97.5 %   3.08 / 1.57   4.22    0.77
            10      rounds-16-int8-overlap       16     149        149      97.2 %   3.08 / 1.93   4.57    0.84
            With seeds 0, 1 and 2 (I-bf16-acc4's first at 10 Mbit/s is scaled), ± 95 %, 2026-11-30 and 12-01; those of
            1000 and 100 Mbit/s beside people who read and edited files:
            Mbit/s  cell                    s, all                     s to 97 %                validation, %
            1000    I                       88, 86, 110: 95 ± 33       55, 43, 82: 60 ± 50      97.5, 97.8, 98.1
            1000    I-bf16-acc4             54, 56, 50: 54 ± 8         34, 35, 38: 36 ± 5       97.2, 97.6, 97.9
            1000    rounds-16-int8          100, 123, 120: 114 ± 31    the same                 97.5, 97.6, 97.8
            100     I                       154, 171, 186: 170 ± 40    96, 85, 139: 107 ± 71    97.5, 97.8, 98.1
            100     I-bf16-acc4             63, 68, 64: 65 ± 6         40, 42, 48: 43 ± 11      97.2, 97.6, 97.9
            100     rounds-16-int8          112, 114, 110: 112 ± 4     the same                 97.5, 97.6, 97.8
            100     rounds-16-int8-b256     68, 68, 62: 66 ± 9         51, 68, 62: 60 ± 21      97.5, 97.4, 97.5
            10      I-bf16-acc4             246, 240, 243: 243 ± 7     154, 150, 182: 162 ± 43  97.2, 97.6, 97.9
            10      rounds-16-int8          181, 186, 181: 183 ± 7     the same                 97.5, 97.6, 97.8
            10      rounds-16-int8-b256     147, 147, 143: 145 ± 6     110, 147, 143: 133 ± 50  97.5, 97.4, 97.5
            10      rounds-16-int8-overlap  149, 158, 167: 158 ± 22    the same                 97.2, 97.1, 97.1
            So at 10 Mbit/s rounds that send 8 bits both ways and keep no optimizer states have 97 % four times as early
            as data-parallel training in float32, five times if they overlap. One that exchanges bfloat16 at every
            fourth batch has 97 % as early as rounds do, within what three seeds tell; rounds end in 0.75 of its time at
            its accuracy, overlapping in 0.65 at 97.1 ± 0.1 where it has 97.6 ± 0.9. That rival takes a quarter of their
            Muon steps: given its 256 examples a worker and step, rounds end in 0.60 of its time at 97.4 ± 0.1, and as
            early as it does at 100 Mbit/s, where it has 97 % first. (128 and 256 examples were tried at rates 0.05 and
            0.1 with seed 0: all ended at 97.0 to 97.7 %.) With batches of 64 it is ahead of rounds at 100 Mbit/s and
            above in everything, done in 0.6 and 0.5 of their time. An exchange at which rounds are measured takes some
            4.4 s longer than others, two thirds of it for their minima, of which data-parallel training has none.
            Rounds measure every fourth exchange and were mostly below 97 % at the twelfth, so 97 % may have come
            earlier than they say.
            An exchange of rounds-16-int8 took 25.3 s at 10 Mbit/s at first (7.70 MB out, 7.37 in), 17.7 s when minima
            alone were in 8 bits (5.68 / 2.90, ~283 s in all), and takes 11.3 since aggregates and the outer momentum
            are, too: 8.1 between the first and the last, which are whole. rounds-16, which keeps states, ended at
            96.9 % after 133 s at 100 Mbit/s (15.0 / 11.8 MB; long before).
"""

import argparse
import bisect
import contextlib
import itertools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# A checkout is enough: raysubset need not be installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from raysubset.cluster import connected, ray
from raysubset.comparison import advise, sizes_of
from raysubset.config import Config
from raysubset.data import load_full_set
from raysubset.events import AggregateDone, EpochDone, Event
from raysubset.pipeline import run
from raysubset.pipeline.node_speeds import measure_speed
from raysubset.planning import make_plan
from raysubset.run_directory import RunDirectory
from raysubset.run_directory.ledger import Ledger, Work

ROOT = Path(__file__).resolve().parents[1]
DATA_FOLDER = "RAYSUBSET_DATA"  # of torchvision's layout
NUM_TRAIN, NUM_HELD_OUT, SIDE = 4096, 2000, 14
NUM_NODES, BATCH, PASSES = 2, 64, 8.0
TARGET = 0.97  # validation accuracy
BRIDGE, NODE, HOST = "slowlinks", "slowlinks{}", "10.77.0.254"  # names of the bridge and of namespaces; our own end
MOST_WAITING_MS = 100  # what waits before a link; more is dropped, as by a router
LOOK_S = 1.0  # between two looks at a driver
SAMPLE_S = 0.5  # between two readings of the kernel's counters
START_S, QUIT_S = 120.0, 60.0  # for Ray to start on a node; for the processes of a driver that was ended to go

BASE = {
    "data.name": "jobs.slow_links:small_mnist",
    "model.name": "cnn",
    "model.width": 52,
    "model.depth": 4,
    "model.norm": "none",
    "subsets.num": NUM_NODES,
    "trunk.epochs": 0.0,
    "fine_tuning.epochs": 0.0,
    "minimize.optimizer": "muon",
    "minimize.learning_rate": 0.05,
    "minimize.batch_size": BATCH,
    "minimize.epochs": PASSES,
}
DATA_PARALLEL = {
    "method": "conventional",
    "conventional.epochs": PASSES,
    "conventional.num_workers": NUM_NODES,
    "minimize.batch_size": BATCH * NUM_NODES,
}


def _rounds(num: int) -> dict[str, Any]:
    return {
        "rounds.num": num,
        "minimize.epochs": PASSES / num,
        "rounds.outer_momentum": 0.6,
        "rounds.evaluate_every": num // 4,
    }


CELLS: dict[str, dict[str, Any]] = {
    "I": DATA_PARALLEL,
    "I-bf16": DATA_PARALLEL | {"minimize.gradients": "bfloat16"},
    "I-bf16-acc4": DATA_PARALLEL
    | {
        "minimize.gradients": "bfloat16",
        "minimize.accumulation": 4,
        "minimize.batch_size": 4 * BATCH * NUM_NODES,
        "minimize.learning_rate": 0.1,
    },
    "rounds-16": _rounds(16),
    "rounds-16-int8": _rounds(16) | {"rounds.send": "int8", "rounds.optimizer_state": "reset"},
    "rounds-16-int8-overlap": _rounds(16)
    | {"rounds.send": "int8", "rounds.optimizer_state": "reset", "rounds.overlap": True},
    "rounds-16-int8-b256": _rounds(16)
    | {"rounds.send": "int8", "rounds.optimizer_state": "reset", "minimize.batch_size": 4 * BATCH},
    "rounds-64": _rounds(64),
    "rounds-16-overlap": _rounds(16) | {"rounds.overlap": True},
    "rounds-64-overlap": _rounds(64) | {"rounds.overlap": True},
}


def small_mnist() -> dict[str, dict[str, np.ndarray]]:
    """4,096 of MNIST's digits to train on, 2,000 to validate and to test on: uint8 [N, 14, 14, 1], means of 2 × 2."""
    from torchvision.datasets import MNIST

    folder = Path(os.environ.get(DATA_FOLDER, "~/.cache/raysubset/data")).expanduser()
    whole = MNIST(str(folder), train=True)
    ends = (0, NUM_TRAIN, NUM_TRAIN + NUM_HELD_OUT, NUM_TRAIN + 2 * NUM_HELD_OUT)
    pixels, labels = whole.data[: ends[-1]].numpy(), whole.targets.numpy()
    images = pixels.reshape(-1, SIDE, 2, SIDE, 2, 1).mean((2, 4)).round().astype(np.uint8)
    return {
        split: {"image": images[low:high], "label": labels[low:high]}
        for split, low, high in zip(("train", "validation", "test"), ends[:-1], ends[1:], strict=True)
    }


def config_of(cell: str, storage_path: str, address: str, seed: int = 0) -> Config:
    where = {"name": cell, "storage_path": storage_path, "cluster.address": address, "seed": seed}
    return Config().with_overrides(BASE | CELLS[cell] | where)


def num_exchanges(config: Config) -> int:
    """All-reduces of the gradients, or rounds, of a whole cell."""
    if config.method == "conventional":
        return round(PASSES * NUM_TRAIN / config.minimize.batch_size)
    return config.rounds.num


# The driver, in the first node's namespace


def drive(cell: str, storage_path: str, address: str, mbit: float, seed: int) -> None:
    """Run a cell, and print what happens as JSON, a line each."""
    config, asked = config_of(cell, storage_path, address, seed), None

    def say(**record: Any) -> None:
        print(json.dumps(record | {"at": time.time()}), flush=True)

    def hear(event: Event) -> None:
        match event:
            case EpochDone(record=record):
                steps = round(record["epoch"] * NUM_TRAIN / config.minimize.batch_size)
                say(exchanges=steps, accuracy=record["validation"]["accuracy"])
            case AggregateDone(round=number, record=record):
                validation = record["validation"] or {}
                say(exchanges=number + 1, accuracy=validation.get("accuracy"))

    with connected(config.cluster):
        until = time.monotonic() + QUIT_S
        while asked != NUM_NODES:  # both nodes are up, and have none of an earlier driver's actors
            assert time.monotonic() < until, f"the nodes have {asked} of {NUM_NODES} free CPUs"
            time.sleep(0.5)
            asked = ray.available_resources().get("CPU", 0)
        say(advice=_forecast(cell, config, mbit))
        report = run(config, on_event=hear)
        say(test=report.test.to_dict()["accuracy"])


def _forecast(cell: str, config: Config, mbit: float) -> dict[str, float]:
    """What `raysubset advise` measures and computes for the cell: a pass on this one device, and all on its links."""
    base = Config().with_overrides(BASE | (_rounds(16) if "rounds" not in cell else CELLS[cell]))
    full_set = load_full_set(*base.learned)
    plan = make_plan(base, full_set)
    s_per_pass = NUM_TRAIN / measure_speed(full_set, base, plan.subsets[0].indices, 0.0).examples_per_s
    recipe = {
        "minimize.batch_size": config.minimize.batch_size,
        "minimize.gradients": config.minimize.gradients,
    }
    of_cell = base.with_overrides(recipe) if config.method == "conventional" else base
    options = {"num_train": NUM_TRAIN, "s_per_pass": s_per_pass, "num_workers": NUM_NODES}
    _, parallel, subsets = advise(of_cell, plan, sizes_of(of_cell, full_set, plan), **options).ways.values()
    way = parallel if config.method == "conventional" else subsets
    return {"s_per_pass": s_per_pass, "wall_s": way.wall_s(mbit / 1000, s_per_pass=s_per_pass)}


# The machine: namespaces, links, Ray nodes, storage


def _do(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _do("ip", "netns", "list").splitlines() if line]


def remove_links() -> None:
    """End what lives in the namespaces, and remove them with their links and the bridge."""
    for name in set(_namespaces()) & {NODE.format(node) for node in range(NUM_NODES)}:
        for pid in _do("ip", "netns", "pids", name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        if Path(f"/sys/class/net/{name}").exists():  # at once: the namespace goes when its last process has
            _do("ip", "link", "del", name)
        _do("ip", "netns", "del", name)
    if Path(f"/sys/class/net/{BRIDGE}").exists():
        _do("ip", "link", "del", BRIDGE)


def _ip(node: int) -> str:
    return f"10.77.0.{node + 1}"


@contextlib.contextmanager
def links() -> Iterator[None]:
    """Namespaces that reach one another and this machine by a bridge, and nothing else; removed at the end."""
    if Path(f"/sys/class/net/{BRIDGE}").exists() or NODE.format(0) in _namespaces():
        raise ValueError(
            f"the bridge {BRIDGE} is there: of this job at work elsewhere, or of one killed (then: --clean)"
        )
    try:
        _do("ip", "link", "add", BRIDGE, "type", "bridge")
        _do("ip", "addr", "add", f"{HOST}/24", "dev", BRIDGE)
        _do("ip", "link", "set", BRIDGE, "up")
        for node in range(NUM_NODES):
            name = NODE.format(node)
            _do("ip", "netns", "add", name)
            _do("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
            _do("ip", "link", "set", name, "master", BRIDGE, "up")
            inside = ("ip", "-n", name)
            _do(*inside, "addr", "add", f"{_ip(node)}/24", "dev", "eth0")
            _do(*inside, "link", "set", "eth0", "up")
            _do(*inside, "link", "set", "lo", "up")
        yield
    finally:
        remove_links()


def limit_links(mbit: float) -> None:
    """Let every node's link carry so much, in each direction."""
    burst = max(64_000, round(mbit * 1e6 / 8 / 500))
    shape = ("root", "tbf", "rate", f"{mbit:g}mbit", "burst", str(burst), "latency", f"{MOST_WAITING_MS}ms")
    for name in (NODE.format(node) for node in range(NUM_NODES)):
        _do("tc", "qdisc", "replace", "dev", name, *shape)
        _do("ip", "netns", "exec", name, "tc", "qdisc", "replace", "dev", "eth0", *shape)


def counters() -> list[int]:
    """Bytes that each node has sent and received, by the kernel: of its link's end outside, so the other way round."""
    return [
        int(Path(f"/sys/class/net/{NODE.format(node)}/statistics/{way}_bytes").read_text())
        for node in range(NUM_NODES)
        for way in ("rx", "tx")
    ]


class Samples:
    """Counters read every SAMPLE_S, to know them at any time of the past."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._values: list[list[int]] = []
        self._done = threading.Event()
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_S if self._times else 0):
            self._times.append(time.time())
            self._values.append(counters())

    def between(self, begin: float, end: float) -> list[int]:
        """Bytes that went meanwhile, in the order of counters()."""
        first, last = (min(bisect.bisect(self._times, at), len(self._times) - 1) for at in (begin, end))
        return [b - a for a, b in zip(self._values[first], self._values[last], strict=True)]

    def close(self) -> None:
        self._done.set()


@contextlib.contextmanager
def ray_nodes(folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """A Ray node in each namespace, of one CPU; the head's address. They end with their namespaces."""
    address = f"{_ip(0)}:6379"
    for node in range(NUM_NODES):
        role = ["--head", "--port", "6379", "--include-dashboard", "false"] if node == 0 else ["--address", address]
        options = ["--node-ip-address", _ip(node), "--num-cpus", "1", "--object-store-memory", str(300_000_000)]
        options += ["--temp-dir", str(folder / str(node)), "--disable-usage-stats", "--block"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *role, *options]
        with (folder / f"{node}.log").open("w") as log:
            started = subprocess.Popen(
                ["ip", "netns", "exec", NODE.format(node), *command], env=environment, stdout=log, stderr=log
            )
        until = time.monotonic() + START_S
        while "Ray runtime started" not in (text := (folder / f"{node}.log").read_text()):
            if started.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"Ray did not start on node {node}: {text[-1500:]}")
            time.sleep(0.5)
    yield address


@contextlib.contextmanager
def storage() -> Iterator[str]:
    """An S3 server at our end of the bridge: the query of URIs in it."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it would tell of every request
    server = ThreadedMotoServer(ip_address=HOST, port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="cells")
    try:
        yield f"endpoint_override={host}:{port}&scheme=http&region=us-east-1"
    finally:
        server.stop()


# A measurement


def measure(
    cell: str, mbit: float, seed: int, *, address: str, query: str, limit_s: float, environment: dict[str, str]
) -> dict[str, Any]:
    """Run a cell by a driver on the first node, ended limit_s after the first of its workers began; what came of it."""
    limit_links(mbit)
    storage_path = f"s3://cells/{mbit:g}-{time.time():.0f}?{query}"
    command = [sys.executable, "-m", "jobs.slow_links", "--drive", cell, storage_path, address, f"{mbit:g}", f"{seed}"]
    load, samples = os.getloadavg()[0], Samples()
    said: list[dict[str, Any]] = []
    config, ledger = config_of(cell, storage_path, address, seed), Ledger(RunDirectory(storage_path, cell))
    driver = subprocess.Popen(
        ["ip", "netns", "exec", NODE.format(0), *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )

    def listen() -> None:
        assert driver.stdout is not None
        for line in driver.stdout:
            if line.startswith("{"):
                said.append(json.loads(line))
                print(f"  {cell} at {mbit:g} Mbit/s: {line.strip()}", file=sys.stderr, flush=True)

    ear = threading.Thread(target=listen, daemon=True)
    ear.start()
    try:
        while driver.poll() is None:
            begun = [work.started_at for work in ledger.read() if work.stage in ("subsets", "conventional")]
            if begun and time.time() - min(begun) > limit_s:
                break
            time.sleep(LOOK_S)
    finally:
        driver.kill()
        code = driver.wait()
        samples.close()
    ear.join()
    is_whole = any("test" in one for one in said)
    if not is_whole and code != -signal.SIGKILL:
        raise RuntimeError(f"{cell} at {mbit:g} Mbit/s ended with {code}; its driver's lines are above")
    advice = next(one["advice"] for one in said if "advice" in one)
    begin, seconds, made, counted = _training(ledger.read(), config)
    moved = samples.between(begin, begin + seconds)
    return {
        "cell": cell,
        "mbit": mbit,
        "seed": seed,
        "load": [load, os.getloadavg()[0]],
        "is_whole": is_whole,
        "seconds": seconds,
        "exchanges": made,
        "all_exchanges": num_exchanges(config),
        "curve": [[one["exchanges"], one["accuracy"]] for one in said if one.get("accuracy") is not None],
        "test": next((one["test"] for one in said if "test" in one), None),
        "sent_bytes": moved[::2],
        "received_bytes": moved[1::2],
        "ledger_bytes": counted,
        "advice": advice,
    }


def _training(works: Sequence[Work], config: Config) -> tuple[float, float, int, int]:
    """When training began, how many seconds it took for how many exchanges, and the bytes that the ledger has of them.

    Of work that was stopped they are as of its last heartbeat; of members, what the full set takes is among them.
    """
    if config.method == "conventional":
        work = next(work for work in works if work.stage == "conventional")
        steps, seconds = work.cost.num_steps, work.cost.device_s / work.num_workers
        return work.started_at, seconds, steps, work.num_network_bytes
    members = [work for work in works if work.stage == "subsets"]
    aggregates = [work for work in works if work.stage == "aggregation" and work.ended_at is not None]
    begin = min(work.started_at for work in members)
    end = max((work.ended_at or 0.0 for work in aggregates), default=begin)
    done = (work for work in (*members, *aggregates) if work.round < len(aggregates))
    counted = sum(work.num_network_bytes for work in done)
    return begin, end - begin, len(aggregates), counted


# The table

COLUMNS = (
    "Mbit/s",
    "cell",
    "seed",
    "exchanges",
    "s/exchange",
    "s(all)",
    "s(97%)",
    "val%",
    "out/in-MB/exchange",
    "ledger",
)
COLUMNS += ("advise", "advise/measured", "load")


def table(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line a cell, the newest of each."""
    newest = {(one["mbit"], one["cell"], one["seed"]): one for one in records}
    rows = [list[str](COLUMNS)]
    names = list(CELLS)
    for (mbit, cell, seed), one in sorted(newest.items(), key=lambda item: (-item[0][0], names.index(item[0][1]))):
        made, most = one["exchanges"], one["all_exchanges"]
        if not made:
            rows.append([f"{mbit:g}", cell, f"{seed}", f"0/{most}", f"> {one['seconds']:.0f}", *["–"] * 8])
            continue
        each, mark = one["seconds"] / made, "" if one["is_whole"] else "~"
        whole = (other for other in records if other["is_whole"] and (other["cell"], other["seed"]) == (cell, seed))
        curve = next(whole, one)["curve"]
        reached = next((number for number, accuracy in curve if accuracy >= TARGET), None)
        whole_s, advised = each * most, one["advice"]["wall_s"]
        of_nodes = [sum(one[way]) / NUM_NODES / made / 1e6 for way in ("sent_bytes", "received_bytes")]
        rows.append(
            [
                f"{mbit:g}",
                cell,
                f"{seed}",
                f"{made}/{most}",
                f"{each:.3f}",
                f"{mark}{whole_s:.0f}",
                "–" if reached is None else f"{mark}{each * reached:.0f}",
                f"{100 * curve[-1][1]:.1f}" if curve else "–",
                "/".join(f"{size:.2f}" for size in of_nodes),
                f"{one['ledger_bytes'] / NUM_NODES / made / 1e6:.2f}",
                f"{advised:.0f}",
                f"{advised / whole_s:.2f}",
                "–".join(f"{load:.1f}" for load in one["load"]),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(word.rjust(width) for word, width in zip(row, widths, strict=True))


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def unfit() -> str | None:
    """Why this machine cannot do it; None if it can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "network namespaces and limited links need root on Linux: run it there, with sudo -E"
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    return f"{' and '.join(missing)} not found: install iproute2" if missing else None


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description="Measure data-parallel training and rounds over links of a limited bandwidth."
    )
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--mbit", nargs="+", type=float, default=[1000.0, 100.0, 10.0], help="of each node's link")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--limit-s", type=float, default=240.0, help="of training, after which a cell is stopped")
    parser.add_argument("--out", type=Path, default=Path("slow_links.jsonl"), help="a record a cell is added here")
    parser.add_argument("--table", action="store_true", help="only show what --out holds")
    parser.add_argument("--clean", action="store_true", help="only remove what a killed job left")
    parser.add_argument("--drive", nargs=5, help=argparse.SUPPRESS)  # what drive() takes
    options = parser.parse_args(arguments)
    if options.drive:
        cell, storage_path, address, mbit, seed = options.drive
        drive(cell, storage_path, address, float(mbit), int(seed))
        return 0
    try:
        if not options.table:
            if (reason := unfit()) is not None:
                raise ValueError(reason)
            if options.clean:
                remove_links()
                return 0
            _measure_all(options)
    except (ValueError, RuntimeError) as error:
        print(f"slow_links: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        return 130
    except subprocess.CalledProcessError as error:
        print(f"slow_links: {' '.join(error.cmd)}: {error.stderr.strip()}", file=sys.stderr)
        return 1
    for line in table(_records(options.out)):
        print(line)
    return 0


def _measure_all(options: argparse.Namespace) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    keys = {"AWS_ACCESS_KEY_ID": "slow", "AWS_SECRET_ACCESS_KEY": "links", "AWS_EC2_METADATA_DISABLED": "true"}
    os.environ.update(keys)
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {
        "RAY_AUTH_MODE": "disabled",  # no way leads into the namespaces but from this machine
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "eth0",  # all namespaces have this machine's name, by which gloo would look
        "PYTHONPATH": str(ROOT),
    }
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="sl", dir="/tmp"))  # sockets' paths are short
        stack.enter_context(links())
        place: dict[str, Any] = {"query": stack.enter_context(storage()), "environment": environment}
        place["address"] = stack.enter_context(ray_nodes(Path(folder), environment))
        for seed, mbit, cell in itertools.product(options.seeds, options.mbit, options.cells):
            record = measure(cell, mbit, seed, limit_s=options.limit_s, **place)
            with options.out.open("a") as file:
                file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
