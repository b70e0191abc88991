"""The pool of actors by itself, on storage that fails them or ends their processes at chosen moments."""

import errno
import itertools
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysubset import Config
from raysubset.cluster import put_once
from raysubset.data import load_full_set
from raysubset.events import Event, Note, Progress, Retry
from raysubset.run_directory import RunDirectory
from raysubset.run_directory.ledger import Ledger
from raysubset.subset_actors import ActorPool, Pack, SubsetFailed
from raysubset.work import TEST_PATH, Piece, Run, TestPiece
from tests.endless import NUM_STEPS

pytestmark = pytest.mark.usefixtures("processes")


class Storage(RunDirectory):
    """A run directory that acts before and after an actor writes a file; not where the driver does."""

    def __init__(
        self, storage_path: str, name: str, act: "Callable[[Storage, str, str], None]", *, of_actor: bool = False
    ) -> None:
        super().__init__(storage_path, name)
        self.act, self.of_actor = act, of_actor

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(Storage, of_actor=True), (self.storage_path, self.name, self.act)

    def write_bytes(self, path: str, data: bytes | bytearray | memoryview, **options: bool) -> None:
        if self.of_actor:
            self.act(self, "before", path)
        super().write_bytes(path, data, **options)
        if self.of_actor:
            self.act(self, "after", path)

    def write_checkpoint(self, path: str, state: Mapping[str, Any], **options: bool) -> str:
        if self.of_actor:
            self.act(self, "before", path)
        seal = super().write_checkpoint(path, state, **options)
        if self.of_actor:
            self.act(self, "after", path)
        return seal

    def count(self, what: str) -> int:
        """How often this was called for the same, whatever process did."""
        with (Path(self.storage_path) / what).open("a") as file:
            file.write(".")
            return file.tell()


def die_once_the_minimum_is_there(storage: Storage, when: str, path: str) -> None:
    if when == "after" and path.endswith("minimum.json"):
        os._exit(1)


def die_after_two_checkpoints(storage: Storage, when: str, path: str) -> None:
    if when == "after" and "checkpoint-" in path and storage.count("deaths") <= 2:
        os._exit(1)


def die_after_five_checkpoints(storage: Storage, when: str, path: str) -> None:
    if when == "after" and "checkpoint-" in path and storage.count("deaths") <= 5:
        with (Path(storage.storage_path) / "left").open("a") as file:
            print(*(name for name in storage.list(os.path.dirname(path)) if "checkpoint-" in name), file=file)
        os._exit(1)


def die_before_each_checkpoint(storage: Storage, when: str, path: str) -> None:
    if when == "before" and "checkpoint-" in path:
        os._exit(1)


def fail_one_checkpoint(storage: Storage, when: str, path: str) -> None:
    if when == "before" and "checkpoint-" in path and storage.count("failures") <= 1:
        raise OSError("the storage does not answer")


def fail_all_checkpoints(storage: Storage, when: str, path: str) -> None:
    if when == "before" and "checkpoint-" in path:
        raise OSError("the disk is full")


def fill_the_disk(storage: Storage, when: str, path: str) -> None:
    if when == "before" and "checkpoint-" in path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def die_once_in_a_test(storage: Storage, when: str, path: str) -> None:
    if when == "before" and path == TEST_PATH and storage.count("deaths") <= 1:
        os._exit(1)


def do_nothing(storage: Storage, when: str, path: str) -> None:
    pass


def do(
    folder: Path,
    act: Callable[[Storage, str, str], None],
    *,
    overrides: dict[str, Any] | None = None,
    events: list[Event] | None = None,
) -> tuple[list[Any], list[Event]]:
    """One subset of 200 examples by one actor; its results, and what was told."""
    config = Config(name="run", storage_path=str(folder)).with_overrides(
        {"minimize.epochs": 3.0, "actors.max_attempts": 2, "model.width": 4, **(overrides or {})}
    )
    events = [] if events is None else events
    full_set = load_full_set(config.data)
    opened = Run(config, Storage(str(folder), "run", act), full_set, put_once(full_set), events.append)
    with ActorPool(opened, num_gpus=0.0) as pool:
        piece = Piece(config, opened.directory, "subsets", subset_id=0, indices=np.arange(200))
        results = list(pool.run([Pack((piece,))]))
        if act is die_once_in_a_test:
            results = list(pool.run([Pack((TestPiece(config, piece.output, "test"),))]))
        return results, events


def outcomes(folder: Path) -> list[str]:
    return [work.outcome for work in Ledger(RunDirectory(str(folder), "run")).read()]


def test_a_minimum_whose_actor_died_after_leaving_it_is_not_made_again(tmp_path: Path) -> None:
    ((piece, record),), _ = do(tmp_path, die_once_the_minimum_is_there)
    assert (piece.subset_id, record["attempt"]) == (0, 0)
    assert outcomes(tmp_path) == ["done"]  # and its cost is counted
    assert Ledger(RunDirectory(str(tmp_path), "run")).read()[0].cost.num_backward == 3 * 200


def test_attempts_that_leave_further_checkpoints_are_not_counted(tmp_path: Path) -> None:
    ((_, record),), events = do(tmp_path, die_after_two_checkpoints)  # with max_attempts=2
    assert record["attempt"] == 2
    assert outcomes(tmp_path) == ["lost", "lost", "done"]
    assert len([event for event in events if isinstance(event, Retry)]) == 2
    works = Ledger(RunDirectory(str(tmp_path), "run")).read()
    assert sum(work.cost.num_backward for work in works) == 3 * 200  # what checkpoints hold is counted, once


def test_only_the_checkpoint_that_an_attempt_resumed_from_stays_beside_its_own(tmp_path: Path) -> None:
    """Else the tenth attempt at a large network would read ten of them."""
    do(tmp_path, die_after_five_checkpoints, overrides={"minimize.epochs": 7.0})
    lefts = [line.split() for line in (tmp_path / "left").read_text().splitlines()]
    paths = [f"rounds/0000/minima/0000/checkpoint-{attempt:02d}.pt" for attempt in range(5)]
    assert lefts == [paths[:1], paths[0:2], paths[1:3], paths[2:4], paths[3:5]]


def test_attempts_that_leave_no_checkpoint_are_counted_and_so_is_their_work(tmp_path: Path) -> None:
    with pytest.raises(SubsetFailed, match="lost 2 times in a row"):
        do(tmp_path, die_before_each_checkpoint)
    works = Ledger(RunDirectory(str(tmp_path), "run")).read()
    assert [work.outcome for work in works] == ["lost", "lost"]
    assert all(work.cost.num_backward == 200 for work in works)


def test_storage_that_fails_an_actor_is_tried_again_by_another(tmp_path: Path) -> None:
    ((_, record),), events = do(tmp_path, fail_one_checkpoint)
    assert record["attempt"] == 1
    assert outcomes(tmp_path) == ["failed", "done"]
    (told,) = [event.text for event in events if isinstance(event, Retry)]
    assert re.search(r"OSError: the storage does not answer.*\), 1 of 2 times; it starts from its last", told)


def test_storage_that_always_fails_ends_the_piece_with_the_cause(tmp_path: Path) -> None:
    with pytest.raises(SubsetFailed, match=r"subset 0 was lost 2 times in a row, .*OSError: the disk is full"):
        do(tmp_path, fail_all_checkpoints)


def test_a_leg_s_test_has_no_entry_in_the_ledger_nor_has_one_whose_actor_was_lost(tmp_path: Path) -> None:
    ((_, record),), events = do(tmp_path, die_once_in_a_test)
    assert record == RunDirectory(str(tmp_path), "run").read_json(TEST_PATH)
    assert len([event for event in events if isinstance(event, Retry)]) == 1
    assert outcomes(tmp_path) == ["done"]  # the minimum


def test_a_full_disk_ends_all_work_so_that_no_comparison_or_quorum_goes_on_without_what_it_failed(
    tmp_path: Path,
) -> None:
    with pytest.raises(
        OSError, match=r"^\[Errno 28\] No space left on device: 'rounds/0000/minima/0000/checkpoint-01.pt"
    ):
        do(tmp_path, fill_the_disk)
    assert outcomes(tmp_path) == ["failed", "failed"]


def test_a_forward_pass_that_never_ends_is_given_up_after_max_attempts(tmp_path: Path) -> None:
    overrides = {"actors.stall_s": 1.0, "model.name": "tests.endless:network", "model.width": None}
    events: list[Event] = []
    with pytest.raises(SubsetFailed, match=r"subset 0 was lost 2 times in a row, .*TimeoutError: no step for"):
        do(tmp_path, do_nothing, overrides=overrides, events=events)
    told = [type(event) for event in events if isinstance(event, Note | Retry)]
    assert [kind for kind, _ in itertools.groupby(told)] == [Note, Retry, Note]  # on a busy machine one more than once
    works = Ledger(RunDirectory(str(tmp_path), "run")).read()
    assert [work.outcome for work in works] == ["lost", "lost"]
    for work in works:  # by what the actors reported; on a busy machine one is given up before
        reported = [event for event in events if isinstance(event, Progress) and event.attempt.number == work.attempt]
        assert max((round(event.epoch * 4) for event in reported), default=0) <= work.cost.num_steps <= NUM_STEPS
