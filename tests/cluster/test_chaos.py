"""A run whose parts are killed ends where an undisturbed one does: by the parts of tests/chaos/punish.py, in short."""

import os
import random
import signal
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from raysubset import Config, run
from raysubset.data import load_full_set
from raysubset.ledger import Ledger
from raysubset.run_directory import RunDirectory, history_path
from tests.chaos import punish

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600), pytest.mark.usefixtures("ray_cluster")]

NUM_EPOCHS = 31
FLAGS = {
    "name": "run",
    "subsets.num": 2,
    "minimize.epochs": 60,
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
    "actors.checkpoint-epochs": punish.EVERY_EPOCHS,
}
SEED = 9


def num_checkpoints(num: int) -> Callable[[RunDirectory], bool]:
    """Whether attempts at subsets have left so many."""
    return lambda directory: sum("checkpoint" in path for path in directory.list("rounds", recursive=True)) >= num


def in_mid_fine_tuning(num_epochs: int) -> Callable[[RunDirectory], bool]:
    return lambda directory: len(directory.read_json_or_none(history_path("fine_tuning")) or ()) >= num_epochs


PLAN = [
    (num_checkpoints(1), "actor", signal.SIGTERM),
    (num_checkpoints(2), "actor", signal.SIGKILL),
    (in_mid_fine_tuning(3), "train_worker", signal.SIGKILL),
    (in_mid_fine_tuning(9), "driver", signal.SIGINT),
    (in_mid_fine_tuning(19), "driver", signal.SIGKILL),
]


def test_actors_a_train_worker_and_drivers_that_are_ended_change_no_bit_whatever_their_own_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(punish, "FLAGS", FLAGS)
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    settings = {key.replace("-", "_"): value for key, value in FLAGS.items()}
    run(Config(storage_path=str(undisturbed)).with_overrides(settings))

    draw, tagged, directory = random.Random(SEED), punish.Tagged(uuid.uuid4().hex), RunDirectory(str(disturbed), "run")
    driver = punish.start(disturbed, None, tagged)
    try:
        for reached, kind, number in PLAN:
            wait(lambda reached=reached: reached(directory), driver)
            tagged.all()  # as they are now: those of a driver that has ended are known only if they were seen
            victims = [driver.pid] if kind == "driver" else [p.pid for p in tagged.of_kind(kind)]
            assert victims, f"no {kind} lives"
            os.kill(draw.choice(victims), number)
            if kind == "driver":
                driver.wait()
                if number == signal.SIGINT:
                    assert tagged.end_all() == []
                driver = punish.start(disturbed, None, tagged)
        until = time.monotonic() + 300
        while driver.poll() is None:
            tagged.all()
            assert time.monotonic() < until, (disturbed / "driver.log").read_text()
            time.sleep(0.2)
        assert driver.returncode == 0, (disturbed / "driver.log").read_text()
    finally:
        driver.kill()
        driver.wait()
        tagged.end_all(grace_s=0)

    outcome = punish.Outcome("local")
    punish.check(undisturbed, disturbed, outcome)
    assert outcome.problems == []
    works = Ledger(directory).read()
    assert {work.stage for work in works if work.outcome == "lost"} == {"subsets", "fine_tuning"}, works
    assert [work.stage for work in works if work.outcome == "preempted"] == ["subsets"], works
    assert len([work for work in works if work.stage == "fine_tuning"]) == 4  # a worker's death and two drivers' ends

    full_set = load_full_set(Config().data)
    num_train, num_validation = len(full_set.train), len(full_set.validation)
    num_frozen = (NUM_EPOCHS - 1) // 2
    forward = NUM_EPOCHS * (num_train + 2 * num_train + num_validation)  # two teachers
    forward += num_train + num_train + num_validation  # batch-norm statistics, training and validation losses
    (cost,) = (w.cost for w in Ledger(RunDirectory(str(undisturbed), "run")).read() if w.stage == "fine_tuning")
    assert (cost.num_forward, cost.num_backward) == (forward, NUM_EPOCHS * num_train - num_frozen * num_train // 2)


def wait(reached: Callable[[], bool], driver: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 120
    while not reached():
        assert driver.poll() is None, "the run ended before"
        assert time.monotonic() < until, "the point was not reached in time"
        time.sleep(0.02)
