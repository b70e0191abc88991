"""A user's own augmentation: called with stored rows where the task's would be, and refused where it does not fit."""

import dataclasses

import pytest
import torch

from raysubset.config import Config, DataConfig, MinimizeConfig
from raysubset.data import load_full_set
from raysubset.data.examples import OwnAugmentation
from raysubset.planning import make_plan
from raysubset.training import minimize
from tests.tiny import cnn, examples, same_bits, stop_at, weights

RECIPE = MinimizeConfig(epochs=2, batch_size=8)


def augmented(function: str, **changes):
    own = OwnAugmentation(f"tests.own_augmentations:{function}")
    return dataclasses.replace(examples(), **{"augment": True, "augmentation": own, **changes})


def trained(own, *, seed: int = 0, state=None, on_step=None, start: int = 0):
    model = cnn(seed=start)
    minimize(model, own, RECIPE, seed=seed, state=state, on_step=on_step)
    return weights(model)


def test_rows_as_they_are_have_the_bits_of_no_augmentation_and_drawn_ones_others():
    plain = trained(examples())
    assert same_bits(trained(augmented("nothing")), plain)
    assert same_bits(trained(augmented("noise", augment=False)), plain)
    assert not same_bits(trained(augmented("noise")), plain)
    assert not same_bits(trained(augmented("noise"), seed=1), trained(augmented("noise")))
    assert augmented("noise").is_augmented


@pytest.mark.parametrize("function", ["noise", "in_place"])
@pytest.mark.parametrize("step", [3, 4, 5])
def test_what_it_draws_is_drawn_again_by_a_run_that_resumes(function, step):
    states = []

    own = augmented(function)
    before = own.rows["image"].clone()
    trained(own, on_step=stop_at(step, states))
    assert same_bits(trained(own, state=states[0], start=9), trained(own))
    assert torch.equal(own.rows["image"], before)


def test_every_batch_has_draws_of_its_own():
    own = augmented("noise")
    draws = own.draw(3)
    assert draws is not None
    first, second, again = (own.batch(torch.tensor(which), draws=draws)[0] for which in ([0, 1], [1, 0], [0, 1]))
    assert torch.equal(first, again)
    assert not torch.equal(first[0], second[1])


MISTAKES = {
    "forgets": r"returned image torch.uint8 \[64, 8, 8, 1\], and got image .*, label .*: keep .* may make others",
    "returns_none": "returned a NoneType, and got image .*, label ",
    "widens": r"returned image torch.float32 \[64, 8, 8, 1\], .* and got image torch.uint8 \[64, 8, 8, 1\]",
    "from_elsewhere": "gave other rows with the same generator: draw from the generator alone",
    "fails": "raised KeyError: 'picture'; see own_augmentations.py, line .*, in fails",
    "absent": "has no function absent",
}


@pytest.mark.parametrize(("function", "message"), MISTAKES.items())
def test_one_that_does_not_fit_is_refused_before_a_run(function, message):
    config = Config(data=DataConfig(augmentation=f"tests.own_augmentations:{function}"))
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=message) as told:
        make_plan(config, load_full_set(*config.learned))
    assert "\n" not in str(told.value)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("function", "message"),
    {
        "fails_late": "raised KeyError: 'picture'; see own_augmentations.py, line .*, in fails_late",
        "narrows_late": r"returned image torch.uint8 \[6, 8, 8, 1\], .* and got image torch.uint8 \[7, 8, 8, 1\]",
        "widens_late_in_place": "returned image torch.float32",
    }.items(),
)
def test_one_that_does_not_fit_a_later_batch_ends_the_run_in_a_line(function, message):
    own = dataclasses.replace(augmented(function), rows={k: v[:23] for k, v in examples().rows.items()})  # 8, 8, 7
    with pytest.raises(ValueError, match=message):
        trained(own)


@pytest.mark.parametrize("name", ["digits", "iris", "python_docs"])
def test_it_is_for_rows_of_any_kind_and_the_config_names_it(name):
    config = Config(data=DataConfig(name=name, augmentation="tests.own_augmentations:jitter"))
    assert config.functions()["data.augmentation"] == "tests.own_augmentations:jitter"
    full_set = load_full_set(*config.learned)
    assert not [note for note in full_set.notes if "augmentation" in note]
    make_plan(config, full_set)


def test_words_are_checked_and_noise_is_refused_with_line_searches():
    with pytest.raises(
        ValueError, match=r"is not one of auto, none, crop_flip, nor a package.module:function; did you"
    ):
        DataConfig(augmentation="crop-flip")
    with pytest.raises(ValueError, match=r"needs a loss without noise: set --data.augmentation=none"):
        Config().with_overrides({"minimize.optimizer": "lbfgs", "data.augmentation": "m:f"})
