"""The local autoscaling cluster as a user starts it, and jobs as a user submits them: Ray's own autoscaler and job
server, with nodes that are processes of this machine."""

import contextlib
import dataclasses
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

import raysubset.cluster  # noqa: F401  before anything imports Ray
from raysubset.ledger import Ledger, Work
from raysubset.run_directory import RunDirectory
from tests.tiny import stored_weights

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(280)]

ROOT = Path(__file__).parents[2]
free_port: Callable[[], int] = runpy.run_path(str(ROOT / "clusters" / "local_autoscaling.py"))["free_port"]
MOST_WORKERS = 2
NUM_SUBSETS = 4
FLAGS = [
    *("--name", "run"),
    *("--subsets.num", str(NUM_SUBSETS)),
    *("--minimize.epochs", "300"),  # some seconds each, so that a node can die in the middle
    *("--actors.checkpoint-epochs", "20"),
    *("--trunk.epochs", "0"),
    *("--fine-tuning.num-workers", "1"),
]


@dataclasses.dataclass
class LocalCluster:
    """The process of clusters/local_autoscaling.py, and the environment it says to export."""

    process: psutil.Process
    env: dict[str, str]

    def working_dirs(self) -> set[Path]:
        """Where the nodes that ever were, unpacked the jobs' working directories."""
        return set(Path(self.env["RAY_TMPDIR"]).glob("**/session_2*/runtime_resources*/working_dir_files/_ray_pkg_*/"))

    def workers(self) -> list[psutil.Process]:
        """The raylets of worker nodes, oldest first: children of the autoscaler, the head's is not."""
        with contextlib.suppress(psutil.NoSuchProcess):
            found = [p for p in self.process.children(recursive=True) if _name(p) == "raylet"]
            found = [p for p in found if any("monitor.py" in word for word in p.parents()[0].cmdline())]
            return sorted(found, key=lambda p: p.create_time())
        return []

    def wait_for_no_worker(self, timeout_s: float) -> None:
        until = time.monotonic() + timeout_s
        while self.workers():
            assert time.monotonic() < until, "idle nodes did not go"
            time.sleep(0.5)

    def submit(self, storage_path: Path, *flags: str) -> tuple[int, str]:
        """Exit code and log of the job, run to its end by `ray job submit`."""
        command = ["-m", "ray.scripts.scripts", "job", "submit", "--working-dir", "."]
        command += ["--runtime-env", "jobs/runtime_env.yaml", "--", "python", "jobs/subset_pretraining.py"]
        code, said = self.run(*command, "--storage-path", str(storage_path), *FLAGS, *flags)
        return code, "\n".join(line for line in said.splitlines() if "packaging.py" not in line)

    def run(self, *arguments: str) -> tuple[int, str]:
        """Exit code and output of Python in a terminal that the cluster's environment was exported to."""
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=200
        )
        return done.returncode, done.stdout + done.stderr


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.name()
    return ""


@pytest.fixture(scope="module")
def local_cluster() -> Iterator[LocalCluster]:
    folder = tempfile.mkdtemp(prefix="rs", dir="/tmp")  # Ray's sockets need a short path
    env = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_AUTH", "RAY_ADDRESS"))}
    env |= {"RAY_TMPDIR": folder, "TMPDIR": folder}
    env["RAY_health_check_period_ms"] = "1000"  # of 3000 by default: a killed node is missed after five of them
    command = [sys.executable, "clusters/local_autoscaling.py"]
    command += ["--port", str(free_port()), "--dashboard-port", str(free_port())]
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as up:
        process = psutil.Process(up.pid)
        started: set[psutil.Process] = set()
        try:
            assert up.stdout is not None
            lines = iter(up.stdout.readline, "")
            seen = []
            for line in lines:
                seen.append(line)
                if line.startswith("export "):
                    break
            assert seen, "it said nothing"
            assert seen[-1].startswith("export "), "".join(seen)
            exported = dict(word.split("=", 1) for word in shlex.split(seen[-1])[1:])
            yield LocalCluster(process, env | exported)
            started |= set(process.children(recursive=True))
            up.send_signal(signal.SIGINT)  # as a person ends it
            up.wait(timeout=60)
            gone, left = psutil.wait_procs(started, timeout=10)
            assert not left, f"left behind: {left}"
            assert len(gone) == len(started)
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                started |= set(process.children(recursive=True))
            up.kill()
            for child in started:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def meanwhile(look: Callable[[], object], every_s: float = 0.2) -> Iterator[None]:
    """Look again and again while the block runs."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(every_s):
            look()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@dataclasses.dataclass(frozen=True)
class Unbroken:
    """A run that nothing happened to."""

    run: RunDirectory
    log: str
    num_before: int  # worker nodes before it
    num_most: int  # and while it ran
    num_working_dirs: int  # of all its nodes, the head one of them


@pytest.fixture(scope="module")
def unbroken(local_cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    storage_path, nums = tmp_path_factory.mktemp("unbroken"), [0]
    num_before = len(local_cluster.workers())
    with meanwhile(lambda: nums.append(len(local_cluster.workers()))):
        code, log = local_cluster.submit(storage_path, "--fine-tuning.epochs", "1")
    assert code == 0, log
    num_working_dirs = len(local_cluster.working_dirs())
    return Unbroken(RunDirectory(str(storage_path), "run"), log, num_before, max(nums), num_working_dirs)


def subset_works(run: RunDirectory) -> list[Work]:
    return [work for work in Ledger(run).read() if work.stage == "subsets"]


def test_nodes_come_from_none_and_subsets_start_on_the_first_free_slot(unbroken: Unbroken):
    assert unbroken.num_before == 0
    assert 1 <= unbroken.num_most <= MOST_WORKERS
    # in a folder that they share, a new node would delete it under the tasks of the others
    assert unbroken.num_working_dirs > unbroken.num_most
    assert re.search("of 1 CPU (each wait|waits) for a place", unbroken.log)
    # the report is in the job's log, in lines without control characters
    assert "Test accuracy" in unbroken.log
    assert unbroken.run.uri in unbroken.log
    report = unbroken.log[unbroken.log.index("Test accuracy") : unbroken.log.index("only a comparison over budgets")]
    assert "\x1b" not in report
    assert "\r" not in report

    works = subset_works(unbroken.run)
    assert [work.outcome for work in works] == ["done"] * NUM_SUBSETS
    begun = sorted((work.started_at, work.ended_at or 0.0) for work in works)
    for number, (started_at, _) in enumerate(begun):
        at_work = sum(1 for start, end in begun[:number] if end > started_at)
        assert at_work < MOST_WORKERS
    first_end = min(end for _, end in begun)
    later = [started_at for started_at, _ in begun if started_at >= first_end]
    assert len(later) >= NUM_SUBSETS - MOST_WORKERS  # these waited, and then started on a slot that came free
    assert min(later) - first_end < 10


def test_a_node_killed_in_the_middle_costs_time_and_changes_no_bit(
    local_cluster: LocalCluster, unbroken: Unbroken, tmp_path: Path
):
    run, killed = RunDirectory(str(tmp_path), "run"), []

    def kill_once() -> None:
        """The node that came last, once there are checkpoints of two subsets."""
        if (
            not killed
            and len({path.split("/")[3] for path in run.list("rounds", recursive=True) if "check" in path}) > 1
        ):
            killed.append(local_cluster.workers()[-1])
            killed[0].kill()

    with meanwhile(kill_once, every_s=0.05):
        code, log = local_cluster.submit(tmp_path, "--fine-tuning.epochs", "0")
    assert code == 0, log
    assert killed
    assert "starts from its last checkpoint" in log
    outcomes = [work.outcome for work in subset_works(run)]
    assert outcomes.count("done") == NUM_SUBSETS
    assert "lost" in outcomes
    a, b = (stored_weights(r, "rounds/0000/aggregate.safetensors") for r in (unbroken.run, run))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert "Test accuracy" in log


def test_what_no_node_type_offers_is_refused_at_the_start(local_cluster: LocalCluster, tmp_path: Path):
    code, said = local_cluster.run("-m", "raysubset", "run", "--storage-path", str(tmp_path), "--actors.num-gpus", "1")
    assert code == 2
    assert "subset actors ask for 1 CPU + 1 GPU; this cluster can never place that" in said
    assert re.search(r"\d × (cpu\.worker|alive) with 1 CPU", said)


def test_idle_nodes_go_again(local_cluster: LocalCluster, unbroken: Unbroken):
    assert unbroken.num_most > 0
    local_cluster.wait_for_no_worker(timeout_s=60)
