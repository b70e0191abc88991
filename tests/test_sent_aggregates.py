"""Aggregates that are sent as differences: their rounding, what stays on disk, who joins late, deaths and damage."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from raysubset.config import Config, stages
from raysubset.errors import CorruptFile
from raysubset.models import build_model, trainable_names
from raysubset.run_directory import RunDirectory, aggregate_path, aggregate_weights_path, momentum_path
from raysubset.run_directory.recent import RECENT
from raysubset.subset_actors import Pack
from raysubset.training import evaluate
from raysubset.work import AggregatePiece, Output, leave_aggregate
from tests import test_overlap
from tests.test_matrix import InProcess
from tests.test_rounds import cached, config_of, planned, rounds_of, run_of
from tests.tiny import same_bits

NUM_ROUNDS = 5  # 0 and 3 are whole, and 4 as it is the last


@pytest.fixture(autouse=True)
def whole_every_third(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "WHOLE_EVERY", 3)


def sent(**overrides: Any) -> Config:
    return config_of(**{"rounds__num": NUM_ROUNDS, "rounds__send": "int8"} | overrides)


def output_of(directory: RunDirectory, round: int) -> Output:
    return Output(directory, aggregate_path(round), aggregate_weights_path(round))


def left(directory: RunDirectory, path_of: Any) -> list[int]:
    return [round for round in range(NUM_ROUNDS) if directory.exists(path_of(round))]


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_a_sent_aggregate_is_the_exact_one_to_half_a_step_and_is_measured_as_readers_have_it(
    tmp_path: Path, momentum: float
) -> None:
    config = sent(rounds__outer_momentum=momentum, rounds__keep_minima=None)
    legs = list(planned(config).drawing(config, str(tmp_path)).legs())
    opened = rounds_of(config, tmp_path)[1]
    for leg in legs:
        list(InProcess(opened).run([Pack((leg.piece,))], None))
    full_set, model = cached(*config.learned), build_model(config.model, cached(*config.learned).spec)
    names, last = trainable_names(model), None
    for leg in (leg for leg in legs if leg.kind == "aggregate"):
        piece, weights = leg.piece, leg.output.weights()
        assert isinstance(piece, AggregatePiece)
        if piece.send == "float32":
            last = weights
            continue
        assert last is not None
        apart = dataclasses.replace(piece, directory=RunDirectory(str(tmp_path), "exact"), send="float32")
        exact, _ = leave_aggregate(full_set, 0, apart, node="")
        for name in names:
            way = exact.aggregate.weights[name] - last[name]
            error = (weights[name] - exact.aggregate.weights[name]).abs()
            assert (error <= 1.001 * way.abs().max() / 127 / 2 + 2**-23 * last[name].abs()).all()
        assert any(not torch.equal(weights[name], exact.aggregate.weights[name]) for name in names)
        model.load_state_dict(weights)
        measured = evaluate(model, full_set.examples("validation"), config.minimize).to_dict()
        assert leg.validation() == measured
        last = weights


def test_what_later_aggregates_differ_from_stays_on_disk_and_nothing_else(tmp_path: Path) -> None:
    """With the minima of two rounds what these began with is kept, too, and with it the whole one before."""
    for keep, aggregates, momenta in ((1, [3, 4], [3, 4]), (2, [0, 1, 2, 3, 4], [2, 3, 4])):
        run_of(sent(rounds__keep_minima=keep), tmp_path, name=f"keep-{keep}")
        directory = RunDirectory(str(tmp_path), f"keep-{keep}")
        assert left(directory, aggregate_weights_path) == aggregates
        assert left(directory, momentum_path) == momenta
        assert left(directory, aggregate_path) == list(range(NUM_ROUNDS))


def test_a_run_that_was_stopped_after_any_round_ends_at_the_same_bits(tmp_path: Path) -> None:
    config = sent()
    whole, records = run_of(config, tmp_path, name="whole")
    assert ["base" in record for record in records] == [False, True, True, False, False]
    for num in (2, 3, 4):
        run_of(config, tmp_path, num=num, name=f"stopped-{num}")
        RECENT.sum = None, {}  # of the process that was stopped
        assert same_bits(run_of(config, tmp_path, name=f"stopped-{num}")[0], whole)


@pytest.mark.parametrize("damaged", [0, 1])
def test_damage_to_what_an_aggregate_differs_from_is_mended_by_the_same_bits(tmp_path: Path, damaged: int) -> None:
    config = test_overlap.config_of(rounds__overlap=False, rounds__num=NUM_ROUNDS, rounds__send="int8")
    whole, _ = test_overlap.run_of(config, tmp_path, "whole")
    with pytest.raises(KeyboardInterrupt):
        test_overlap.run_of(config, tmp_path, num=3 * 3)  # round 2's aggregate, which is 0's and two differences
    directory = RunDirectory(str(tmp_path), "run")
    RECENT.sum = None, {}
    before = output_of(directory, 2).weights()
    directory.write_bytes(aggregate_weights_path(damaged), b"half")
    RECENT.sum = None, {}
    with pytest.raises(CorruptFile, match=f"rounds/000{damaged}"):
        output_of(directory, 2).weights()
    resumed, _ = test_overlap.run_of(config, tmp_path)
    assert same_bits(resumed, whole)
    assert not same_bits(before, whole)


def test_differences_from_weights_that_are_others_now_are_refused_and_their_round_is_done_again(tmp_path: Path) -> None:
    run_of(sent(), tmp_path, num=3)
    run_of(sent(seed=1), tmp_path, num=3, name="other")
    directory, other = RunDirectory(str(tmp_path), "run"), RunDirectory(str(tmp_path), "other")
    for path in (aggregate_path(1), aggregate_weights_path(1)):
        directory.write_bytes(path, other.read_bytes(path))
    RECENT.sum = None, {}
    with pytest.raises(CorruptFile, match=r"0002/agg.* differences from rounds/0001.*another file now"):
        output_of(directory, 2).weights()
    directory.delete(aggregate_path(1))
    with pytest.raises(CorruptFile, match=r"rounds/0001/aggregate.json .* is gone") as caught:
        output_of(directory, 2).weights()
    assert caught.value.path == aggregate_path(1)


def test_legs_wait_until_all_that_their_start_differs_from_is_there(tmp_path: Path) -> None:
    config = sent()
    legs = {leg.key: leg for leg in planned(config).drawing(config, str(tmp_path)).legs()}
    aggregates = [leg for leg in legs.values() if leg.kind == "aggregate"]
    member = next(leg for leg in legs.values() if leg.round == 3 and leg.subset == 0)
    assert member.start.leg == aggregates[2]
    assert list(member.bases) == [aggregates[1], aggregates[0]]
    assert [list(leg.bases) for leg in legs.values() if leg.round == 1 and leg.subset == 0] == [[]]


def test_a_process_adds_up_only_what_it_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_of(sent(), tmp_path, num=3)
    directory, read = RunDirectory(str(tmp_path), "run"), list[str]()
    read_weights = RunDirectory.read_weights
    monkeypatch.setattr(
        RunDirectory, "read_weights", lambda self, path, files: read.append(path) or read_weights(self, path, files)
    )
    RECENT.sum = None, {}
    first = output_of(directory, 1).weights()
    assert read == [aggregate_weights_path(1), aggregate_weights_path(0)]
    for tensor in first.values():  # by whoever got them
        tensor.zero_()
    read.clear()
    later = output_of(directory, 2).weights()
    assert read == [aggregate_weights_path(2)]
    RECENT.sum = None, {}
    assert same_bits(output_of(directory, 2).weights(), later)
    again = output_of(directory, 2).weights()
    assert len(read) == 4
    assert same_bits(again, later)
