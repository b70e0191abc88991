"""The rules that keep the rooms apart: layers, and what may be imported where."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_layers_hold() -> None:
    command = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


BANNED = {
    "raysubset": {"torch", "ray", "numpy"},
    "raysubset.config": {"torch", "ray", "numpy"},
    "raysubset.data": {"ray", "torchvision", "sklearn"},
    "raysubset.training": {"ray", "pandas"},
    "raysubset.aggregation": {"ray", "pandas"},
    "raysubset.run_directory": {"ray"},
    "raysubset.work": {"ray", "pandas", "sklearn", "torchvision"},
    "raysubset.tracking": {"ray", "mlflow", "wandb"},
    "raysubset.subset_actors": {"ray.tune", "ray.train", "pandas", "sklearn", "torchvision", "rich", "triton"},
    "raysubset.pipeline": {"ray.tune", "ray.train", "pandas", "sklearn", "torchvision", "torch._dynamo", "matplotlib"},
    "raysubset.comparison": {"ray.tune", "ray.train", "pandas", "matplotlib"},
}

# One process for both tests, as torch alone takes seconds: rooms one after the other, then a step
IMPORTS_AND_A_STEP = """
import importlib, json, sys
banned, found = json.loads(sys.argv[1]), []
for module in banned:
    importlib.import_module(module)
    found += [f"{module} imports {name}" for name in banned[module] if name in sys.modules]

import torch
from torch import distributed, nn
from raysubset import Config
from raysubset.data import load_full_set
from raysubset.models import build_model
from raysubset.planning import make_plan
from raysubset.training import minimize
from raysubset.training.uncompiled import data_parallel
config = Config()
full_set = load_full_set(config.data)
make_plan(config, full_set)
model, recipe = build_model(config.model, full_set.spec), config.stage("subsets")
minimize(model, full_set.examples("train"), recipe, seed=0, on_step=lambda progress: True)
distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
data_parallel(nn.Linear(2, 1))(torch.zeros(1, 2)).sum().backward()  # as a worker of Ray Train does
heavy = ("torch._dynamo", "sympy", "sklearn", "scipy", "torchvision", "ray.train")
print(json.dumps([found, [name for name in heavy if name in sys.modules]]))
"""


@pytest.fixture(scope="module")
def imported() -> list[list[str]]:
    """What rooms import that they must not know, and what a plan and a step import after all rooms."""
    banned = json.dumps({module: sorted(names) for module, names in BANNED.items()})
    command = [sys.executable, "-c", IMPORTS_AND_A_STEP, banned]
    return json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def test_importing_a_room_does_not_pay_for_what_it_must_not_know(imported: list[list[str]]) -> None:
    assert imported[0] == []


def test_a_plan_and_a_step_import_neither_torch_s_compiler_and_sympy_nor_what_only_holds_data(
    imported: list[list[str]],
) -> None:
    assert imported[1] == []


def test_the_top_level_holds_what_it_may_and_every_room_is_named_in_the_manual() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    allowed = {"pyproject.toml", "README.md", "LICENSE", "raysubset", "clusters", "jobs", "tests", ".ci", ".gitignore"}
    assert {path.split("/")[0] for path in tracked} <= allowed
    manual = (ROOT / "raysubset" / "README.md").read_text()
    rooms = {path.split("/")[1] for path in tracked if path.startswith("raysubset/")}
    rooms -= {"__init__.py", "__main__.py", "README.md"}
    assert [room for room in sorted(rooms) if room not in manual] == []
