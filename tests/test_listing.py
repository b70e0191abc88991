import json
import time
from pathlib import Path

import pytest

from raysubset.cli import call
from raysubset.config import Config
from raysubset.report import list_runs
from raysubset.run_directory import REPORT_PATH, SESSIONS_PATH, SWEEP_PATH, Lease, RunDirectory
from tests.test_html_report import a_comparison
from tests.test_report import a_record
from tests.test_sweeping import a_sweep


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """A run of each state, a sweep, a comparison, and what is none of ours."""
    RunDirectory(str(tmp_path), "done").write_json(REPORT_PATH, a_record(uri=str(tmp_path / "done")))
    for name in ("stopped", "at-work", "cut"):
        run = RunDirectory(str(tmp_path), name)
        run.open(Config().to_dict(), {})
        run.write_json(SESSIONS_PATH, {"sessions": [{"started_at": 1e9, "startup_s": 1.0, "wall_s": 12.0}]})
    (tmp_path / "cut" / "config.json").write_text('{"format": 1, ')
    a_sweep(tmp_path)
    a_comparison(tmp_path)
    RunDirectory(str(tmp_path), "wrong").write_json(REPORT_PATH, {"test": 3})
    (tmp_path / "other").mkdir()
    (tmp_path / "file").write_text("x")
    return tmp_path


def test_each_directory_is_a_row_with_its_state_result_and_cost(storage: Path):
    with Lease(RunDirectory(str(storage), "at-work")):
        entries, num_others = list_runs(str(storage))
    found = {entry.name: entry for entry in entries}
    assert num_others == 1
    assert {name: (entry.kind, entry.state) for name, entry in found.items()} == {
        "done": ("run", "done"),
        "stopped": ("run", "stopped"),
        "at-work": ("run", "at work"),
        "cut": ("?", "damaged"),
        "wrong": ("run", "damaged"),
        "a-sweep": ("sweep", "done"),
        "a-comparison": ("comparison", "done"),
    }
    assert found["done"].result == "test accuracy 90.00%"
    assert found["a-sweep"].result.startswith("best of 5: validation accuracy ")
    sweep = RunDirectory.at(found["a-sweep"].uri)
    record = sweep.read_json(SWEEP_PATH)
    baseline = record["trials"][0] | {"overrides": {"method": "conventional"}, "validation_accuracy": 0.99}
    sweep.write_json(SWEEP_PATH, record | {"trials": [*record["trials"], baseline]})
    assert found["a-sweep"].result in {entry.result for entry in list_runs(str(storage))[0]}  # it is of what was swept
    assert "total: confirmed" in found["a-comparison"].result
    for name in ("a-sweep", "a-comparison"):  # whose records are written at their ends
        RunDirectory(str(storage), name).write_json(
            SESSIONS_PATH, {"sessions": [{"started_at": 5.0, "startup_s": 0.5, "wall_s": 1.0}]}
        )
    assert [entry.name for entry in list_runs(str(storage))[0] if entry.began_at == 5.0] == ["a-comparison", "a-sweep"]
    assert (found["a-sweep"].passes, found["stopped"].wall_s) == (90.0, 12.0)
    assert "config.json" in found["cut"].flaw
    assert {entry.state for entry in list_runs(str(storage))[0] if entry.name == "at-work"} == {"stopped"}


def test_ls_prints_the_table_and_names_what_is_damaged(storage: Path, capsys: pytest.CaptureFixture[str]):
    assert call(["ls", str(storage)]) == 2
    out = capsys.readouterr().out
    for told in ("test accuracy 90.00%", "a-sweep", "damaged", "1 other folders", "shows resumes what has stopped"):
        assert told in out
    assert call(["ls", str(storage), "--format", "json"]) == 2
    assert {entry["name"] for entry in json.loads(capsys.readouterr().out)} >= {"done", "cut"}


def test_a_storage_path_that_is_none_is_a_mistake_and_an_empty_one_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert call(["ls", str(tmp_path / "none")]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert call(["ls", str(tmp_path)]) == 0
    assert "holds no run" in capsys.readouterr().out


def test_hundreds_of_runs_are_listed_in_milliseconds_each(tmp_path: Path):
    for number in range(150):
        RunDirectory(str(tmp_path), f"run-{number}").write_json(REPORT_PATH, a_record(), is_durable=False)
    before = time.process_time()
    assert len(list_runs(str(tmp_path))[0]) == 150
    assert time.process_time() - before < 150 * 0.01
