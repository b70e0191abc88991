"""A Ray Train job resumes from its newest sound checkpoint, whatever was cut short or changed."""

import json

import pytest
import torch
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState

from raysubset.fine_tuning.snapshots import _snapshot, mend_snapshot
from raysubset.run_directory import RunDirectory

FOLDER = "fine_tuning/ray_train"
PATH = f"{FOLDER}/checkpoint_manager_snapshot.json"


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    """With two checkpoints of two workers, and the snapshot that names them."""
    run = RunDirectory(str(tmp_path), "run")
    for step in (1, 2):
        for name in ("state", "own-1"):
            run.write_checkpoint(f"{FOLDER}/step-{step}/{name}.pt", {"a": torch.arange(3000) + step})
    snapshot = _snapshot("step-2")
    snapshot["checkpoint_results"].insert(0, {"version": 0, "checkpoint_dir_name": "step-1", "metrics": {"loss": 1.0}})
    snapshot["checkpoint_report_indices"] = [0, 1]
    run.write_bytes(PATH, json.dumps(snapshot).encode())
    return run


def resumes_from(run: RunDirectory) -> str:
    """As Ray Train reads it."""
    state = _CheckpointManagerState.model_validate(json.loads(run.read_bytes(PATH)))
    assert state.latest_checkpoint_result is not None
    assert state.latest_checkpoint_result in state.checkpoint_results
    return state.latest_checkpoint_result.checkpoint_dir_name


def test_a_sound_job_is_left_as_it_is(run):
    before = run.read_bytes(PATH)
    assert mend_snapshot(run, FOLDER) is None
    assert mend_snapshot(run, "trunk/ray_train") is None
    assert run.read_bytes(PATH) == before


@pytest.mark.parametrize("text", [None, b"", b"[]", b"{}", b"null", b'{"checkpoint_results": 3}', b"\xff"])
def test_a_damaged_snapshot_is_made_of_the_newest_checkpoint(run, text):
    run.write_bytes(PATH, run.read_bytes(PATH)[:-40] if text is None else text)
    told = mend_snapshot(run, FOLDER)
    assert told is not None
    assert told.endswith("checkpoint_manager_snapshot.json in " + run.uri + " is damaged; it starts from step-2")
    assert resumes_from(run) == "step-2"
    assert mend_snapshot(run, FOLDER) is None


@pytest.mark.parametrize("harm", ["short", "bit", "gone", "part"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(run, harm):
    path = f"{FOLDER}/step-2/own-1.pt"
    data = bytearray(run.read_bytes(path))
    if harm == "short":
        run.write_bytes(path, data[:-5000])
    if harm == "bit":
        data[len(data) // 2] ^= 1
        run.write_bytes(path, data)
    if harm == "gone":
        run.delete(f"{FOLDER}/step-2")
    if harm == "part":  # it was being written when the snapshot was
        run.delete(path)
        run.write_bytes(PATH, b"{")
    assert "it starts from step-1" in (mend_snapshot(run, FOLDER) or "")
    assert resumes_from(run) == "step-1"


def test_without_a_sound_checkpoint_the_job_starts_from_the_beginning(run):
    for step in (1, 2):
        run.write_bytes(f"{FOLDER}/step-{step}/state.pt", b"")
    assert "it starts from the beginning" in (mend_snapshot(run, FOLDER) or "")
    assert not run.exists(FOLDER)
