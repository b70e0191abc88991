"""A run whose parts are killed ends where an undisturbed one does: by the parts of tests/chaos/punish.py, in short."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from raysubset import Config, run
from raysubset.cluster import ray
from raysubset.data import load_full_set
from raysubset.run_directory import RunDirectory, history_path
from raysubset.run_directory.ledger import Ledger, Work
from tests import slow_steps
from tests.chaos import punish

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600), pytest.mark.usefixtures("ray_cluster")]

ROOT = Path(__file__).parents[2]
NUM_EPOCHS = 11
EVERY_EPOCHS = 2  # between two checkpoints of a subset
SUBSET_STEPS, STEPS = 11, 21  # an epoch, of a subset and of the full set
FLAGS = {
    "verb": "run",
    "name": "run",
    "subsets.num": 2,
    "minimize.epochs": 8,
    "minimize.extrapolation.kind": "past_local",
    "minimize.skipping.kind": "wus",
    "minimize.skipping.stages": "fine_tuning",
    "minimize.skipping.threshold": 0.999,  # so that every second epoch is frozen, from the third on
    "minimize.skipping.drop": 1.0,
    "trunk.epochs": 0,
    "rounds.num": 1,
    "fine-tuning.epochs": NUM_EPOCHS,
    "fine-tuning.num-workers": 2,
    "fine-tuning.distillation": 0.5,
    "actors.max-num": 1,  # so that whoever is hit is at work
    "actors.checkpoint-epochs": EVERY_EPOCHS,
    "actors.on-step": "tests.slow_steps:listen",
}
SEED = 9


class Workers(punish.Tagged):
    """Ray's workers on the session's node, beside those that are there already, and what these have started."""

    def __init__(self) -> None:
        super().__init__("")
        (self._warm,) = (p for p in psutil.Process().children() if "tests.forked_workers" in p.cmdline())
        self._before = set(self._warm.children())

    def environment(self) -> dict[str, str]:
        return dict(os.environ)  # with the token of the session's node

    def all(self) -> list[psutil.Process]:
        return [process for process in self._warm.children(recursive=True) if process not in self._before]


def num_checkpoints(num: int) -> Callable[[RunDirectory], bool]:
    """Whether attempts at subsets have left so many."""
    return lambda directory: sum("checkpoint" in path for path in directory.list("rounds", recursive=True)) >= num


def in_mid_fine_tuning(num_epochs: int) -> Callable[[RunDirectory], bool]:
    return lambda directory: len(directory.read_json_or_none(history_path("fine_tuning")) or ()) >= num_epochs


PLAN = [  # where steps are slow, so that the point is met, and who is hit
    (num_checkpoints(1), "subsets", EVERY_EPOCHS * SUBSET_STEPS, "actor", signal.SIGTERM),
    (num_checkpoints(2), "subsets", 2 * EVERY_EPOCHS * SUBSET_STEPS, "actor", signal.SIGKILL),
    (in_mid_fine_tuning(2), "fine_tuning", 2 * STEPS, "train_worker", signal.SIGKILL),
    (in_mid_fine_tuning(4), "fine_tuning", 4 * STEPS, "driver", signal.SIGTERM),  # as `ray job stop` sends it
    (in_mid_fine_tuning(7), "fine_tuning", 7 * STEPS, "driver", signal.SIGKILL),
]


def test_actors_a_train_worker_and_drivers_that_are_ended_change_no_bit_whatever_their_own_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(punish, "FLAGS", FLAGS)
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    settings = {key.replace("-", "_"): value for key, value in FLAGS.items() if key != "verb"}
    run(Config(storage_path=str(undisturbed)).with_overrides(settings))

    draw, workers, directory = random.Random(SEED), Workers(), RunDirectory(str(disturbed), "run")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)  # where drivers work, and slow_steps looks
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1")  # the processes of a user's run are all to be gone
    _, stage, from_step, _, _ = PLAN[0]
    slow_steps.slow_down(tmp_path, stage, from_step=from_step)
    address = ray.get_runtime_context().gcs_address
    driver = punish.start(disturbed, address, workers)
    try:
        for (reached, stage, _, kind, number), after in zip(PLAN, [*PLAN[1:], None], strict=True):
            wait(lambda reached=reached: reached(directory), driver)
            victims = [driver.pid] if kind == "driver" else [p.pid for p in workers.of_kind(kind)]
            assert victims, f"no {kind} lives"
            os.kill(draw.choice(victims), number)
            if kind == "driver":
                driver.wait()
                if number == signal.SIGTERM:
                    assert workers.end_all() == []
                    log = (disturbed / "driver.log").read_text()
                    assert "raysubset: stopped; finished work is kept" in log, log
                driver = punish.start(disturbed, address, workers)
            elif number == signal.SIGTERM:
                wait(lambda: any(work.outcome == "preempted" for work in Ledger(directory).read()), driver)
            if after is None:  # what a killed driver has left behind is slow until it has died
                wait(lambda: len(of_fine_tuning(directory)) == 4, driver)
            if after is None or after[1] != stage:
                slow_steps.speed_up(tmp_path, stage)
            if after is not None:
                slow_steps.slow_down(tmp_path, after[1], from_step=after[2])
        until = time.monotonic() + 300
        while driver.poll() is None:
            assert time.monotonic() < until, (disturbed / "driver.log").read_text()
            time.sleep(0.1)
        assert driver.returncode == 0, (disturbed / "driver.log").read_text()
    finally:
        driver.kill()
        driver.wait()
        workers.end_all(grace_s=0)

    outcome = punish.Outcome("local")
    punish.check(undisturbed, disturbed, outcome)
    assert outcome.problems == []
    works = Ledger(directory).read()
    assert {work.stage for work in works if work.outcome == "lost"} == {"subsets", "fine_tuning"}, works
    assert [work.stage for work in works if work.outcome == "preempted"] == ["subsets"], works
    assert len(of_fine_tuning(directory)) == 4  # a worker's death and two drivers' ends

    full_set = load_full_set(Config().data)
    num_train, num_validation = len(full_set.train), len(full_set.validation)
    num_frozen = (NUM_EPOCHS - 1) // 2
    forward = NUM_EPOCHS * (num_train + 2 * num_train + num_validation)  # two teachers
    forward += num_train + num_train + num_validation  # batch-norm statistics, training and validation losses
    (cost,) = (work.cost for work in of_fine_tuning(RunDirectory(str(undisturbed), "run")))
    assert (cost.num_forward, cost.num_backward) == (forward, NUM_EPOCHS * num_train - num_frozen * num_train // 2)


def of_fine_tuning(directory: RunDirectory) -> list[Work]:
    return [work for work in Ledger(directory).read() if work.stage == "fine_tuning"]


def wait(reached: Callable[[], bool], driver: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 240
    while not reached():
        assert driver.poll() is None, "the run ended before"
        assert time.monotonic() < until, "the point was not reached in time"
        time.sleep(0.1)  # where it is reached, steps are slow
