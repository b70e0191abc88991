"""`ray job submit` as a user types it: to a head without CPUs and one worker node, with a token, with and without the
package installed there; stopped, or the whole cluster killed, and submitted again."""

import contextlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

import raysubset.cluster  # noqa: F401  before anything imports Ray
from raysubset.cli import call
from raysubset.ledger import Ledger
from raysubset.run_directory import RunDirectory, weights_path

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(280)]

ROOT = Path(__file__).parents[2]
free_port: Callable[[], int] = runpy.run_path(str(ROOT / "clusters" / "local_autoscaling.py"))["free_port"]
AT_HOME = {".git", ".venv", "data", "results", "raysubset.egg-info"}
NUM_SUBSETS = 2
FLAGS = ["--subsets.num", str(NUM_SUBSETS), "--fine-tuning.num-workers", "1"]
LONG = [
    *FLAGS,
    *("--subsets.size", "200"),
    *("--minimize.epochs", "400"),  # some seconds, so that it can be stopped in the middle
    *("--actors.checkpoint-epochs", "20"),
    *("--trunk.epochs", "0"),
    *("--fine-tuning.epochs", "0"),
]


class Cluster:
    """A head that takes no work and a worker node of two CPUs, on loopback; killed at the end with all they started."""

    def __init__(self, python: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="rs", dir="/tmp"))  # Ray's sockets need a short path
        self._python = python
        self._token = os.urandom(32).hex()
        self._dashboard = f"http://127.0.0.1:{free_port()}"
        self._processes: list[psutil.Popen] = []
        token_path = self.folder / "token"
        token_path.write_text(self._token)
        self._env = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTHONPATH"))} | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token_path),
            "RAY_TMPDIR": str(self.folder),
            "RAY_JOB_STOP_WAIT_TIME_S": "60",  # of three by default, which a machine under load may not end within
            "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",  # a job's `python` is the head's
        }

    def start(self) -> None:
        port = free_port()
        head = ["--head", f"--port={port}", "--num-cpus=0", f"--ray-client-server-port={free_port()}"]
        dashboard_port = self._dashboard.rpartition(":")[2]
        self._start_node(*head, "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}")
        self._wait_for(lambda nodes: len(nodes) == 1)
        self._start_node(f"--address=127.0.0.1:{port}", "--num-cpus=2")
        self._wait_for(lambda nodes: len(nodes) == 2)

    def _start_node(self, *flags: str) -> None:
        common = ["--block", "--node-ip-address=127.0.0.1", "--num-gpus=0", "--disable-usage-stats"]
        common += [f"--dashboard-agent-listen-port={free_port()}", "--object-store-memory=200000000"]
        common += ["--min-worker-port=0", "--max-worker-port=0"]  # any: Ray's own range is one for all of a machine
        command = [str(self._python), "-m", "ray.scripts.scripts", "start", *flags, *common]
        with (self.folder / "ray_start.log").open("a") as log:
            self._processes.append(psutil.Popen(command, env=self._env, stdout=log, stderr=subprocess.STDOUT))

    def _wait_for(self, reached: Callable[[list[dict]], bool]) -> None:
        until = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                if reached(self.nodes()):
                    return
            in_time = time.monotonic() < until and all(process.is_running() for process in self._processes)
            assert in_time, (self.folder / "ray_start.log").read_text()[-3000:]
            time.sleep(0.3)

    def nodes(self) -> list[dict]:
        """Those alive: isHeadNode and nodeId."""
        raylets = [node["raylet"] for node in self.get("/nodes?view=summary")["data"]["summary"]]
        return [raylet for raylet in raylets if raylet.get("state") == "ALIVE"]

    def get(self, path: str) -> dict:
        """What the dashboard says, as JSON."""
        request = urllib.request.Request(self._dashboard + path, headers={"Authorization": f"Bearer {self._token}"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)

    def ray_job(self, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        verb, *rest = arguments
        command = [sys.executable, "-m", "ray.scripts.scripts", "job", verb, "--address", self._dashboard, *rest]
        return subprocess.run(command, cwd=cwd, env=self._env, capture_output=True, text=True, timeout=200)

    def submit(self, job: str, storage_path: Path, *flags: str, wait: bool = True, checkout: Path = ROOT) -> str:
        """The job's log; with wait, from its beginning to its end."""
        command = ["--submission-id", job, *([] if wait else ["--no-wait"]), "--working-dir", "."]
        command += ["--runtime-env", "jobs/runtime_env.yaml", "--", "python", "jobs/subset_pretraining.py"]
        done = self.ray_job(
            "submit", *command, "--name", "run", "--storage-path", str(storage_path), *flags, cwd=checkout
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return self.log(job)

    def log(self, job: str) -> str:
        return self.get(f"/api/jobs/{job}/logs")["logs"]

    def kill(self) -> None:
        started = set(self._processes)
        for process in self._processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
                started |= set(process.children(recursive=True))
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(started, timeout=20)


@pytest.fixture(scope="module")
def python_without_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with all that this one has but raysubset."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, symlinks=True)
    (target,) = (folder / "lib").glob("python3*/site-packages")
    (source,) = (Path(sys.prefix) / "lib").glob("python3*/site-packages")
    for entry in source.iterdir():
        if not entry.name.startswith(("raysubset", "__editable__")):
            (target / entry.name).symlink_to(entry)
    python = folder / "bin" / "python"
    tried = subprocess.run([python, "-I", "-c", "import raysubset"], capture_output=True, text=True, cwd=folder)
    assert "No module named 'raysubset'" in tried.stderr
    return python


@contextlib.contextmanager
def running(python: Path) -> Iterator[Cluster]:
    cluster = Cluster(python)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.kill()
        shutil.rmtree(cluster.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def bare_cluster(python_without_package: Path) -> Iterator[Cluster]:
    """Its Python has Ray and the package's dependencies, and not the package."""
    with running(python_without_package) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def unbroken(bare_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The long run that nothing happens to."""
    storage_path = tmp_path_factory.mktemp("unbroken")
    bare_cluster.submit("unbroken", storage_path, *LONG)
    return RunDirectory(str(storage_path), "run")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Of this repository, with what a user's has beside it."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("raysubset", "jobs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    for name in AT_HOME:
        (folder / name).mkdir()
        (folder / name / "file").write_text("must not travel")
    return folder


def wait_for_checkpoints(cluster: Cluster, job: str, run: RunDirectory) -> None:
    until = time.monotonic() + 120
    while not any("checkpoint" in path for path in run.list("rounds", recursive=True)):
        if time.monotonic() > until or "Error" in cluster.log(job):
            pytest.fail(f"no checkpoint was written in time:\n{cluster.log(job)}")
        time.sleep(0.05)


def assert_same_minima(run: RunDirectory, other: RunDirectory) -> None:
    for path in (*(weights_path(f"rounds/0000/minima/{i:04d}") for i in range(NUM_SUBSETS)), "model.safetensors"):
        a, b = run.read_weights(path), other.read_weights(path)
        assert all(torch.equal(a[key], b[key]) for key in a), path


def test_a_checkout_is_all_a_job_needs_and_its_log_ends_with_the_report(
    bare_cluster: Cluster, checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = bare_cluster.submit("whole", tmp_path, *FLAGS, "--minimize.epochs", "2", checkout=checkout)
    run = RunDirectory(str(tmp_path), "run")
    assert re.findall(r"[\x00-\x08\x0b-\x1f\x7f]", log) == []  # no colours, and nothing that draws over itself
    assert f" report: {run.uri}\n" in log
    capsys.readouterr()
    assert call(["report", run.uri]) == 0
    report = capsys.readouterr().out
    assert "Test accuracy" in report
    assert log.endswith(report)

    (package,) = bare_cluster.folder.glob("ray/session_2*/runtime_resources/working_dir_files/_ray_pkg_*/")
    travelled = {path.name for path in package.iterdir()}
    assert {"raysubset", "jobs", "pyproject.toml"} <= travelled
    assert not travelled & AT_HOME

    # the driver is on the head, which has nothing to give; all training was on the worker node
    (head,) = (node for node in bare_cluster.nodes() if node["isHeadNode"])
    job = bare_cluster.get("/api/jobs/whole")
    assert job["driver_node_id"] == head["nodeId"]
    trained = [work for work in Ledger(run).read() if work.stage in ("trunk", "subsets", "fine_tuning")]
    assert len(trained) == 2 + NUM_SUBSETS
    assert head["nodeId"] not in {work.node for work in trained}


def test_a_stopped_job_goes_on_with_the_same_command(
    bare_cluster: Cluster, unbroken: RunDirectory, tmp_path: Path
) -> None:
    run = RunDirectory(str(tmp_path), "run")
    bare_cluster.submit("stopped", tmp_path, *LONG, wait=False)
    wait_for_checkpoints(bare_cluster, "stopped", run)
    stopped = bare_cluster.ray_job("stop", "stopped")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    log = bare_cluster.log("stopped")
    assert log.endswith("raysubset: stopped; what was done is kept, the same command goes on\n")
    assert not run.exists("report.json")

    log = bare_cluster.submit("again", tmp_path, *LONG)
    assert f"going on with {run.uri}" in log
    works = [work for work in Ledger(run).read() if work.stage == "subsets"]
    assert "interrupted" in {work.outcome for work in works}
    assert_same_minima(run, unbroken)


def test_when_the_whole_cluster_is_killed_the_same_job_goes_on_on_another_that_has_the_package(
    unbroken: RunDirectory, python_without_package: Path, tmp_path: Path
) -> None:
    run = RunDirectory(str(tmp_path), "run")
    with running(python_without_package) as first:
        first.submit("killed", tmp_path, *LONG, wait=False)
        wait_for_checkpoints(first, "killed", run)
    assert not run.exists("report.json")

    with running(Path(sys.executable)) as second:
        log = second.submit("again", tmp_path, *LONG)
    assert f"going on with {run.uri}" in log
    assert "lost" in {work.outcome for work in Ledger(run).read()}
    assert_same_minima(run, unbroken)
