"""A user's own loop: done under our checkpoints and counted by what it says, or refused in a line."""

from pathlib import Path

import pytest
import torch

from raysubset.config import Config, MinimizeConfig
from raysubset.data import load_full_set
from raysubset.planning import make_plan
from raysubset.run_directory import RunDirectory, weights_path
from raysubset.run_directory.ledger import Ledger
from raysubset.training import DivergedError, Progress, minimize, starts_over, try_own_steps, why_not_packed
from raysubset.work import Minimizer, Piece
from tests.tiny import cnn, examples, same_bits, stop_at, stored_weights, through_a_file, weights


def recipe(function: str, **changes) -> MinimizeConfig:
    return MinimizeConfig(loop=f"tests.own_loops:{function}", **{"epochs": 2, "batch_size": 8, **changes})


def test_a_loop_changes_the_model_as_it_likes_and_is_counted_as_it_says():
    ours, own = cnn(), cnn()
    seen: list[Progress] = []
    result = minimize(own, examples(30), recipe("momentum"), seed=3, on_step=seen.append)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(8):
        indices = torch.randint(30, (8,), generator=torch.Generator().manual_seed(3 + step))
        inputs, targets = examples(30).batch(indices)
        loss = examples(30).task.loss(ours(inputs), targets) / 8
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert same_bits(weights(own), weights(ours))
    assert (result.outcome, result.cost.num_forward, result.cost.num_steps) == ("epochs", 64, 8)
    assert [record.loss for record in result.history] == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:]) / 4])
    assert [progress.step for progress in seen if progress.epoch_ended] == [4, 8]
    assert 0 < seen[0].cost.device_s < seen[-1].cost.device_s <= result.cost.device_s


@pytest.mark.parametrize("function", ["momentum", "without_capture"])
@pytest.mark.parametrize("step", [1, 4, 6])
def test_it_resumes_at_its_bits_or_starts_over(function, step):
    unbroken, states = cnn(), []
    expected = minimize(unbroken, examples(30), recipe(function), seed=5)

    assert minimize(cnn(), examples(30), recipe(function), seed=5, on_step=stop_at(step, states)).outcome == "stopped"
    assert starts_over(recipe(function), states[0]) == (function == "without_capture")  # also its validation history
    resumed = cnn(seed=9) if function == "momentum" else cnn()
    result = minimize(resumed, examples(30), recipe(function), seed=5, state=states[0])
    assert same_bits(weights(resumed), weights(unbroken))
    assert result.history == expected.history
    assert result.cost.num_steps == (8 - step if function == "momentum" else 8)


def test_one_that_ends_before_its_last_step_closes_its_epoch():
    told = []
    result = minimize(cnn(), examples(), recipe("ends_early"), seed=0, on_step=lambda p: told.append(p.epoch_ended))
    assert (result.outcome, len(result.history), told) == ("loop", 1, [False, False, False, True])


def test_one_that_has_nothing_left_to_do_when_it_resumes_records_no_epoch_twice():
    states = []
    expected = minimize(
        cnn(), examples(30), recipe("momentum"), seed=5, on_step=lambda p: states.append(through_a_file(p.capture()))
    )
    result = minimize(cnn(), examples(30), recipe("momentum"), seed=5, state=states[-1])
    assert (result.outcome, result.history, result.cost.num_steps) == ("epochs", expected.history, 0)


def test_a_cost_that_it_says_itself_is_what_counts_but_for_time():
    cost = minimize(cnn(), examples(), recipe("counts_itself"), seed=0).cost
    assert (cost.num_forward, cost.num_backward, cost.num_steps) == (700, 300, 20)
    assert cost.device_s < 100


def test_what_our_side_raises_in_on_step_passes_through():
    class Lost(OSError):
        pass

    def lose(_: Progress) -> bool:
        raise Lost("storage")

    for name in ("momentum", "swallows"):
        with pytest.raises(Lost):
            minimize(cnn(), examples(), recipe(name), seed=0, on_step=lose)


def test_one_that_works_is_tried_on_copies():
    model = cnn()
    before, state = weights(model), torch.get_rng_state()
    assert try_own_steps(model, recipe("momentum"), examples()) is None
    assert "if its process dies, a subset's work starts over" in str(
        try_own_steps(model, recipe("without_capture"), examples())
    )
    assert same_bits(weights(model), before)
    assert torch.equal(torch.get_rng_state(), state)


MISTAKES = {
    "silent": r"never called on_step\(\): call on_step\(progress\) after every step",
    "costless": r"reported no costs: let progress.count\(\) count steps, or set progress.cost",
    "of_a_copy": r"left 8 of 8 parameters unchanged: .*, .*, .* and 5 more\. "
    "Change those of the model that it receives",
    "of_some": r"left 7 of 8 parameters unchanged",
    "reshaped": "left a model with other parameters: change those that it receives in place",
    "infinite": "ended at weights that are not finite: lower its learning rate",
    "endless": r"continued after on_step\(\) had returned True: return then",
    "forgetful": r"ends elsewhere when it is resumed from its capture\(\): draw by progress.seed and the step",
    "opaque": r"has a capture\(\) that a checkpoint cannot hold: keep tensors, numbers, words, lists and dicts",
    "backwards": r"called on_step\(\) at step 1 after 1: let progress.count\(\) count it",
    "unrecorded": r"set progress.epoch_ended without a record in progress.history: call progress.count\(\)",
    "half_costs": r"reported steps and costs of \(1, 0.5, 0, 0\): give whole numbers",
    "odd_record": "recorded EpochRecord.*: give plain numbers, and 0 where there is no learning rate",
    "other_progress": r"called on_step\(\) with a float: give it progress",
    "raises": r"raised .*; see own_loops.py, line .*, in raises",
    "absent": "tests.own_loops has no function absent",
}


@pytest.mark.parametrize(("function", "message"), MISTAKES.items())
def test_one_that_does_not_fit_is_refused_in_a_line_before_a_run(function, message):
    with pytest.raises(ValueError, match=message) as caught:
        try_own_steps(cnn(), recipe(function), examples())
    assert "\n" not in str(caught.value)
    assert str(caught.value).count("minimize.loop = 'tests.own_loops:") == 1


def test_weights_that_are_not_finite_are_no_minimum():
    with pytest.raises(DivergedError, match="not finite"):
        minimize(cnn(), examples(), recipe("infinite"), seed=0)


def test_it_is_not_packed():
    assert why_not_packed(cnn(), recipe("momentum")) == "tests.own_loops:momentum is a loop of one network"


OVERRIDES = {
    "minimize.loop = 'train' should be package.module:function": {"minimize.loop": "train"},
    "minimize.optimizer is for the built-in loop": {"minimize.optimizer": "lbfgs"},
    "minimize.objective is for the built-in loop": {"minimize.objective": "losses:mixup"},
    "minimize.averaging is for the built-in loop": {"minimize.averaging.kind": "ema"},
    "minimize.epoch_fraction is for the built-in loop": {"minimize.epoch_fraction": 0.5},
    "has no rounds.optimizer_state to keep": {"rounds.num": 2},
    "fine_tuning.distillation needs sgd": {"fine_tuning.distillation": 0.5},
    "needs all examples in memory, and data.streamed holds none": {"data.streamed": True, "data.name": "a.parquet"},
}


@pytest.mark.parametrize(("message", "overrides"), OVERRIDES.items())
def test_what_belongs_to_our_loop_is_refused_beside_it(message, overrides):
    with pytest.raises(ValueError, match=message):
        Config().with_overrides({"minimize.loop": "tests.own_loops:momentum", **overrides})


def config_of(folder: Path, **overrides: object) -> Config:
    base = {"data.name": "iris", "minimize.loop": "tests.own_loops:momentum", "storage_path": str(folder), "name": "r"}
    return Config().with_overrides({**base, "actors.checkpoint_s": 1e-9, **overrides})


def test_a_plan_gives_fine_tuning_one_worker_and_refuses_more(tmp_path):
    config = config_of(tmp_path)
    full_set = load_full_set(*config.learned)
    assert make_plan(config, full_set).most_workers == 1
    for stage in ("trunk", "fine_tuning"):
        with pytest.raises(ValueError, match=f"works in one process: set --{stage.replace('_', '-')}.num-workers 1"):
            make_plan(config.with_overrides({f"{stage}.num_workers": 2}), full_set)


def test_an_actor_resumes_it_from_its_checkpoint_and_the_ledger_has_what_it_says(tmp_path):
    """As a process that dies in its middle leaves it, whose successor goes on."""
    minima = []
    for name, is_stopped in (("unbroken", False), ("resumed", True)):
        config = config_of(tmp_path, name=name)
        directory, full_set = RunDirectory(config.storage_path, name), load_full_set(*config.learned)
        piece = Piece(config, directory, "subsets", subset_id=0)
        if is_stopped:
            minimizer = Minimizer(lambda full_set=full_set: full_set, num_gpus=0, node="n")
            minimizer.request_stop()
            assert minimizer.minimize([piece], None, attempts=[0], waited_s=0.0) == [None]
        minimizer = Minimizer(lambda full_set=full_set: full_set, num_gpus=0, node="n")
        (record,) = minimizer.minimize([piece], None, attempts=[1], waited_s=0.0)
        assert isinstance(record, dict)
        minima.append(stored_weights(directory, weights_path(piece.folder)))
        works = Ledger(directory).read()
        assert sum(work.cost.num_steps for work in works) == len(record["history"])  # a batch an epoch
        assert [work.outcome for work in works] == (["interrupted", "done"] if is_stopped else ["done"])
    assert same_bits(*minima)


def test_one_that_starts_over_leaves_no_checkpoint_by_which_its_losses_would_not_be_counted(tmp_path):
    config = config_of(tmp_path).with_overrides({"minimize.loop": "tests.own_loops:without_capture_fails"})
    directory, full_set = RunDirectory(config.storage_path, "r"), load_full_set(*config.learned)
    piece = Piece(config, directory, "subsets", subset_id=0)
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        Minimizer(lambda: full_set, num_gpus=0, node="n").minimize([piece], None, attempts=[0], waited_s=0.0)
    assert directory.newest_checkpoint(piece.folder) is None
