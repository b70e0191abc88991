"""`ray job submit` as a user types it: to a head without CPUs and one worker node, with a token, with and without the
package installed there; stopped, then the whole cluster killed, and submitted again each time."""

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
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError

import psutil
import pytest
import torch

import raysubset.cluster  # noqa: F401  before anything imports Ray
from raysubset.cli import call
from raysubset.ledger import Ledger
from raysubset.run_directory import RunDirectory, aggregate_weights_path, minimum_folder, weights_path
from tests.tiny import stored_weights

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(280)]

ROOT = Path(__file__).parents[2]
free_port: Callable[[], int] = runpy.run_path(str(ROOT / "clusters" / "local_autoscaling.py"))["free_port"]
DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # to this machine, whatever proxies are set
AT_HOME = {".git", ".venv", "data", "results", "raysubset.egg-info"}
NUM_SUBSETS = 2
FLAGS = [
    *("--subsets.num", str(NUM_SUBSETS)),
    *("--subsets.size", "200"),
    *("--minimize.epochs", "400"),  # some seconds, so that it can be stopped in the middle
    *("--actors.checkpoint-epochs", "20"),
    *("--fine-tuning.num-workers", "1"),
]


START_S = 90  # for both nodes; alone on two cores it takes 15
LOGS = ["ray_start.log", "gcs_server.out", "raylet.out", "monitor.log", "dashboard*.log", "*_agent.log", "ray_process*"]


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
            "RAY_worker_niceness": "0",
            "RAY_JOB_STOP_WAIT_TIME_S": "60",  # of three by default, which a machine under load may not end within
            "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",  # a job's `python` is the head's
        }

    def start(self) -> None:
        port, until = free_port(), time.monotonic() + START_S
        head = ["--head", f"--port={port}", "--num-cpus=0", f"--ray-client-server-port={free_port()}"]
        dashboard_port = self._dashboard.rpartition(":")[2]
        self._start_node(*head, "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}")
        self._wait_for(1, until)
        # in a folder shared with the head it would delete the working directory under the driver, to unpack it anew
        self._start_node(f"--address=127.0.0.1:{port}", "--num-cpus=2", f"--temp-dir={self.folder / 'worker'}")
        self._wait_for(2, until)

    def _start_node(self, *flags: str) -> None:
        common = ["--block", "--node-ip-address=127.0.0.1", "--num-gpus=0", "--disable-usage-stats"]
        common += [f"--dashboard-agent-listen-port={free_port()}", "--object-store-memory=200000000"]
        common += ["--min-worker-port=0", "--max-worker-port=0"]  # any: Ray's own range is one for all of a machine
        command = [str(self._python), "-m", "ray.scripts.scripts", "start", *flags, *common]
        with (self.folder / "ray_start.log").open("a") as log:
            self._processes.append(psutil.Popen(command, env=self._env, stdout=log, stderr=subprocess.STDOUT))

    def _wait_for(self, num_nodes: int, until: float) -> None:
        answer = "nothing"
        while time.monotonic() < until:
            try:
                answer = f"{self.get('/nodes?view=summary')}"
                if len(self.nodes()) == num_nodes:
                    return
            except (OSError, HTTPException, ValueError) as error:
                answer = f"{error!r} {error.read() if isinstance(error, HTTPError) else ''}"
            time.sleep(0.3)
        what = f"not {num_nodes} node(s) within {START_S} s; the dashboard said last: {answer[:2000]}"
        pytest.fail(f"{what}\n{self._state()}")

    def _state(self) -> str:
        """The processes, and the ends of what they wrote."""
        lines = []
        for process in self._processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                for each in [process, *process.children(recursive=True)]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        lines.append(f"{each.pid} {each.status()} {' '.join(each.cmdline())[:150]}")
        for path in sorted({path for pattern in LOGS for path in self.folder.rglob(pattern)}):
            lines.append(f"--- {path}\n{path.read_text(errors='replace')[-1500:]}")
        return "\n".join(lines)

    def nodes(self) -> list[dict]:
        """Those alive: isHeadNode and nodeId."""
        raylets = [node["raylet"] for node in self.get("/nodes?view=summary")["data"]["summary"]]
        return [raylet for raylet in raylets if raylet.get("state") == "ALIVE"]

    def get(self, path: str, *, method: str = "GET") -> dict:
        """What the dashboard says, as JSON."""
        headers = {"Authorization": f"Bearer {self._token}"}
        request = urllib.request.Request(self._dashboard + path, headers=headers, method=method)
        with DIRECTLY.open(request, timeout=20) as answer:
            return json.load(answer)

    def submit(self, job: str, storage_path: Path, *flags: str, wait: bool = True, checkout: Path = ROOT) -> str:
        """The job's log; with wait, from its beginning to its end."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", self._dashboard]
        command += ["--submission-id", job, *([] if wait else ["--no-wait"]), "--working-dir", "."]
        command += ["--runtime-env", "jobs/runtime_env.yaml", "--", "python", "jobs/subset_pretraining.py"]
        command += ["--name", "run", "--storage-path", str(storage_path), *FLAGS, *flags]
        done = subprocess.run(command, cwd=checkout, env=self._env, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
        return self.log(job)

    def stop(self, job: str) -> str:
        """The log of a job that was stopped, by what `ray job stop` sends once it has started."""
        self.get(f"/api/jobs/{job}/stop", method="POST")
        until = time.monotonic() + 90
        while (status := self.get(f"/api/jobs/{job}")["status"]) == "RUNNING":
            assert time.monotonic() < until, self.log(job)
            time.sleep(0.2)
        assert status == "STOPPED", self.log(job)
        return self.log(job)

    def log(self, job: str) -> str:
        return self.get(f"/api/jobs/{job}/logs")["logs"]

    def kill(self) -> None:
        """End it at once, if it is not dead already."""
        started = set(self._processes)
        for process in self._processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
                started |= set(process.children(recursive=True))
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(started, timeout=20)
        self._processes.clear()

    def end(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


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
        cluster.end()


@pytest.fixture(scope="module")
def bare_cluster(python_without_package: Path) -> Iterator[Cluster]:
    """Its Python has Ray and the package's dependencies, and not the package."""
    with running(python_without_package) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of this repository, with what a user's has beside it."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("raysubset", "jobs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    for name in AT_HOME:
        (folder / name).mkdir()
        (folder / name / "file").write_text("must not travel")
    return folder


@pytest.fixture(scope="module")
def unbroken(
    bare_cluster: Cluster, checkout: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunDirectory, str]:
    """The run that nothing happens to, and its job's log."""
    storage_path = tmp_path_factory.mktemp("unbroken")
    log = bare_cluster.submit("whole", storage_path, "--fine-tuning.epochs", "1", checkout=checkout)
    return RunDirectory(str(storage_path), "run"), log


def checkpoints(run: RunDirectory) -> set[str]:
    """Of subsets."""
    return {path for path in run.list("rounds", recursive=True) if "checkpoint" in path}


def wait_for_a_checkpoint(cluster: Cluster, job: str, run: RunDirectory, *, beside: set[str]) -> None:
    until = time.monotonic() + 120
    while not checkpoints(run) - beside:
        if time.monotonic() > until or "Error" in cluster.log(job):
            pytest.fail(f"no checkpoint was written in time:\n{cluster.log(job)}")
        time.sleep(0.05)


def test_a_checkout_is_all_a_job_needs_and_its_log_ends_with_the_report(
    bare_cluster: Cluster, unbroken: tuple[RunDirectory, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run, log = unbroken
    assert re.findall(r"[\x00-\x08\x0b-\x1f\x7f]", log) == []  # no colours, and nothing that draws over itself
    assert f" report: {run.uri}\n" in log
    capsys.readouterr()
    assert call(["report", run.uri]) == 0
    report = capsys.readouterr().out
    assert "Test accuracy" in report
    assert log.endswith(report)

    packages = list(bare_cluster.folder.glob("**/session_2*/runtime_resources/working_dir_files/_ray_pkg_*/"))
    assert len(packages) == 2  # of the driver's node and the worker's
    for package in packages:
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


def test_the_same_command_goes_on_after_a_stop_and_on_another_cluster_after_the_death_of_the_first(
    bare_cluster: Cluster, unbroken: tuple[RunDirectory, str], tmp_path: Path
) -> None:
    run, flags = RunDirectory(str(tmp_path), "run"), ("--fine-tuning.epochs", "0")
    bare_cluster.submit("stopped", tmp_path, *flags, wait=False)
    wait_for_a_checkpoint(bare_cluster, "stopped", run, beside=set())
    log = bare_cluster.stop("stopped")
    assert log.endswith("raysubset: stopped; what was done is kept, the same command resumes\n")
    assert not run.exists("report.json")

    before = checkpoints(run)
    bare_cluster.submit("killed", tmp_path, *flags, wait=False)
    wait_for_a_checkpoint(bare_cluster, "killed", run, beside=before)
    assert f"going on with {run.uri}" in bare_cluster.log("killed")
    bare_cluster.kill()
    assert not run.exists("report.json")

    with running(Path(sys.executable)) as other:  # which has the package
        log = other.submit("again", tmp_path, *flags)
    assert f"going on with {run.uri}" in log
    works = [work for work in Ledger(run).read() if work.stage == "subsets"]
    assert {"interrupted", "lost", "done"} <= {work.outcome for work in works}
    for path in (*(weights_path(minimum_folder(0, i)) for i in range(NUM_SUBSETS)), aggregate_weights_path(0)):
        a, b = stored_weights(run, path), stored_weights(unbroken[0], path)
        assert all(torch.equal(a[key], b[key]) for key in a), path
