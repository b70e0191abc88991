"""A user's own optimizer: run as ours are, and refused in a line where it would not work."""

from dataclasses import replace

import pytest
import torch

from raysubset.config import Config, MinimizeConfig
from raysubset.training import minimize, try_own_steps, why_not_packed
from raysubset.training.optimizers import make_optimizer
from tests.tiny import cnn, examples, linear, noisy_network, resume_at_the_bits, same_bits, weights


def recipe(function: str, **changes) -> MinimizeConfig:
    return MinimizeConfig(optimizer=f"tests.own_optimizers:{function}", epochs=2, batch_size=8, **changes)


def test_it_moves_weights_as_ours_of_the_same_settings_would():
    ours, own = cnn(), cnn()
    minimize(ours, examples(), MinimizeConfig(optimizer="adam", epochs=2, batch_size=8, learning_rate=0.02), seed=1)
    result = minimize(own, examples(), recipe("adam", learning_rate=0.02), seed=1)
    assert result.history[0].learning_rate == pytest.approx(0.01, rel=0.5)
    for name, value in weights(ours).items():
        torch.testing.assert_close(weights(own)[name], value, atol=1e-3, rtol=1e-2)  # it has decay everywhere


@pytest.mark.parametrize(("given", "expected"), [(None, [0.02, 0.002]), (0.5, [0.5, 0.05])])
def test_groups_keep_their_shares_of_the_largest_rate_which_is_the_recipes_if_one_is_given(given, expected):
    config = recipe("two_rates", learning_rate=given, schedule="constant")
    result = minimize(cnn(), examples(), config, seed=1)
    assert [group["lr"] for group in result.optimizer["param_groups"]] == pytest.approx(expected)
    assert result.history[-1].learning_rate == expected[0]
    falling = minimize(cnn(), examples(), replace(config, schedule="cosine"), seed=1)
    last = [group["lr"] for group in falling.optimizer["param_groups"]]
    assert last[0] < 0.1 * expected[0]
    assert last[1] == pytest.approx(0.1 * last[0])


@pytest.mark.parametrize("step", [1, 4, 5])
def test_stopped_and_resumed_from_a_file_it_ends_at_the_same_bits(step):
    resume_at_the_bits(noisy_network, recipe("two_rates"), step)


@pytest.mark.parametrize("function", ["adam", "two_rates"])
def test_one_that_works_is_tried_on_copies(function):
    model = cnn()
    before, state = weights(model), torch.get_rng_state()
    try_own_steps(model, recipe(function), examples())
    assert same_bits(weights(model), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


MISTAKES = {
    "nothing": "returned a NoneType: it should return a torch.optim.Optimizer",
    "drops": "left 1 of 2 parameters out of its groups: 1.weight. Give it all of them",
    "adds": "has parameters in its groups that it did not receive",
    "rateless": "has groups of lr 0.0: give it one that the schedule can scale",
    "needs_closure": r"raised TypeError: .*closure",
    "raises": "raised AttributeError: .* see own_optimizers.py, line .*, in raises",
    "forgetful": "elsewhere when it is resumed from its state_dict.*: keep all that it remembers .* in self.state",
    "strange": "a checkpoint cannot hold: keep tensors, numbers, words, lists and dicts in it",
    "absent": "tests.own_optimizers has no function absent",
}


@pytest.mark.parametrize(("function", "message"), MISTAKES.items())
def test_one_that_does_not_is_refused_in_a_line(function, message):
    with pytest.raises(ValueError, match=message) as caught:
        try_own_steps(linear(64), recipe(function), examples())
    assert "\n" not in str(caught.value)
    assert f"minimize.optimizer = 'tests.own_optimizers:{function}'" in str(caught.value)


def test_what_the_function_gets_is_what_is_trained():
    model = linear(64)
    model[1].bias.requires_grad_(False)  # type: ignore[index]
    optimizer = make_optimizer(model, recipe("adam"))
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]


def test_it_is_code_that_is_named_and_belongs_to_the_runs_identity():
    config = Config().with_overrides({"minimize.optimizer": "mine:make"})
    assert config.functions() == {"minimize.optimizer": "mine:make"}
    assert Config().functions() == {}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rounds.num": 2, "rounds.optimizer_state": "average"}, "set keep or reset"),
        ({"rounds.learning_rate_scale": 2.0}, "a rate that cannot be scaled or tuned: give minimize.learning_rate"),
        ({"minimize.extrapolation.kind": "isotropic"}, "leave it out"),
    ],
)
def test_settings_that_need_to_know_the_optimizer_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        Config().with_overrides({"minimize.optimizer": "mine:make", **overrides})
    rate = {"minimize.learning_rate": 0.1} if "rounds.learning_rate_scale" in overrides else {}
    if rate:
        assert Config().with_overrides({"minimize.optimizer": "mine:make", **overrides, **rate})


def test_it_is_not_packed():
    assert why_not_packed(cnn(), recipe("adam")) == "tests.own_optimizers:adam is an optimizer of one network"


def test_what_a_later_step_raises_is_told_as_a_trial_tells_it():
    try_own_steps(cnn(), recipe("impatient"), examples())
    told = "'tests.own_optimizers:impatient' raised KeyError: 'momentum'; see own_optimizers.py, line .*, in step"
    with pytest.raises(ValueError, match=told):
        minimize(cnn(), examples(80), recipe("impatient"), seed=0)
