"""Storage that answers 503, or nothing: a server before moto's, and a file system that raises what pyarrow's do."""

import gc
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
from werkzeug.serving import make_server

from raysubset import Config, run
from raysubset.run_directory import RunDirectory, StorageLost, patience
from raysubset.run_directory.patience import Patience, Patient

# As measured with pyarrow 25 against a server that answers so, or none
MAY_PASS = [
    "When reading information for key 'a' in bucket 'b': AWS Error UNKNOWN (HTTP status 503) during HeadObject …",
    "When listing objects under key 'a' in bucket 'b': AWS Error UNKNOWN (HTTP status 429) during ListObjectsV2 …",
    "… 'b': AWS Error SLOW_DOWN during CreateMultipartUpload operation: Please reduce your request rate.",
    "google::cloud::Status(UNAVAILABLE: Retry policy exhausted, with a last message of Received HTTP status …",
    "GetProperties failed for 'http://…/a'. … Azure Error: [] 503 Service Unavailable\n\nRequest ID: ",
]
UNREACHABLE = [
    "… 'b': AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 7, Could not connect to server; …",
    "… 'b': AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 28, Timeout was reached; …",
    "google::cloud::Status(UNAVAILABLE: … PerformWork() - CURL error [7]=Could not connect to server error_info={…})",
    "… Azure Error: [] Fail to get a new connection for: http://127.0.0.1:1. Could not connect to server",
]
ANSWERS = [
    OSError("When … key '503 timeout' in bucket 'SLOW_DOWN': AWS Error ACCESS_DENIED during HeadObject operation: …"),
    OSError("… for key 'HTTP status 503' in bucket 'b': AWS Error NO_SUCH_BUCKET during CreateMultipartUpload …"),
    OSError("GetProperties failed for 'http://…/a'. … Azure Error: [] 403 Forbidden\n\nRequest ID: "),
    FileNotFoundError(2, "Path does not exist 'b/timeout'"),
    PermissionError(13, "google::cloud::Status(PERMISSION_DENIED: Permanent error, …"),
]


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.001)


class Failing:
    """A step that raises these, one a time, and then returns 7."""

    def __init__(self, *errors: OSError) -> None:
        self.errors, self.num = list(errors), 0

    def __call__(self) -> int:
        self.num += 1
        if self.errors:
            raise self.errors.pop(0)
        return 7


@pytest.mark.parametrize("text", MAY_PASS)
def test_what_passes_is_waited_for_with_one_warning(text: str, caplog: pytest.LogCaptureFixture) -> None:
    step = Failing(OSError(text), OSError(text))
    assert (Patience("s3://b").take(step), step.num) == (7, 3)
    (record,) = caplog.records
    assert record.getMessage().startswith("storage s3://b does not answer (")
    assert record.getMessage().endswith("): trying again for up to 60 s")


@pytest.mark.parametrize("error", [*(OSError(text) for text in UNREACHABLE), ConnectionResetError(104, "reset")])
def test_an_address_is_waited_for_only_where_something_has_answered(error: OSError) -> None:
    never = Failing(error)
    with pytest.raises(OSError):
        Patience("s3://b").take(never)
    assert never.num == 1
    answered = Patience("s3://b")
    answered.take(Failing())
    sent = pickle.loads(pickle.dumps(Patience("s3://b")))  # an actor's, whose driver has reached it
    assert [p.take(Failing(error)) for p in (answered, sent)] == [7, 7]


@pytest.mark.parametrize("error", ANSWERS)
def test_an_answer_is_taken_at_once_and_ends_a_silence(error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PATIENCE_S", 0.0)
    storage, step = Patience("s3://b"), Failing(OSError(MAY_PASS[0]), error)
    with pytest.raises(type(error)) as raised:
        storage.take(step)
    assert raised.value is error
    assert storage.take(Failing(OSError(MAY_PASS[0]))) == 7


def test_storage_that_stays_away_is_lost_in_a_line_and_then_tried_once_until_it_answers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(patience, "PATIENCE_S", 0.02)
    storage, step = Patience("s3://b"), Failing(*(OSError(MAY_PASS[0]) for _ in range(1000)))
    with pytest.raises(StorageLost, match=r"^storage s3://b has not answered for 0 s \(AWS Error UNKNOWN") as raised:
        storage.take(step)
    assert "the same command resumes once it answers" in str(raised.value)
    assert isinstance(pickle.loads(pickle.dumps(raised.value)), StorageLost)
    num = step.num
    with pytest.raises(StorageLost):
        storage.take(step)
    assert step.num == num + 1
    assert len(caplog.records) == 1
    assert storage.take(Failing()) == 7
    assert storage.take(Failing(OSError(MAY_PASS[0]))) == 7


class Flaky:
    """A server that answers so many requests with 503, and then as moto does. Before the next GET it does something."""

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

        self.num_silent, self._moto = 0, DomainDispatcherApplication(create_backend_app)
        self.before_get: Callable[[], None] | None = None

    def __call__(self, environ: Any, start: Any) -> Any:
        if environ["REQUEST_METHOD"] == "GET" and (action := self.before_get):
            self.before_get = None
            action()
        if self.num_silent > 0:
            self.num_silent -= 1
            start("503 Service Unavailable", [("Content-Length", "0")])
            return [b""]
        return self._moto(environ, start)


@pytest.fixture(scope="module")
def flaky() -> Iterator[tuple[Flaky, str]]:
    import boto3

    app = Flaky()
    server = make_server("127.0.0.1", 0, app, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=f"http://127.0.0.1:{server.port}", **keys).create_bucket(Bucket="flaky")
    yield app, f"s3://a:b@flaky/x?endpoint_override=127.0.0.1:{server.port}&scheme=http&region=us-east-1"
    server.shutdown()
    server.server_close()


NUM_SILENT = 3  # so often pyarrow tries before it raises, in a second or two: these tests take their time


def test_a_run_s_files_are_written_read_and_listed_through_503(flaky: tuple[Flaky, str]) -> None:
    app, uri = flaky
    directory = RunDirectory(uri, "run")
    for step in (
        lambda: directory.write_json("a.json", {"a": 1}),
        lambda: directory.read_json("a.json"),
        directory.list,
    ):
        app.num_silent = NUM_SILENT
        step()
        assert app.num_silent == 0


def test_a_file_that_is_deleted_between_the_two_requests_of_reading_it_is_missing(flaky: tuple[Flaky, str]) -> None:
    """A ledger's reader would end as another process compacts it."""
    app, uri = flaky
    directory = RunDirectory(uri, "deleted")
    for num_bytes in (10, 10**6):  # pyarrow tells two errors, neither of them a missing file
        directory.write_bytes("a", b"a" * num_bytes)
        app.before_get = lambda: directory.delete("a")
        with pytest.raises(FileNotFoundError):
            directory.read_bytes("a")
        assert app.before_get is None


def test_so_are_ray_train_s_in_its_workers_processes(flaky: tuple[Flaky, str], tmp_path: Path) -> None:
    app, uri = flaky
    folder, filesystem = RunDirectory(uri, "run").train_storage("fine_tuning")
    filesystem = pickle.loads(pickle.dumps(filesystem))
    for name in ("checkpoint", "again"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint" / "state.pt").write_bytes(bytes(range(256)) * 50_000)  # of several parts
    app.num_silent = NUM_SILENT
    pafs.copy_files(str(tmp_path / "checkpoint"), f"{folder}/checkpoint", destination_filesystem=filesystem)
    app.num_silent = NUM_SILENT
    pafs.copy_files(f"{folder}/checkpoint", str(tmp_path / "again"), source_filesystem=filesystem)
    assert (tmp_path / "again" / "state.pt").read_bytes() == bytes(range(256)) * 50_000
    with filesystem.open_output_stream(f"{folder}/.marker"):  # as Ray Train tries whether it may write
        pass
    assert filesystem.get_file_info(f"{folder}/.marker").size == 0


def test_storage_that_is_lost_before_a_run_is_no_mistake_of_the_user_s(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(*_: object) -> None:
        raise StorageLost("storage has not answered")

    for name in ("write_bytes", "exists"):
        monkeypatch.setattr(RunDirectory, name, lose)
    with pytest.raises(StorageLost):
        RunDirectory("s3://a:b@c/x?region=us-east-1", "run").check_writable()
    with pytest.raises(StorageLost):
        run(Config(name="run", storage_path="s3://a:b@c/x?region=us-east-1"))


def test_a_file_that_is_left_before_it_is_closed_is_not_sent(tmp_path: Path) -> None:
    filesystem = pafs.PyFileSystem(Patient(pafs.LocalFileSystem(), Patience("here")))
    file = filesystem.open_output_stream(f"{tmp_path}/half", compression=None)
    file.write(b"half of it")
    del file
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_file_that_a_patient_file_system_does_not_have_is_missing(tmp_path: Path) -> None:
    filesystem = pafs.PyFileSystem(Patient(pafs.LocalFileSystem(), Patience("x")))
    with pytest.raises(FileNotFoundError):
        filesystem.open_input_stream(str(tmp_path / "none"))
    assert filesystem.get_file_info(str(tmp_path / "none")).type == pafs.FileType.NotFound
