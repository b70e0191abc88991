"""One local Ray cluster for all tests that need one; tests that need none start none."""

import compileall
import gc
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_SCHEDULER_EVENTS="0")
os.environ.update(RAY_worker_niceness="0")  # by default 15: any busy process beside Ray's would starve all workers
os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # a process beside each group of workers; chaos has it
os.environ["OMP_NUM_THREADS"] = "1"  # torch's threads wait for one another: on busy cores two take 4 times as long
os.environ.pop("RAY_ADDRESS", None)
STARTS_RAY = ("tests/cluster/", "tests/gpu/")
LONGEST = ("jobs", "chaos", "streaming", "stages", "sweep", "cli", "nodes", "pool")
LONGEST = tuple(f"tests/cluster/test_{name}.py" for name in LONGEST)
gc.disable()  # a quarter of collecting 4,000 tests, until pytest_collection_finish()
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would children


def pytest_configure(config: pytest.Config) -> None:
    """Compile the package once: where PYTHONDONTWRITEBYTECODE is set, each process that is started would do it."""
    if not hasattr(config, "workerinput"):
        compileall.compile_dir(Path(__file__).parents[1] / "raysubset", quiet=1)


def pytest_collection_finish() -> None:
    """Collect garbage from now on, but none of what is there for good."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need no Ray come first: what they say of Ray holds where none runs, and they fail sooner. Of the
    others the longest files come first, so that two processes with a cluster each end at about the same time."""
    files = [*LONGEST, ""]

    def place(item: pytest.Item) -> tuple[bool, int]:
        path = item.nodeid.partition("::")[0]
        return path.startswith(STARTS_RAY), files.index(path if path in LONGEST else "")

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`pytest -n 3`: files go one by one to who is free. One process takes those that start Ray, and waits most of the
    time; the others take all else meanwhile, then they help with a cluster of their own."""
    from xdist.scheduler import LoadScopeScheduling

    class RayBeside(LoadScopeScheduling):
        with_ray: Any = None  # the process that began with them

        def _split_scope(self, nodeid: str) -> str:
            return nodeid.partition("::")[0]

        def _assign_work_unit(self, node: Any) -> None:
            starts_ray = [file for file in self.workqueue if file.startswith(STARTS_RAY)]
            others = [file for file in self.workqueue if file not in starts_ray]
            if self.with_ray is None and starts_ray and len(self.nodes) > 1:
                self.with_ray = node
            if node is self.with_ray and not starts_ray and len(self.nodes) > 1:
                node.shutdown()  # its Ray is up: what needs none is the others'
                return
            first = starts_ray or others if node is self.with_ray else others or starts_ray
            self.workqueue.move_to_end(first[0], last=False)
            super()._assign_work_unit(node)

    config.option.loadscopereorder = False  # it would begin with the largest
    return RayBeside(config, log)


DATA_ROOT = Path(os.environ.get("RAYSUBSET_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def data_root() -> Path:
    """torchvision's files of MNIST and CIFAR-10."""
    if not DATA_ROOT.is_dir():
        pytest.skip(f"no data sets at {DATA_ROOT}; set RAYSUBSET_DATA to torchvision's root to run this test")
    return DATA_ROOT


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Four logical CPUs, whatever the machine has, and workers that are forked, as in tests/forked_workers.py. run()
    finds the connection and leaves it open."""
    from raysubset.cluster import ray
    from raysubset.cluster.authentication import use_own_token
    from raysubset.cluster.own_node import OwnNode
    from tests.forked_workers import PATHS, warm_process

    use_own_token()
    least = 80 * 2**20  # about what Ray takes: sets larger than it are small
    with warm_process(), OwnNode(num_cpus=4, num_gpus=0, object_store_memory=least, **PATHS) as node:
        ray.init(address=node.address(), log_to_driver=False, logging_level=logging.ERROR)
        yield
        ray.shutdown()


@pytest.fixture
def no_node_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have commands start no node beside their imports, 0.8 s of a CPU each. That one goes with a mistake is seen in
    tests/test_cluster.py, and in tests/test_cli.py where a user's module is imported."""
    monkeypatch.setattr("raysubset.cluster.started_ahead", lambda config: nullcontext())


@pytest.fixture
def prompt_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the driver hear of progress within a tenth of a second: in time to kill who makes it, on any machine."""
    from raysubset.fine_tuning import trainer
    from raysubset.subset_actors import pool

    monkeypatch.setattr(pool, "POLL_S", 0.05)
    monkeypatch.setattr(pool, "WAIT_S", 0.05)
    monkeypatch.setattr(trainer, "LOOK_S", 0.05)


@pytest.fixture(scope="module")
def processes() -> Iterator[Any]:
    """Forked processes in the place of Ray's actors, for what is not about Ray: see tests/processes.py."""
    from tests.processes import install

    with pytest.MonkeyPatch.context() as monkeypatch:
        installed = install(monkeypatch)
        yield installed
        for actor in list(installed.actors):
            installed.kill(actor)
