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
from raysubset.ledger import Ledger
from raysubset.run_directory import RunDirectory, history_path
from tests.chaos import punish

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(280), pytest.mark.usefixtures("ray_cluster")]

FLAGS = {
    "name": "run",
    "subsets.num": 2,
    "minimize.epochs": 60,
    "trunk.epochs": 0,
    "rounds.num": 1,
    "fine-tuning.epochs": 40,
    "fine-tuning.num-workers": 1,
    "actors.checkpoint-epochs": punish.EVERY_EPOCHS,
}
SEED = 9


def in_mid_subset(directory: RunDirectory) -> bool:
    return any("checkpoint" in path for path in directory.list("rounds", recursive=True))


def in_mid_fine_tuning(num_epochs: int) -> Callable[[RunDirectory], bool]:
    return lambda directory: len(directory.read_json_or_none(history_path("fine_tuning")) or ()) >= num_epochs


PLAN = [(in_mid_subset, "actor"), (in_mid_fine_tuning(3), "actor"), (in_mid_fine_tuning(20), "driver")]


def test_actors_of_both_stages_and_a_driver_that_are_killed_change_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(punish, "FLAGS", FLAGS)
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    settings = {key.replace("-", "_"): value for key, value in FLAGS.items()}
    run(Config(storage_path=str(undisturbed)).with_overrides(settings))

    draw, tagged, directory = random.Random(SEED), punish.Tagged(uuid.uuid4().hex), RunDirectory(str(disturbed), "run")
    driver = punish.start(disturbed, None, tagged)
    try:
        for reached, kind in PLAN:
            wait(lambda reached=reached: reached(directory), driver)
            time.sleep(draw.uniform(0, 0.2))
            victims = [driver.pid] if kind == "driver" else [p.pid for p in tagged.of_kind(kind)]
            assert victims, f"no {kind} lives"
            os.kill(draw.choice(victims), signal.SIGKILL)
            if kind == "driver":
                driver.wait()
                driver = punish.start(disturbed, None, tagged)
        assert driver.wait(timeout=150) == 0, (disturbed / "driver.log").read_text()
    finally:
        driver.kill()
        driver.wait()
        tagged.end_all(grace_s=0)

    outcome = punish.Outcome("local")
    punish.check(undisturbed, disturbed, outcome)
    assert outcome.problems == []
    works = Ledger(directory).read()
    lost = {work.stage for work in works if work.outcome == "lost"}
    assert lost == {"subsets", "fine_tuning"}, works


def wait(reached: Callable[[], bool], driver: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 120
    while not reached():
        assert driver.poll() is None, "the run ended before"
        assert time.monotonic() < until, "the point was not reached in time"
        time.sleep(0.02)
