"""A run whose storage is an object store: a local S3 server."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from raysubset import Config, load_model, run, sweep
from raysubset.run_directory import RunDirectory
from tests.buckets import bucket

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600), pytest.mark.usefixtures("ray_cluster")]


SECRET = "a-secret-that-stands-nowhere"


@pytest.fixture
def bucket_uri() -> Iterator[str]:
    with bucket("runs/results", SECRET) as uri:
        yield uri


def test_a_sweep_with_ray_train_lives_in_an_object_store_whose_secret_is_in_no_file(
    bucket_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune's tuner.pkl and state files had it, and Ray's logs."""
    kept: list[Path] = []

    class Kept:
        """TemporaryDirectory that stays, so that Tune's files can be read."""

        def __init__(self, prefix: str) -> None:
            kept.append(tmp_path / prefix)

        def __enter__(self) -> str:
            kept[-1].mkdir()
            return str(kept[-1])

        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr("raysubset.sweeping.driver.TemporaryDirectory", Kept)
    short = {"subsets.num": 2, "minimize.epochs": 1.0, "fine_tuning.epochs": 1.0, "actors.max_num": 1}
    config = Config(name="remote-sweep", storage_path=bucket_uri).with_overrides(short | {"fine_tuning.num_workers": 2})
    report = sweep(config, {"subsets.size": [80]}, seeds=1)
    (trial,) = report.trials
    assert trial["state"] == "done"
    assert SECRET not in trial["uri"]
    session = Path(ray._private.worker.global_worker.node.get_session_dir_path())  # pyright: ignore
    files = [path for folder in (*kept, session) for path in folder.rglob("*") if path.is_file()]
    assert any(path.name == "tuner.pkl" for path in files)
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    directory = RunDirectory(bucket_uri, "remote-sweep")
    names = directory.list("", recursive=True)
    assert names
    assert [name for name in names if SECRET.encode() in directory.read_bytes(name)] == []

    place, name = "trials", trial["uri"].partition("?")[0].rpartition("/")[2]
    path, _, query = bucket_uri.partition("?")
    made = RunDirectory(f"{path}/remote-sweep/{place}?{query}", name)
    assert made.read_json("fine_tuning/minimum.json")["num_workers"] == 2
    notes: list[str] = []
    own = Config(name=name, storage_path=made.storage_path).with_overrides(short | {"fine_tuning.num_workers": 2})
    again = run(own.with_overrides({"subsets.size": 80}), on_event=lambda event: notes.append(event.text))
    assert "is finished" in notes[0]
    assert again.test.to_dict() == made.read_json("report.json")["test"]
    assert load_model(f"{path}/remote-sweep/{place}/{name}?{query}").class_names == tuple("0123456789")
