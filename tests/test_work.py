"""What is done for a run, in this process: the same files and bits as on a cluster."""

from pathlib import Path
from typing import Any

import pytest

from raysubset import Config
from raysubset.aggregation import RunningMean
from raysubset.data import FullSet, load_full_set
from raysubset.ledger import Ledger
from raysubset.models import new_model
from raysubset.run_directory import RunDirectory, aggregate_weights_path, checkpoint_path, minimum_path, weights_path
from raysubset.training import Weights, evaluate
from raysubset.work import (
    AggregatePiece,
    Minimizer,
    Output,
    Piece,
    TestPiece,
    cut_subsets,
    leave_aggregate,
    leave_metrics,
    leave_test,
    perturbed,
)
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


def piece(directory: RunDirectory, subset: int, **options: Any) -> Piece:
    return Piece(CONFIG, directory, "subsets", subset_id=subset, start_id="start", **options)


def minimizer(full_set: FullSet) -> Minimizer:
    return Minimizer(lambda: full_set, num_gpus=0, node="there")


def test_a_piece_that_was_stopped_resumes_to_the_same_bits_and_all_its_work_is_counted(
    full_set: FullSet, start: Weights, directory: RunDirectory, tmp_path: Path
) -> None:
    whole = RunDirectory(str(tmp_path), "whole")
    one, unbroken = piece(directory, 0), piece(whole, 0)
    (record,) = minimizer(full_set).minimize([unbroken], start, attempts=[0], waited_s=0.0)
    first = minimizer(full_set)
    first.request_stop(preempted=True)
    assert first.minimize([one], start, attempts=[0], waited_s=0.5) == [None]
    assert directory.exists(checkpoint_path(one.folder, 0))
    (resumed,) = minimizer(full_set).minimize([one], start, attempts=[1], waited_s=0.0)
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
    pieces = [piece(directory, subset) for subset in range(2)]
    records = minimizer(full_set).minimize(pieces, start, attempts=[0, 0], waited_s=0.0)
    assert [directory.read_json(minimum_path(one.folder)) for one in pieces] == records
    first, second = (stored_weights(directory, weights_path(one.folder)) for one in pieces)
    assert not same_bits(first, second)


def test_an_aggregate_and_a_test_are_left_with_their_entries(
    full_set: FullSet, start: Weights, directory: RunDirectory
) -> None:
    members, mean = tuple(piece(directory, subset) for subset in range(2)), RunningMean()
    for one in members:
        minimizer(full_set).minimize([one], start, attempts=[0], waited_s=0.0)
        mean.add(stored_weights(directory, weights_path(one.folder)))
    round = AggregatePiece(CONFIG, directory, members, more={"more": "theirs"})
    made, record = leave_aggregate(full_set, 0, round, start, node="there")
    assert record["more"] == "theirs"
    assert round.record() == directory.read_json(round.output.record_path)
    assert same_bits(stored_weights(directory, aggregate_weights_path(0)), mean.weights())
    metrics, files = leave_test(full_set, 0, CONFIG, directory, made.aggregate.weights, node="there")
    test = TestPiece(CONFIG, round.output, "test")
    assert leave_metrics(full_set, 0, test) == test.record() == metrics.to_dict()
    model = new_model(CONFIG.model, full_set)
    model.load_state_dict(made.aggregate.weights)
    assert metrics.num_correct == evaluate(model, full_set.examples("test"), CONFIG.minimize).num_correct
    assert all(directory.exists(path) for path in files)
    works = {work.stage: work for work in Ledger(directory).read()}
    assert {(works[stage].node, works[stage].device) for stage in ("aggregation", "test")} == {("there", "cpu")}
    assert works["test"].cost.num_forward == len(full_set.test)


def test_a_piece_finds_start_examples_and_optimizer_where_others_left_them(
    full_set: FullSet, start: Weights, directory: RunDirectory, tmp_path: Path
) -> None:
    elsewhere = RunDirectory(str(tmp_path), "elsewhere")
    indices = cut_subsets(CONFIG, full_set, 0)[1].indices
    whole = piece(directory, 1, indices=indices)
    (first,) = minimizer(full_set).minimize([whole], start, attempts=[0], waited_s=0.0)
    assert isinstance(first, dict)
    trunk = Output.of_minimum(RunDirectory(str(tmp_path), "another"), "trunk")
    files = {trunk.weights_path: trunk.directory.write_weights(trunk.weights_path, start)}
    trunk.directory.write_json(trunk.record_path, first | {"files": files})
    one = piece(elsewhere, 1, start=trunk)
    (record,) = minimizer(full_set).minimize([one], None, attempts=[0], waited_s=0.0)
    assert same_bits(*(stored_weights(run, weights_path(one.folder)) for run in (directory, elsewhere)))
    assert isinstance(record, dict)
    assert record["num_bytes_sent"] == 2 * sum(tensor.nbytes for tensor in start.values())
    assert not same_bits(perturbed(CONFIG, full_set, start), start)
    changed = piece(RunDirectory(str(tmp_path), "changed"), 1, start=trunk, is_perturbed=True)
    assert same_bits(changed.start_weights(full_set) or {}, perturbed(CONFIG, full_set, start))
