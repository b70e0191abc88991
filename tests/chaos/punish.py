"""Kill parts of a run at work until it has had enough, and see whether it still ends where an undisturbed one does.

    python -m tests.chaos.punish --out /tmp/punished --kills 50 --minutes 60 --seed 1
    python -m tests.chaos.punish --out /tmp/punished --s3 --set rounds.send=int8 rounds.overlap=
    python -m tests.chaos.punish --out /tmp/punished --verb compare   # or sweep: its legs or trials are struck

One undisturbed run gives the reference. Then runs of the same config are disturbed, in turn on a Ray of the driver's
own ("local") and on a cluster of a head and two worker nodes in a process of its own ("nodes", which gets a new node
for each that dies). A moment to strike is a change in the run directory: a heartbeat or a checkpoint, an epoch of a Ray
Train stage, a minimum or an aggregate that is being written. Draws choose among them, sooner in stages that were hit
less, and a victim of a kind that was hit least so far gets SIGKILL (or, of some kinds, SIGTERM). A driver that ended
with anything but 0 is started again by the same command. The summary says how many kills struck which stage: one whose
entry in the ledger was open at that moment; none is "between". What must hold at the end of each run:

  bits      every minimum, aggregate and the final model equal the reference's bit for bit, and so do test results; all
            that comparison.json or sweep.json holds but times and costs is the same
  ledger    each piece of work was done, once; its attempts together made at least the reference's steps, and more only
            by what lies between two checkpoints for each attempt that was lost; the passes that a report shows are the
            sum of its ledgers
  report    the report and the page are there, and `raysubset report` reads them
  orphans   nothing the run started is alive a minute after it

Only processes that this program started are ever signalled: they carry a tag in their environment.
"""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from tests.buckets import bucket

RAYSUBSET = [sys.executable, "-m", "raysubset"]
TAG = "PUNISH_TAG"
STEP_S = 0.01  # that a step takes at least, so that stages last and leave the machine to others
ALWAYS: dict[str, Any] = {"name": "run", "actors.on-step": "tests.chaos.punish:rest"}
FLAGS_OF: dict[str, dict[str, Any]] = {
    "run": {
        "subsets.num": 4,
        "minimize.epochs": 30,
        "trunk.epochs": 10,
        "rounds.num": 3,
        "rounds.outer-momentum": 0.5,
        "fine-tuning.epochs": 30,
        "fine-tuning.num-workers": 2,  # a Ray Train job: one alone is an actor
        "actors.checkpoint-epochs": 5,
    },
    "compare": {
        "subsets.num": 2,
        "seeds": 2,
        "budgets": 3,
        "arms": "B D:minimize.learning_rate=0.1 H:rounds.num=2,rounds.send=int8,minimize.learning_rate=0.1"
        " I:minimize.learning_rate=0.1",  # I is two Ray Train jobs; B is tuned
        "learning-rates": "0.03 0.1",
        "num-workers": 2,
        "trunk.epochs": 2,
        "actors.checkpoint-epochs": 1,
    },
    "sweep": {
        "sizes": "200 400",  # two trials, which share a trunk
        "seeds": 1,
        "minimize.epochs": 12,
        "trunk.epochs": 4,
        "rounds.num": 2,
        "fine-tuning.epochs": 4,
        "actors.checkpoint-epochs": 2,
    },
}
FLAGS: dict[str, Any] = {}  # of this call
REPORTS = {"run": "report.json", "compare": "comparison.json", "sweep": "sweep.json"}

KINDS = [
    ("actor", signal.SIGKILL),
    ("actor", signal.SIGTERM),
    ("train_worker", signal.SIGKILL),
    ("train_controller", signal.SIGKILL),
    ("raylet", signal.SIGKILL),  # of a worker node; of the driver's own node in mode local
    ("driver", signal.SIGKILL),
    ("driver", signal.SIGTERM),
    ("trial", signal.SIGKILL),  # Tune's process, the driver of a sweep's trial
    ("gcs", signal.SIGKILL),  # in mode local only: the whole cluster
]
TITLES = {
    "actor": "ray::SubsetActor",
    "train_worker": "ray::RayTrainWorker",
    "train_controller": "ray::TrainController",
    "trial": "ray::ImplicitFunc",
}
PARTS = r"(?:legs|trials|trunks)/[^/]+/"  # of a comparison or sweep, each like a run
STAGES = {  # by the paths in a run of what their work writes, files in the making too
    r"(ledger/)?trunk": "trunk",
    r"ledger/subs|rounds/\d+/(minima|subsamples)/": "members",
    r"ledger/aggregation|rounds/\d+/\.?(aggregate|momentum)": "aggregation",
    r"(ledger/)?(fine_tuning|conventional)": "fine-tuning",
    r"ledger/test|\.?(model|test)": "test",
}
BETWEEN = "between"

Driver = subprocess.Popen[bytes]
Victims = dict[tuple[str, int], list[int]]  # process ids by kind and signal


def rest(step: Any) -> None:
    """Listen to a step: make it last."""
    time.sleep(STEP_S)


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
        return [process for process in self.all() if self.is_of(process, kind)]

    def is_of(self, process: psutil.Process, kind: str) -> bool:
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
        titles = list[str]()
        for process in left:
            with contextlib.suppress(psutil.Error):
                titles.append(" ".join(process.cmdline())[:80])
                process.kill()
        return titles


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


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
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
        keeper = subprocess.Popen(command, text=True, env=os.environ | tagged.environment(), **pipes)
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


class Place:
    """Where a run lies: in a local folder, or below a URI of an object store. Whenever it writes, it may be struck."""

    def __init__(self, uri: str) -> None:
        self.uri, self._old = uri, dict[str, Any]()
        self._files, folder = pafs.FileSystem.from_uri(uri) if "://" in uri else (pafs.LocalFileSystem(), uri)
        self._root = f"{folder}/run"

    def _state(self) -> dict[str, tuple[float, int]]:
        """Return when the run's files were written, and their sizes, by path; those in the making too."""
        with contextlib.suppress(OSError):  # of a folder that came or went meanwhile
            infos = self._files.get_file_info(pafs.FileSelector(self._root, recursive=True, allow_not_found=True))
            files = (info for info in infos if info.is_file)
            return {info.path.removeprefix(f"{self._root}/"): (info.mtime_ns / 1e9, info.size) for info in files}
        return self._old

    def changed_stage(self) -> str | None:
        """Return the stage of a file that was written since the last look; None if none was."""
        old, self._old = self._old, self._state()
        stages = sorted({_stage_of(path) for path, written in self._old.items() if old.get(path) != written})
        return next((stage for stage in stages if stage != BETWEEN), BETWEEN if stages else None)

    def stage_at_work(self, likely: str, since: float) -> str:
        """Return a stage with an open entry that was written since then: the likely one if possible."""
        paths = [path for path, (at, _) in self._state().items() if "ledger/" in path and at >= since]
        stages = {_stage_of(path) for path in paths if self._read(path).get("outcome") == "running"}
        return likely if likely in stages else min(stages, default=BETWEEN)

    def _read(self, path: str) -> Any:
        with contextlib.suppress(OSError, ValueError):
            return json.loads(self._files.open_input_file(f"{self._root}/{path}").read())
        return {}

    def copy_to(self, folder: Path) -> None:
        if "://" in self.uri:
            pafs.copy_files(self._root, str(folder / "run"), source_filesystem=self._files)


def _stage_of(path: str) -> str:
    return next((stage for pattern, stage in STAGES.items() if re.match(f"(?:{PARTS})?(?:{pattern})", path)), BETWEEN)


class Attacker:
    """Draws moments and victims, and counts what it struck."""

    def __init__(self, seed: int) -> None:
        self._draw, self.struck, self.hits = random.Random(seed), Counter[str](), Counter[tuple[str, int]]()

    def wants(self, stage: str) -> bool:
        """Return True if this moment of the stage is one to strike: sooner in stages that were hit less."""
        least = min(self.struck[stage] for stage in STAGES.values())
        chance = 0.02 if stage == BETWEEN else 0.3 * (1 + least) / (1 + self.struck[stage])
        return self._draw.random() < max(chance, 0.02)

    def strike(self, victims: Victims, place: Place, stage: str, since: float) -> Any:
        """Signal a victim of a kind that was hit least of those that live, or once more; None: not now."""
        least = min(self.hits[key] for key in victims)
        kind, number = self._draw.choice([key for key in victims if self.hits[key] <= least + 1])
        time.sleep(self._draw.choice((0, 0.1 * self._draw.random())))
        if (at_work := place.stage_at_work(stage, since)) == BETWEEN and self._draw.random() < 0.9:
            return None
        try:
            os.kill(self._draw.choice(victims[kind, number]), number)
        except ProcessLookupError:
            return None
        self.hits[kind, number] += 1
        self.struck[at_work] += 1
        return {"kind": kind, "signal": signal.Signals(number).name, "stage": at_work}


def command(storage_path: Path | str, address: str | None) -> list[str]:
    verb, flags = FLAGS["verb"], {key: value for key, value in FLAGS.items() if key != "verb"}
    words = [word for key, value in flags.items() for word in (f"--{key}", *str(value).split())]
    where = ["--cluster.address", address] if address else ["--cluster.num-cpus", "2"]
    return [*RAYSUBSET, verb, "--storage-path", str(storage_path), *words, *where]


def start(folder: Path, address: str | None, tagged: Tagged, uri: str | None = None) -> Driver:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "driver.log").open("ab") as log:
        log.write(b"---- start\n")
        log.flush()
        return subprocess.Popen(command(uri or folder, address), stdout=log, stderr=log, env=tagged.environment())


def disturbed(folder: Path, place: Place, mode: str, by: Attacker, *, most: int, port: int, until: float) -> Outcome:
    """One run that is disturbed up to most times, then left to finish."""
    outcome, tagged, began = Outcome(mode), Tagged(uuid.uuid4().hex), time.monotonic()
    with contextlib.ExitStack() as stack:
        address, spared = None, 0
        if mode == "nodes":
            address, spared = stack.enter_context(cluster_of_nodes(tagged, port, folder.parent / "cluster.log"))
        driver, since, victims, looked_at = start(folder, address, tagged, place.uri), time.time(), {}, 0.0
        while True:
            time.sleep(0.2 if "://" in place.uri else 0.02)
            if driver.poll() is not None:
                said = _last_line(folder)
                outcome.exits.append({"code": driver.returncode, "said": said, "after_kills": len(outcome.kills)})
                if driver.returncode == 0:
                    break
                if driver.returncode == 2 or len(outcome.exits) > most + 6 or time.monotonic() > until + 600:
                    outcome.problems.append(f"the run never finished: {said}")
                    break
                driver, since = start(folder, address, tagged, place.uri), time.time()
            if len(outcome.kills) >= most or time.monotonic() > until:
                continue
            if time.monotonic() - looked_at > 1:  # before the moment, as it takes some tenths of a second
                victims, looked_at = _victims(tagged, mode, driver, spared), time.monotonic()
            if (stage := place.changed_stage()) is None or not victims or not by.wants(stage):
                continue
            if (hit := by.strike(victims, place, stage, since)) is not None:
                outcome.kills.append(hit | {"at_s": round(time.monotonic() - began, 1)})
                print(f"  {outcome.kills[-1]}", flush=True)
            looked_at = 0.0
    outcome.seconds = time.monotonic() - began
    if orphans := tagged.end_all():
        outcome.problems.append(f"orphans a minute later: {orphans}")
    place.copy_to(folder)
    return outcome


def _victims(tagged: Tagged, mode: str, driver: Driver, spared: int) -> Victims:
    """Return the process ids of each kind that lives."""
    living = [process for process in tagged.all() if process.pid != spared]
    pids = {kind: [process.pid for process in living if tagged.is_of(process, kind)] for kind in {*TITLES, "raylet"}}
    pids |= {"driver": [driver.pid], "gcs": [p.pid for p in living if mode == "local" and tagged.is_of(p, "gcs")]}
    return {(kind, number): pids[kind] for kind, number in KINDS if pids[kind]}


def _last_line(folder: Path) -> str:
    lines = [line for line in (folder / "driver.log").read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


# What must hold


def check(reference: Path, punished: Path, outcome: Outcome) -> None:
    """Add what does not hold to the outcome's problems."""
    check_directory(reference / "run", punished / "run", outcome)
    if not (page := punished / "run" / "report" / "report.html").exists() or "</html>" not in page.read_text():
        outcome.problems.append("no page")
    shown = subprocess.run([*RAYSUBSET, "report", str(punished / "run")], capture_output=True, text=True, check=False)
    if shown.returncode:
        outcome.problems.append(f"`raysubset report` says {shown.stderr.strip()[-200:]}")


def check_directory(a: Path, b: Path, outcome: Outcome) -> None:
    """Add to the outcome's problems what does not hold of a disturbed run's directory b beside the undisturbed a."""
    name = REPORTS[FLAGS["verb"]]
    for path in sorted(a.rglob("*.safetensors")) + sorted(a.rglob("subsets.parquet")):
        other = b / path.relative_to(a)
        if not other.exists():
            outcome.problems.append(f"missing: {path.relative_to(a)}")
        elif other.read_bytes() != path.read_bytes():
            outcome.problems.append(f"other bits: {path.relative_to(a)}")
    if not (b / name).exists():
        outcome.problems.append("no report")
        return
    for report in sorted(a.rglob("report.json")):
        old, new = (json.loads((folder / report.relative_to(a)).read_text()) for folder in (a, b))
        for key in ("test", "validation", "planned_passes"):
            if old[key] != new[key]:
                outcome.problems.append(f"{report.relative_to(a)} differs in {key}")
    old, new = (json.loads((folder / name).read_text()) for folder in (a, b))
    if name != "report.json":
        outcome.problems += [
            f"{name} differs in {path}" for path in _different(_without_costs(old), _without_costs(new))
        ]
    _check_ledgers(a, b, outcome)
    _check_passes(b, new, outcome)


COSTS = {  # and what follows from them: attempts that were lost cost passes
    *("uri", "environment", "config", "seconds", "cost", "mean", "verdicts", "speed_ups", "network", "by_bandwidth"),
    *("sentence", "passes", "critical_path_passes", "num_steps", "num_network_bytes", "storage_reads", "num_lost"),
    *("at_once", "recommendation", "conventional", "is_non_inferior", "digest"),
}


def _without_costs(value: Any) -> Any:
    """Return a record without times, costs and what follows from them."""
    if isinstance(value, dict):
        return {key: _without_costs(v) for key, v in value.items() if key not in COSTS and not key.endswith("_s")}
    return [_without_costs(v) for v in value] if isinstance(value, list) else value


def _different(old: Any, new: Any, path: str = "") -> list[str]:
    """Return the paths at which two records differ."""
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        return [text for key in old for text in _different(old[key], new[key], f"{path}/{key}")]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [text for n, pair in enumerate(zip(old, new, strict=True)) for text in _different(*pair, f"{path}/{n}")]
    return [] if old == new else [f"{path}: {str(old)[:60]}, now {str(new)[:60]}"]


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


Works = dict[tuple[Any, ...], list[dict[str, Any]]]


def _works(run: Path) -> Works:
    """Return all entries of a run's, comparison's or sweep's ledgers by directory, stage, round and subset."""
    works: Works = defaultdict(list)
    for place in sorted({path.parent for name in ("ledger", "ledger.parquet") for path in run.rglob(name)}):
        table, files = place / "ledger.parquet", sorted((place / "ledger").glob("*.json"))
        entries = {}
        for work in [*(pq.read_table(table).to_pylist() if table.exists() else ()), *map(_read_json, files)]:
            entries[work["stage"], work["round"], work["subset"], work["attempt"]] = work
        for work in entries.values():
            works[str(place.relative_to(run)), work["stage"], work["round"], work["subset"]].append(work)
    return works


def _check_ledgers(a: Path, b: Path, outcome: Outcome) -> None:
    if list(b.glob("ledger/*.json")) + list(b.glob("trials/*/ledger/*.json")):
        outcome.problems.append("entries left in ledger/ after compaction")
    old, new = _works(a), _works(b)
    if old.keys() != new.keys():
        outcome.problems.append(f"ledger: pieces differ: {sorted(map(str, old.keys() ^ new.keys()))}")
    steps: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for key, works in new.items():
        stage, ways = key[1], Counter(work["outcome"] for work in works)
        if ways["done"] < 1 or ways["running"]:
            outcome.problems.append(f"ledger: {key} ended {dict(ways)}")
        if ways["done"] > 1:
            outcome.problems.append(f"ledger: {key} was done {ways['done']} times")
        if [work["attempt"] for work in sorted(works, key=lambda w: w["attempt"])] != list(range(len(works))):
            outcome.problems.append(f"ledger: attempts of {key} are not 0 to {len(works) - 1}")
        for name in ("num_steps", "num_backward"):
            planned, made = (sum(work["cost"][name] for work in some) for some in (old.get(key, ()), works))
            if made < planned:
                outcome.problems.append(f"ledger: {key} made {made} {name} of {planned}: work is missing")
            if name != "num_steps":
                continue
            steps[stage][0] += planned
            steps[stage][1] += made
            between = _steps_between_checkpoints(a, key, planned) if planned else 0.0
            if made - planned > (most := (len(works) - 1) * (between + 1)):
                text = f"repeated {made - planned} steps in {len(works)} attempts; most: {most:.0f}"
                outcome.problems.append(f"ledger: {key} {text}")
    outcome.repeated = {stage: round(made / planned - 1, 3) for stage, (planned, made) in steps.items() if planned}


def _steps_between_checkpoints(run: Path, key: tuple[Any, ...], planned: int) -> float:
    """Return the steps of a piece of work between two checkpoints."""
    place, stage, round, subset = key
    record = run / place / (stage if subset is None else f"rounds/{round:04d}/minima/{subset:04d}") / "minimum.json"
    epochs = float(FLAGS.get("minimize.epochs", 8))  # of a minimum that was deleted after its round
    if record.exists():
        epochs = json.loads(record.read_text())["history"][-1]["epoch"]
    return float(FLAGS["actors.checkpoint-epochs"]) * planned / epochs


def _check_passes(run: Path, report: dict[str, Any], outcome: Outcome) -> None:
    """The passes that a report shows are the sum over its ledgers; trunks that a sweep's trials share count once."""
    works, model = _works(run), report.get("model")
    if FLAGS["verb"] == "sweep":
        model = json.loads((run / "trials" / report["trials"][0]["name"] / "report.json").read_text())["model"]
    assert model
    num_train, share = report["data"]["num_train"] if "data" in report else None, model["forward_share"]
    if num_train is None:
        num_train = json.loads(next(run.glob("trials/*/report.json")).read_text())["data"]["num_train"]

    def passes(wanted: Callable[[str, str], bool]) -> float:
        costs = [work["cost"] for (place, stage, *_), some in works.items() if wanted(place, stage) for work in some]
        return sum(share * cost["num_forward"] + (1 - share) * cost["num_backward"] for cost in costs) / num_train

    def expect(name: str, shown: float, counted: float) -> None:
        if abs(shown - counted) > 1e-6:
            outcome.problems.append(f"{name}: {shown} passes, the ledger's sum is {counted}")

    if FLAGS["verb"] == "compare":
        legs = report["legs"]
        for arm in report["arms"]:
            for run_of_arm in (each for point in arm["points"] for each in point["runs"]):
                needed, due = set[str](), [run_of_arm["leg"]]
                while due:
                    needed.add(key := due.pop())
                    due += [each for each in legs[key]["inputs"] if each not in needed]
                counted = passes(lambda place, stage, needed=needed: Path(place).name in needed)
                expect(f"arm {arm['key']}, seed {run_of_arm['seed']}", run_of_arm["passes"], counted)
        return
    for trial in report["trials"] if FLAGS["verb"] == "sweep" else ():
        place = f"trials/{trial['name']}"
        expect(trial["name"], trial["passes"], passes(lambda at, stage, place=place: at == place))
    shown = report["cost"]["passes"]
    if FLAGS["verb"] == "sweep":
        shared = passes(lambda place, stage: place.startswith("trunks/"))
        alone = passes(lambda place, stage: place.startswith("trials/") and stage != "trunk")
        expect("the sweep", shown, shared + alone)
    else:
        expect("the run", shown, passes(lambda place, stage: True))


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill parts of runs at work.")
    parser.add_argument("--verb", choices=REPORTS, default="run", help="what is disturbed")
    parser.add_argument("--out", type=Path, default=Path("/tmp/punished"))
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills-per-run", type=int, default=8)
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="other settings of the runs")
    parser.add_argument("--s3", action="store_true", help="disturbed runs lie on a local S3 server")
    parser.add_argument("--modes", nargs="+", default=["local", "nodes"])
    parser.add_argument("--kinds", nargs="+", default=sorted({kind for kind, _ in KINDS}), help="of victims")
    parser.add_argument("--reference", type=Path, help="of an earlier call by the same version, instead of a new one")
    parser.add_argument("--port", type=int, default=23001, help="of the control store of the cluster of several nodes")
    parser.add_argument("--keep-cluster", type=int, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    FLAGS.update({"verb": options.verb, **ALWAYS, **FLAGS_OF[options.verb]})
    FLAGS.update(text.partition("=")[::2] for text in options.set)
    sys.exit(keep_cluster(options.keep_cluster, 2) if options.keep_cluster else punish(options))


def punish(options: argparse.Namespace) -> int:
    out, attacker, outcomes = options.out.absolute(), Attacker(options.seed), list[Outcome]()
    out.mkdir(parents=True, exist_ok=True)
    reference, tagged, struck = options.reference or out / "reference", Tagged(uuid.uuid4().hex), attacker.struck
    KINDS[:] = [key for key in KINDS if key[0] in options.kinds]
    began = time.monotonic()
    if not options.reference and start(reference, None, tagged).wait():
        print(f"the reference failed: {_last_line(reference)}")
        return 1
    tagged.end_all()
    print(f"reference: {time.monotonic() - began:.0f} s", flush=True)
    until = time.monotonic() + options.minutes * 60
    with bucket("runs/{}") if options.s3 else contextlib.nullcontext(f"{out}/{{}}") as uri:
        while struck.total() < options.kills and time.monotonic() < until:
            number = len(outcomes)
            mode, name = options.modes[number % len(options.modes)], f"punished-{number:02d}"
            print(f"run {number}, {mode}", flush=True)
            most = min(options.kills_per_run, options.kills - struck.total())
            limits = {"most": most, "port": options.port + 10 * number, "until": until}
            outcome = disturbed(out / name, Place(uri.format(name)), mode, attacker, **limits)
            check(reference, out / name, outcome)
            outcomes.append(outcome)
            with (out / "outcomes.jsonl").open("a") as file:
                file.write(json.dumps(vars(outcome)) + "\n")
            text = f"  {outcome.seconds:.0f} s, {len(outcome.kills)} kills, {len(outcome.exits)} drivers, "
            print(f"{text}repeated {outcome.repeated}; problems: {outcome.problems or 'none'}", flush=True)
    good, minutes = [each for each in outcomes if not each.problems], (time.monotonic() - began) / 60
    print(f"\n{struck.total()} kills in {minutes:.0f} minutes; {len(good)} of {len(outcomes)} runs are good")
    print("struck: " + ", ".join(f"{stage} {struck[stage]}" for stage in (*STAGES.values(), BETWEEN)))
    hits = sorted(attacker.hits.items())
    print("victims: " + ", ".join(f"{kind} {signal.Signals(number).name} {num}" for (kind, number), num in hits))
    print(f"kills in runs without a problem: {sum(len(each.kills) for each in good)}")
    return int(len(good) < len(outcomes))


if __name__ == "__main__":
    main()
