"""What is done for a run, in this process: the same files and bits as on a cluster."""

from pathlib import Path

import pytest

from raysubset import Config
from raysubset.aggregation import RunningMean
from raysubset.data import FullSet, load_full_set
from raysubset.ledger import Ledger
from raysubset.models import new_model
from raysubset.planning import cut_subsets
from raysubset.run_directory import RunDirectory, aggregate_weights_path, checkpoint_path, minimum_path, weights_path
from raysubset.subset_actors import read_minimum
from raysubset.training import Weights, evaluate
from raysubset.work import Minimizer, Piece, Round, leave_aggregate, leave_test
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
