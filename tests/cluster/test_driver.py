"""The driver killed at any time, and run again: in processes of their own, each with a Ray of its own."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from raysubset.ledger import Ledger
from raysubset.run_directory import RunDirectory, weights_path
from tests.tiny import stored_weights

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


def finish(storage_path: Path) -> str:
    with driver(storage_path) as process:
        output, _ = process.communicate(timeout=150)
        assert process.returncode == 0, output
    return output


def kill_when(storage_path: Path, reached: Callable[[RunDirectory], object]) -> None:
    """Start the driver, and kill it and its Ray as soon as the run directory shows that a point is reached."""
    directory = RunDirectory(str(storage_path), "run")
    with driver(storage_path) as process:
        until = time.monotonic() + 120
        while not reached(directory):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < until, "the point was not reached in time"
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGSTOP)  # nothing more happens while its children are listed


def test_a_driver_killed_within_and_between_stages_is_resumed_to_the_same_bits(tmp_path: Path) -> None:
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    finish(unbroken)

    def in_mid_subset(run: RunDirectory) -> bool:
        return any("checkpoint" in path for path in run.list("rounds", recursive=True))

    def between_stages(run: RunDirectory) -> bool:
        return run.exists("rounds/0000/minima/0000/minimum.json")

    def in_mid_fine_tuning(run: RunDirectory) -> bool:
        history = run.read_json_or_none("fine_tuning/history.json")
        return history is not None and len(history) >= 3

    for point in (in_mid_subset, between_stages, in_mid_fine_tuning):
        kill_when(broken, point)
    output = finish(broken)
    assert "going on with" in output

    runs = [RunDirectory(str(path), "run") for path in (unbroken, broken)]
    for path in (weights_path("rounds/0000/minima/0001"), "rounds/0000/aggregate.safetensors", "model.safetensors"):
        a, b = (stored_weights(run, path) for run in runs)
        assert all(torch.equal(a[key], b[key]) for key in a), path
    reports = [run.read_json("report.json") for run in runs]
    assert reports[0]["test"] == reports[1]["test"]
    assert reports[1]["cost"]["passes"] >= reports[0]["cost"]["passes"]
    assert {work.outcome for work in Ledger(runs[1]).read()} >= {"lost", "done"}


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
