"""The local autoscaling cluster as a user starts it, and `ray job submit` as a user types it: Ray's own autoscaler and
job server, with a token, nodes that are processes of this machine, and a Python without this package."""

import contextlib
import dataclasses
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

import raysubset.cluster  # noqa: F401  before anything imports Ray
from raysubset.cli import call, run_job
from raysubset.run_directory import RunDirectory, aggregate_weights_path, minimum_folder, weights_path
from raysubset.run_directory.ledger import Ledger, Work
from tests import slow_steps
from tests.tiny import same_bits, stored_weights

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
free_port: Callable[[], int] = runpy.run_path(str(ROOT / "clusters" / "local_autoscaling.py"))["free_port"]
DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # to this machine, whatever proxies are set
AT_HOME = {".git", ".venv", "data", "results", "raysubset.egg-info"}
MOST_WORKERS = 2
NUM_SUBSETS = 4
NUM_EPOCHS, EPOCH_STEPS = 6, 6
FLAGS = [
    *("--name", "run"),
    *("--subsets.num", str(NUM_SUBSETS)),
    *("--minimize.epochs", str(NUM_EPOCHS)),
    *("--actors.checkpoint-epochs", "1"),
    *("--trunk.epochs", "0"),
    *("--fine-tuning.num-workers", "1"),
]


@dataclasses.dataclass
class LocalCluster:
    """The process of clusters/local_autoscaling.py, and the environment it says to export."""

    process: psutil.Process
    env: dict[str, str]

    def working_dirs(self) -> list[Path]:
        """Where the nodes that ever were, unpacked the jobs' working directories."""
        return list(Path(self.env["RAY_TMPDIR"]).glob("**/session_2*/runtime_resources*/working_dir_files/_ray_pkg_*/"))

    def workers(self) -> list[psutil.Process]:
        """The raylets of worker nodes, oldest first: children of the autoscaler, the head's is not."""
        with contextlib.suppress(psutil.NoSuchProcess):
            found = [p for p in self.process.children(recursive=True) if _name(p) == "raylet"]
            found = [p for p in found if any("monitor.py" in word for word in p.parents()[0].cmdline())]
            return sorted(found, key=lambda p: p.create_time())
        return []

    def submit(self, job: str, storage_path: Path, *flags: str, wait: bool = True, checkout: Path) -> str:
        """The log of the job, by `ray job submit`; with wait, from its beginning to its end."""
        command = ["-m", "ray.scripts.scripts", "job", "submit", "--submission-id", job, "--working-dir", "."]
        command += [] if wait else ["--no-wait"]
        command += ["--runtime-env", "jobs/runtime_env.yaml", "--", "python", "jobs/subset_pretraining.py"]
        code, said = self.run(*command, "--storage-path", str(storage_path), *FLAGS, *flags, checkout=checkout)
        assert code == 0, said
        return self.log(job)

    def run(self, *arguments: str, checkout: Path = ROOT) -> tuple[int, str]:
        """Exit code and output of Python in a terminal that the cluster's environment was exported to."""
        done = subprocess.run(
            [sys.executable, *arguments], cwd=checkout, env=self.env, capture_output=True, text=True, timeout=500
        )
        return done.returncode, done.stdout + done.stderr

    def get(self, path: str, *, method: str = "GET") -> dict:
        """What the dashboard says, as JSON."""
        token = Path(self.env["RAY_AUTH_TOKEN_PATH"]).read_text()
        url = self.env["RAY_API_SERVER_ADDRESS"] + path
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"}, method=method)
        with DIRECTLY.open(request, timeout=20) as answer:
            return json.load(answer)

    def log(self, job: str) -> str:
        return self.get(f"/api/jobs/{job}/logs")["logs"]

    def end(self) -> None:
        """As a person does, with Ctrl-C; nothing that it started may live on."""
        started = set(self.process.children(recursive=True))
        self.process.send_signal(signal.SIGINT)
        self.process.wait(timeout=60)
        _, left = psutil.wait_procs(started, timeout=10)
        assert not left, f"left behind: {left}"


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.name()
    return ""


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


@pytest.fixture(scope="module")
def cluster(python_without_package: Path) -> Iterator[LocalCluster]:
    folder = tempfile.mkdtemp(prefix="rs", dir="/tmp")  # Ray's sockets need a short path
    env = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_A", "PYTHONPATH"))}
    env |= {"RAY_TMPDIR": folder, "TMPDIR": folder, slow_steps.FOLDER: folder}
    env["RAY_health_check_period_ms"] = "1000"  # of 3000 by default: a killed node is missed after five of them
    command = [str(python_without_package), "clusters/local_autoscaling.py"]
    command += ["--port", str(free_port()), "--dashboard-port", str(free_port())]
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as up:
        process = psutil.Process(up.pid)
        try:
            assert up.stdout is not None
            seen = []
            for line in iter(up.stdout.readline, ""):
                seen.append(line)
                if line.startswith("export "):
                    break
            assert seen, "it said nothing"
            assert seen[-1].startswith("export "), "".join(seen)
            exported = dict(word.split("=", 1) for word in shlex.split(seen[-1])[1:])
            yield LocalCluster(process, env | exported)
        finally:
            started: set[psutil.Process] = set()
            with contextlib.suppress(psutil.NoSuchProcess):
                started |= set(process.children(recursive=True))
            up.kill()
            for child in started:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of this repository, with what a user's has beside it and the listener to its steps."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("raysubset", "jobs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tests").mkdir()
    for name in ("pyproject.toml", ".gitignore", "tests/__init__.py", "tests/slow_steps.py"):
        shutil.copy(ROOT / name, folder / name)
    for name in AT_HOME:
        (folder / name).mkdir()
        (folder / name / "file").write_text("must not travel")
    return folder


@dataclasses.dataclass(frozen=True)
class Finished:
    """A run that lost a node while its first subsets were at work."""

    run: RunDirectory
    log: str
    num_before: int  # worker nodes before it
    num_most: int  # and while it ran
    working_dirs: list[Path]  # of all its nodes, the head one of them


@pytest.fixture(scope="module")
def finished(cluster: LocalCluster, checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    storage_path, nums = tmp_path_factory.mktemp("finished"), [len(cluster.workers())]
    run, slow = RunDirectory(str(storage_path), "run"), cluster.env[slow_steps.FOLDER]
    flags = ("--fine-tuning.epochs", "1", "--actors.on-step", "tests.slow_steps:listen")
    with ThreadPoolExecutor(1) as thread, contextlib.ExitStack() as at_end:
        at_end.callback(slow_steps.speed_up, slow, "subsets")
        slow_steps.slow_down(slow, "subsets", from_step=EPOCH_STEPS)
        log = thread.submit(cluster.submit, "whole", storage_path, *flags, checkout=checkout)

        def wait(reached: Callable[[], object]) -> None:
            until = time.monotonic() + 400
            while not reached():
                if log.done() or time.monotonic() > until:
                    pytest.fail(f"the point was not reached in time:\n{log.result() if log.done() else 'it goes on'}")
                time.sleep(1.0)  # a look at all processes takes a tenth of a second of a CPU
                nums.append(len(cluster.workers()))

        wait(lambda: len({path.split("/")[3] for path in checkpoints(run)}) > 1)
        node = cluster.workers()[-1]
        for process in (node, *node.children(recursive=True)):
            process.kill()
        wait(lambda: "starts from its last checkpoint" in cluster.log("whole"))
        slow_steps.speed_up(slow, "subsets")
        wait(log.done)
    return Finished(run, log.result(), nums[0], max(nums), cluster.working_dirs())


def subset_works(run: RunDirectory) -> list[Work]:
    return [work for work in Ledger(run).read() if work.stage == "subsets"]


def checkpoints(run: RunDirectory) -> set[str]:
    return {path for path in run.list("rounds", recursive=True) if "check" in path}


def test_nodes_come_from_none_and_subsets_start_on_the_first_free_slot(finished: Finished) -> None:
    assert finished.num_before == 0
    assert 1 <= finished.num_most <= MOST_WORKERS
    # in a folder that they share, a new node would delete it under the tasks of the others
    assert len(finished.working_dirs) > finished.num_most
    assert re.search("of 1 CPU (each wait|waits) to start", finished.log)
    works = subset_works(finished.run)
    begun = sorted((work.started_at, work.ended_at or 0.0) for work in works)
    for number, (started_at, _) in enumerate(begun):
        at_work = sum(1 for start, end in begun[:number] if end > started_at)
        assert at_work < MOST_WORKERS
    first_end = min(work.ended_at or 0.0 for work in works if work.outcome == "done")
    later = [started_at for started_at, _ in begun if started_at >= first_end]
    assert len(later) >= NUM_SUBSETS - MOST_WORKERS  # these waited, and then started on a slot that came free
    assert min(later) - first_end < 10


def test_a_checkout_is_all_a_job_needs_and_its_log_ends_with_the_report(
    cluster: LocalCluster, finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    run, log = finished.run, finished.log
    own = [line for line in log.splitlines() if "(raylet)" not in line]
    # no colours, nothing that draws over itself
    assert not any(re.search(r"[\x00-\x08\x0b-\x1f\x7f]", line) for line in own)
    assert f" report: {run.uri}\n" in log
    capsys.readouterr()
    assert call(["report", run.uri]) == 0
    report = capsys.readouterr().out
    assert "Test accuracy" in report
    assert log.endswith(report)
    for package in finished.working_dirs:
        travelled = {path.name for path in package.iterdir()}
        assert {"raysubset", "jobs", "pyproject.toml"} <= travelled
        assert not travelled & AT_HOME

    # the driver is on the head, which has nothing to give: all work was elsewhere
    nodes = [node["raylet"] for node in cluster.get("/nodes?view=summary")["data"]["summary"]]
    (head,) = (node["nodeId"] for node in nodes if node["isHeadNode"])
    assert cluster.get("/api/jobs/whole")["driver_node_id"] == head
    actors = cluster.get("/api/v0/actors?limit=1000")["data"]["result"]["result"]
    places = {actor["node_id"] for actor in actors if actor["class_name"] == "SubsetActor"}
    assert places
    assert head not in places


def test_what_no_node_type_offers_is_refused_at_the_start(cluster: LocalCluster, tmp_path: Path) -> None:
    code, said = cluster.run("-m", "raysubset", "run", "--storage-path", str(tmp_path), "--actors.num-gpus", "1")
    assert code == 2
    assert "ask for 1 CPU + 1 GPU; this cluster can never place that" in said
    assert re.search(r"\d × (cpu\.worker|alive) with 1 CPU", said)


def test_idle_nodes_go_again(cluster: LocalCluster, finished: Finished) -> None:
    until = time.monotonic() + 60
    while cluster.workers():
        assert time.monotonic() < until, "idle nodes did not go"
        time.sleep(0.5)


@pytest.mark.usefixtures("ray_cluster")
def test_the_death_of_a_node_and_the_end_of_the_cluster_cost_time_and_change_no_bit(
    cluster: LocalCluster, finished: Finished, checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended, undisturbed = (RunDirectory(str(tmp_path / name), "run") for name in ("ended", "undisturbed"))
    flags = ("--fine-tuning.epochs", "0", "--actors.on-step", "tests.slow_steps:listen")
    slow_steps.slow_down(cluster.env[slow_steps.FOLDER], "subsets", from_step=EPOCH_STEPS)  # until the cluster's end
    cluster.submit("ended", tmp_path / "ended", *flags, wait=False, checkout=checkout)
    until = time.monotonic() + 400
    while not checkpoints(ended):
        if time.monotonic() > until or cluster.get("/api/jobs/ended")["status"] == "FAILED":
            pytest.fail(f"the point was not reached in time:\n{cluster.log('ended')}")
        time.sleep(0.5)  # steps are slow, and the job server takes a while of a CPU to answer
    cluster.end()
    assert not ended.exists("report.json")

    defaults = runpy.run_path(str(ROOT / "jobs" / "subset_pretraining.py"))["CONFIG"]
    for run in (ended, undisturbed):  # on the session's Ray
        assert run_job(["--storage-path", run.storage_path, *FLAGS, *flags], default=defaults) == 0
        assert (f"resuming {run.uri}" in capsys.readouterr().err) == (run is ended)
    # nodes that Ctrl-C ends may leave their actors the time for a checkpoint
    for run, cut_off in ((ended, {"lost", "preempted"}), (finished.run, {"lost"})):
        outcomes = [work.outcome for work in subset_works(run)]
        assert outcomes.count("done") == NUM_SUBSETS
        assert (others := {*outcomes} - {"done"})
        assert others <= cut_off
        for path in (*(weights_path(minimum_folder(0, i)) for i in range(NUM_SUBSETS)), aggregate_weights_path(0)):
            assert same_bits(stored_weights(run, path), stored_weights(undisturbed, path)), path
