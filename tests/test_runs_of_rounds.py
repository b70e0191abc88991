"""Aggregations through run(): what actors leave for them, what it costs, and that resuming changes no bit."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from raysubset import Config, run
from raysubset.events import AggregateDone, Event, MinimumDone, Retry, Stage, Start
from raysubset.pipeline import stages
from raysubset.report import sections, write_files
from raysubset.report.several import read_several, write_several
from raysubset.run_directory import (
    RunDirectory,
    aggregate_weights_path,
    minimum_folder,
    subsample_folder,
    weights_path,
)
from raysubset.run_directory.ledger import Ledger
from raysubset.run_directory.recent import RECENT
from raysubset.training import Weights
from tests.tiny import same_bits, stored_weights

pytestmark = pytest.mark.usefixtures("processes")

SMALL = {
    "trunk.epochs": 0.0,
    "fine_tuning.epochs": 0.0,
    "minimize.epochs": 1.0,
    "minimize.batch_size": 32,
    "actors.max_num": 1,
    "subsets.num": 2,
    "subsets.size": 200,
    "aggregation.statistics_examples": 40,
}


def config(folder: Path, name: str, **overrides: Any) -> Config:
    fields = {key.replace("__", "."): value for key, value in overrides.items()}
    return Config(name=name, storage_path=str(folder)).with_overrides(SMALL | fields)


def aggregate(directory: RunDirectory, round: int = 0) -> Weights:
    return stored_weights(directory, aggregate_weights_path(round))


class Enough(Exception):
    """Stands for a driver that dies."""


def stop_at(kind: type[Event], text: str):
    def listen(event: Event) -> None:
        if isinstance(event, kind) and text in event.text:
            raise Enough

    return listen


def test_savgm_minimizes_on_a_part_of_each_subset_and_resumes_there(tmp_path: Path) -> None:
    savgm = {"aggregation__method": "savgm", "minimize__epochs": 2.0}
    with pytest.raises(Enough):
        run(config(tmp_path, "broken", **savgm), on_event=stop_at(MinimumDone, "a part of subset"))
    whole = run(config(tmp_path, "broken", **savgm))
    directory = RunDirectory.at(whole.uri)
    works = Ledger(directory).read()
    done = [(work.stage, work.subset) for work in works if work.outcome == "done" and work.subset is not None]
    assert sorted(done) == [("subsamples", 0), ("subsamples", 1), ("subsets", 0), ("subsets", 1)]  # nothing twice
    record = whole.record["stages"]["rounds"][0]
    assert [part["num_examples"] for part in record["subsamples"]] == [50, 50]
    assert whole.record["planned_passes"] == pytest.approx(2 * 2 * 250 / whole.record["data"]["num_train"])
    by_hand = torch.zeros(())
    for subset in range(2):
        own = stored_weights(directory, weights_path(minimum_folder(0, subset)))["head.weight"]
        part = stored_weights(directory, weights_path(subsample_folder(0, subset)))["head.weight"]
        by_hand = by_hand + (own - 0.25 * part) / 0.75 / 2
    torch.testing.assert_close(aggregate(directory)["head.weight"], by_hand)


def test_members_of_a_later_round_begin_with_the_mean_optimizer_state_and_resuming_changes_no_bit(
    tmp_path: Path,
) -> None:
    rounds = {"rounds__num": 2, "rounds__optimizer_state": "average"}
    whole = RunDirectory.at(run(config(tmp_path, "unbroken", **rounds)).uri)
    with pytest.raises(Enough):
        run(config(tmp_path, "broken", **rounds), on_event=stop_at(Stage, "round 2 of 2"))
    broken = RunDirectory.at(run(config(tmp_path, "broken", **rounds)).uri)
    assert same_bits(aggregate(broken, 1), aggregate(whole, 1))
    others = []
    for which in ("keep", "reset"):
        report = run(config(tmp_path, which, **{**rounds, "rounds__optimizer_state": which}))
        others.append(RunDirectory.at(report.uri))
    assert same_bits(*(aggregate(directory, 0) for directory in others))
    results = [aggregate(directory, 1)["head.weight"] for directory in (whole, *others)]
    assert not any(torch.equal(results[i], results[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.fixture(scope="module", params=[None, 1])
def with_frozen(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, processes: Any
) -> tuple[dict[str, Any], Path]:
    """A run of weights that are not trained, and the same run stopped after two of its three rounds."""
    rounds = {"rounds__num": 3, "rounds__keep_minima": request.param, "model__name": "tests.adapter:adapter"}
    folder = tmp_path_factory.mktemp("frozen")
    run(config(folder, "unbroken", **rounds))
    with pytest.raises(Enough):
        run(config(folder, "broken", **rounds), on_event=stop_at(Stage, "round 3 of 3"))
    return rounds, folder


@pytest.mark.parametrize("damage", ["gone", "changed", "of another start"])
def test_frozen_weights_that_are_damaged_after_some_rounds_are_made_again(
    with_frozen: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """Though the minima of the first round, which left them first, are done and may be deleted."""
    rounds, folder = with_frozen
    whole = RunDirectory(str(folder), "unbroken")
    shutil.copytree(folder / "broken", tmp_path / "broken")
    (path,) = (tmp_path / "broken" / "frozen").iterdir()
    path.write_bytes(bytes(path.stat().st_size)) if damage == "changed" else path.unlink()
    if damage == "of another start":
        monkeypatch.setattr(stages, "restore_frozen", lambda *_: False)
    RECENT.frozen = {}  # as in a new process
    broken = RunDirectory.at(run(config(tmp_path, "broken", **rounds)).uri)
    assert same_bits(aggregate(broken, 2), aggregate(whole, 2))
    num_done = sum(work.outcome == "done" and work.stage == "subsets" for work in Ledger(broken).read())
    assert num_done <= 8 or damage == "of another start"  # 6 without damage


def test_measuring_rounds_less_often_changes_no_parameter_and_spares_what_it_costs(tmp_path: Path) -> None:
    rounds = {"rounds__num": 3, "rounds__outer_momentum": 0.5, "rounds__keep_minima": None}
    often, seldom = (
        run(config(tmp_path, f"every-{every}", **rounds, rounds__evaluate_every=every)) for every in (1, 2)
    )
    for round in range(3):
        made = [aggregate(RunDirectory.at(report.uri), round) for report in (often, seldom)]
        if not round:  # whose batch-norm statistics are recomputed only where it is measured
            made = [{name: value for name, value in one.items() if "running" not in name} for one in made]
        assert same_bits(*made)
    assert (often.test, often.validation) == (seldom.test, seldom.validation)
    first, *others = seldom.record["stages"]["rounds"]
    assert first["aggregation"]["validation"] is None
    assert [minimum["validation"] for minimum in first["minima"]] == [None, None]
    for round, same in zip(others, often.record["stages"]["rounds"][1:], strict=True):
        assert round["aggregation"]["validation"] == same["aggregation"]["validation"]
    num_train, num_validation = (seldom.record["data"][f"num_{split}"] for split in ("train", "validation"))
    # members on their own subset and validation; their mean and the stepped mean refreshed, on validation; training
    spared = 2 * (200 + num_validation) + 2 * (num_train + num_validation) + num_train
    assert often.passes - seldom.passes == pytest.approx(spared * seldom.record["model"]["forward_share"] / num_train)
    (table,) = [section for section in sections(seldom.record) if section.title.startswith("Rounds")]
    assert [row[0] for row in table.rows] == ["2", "3"]
    assert any("1 of 3 rounds were not measured" in str(line) for line in table.lines)
    write_files(seldom.uri)
    write_several(read_several([often.uri, seldom.uri]), str(tmp_path / "both.html"))
    rows = RunDirectory.at(seldom.uri).read_bytes("progress.csv").decode().splitlines()
    assert len(rows) == 1 + 3 * 2
    assert "evaluate-every 3" in " ".join(
        note["text"] for note in often.record["advice"]
    )  # they cost more to measure than to train


def test_whole_subset_optimizers_go_through_rounds_with_their_state_reset(tmp_path: Path) -> None:
    rounds = {"rounds__num": 2, "rounds__optimizer_state": "reset", "minimize__optimizer": "lbfgs"}
    report = run(config(tmp_path, "lbfgs", **rounds, minimize__epochs=4.0))
    losses = [round["aggregation"]["training"]["loss"] for round in report.record["stages"]["rounds"]]
    assert losses[1] < losses[0]


WAITING = """
import time
from pathlib import Path

from raysubset.aggregation import uniform_soup

FOLDER, NUM_ROUNDS, WAIT_S = Path({folder!r}), {num}, 240


def mean(minima, context):
    next_round = len(list(FOLDER.glob("rounds/*/aggregate.json"))) + 1
    until = time.monotonic() + WAIT_S
    while next_round < NUM_ROUNDS and not list(FOLDER.glob(f"rounds/{{next_round:04d}}/minima/*/minimum.json")):
        assert time.monotonic() < until, "no member of the next round has come to its end"
        time.sleep(0.05)
    return uniform_soup(minima).weights
"""


def test_members_of_the_next_round_end_while_a_round_is_aggregated_and_a_driver_that_dies_changes_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each aggregate but the last waits for a minimum of the next round, which would not come without overlap. The
    actor that starts the first of these is killed."""
    rounds = {"rounds__num": 3, "rounds__overlap": True, "actors__max_num": 2}
    (tmp_path / "waiting.py").write_text(WAITING.format(folder=str(tmp_path / "broken"), num=3))
    monkeypatch.syspath_prepend(tmp_path)
    waiting = config(tmp_path, "broken", **rounds, aggregation__method="waiting:mean")
    heard: list[Event] = []

    def hear(event: Event) -> None:
        if isinstance(event, Start) and event.attempt.round == 1 and not any(isinstance(e, Retry) for e in heard):
            os.kill(event.attempt.pid, signal.SIGKILL)
        heard.append(event)
        if isinstance(event, AggregateDone) and event.round == 1:
            raise Enough

    with pytest.raises(Enough):
        run(waiting, on_event=hear)
    for round in range(2):
        (aggregated,) = [n for n, e in enumerate(heard) if isinstance(e, AggregateDone) and e.round == round]
        begun = [e.attempt.round for e in heard[:aggregated] if isinstance(e, Start) and e.attempt.stage == "subsets"]
        assert round + 1 in begun
        assert round + 2 not in begun
        (stage,) = [n for n, e in enumerate(heard) if isinstance(e, Stage) and f"round {round + 1} of 3" in e.text]
        told = [e.record["round"] for e in heard[stage:aggregated] if isinstance(e, MinimumDone)]
        assert told == [round, round], "what was done meanwhile is told when its round has its turn"
    broken = RunDirectory.at(run(waiting).uri)
    whole = run(config(tmp_path, "whole", **rounds))
    assert same_bits(aggregate(broken, 2), aggregate(RunDirectory.at(whole.uri), 2))
    works = [work for work in Ledger(RunDirectory.at(whole.uri)).read() if work.stage == "subsets"]
    assert sorted((work.round, work.subset) for work in works) == [(r, k) for r in range(3) for k in range(2)]
    cost = whole.record["cost"]
    without = run(config(tmp_path, "without", **rounds | {"rounds__overlap": False})).record["cost"]
    assert cost["passes"] == pytest.approx(without["passes"])
    assert cost["critical_path_passes"] < without["critical_path_passes"]
