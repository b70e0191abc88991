"""A user's own objective: minimized in the loop as the task's loss is, and refused in a line where it does not fit."""

from dataclasses import replace

import pytest
import torch

from raysubset.config import Config, MinimizeConfig
from raysubset.training import minimize, try_own_objective, why_not_packed
from tests.tiny import cnn, examples, noisy_network, resume_at_the_bits, same_bits, weights


def recipe(function: str, **changes) -> MinimizeConfig:
    return MinimizeConfig(objective=f"tests.own_objectives:{function}", epochs=2, batch_size=8, **changes)


def test_the_tasks_loss_as_an_objective_has_the_bits_it_has_without():
    ours, own = noisy_network(), noisy_network()
    expected = minimize(ours, examples(), MinimizeConfig(epochs=2, batch_size=8), seed=1)
    result = minimize(own, examples(), recipe("plain"), seed=1)
    assert same_bits(weights(own), weights(ours))
    assert result.history == expected.history
    assert replace(result.cost, device_s=0) == replace(expected.cost, device_s=0)


@pytest.mark.parametrize("step", [3, 4, 5])
@pytest.mark.parametrize("changes", [{}, {"accumulation": 2}])
def test_what_it_draws_is_drawn_again_by_a_run_that_resumes(step, changes):
    config = recipe("mixup", **changes)
    unbroken, _ = resume_at_the_bits(noisy_network, config, step)
    other = noisy_network()
    minimize(other, examples(), config, seed=6)
    assert not same_bits(weights(other), unbroken)


def test_examples_that_it_passes_twice_are_counted_twice():
    cost = minimize(cnn(), examples(30), recipe("two_views"), seed=0).cost
    assert (cost.num_forward, cost.num_backward) == (2 * 60, 2 * 60)
    cost = minimize(cnn("none"), examples(30), recipe("by_parts"), seed=0).cost
    assert (cost.num_forward, cost.num_backward) == (60, 60)


@pytest.mark.parametrize("function", ["plain", "by_parts", "mixup", "two_views"])
def test_one_that_works_is_tried_on_a_copy(function):
    model = cnn()
    before, state = weights(model), torch.get_rng_state()
    try_own_objective(model, recipe(function), examples())
    assert same_bits(weights(model), before)
    assert torch.equal(torch.get_rng_state(), state)


MISTAKES = {
    "mean": r"gave a loss of .* for 8 examples and of .* for these twice: return the sum over the examples",
    "loss_alone": r"returned a Tensor: return two tensors, \(loss summed over examples, outputs\)",
    "each": r"returned a loss of shape \[8\], torch.float32: return one number that depends on the parameters",
    "detached": r"returned a loss of shape \[\], torch.float32: return one number that depends on the parameters",
    "other_outputs": r"returned outputs \[8\] for 8 examples, and the task's are \[8, 3\]",
    "raises": r"raised TypeError: .*; see own_objectives.py, line .*, in raises",
    "absent": "tests.own_objectives has no function absent",
}


def test_one_that_compares_examples_is_refused_beside_accumulation_and_others_are_not():
    try_own_objective(cnn(), recipe("contrastive"), examples())
    message = (
        "gave a loss of .* for 8 examples and of .* for their halves: .* minimize.accumulation parts: leave it out"
    )
    with pytest.raises(ValueError, match=message):
        try_own_objective(cnn(), recipe("contrastive", accumulation=2), examples())
    for function in ("plain", "mixup", "draws_globally"):
        try_own_objective(cnn(), recipe(function, accumulation=2), examples())


@pytest.mark.parametrize(("function", "message"), MISTAKES.items())
def test_one_that_does_not_fit_is_refused_in_a_line(function, message):
    with pytest.raises(ValueError, match=message) as caught:
        try_own_objective(cnn(), recipe(function), examples())
    assert "\n" not in str(caught.value)
    assert f"minimize.objective = 'tests.own_objectives:{function}'" in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"minimize.optimizer": "cg"},
            "objective is for steps on batches, and cg uses the whole subset: use sgd",
        ),
        ({"fine_tuning.distillation": 0.5}, "leave one of them out"),
        ({"minimize.objective": "mixup"}, "should be package.module:function; the task's losses are task.loss"),
    ],
)
def test_settings_that_it_does_not_go_with_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        Config().with_overrides({"minimize.objective": "mine:mixup", **overrides})


def test_it_is_code_that_is_named_and_is_not_packed():
    config = Config().with_overrides({"minimize.objective": "mine:mixup"})
    assert config.functions() == {"minimize.objective": "mine:mixup"}
    assert why_not_packed(cnn(), config.minimize) == "mine:mixup is called with one network"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("raises_in_training", "raised KeyError: 30; see own_objectives.py, line .*, in look_up"),
        ("nothing_in_training", "returned a NoneType: return two tensors"),
    ],
)
def test_what_only_training_meets_is_told_as_a_trial_tells_it(function, message):
    config = replace(recipe(function), batch_size=30)
    try_own_objective(cnn(), config, examples())
    with pytest.raises(ValueError, match=rf"minimize.objective = 'tests.own_objectives:{function}' {message}"):
        minimize(cnn(), examples(30), config, seed=0)
