"""subsets.per_actor on a local cluster: what is decided, what packed minima are, and that a death costs no subset."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from raysubset import Config, RunReport, run
from raysubset.events import Event, Note, Progress
from raysubset.run_directory import DECISIONS_PATH, RunDirectory, minimum_folder, weights_path
from raysubset.run_directory.ledger import Ledger
from raysubset.training.packing import PAYS
from raysubset.work.identity import identify
from tests.slow_steps import slow_down, speed_up
from tests.tiny import stored_weights

pytestmark = pytest.mark.usefixtures("processes")

SMALL = {"trunk.epochs": 0.0, "fine_tuning.epochs": 0.0, "subsets.num": 3, "actors.max_num": 1}


def config(folder: Path, name: str, **overrides: Any) -> Config:
    fields = {key.replace("__", "."): value for key, value in overrides.items()}
    return Config(name=name, storage_path=str(folder)).with_overrides(SMALL | fields)


def decide(config: Config, *, taken: bool) -> None:
    """Begin a run with the decision on packing already there, which a run keeps to: so it is forced."""
    directory = RunDirectory(config.storage_path, config.run_name())
    directory.open(config.to_dict(), {}, identify([config], {}, None))
    packing = {"per_actor": config.subsets.per_actor, "taken": taken}
    directory.write_json(DECISIONS_PATH, {"num_gpus": 0.0, "num_workers": 1, "packing": packing})


def minima(report: RunReport) -> list[dict[str, torch.Tensor]]:
    run = RunDirectory.at(report.uri)
    return [stored_weights(run, weights_path(minimum_folder(0, subset))) for subset in range(3)]


def test_a_pack_whose_actor_is_killed_goes_on_and_ends_at_the_minima_of_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = {"minimize__epochs": 4.0, "minimize__learning_rate": 0.01}
    alone = run(config(tmp_path, "alone", **long))
    slowly = {"actors__on_step": "tests.slow_steps:listen"}
    packed = config(tmp_path, "packed", subsets__per_actor=3, **long, **slowly)
    decide(packed, taken=True)
    monkeypatch.chdir(tmp_path)
    slow_down(tmp_path, "subsets", from_step=2 * 7 + 1)
    events: list[Event] = []
    killed: list[int] = []

    def kill_once(event: Event) -> None:
        events.append(event)
        if isinstance(event, Progress) and not killed and event.epoch >= 2:
            killed.append(event.attempt.pid)
            os.kill(event.attempt.pid, signal.SIGKILL)
            speed_up(tmp_path, "subsets")

    together = run(packed, on_event=kill_once)
    assert killed
    assert any("packing: 3 subsets at once" in event.text for event in events if isinstance(event, Note))
    works = [work for work in Ledger(RunDirectory.at(together.uri)).read() if work.stage == "subsets"]
    assert sorted((work.subset, work.attempt, work.outcome) for work in works) == [
        (subset, attempt, outcome) for subset in range(3) for attempt, outcome in ((0, "lost"), (1, "done"))
    ]
    for work in works:
        assert work.cost.num_forward > 0
        assert work.ended_at is not None
    done = [work for work in works if work.outcome == "done"]
    assert all(work.cost.num_backward < 4 * 431 for work in done)  # from a checkpoint
    held_s = max(work.ended_at or 0 for work in done) - min(work.started_at for work in done)
    assert 0.5 * held_s < sum(work.cost.device_s for work in done) < 1.5 * held_s  # shared out, not counted for each
    for one, other in zip(minima(alone), minima(together), strict=True):
        for key, value in one.items():
            torch.testing.assert_close(other[key], value, rtol=1e-2, atol=1e-3)


def test_packing_is_timed_and_taken_only_if_it_pays_and_the_run_says_so(tmp_path: Path) -> None:
    events: list[Event] = []
    wide = {"model__name": "mlp", "model__width": 512, "minimize__epochs": 1.0, "subsets__per_actor": 3}
    report = run(config(tmp_path, "decided", **wide), on_event=events.append)
    (note,) = [event for event in events if event.text.startswith("packing: ")]
    decision = RunDirectory.at(report.uri).read_json(DECISIONS_PATH)["packing"]
    assert decision["taken"] == (decision["ratio"] < PAYS)  # it is slower here, but on a busy machine who knows
    words = "3 subsets at once on an actor" if decision["taken"] else "subsets one by one"
    assert f"packing: {words}; a step of 3 takes" in note.text
    assert decision["device"] == "cpu"
    (trial,) = [work for work in Ledger(RunDirectory.at(report.uri)).read() if work.stage == "measuring"]
    assert trial.outcome == "done"
    assert trial.cost.num_steps >= 5 * 4 * 4  # five repeats, of one and of three members, of four steps or more


def test_a_recipe_that_cannot_be_packed_is_done_one_by_one_and_says_so(tmp_path: Path) -> None:
    notes: list[str] = []
    asked = config(tmp_path, "lbfgs", subsets__per_actor=3, minimize__optimizer="lbfgs", minimize__epochs=2.0)
    run(asked, on_event=lambda event: notes.append(event.text) if isinstance(event, Note) else None)
    assert "packing: subsets one by one, since lbfgs searches a line for each subset" in notes


def test_a_pack_whose_members_all_diverge_names_one_and_closes_the_ledger_entry_of_each(tmp_path: Path) -> None:
    wild = config(
        tmp_path, "wild", subsets__per_actor=3, minimize__epochs=2.0, minimize__learning_rate=1e30, actors__quorum=1
    )
    decide(wild, taken=True)
    with pytest.raises(ValueError, match=r"subset \d on node .*DivergedError: the loss became nan in epoch 1"):
        run(wild)
    works = [w for w in Ledger(RunDirectory(wild.storage_path, "wild")).read() if w.stage == "subsets"]
    assert [work.outcome for work in works] == ["failed"] * 3
    assert all(work.cost.num_forward > 0 for work in works)
