"""What run() reads back, and what it will make again, of a run that is finished."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from raysubset.cli import call
from raysubset.config import Config, ModelConfig
from raysubset.models import build_model
from raysubset.pipeline import run
from raysubset.run_directory import MISTAKES_PATH, PREDICTIONS_PATH, REPORT_PATH, RESULT_PATH, RunDirectory
from raysubset.run_directory.ledger import Ledger, Work
from raysubset.tasks import Spec
from raysubset.trained_model import save_model
from raysubset.work.identity import identify
from tests.test_report import a_record
from tests.tiny import image_record

FINAL = ("model.safetensors", "model.json", PREDICTIONS_PATH, MISTAKES_PATH, RESULT_PATH)


@pytest.fixture
def finished(tmp_path: Path) -> RunDirectory:
    """The directory of a finished run of config()."""
    directory = RunDirectory(str(tmp_path), "r")
    directory.open(config(directory).to_dict(), {}, identify([config(directory)], {}, None))
    model = ModelConfig(width=2, depth=1)
    network = build_model(model, Spec((1, 8, 8), (2,)), seed=0)
    made = image_record(model, ("a", "b"), (8, 8, 1), 0.5, 0.5)
    files, _ = save_model(directory, network.state_dict(), made)
    table = pa.table({"label": [0, 1], "predicted": [1, 1], "image": [bytes(64)] * 2})
    files |= {path: directory.write_table(path, table) for path in (PREDICTIONS_PATH, MISTAKES_PATH)}
    files[RESULT_PATH] = directory.write_json(RESULT_PATH, {"name": "r"})
    directory.write_json(REPORT_PATH, a_record() | {"uri": "/where/it/was/made/r", "files": files})
    return directory


def config(directory: RunDirectory) -> Config:
    return Config(name="r", storage_path=directory.storage_path)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_finished_run_is_read_back_from_where_it_lies_now(finished: RunDirectory):
    report = run(config(finished))
    assert (report.uri, report.test.num_examples) == (finished.uri, a_record()["test"]["num_examples"])


def test_the_result_is_told_where_no_page_can_be_written(finished: RunDirectory, capsys: pytest.CaptureFixture[str]):
    finished.write_bytes("report", b"no folder")
    assert call(["run", "--name", "r", "--storage-path", finished.storage_path]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"No page, as it cannot be written: [Errno 20] Not a directory: '{finished.uri}/report")
    assert "Test accuracy 90.00%" in told


def test_a_ledger_that_a_driver_died_tidying_is_tidied_by_the_next_command(finished: RunDirectory):
    ledger, begun = Ledger(finished), Work("trunk", 0, None, 0, "here", "cpu", started_at=1.0, outcome="done")
    works = [begun, replace(begun, stage="test", started_at=2.0)]
    ledger.write(works[0])
    ledger.compact()
    for entry in works:  # the first is in both places
        ledger.write(entry)
    run(config(finished))
    assert finished.list("ledger") == []
    assert ledger.read() == works


@pytest.mark.parametrize("damage", [Path.unlink, cut, flip])
@pytest.mark.parametrize("path", FINAL)
def test_a_finished_run_of_which_an_artefact_is_damaged_or_gone_has_work_left_and_says_so_in_a_line(
    finished: RunDirectory, path: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
):
    assert finished.local_path is not None
    damage(finished.local_path / path)
    assert finished.read_record(REPORT_PATH, whole=True) is None
    (line,) = caplog.messages
    assert line.startswith(f"{path} in {finished.uri} is damaged: ")
    assert line.endswith("; the work behind it is done again")
