"""Trackers: what MLflow and wandb have of a run is what happened, read back by their own means; and none ends a run."""

import json
import struct
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from raysubset.config import Config, TrackingConfig
from raysubset.events import AggregateDone, Attempt, EpochDone, Event, MinimumDone, Note, Progress, Stage
from raysubset.pipeline.run_report import environment
from raysubset.quality import ACCURACY
from raysubset.run_directory import COMPARISON_PATH, REPORT_PATH, RunDirectory
from raysubset.tracking import refuse_missing, track_comparison, track_finished, tracked
from raysubset.tracking.records import Curves, Header, Point, Result, comparison_points, comparison_summary, run_summary
from raysubset.tracking.wandb_runs import has_key
from tests.test_report import BITS, a_record, history, metrics, minimum, of_task

tracked = partial(tracked, quality=ACCURACY)

ALONE = {  # no account, no network, nothing told to their makers
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_FILE_STORE": "true",
    "WANDB_MODE": "offline",
    "WANDB_ERROR_REPORTING": "false",
}


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_DIR", "WANDB_BASE_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**ALONE, "NETRC": str(tmp_path / "no-netrc"), "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)


def a_config(tmp_path: Path, **tracking: Any) -> Config:
    config = Config(name="a-run", storage_path=str(tmp_path / "results"), tracking=TrackingConfig(**tracking))
    return config.with_overrides({"trunk.epochs": 0.0, "fine_tuning.epochs": 2.0, "rounds.num": 2})


def opened(config: Config) -> RunDirectory:
    directory = RunDirectory(config.storage_path, config.run_name())
    directory.open(config.to_dict(), environment())
    return directory


def progress(epoch: float, loss: float | None) -> Event:
    return Progress("", Attempt("subsets", 0, 3, 0, "node", "ip", 1), epoch, 8.0, loss, examples_per_s=100.0)


def tuned(epoch: int) -> EpochDone:
    """Training loss 1 / epoch, validation loss 0.3 - epoch / 10."""
    entry = {**history(epoch)[-1], "validation": metrics(0.3 - epoch / 10, 40, 50)}
    return EpochDone("", "fine_tuning", entry)


MINIMUM = MinimumDone("", "subsets", minimum(3, round=1))  # of 8 epochs, in the second round
AGGREGATE = AggregateDone("", 1, {"validation": metrics(0.2, 33, 50), "barrier": -0.03})


def finish(directory: RunDirectory) -> None:
    directory.write_json(REPORT_PATH, a_record())
    directory.write_bytes("model.safetensors", b"weights")


def written(path: Path) -> Any:
    """A copy of a JSON file of the run directory, without the digest that it ends with."""
    record = json.loads(path.read_text())
    assert record.popitem()[0] == "digest"
    return record


def silent(event: Event) -> None:
    raise AssertionError(f"a warning nobody expects: {event.text}")


# What events bring


def points(*events: Event) -> list[Point]:
    curves = Curves(Config().with_overrides({"minimize.epochs": 7.5, "rounds.num": 2}), ACCURACY)
    return [point for event in events for point in curves.points(event)]


def test_progress_gives_one_point_an_epoch() -> None:
    told = points(*(progress(epoch, 1.0) for epoch in (0.2, 0.9, 1.1, 1.7, 4.0)), progress(4.5, None))
    assert [(p.series, p.step) for p in told] == [("subset_0003", 1), ("subset_0003", 4)]


def test_epochs_of_a_later_round_follow_those_of_the_rounds_before() -> None:
    *epochs, end = points(MINIMUM)
    assert [p.step for p in epochs] == list(range(9, 17))  # rounds of 7.5 epochs have 8 entries
    assert [p.values["loss"] for p in epochs] == [1 / n for n in range(1, 9)]
    assert end == Point("subset_0003", 16, {"validation_loss": pytest.approx(0.23), "validation_accuracy": 33 / 50})


def test_another_tasks_quality_is_told_by_its_name() -> None:
    record = of_task(a_record(), "next_token", BITS)
    curves = Curves(Config(), BITS)
    *_, end = curves.points(EpochDone("", "fine_tuning", record["stages"]["fine_tuning"]["history"][-1]))
    assert end.values == {"validation_loss": pytest.approx(0.1), "validation_bits": pytest.approx(1.4)}
    assert run_summary(record)["result/test_bits"] == pytest.approx(1.2)
    (point,) = comparison_points(of_task(a_comparison(), "next_token", BITS))
    assert point.values["test_bits"] == pytest.approx(1.2)


def test_what_was_not_measured_brings_no_point() -> None:
    told = points(MinimumDone("", "subsets", {**MINIMUM.record, "validation": None}))
    assert len(told) == 8
    assert all("loss" in point.values for point in told)
    made = {"validation": None, "barrier": None}
    assert points(AggregateDone("", 0, made)) == []


def test_a_loss_that_was_not_finite_is_left_out() -> None:
    (_, end) = points(EpochDone("", "fine_tuning", {**tuned(1).record, "validation": {"loss": None, "accuracy": 0.1}}))
    assert end.values == {"validation_accuracy": 0.1}


def test_other_events_bring_no_numbers() -> None:
    assert points(Stage(""), Note(""), Note("", is_warning=True)) == []


# Who is told, and what becomes of failures


class Notebook:
    """A tracker that writes down what it is told, and fails where it is asked to."""

    def __init__(self, fails_at: str | None = None) -> None:
        self.ids: list[str | None] = []
        self.points: list[Point] = []
        self.results: list[Result] = []
        self._fails_at = fails_at

    def _maybe_fail(self, call: str) -> None:
        if call == self._fails_at:
            raise ConnectionError("nobody\nanswers")

    def begin(self, header: Header, run_id: str | None) -> str:
        self.ids.append(run_id)
        self._maybe_fail("begin")
        return "the-id"

    def log(self, points: Sequence[Point]) -> None:
        self._maybe_fail("log")
        self.points.extend(points)

    def end(self, result: Result) -> None:
        self._maybe_fail("end")
        self.results.append(result)

    def make(self, name: str, config: TrackingConfig) -> "Notebook":
        self._maybe_fail("make")
        return self


@pytest.mark.parametrize("where", ["make", "begin", "log", "end"])
def test_a_failing_tracker_is_warned_of_once_and_the_run_goes_on(tmp_path: Path, where: str) -> None:
    config = a_config(tmp_path, to="mlflow")
    directory, heard = opened(config), list[Event]()
    notebook = Notebook(where)
    with tracked(config, directory, heard.append, make=notebook.make) as tell:
        for event in (tuned(1), tuned(2), AGGREGATE):
            tell(event)
            time.sleep(0.02)  # for the thread to fail
        finish(directory)
    (warning,) = [event for event in heard if isinstance(event, Note)]
    text = f"mlflow no longer follows {directory.uri}, which continues: ConnectionError: nobody; see test_tracking.py, "
    assert warning.is_warning
    assert warning.text.startswith(text)
    assert [event for event in heard if not isinstance(event, Note)] == [tuned(1), tuned(2), AGGREGATE]
    assert directory.read_json(REPORT_PATH) == a_record()


def test_a_tracker_that_hangs_holds_up_no_event_and_not_the_end(tmp_path: Path) -> None:
    config, heard = a_config(tmp_path, to="wandb"), list[Event]()

    class Hanging(Notebook):
        def begin(self, header: Header, run_id: str | None) -> str:
            time.sleep(30)
            return ""

    def stopped() -> None:
        with tracked(config, opened(config), heard.append, make=Hanging().make) as tell:
            tell(tuned(1))
            raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert time.monotonic() - started < 20
    _, warning = heard
    assert isinstance(warning, Note)
    assert "no answer within 2 s" in warning.text


@pytest.mark.parametrize(("error", "outcome"), [(ValueError, "failed"), (KeyboardInterrupt, "stopped")])
def test_a_tracker_hears_how_the_run_ended_and_the_next_run_goes_on_with_its_id(
    tmp_path: Path, error: type[BaseException], outcome: str
) -> None:
    config, notebook = a_config(tmp_path, to="mlflow"), Notebook()

    def ended() -> None:
        with tracked(config, opened(config), silent, make=notebook.make):
            raise error("it ends")

    with pytest.raises(error):
        ended()
    with tracked(config, directory := opened(config), silent, make=notebook.make):
        finish(directory)
    assert notebook.ids == [None, "the-id"]
    assert [result.outcome for result in notebook.results] == [outcome, "finished"]
    with tracked(config, directory, silent, make=notebook.make):
        pass
    assert len(notebook.ids) == 2  # it has all of a finished run


def test_nobody_is_told_where_nobody_was_asked_for(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    directory, heard = opened(config), list[Event]()
    with tracked(config, directory, heard.append, make=Notebook("make").make) as tell:
        tell(tuned(1))
    assert heard == [tuned(1)]
    assert not directory.exists("tracking")


@pytest.mark.parametrize(("to", "package"), [("mlflow", "mlflow-skinny"), ("wandb", "wandb"), ("both", "wandb")])
def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: Any, package: str
) -> None:
    from raysubset import run

    missing = "mlflow" if to == "mlflow" else "wandb"
    (tmp_path / missing).mkdir()  # as wandb leaves one in the working directory
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(p for p in sys.path if not Path(p, missing).is_dir())])
    monkeypatch.delitem(sys.modules, missing, raising=False)
    sys.path_importer_cache.clear()
    if to == "both":
        monkeypatch.setitem(sys.modules, "mlflow", json)  # any module with a spec
    config = a_config(tmp_path, to=to)
    with pytest.raises(ValueError, match=f"tracking.to={to} needs {missing}.*pip install {package}, or set"):
        run(config)
    assert not Path(config.storage_path).exists()


def test_what_is_installed_is_not_refused() -> None:
    refuse_missing(TrackingConfig(to="both"))


# MLflow


def client(uri: str) -> Any:
    mlflow = pytest.importorskip("mlflow", reason="mlflow-skinny is not installed")
    return mlflow.MlflowClient(tracking_uri=uri)


def curve(of: Any, run_id: str, key: str) -> dict[int, float]:
    return {metric.step: metric.value for metric in of.get_metric_history(run_id, key)}


def check_mlflow(config: Config, uri: str, tmp_path: Path) -> None:
    """Stop a run, go on with it, and read all of it back."""
    directory = opened(config)
    with pytest.raises(RuntimeError):
        _fail_after(tuned(1), config, directory)
    of = client(uri)
    run_id = directory.read_json("tracking/mlflow.json")["run_id"]
    assert of.get_run(run_id).info.status == "FAILED"
    with tracked(config, directory, _only_events) as tell:
        for event in (progress(1.2, 0.7), MINIMUM, AGGREGATE, tuned(2)):
            tell(event)
        finish(directory)
    run = of.get_run(run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "a-run")
    assert of.get_experiment(run.info.experiment_id).name == "the-project"
    assert len(of.search_runs([run.info.experiment_id])) == 1
    assert run.data.params["data.name"] == "digits"
    assert run.data.params["fine_tuning.epochs"] == "2.0"
    assert run.data.tags["raysubset.uri"] == directory.uri
    assert run.data.tags["raysubset.group"] == "a-sweep"
    assert curve(of, run_id, "fine_tuning/loss") == {1: 1.0, 2: 0.5}
    assert curve(of, run_id, "fine_tuning/validation_loss") == pytest.approx({1: 0.2, 2: 0.1})
    assert curve(of, run_id, "subset_0003/loss") == {8 + n: 1 / n for n in range(1, 9)}
    assert curve(of, run_id, "subset_0003/running_loss") == {1: 0.7}
    assert curve(of, run_id, "aggregate/barrier") == {2: -0.03}
    assert run.data.metrics["result/test_accuracy"] == 0.9
    assert run.data.metrics["cost/critical_path_passes"] == 4.5
    files = {Path(one.path).name for one in of.list_artifacts(run_id)}
    assert files == {"config.json", "report.json", "model.safetensors"}
    assert written(Path(of.download_artifacts(run_id, "report.json", str(tmp_path)))) == a_record()


def _only_events(event: Event) -> None:
    assert not isinstance(event, Note), event.text


def _fail_after(event: Event, config: Config, directory: RunDirectory) -> None:
    with tracked(config, directory, _only_events) as tell:
        tell(event)
        raise RuntimeError


@pytest.mark.parametrize("store", ["file", "sqlite"])
def test_mlflow_has_in_one_run_what_a_stopped_and_resumed_run_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    uri = (tmp_path / "mlruns").as_uri() if store == "file" else f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.chdir(tmp_path)  # where a store in a database keeps artefacts
    config = a_config(tmp_path, to="mlflow", uri=uri, project="the-project", group="a-sweep")
    check_mlflow(config, uri, tmp_path)


@pytest.fixture
def mlflow_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """MLflow's own server behind HTTP, in a thread: `mlflow server` imports all of it once more in each process."""
    for package in ("mlflow", "sqlalchemy", "alembic", "flask_cors", "graphene", "huey"):
        pytest.importorskip(package, reason=f"MLflow's server needs {package}")
    from mlflow import server
    from werkzeug.serving import make_server

    monkeypatch.setenv(server.BACKEND_STORE_URI_ENV_VAR, (tmp_path / "server").as_uri())
    monkeypatch.setenv(server.ARTIFACT_ROOT_ENV_VAR, "mlflow-artifacts:/")
    monkeypatch.setenv(server.ARTIFACTS_DESTINATION_ENV_VAR, str(tmp_path / "art"))
    monkeypatch.setenv(server.SERVE_ARTIFACTS_ENV_VAR, "true")
    http = make_server("127.0.0.1", 0, server.app, threaded=True)
    serving = threading.Thread(target=http.serve_forever, daemon=True)
    serving.start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    serving.join()


def test_a_real_mlflow_server_has_the_same(tmp_path: Path, mlflow_server: str) -> None:
    config = a_config(tmp_path, to="mlflow", uri=mlflow_server, project="the-project", group="a-sweep")
    check_mlflow(config, mlflow_server, tmp_path)


def test_a_run_that_another_store_does_not_know_is_a_new_one_there(tmp_path: Path) -> None:
    uris = [(tmp_path / name).as_uri() for name in ("one", "other")]
    ids = []
    for uri in uris:
        config = a_config(tmp_path, to="mlflow", uri=uri)
        directory = opened(config)
        with pytest.raises(RuntimeError):
            _fail_after(tuned(1), config, directory)
        ids.append(directory.read_json("tracking/mlflow.json")["run_id"])
    assert ids[0] != ids[1]
    assert client(uris[1]).get_run(ids[1]).data.metrics["fine_tuning/loss"] == 1.0


def test_a_finished_run_can_be_told_to_a_tracker_afterwards(tmp_path: Path) -> None:
    uri = (tmp_path / "mlruns").as_uri()
    config = a_config(tmp_path, to="mlflow", uri=uri)
    directory = opened(config)
    finish(directory)
    track_finished(config, directory, _only_events)
    run = client(uri).get_run(directory.read_json("tracking/mlflow.json")["run_id"])
    assert run.data.metrics["result/test_accuracy"] == 0.9


# Weights & Biases


def offline_runs(directory: RunDirectory) -> list[tuple[str, list[Any]]]:
    """Ids and records of the runs that wandb left in a run directory, oldest first."""
    from wandb.proto import wandb_internal_pb2

    assert directory.local_path is not None
    paths = sorted(
        directory.local_path.glob("tracking/wandb/offline-run-*/run-*.wandb"), key=lambda p: p.stat().st_ctime
    )
    return [
        (path.stem.removeprefix("run-"), [wandb_internal_pb2.Record.FromString(data) for data in log_entries(path)])
        for path in paths
    ]


def log_entries(path: Path) -> Iterator[bytes]:
    """What a .wandb file holds: LevelDB's log format, after seven bytes of wandb's own.

    Blocks of 32 KiB; in each, pieces of a checksum (4 bytes), a length (2), a kind (1: whole, 2 to 4: first, middle,
    last piece of an entry) and data; a tail of less than a piece's seven bytes is padding.
    """
    data, position, entry = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        entry += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield entry
            entry = b""


def items(updates: Any) -> dict[str, Any]:
    return {one.key or "/".join(one.nested_key): json.loads(one.value_json) for one in updates}


def test_wandb_keeps_offline_in_the_run_directory_what_the_run_told(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    config = a_config(tmp_path, to="wandb", project="the-project", group="a-sweep")
    directory = opened(config)
    with pytest.raises(RuntimeError):
        _fail_after(tuned(1), config, directory)
    time.sleep(1.1)  # wandb names its folders by the second
    with tracked(config, directory, _only_events) as tell:
        for event in (AGGREGATE, tuned(2)):
            tell(event)
        finish(directory)
    first, second = offline_runs(directory)
    run_id = directory.read_json("tracking/wandb.json")["run_id"]
    assert (first[0], second[0]) == (run_id, run_id)
    (run,) = [record.run for record in second[1] if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name, run.run_group) == ("the-project", "a-run", "a-sweep")
    assert items(run.config.update)["parameters"]["data.name"] == "digits"
    rows = [items(record.history.item) for of in (first, second) for record in of[1] if record.HasField("history")]
    losses = {row["fine_tuning/step"]: row["fine_tuning/loss"] for row in rows if "fine_tuning/loss" in row}
    assert losses == {1: 1.0, 2: 0.5}
    summary = {}
    for record in second[1]:
        summary |= items(record.summary.update) if record.HasField("summary") else {}
    assert summary["result/test_accuracy"] == 0.9
    assert [record.exit.exit_code for of in (first, second) for record in of[1] if record.HasField("exit")] == [1, 0]
    assert directory.local_path is not None
    (folder,) = directory.local_path.glob("tracking/wandb/offline-run-*/files/report.json")
    assert written(folder) == a_record()


def test_wandb_writes_down_neither_the_command_line_nor_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    key, secret = "0123456789abcdef" * 2 + "01234567", "s3://id:of-a-bucket@host/results"
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setattr(sys, "argv", ["raysubset", "run", "--storage-path", secret])
    config = a_config(tmp_path, to="wandb")
    with tracked(config, directory := opened(config), _only_events):
        finish(directory)
    assert directory.local_path is not None
    written = [path.read_bytes() for path in (directory.local_path / "tracking").rglob("*") if path.is_file()]
    assert len(written) > 5
    assert not [word for word in (key, secret) if any(word.encode() in one for one in written)]


def test_wandb_that_the_environment_disables_is_content_with_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    config = a_config(tmp_path, to="wandb")
    with tracked(config, directory := opened(config), _only_events) as tell:
        tell(tuned(1))
        finish(directory)
    assert directory.read_json("tracking/wandb.json")["finished"]
    assert offline_runs(directory) == []


def test_a_key_is_found_where_wandb_login_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "http://localhost:8080")
    assert not has_key()
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert has_key()


# Comparisons


def a_comparison() -> dict[str, Any]:
    mean = {
        "test_accuracy": 0.9,
        "validation_loss": None,
        "passes": 2.5,
        "critical_path_passes": 1.5,
        "device_s": 3.0,
        "num_steps": 7,
    }
    points = [{"budget": 1.0, "mean": mean}, {"budget": 2.0, "mean": None}]
    verdict = {"word": "refuted", "text": "no arm is as good."}
    return {
        "arms": [{"key": "G:aggregation.method=fisher", "points": points}],
        "speed_ups": {"total": {"G:aggregation.method=fisher": {"interval": {"estimate": 1.3}}}},
        "verdicts": {"total": verdict},
    }


def test_a_comparison_is_one_run_of_verdicts_and_arms_points(tmp_path: Path) -> None:
    uri = (tmp_path / "mlruns").as_uri()
    config = a_config(tmp_path, to="mlflow", uri=uri)
    directory, arm = opened(config), "G_aggregation.method_fisher"
    directory.write_json(COMPARISON_PATH, a_comparison())
    track_comparison(config, directory, a_comparison(), _only_events)
    of, run_id = client(uri), directory.read_json("tracking/mlflow.json")["run_id"]
    run = of.get_run(run_id)
    assert run.data.tags["verdict.total"] == "refuted"
    assert run.data.tags["verdict.total.text"] == "no arm is as good."
    assert run.data.metrics[f"speed_up/total/{arm}"] == 1.3
    assert curve(of, run_id, f"arm_{arm}/test_accuracy") == {1: 0.9}
    assert {one.path for one in of.list_artifacts(run_id)} == {"config.json", "comparison.json"}


def test_points_and_summary_of_a_comparison_leave_out_what_is_not_known() -> None:
    (point,) = comparison_points(a_comparison())
    assert point.values == {
        "budget": 1.0,
        "test_accuracy": 0.9,
        "passes": 2.5,
        "critical_path_passes": 1.5,
        "device_s": 3.0,
    }
    summary, _ = comparison_summary(a_comparison())
    assert summary == {"speed_up/total/G_aggregation.method_fisher": 1.3}
