"""Arms as legs: what they train, what they share, and what a budget means; advice as arithmetic."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from raysubset.aggregation import statistics_of
from raysubset.cli import call
from raysubset.comparison import advise, sizes_of
from raysubset.comparison.arms import Arm, Settings, arm_config, final_leg, parse_arm
from raysubset.comparison.checks import checked_arms, rates_set_aside
from raysubset.comparison.network import Communication, Exchange, all_reduce_bytes, critical_bytes
from raysubset.config import Config
from raysubset.data import load_full_set
from raysubset.legs import Drawing, Leg, closure, critical_path
from raysubset.planning import Plan, make_plan
from raysubset.work import subsample_size
from tests.test_report import minimum

SIZES, NUM_TRAIN = (250, 250, 250, 250), 1000


def leg(
    key: str,
    budget: float = 4.0,
    *,
    seed: int = 0,
    rate: float = 0.1,
    overrides: Mapping[str, Any] = {},
    legs_path: str = "legs",
) -> Leg:
    arm = parse_arm(key)
    config = arm_config(arm, Config().with_overrides(overrides), Settings(rate, 64), seed=seed, num_workers=4)
    plan = SimpleNamespace(drawing=partial(Drawing, sizes=SIZES, statistics=statistics_of(config)), forward_share=0.25)
    shape = {"num_train": NUM_TRAIN, "num_workers": 4, "legs_path": legs_path}
    return final_leg(arm, config, budget, cast(Plan, plan), **shape, label=f"{arm.letter}, seed {seed}")


def trained(one: Leg) -> float:
    """Passes of training of one leg, by what its key says of it and not by the drawing's sizes."""
    if one.kind == "aggregate":
        return 0.0
    size = NUM_TRAIN if one.subset is None else SIZES[one.subset]
    passes = one.epochs * (subsample_size(one.config, size) if one.is_subsample else size) / NUM_TRAIN
    assert one.passes(NUM_TRAIN) == passes
    return passes


SAVGM = "G:aggregation.method=savgm,aggregation.savgm_fraction=0.2,rounds.num=2"


@pytest.mark.parametrize("key", ["B", "C", "D", "E", "F", "G", "H", "H:rounds.num=4", "I", SAVGM])
def test_every_arm_trains_for_its_budget_in_total(key: str):
    assert sum(trained(one) for one in closure(leg(key, 6.0))) == pytest.approx(6.0)


@pytest.mark.parametrize(("key", "num_teachers"), [("D", 1), ("H", 4)])
def test_forward_passes_of_teachers_are_part_of_a_budget(key: str, num_teachers: int):
    last = leg(key, 6.0, overrides={"fine_tuning.distillation": 0.5})
    total = sum(trained(one) for one in closure(last)) + trained(last) * num_teachers * 0.25
    assert total == pytest.approx(6.0)
    plain = leg(key, 6.0)
    assert trained(last) / total < trained(plain) / 6.0


def test_legs_are_named_by_their_arm_and_their_part_in_it():
    assert leg("B").name == leg("B").piece.label == "B, seed 0"
    names = [one.name for one in closure(leg(SAVGM)) if one.subset in (0, None)]
    rounds = [
        [f"G, seed 0, {what} of round {n}" for what in ("subset 0", "a part of subset 0", "aggregate")] for n in (1, 2)
    ]
    assert names == [*rounds[0], *rounds[1], "G, seed 0, fine-tuning"]


def test_batch_statistics_over_all_workers_make_another_leg_of_any_job_of_several():
    shared = {"fine_tuning.sync_batch_norm": True}
    assert leg("I") != leg("I", overrides=shared)
    assert leg("B") == leg("B", overrides=shared)
    trunks = [
        next(one for one in closure(leg("H", overrides={"trunk.num_workers": 2} | more)) if one.stage == "trunk")
        for more in ({}, shared)
    ]
    assert trunks[0] != trunks[1]


def test_the_critical_path_of_disjoint_minima_is_one_subset_long():
    # default proportions: trunk 1, subsets 8 epochs of a quarter each, fine-tuning 2: 11 passes, 5 of them in a row
    assert critical_path(closure(leg("H", 11.0)), trained) == pytest.approx(5.0)
    assert critical_path(closure(leg("D", 4.0)), trained) == pytest.approx(4.0)


def test_savgm_minimizes_on_a_part_of_each_subset_after_its_minimum_on_the_same_device():
    # two rounds of 8 epochs of a quarter and a fifth of it, then two of the full set: 1.2 times 16 and 2, 4.8 and 2
    last = leg(SAVGM, 21.2)
    parts = [one for one in closure(last) if one.is_subsample]
    assert len(parts) == 2 * len(SIZES)
    assert critical_path(closure(last), trained) == pytest.approx(2 * 8 * 1.2 / 4 + 2)
    fraction = leg(SAVGM.replace("savgm_fraction=0.2", "savgm_fraction=0.3"), 21.2)
    assert not set(parts) & set(closure(fraction))


def test_stages_on_the_full_set_have_the_workers_that_the_config_gives_them():
    overrides = {"trunk.num_workers": 2, "fine_tuning.num_workers": 3}
    by_stage = {one.stage: (one.kind, one.num_workers) for one in closure(leg("H", overrides=overrides))}
    assert by_stage["trunk"] == ("train", 2)
    assert by_stage["fine_tuning"] == ("train", 3)
    assert {one.kind for one in closure(leg("H"))} == {"minimize", "aggregate"}
    assert leg("B", overrides=overrides).kind == "minimize"


def test_a_leg_that_is_damaged_is_not_done_and_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    output = next(one for one in closure(leg("G", legs_path=str(tmp_path))) if one.subset == 1).output

    def is_done() -> bool:
        return output.record(whole=True) is not None

    assert not is_done()
    path, run = output.weights_path, output.directory
    files = {path: run.write_weights(path, {"a": torch.zeros(3)})}
    run.write_json(output.record_path, minimum(1) | {"files": files})
    assert is_done()
    assert caplog.messages == []
    weights = run.read_bytes(path)
    for damage in (weights[:-1], weights[:-1] + b"?", None):
        run.delete(path) if damage is None else run.write_bytes(path, damage)
        assert not is_done()
        (line,) = caplog.messages
        assert line.startswith(f"{path} in {run.uri} is damaged: ")
        caplog.clear()
    run.write_bytes(path, weights)
    assert is_done()


def test_rounds_are_a_chain_whose_schedule_is_one():
    last = leg("H:rounds.num=2", 19.0)
    members = [one for one in closure(last) if one.subset == 0]
    assert [one.span for one in members] == [(0.0, 0.5), (0.5, 1.0)]
    assert members[1].predecessor == members[0]
    assert critical_path(closure(last), trained) == pytest.approx(1 + 2 * 8 / 4 + 2)


def test_rounds_are_measured_as_the_config_says_and_share_what_that_does_not_change():
    every, second, third = (
        {one for one in closure(leg(f"G:rounds.num=4,rounds.evaluate_every={n}", 8.0)) if one.stage == "subsets"}
        for n in (1, 2, 3)
    )
    assert all(one.measures for one in every)
    assert {one.round for one in second if one.measures} == {1, 3}
    assert {one.round for one in third if one.measures} == {2, 3}
    assert leg("G:rounds.evaluate_every=3", 8.0) == leg("G", 8.0)
    # the first round is measured in neither of the two, and they part where one of them is
    assert {(one.kind, one.round) for one in second & third} == {("minimize", 0), ("aggregate", 0)}
    assert not every & second


def test_arms_share_what_is_equal_and_nothing_else():
    d, e, f = (leg(key, 4.0) for key in "DEF")
    assert d.inputs == e.inputs == f.inputs  # the same minimum of one subset
    assert len({d, e, f}) == 3
    assert leg("D", seed=1) != d
    assert leg("D", rate=0.3) != d
    assert leg("G", overrides={"actors.max_num": 1}) == leg("G")


def test_what_does_not_matter_to_a_leg_is_no_part_of_its_name():
    assert leg("B", overrides={"subsets.num": 7, "fine_tuning.shrink": 0.1}) == leg("B")
    assert leg("G", overrides={"subsets.scheme": "iid"}) != leg("G")


def test_a_stage_that_is_thrown_away_is_paid_for():
    assert leg("F").start.kind == "reinit"
    assert any(one.subset == 0 for one in closure(leg("F")))


def test_data_parallel_training_takes_n_times_the_batch_and_the_learning_rate():
    config = leg("I", rate=0.05).config.minimize
    assert (config.batch_size, config.learning_rate) == (256, pytest.approx(0.2))


def test_data_parallel_training_that_accumulates_exchanges_as_much_less_often():
    last = leg("I:minimize.gradients=bfloat16,minimize.accumulation=4", rate=0.05)
    recipe = last.config.minimize
    assert (recipe.batch_size, recipe.learning_rate, recipe.accumulation) == (1024, pytest.approx(0.8), 4)
    assert (recipe.bytes_a_gradient, leg("I").config.minimize.bytes_a_gradient) == (2, 4)
    in_parts = leg("I", overrides={"minimize.accumulation": 4}).config.minimize  # of all arms: for memory alone
    assert (in_parts.batch_size, in_parts.accumulation) == (256, 4)


def test_an_arm_takes_overrides():
    arm = parse_arm("G:aggregation.method=fisher,minimize.momentum=0.8")
    assert (arm.letter, arm.role) == ("G", "candidate")
    assert arm.overrides == {"aggregation.method": "fisher", "minimize.momentum": 0.8}
    assert parse_arm("B:minimize.averaging.kind=pswa").role == "control"
    assert parse_arm("B:data.target=1").overrides == {"data.target": "1"}  # a column's name, no number


WHOLE = ["--minimize.optimizer", "lbfgs", "--fine-tuning.epochs", "0", "--trunk.epochs", "0"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--seeds", "1"], "--seeds: 1 cannot tell a difference from noise"),
        (["--arms", "B", "C"], "no arm of subset pretraining"),
        (["--arms", "G"], "add B to --arms"),
        (["--arms", "B", "Z"], "there is no arm 'Z'"),
        (["--arms", "B", "G:subsets.sise=3"], "there is no config field subsets.sise"),
        (["--arms", "B", "G:rounds.num"], "write overrides as field=value"),
        (["--budgets", "0.5", "2"], "0.5 passes is too small for one epoch"),
        (["--learning-rates", "0"], "--learning-rates = 0.0 must be positive"),
        (["--arms", "B", "G:data.name=mnist"], "data.name is the same for all arms"),
        (["--arms", "B", "G:task.loss=squared_error"], "task.loss is the same for all arms"),
        (["--actors.quorum", "3"], "no other run repeats which minima come first: leave out actors.quorum"),
        (["--subsets.shares", "measured"], "by the nodes there: leave out subsets.shares"),
        (
            ["--arms", "B", "G", "I", *WHOLE],
            "arm I: it is shared by several workers, and lbfgs takes all examples in one",
        ),
        (
            ["--arms", "B", "C", "G", *WHOLE],
            "arm C: minimize.epoch_fraction is for steps on batches, and lbfgs uses the whole subset",
        ),
        (
            ["--arms", "B", "G", *WHOLE, "--data.streamed"],
            "arm B: lbfgs needs all examples in memory, and data.streamed holds none",
        ),
    ],
)
@pytest.mark.usefixtures("no_node_ahead")
def test_what_cannot_be_compared_is_told_in_a_line_before_ray_is_started(flags: list[str], told: str, tmp_path, capsys):
    assert call(["compare", "--storage-path", str(tmp_path), *flags]) == 2
    start, error = capsys.readouterr().err.splitlines()
    assert "starts: torch and Ray are loaded" in start
    assert told in error


def test_the_ring_all_reduce_and_the_exchange_are_counted_in_bytes():
    assert all_reduce_bytes(1000, 4, each=4) == 2 * 3 / 4 * 1000 * 4 == 2 * all_reduce_bytes(1000, 4, each=2)
    first = Exchange(4, start=100, shared=10, own=3, aggregate=50, is_first=True)
    assert critical_bytes([first], overlap=False) == 100 + 10 + 3 + 3 * 10 + 50
    later = replace(first, is_first=False, states=2, averaged=10)
    assert critical_bytes([later], overlap=False) == 100 + 2 + 10 + 3 + 3 * 10 + 50 + 10


def test_wall_time_is_computing_then_sending():
    assert Communication(3.0, 1e9, 10).wall_s(8.0, s_per_pass=2.0) == pytest.approx(6 + 1)


def test_advice_is_its_formula():
    config = Config()
    full_set = load_full_set(config.data)
    plan = make_plan(config, full_set)
    sizes = sizes_of(config, full_set, plan)
    num_train, parameters = 1294, plan.num_parameters
    found = advise(config, plan, sizes, num_train=num_train, s_per_pass=2.0, num_workers=2)
    one, parallel, subsets = found.ways.values()
    total = 1 + 8 * 4 * 323 / num_train + 2
    steps = math.ceil(total * num_train / 64)
    assert one.wall_s(1.0, s_per_pass=2.0) == pytest.approx(2 * total)
    checkpoints = math.ceil(total) * sizes.checkpoint
    sent = steps * 2 / 2 * parameters * 4 + checkpoints
    assert found.to_dict()["forecasts"][1]["wall_s"]["1"] == pytest.approx(total + sent * 8 / 1e9)
    assert subsets.passes == pytest.approx(1 + 2 * 8 * 323 / num_train + 2)  # four subsets, two devices
    half = config.with_overrides({"minimize.gradients": "bfloat16"})
    _, rounded, _ = advise(half, plan, sizes, num_train=num_train, s_per_pass=2.0, num_workers=2).ways.values()
    assert 2 * rounded.num_bytes - checkpoints == parallel.num_bytes
    taught = config.with_overrides({"fine_tuning.distillation": 0.5})  # by four members, in each of two epochs
    more = {"num_train": num_train, "s_per_pass": 2.0, "num_workers": 2}
    _, _, teaching = advise(taught, make_plan(taught, full_set), sizes, **more).ways.values()
    assert teaching.passes == pytest.approx(subsets.passes + 2 * 4 * plan.forward_share)
    even = found.break_even_gbit_per_s
    assert even is not None
    assert parallel.wall_s(even, s_per_pass=2.0) == pytest.approx(subsets.wall_s(even, s_per_pass=2.0))


def test_arms_are_told_apart_by_key():
    assert isinstance(parse_arm("H:rounds.num=4"), Arm)
    assert "rounds.num = 4" in parse_arm("H:rounds.num=4").title


def test_a_stages_own_rate_is_told_to_be_set_aside_and_an_arm_may_have_it():
    config = Config().with_overrides({"fine_tuning.learning_rate": 0.02})
    assert [note.text.partition(":")[0] for note in rates_set_aside(config)] == [
        "fine_tuning.learning_rate = 0.02 has no effect"
    ]
    assert not rates_set_aside(Config())
    rates = {
        key: arm_config(parse_arm(key), config, Settings(0.1, 64), seed=0, num_workers=2).stage("fine_tuning")
        for key in ("H", "H:fine_tuning.learning_rate=0.02")
    }
    assert [recipe.learning_rate for recipe in rates.values()] == [0.1, 0.02]


@pytest.mark.parametrize(
    ("arm", "why"),
    [
        ("G:trunk.epochs=2", "it has no trunk, which H has"),
        ("D:rounds.num=4", "it has one subset and one round"),
        ("B:subsets.num=8", "it has no stage of subsets"),
        ("I:minimize.epochs=3", "it has no stage of subsets"),
        ("H:conventional.epochs=3", "its budget gives its length"),
    ],
)
def test_an_override_that_an_arm_would_ignore_is_refused(arm: str, why: str):
    for key in ("H:trunk.epochs=2", "G:rounds.num=4", "D:subsets.num=8", "I:fine_tuning.sync_batch_norm=true"):
        assert checked_arms(Config(), [0, 1], [2.0], ["B", "G", key], [0.1])
    name = arm.partition(":")[2].partition("=")[0]
    with pytest.raises(ValueError, match=rf"^arm {arm}: {name} has no effect in it: {why}$"):
        checked_arms(Config(), [0, 1], [2.0], ["B", "G", arm], [0.1])
