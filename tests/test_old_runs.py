"""Directories that an older version wrote: they resume, and are read.

`python -m tests.test_old_runs` wrote tests/old_runs.tar.xz with the code of 2026-11-30 (5701542, torch 2.14). A change
that breaks it is no reason to write it anew: users have such directories. "begun" is the same run as "finished", ended
in its second round, with one minimum and a checkpoint of the other.
"""

import tarfile
from contextlib import chdir, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from raysubset import Config, compare, load_model, run, sweep
from raysubset.cli.commands import call
from raysubset.data import load_full_set
from raysubset.events import Event, LegDone, Progress, Stage
from raysubset.run_directory import (
    COMPARISON_PATH,
    MODEL_PATH,
    PREDICTIONS_PATH,
    RunDirectory,
    checkpoint_path,
    minimum_path,
)
from raysubset.run_directory.ledger import Ledger
from tests.processes import install
from tests.slow_steps import slow_down
from tests.tiny import stored_weights

ARCHIVE = Path(__file__).with_name("old_runs.tar.xz")
NETWORK = {"model.name": "mlp", "model.width": 4, "model.depth": 1, "actors.max_num": 1}
ROUNDS = NETWORK | {"subsets.num": 2, "rounds.num": 2, "trunk.epochs": 1.0, "minimize.epochs": 3.0}
RUN = Config().with_overrides(ROUNDS | {"fine_tuning.epochs": 1.0})
COMPARISON = {"seeds": 2, "budgets": [2.0], "arms": ["B", "H:rounds.send=int8"], "learning_rates": [0.1]}
STEPS_PER_EPOCH = 11
HALF = "rounds/0001/minima/{:04d}"  # a subset's folder in the second round


def at(config: Config, folder: Path, name: str) -> Config:
    return config.with_overrides({"storage_path": str(folder), "name": name})


def write(folder: Path) -> None:
    """Sweep, and with processes in the place of Ray's run, compare, and end a run as its last minimum nears its end."""
    sweep(at(RUN, folder, "swept"), {"subsets.size": [200, 400]}, seeds=1)
    with pytest.MonkeyPatch.context() as monkeypatch, chdir(folder):
        processes = install(monkeypatch)
        write_runs(folder)
        for actor in list(processes.actors):
            processes.kill(actor)


def write_runs(folder: Path) -> None:
    run(at(RUN, folder, "finished"))
    compare(at(Config().with_overrides(NETWORK), folder, "compared"), **COMPARISON)

    def end(event: Event) -> None:
        if isinstance(event, Stage) and event.stage == "subsets" and event.round == 1:
            slow_down(folder, "subsets", from_step=2 * STEPS_PER_EPOCH + 1)
        if isinstance(event, Progress) and (event.attempt.round, event.attempt.subset) == (1, 1) and event.epoch > 2:
            raise KeyboardInterrupt

    slowly = at(RUN, folder, "begun").with_overrides({"actors.on_step": "tests.slow_steps:listen"})
    with suppress(KeyboardInterrupt):
        run(slowly, on_event=end)


@pytest.fixture
def folder(tmp_path: Path, processes: None) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_a_run_that_was_begun_goes_on_and_does_nothing_twice(folder: Path) -> None:
    directory = RunDirectory(str(folder), "begun")
    minimum, works = directory.read_bytes(minimum_path(HALF.format(0))), Ledger(directory).read()
    assert directory.exists(checkpoint_path(HALF.format(1), 0))
    report = run(at(RUN, folder, "begun"))
    assert directory.read_bytes(minimum_path(HALF.format(0))) == minimum
    done = {(work.stage, work.round, work.subset) for work in works if work.outcome == "done"}
    later = [work for work in Ledger(directory).read() if work not in works and work.outcome == "done"]
    assert ("subsets", 1, 0) in done
    assert not done & {(work.stage, work.round, work.subset) for work in later}
    (resumed,) = (work for work in later if work.stage == "subsets")
    assert 0 < resumed.cost.num_steps < 3 * STEPS_PER_EPOCH  # it began at the checkpoint
    ends = [stored_weights(RunDirectory(str(folder), name), MODEL_PATH) for name in ("begun", "finished")]
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-4)  # the same run; processors differ in the last bits
    finished = run(at(RUN, folder, "finished"))
    assert report.test.accuracy == pytest.approx(finished.test.accuracy, abs=0.01)
    assert report.passes == pytest.approx(finished.passes)  # it was ended with a checkpoint, so nothing was lost


def test_a_finished_run_is_read_and_its_model_predicts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri, notes = str(folder / "finished"), list[str]()
    report = run(at(RUN, folder, "finished"), on_event=lambda event: notes.append(event.text))
    assert "is finished" in notes[0]
    predictions = RunDirectory.at(uri).read_table(PREDICTIONS_PATH)
    images = load_full_set(RUN.data).test.take()["image"].movedim(-1, 1)
    assert load_model(uri)(images).argmax(1).tolist() == predictions["predicted"].to_pylist()
    assert call(["report", uri]) == 0
    assert f"{report.test.accuracy:.2%}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["finished", "compared", "swept"])
def test_what_is_finished_has_its_page_and_its_line(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(["report", str(folder / name), "--format", "html"]) == 0
    page = capsys.readouterr().out.strip()
    assert "<svg" in Path(page).read_text()
    assert call(["ls", str(folder)]) == 0
    assert name in capsys.readouterr().out


def test_a_finished_comparison_finds_all_its_legs(folder: Path) -> None:
    events: list[Event] = []
    old = RunDirectory(str(folder), "compared").read_json(COMPARISON_PATH)
    report = compare(at(Config().with_overrides(NETWORK), folder, "compared"), **COMPARISON, on_event=events.append)
    legs = [event for event in events if isinstance(event, LegDone)]
    assert legs
    assert all(leg.was_there for leg in legs)
    assert [arm["points"] for arm in report.arms] == [arm["points"] for arm in old["arms"]]
    # it was vacuous by an earlier rule, which took S as 0 with the seed with which neither arm reaches the quality
    assert report.verdicts["total"]["word"] == "inconclusive"


if __name__ == "__main__":
    with TemporaryDirectory() as written, tarfile.open(ARCHIVE, "w:xz") as archive:
        write(Path(written))
        for child in sorted(Path(written).iterdir()):
            if child.is_dir():
                archive.add(child, child.name)
