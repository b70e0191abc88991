"""What is done for a run, in this process: the same files and bits as on a cluster."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raysubset import Config
from raysubset.aggregation import Aggregation, RunningMean
from raysubset.data import FullSet, load_full_set
from raysubset.ledger import Ledger
from raysubset.models import new_model
from raysubset.planning import cut_subsets, make_plan
from raysubset.report.page import sections
from raysubset.run_directory import (
    RunDirectory,
    aggregate_weights_path,
    checkpoint_path,
    minimum_folder,
    minimum_path,
    statistics_path,
    weights_path,
)
from raysubset.subset_actors import read_minimum
from raysubset.training import Weights, evaluate
from raysubset.work import Minimizer, Piece, Round, leave_aggregate, leave_test
from tests.test_report import a_record
from tests.tiny import same_bits, stored_weights

CONFIG = Config().with_overrides({"subsets.num": 2, "subsets.size": 120, "minimize.epochs": 2.0, "model.norm": "group"})


@pytest.fixture(scope="module")
def full_set() -> FullSet:
    return load_full_set(CONFIG.data)


@pytest.fixture(scope="module")
def start(full_set: FullSet) -> Weights:
    return new_model(CONFIG.model, full_set, seed=1).state_dict()


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory(str(tmp_path), "run")


def piece(full_set: FullSet, subset: int) -> Piece:
    return Piece(
        "subsets", subset_id=subset, indices=cut_subsets(CONFIG, full_set, 0)[subset].indices, start_id="start"
    )


def minimizer(full_set: FullSet, directory: RunDirectory) -> Minimizer:
    return Minimizer(CONFIG, lambda: full_set, directory, num_gpus=0, node="there")


def test_a_piece_that_was_stopped_resumes_to_the_same_bits_and_all_its_work_is_counted(
    full_set: FullSet, start: Weights, directory: RunDirectory, tmp_path: Path
) -> None:
    whole = RunDirectory(str(tmp_path), "whole")
    one = piece(full_set, 0)
    (record,) = minimizer(full_set, whole).minimize([one], start, attempts=[0], waited_s=0.0)
    first = minimizer(full_set, directory)
    first.request_stop(preempted=True)
    assert first.minimize([one], start, attempts=[0], waited_s=0.5) == [None]
    assert directory.exists(checkpoint_path(one.folder, 0))
    (resumed,) = minimizer(full_set, directory).minimize([one], start, attempts=[1], waited_s=0.0)
    assert isinstance(record, dict)
    assert isinstance(resumed, dict)
    assert resumed["validation"] == record["validation"]
    assert same_bits(*(stored_weights(run, weights_path(one.folder)) for run in (whole, directory)))
    assert not directory.exists(checkpoint_path(one.folder, 0))
    works = Ledger(directory).read()
    assert [(work.outcome, work.attempt, work.waited_s) for work in works] == [("preempted", 0, 0.5), ("done", 1, 0.0)]
    assert {(work.node, work.device) for work in works} == {("there", "cpu")}
    (at_once,) = Ledger(whole).read()
    assert sum(work.cost.num_forward for work in works) == at_once.cost.num_forward


def test_several_pieces_at_once_leave_minima_of_their_own(
    full_set: FullSet, start: Weights, directory: RunDirectory
) -> None:
    pieces = [piece(full_set, subset) for subset in range(2)]
    records = minimizer(full_set, directory).minimize(pieces, start, attempts=[0, 0], waited_s=0.0)
    assert [directory.read_json(minimum_path(one.folder)) for one in pieces] == records
    first, second = (stored_weights(directory, weights_path(one.folder)) for one in pieces)
    assert not same_bits(first, second)


def one_round(config: Config, full_set: FullSet, directory: RunDirectory) -> tuple[Aggregation, float]:
    """Do all work of a run of one round without trunk and fine-tuning; its aggregate, and its passes."""
    plan, start = make_plan(config, full_set), new_model(config.model, full_set, seed=1).state_dict()
    doer, minima = Minimizer(config, lambda: full_set, directory, num_gpus=0, node="there"), []
    for subset in plan.subsets:
        one = Piece(
            "subsets", subset_id=subset.id, indices=subset.indices, start_id="start", statistics=plan.statistics
        )
        (record,) = doer.minimize([one], start, attempts=[0], waited_s=0.0)
        assert isinstance(record, dict)
        minima.append(read_minimum(directory, one, record))
    made, _ = leave_aggregate(full_set, 0, config, directory, Round(0, minima, start, {}), node="there")
    assert isinstance(made, Aggregation)
    leave_test(full_set, 0, config, directory, made.aggregate.weights, node="there")
    works = Ledger(directory).read()
    return made, sum(work.cost.passes(len(full_set.train), plan.forward_share) for work in works)


def of_method(method: str, **overrides: Any) -> Config:
    short = {"trunk.epochs": 0.0, "fine_tuning.epochs": 0.0, "minimize.epochs": 1.0, "minimize.batch_size": 32}
    fields = {key.replace("__", "."): value for key, value in overrides.items()}
    return CONFIG.with_overrides(
        {"aggregation.method": method, "aggregation.statistics_examples": 40, "model.norm": "batch", **short, **fields}
    )


RECIPES = {  # with passes of their own, for the running statistics of averages of weights
    "ties": {"minimize__epochs": 2.0, "minimize__averaging__kind": "pswa", "minimize__averaging__stages": "subsets"},
    "dare": {"minimize__averaging__kind": "ema", "minimize__averaging__stages": "subsets"},
}


@pytest.mark.parametrize(
    ("method", "kinds"),
    [("fisher", {"fisher"}), ("regmean", {"gram"}), ("ties", set()), ("dare", set()), ("select_best", set())],
)
def test_minima_have_what_the_method_needs_beside_them_and_the_plan_knows_what_it_costs(
    full_set: FullSet, directory: RunDirectory, method: str, kinds: set[str]
) -> None:
    config = of_method(method, **RECIPES.get(method, {}))
    made, passes = one_round(config, full_set, directory)
    assert made.aggregate.method == method
    assert list(made.aggregate.subset_ids) in ([[0], [1]] if method == "select_best" else [[0, 1]])
    for kind in ("fisher", "gram"):
        assert directory.exists(statistics_path(minimum_folder(0, 1), kind)) == (kind in kinds)
    conventional = make_plan(replace(config, method="conventional"), full_set)
    own = len(full_set.train) + len(full_set.validation) + len(full_set.test)
    assert passes == pytest.approx(conventional.passes + own * conventional.forward_share / len(full_set.train))


def test_auto_scores_every_candidate_and_shows_them(full_set: FullSet, directory: RunDirectory) -> None:
    made, _ = one_round(of_method("auto"), full_set, directory)
    record = made.to_dict()
    losses = {one["method"]: one["validation"]["loss"] for one in record["candidates"]}
    assert set(losses) == {
        "uniform_soup", "weighted_soup", "greedy_soup", "select_best", "fisher", "regmean", "ties", "dare"
    }  # fmt: skip
    assert record["validation"]["loss"] == min(losses.values()) == losses[record["method"]]
    (work,) = [work for work in Ledger(directory).read() if work.stage == "aggregation"]
    assert work.cost.num_forward > sum(one["cost"]["num_forward"] for one in record["candidates"]) > 0
    of_a_run = a_record()
    of_a_run["stages"]["rounds"][0]["aggregation"] = record
    (table,) = [section for section in sections(of_a_run) if section.title == "Candidates"]
    assert [row[0].removesuffix(", taken") for row in table.rows] == list(losses)


def test_an_aggregate_and_a_test_are_left_with_their_entries(
    full_set: FullSet, start: Weights, directory: RunDirectory
) -> None:
    minima, mean = [], RunningMean()
    for subset in range(2):
        one = piece(full_set, subset)
        (record,) = minimizer(full_set, directory).minimize([one], start, attempts=[0], waited_s=0.0)
        assert isinstance(record, dict)
        minima.append(read_minimum(directory, one, record))
        mean.add(stored_weights(directory, weights_path(one.folder)))
    of = Round(0, minima, start, {}, members={"minima": ["theirs"]})
    made, record = leave_aggregate(full_set, 0, CONFIG, directory, of, node="there")
    assert record["minima"] == ["theirs"]
    assert same_bits(stored_weights(directory, aggregate_weights_path(0)), mean.weights())
    metrics, files = leave_test(full_set, 0, CONFIG, directory, made.aggregate.weights, node="there")
    model = new_model(CONFIG.model, full_set)
    model.load_state_dict(made.aggregate.weights)
    assert metrics.num_correct == evaluate(model, full_set.examples("test"), CONFIG.minimize).num_correct
    assert all(directory.exists(path) for path in files)
    works = {work.stage: work for work in Ledger(directory).read()}
    assert {(works[stage].node, works[stage].device) for stage in ("aggregation", "test")} == {("there", "cpu")}
    assert works["test"].cost.num_forward == len(full_set.test)
