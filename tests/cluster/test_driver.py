"""Two drivers of one run, in processes of their own; tests/cluster/test_chaos.py kills them."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from raysubset.run_directory import RunDirectory

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(280)]

FLAGS = [
    *("--name", "run"),
    *("--subsets.num", "2"),
    *("--minimize.epochs", "150"),
    *("--trunk.epochs", "0"),
    *("--fine-tuning.epochs", "30"),
    *("--fine-tuning.num-workers", "1"),
    *("--cluster.num-cpus", "2"),
]


@contextlib.contextmanager
def driver(storage_path: Path) -> Iterator[subprocess.Popen[str]]:
    """`raysubset run`, with everything it started ended at the end."""
    command = [sys.executable, "-m", "raysubset", "run", "--storage-path", str(storage_path), *FLAGS]
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    started: set[psutil.Process] = set()
    try:
        yield process
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            started |= set(psutil.Process(process.pid).children(recursive=True))
        process.kill()
        process.wait()
        for child in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def test_a_second_driver_of_the_same_name_is_refused(tmp_path: Path) -> None:
    directory = RunDirectory(str(tmp_path), "run")
    with driver(tmp_path) as first:
        until = time.monotonic() + 60
        while not directory.exists("lease.json"):
            assert time.monotonic() < until
            time.sleep(0.05)
        with driver(tmp_path) as second:
            output, _ = second.communicate(timeout=60)
        assert second.returncode == 2
        assert f"is being written by process {first.pid}" in output
