"""The pool on Ray's own actors: what becomes of a stopped one, and of those that cannot start."""

import contextlib
import os
import re
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from raysubset import Config
from raysubset.cluster import put_once
from raysubset.data import load_full_set
from raysubset.events import Event, Note, Retry
from raysubset.run_directory import RunDirectory
from raysubset.run_directory.ledger import Ledger
from raysubset.subset_actors import ActorPool, Pack, SubsetFailed
from raysubset.work import Piece, Run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600), pytest.mark.usefixtures("ray_cluster", "prompt_reports")]


class StopsOnce(RunDirectory):
    """A run directory whose first checkpoint stops the process that has written it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return StopsOnce, (self.storage_path, self.name)

    def write_checkpoint(self, path: str, state: Mapping[str, Any], **options: bool) -> str:
        seal = super().write_checkpoint(path, state, **options)
        pid_path = Path(self.storage_path, "pid")
        if not pid_path.exists():
            pid_path.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        return seal


def test_a_stopped_actor_is_told_of_killed_and_its_piece_goes_on_elsewhere(tmp_path: Path) -> None:
    overrides = {"minimize.epochs": 3.0, "actors.max_attempts": 2, "model.width": 4, "actors.stall_s": 2.0}
    config, events = Config(name="run", storage_path=str(tmp_path)).with_overrides(overrides), list[Event]()
    full_set, directory = load_full_set(config.data), StopsOnce(str(tmp_path), "run")
    with ActorPool(Run(config, directory, full_set, put_once(full_set), events.append), num_gpus=0.0) as pool:
        piece = Piece(config, directory, "subsets", subset_id=0, indices=np.arange(200))
        ((_, record),) = pool.run([Pack((piece,))])
    *lost, done = Ledger(RunDirectory(str(tmp_path), "run")).read()
    assert record["attempt"] == done.attempt == len(lost) >= 1  # on a busy machine the next may seem to stand still too
    assert {work.outcome for work in lost} == {"lost"}
    assert sum(work.cost.num_backward for work in [*lost, done]) == 3 * 200
    warning = next(event.text for event in events if isinstance(event, Note) and event.is_warning)
    assert re.match(r"subset 0 on node [\d.]+ stands still: no step for \d+ s.*--actors.stall-s", warning)
    retry = next(event.text for event in events if isinstance(event, Retry))
    assert "TimeoutError: no step for" in retry
    pid, until = int((tmp_path / "pid").read_text()), time.monotonic() + 10
    while _lives(pid):
        assert time.monotonic() < until, "a stopped process needs SIGKILL"
        time.sleep(0.1)


def _lives(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def refuse_to_be_read(folder: str) -> None:
    with (Path(folder) / "starts").open("a") as file:
        file.write(".")
    raise ImportError("no module of that name on this node")


class Unreadable(list[Any]):
    """A reference that no actor can unpickle."""

    def __reduce__(self) -> tuple[Any, ...]:
        return refuse_to_be_read, (self[0],)


def test_actors_that_fail_together_as_they_start_count_once_and_the_cause_is_told(tmp_path: Path) -> None:
    config = Config(name="run", storage_path=str(tmp_path)).with_overrides({"actors.max_attempts": 2})
    directory = RunDirectory(str(tmp_path), "run")
    opened = Run(config, directory, load_full_set(config.data), Unreadable([str(tmp_path)]), print)
    packs = [Pack((Piece(config, directory, "subsets", subset_id=i),)) for i in range(2)]
    told = r"actors do not come up: .*no module of that name on this node"
    with pytest.raises(SubsetFailed, match=told), ActorPool(opened, num_gpus=0.0) as pool:
        list(pool.run(packs))
    assert len((tmp_path / "starts").read_text()) > 2
