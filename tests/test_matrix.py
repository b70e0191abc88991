"""Every method on every task: a run in this process, without Ray, or one line that says why not before it begins."""

import math
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from torch import nn

from raysubset.config import Config
from raysubset.data import FullSet, load_full_set
from raysubset.legs import FRESH, Start
from raysubset.models import build_model
from raysubset.pipeline.rounds import Rounds
from raysubset.planning import Plan, make_plan
from raysubset.run_directory import RunDirectory, aggregate_weights_path, minima_folder, minimum_folder, weights_path
from raysubset.subset_actors import Backlog, Pack
from raysubset.tasks import Spec
from raysubset.training import Distillation, Weights, evaluate, forward_share, minimize, why_not_packed
from raysubset.work import (
    AggregatePiece,
    Minimizer,
    Output,
    Piece,
    Run,
    TestPiece,
    leave_aggregate,
    leave_test,
    seeded_model,
)

MODULE = """
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from raysubset.tasks import Spec, Task

NUM = 72
rng = np.random.default_rng(0)
values = rng.normal(size=(NUM, 5))
images = rng.integers(0, 256, (NUM, 6, 6, 1), dtype=np.uint8)
bright = images.mean((1, 2, 3))


def of_images():
    return images, np.digitize(bright, np.quantile(bright, [1 / 3, 2 / 3]))


def of_rows():
    import pyarrow as pa

    columns = {f"x{k}": values[:, k] for k in range(5)}
    return pa.table({**columns, "place": ["a", "b"] * (NUM // 2), "label": (values.sum(1) > 0).astype(int)})


def of_numbers():
    import pyarrow as pa

    columns = {f"x{k}": values[:, k] for k in range(5)}
    return pa.table({**columns, "place": ["a", "b"] * (NUM // 2), "target": values @ np.arange(5.0) + 3})


def of_texts():
    return "".join(np.random.default_rng(0).choice(["abab", "cd ", "dca"], 200))


def of_masks():
    mask = (images[..., 0] > 127).astype(np.uint8)
    mask[images[..., 0] > 250] = 9
    return dict(image=images, mask=mask)


def of_boxes():
    return dict(seen=values.astype(np.float32), box=np.abs(values[:, :2]).astype(np.float32))


class Boxes(Task):
    quality = "distance"
    higher_is_better = False

    def spec(self):
        return Spec((5,), (2,))

    def batch(self, rows, draws):
        return rows["seen"], rows["box"]

    def loss(self, outputs, targets):
        return F.smooth_l1_loss(outputs, targets, reduction="sum")

    def measure(self, outputs, targets):
        return {"distance": (outputs - targets).norm(dim=1)}


def normed(spec):
    layers = [nn.Linear(*spec.inputs, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, spec.num_outputs)]
    return nn.Sequential(*layers)


def without_biases(spec):
    return nn.Sequential(nn.Linear(*spec.inputs, 6, bias=False), nn.ReLU(), nn.Linear(6, spec.num_outputs, bias=False))
"""

NUMBERS = {"data.name": "matrix_sets:of_numbers", "task.name": "regression", "model.width": 8}
TEXT = {"data.name": "matrix_sets:of_texts", "task.name": "next_token", "data.window": 8, "model.width": 8}
TASKS: dict[str, dict[str, Any]] = {
    "images": {"data.name": "matrix_sets:of_images", "model.width": 2, "model.depth": 1},
    "table": {"data.name": "matrix_sets:of_rows", "model.width": 8},
    "normed table": {"data.name": "matrix_sets:of_rows", "model.name": "matrix_sets:normed"},
    "squared": NUMBERS,
    "absolute": NUMBERS | {"task.loss": "absolute_error"},
    "huber": NUMBERS | {"task.loss": "huber"},
    "transformer": TEXT | {"data.vocabulary": "characters", "model.depth": 1},
    "lstm": TEXT | {"data.vocabulary": "characters", "model.name": "lstm"},
    "segmentation": {
        "data.name": "matrix_sets:of_masks",
        "task.name": "segmentation",
        "task.ignored": 9,
        "model.width": 2,
        "model.depth": 1,
    },
    "own": {"data.name": "matrix_sets:of_boxes", "task.name": "matrix_sets:Boxes", "model.width": 8},
}
TOKENS, WHOLE = ("transformer", "lstm"), ("segmentation", "own")  # whose examples are of no class

AGGREGATIONS = ("uniform_soup", "weighted_soup", "greedy_soup", "select_best", "fisher", "regmean", "ties", "dare")
AGGREGATIONS += ("savgm", "auto")
METHODS: dict[str, dict[str, Any]] = {
    **{name: {"aggregation.method": name} for name in AGGREGATIONS},
    "aligned_soup": {"aggregation.method": "aligned_soup", "subsets.start": "independent"},
    "adam": {"minimize.optimizer": "adam", "minimize.learning_rate": 0.01},
    "muon": {"minimize.optimizer": "muon", "minimize.learning_rate": None},
    "adamw": {"minimize.optimizer": "adamw", "minimize.learning_rate": 0.01},
    "lbfgs": {"minimize.optimizer": "lbfgs", "minimize.epochs": 8.0, "minimize.learning_rate": None},
    "cg": {"minimize.optimizer": "cg", "minimize.epochs": 8.0, "minimize.learning_rate": None},
    "gauss_newton": {"minimize.optimizer": "gauss_newton", "minimize.epochs": 8.0, "minimize.learning_rate": None},
    "levenberg_marquardt": {"minimize.optimizer": "levenberg_marquardt", "minimize.epochs": 20.0},
    "levenberg_marquardt of classes": {
        "minimize.optimizer": "levenberg_marquardt",
        "minimize.epochs": 20.0,
        "minimize.patience": 0,
        "task.loss": "squared_error",
    },
    "extrapolation": {"minimize.extrapolation.kind": "past_local"},
    "pswa": {"minimize.averaging.kind": "pswa"},
    "pwalks": {"minimize.averaging.kind": "pwalks", "minimize.averaging.num_samples": 3},
    **{name: {"minimize.averaging.kind": name, "minimize.averaging.decay": 0.5} for name in ("pswm", "ema")},
    "swa": {"minimize.averaging.kind": "swa", "minimize.averaging.swa_start": 0.3},
    "skipping": {"minimize.skipping.kind": "wus", "minimize.skipping.threshold": 0.9},
    "distillation": {"fine_tuning.epochs": 3.0, "fine_tuning.distillation": 0.5},
    "packing": {"subsets.per_actor": 2},
    "packed adam": {"subsets.per_actor": 2, "minimize.optimizer": "adam", "minimize.learning_rate": 0.01},
    "rounds": {
        "rounds.num": 2,
        "rounds.optimizer_state": "average",
        "rounds.outer_learning_rate": 0.7,
        "rounds.outer_momentum": 0.5,
    },
    "iid": {"subsets.scheme": "iid"},
    "dirichlet": {"subsets.scheme": "dirichlet"},
    "column": {"subsets.scheme": "column", "subsets.column": "place", "subsets.num": None},
    "balanced classes": {"task.class_weights": "balanced"},
    "label smoothing": {"task.label_smoothing": 0.1},
    "crop_flip": {"data.augmentation": "crop_flip"},
    "RS2": {"minimize.epoch_fraction": 0.5},
}
OF_SAME_MINIMA = ("uniform_soup", "weighted_soup", "greedy_soup", "select_best", "ties", "dare", "savgm")
BASE = {
    "subsets.num": 2,
    "trunk.epochs": 0.0,
    "fine_tuning.epochs": 0.0,
    "minimize.epochs": 3.0,
    "minimize.batch_size": 9,
    "actors.checkpoint_epochs": 9.0,
    "minimize.learning_rate": 0.05,
    "minimize.averaging.period": 0.34,
}


shares: dict[tuple[str, str], float] = {}


def share_counted_once(model: nn.Module, spec: Spec) -> float:
    """training.forward_share() of each network once, not once for each method."""
    key = (str(model), str(spec))
    return shares[key] if key in shares else shares.setdefault(key, forward_share(model, spec))


@pytest.fixture(scope="module", autouse=True)
def _module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("sets")
    (folder / "matrix_sets.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr(sys, "dont_write_bytecode", True)
        patch.setattr("raysubset.planning.plan.forward_share", share_counted_once)
        yield
    sys.modules.pop("matrix_sets", None)


class InProcess:
    """A pool of actors that does all work here."""

    def __init__(self, run: Run) -> None:
        self.opened = run

    def results(
        self, backlog: Backlog, start: Weights | None = None, **_: Any
    ) -> Iterator[tuple[Piece | AggregatePiece, dict[str, Any]]]:
        while (due := backlog.take()) is not None:
            pack = due[0]
            for piece, record in self.run([pack], None if pack.names_start else start):
                yield piece, record
                backlog.note_done(piece)

    def run(
        self, packs: Sequence[Pack], start: Weights | None, **_: Any
    ) -> Iterator[tuple[Piece | AggregatePiece, dict[str, Any]]]:
        minimizer = Minimizer(lambda: self.opened.full_set, num_gpus=0, node="here")
        for pack in packs:
            if isinstance(piece := pack.pieces[0], AggregatePiece):
                yield piece, leave_aggregate(self.opened.full_set, 0, piece, start, node="here")[1]
                continue
            pieces = cast(tuple[Piece, ...], pack.pieces)
            records = minimizer.minimize(pieces, start, attempts=[0] * len(pieces), waited_s=0.0)
            for piece, record in zip(pieces, records, strict=True):
                assert isinstance(record, dict), record
                yield piece, record


cached = cache(load_full_set)


REFUSED = {  # before anything runs; all other cells train
    **{("absolute", name): "the absolute error has no curvature: use" for name in ("fisher", "gauss_newton")},
    ("own", "fisher"): "cannot be used with mlp: the task matrix_sets:Boxes does not give fisher_terms(): use another",
    ("own", "gauss_newton"): "does not say how its loss curves: give it curvature(), or use lbfgs",
    **{
        (task, "levenberg_marquardt"): "cross-entropy is no sum of squares: set --task.loss squared_error, or use"
        for task in ("images", "table", "normed table")
    },
    **{
        (task, "levenberg_marquardt"): "is no sum of squares: use gauss_newton or lbfgs"
        for task in (*TOKENS, "segmentation")
    },
    ("absolute", "levenberg_marquardt"): "absolute error of standardised targets is no sum of squares: set",
    ("huber", "levenberg_marquardt"): "Huber's loss of standardised targets is no sum of squares: set --task.loss",
    ("own", "levenberg_marquardt"): "the task matrix_sets:Boxes does not give residuals(): use gauss_newton or lbfgs",
    **{
        (task, "levenberg_marquardt of classes"): f"task.loss=squared_error is {words}"
        for task, words in {
            **dict.fromkeys(TOKENS, "not one of next_token: use cross_entropy"),
            "segmentation": "not one of segmentation: use cross_entropy",
            "own": "for built-in tasks",
        }.items()
    },
    ("own", "skipping"): "does not say what to watch: give it watched(), or leave skipping out",
    (
        "lstm",
        "fisher",
    ): "with lstm: torch cannot take recurrent layers' gradients of single examples; use a soup",
    ("lstm", "regmean"): "goes by the inputs of linear and convolution layers, and lstm has none: set",
    ("lstm", "gauss_newton"): "gauss_newton cannot differentiate this network: use lbfgs or cg",
    **{(task, "aligned_soup"): "its inputs are tokens, and nothing is known of embeddings; use" for task in TOKENS},
    **{(task, "dirichlet"): "has no classes of examples: use stratified or iid" for task in (*TOKENS, *WHOLE)},
    **{(task, "column"): "it has none that could name subsets: use iid" for task in (*TOKENS, *WHOLE)},
    ("images", "column"): "'place' is no column of the training table; did you mean label?; it has label: choose one",
    **{(task, "balanced classes"): "leave it out" for task in (*TOKENS, "squared", "absolute", "huber", "own")},
    ("own", "label smoothing"): "is for classification, segmentation, next_token, not for matrix_sets:Boxes: leave it",
    **{(task, "label smoothing"): "leave it" for task in ("squared", "absolute", "huber")},
}
WITHOUT_FISHER = ("absolute", "lstm", "own")  # auto goes without it, and says so


def plan_of(task: str, method: str) -> tuple[Config, FullSet, Plan]:
    """What a run has in hand before it begins, or the refusal."""
    config = Config().with_overrides(BASE | TASKS[task] | METHODS[method])
    full_set = cached(*config.learned)
    return config, full_set, make_plan(config, full_set)


def run_of(config: Config, full_set: FullSet, plan: Plan, directory: RunDirectory) -> list[dict[str, Any]]:
    """The rounds' records of a run without trunk."""
    opened = Run(config, directory, full_set, [], lambda event: None)
    pool, start = cast(Any, InProcess(opened)), FRESH
    reason = why_not_packed(seeded_model(config, full_set), config.minimize)
    assert reason in (None, "torch cannot run recurrent layers with stacked weights") or config.subsets.per_actor == 1
    per_actor = 1 if reason else config.subsets.per_actor
    decisions = SimpleNamespace(shares=None, slots=[], per_actor=lambda *_: per_actor, may_go_alone=False)
    rounds, records = Rounds(opened, plan, cast(Any, decisions)), []
    for round in range(config.rounds.num):
        aggregate, record = rounds.run(pool, round, start)
        start = Start("warm", aggregate)
        records.append(record)
    return records


def fine_tuned(config: Config, full_set: FullSet, directory: RunDirectory, record: dict[str, Any]) -> nn.Module:
    """The aggregate after three epochs with the minima for teachers, as a Ray Train worker would do it."""
    model, *teachers = (build_model(config.model, full_set.spec) for _ in range(1 + len(record["minima"])))
    model.load_state_dict(directory.read_weights(aggregate_weights_path(0), record["files"]))
    for teacher, minimum in zip(teachers, record["minima"], strict=True):
        path = weights_path(minimum_folder(0, minimum["subset_id"]))
        teacher.load_state_dict(directory.read_weights(path, minimum["files"]))
    teaching = Distillation(teachers, share=config.fine_tuning.distillation, temperature=2.0)
    recipe = config.stage("fine_tuning")
    result = minimize(model, full_set.examples("train", augment=True), recipe, seed=0, distillation=teaching)
    assert result.history[-1].loss < result.history[0].loss
    return model


minima_of: dict[str, Path] = {}  # of tasks, of the first method with the same minima as others


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", TASKS)
def test_a_method_trains_a_task_or_says_why_not_before_it_begins(task: str, method: str, tmp_path: Path) -> None:
    directory = RunDirectory(str(tmp_path), "run")
    if (words := REFUSED.get((task, method))) is not None:
        with pytest.raises(ValueError, match=re.escape(words)) as caught:
            plan_of(task, method)
        assert "\n" not in str(caught.value)
        return
    config, full_set, plan = plan_of(task, method)
    if method in OF_SAME_MINIMA and (minima := minima_of.setdefault(task, tmp_path)) != tmp_path:
        shutil.copytree(minima / "run" / minima_folder(0), tmp_path / "run" / minima_folder(0))
    records, quality = run_of(config, full_set, plan, directory), full_set.quality.name
    for minimum in records[0]["minima"]:
        start = seeded_model(config, full_set, minimum["start_id"] if method == "aligned_soup" else "initial")
        own = full_set.examples("train", plan.subsets[minimum["subset_id"]].indices)
        before = evaluate(start, own, config.minimize).loss
        assert minimum["training"]["loss"] < before
        assert all(math.isfinite(epoch["loss"]) for epoch in minimum["history"])
    for made in (record["aggregation"] for record in records):
        refused = [one["method"] for one in made["candidates"] if one["error"]]
        assert refused == (["fisher"] if method == "auto" and task in WITHOUT_FISHER else [])
        for name in ("validation", "uniform_mean", "ensemble", "best_member"):
            assert math.isfinite(made[name]["loss"])
            assert math.isfinite(made[name][quality])
    weights = directory.read_weights(aggregate_weights_path(len(records) - 1), records[-1]["files"])
    if config.fine_tuning.epochs:
        weights = fine_tuned(config, full_set, directory, records[-1]).state_dict()
    assert all(value.isfinite().all() for value in weights.values())
    test = TestPiece(config, Output(directory, "", ""), "test", is_final=True)
    assert math.isfinite(leave_test(full_set, 0, test, weights, node="here")["metrics"][quality])


def test_auto_says_which_methods_it_goes_without() -> None:
    for task in WITHOUT_FISHER:
        (line,) = [note.text for note in plan_of(task, "auto")[2].advice if note.text.startswith("auto goes without")]
        assert line.startswith("auto goes without fisher: ")
    config = Config().with_overrides(BASE | TASKS["lstm"] | METHODS["aligned_soup"] | METHODS["auto"])
    (line,) = [note.text for note in make_plan(config, cached(*config.learned)).advice if "auto" in note.text]
    assert line.startswith(
        "auto goes without aligned_soup: this network's units cannot be aligned: its inputs are tokens"
    )


def test_a_network_without_biases_cannot_skip_its_weights_updates() -> None:
    own = {"data.name": "matrix_sets:of_rows", "model.name": "matrix_sets:without_biases"}
    config = Config().with_overrides(BASE | own | METHODS["skipping"])
    with pytest.raises(
        ValueError, match="moves biases and normalisation parameters alone, and the network has none: leave"
    ):
        make_plan(config, cached(*config.learned))
