"""Repair of Ray Train's snapshot of its checkpoints: Ray writes it in place, so a kill may cut it short."""

import json
from collections.abc import Sequence
from typing import Any

import ray

from raysubset.run_directory import CorruptFile, RunDirectory

_SNAPSHOT = "checkpoint_manager_snapshot.json"


def mend_snapshot(directory: RunDirectory, folder: str) -> str | None:
    """Let a Ray Train job resume from its newest sound checkpoint, or from the start if there is none.

    Call it while the job does not run. A checkpoint is complete if no other has more files.

    Args:
        folder: the job's, with its snapshot and one folder per checkpoint.

    Returns:
        A text that says what was damaged and where the job resumes; None if nothing was.
    """
    path = f"{folder}/{_SNAPSHOT}"
    if not directory.exists(path):
        return None
    files: dict[str, list[str]] = {}
    for file in _state_files(directory, folder):
        files.setdefault(file.split("/")[-2], []).append(file)
    flaw = _flaw(directory, path, files)
    if flaw is None:
        return None
    most = max(map(len, files.values()), default=0)
    complete = [name for name in sorted(files, reverse=True) if len(files[name]) == most]
    newest = next((name for name in complete if _damage(directory, files[name]) is None), None)
    if newest is None:
        directory.delete(folder)
        return f"{flaw}; no checkpoint of {folder} is sound: it starts from the beginning"
    directory.write_bytes(path, json.dumps(_snapshot(newest)).encode())
    return f"{flaw}; it starts from {newest}"


def newest_checkpoint(directory: RunDirectory, folder: str) -> str | None:
    """Return the name of a Ray Train job's newest checkpoint, sound or not; None if it has none."""
    return max((path.split("/")[-2] for path in _state_files(directory, folder)), default=None)


def _state_files(directory: RunDirectory, folder: str) -> list[str]:
    return [path for path in directory.list(folder, recursive=True) if path.endswith(".pt")]


def _flaw(directory: RunDirectory, path: str, files: dict[str, list[str]]) -> str | None:
    """Return why Ray Train cannot resume by its snapshot, or None if it can."""
    try:
        snapshot = json.loads(directory.read_bytes(path))
        names = [result["checkpoint_dir_name"] for result in snapshot["checkpoint_results"]]
        latest = snapshot["latest_checkpoint_result"]
        newest = latest and latest["checkpoint_dir_name"]
        is_whole = snapshot.keys() >= _snapshot("").keys() and len(snapshot["checkpoint_report_indices"]) == len(names)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        names, newest, is_whole = [], None, False
    if not is_whole:
        return f"{path} in {directory.uri} is damaged"
    for name in names:
        if name not in files:
            return f"the checkpoint {name} that {path} in {directory.uri} names is gone"
    return _damage(directory, files[newest]) if newest else None


def _damage(directory: RunDirectory, files: Sequence[str]) -> str | None:
    try:
        for file in files:
            directory.read_checkpoint(file)
    except CorruptFile as error:
        return str(error)
    return None


def _snapshot(checkpoint: str) -> dict[str, Any]:
    """Return the snapshot that Ray Train writes for a job with one checkpoint."""
    result = {"version": 0, "checkpoint_dir_name": checkpoint, "metrics": {}}
    return {
        "ray_version": ray.__version__,
        "checkpoint_results": [result],
        "checkpoint_report_indices": [0],
        "latest_checkpoint_result": result,
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": 1,
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }
