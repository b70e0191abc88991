"""A run with a tracker: the listener is there from the first minimum to the report."""

import math
from pathlib import Path

import pytest

from raysubset import Config, run
from raysubset.events import MinimumDone
from raysubset.legs import FRESH, Drawing
from raysubset.quality import ACCURACY
from raysubset.run_directory import RunDirectory
from raysubset.tracking.records import Curves
from tests import test_report

pytestmark = pytest.mark.usefixtures("processes")


def test_mlflow_has_the_minima_the_aggregate_and_the_report_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow-skinny is not installed")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlruns").as_uri()
    short = {"trunk.epochs": 0.0, "fine_tuning.epochs": 0.0, "minimize.epochs": 2.0, "subsets.num": 2}
    config = Config(storage_path=str(tmp_path)).with_overrides({**short, "tracking.to": "mlflow", "tracking.uri": uri})
    report = run(config)
    client = mlflow.MlflowClient(tracking_uri=uri)
    run_id = RunDirectory.at(report.uri).read_json("tracking/mlflow.json")["run_id"]
    for subset, minimum in enumerate(report.record["stages"]["rounds"][0]["minima"]):
        told = client.get_metric_history(run_id, f"subset_{subset:04d}/loss")
        assert {metric.step: metric.value for metric in told} == {
            number: epoch["loss"] for number, epoch in enumerate(minimum["history"], 1)
        }
    numbers = client.get_run(run_id).data.metrics
    aggregation = report.record["stages"]["rounds"][0]["aggregation"]
    assert numbers["aggregate/validation_loss"] == aggregation["validation"]["loss"]
    assert numbers["result/test_accuracy"] == report.test.accuracy
    assert numbers["cost/passes"] == report.passes


def test_rounds_of_growing_length_follow_one_another() -> None:
    """Counted as rounds of equal length they would leave gaps, or lie on one another."""
    config = Config().with_overrides({"minimize.epochs": 4.0, "rounds.num": 4, "rounds.lengths": "quadratic"})
    drawing, curves, steps, lengths = Drawing(config, None, [25]), Curves(config, ACCURACY), list[int](), list[int]()
    for round in range(4):
        lengths.append(math.ceil(drawing.members(round, FRESH, ())[0].epochs))
        history = test_report.history(lengths[-1])
        record = test_report.minimum(3, round=round, history=history, validation=None)
        steps += [point.step for point in curves.points(MinimumDone("", "subsets", record))]
    assert steps == list(range(1, sum(lengths) + 1))
    assert lengths[-1] > 2 * lengths[0]
