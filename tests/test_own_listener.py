"""A user's own listener: told of every step where it is made, changing nothing, and named where it fails."""

from pathlib import Path

import pytest

from raysubset.config import Config
from raysubset.data import load_full_set
from raysubset.planning import make_plan
from raysubset.run_directory import RunDirectory, weights_path
from raysubset.training import Step
from raysubset.work import Minimizer, Piece
from raysubset.work.identity import identify
from tests import own_listeners
from tests.tiny import same_bits, stored_weights


def config_of(folder: Path, function: str | None, **overrides: object) -> Config:
    name = function and f"tests.own_listeners:{function}"
    base = {"data.name": "iris", "storage_path": str(folder), "name": str(function), "actors.on_step": name}
    return Config().with_overrides({**base, "minimize.batch_size": 8, "minimize.epochs": 2, **overrides})


def minimum_of(config: Config, *, num: int = 1) -> dict:
    directory, full_set = RunDirectory(config.storage_path, config.run_name()), load_full_set(*config.learned)
    pieces = [Piece(config, directory, "subsets", subset_id=subset, round=1) for subset in range(num)]
    minimizer = Minimizer(lambda: full_set, num_gpus=0, node="n")
    records = minimizer.minimize(pieces, None, attempts=[0] * num, waited_s=0.0)
    assert all(isinstance(record, dict) for record in records)
    return stored_weights(directory, weights_path(pieces[0].folder))


@pytest.mark.parametrize("num", [1, 2])
def test_it_is_told_of_every_step_of_every_subset(tmp_path, num):
    own_listeners.heard.clear()
    minimum_of(config_of(tmp_path, "hear", **{"rounds.num": 2}), num=num)
    assert {(step.run, step.stage, step.round, step.rank, step.num_workers) for step in own_listeners.heard} == {
        ("hear", "subsets", 1, 0, 1)
    }
    for subset in range(num):
        steps: list[Step] = [step for step in own_listeners.heard if step.subset == subset]
        assert [step.step for step in steps] == [1, 2, 3, 4, 5, 6, 7, 8]
        assert {step.num_steps for step in steps} == {8}
        assert [step.step for step in steps if step.epoch_ended] == [4, 8]
        assert [step.epoch for step in steps][-2:] == [1.75, 2.0]
        assert steps[-1].cost.num_backward == 2 * steps[3].cost.num_backward > 0
        assert steps[2].loss != steps[2].loss  # NaN
        assert steps[7].loss < steps[3].loss


def test_what_it_draws_changes_nothing(tmp_path):
    assert same_bits(minimum_of(config_of(tmp_path, "draw")), minimum_of(config_of(tmp_path, None)))


def test_one_that_fails_is_named_in_a_line_and_the_work_resumes_without_it(tmp_path):
    with pytest.raises(ValueError, match=r"actors.on_step = 'tests.own_listeners:fail' raised ConnectionError") as told:
        minimum_of(config_of(tmp_path, "fail"))
    assert str(told.value).endswith("see own_listeners.py, line 21, in fail")
    assert "\n" not in str(told.value)
    directory = RunDirectory(str(tmp_path), "fail")
    assert not directory.exists(weights_path("rounds/0001/minima/0000"))
    resumed = minimum_of(config_of(tmp_path, None, name="fail"))
    assert same_bits(resumed, minimum_of(config_of(tmp_path, None)))


MISTAKES = {
    "absent": "tests.own_listeners has no function absent",
    "not_callable": "tests.own_listeners has no function not_callable",
    "of_two": "'tests.own_listeners:of_two' is called with a step alone: missing a required argument: 'more'",
}


@pytest.mark.parametrize(("function", "message"), MISTAKES.items())
def test_one_that_cannot_be_called_is_refused_before_a_run(tmp_path, function, message):
    config = config_of(tmp_path, function)
    with pytest.raises(ValueError, match=message):
        make_plan(config, load_full_set(*config.learned))


def test_it_is_named_as_a_function_and_may_change_when_a_run_resumes(tmp_path):
    config = config_of(tmp_path, "hear")
    assert config.functions() == {"actors.on_step": "tests.own_listeners:hear"}
    assert not identify([config], {}, None).code
    with pytest.raises(ValueError, match=r"on_step = .log. should be"):
        config_of(tmp_path, None, **{"actors.on_step": "log"})
