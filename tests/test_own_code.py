"""The examples in jobs/own_code: each is what its header's command asks for, passes the plan's trials, and learns."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from raysubset.aggregation import merge
from raysubset.config import Config
from raysubset.data import load_full_set
from raysubset.objects_in_hand import hold_objects
from raysubset.planning import make_plan
from raysubset.training import evaluate, minimize
from raysubset.work import seeded_model
from tests.flags import parse_config

FOLDER = Path(__file__).parents[1] / "jobs" / "own_code"
FILES = sorted(path.name for path in FOLDER.glob("*.py"))
IN_PYTHON = "own_objects.py"  # which a script runs, not a command
SMALL = {"own_texts.py": {"model.width": 16, "model.depth": 1}}  # what would take ten seconds of a CPU as it stands


@pytest.fixture(autouse=True)
def _in_the_folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(FOLDER)
    monkeypatch.syspath_prepend(FOLDER)
    yield
    for name in FILES:
        sys.modules.pop(Path(name).stem, None)


def config_of(name: str) -> Config:
    """That of the command in a file's header."""
    found = re.search(r"^Command: +cd jobs/own_code && raysubset run (.*)$", (FOLDER / name).read_text(), re.M)
    assert found is not None
    return parse_config(shlex.split(found[1]))


@pytest.mark.parametrize("name", [name for name in FILES if name != IN_PYTHON])
def test_each_names_its_own_code_passes_the_trials_of_a_plan_and_lowers_the_loss(name):
    config = config_of(name).with_overrides(SMALL.get(name, {}))
    assert {reference.partition(":")[0] for reference in config.functions().values()} == {Path(name).stem}
    _plan_and_learn(config)


def test_objects_in_hand_pass_the_trials_of_a_plan_and_lower_the_loss():
    import own_objects  # pyright: ignore[reportMissingImports]

    net = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    with hold_objects(Config(), data=own_objects.points(), model=net, task=own_objects.Angle()) as config:
        assert [*config.functions().values()] == ["given:data", "given:Angle", "given:Sequential"]
        _plan_and_learn(config)


def _plan_and_learn(config: Config) -> None:
    full_set = load_full_set(*config.learned)
    make_plan(config, full_set)
    model, validation = seeded_model(config, full_set), full_set.examples("validation")
    before = evaluate(model, validation, config.minimize).loss
    recipe = config.stage("subsets", epochs=None if config.minimize.loop else 2.0)
    minimize(model, full_set.examples("train", augment=True), recipe, seed=0)
    assert evaluate(model, validation, recipe).loss < 0.9 * before


def test_the_median_leaves_out_what_one_member_has_alone():
    members = [{"weight": torch.tensor([1.0, 2.0])}, {"weight": torch.tensor([1.5, 1e9])}, {"weight": torch.ones(2)}]
    assert merge(members, "own_aggregation:median")["weight"].tolist() == [1.0, 2.0]
