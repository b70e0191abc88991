"""The commands as a user types them; those that start Ray in a process of their own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from raysubset import load_model
from raysubset.cli import call
from raysubset.run_directory import RunDirectory, aggregate_weights_path, weights_path
from tests import slow_steps
from tests.tiny import same_bits, stored_weights

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

NUM_EPOCHS = 4
FLAGS = [
    "--name",
    "run",
    "--subsets.num",
    "2",
    "--minimize.epochs",
    str(NUM_EPOCHS),
    "--fine-tuning.epochs",
    "1",
    "--fine-tuning.num-workers",
    "1",
    "--cluster.num-cpus",
    "2",
    "--actors.max-num",
    "1",
    "--actors.on-step",
    "tests.slow_steps:listen",
]


@contextlib.contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`raysubset …` in a session of its own, as a terminal would start it; ended with all it started."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
    command = [sys.executable, "-m", "raysubset", *arguments]
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    children: set[psutil.Process] = set()
    try:
        yield process
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            children |= set(psutil.Process(process.pid).children(recursive=True))
        process.kill()
        process.wait()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


@pytest.mark.usefixtures("ray_cluster")
def test_doctor_looks_at_a_cluster_and_times_an_actor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = call(["doctor", "--storage-path", str(tmp_path), *FLAGS])
    out = capsys.readouterr().out
    assert code == 0, out
    assert "fit on the current nodes" in out
    assert "examples/s" in out


@pytest.mark.parametrize("until", ["gcs_server", "raylet"])  # its node comes up, and is up
def test_a_driver_that_is_killed_takes_its_node_with_it(tmp_path: Path, until: str) -> None:
    with started("run", "--storage-path", str(tmp_path), *FLAGS) as process:
        ends_at, processes = time.monotonic() + 120, list[psutil.Process]()
        while not any(until in word for child in processes for word in _command(child)[:1]):
            assert time.monotonic() < ends_at
            assert process.poll() is None
            processes = psutil.Process(process.pid).children(recursive=True)
            time.sleep(0.05)
        process.kill()
        assert psutil.wait_procs(processes, timeout=60)[1] == []


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


@pytest.mark.usefixtures("ray_cluster")
def test_ctrl_c_stops_cleanly_the_same_command_resumes_to_the_same_bits_and_the_run_is_there_for_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--storage-path", str(tmp_path), *FLAGS]
    run = RunDirectory(str(tmp_path), "run")
    monkeypatch.setenv(slow_steps.FOLDER, str(tmp_path))
    slow_steps.slow_down(tmp_path, "subsets", from_step=11)
    with started("run", *flags) as process:
        until = time.monotonic() + 120
        while not any("checkpoint" in path for path in run.list("rounds", recursive=True)):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < until, "no checkpoint was written in time"
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert psutil.wait_procs(children, timeout=60)[1] == []
    slow_steps.speed_up(tmp_path, "subsets")
    assert process.returncode == 130, err
    assert out == ""
    assert "trunk: 1 epoch on 1294 examples" in err
    last = err.splitlines()[-1]
    assert last.startswith("raysubset: stopped; finished work is kept")
    assert f"raysubset run --storage-path {tmp_path} --name run" in last
    assert "Traceback" not in err
    assert call(["report", run.uri]) == 2
    assert "is not finished" in capsys.readouterr().err

    with started("run", *flags) as process:
        out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert f"resuming {run.uri}" in err
    for told in ("Test accuracy", "subsets, mean of 2", "fine_tuning", "raysubset run --method conventional"):
        assert told in out.replace("--name run-conventional ", "").replace(f"--storage-path {tmp_path} ", "")
    assert run.exists("progress.csv")
    # nothing that was trained was trained again: the trunk and two minima have one finished attempt each
    works = run.read_table("ledger.parquet").to_pylist()
    assert [w["outcome"] for w in works if w["stage"] == "trunk"] == ["done"]
    subsets = [w for w in works if w["stage"] == "subsets"]
    assert sorted(w["subset"] for w in subsets if w["outcome"] == "done") == [0, 1]
    assert "interrupted" in {w["outcome"] for w in subsets}
    trained = sum(w["cost"]["num_steps"] for w in subsets)
    assert trained == 2 * NUM_EPOCHS * 11  # 647 examples in batches of 64

    undisturbed = RunDirectory(str(tmp_path / "undisturbed"), "run")
    assert call(["run", "--storage-path", undisturbed.storage_path, *FLAGS]) == 0  # on the session's Ray
    for path in (aggregate_weights_path(0), weights_path("fine_tuning")):
        assert same_bits(stored_weights(run, path), stored_weights(undisturbed, path))
    capsys.readouterr()

    before = {path: run.read_bytes(path) for path in ("report.json", "model.safetensors")}
    assert call(["run", *flags]) == 0  # in this process, as a finished run needs no Ray
    again = capsys.readouterr()
    assert "is finished" in again.err
    assert again.out == out
    assert before == {path: run.read_bytes(path) for path in before}

    assert call(["report", run.uri, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == run.read_json("report.json")

    model = load_model(run.uri)
    assert model(torch.zeros(3, 1, 8, 8, dtype=torch.uint8)).shape == (3, 10)

    assert call(["run", *flags, "--minimize.epochs", "2"]) == 2
    assert f"minimize.epochs: {NUM_EPOCHS}.0 → 2.0" in capsys.readouterr().err
