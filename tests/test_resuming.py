"""A minimization that was interrupted anywhere and went on from a file ends at the bits of an unbroken one."""

from dataclasses import replace

import pytest
from torch import nn

from raysubset.config import MinimizeConfig
from raysubset.data import Examples
from raysubset.training import Progress, minimize
from tests.tiny import (
    CROSS_ENTROPY,
    SQUARED_ERROR,
    examples,
    linear,
    noisy_network,
    same_bits,
    stop_at,
    through_a_file,
    weights,
)


def stopped_at(step: int, model: nn.Module, data: Examples, config: MinimizeConfig, **options) -> tuple:
    """(what a checkpoint after the step holds, the result of the run that was stopped there)."""
    states = []
    result = minimize(model, data, config, on_step=stop_at(step, states), **options)
    return states[0], result


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "muon"])
def test_stopped_after_any_step_and_resumed_from_a_file_it_ends_at_the_same_bits(optimizer):
    data = examples(30, augmentation="crop_flip")
    config = MinimizeConfig(epochs=2.5, batch_size=8, optimizer=optimizer, schedule="one_cycle")
    unbroken = noisy_network()
    whole = minimize(unbroken, data, config, seed=5)
    assert whole.cost.num_steps == 10
    for step in range(1, 11):
        state, first = stopped_at(step, noisy_network(), data, config, seed=5)
        model = noisy_network(seed=99)
        second = minimize(model, data, config, seed=5, state=state)
        assert same_bits(weights(model), weights(unbroken)), step
        assert second.history == whole.history, step
        assert same_bits(second.optimizer, whole.optimizer), step
        assert (first.outcome, second.outcome) == ("stopped", "epochs")
        total = first.cost + second.cost
        assert replace(total, device_s=0) == replace(whole.cost, device_s=0)


def test_a_checkpoint_does_not_disturb_the_run_that_writes_it():
    config = MinimizeConfig(epochs=2, batch_size=8)
    watched, unwatched = noisy_network(), noisy_network()
    minimize(watched, examples(), config, seed=5, on_step=lambda progress: progress.capture() and None)
    minimize(unwatched, examples(), config, seed=5)
    assert same_bits(weights(watched), weights(unwatched))


@pytest.mark.parametrize("ending", ["tolerance", "target", "diverged"])
def test_a_run_that_ended_early_ends_likewise_when_resumed_from_its_last_checkpoint(ending):
    recipe = {
        "tolerance": {"tolerance": 0.9},
        "target": {"target_loss": 100.0},
        "diverged": {"learning_rate": 50.0, "momentum": 0.0},
    }[ending]
    config = MinimizeConfig(epochs=9, batch_size=64, schedule="constant", **recipe)
    data = examples(objective=SQUARED_ERROR if ending == "diverged" else CROSS_ENTROPY)
    states, model = [], linear(64)

    def on_step(progress: Progress) -> None:
        states.append(through_a_file(progress.capture()))

    result = minimize(model, data, config, seed=1, on_step=on_step)
    assert result.outcome == ending
    resumed = linear(64, seed=9)
    again = minimize(resumed, data, config, seed=1, state=states[-1])
    assert again.outcome == ending
    assert again.history == result.history
    assert again.cost.num_steps == 0
    assert same_bits(weights(resumed), weights(model))
