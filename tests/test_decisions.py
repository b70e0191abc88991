"""What a run decides once by what was measured: the workers of fine-tuning."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raysubset import Config
from raysubset.config import DataConfig
from raysubset.data import FullSet, load_full_set
from raysubset.pipeline.decisions import TRAIN_START_S, Decisions
from raysubset.planning import Plan, make_plan
from raysubset.run_directory import DECISIONS_PATH, RunDirectory
from raysubset.run_directory.ledger import Work
from raysubset.training import Cost
from raysubset.work import Run
from tests.processes import install

NUM_TRAIN = 1294
SUBSET = Work("subsets", 0, 0, 0, "node", "cpu", started_at=1.0, outcome="done")


@pytest.fixture(scope="module")
def full_set() -> FullSet:
    return load_full_set(Config().data)


@pytest.fixture(scope="module")
def plan(full_set: FullSet) -> Plan:
    return make_plan(Config(), full_set)


def decisions(folder: Path, full_set: FullSet, plan: Plan, notes: list[str], **record: Any) -> Decisions:
    """Those of a run of two epochs of fine-tuning, of which one pass took an actor pass_s."""
    directory = RunDirectory(str(folder), "run")
    directory.write_json(DECISIONS_PATH, {"num_gpus": 0.0, **record})
    return Decisions(Run(Config(), directory, full_set, (), lambda event: notes.append(event.text)), plan)


def worked(pass_s: float) -> Work:
    """A minimization that took so long a pass."""
    return replace(SUBSET, cost=Cost(num_forward=NUM_TRAIN, num_backward=NUM_TRAIN, device_s=pass_s))


@pytest.mark.parametrize(("times", "num"), [(0.9, 1), (1.1, 8)])
def test_several_workers_fine_tune_where_they_save_more_than_ray_train_takes_to_start(
    tmp_path: Path, full_set: FullSet, plan: Plan, times: float, num: int
) -> None:
    notes: list[str] = []
    made = decisions(tmp_path, full_set, plan, notes, most_workers=8)
    assert made.may_go_alone
    validated = plan.forward_share * len(full_set.validation) / NUM_TRAIN
    alone_s = times * TRAIN_START_S * 8 / 7  # of which eight workers save 7 / 8
    made._run.ledger.write(worked(alone_s / (2 * (1 + validated))))
    made._run.ledger.write(replace(worked(1e6), subset=1))  # on a node that was busy
    assert made.num_workers(num_teachers=0) == num
    assert notes[-1].startswith(f"fine_tuning.num_workers=auto: {num} of at most 8; alone it is some ")
    record = dict(made.record)
    assert record["alone_s"] == pytest.approx(alone_s)

    made._run.ledger.write(replace(worked(1e-3), subset=2))
    again = Decisions(made._run, plan)  # a later session is as fast as it likes
    assert again.num_workers(num_teachers=0) == num
    assert again.record == record
    assert again.may_go_alone == (num == 1)


def test_teachers_make_fine_tuning_longer(tmp_path: Path, full_set: FullSet, plan: Plan) -> None:
    made = decisions(tmp_path, full_set, plan, [], most_workers=2)
    made._run.ledger.write(worked(0.75 * TRAIN_START_S))  # alone some 1.5 times, of which two workers save half
    assert made._workers(0)["num_workers"] == 1
    assert made._workers(4)["num_workers"] == 2


def test_workers_of_a_streamed_set_leave_a_cpu_to_the_tasks_that_read_it(
    tmp_path: Path, full_set: FullSet, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, num_cpus=2)
    for streamed, most in ((False, 2), (True, 1)):
        config = Config(data=DataConfig(name="images.parquet", streamed=streamed))
        run = Run(config, RunDirectory(str(tmp_path), f"{most}"), full_set, (), lambda event: None)
        assert Decisions(run, plan).record["most_workers"] == most


def test_what_was_asked_for_or_decided_before_is_kept_without_a_word(
    tmp_path: Path, full_set: FullSet, plan: Plan
) -> None:
    notes: list[str] = []
    made = decisions(tmp_path, full_set, plan, notes, num_workers=3)
    made._run.ledger.write(worked(1e-3))
    assert (made.num_workers(num_teachers=0), made.may_go_alone, notes) == (3, False, [])
