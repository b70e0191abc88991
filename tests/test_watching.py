"""Validation along the way, early stopping on it, and the best weights."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from raysubset import Config
from raysubset.data import FullSet, load_full_set
from raysubset.run_directory import RunDirectory, weights_path
from raysubset.training import EpochRecord, Progress, ValidationWatch, Weights, evaluate
from raysubset.work import Minimizer, Piece
from raysubset.work.starting import random_model
from tests.tiny import metrics, same_bits, stored_weights

CONFIG = Config().with_overrides(
    {
        "data.name": "breast_cancer",
        "subsets.num": 2,
        "subsets.size": 24,
        "model.name": "mlp",
        "model.width": 8,
        "minimize.learning_rate": 0.3,
        "minimize.schedule": "constant",
        "minimize.batch_size": 8,
        "minimize.epochs": 12.0,
    }
)
PATIENCE = 2


@pytest.fixture(scope="module")
def full_set() -> FullSet:
    return load_full_set(*CONFIG.learned)


@pytest.fixture(scope="module")
def start(full_set: FullSet) -> Weights:
    return dict(random_model(CONFIG, full_set).state_dict())


class Measured:
    """A model of one weight, the number of epochs, whose validation losses are given."""

    def __init__(self, losses: Sequence[float]) -> None:
        self.model, self.losses = nn.Linear(1, 1, bias=False), losses

    def watched(self, watch: ValidationWatch, *, num: int) -> list[str | None]:
        history = self.history(num)
        outcomes = []
        for epoch in range(1, num + 1):
            nn.init.constant_(self.model.weight, epoch)
            progress = Progress(len(self.losses), 1, step=epoch, epoch_ended=True, history=history[:epoch])
            outcomes.append(watch.look(progress))
        return outcomes

    def history(self, num: int) -> list[EpochRecord]:
        return [EpochRecord(epoch, 1.0, 0.1, epoch) for epoch in range(1, num + 1)]

    def measure(self) -> Any:
        loss = self.losses[int(self.model.weight.item()) - 1]
        return metrics(loss, 0, 1)


@pytest.mark.parametrize(
    ("losses", "patience", "ends_at", "best"),
    [
        ([3, 2, 1, 2, 2, 2], 2, 5, 3),
        ([3, 2, 2, 1, 2, 2], 2, 6, 4),  # one that is no lower, then one that is
        ([1, 1, 1, 1, 1, 1], 3, 4, 1),
        ([6, 5, 4, 3, 2, 1], 1, None, 6),
        ([math.nan, 2, 1, 2, 2, 2], 2, 5, 3),  # NaN is less than nothing, and nothing is less than it
        ([math.nan, math.inf, math.nan, 1, 1, 1], 2, 3, 1),
    ],
)
def test_it_ends_after_so_many_looks_without_a_lower_loss_and_keeps_the_best(
    losses: list[float], patience: int, ends_at: int | None, best: int
) -> None:
    measured = Measured(losses)
    watch = ValidationWatch(measured.model, measured.measure, patience=patience)
    outcomes = measured.watched(watch, num=ends_at or len(losses))
    assert outcomes == [None] * (len(outcomes) - 1) + ["validation" if ends_at else None]
    watch.settle(measured.history(len(outcomes)))
    assert len(watch.looks) == len(outcomes)
    assert measured.model.weight.item() == best


def test_it_looks_every_so_many_epochs_and_at_the_end_and_lets_the_last_weights_stand() -> None:
    measured = Measured([1, 2, 3, 4, 5])
    watch = ValidationWatch(measured.model, measured.measure, every=2)
    measured.watched(watch, num=5)
    watch.settle(measured.history(5))
    assert [look["epoch"] for look in watch.looks] == [2, 4, 5]
    assert measured.model.weight.item() == 5
    curve = watch.history([{"num_steps": step} for step in range(1, 6)])
    assert [bool(record.get("validation")) for record in curve] == [False, True, False, True, True]


def test_the_last_epoch_is_measured_also_if_a_tolerance_ended_it_between_two_measurements() -> None:
    measured = Measured([5, 4, 3, 9, 9, 9])
    watch = ValidationWatch(measured.model, measured.measure, every=2, patience=1)
    measured.watched(watch, num=3)
    watch.settle(measured.history(3))
    assert [look["epoch"] for look in watch.looks] == [2, 3]
    assert measured.model.weight.item() == 3  # the best of those measured


def test_a_piece_that_a_target_ends_between_two_measurements_is_measured_at_its_end(
    full_set: FullSet, start: Weights, tmp_path: Path
) -> None:
    plain, _ = left(RunDirectory(str(tmp_path), "plain"), full_set, start, minimize__validate_every=5)
    target = plain["history"][2]["loss"]  # of the third epoch, the lowest so far
    options = {"minimize__validate_every": 5, "minimize__target_loss": target}
    record, _ = left(RunDirectory(str(tmp_path), "ended"), full_set, start, **options)
    assert record["outcome"] == "target"
    assert [look["epoch"] for look in record["history"] if "validation" in look] == [3]
    assert record["history"][-1]["validation"]["loss"] == pytest.approx(record["validation"]["loss"], rel=1e-6)
    num_looked = len(full_set.validation)
    assert record["cost"]["num_forward"] == 24 * 3 + num_looked + (
        plain["cost"]["num_forward"] - 24 * 12 - 3 * num_looked
    )


def left(directory: RunDirectory, full_set: FullSet, start: Weights, **overrides: Any) -> tuple[dict[str, Any], Piece]:
    config = CONFIG.with_overrides({key.replace("__", "."): value for key, value in overrides.items()})
    piece = Piece(config, directory, "subsets", subset_id=0, start_id="start")
    (record,) = Minimizer(lambda: full_set, num_gpus=0, node="there").minimize([piece], start, attempts=[0], waited_s=0)
    return cast(dict[str, Any], record), piece


def test_a_piece_ends_at_the_weights_that_validate_best_of_those_it_came_by(
    full_set: FullSet, start: Weights, tmp_path: Path
) -> None:
    record, piece = left(RunDirectory(str(tmp_path), "watched"), full_set, start, minimize__patience=PATIENCE)
    losses = [look["validation"]["loss"] for look in record["history"]]
    assert record["outcome"] == "validation"
    assert len(losses) < 12
    best = losses.index(min(losses)) + 1
    assert len(losses) == best + PATIENCE
    short, other = left(RunDirectory(str(tmp_path), "short"), full_set, start, minimize__epochs=float(best))
    assert same_bits(
        stored_weights(piece.directory, weights_path(piece.folder)),
        stored_weights(other.directory, weights_path(other.folder)),
    )
    assert record["validation"]["loss"] == short["validation"]["loss"] == pytest.approx(min(losses), rel=1e-6)
    num_looked = len(losses) * len(full_set.validation)
    num_measured = short["cost"]["num_forward"] - 24 * best
    assert record["cost"]["num_forward"] == 24 * len(losses) + num_looked + num_measured


@pytest.mark.parametrize("stopped_at", [1, 3, "the end"])
def test_one_that_was_stopped_ends_where_it_would_have_ended(
    stopped_at: Any, full_set: FullSet, start: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, unbroken = left(RunDirectory(str(tmp_path), "whole"), full_set, start, minimize__patience=PATIENCE)
    number = len(whole["history"]) if stopped_at == "the end" else stopped_at
    minimizer = Minimizer(lambda: full_set, num_gpus=0, node="there")
    looked = ValidationWatch.look

    def look(self: ValidationWatch, progress: Progress) -> str | None:
        outcome = looked(self, progress)
        if len(self.looks) == number:
            minimizer.request_stop()
            return None  # as if the process died before it could say so
        return outcome

    piece = Piece(unbroken.config, RunDirectory(str(tmp_path), "broken"), "subsets", subset_id=0, start_id="start")
    monkeypatch.setattr(ValidationWatch, "look", look)
    assert minimizer.minimize([piece], start, attempts=[0], waited_s=0.0) == [None]
    monkeypatch.setattr(ValidationWatch, "look", looked)
    again = Minimizer(lambda: full_set, num_gpus=0, node="there")
    (record,) = again.minimize([piece], start, attempts=[1], waited_s=0.0)
    assert isinstance(record, dict)
    assert record["history"] == whole["history"]
    assert same_bits(
        stored_weights(piece.directory, weights_path(piece.folder)),
        stored_weights(unbroken.directory, weights_path(unbroken.folder)),
    )


def test_an_optimizer_that_measures_validation_data_itself_is_not_measured_beside(
    full_set: FullSet, start: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {"minimize.batch_size": 64, "minimize.learning_rate": None, "minimize.schedule": "cosine"}
    whole |= {"minimize.optimizer": "lbfgs", "minimize.patience": 3, "fine_tuning.epochs": 60.0}
    config, beside = CONFIG.with_overrides(whole), list[Any]()
    monkeypatch.setattr("raysubset.work.minimizing.evaluate_together", beside.append)
    piece = Piece(config, RunDirectory(str(tmp_path), "run"), "fine_tuning", by_train=True)
    (record,) = Minimizer(lambda: full_set, num_gpus=0, node="here").minimize(
        [piece], start, attempts=[0], waited_s=0.0
    )
    assert isinstance(record, dict)
    losses = [look["validation"]["loss"] for look in record["history"]]
    assert len(set(losses)) > 3
    assert record["validation"]["loss"] == min(losses)
    assert beside == []


def test_looking_changes_no_bits(full_set: FullSet, start: Weights, tmp_path: Path) -> None:
    torch.manual_seed(1)
    record, piece = left(RunDirectory(str(tmp_path), "looked"), full_set, start, minimize__validate_every=5)
    _, plain = left(RunDirectory(str(tmp_path), "plain"), full_set, start)
    assert [look["epoch"] for look in record["history"] if "validation" in look] == [5, 10, 12]
    assert same_bits(
        stored_weights(piece.directory, weights_path(piece.folder)),
        stored_weights(plain.directory, weights_path(plain.folder)),
    )
    held_out = full_set.examples("validation")
    model = random_model(CONFIG, full_set)
    model.load_state_dict(stored_weights(piece.directory, weights_path(piece.folder)))
    assert record["history"][-1]["validation"]["loss"] == evaluate(model, held_out, CONFIG.minimize).loss


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"minimize.optimizer": "lbfgs", "minimize.validate_every": 1}, "validate_every is for steps on batches"),
        ({"minimize.patience": 2, "minimize.averaging.kind": "swa"}, "leave one out"),
        ({"minimize.patience": 2, "rounds.num": 3}, "minimize.patience cuts a schedule that spans all rounds"),
        ({"minimize.patience": 2, "subsets.per_actor": 2}, "trains without measuring"),
        ({"minimize.validate_every": 0}, "minimize.validate_every = 0 must be at least 1"),
    ],
)
def test_contradictions_are_refused(overrides: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Config().with_overrides(overrides)
