"""The learning rate range test: what it tries, what it costs, and what it suggests."""

import dataclasses
import re
from typing import Any

import pytest
import torch

from raysubset.cli import call
from raysubset.config import Config, MinimizeConfig, SkippingConfig, derive_seed
from raysubset.quality import Quality
from raysubset.report.rates import rate_sections
from raysubset.training import RateRange, minimize, rate_range
from tests.tiny import SQUARED_ERROR, cnn, examples, linear, same_bits, weights

ALL = MinimizeConfig(batch_size=30, momentum=0.0, weight_decay=0.0)  # steps of gradient descent


def greatest_curvature(own) -> float:
    """Of the mean squared error of three outputs, by the weights and biases of a linear network."""
    inputs, _ = own.batch(torch.arange(len(own)))
    rows = torch.cat([inputs.flatten(1), torch.ones(len(own), 1)], dim=1)
    return 2 / 3 * float(torch.linalg.eigvalsh(rows.T @ rows / len(own))[-1])


def test_gradient_descent_is_seen_to_diverge_above_two_over_the_curvature():
    own = examples(objective=SQUARED_ERROR)
    limit = 2 / greatest_curvature(own)
    found = rate_range(linear(64), own, dataclasses.replace(ALL, learning_rate=limit / 10), seed=0)
    assert found.ended_at is not None
    assert limit < found.ended_at < 10 * limit  # what grows begins small, a step a rate
    assert found.fastest_at < limit
    assert found.fastest_at / 1.5 < found.suggested < found.least_at < found.ended_at


def test_each_rate_goes_on_from_the_last_with_its_momentum_and_all_steps_are_counted():
    recipe, by_hand, tested = MinimizeConfig(batch_size=10, learning_rate=1e-3), cnn(), cnn()
    found = rate_range(tested, examples(), recipe, seed=3)
    state = None
    for number, rate in enumerate(found.rates, start=-24):
        step = dataclasses.replace(recipe, learning_rate=rate, epochs=1 / 3, schedule="constant")
        seed = derive_seed(3, "rate", number)
        state = minimize(by_hand, examples(), step, seed=seed, optimizer_state=state).optimizer
    assert same_bits(weights(tested), weights(by_hand))
    assert found.ended_at is None
    assert (found.cost.num_steps, found.cost.num_backward) == (41, 410)
    assert found.rates[0] == pytest.approx(1e-6)
    assert found.rates[-1] == pytest.approx(0.1)


def test_what_needs_epochs_is_left_out_and_rates_of_many_steps_stay_within_an_epoch():
    recipe = MinimizeConfig(batch_size=8, skipping=SkippingConfig(kind="wus", window=1), patience=2, tolerance=0.1)
    found = rate_range(cnn(), examples(330), recipe, seed=0)
    assert found.steps_a_rate == 2


def test_float16_is_tried_without_its_scale_which_a_few_steps_at_each_rate_would_spend_themselves_on():
    recipe = MinimizeConfig(batch_size=10, learning_rate=1e-3, objective="tests.own_objectives:loud")
    whole = rate_range(cnn("none"), examples(), recipe, seed=3)
    half = rate_range(cnn("none"), examples(), dataclasses.replace(recipe, precision="float16"), seed=3)
    assert half.losses == whole.losses


def test_losses_below_zero_are_gone_through_as_those_above():
    recipe = MinimizeConfig(batch_size=10, learning_rate=1e-3)
    above = rate_range(cnn("none"), examples(), recipe, seed=3)
    recipe = dataclasses.replace(recipe, objective="tests.own_objectives:below_zero")
    below = rate_range(cnn("none"), examples(), recipe, seed=3)
    assert below.rates == above.rates
    assert below.losses == pytest.approx([loss - 5 for loss in above.losses], abs=1e-5)


def of_losses(losses: list[float]) -> RateRange:
    cost = minimize(cnn(), examples(), ALL, seed=0).cost
    return RateRange((0.01, 0.1, 1.0)[: len(losses)], tuple(losses), 1, None, cost)


@pytest.mark.parametrize(
    ("losses", "text"),
    [
        (
            [2.0, 1.5, 1.0],
            "learning-rate 0.1 is midway, by factors, between 0.01, where the loss fell fastest, and 1, ",
        ),
        ([2.0, 1.5, 1.0], "the loss was still falling at the highest rate tried"),
        ([2.0, 1.99, 2.1], "The loss hardly fell at any rate"),
        ([2.0], "The loss hardly fell at any rate"),
        ([-2.0, -2.01, -2.0], "The loss hardly fell at any rate"),
        ([-1.0, -2.0, -3.0], "the loss was still falling at the highest rate tried"),
    ],
)
def test_the_suggestion_says_how_it_came_about(losses, text):
    about: dict[str, Any] = {"passes": 1.5, "num_examples": 30, "loss": "loss", "quality": Quality("r2")}
    told, curve = rate_sections(of_losses(losses), Config().to_dict(), **about)
    assert text in str(told.lines[0])
    assert "It cost 1.50 passes over the training set, which no report counts" in str(told.lines[1])
    assert str(told.lines[1]).endswith("by validation data, MARGIN: how much worse in r2 still counts as good:")
    assert str(told.lines[2]).startswith("raysubset compare --learning-rates ")
    assert str(told.lines[2]).endswith(" --margin MARGIN")
    assert len(curve.rows) == len(losses)
    (plot,) = curve.plots
    assert ("suggested: " in " ".join(plot.legend)) == ("hardly" not in text)


def test_the_command_suggests_a_rate_without_a_run_and_refuses_what_has_none(capsys, tmp_path):
    assert call(["find-rate", "--data.name", "iris", "--to", f"{tmp_path}/rates.html"]) == 0
    out, page = capsys.readouterr().out, (tmp_path / "rates.html").read_text()
    rate = re.search(r"--minimize.learning-rate (0\.\d+) is midway", out)
    assert rate is not None
    assert rate[0] in page
    assert f"suggested: {rate[1]}" in page
    assert call(["find-rate", "--data.name", "iris", "--to", f"{tmp_path}/none/rates.html"]) == 2
    assert f"there is no folder {tmp_path}/none: choose another" in capsys.readouterr().err
    assert call(["find-rate", "--minimize.optimizer", "lbfgs"]) == 2
    assert "lbfgs takes no steps of batches at a rate" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["find-rate", "advise"])
def test_a_gpu_that_is_asked_for_and_not_there_is_refused_where_the_command_itself_computes(
    command, capsys, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert call([command, "--actors.num-gpus", "1"]) == 2
    assert "actors.num_gpus = 1, but torch sees no GPU on this machine" in capsys.readouterr().err
