"""Kill parts of a run at random until it has had enough, and see whether it still ends where an undisturbed one does.

    python -m tests.chaos.punish --out /tmp/punished --kills 50 --minutes 60 --seed 1

One undisturbed run gives the reference. Then runs of the same config are disturbed, in turn on a Ray of the driver's
own ("local") and on a cluster of a head and two worker nodes in a process of its own ("nodes", which gets a new node
for each that dies). At random moments a victim, of a kind that was hit least so far, gets SIGKILL (or, of some kinds,
SIGTERM); a driver that ended with anything but 0 is started again by the same command. What must hold at
the end of each run:

  bits      every minimum, aggregate and the final model equal the reference's bit for bit, and so do test results
  ledger    each piece of work was done, once; its attempts together made at least the reference's steps, and more only
            by what lies between two checkpoints for each attempt that was lost; the report's passes are the ledger's
            sum
  report    report.json and the page are there, and `raysubset report` reads them
  orphans   nothing the run started is alive a minute after it

Only processes that this program started are ever signalled: they carry a tag in their environment.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

TAG = "PUNISH_TAG"
EVERY_EPOCHS = 10  # between two checkpoints of a subset
FLAGS = {
    "name": "run",
    "subsets.num": 4,
    "minimize.epochs": 60,
    "trunk.epochs": 10,
    "rounds.num": 3,
    "rounds.outer-momentum": 0.5,
    "fine-tuning.epochs": 100,  # its workers live long enough to be hit
    "fine-tuning.num-workers": 2,  # a Ray Train job: one alone is an actor
    "actors.checkpoint-epochs": EVERY_EPOCHS,
}

KINDS = [
    ("actor", signal.SIGKILL),
    ("actor", signal.SIGTERM),
    ("train_worker", signal.SIGKILL),
    ("train_controller", signal.SIGKILL),
    ("raylet", signal.SIGKILL),  # of a worker node; of the driver's own node in mode local
    ("driver", signal.SIGKILL),
    ("driver", signal.SIGTERM),
    ("gcs", signal.SIGKILL),  # in mode local only: the whole cluster
]
TITLES = {
    "actor": "ray::SubsetActor",
    "train_worker": "ray::RayTrainWorker",
    "train_controller": "ray::TrainController",
}


@dataclass
class Outcome:
    """One disturbed run."""

    mode: str
    kills: list[dict[str, Any]] = field(default_factory=list)
    exits: list[dict[str, Any]] = field(default_factory=list)  # of drivers
    problems: list[str] = field(default_factory=list)
    repeated: dict[str, float] = field(default_factory=dict)  # share of each stage's steps made more than once
    seconds: float = 0.0


class Tagged:
    """The processes with a tag, and those that a tagged raylet started: their titles overwrite their environment."""

    def __init__(self, tag: str) -> None:
        self._tag = tag
        self.seen: set[psutil.Process] = set()

    def environment(self) -> dict[str, str]:
        return {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")} | {TAG: self._tag}

    def all(self) -> list[psutil.Process]:
        mine = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(TAG) == self._tag:
                    mine.append(process)
        for process in list(mine):
            with contextlib.suppress(psutil.Error):
                mine += process.children(recursive=True)
        self.seen |= set(mine)
        return [process for process in self.seen if _lives(process)]

    def of_kind(self, kind: str) -> list[psutil.Process]:
        return [process for process in self.all() if self._is(process, kind)]

    def _is(self, process: psutil.Process, kind: str) -> bool:
        with contextlib.suppress(psutil.Error, ValueError):  # a process that ends just now has no words
            first, *rest = process.cmdline()
            if kind == "raylet":
                return os.path.basename(first) == "raylet" and not any(word == "--head" for word in rest)
            if kind == "gcs":
                return os.path.basename(first) == "gcs_server"
            return first.startswith(TITLES[kind])
        return False

    def end_all(self, *, grace_s: float = 60.0) -> list[str]:
        """Whatever still lives after a minute, ended; its titles."""
        until = time.monotonic() + grace_s
        while (left := self.all()) and time.monotonic() < until:
            time.sleep(1)
        titles = [" ".join(_cmdline(process))[:80] for process in left]
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        return titles


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _cmdline(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


# A cluster of several nodes, in a process of its own


def keep_cluster(port: int, num_nodes: int) -> None:
    """A head without CPUs and worker nodes of one; a new one for each that dies, until standard input is closed."""
    import select

    import ray  # noqa: F401
    from ray.cluster_utils import Cluster

    quick = {  # a dead node is noticed within some seconds, not thirteen
        "health_check_initial_delay_ms": 1000,
        "health_check_period_ms": 1000,
        "health_check_timeout_ms": 3000,
        "health_check_failure_threshold": 3,
    }
    head = {"num_cpus": 0, "include_dashboard": False, "gcs_server_port": port, "_system_config": quick}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=1) for _ in range(num_nodes)]
    print(f"head-raylet {_raylet(cluster.head_node)} address {cluster.address}", flush=True)
    while not select.select([sys.stdin], [], [], 0.5)[0]:
        for number, node in enumerate(nodes):
            if not node.live_processes() or all(name != "raylet" for name, _ in node.live_processes()):
                with contextlib.suppress(Exception):
                    cluster.remove_node(node, allow_graceful=False)
                time.sleep(3)  # as a replacement takes its time
                with contextlib.suppress(Exception):  # on a busy machine it may not come up in time: then the next does
                    nodes[number] = cluster.add_node(num_cpus=1)
    cluster.shutdown()


def _raylet(node: Any) -> int:
    return next(process.pid for name, process in node.live_processes() if name == "raylet")


@contextlib.contextmanager
def cluster_of_nodes(tagged: Tagged, port: int, log: Path) -> Iterator[tuple[str, int]]:
    """Its address, and the process id of the head's raylet."""
    with log.open("ab") as errors:
        command = [sys.executable, __file__, "--keep-cluster", str(port)]
        keeper = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | tagged.environment(),
        )
    assert keeper.stdin
    assert keeper.stdout
    try:
        words: list[str] = []
        while words[:1] != ["head-raylet"]:
            line = keeper.stdout.readline()
            assert line, f"the cluster did not start: see {log}"
            words = line.split()
        yield words[3], int(words[1])
    finally:
        keeper.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            keeper.wait(timeout=40)
        if keeper.poll() is None:
            keeper.kill()
            keeper.wait()


# A run


def command(storage_path: Path, address: str | None) -> list[str]:
    flags = [word for key, value in FLAGS.items() for word in (f"--{key}", str(value))]
    where = ["--cluster.address", address] if address else ["--cluster.num-cpus", "2"]
    return [sys.executable, "-m", "raysubset", "run", "--storage-path", str(storage_path), *flags, *where]


def start(storage_path: Path, address: str | None, tagged: Tagged) -> subprocess.Popen[bytes]:
    storage_path.mkdir(parents=True, exist_ok=True)
    with (storage_path / "driver.log").open("ab") as log:
        log.write(b"---- start\n")
        log.flush()
        return subprocess.Popen(command(storage_path, address), stdout=log, stderr=log, env=tagged.environment())


def disturbed(
    storage_path: Path,
    mode: str,
    draw: random.Random,
    hits: Counter[tuple[str, int]],
    *,
    most_kills: int,
    mean_s: float,
    port: int,
    until: float,
    first_stage: str,
) -> Outcome:
    """One run that is disturbed up to most_kills times, from a stage on, then left to finish."""
    outcome, tagged, began = Outcome(mode), Tagged(uuid.uuid4().hex), time.monotonic()
    with contextlib.ExitStack() as stack:
        address, spared = None, 0
        if mode == "nodes":
            address, spared = stack.enter_context(cluster_of_nodes(tagged, port, storage_path.parent / "cluster.log"))
        driver = start(storage_path, address, tagged)
        due = time.monotonic() + 6 + draw.expovariate(1 / mean_s)
        while True:
            time.sleep(0.05)
            if driver.poll() is not None:
                outcome.exits.append(
                    {"code": driver.returncode, "said": _last_line(storage_path), "after_kills": len(outcome.kills)}
                )
                if driver.returncode == 0:
                    break
                if len(outcome.exits) > most_kills + 6 or time.monotonic() > until + 600:
                    outcome.problems.append("the run never finished")
                    break
                if driver.returncode == 2:
                    outcome.problems.append(f"refused to go on: {outcome.exits[-1]['said']}")
                    break
                driver = start(storage_path, address, tagged)
                due = max(due, time.monotonic() + 6 + draw.expovariate(1 / mean_s))
            if time.monotonic() < due or len(outcome.kills) >= most_kills or time.monotonic() > until:
                continue
            stage = _stage(storage_path)
            if (stage == "start" and draw.random() < 0.9) or not stage.startswith(first_stage):  # few before the work
                due = time.monotonic() + 1
                continue
            if (hit := _strike(tagged, mode, driver, spared, draw, hits, stage)) is not None:
                outcome.kills.append(hit | {"at_s": round(time.monotonic() - began, 1), "stage": _stage(storage_path)})
                print(f"  {outcome.kills[-1]}", flush=True)
                due = time.monotonic() + 1 + draw.expovariate(1 / mean_s)
    outcome.seconds = time.monotonic() - began
    if orphans := tagged.end_all():
        outcome.problems.append(f"orphans a minute later: {orphans}")
    return outcome


def _strike(
    tagged: Tagged,
    mode: str,
    driver: subprocess.Popen[bytes],
    spared: int,
    draw: random.Random,
    hits: Counter[tuple[str, int]],
    stage: str,
) -> dict[str, Any] | None:
    """Signal one victim of a kind that was hit least of those of the stage, or once more; None while none lives."""
    there: dict[tuple[str, int], list[int]] = {}
    for kind, number in KINDS:
        if kind == "driver":
            there[kind, number] = [driver.pid] if driver.poll() is None else []
        elif kind != "gcs" or mode == "local":
            there[kind, number] = [p.pid for p in tagged.of_kind(kind) if p.pid != spared]
    other = "actor" if stage.startswith("fine_tuning") else "train_"
    least = min((hits[key] for key in there if not key[0].startswith(other)), default=0)
    keys = [key for key, pids in there.items() if pids and hits[key] <= least + 1]
    if not keys:  # workers and controllers take longer to start than a driver takes to die
        return None
    kind, number = draw.choice(keys)
    pid = draw.choice(there[kind, number])
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return None
    hits[kind, number] += 1
    return {"kind": kind, "signal": signal.Signals(number).name}


def _stage(storage_path: Path) -> str:
    """How far the run is, by its files."""
    run = storage_path / "run"
    if (run / "fine_tuning" / "minimum.json").exists():
        return "after fine_tuning"
    if (run / "fine_tuning").exists():
        return "fine_tuning"
    rounds = sorted(path.name for path in run.glob("rounds/*"))
    return f"round {rounds[-1]}" if rounds else "trunk" if (run / "trunk").exists() else "start"


def _last_line(storage_path: Path) -> str:
    lines = [line for line in (storage_path / "driver.log").read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


# What must hold


def check(reference: Path, punished: Path, outcome: Outcome) -> None:
    """Add what does not hold to the outcome's problems."""
    a, b = reference / "run", punished / "run"
    for path in sorted(a.rglob("*.safetensors")) + sorted(a.rglob("subsets.parquet")):
        other = b / path.relative_to(a)
        if not other.exists():
            outcome.problems.append(f"missing: {path.relative_to(a)}")
        elif other.read_bytes() != path.read_bytes():
            outcome.problems.append(f"other bits: {path.relative_to(a)}")
    try:
        old, new = (json.loads((folder / "report.json").read_text()) for folder in (a, b))
    except (OSError, ValueError) as error:
        outcome.problems.append(f"no report: {error}")
        return
    for key in ("test", "validation", "planned_passes"):
        if old[key] != new[key]:
            outcome.problems.append(f"report differs in {key}")
    page = b / "report" / "report.html"
    if not page.exists() or "</html>" not in page.read_text():
        outcome.problems.append("no page")
    shown = subprocess.run(
        [sys.executable, "-m", "raysubset", "report", str(b)], capture_output=True, text=True, check=False
    )
    if shown.returncode:
        outcome.problems.append(f"`raysubset report` says {shown.stderr.strip()[-200:]}")
    _check_ledger(a, b, new, outcome)


def _works(run: Path) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    works: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for work in pq.read_table(run / "ledger.parquet").to_pylist():
        works[work["stage"], work["round"], work["subset"]].append(work)
    return works


def _check_ledger(a: Path, b: Path, report: dict[str, Any], outcome: Outcome) -> None:
    if list((b / "ledger").glob("*.json")):
        outcome.problems.append("entries left in ledger/ after compaction")
    old, new = _works(a), _works(b)
    if old.keys() != new.keys():
        outcome.problems.append(f"ledger: pieces differ: {sorted(map(str, old.keys() ^ new.keys()))}")
    steps: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for key, works in new.items():
        stage, ways = key[0], Counter(work["outcome"] for work in works)
        if ways["done"] < 1 or ways["running"]:
            outcome.problems.append(f"ledger: {key} ended {dict(ways)}")
        if ways["done"] > 1:
            outcome.problems.append(f"ledger: {key} was done {ways['done']} times")
        if [work["attempt"] for work in sorted(works, key=lambda w: w["attempt"])] != list(range(len(works))):
            outcome.problems.append(f"ledger: attempts of {key} are not 0 to {len(works) - 1}")
        for name in ("num_steps", "num_backward"):
            planned = sum(work["cost"][name] for work in old.get(key, ()))
            made = sum(work["cost"][name] for work in works)
            if made < planned:
                outcome.problems.append(f"ledger: {key} made {made} {name} of {planned}: work is missing")
            if name == "num_steps":
                steps[stage][0] += planned
                steps[stage][1] += made
                total = {
                    "trunk": FLAGS["trunk.epochs"],
                    "subsets": FLAGS["minimize.epochs"],
                    "fine_tuning": FLAGS["fine-tuning.epochs"],
                }.get(stage)
                if total:
                    per_epoch = planned / float(total)
                    between = (
                        3 if stage == "fine_tuning" else EVERY_EPOCHS
                    )  # Ray Train may forget the last ones it was told of
                    most = (len(works) - 1) * (between * per_epoch + 1)
                    if made - planned > most:
                        outcome.problems.append(
                            f"ledger: {key} repeated {made - planned} steps in {len(works)} attempts; most: {most:.0f}"
                        )
    outcome.repeated = {stage: round(made / planned - 1, 3) for stage, (planned, made) in steps.items() if planned}
    num_train, share = report["data"]["num_train"], report["model"]["forward_share"]
    costs = [work["cost"] for works in new.values() for work in works]
    passes = sum(share * cost["num_forward"] + (1 - share) * cost["num_backward"] for cost in costs) / num_train
    if abs(passes - report["cost"]["passes"]) > 1e-6:
        outcome.problems.append(f"report: {report['cost']['passes']} passes, the ledger's sum is {passes}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills-per-run", type=int, default=8)
    parser.add_argument("--mean-s", type=float, default=5.0, help="mean time between two kills")
    parser.add_argument("--modes", nargs="+", default=["local", "nodes"])
    parser.add_argument("--kinds", nargs="+", default=sorted({kind for kind, _ in KINDS}), help="of victims")
    parser.add_argument("--reference", type=Path, help="of an earlier call by the same version, instead of a new one")
    parser.add_argument(
        "--late", type=float, default=0.4, help="share of the runs that are disturbed in fine-tuning alone"
    )
    parser.add_argument("--port", type=int, default=23001, help="of the control store of the cluster of several nodes")
    parser.add_argument("--keep-cluster", type=int, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.keep_cluster:
        keep_cluster(options.keep_cluster, 2)
        return
    if options.out is None:
        parser.error("--out: name a folder for the runs")
    sys.exit(punish(options))


def punish(options: argparse.Namespace) -> int:
    out, draw, hits = options.out, random.Random(options.seed), Counter()
    out.mkdir(parents=True, exist_ok=True)
    reference, tagged = options.reference or out / "reference", Tagged(uuid.uuid4().hex)
    KINDS[:] = [key for key in KINDS if key[0] in options.kinds]
    began, until = time.monotonic(), time.monotonic() + options.minutes * 60
    if not options.reference and start(reference, None, tagged).wait():
        print(f"the reference failed: {_last_line(reference)}")
        return 1
    tagged.end_all()
    print(f"reference: {time.monotonic() - began:.0f} s", flush=True)
    outcomes: list[Outcome] = []
    while sum(hits.values()) < options.kills and time.monotonic() < until:
        mode, number = options.modes[len(outcomes) % len(options.modes)], len(outcomes)
        print(f"run {number}, {mode}", flush=True)
        punished = out / f"punished-{number:02d}"
        most = min(options.kills_per_run, options.kills - sum(hits.values()))
        first_stage = "fine_tuning" if draw.random() < options.late else ""
        outcome = disturbed(
            punished,
            mode,
            draw,
            hits,
            most_kills=most,
            mean_s=options.mean_s,
            port=options.port + 10 * number,
            until=until,
            first_stage=first_stage,
        )
        check(reference, punished, outcome)
        outcomes.append(outcome)
        with (out / "outcomes.jsonl").open("a") as file:
            file.write(json.dumps(vars(outcome)) + "\n")
        print(
            f"  {outcome.seconds:.0f} s, {len(outcome.kills)} kills, {len(outcome.exits)} drivers, "
            f"repeated {outcome.repeated}; problems: {outcome.problems or 'none'}",
            flush=True,
        )
    _print_summary(outcomes, hits, time.monotonic() - began)
    return int(any(outcome.problems for outcome in outcomes))


def _print_summary(outcomes: Sequence[Outcome], hits: Counter[tuple[str, int]], seconds: float) -> None:
    good = [outcome for outcome in outcomes if not outcome.problems]
    print(f"\n{sum(hits.values())} kills in {seconds / 60:.0f} minutes; {len(good)} of {len(outcomes)} runs are good")
    for (kind, number), count in sorted(hits.items()):
        print(f"  {kind} {signal.Signals(number).name}: {count}")
    print(f"kills in runs without a problem: {sum(len(outcome.kills) for outcome in good)}")


if __name__ == "__main__":
    main()
