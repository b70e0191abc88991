"""Mistakes in what is learned - a task of one's own, targets, tokens, masks - are told in a line with a way out."""

import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from raysubset.comparison import compare
from raysubset.comparison.arms import parse_arm
from raysubset.comparison.checks import unparted_arms
from raysubset.config import Config, DataConfig, MinimizeConfig, TaskConfig
from raysubset.data import Examples, FullSet, load_full_set
from raysubset.planning import make_plan
from raysubset.tasks import NextToken, Segmentation, sums_of
from raysubset.training import evaluate, evaluate_for_ensemble

TASK = """
import numpy as np
import torch
from raysubset.tasks import Spec, Task

def rows():
    seen = np.arange(40, dtype=np.float32).reshape(20, 2)
    return dict(seen=seen, box=seen * 2)

class Boxes(Task):
    quality = "distance"

    def spec(self):
        return Spec((2,), (2,))

    def batch(self, rows, draws):
        return rows["seen"], rows["box"]

    def loss(self, outputs, targets):
        return (outputs - targets).square().sum()

    def measure(self, outputs, targets):
        return {"distance": (outputs - targets).norm(dim=1)}

class Own(Boxes):
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Writes a module bad_tasks that can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(text: str) -> None:
        (tmp_path / "bad_tasks.py").write_text(text)
        monkeypatch.delitem(sys.modules, "bad_tasks", raising=False)
        importlib.invalidate_caches()

    return write


def loaded(task: str = "bad_tasks:Own", data: str = "bad_tasks:rows", **settings: Any) -> FullSet:
    return load_full_set(DataConfig(name=data, **settings), TaskConfig(name=task))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("loss = None", "'bad_tasks:Own' raised TypeError: 'NoneType' object is not callable"),
        ("def loss(self, outputs, targets):\n        raise NotImplementedError", r"it has no loss\(\)"),
        (
            "def spec(self):\n        return (2,), (2,)",
            r"spec\(\) returned a tuple: it should be a raysubset.tasks.Spec",
        ),
        (
            "def spec(self):\n        return Spec((3,), (2,))",
            r"gave inputs torch.float32 \[4, 2\], where .* float \[3\]",
        ),
        ("def spec(self):\n        return Spec((2,), (2,), 9)", r"inputs torch.float32 .* spec\(\) says integer \[2\]"),
        ("def batch(self, rows, draws):\n        return rows['seen']", r"should return \(inputs, targets\), two"),
        (
            "def batch(self, rows, draws):\n        return rows['image'], 0",
            "raised KeyError: 'image'; see bad_tasks.py, l",
        ),
        (
            "def batch(self, rows, draws):\n        return rows['seen'], rows['box'].sum(0)",
            r"gave targets \[2\] for 4 examples: one an example",
        ),
        (
            "def batch(self, rows, draws):\n        return torch.rand_like(rows['seen']), rows['box']",
            r"batch\(\) without draws, as evaluation calls it, gives a row other inputs alone than in a batch",
        ),
        (
            "def batch(self, rows, draws):\n        x = rows['box']\n        return x, x.cumsum(0)",
            r"other targets alone than in a batch: draw only in draw\(\), or compute noise from the row, such as an",
        ),
        ("def targets(self, rows):\n        return rows['seen']", "a row other targets alone than in a batch"),
        (
            "def draw(self, num, seed):\n        return torch.rand(num, 2)\n\n    def batch(self, rows, draws):\n"
            "        return (rows['seen'] if draws is None else rows['seen'][:1]), rows['box']",
            r"gave inputs torch.float32 \[1, 2\], where .* for each of 4 examples",
        ),
        (
            "def batch(self, rows, draws):\n        return rows['seen'][:, : 1 if draws is None else 2], rows['box']",
            r"gave inputs torch.float32 \[4, 1\], .* of 4 examples, without draws",
        ),
        (
            "def loss(self, outputs, targets):\n        return (outputs - targets).square().mean()",
            "and of the batch twice .*: it should be summed over the examples, not their mean",
        ),
        (
            "def loss(self, outputs, targets):\n        return (outputs @ outputs.T).logsumexp(1).sum()",
            "should be summed over the examples, each alone and without draws; or set compares_examples",
        ),
        (
            "def loss(self, outputs, targets):\n        each = (outputs - targets).square().sum(1)\n"
            "        return (each * targets[:, 0]).sum() / targets[:, 0].sum() * len(each)",
            "of a batch is .* and of its examples one by one .* in sum: let it divide by nothing that depends on the b",
        ),
        *(
            (f"def spec(self):\n        return Spec({sizes}, (2,))", r"Spec.inputs = .*: give a tuple of whole numbers")
            for sizes in ("2", "{'a': (2,)}", "(None, 2)", "(2.0,)", "'2'")
        ),
        (
            "compares_examples = True\n\n    def loss(self, outputs, targets):\n"
            "        return (outputs @ outputs.T).logsumexp(1).mean()",
            "and of the batch twice .*: it should be summed over the examples, not their mean",
        ),
        (
            "def measure(self, outputs, targets):\n        return {'distance': outputs[:, 0] - outputs.mean()}",
            r"gives another distance of an example alone than in a batch: .*; or set compares_examples = True",
        ),
        (
            "def measure(self, outputs, targets):\n        return {'distance': torch.rand(len(outputs))}",
            r"another distance of an example alone than in a batch: measure each alone, without draws",
        ),
        (
            "def batch(self, rows, draws):\n        return rows['seen'], {'box': rows['box']}",
            r"two tensors: join several by torch.cat, for forward\(\) or loss\(\) to take apart",
        ),
        (
            "def loss(self, outputs, targets):\n        return (outputs - targets).square().sum(1)",
            r"loss\(\) should return one number",
        ),
        (
            "def loss(self, outputs, targets):\n        return (outputs.detach() - targets).square().sum()",
            "a tensor that depends on the outputs",
        ),
        (
            "def measure(self, outputs, targets):\n        return {'distance': (outputs - targets).norm()}",
            r"measure\(\) gave \[\] for distance of 4 examples: one number an example",
        ),
        ("def measure(self, outputs, targets):\n        return {}", r"measure\(\) should return a dict of tensors"),
        *(
            (
                f"def measure(self, outputs, _):\n        return dict(distance=outputs.sum(1), {name}=outputs.sum(1))",
                f"{name} is a name that records keep for a count, a sum or an error",
            )
            for name in ("num_words", "words_sum", "distance_error")
        ),
        (
            "def measure(self, outputs, _):\n        return {'distance': outputs.sum(1), 'loss': outputs.sum(1) + 99}",
            r"the quality loss is .* where loss\(\) is .* an example: give it another name",
        ),
        ("quality = ''", "quality is not set: name one of distance"),
        ("quality = 'iou'", r"quality is 'iou', and values\(\) gives distance"),
        ("def watched(self, outputs, targets):\n        return outputs.mean()", r"watched\(\) gave \[\] of 4 examples"),
        (
            "def residuals(self, outputs, targets):\n        return outputs.sum()",
            r"residuals\(\) gave \[\] of 4 examples",
        ),
        ("def residuals(self, outputs, targets):\n        pass", r"residuals\(\) gave NoneType of 4 examples"),
        (
            "def residuals(self, outputs, targets):\n        return (outputs - targets).square()",
            r"squares of residuals\(\) sum to .*, and loss\(\) of the same is .*: they should be equal",
        ),
        ("def curvature(self, outputs, change):\n        return change", "raised TypeError: .*curvature"),
        (
            "def draw(self, num, seed):\n        return 1 / 0",
            "raised ZeroDivisionError: division by zero; see bad_tasks",
        ),
        ("def fit(self, train):\n        pass", r"fit\(\) returned a NoneType: it should return the task"),
        (
            "def fit(self, train):\n        self.mean = train['seen'].mean(0)\n        return self",
            "bad_tasks:Own.mean is a ndarray, which JSON cannot hold: keep a list",
        ),
        ("def __init__(self, size):\n        pass", "raised TypeError: .* missing 1 required positional argument"),
    ],
)
def test_a_task_that_does_not_hold_together_is_refused_where_it_is_read(
    module: Callable[[str], None], body: str, message: str
) -> None:
    module(f"{TASK}    {body}\n")
    with pytest.raises(ValueError, match=message) as caught:
        loaded()
    assert "\n" not in str(caught.value)
    assert "bad_tasks:Own" in str(caught.value)


def test_a_task_is_a_class_of_tasks(module: Callable[[str], None]) -> None:
    module(f"{TASK}    pass\n")
    assert loaded().task.name == "bad_tasks:Own"
    with pytest.raises(ValueError, match="bad_tasks has no function Boxs; did you mean Boxes"):
        loaded("bad_tasks:Boxs")
    with pytest.raises(ValueError, match=r"made a dict: it should be a raysubset\.tasks\.Task"):
        loaded("bad_tasks:rows")
    with pytest.raises(
        ValueError, match=r"bad_tasks:rows gives seen .*, box .*, and classification takes inputs or image"
    ):
        loaded("classification")


DATA = """
import numpy as np

images = np.arange(20 * 16, dtype=np.uint8).reshape(20, 4, 4, 1)
mask = (images[..., 0] > 99).astype(np.uint8)
tokens = np.arange(60).reshape(20, 3) % 7
labels = np.arange(20) % 2
values = labels[:, None] + np.arange(40.0).reshape(20, 2)

def load():
    return """


@pytest.mark.parametrize(
    ("returned", "task", "message"),
    [
        ("images, mask[:, :3]", "segmentation", r"\(uint8 \[20, 4, 4, 1\]\), target \(uint8 \[20, 3, 4\]\), .* mask"),
        (
            "dict(image=images, mask=mask[:, :3])",
            "segmentation",
            "split are 3x4, its images 4x4: give a class",
        ),
        ("dict(image=images, mask=mask * 0)", "segmentation", "are of class 0: at least two classes are needed"),
        ("dict(image=images / 9, mask=mask)", "segmentation", "run from 0 to 28.3333: floats must lie in"),
        ("dict(image=images, mask=mask * 1.0)", "segmentation", "masks of the train split are float64"),
        ("dict(inputs=tokens - 1, label=labels)", "classification", "integer inputs run from -1: tokens are numbered"),
        (
            "dict(train=(tokens, labels), test=(tokens + 1, labels))",
            "classification",
            "have token 7 in row 2: the train split.s are 0 to 6",
        ),
        ("values, np.array(['a', 'b'] * 10)", "regression", "is text, such as 'a': regression needs numbers"),
        ("values, labels * 0.0", "regression", "is 0 in all 14 training examples: there is nothing"),
        ("images, labels", "segmentation", "gives image .*, label .*, and segmentation takes .*, here mask: name"),
        ("images, labels", "next_token", "is a tuple: for --task next_token give a text"),
        ("values, values", "next_token", "is a tuple: for --task next_token give a text"),
        ("'a text'", "classification", "load is text: use --task next_token to learn it"),
        ("values, labels", "segmentation", "gives inputs .*, and segmentation takes .*, here image: name"),
    ],
)
def test_data_that_a_task_cannot_learn_are_refused_with_the_way_out(
    module: Callable[[str], None], returned: str, task: str, message: str
) -> None:
    module(f"{DATA}{returned}\n")
    with pytest.raises(ValueError, match=message) as caught:
        loaded(task, "bad_tasks:load")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "task", "settings", "message"),
    [
        ("rows.parquet", "regression", {"streamed": True}, "the target label of the train split is text, such as 'a'"),
        ("rows.parquet", "segmentation", {"streamed": True}, "segmentation cannot be learned from its columns: use"),
        ("rows.parquet", "next_token", {"streamed": True}, "learned from text, .*: leave --data.streamed out"),
        ("text.txt", "auto", {"streamed": True}, "learned from text, .*: leave --data.streamed out"),
        (
            "rows.parquet",
            "regression",
            {},
            "the target label of the train split is text, such as 'a': regression needs",
        ),
        (
            "rows.parquet",
            "segmentation",
            {},
            "is a table, and --task segmentation cannot be learned from its columns: use",
        ),
        (
            "text.txt",
            "auto",
            {"window": 36},
            "has 36 tokens, and a window takes 36 and the next one: give --data.window 35",
        ),
        ("digits", "next_token", {}, "from text files and python_docs, not from digits: give a path of text"),
        ("python_docs", "regression", {}, "python_docs is text: its --task is next_token, not regression"),
        ("iris", "segmentation", {}, "iris is a table, and --task segmentation cannot be learned from its columns"),
    ],
)
def test_sets_for_another_task_are_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, task: str, settings: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table({"x": list(range(20)), "label": ["a", "b"] * 10}), "rows.parquet")
    Path("text.txt").write_text("hello world " * 3)
    with pytest.raises(ValueError, match=message) as caught:
        loaded(task, name, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            dict(name="regression", class_weights="balanced"),
            "task.class_weights is for classification, segmentation, not",
        ),
        (dict(name="next_token", class_weights="balanced"), "not for next_token: leave it out"),
        (
            dict(name="regression", label_smoothing=0.1),
            "task.label_smoothing is for classification, segmentation, next",
        ),
        (dict(name="mine:Boxes", loss="huber"), "and mine:Boxes has a loss of its own: leave it out"),
        (dict(name="segmentation", loss="huber"), "task.loss=huber is not one of segmentation: use cross_entropy"),
        (dict(name="regression", ignored=3), "task.ignored is a value of masks, and regression has no masks"),
    ],
)
def test_settings_of_another_task_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskConfig(**settings)


def test_what_a_task_is_told_reaches_its_loss(module: Callable[[str], None]) -> None:
    module(f"{DATA}dict(image=images, mask=mask)\n")
    config = TaskConfig(name="segmentation", class_weights="balanced", label_smoothing=0.25)
    full_set = load_full_set(DataConfig(name="bad_tasks:load"), config)
    assert isinstance(full_set.task, Segmentation)
    share = float(full_set.train.arrays()["mask"].mean())  # of class 1
    assert full_set.task.objective.class_weights == pytest.approx((0.5 / (1 - share), 0.5 / share))
    assert full_set.task.objective.label_smoothing == 0.25
    module('def load():\n    return "hello world " * 20\n')
    smoothed = load_full_set(
        DataConfig(name="bad_tasks:load", window=8), TaskConfig(name="next_token", label_smoothing=0.25)
    )
    assert isinstance(smoothed.task, NextToken)
    assert smoothed.task.objective.label_smoothing == 0.25


COMPARING = """    compares_examples = True

    def loss(self, outputs, targets):
        return (outputs @ outputs.T).logsumexp(1).sum()

    def measure(self, outputs, targets):
        return {"distance": (outputs @ outputs.T).mean(1)}
"""


@pytest.mark.parametrize(
    ("setting", "value"),
    [("minimize.accumulation", 2), ("minimize.optimizer", "lbfgs"), ("fine_tuning.num_workers", 2)],
)
def test_a_task_that_compares_examples_refuses_what_parts_a_batch(
    module: Callable[[str], None], setting: str, value: Any
) -> None:
    module(TASK + COMPARING)
    config = Config().with_overrides({"subsets.num": 2, "model.name": "mlp"})
    full_set = loaded()
    assert make_plan(config, full_set).most_workers == 1
    name = setting.replace("fine_tuning.num_workers", "--fine-tuning.num-workers")
    with pytest.raises(ValueError, match=f"Own compares the examples of a batch, which {name}.* parts"):
        make_plan(config.with_overrides({setting: value}), full_set)


def test_a_comparison_of_a_task_that_compares_examples_has_no_data_parallel_arm(module: Callable[[str], None]) -> None:
    module(TASK + COMPARING)
    usual = [parse_arm(key) for key in ("B", "G", "I")]
    arms, (note,) = unparted_arms(usual, "bad_tasks:Own", are_usual=True)
    assert [arm.key for arm in arms] == ["B", "G"]
    assert note.text.startswith("left out of the comparison: arm I: its workers part batches")
    names = {"data.name": "bad_tasks:rows", "task.name": "bad_tasks:Own", "model.name": "mlp", "subsets.num": 2}
    with pytest.raises(ValueError, match=r"arm I:minimize\.accumulation=2: .*Own compares .*: leave it out of"):
        compare(Config().with_overrides(names), arms=("B", "G", "I:minimize.accumulation=2"), on_event=None)


def test_outputs_of_a_task_that_compares_examples_are_measured_as_its_network_is(module: Callable[[str], None]) -> None:
    """In batches of equal size, whether of one pass or kept: 12 examples repeated to 600, or to 501, none alone."""
    module(TASK + COMPARING)
    examples = loaded(validation_fraction=0.2).examples("train").select(torch.arange(600) % 12)
    model, recipe = torch.nn.Linear(2, 2), MinimizeConfig()
    with torch.no_grad():
        model.weight.mul_(0.1)
    metrics, outputs = evaluate_for_ensemble(model, examples, recipe)
    expected = evaluate(model, examples, recipe)
    assert metrics.loss == pytest.approx(expected.loss, rel=1e-5)
    assert metrics.values["distance"] == pytest.approx(expected.values["distance"], rel=1e-5)
    with torch.no_grad():
        parts = [examples.task.loss(part, part) for part in (outputs[:300], outputs[300:])]
        whole = examples.task.loss(outputs, outputs)
    assert metrics.loss_sum == pytest.approx(sum(map(float, parts)), rel=1e-5)
    assert abs(metrics.loss_sum - float(whole)) > 1
    of_501 = sum(float(examples.task.loss(part, part)) for part in outputs[:501].split([251, 250]))
    assert evaluate(model, examples.select(torch.arange(501)), recipe).loss_sum == pytest.approx(of_501, rel=1e-5)


DRAWS = """    def draw(self, num, seed):
        return torch.randn(num, 2, generator=torch.Generator().manual_seed(seed))

    def batch(self, rows, draws):
        return rows["seen"] if draws is None else rows["seen"] + draws, rows["box"]
"""


def test_a_tasks_own_draws_are_noise_that_augmentation_none_turns_off(module: Callable[[str], None]) -> None:
    """Though the task leaves `augmentation` at its default."""
    module(TASK + DRAWS)
    lbfgs = Config().with_overrides({"minimize.optimizer": "lbfgs", "subsets.num": 2, "model.name": "mlp"})
    drawn, plain = loaded(), loaded(augmentation="none")
    options: dict[str, Any] = {"order_seed": 1, "augmentation_seed": 2, "batch_sizes": [14]}
    for full_set, is_drawn in ((drawn, True), (plain, False)):
        examples = full_set.training_batches(augment=True)
        assert isinstance(examples, Examples)
        assert examples.is_augmented is is_drawn
        ((inputs, _),) = examples.epoch(**options)
        assert bool((inputs == inputs.round()).all()) is not is_drawn
    with pytest.raises(ValueError, match=r"the task augments training examples: set --data\.augmentation none"):
        make_plan(lbfgs, drawn)
    make_plan(lbfgs, plain)


def test_a_number_that_a_split_has_but_once_is_told_as_it_has_no_r2(tmp_path: Path) -> None:
    for split, targets in (("train", range(40)), ("test", [0.1] * 7)):
        table = pa.table({"seen": [float(number % 9) for number in range(len(targets))], "y": [*map(float, targets)]})
        pq.write_table(table, tmp_path / f"{split}.parquet")
    full_set = load_full_set(DataConfig(name=str(tmp_path), target="y"), TaskConfig(name="regression"))
    (warning,) = [note.text for note in full_set.advice if note.is_warning]
    assert warning == "y is the same in all 7 test examples, of which there is no r2"
    examples = full_set.examples("test")
    measured = full_set.task.values(sums_of(full_set.task, torch.zeros(7, 1), examples.targets()), 7)
    assert math.isnan(measured["r2"])
    assert math.isfinite(measured["mae"])
