"""Rounds that overlap: what members begin with, against a loop by hand; order, deaths and damage change no bit."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from raysubset.aggregation import RunningMean, from_differences, outer_step, to_differences
from raysubset.comparison.network import Exchange, critical_bytes
from raysubset.config import Config, derive_seed
from raysubset.data import load_full_set
from raysubset.legs import FRESH, Drawing, Start, closure, critical_path
from raysubset.planning import make_plan
from raysubset.run_directory import (
    CorruptFile,
    RunDirectory,
    aggregate_path,
    aggregate_weights_path,
    ledger,
    minimum_folder,
    minimum_path,
    weights_path,
)
from raysubset.run_directory.ledger import Work
from raysubset.subset_actors import Backlog
from raysubset.training import Weights, minimize, why_not_packed
from raysubset.work import AggregatePiece, cut_subsets, round_spans, seeded_model
from tests.test_matrix import InProcess
from tests.test_rounds import TINY, rounds_of
from tests.tiny import same_bits

NUM_ROUNDS = 4


def config_of(**overrides: Any) -> Config:
    fields = TINY | {"rounds.num": NUM_ROUNDS, "rounds.overlap": True}
    return Config().with_overrides(fields | {key.replace("__", "."): value for key, value in overrides.items()})


class Ordered(InProcess):
    """A pool that does of all that is due what comes first in an order of one's choice, and dies after so many."""

    def __init__(self, *arguments: Any, order: Callable[[Any], Any] = lambda piece: 0, num: int | None = None) -> None:
        super().__init__(*arguments)
        self.done: list[tuple[str, int, int | None]] = []
        self._order, self._num_left = order, num

    def results(self, backlog: Backlog, start: Weights | None = None, **_: Any) -> Iterator[Any]:
        while (due := self._due(backlog)) is not None:
            for piece, record in self.run([due], None if due.names_start else start):
                yield piece, record
                backlog.note_done(piece)

    def _due(self, backlog: Backlog) -> Any:
        due = []
        while (taken := backlog.take()) is not None:
            due.append(taken[0])
        due.sort(key=lambda pack: self._order(pack.pieces[0]))
        for pack in due[1:]:
            backlog.put_back(pack)
        return due[0] if due else None

    def run(self, packs: Any, start: Weights | None, **_: Any) -> Iterator[Any]:
        for piece, record in super().run(packs, start):
            self.done.append(piece.ledger_key)
            yield piece, record
            if self._num_left is not None:
                self._num_left -= 1
                if not self._num_left:
                    raise KeyboardInterrupt


def run_of(
    config: Config, folder: Path, name: str = "run", *, per_actor: int = 1, **options: Any
) -> tuple[Weights, Any]:
    """A run's last aggregate, as the pipeline comes to it, and its pool."""
    found: set[str] = set()
    while True:
        (rounds, opened), start = rounds_of(config, folder, name, per_actor=per_actor), FRESH
        pool = Ordered(opened, **options)
        try:
            for round in range(config.rounds.num):
                start = Start("warm", rounds.run(cast(Any, pool), round, start)[0])
            break
        except CorruptFile as error:
            if error.path in found:
                raise
            found.add(error.path)
            opened.directory.forget(error.path)
    rounds.finish()
    assert start.leg is not None
    return start.leg.output.weights(), pool


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_rounds_that_overlap_are_local_sgd_averaged_a_round_late(tmp_path: Path, momentum: float) -> None:
    """By hand, in one process: s_k(r+1) = a(r-1) + d_k(r), and a(r) is the outer step from a(r-1) to their mean."""
    config = config_of(model__norm="none", rounds__outer_momentum=momentum, rounds__keep_minima=None)
    weights, _ = run_of(config, tmp_path)
    full_set = load_full_set(*config.learned)
    model, spans = seeded_model(config, full_set), round_spans(config, NUM_ROUNDS)
    first = {name: value.clone() for name, value in model.state_dict().items()}
    aggregates, ways, states, velocity = [first, first], {}, {}, Weights()
    for round in range(NUM_ROUNDS):
        mean, starts = RunningMean(), RunningMean()
        for subset in cut_subsets(config, full_set, round):
            start = {name: aggregates[-2][name] + ways.get((subset.id, name), 0.0) for name in first}
            model.load_state_dict(start)
            seed, examples = derive_seed(config.seed, "minimize", "subsets", round, subset.id), subset.indices
            result = minimize(
                model,
                full_set.examples("train", examples, augment=True),
                config.stage("subsets"),
                seed=seed,
                optimizer_state=states.get(subset.id),
                schedule_span=spans[round],
            )
            states[subset.id] = result.optimizer
            for name, value in model.state_dict().items():
                ways[subset.id, name] = value - start[name]
            mean.add({name: aggregates[-1][name] + ways[subset.id, name] for name in first})
            starts.add(start)
        if round and not momentum:
            for name, value in starts.weights().items():
                torch.testing.assert_close(value, aggregates[-1][name], msg="nobody waited for what their mean is")
        names = set(first)
        options: dict[str, Any] = {"learning_rate": 1.0, "momentum_factor": momentum, "parameter_names": names}
        stepped, velocity = outer_step(aggregates[-1], mean.weights(), velocity, **options)
        aggregates.append(stepped if momentum else mean.weights())
    assert same_bits(weights, aggregates[-1])


def test_one_subset_goes_on_where_it_ended_as_without_overlap(tmp_path: Path) -> None:
    one = {"subsets__num": 1, "rounds__outer_momentum": 0.0, "model__norm": "none"}
    overlapping, _ = run_of(config_of(**one), tmp_path)
    plain, _ = run_of(config_of(**one, rounds__overlap=False), tmp_path, "plain")
    for name, value in plain.items():
        torch.testing.assert_close(overlapping[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("contraction", [0.01, 0.1, 0.5, 1.0])
def test_on_quadratics_members_converge_by_the_root_of_the_momentum_a_round_at_worst(
    momentum: float, contraction: float
) -> None:
    """Two members with minima 1 and 3 go a share of the way to their own; the outer step's rate is 1."""
    optima = torch.tensor([1.0, 3.0], dtype=torch.float64)
    before = last = {"w": torch.zeros((), dtype=torch.float64)}
    ways, velocity = [{"w": torch.zeros((), dtype=torch.float64)}] * 2, {}
    sent = [to_differences(way, way, ["w"], "difference") for way in ways]
    errors = []
    for _ in range(600):
        ends, starts = [], [from_differences(one, before) for one in sent]
        for start, optimum in zip(starts, optima, strict=True):
            ends.append({"w": start["w"] + contraction * (optimum - start["w"])})
        sent = [to_differences(end, start, ["w"], "difference") for end, start in zip(ends, starts, strict=True)]
        moved = [from_differences(one, last)["w"] for one in sent]
        options: dict[str, Any] = {"learning_rate": 1.0, "momentum_factor": momentum, "parameter_names": ["w"]}
        after, velocity = outer_step(last, {"w": (moved[0] + moved[1]) / 2}, velocity, **options)
        before, last = last, after
        errors.append(abs(float(last["w"]) - 2.0))
    worst = max(momentum**0.5, 1 - contraction)
    assert all(error <= 40 * (1 + number) * worst**number + 1e-12 for number, error in enumerate(errors))


def of_round_after(piece: Any) -> tuple[bool, int]:
    """Aggregates last, of what is due; then the later round first."""
    return isinstance(piece, AggregatePiece), -piece.round


@pytest.mark.parametrize("overrides", [{}, {"rounds.send": "int8"}, {"rounds.optimizer_state": "reset"}], ids=str)
def test_members_begin_before_the_last_aggregate_is_there_and_their_order_changes_no_bit(
    tmp_path: Path, overrides: dict[str, Any]
) -> None:
    config = config_of().with_overrides(overrides)
    first, in_order = run_of(config, tmp_path, "aggregates-first")
    last, pool = run_of(config, tmp_path, "aggregates-last", order=of_round_after)
    assert same_bits(first, last)
    assert len(set(pool.done)) == len(pool.done) == len(in_order.done) == 3 * NUM_ROUNDS
    for round in range(NUM_ROUNDS - 1):
        aggregation = pool.done.index(("aggregation", round, None))
        assert {("subsets", round + 1, 0), ("subsets", round + 1, 1)} <= set(pool.done[:aggregation])
        assert not {key for key in pool.done[:aggregation] if key[1] > round + 1}
    other, _ = run_of(config_of(rounds__overlap=False).with_overrides(overrides), tmp_path, "without")
    assert not same_bits(first, other)


@pytest.mark.parametrize("order", [lambda piece: 0, of_round_after], ids=["aggregates-first", "aggregates-last"])
def test_a_driver_may_die_after_any_piece_and_the_next_does_the_rest_to_the_same_bits(
    tmp_path: Path, order: Callable[[Any], Any]
) -> None:
    num_rounds = 3  # the last members begin at the first aggregate
    config = config_of(model__norm="none", rounds__num=num_rounds)
    whole, pool = run_of(config, tmp_path, "whole")
    for num in range(1, len(pool.done)):
        with pytest.raises(KeyboardInterrupt):
            run_of(config, tmp_path, f"died-{num}", order=order, num=num)
        resumed, rest = run_of(config, tmp_path, f"died-{num}")
        assert same_bits(resumed, whole)
        assert len(rest.done) == len(pool.done) - num
    directory = RunDirectory(str(tmp_path), "whole")
    left = {path.split("/")[1] for path in directory.list("rounds", recursive=True) if "/minima/" in path}
    assert left == {f"{num_rounds - 1:04d}"}


@pytest.fixture(scope="module")
def of_driver_that_died(tmp_path_factory: pytest.TempPathFactory) -> tuple[Weights, Path]:
    """Where a run ends, and the folder of runs whose drivers died after six and nine pieces."""
    folder, config = tmp_path_factory.mktemp("died"), config_of(model__norm="none")
    whole, _ = run_of(config, folder, "whole")
    for num in (6, 9):
        with pytest.raises(KeyboardInterrupt):
            run_of(config, folder, f"died-{num}", order=of_round_after, num=num)
    return whole, folder


@pytest.mark.parametrize("num", [6, 9])
@pytest.mark.parametrize("what", ["minimum", "aggregate", "earlier aggregate", "record"])
def test_what_is_damaged_is_made_again_with_all_that_it_stands_on(
    of_driver_that_died: tuple[Weights, Path], tmp_path: Path, what: str, num: int
) -> None:
    whole, folder = of_driver_that_died
    shutil.copytree(folder / f"died-{num}", tmp_path / "run")
    directory = RunDirectory(str(tmp_path), "run")
    aggregated = [round for round in range(NUM_ROUNDS) if directory.exists(aggregate_path(round))]
    newest = max(aggregated, default=-1)
    path = {
        "minimum": weights_path(minimum_folder(newest + 1, 0)),
        "record": minimum_path(minimum_folder(newest + 1, 0)),
        "aggregate": aggregate_weights_path(max(newest, 0)),
        "earlier aggregate": aggregate_weights_path(max(newest - 1, 0)),
    }[what]
    directory.write_bytes(path, b"half")
    resumed, _ = run_of(config_of(model__norm="none"), tmp_path)
    assert same_bits(resumed, whole)


def test_packed_members_begin_at_places_of_their_own(tmp_path: Path) -> None:
    alone, _ = run_of(config_of(rounds__num=3), tmp_path, "alone")
    config = config_of(rounds__num=3)
    assert why_not_packed(seeded_model(config, load_full_set(*config.learned)), config.minimize) is None
    packed, pool = run_of(config, tmp_path, "packed", per_actor=2)
    assert len(pool.done) == 9
    for name, value in alone.items():
        torch.testing.assert_close(packed[name], value, rtol=1e-3, atol=1e-3)


def test_the_last_aggregate_is_of_ways_in_full_whatever_members_of_other_rounds_send(tmp_path: Path) -> None:
    config = config_of(rounds__send="int8", rounds__keep_minima=None)
    run_of(config, tmp_path)
    directory = RunDirectory(str(tmp_path), "run")
    sent = [directory.read_json(minimum_path(minimum_folder(round, 0)))["send"] for round in range(NUM_ROUNDS)]
    assert sent == ["int8"] * (NUM_ROUNDS - 1) + ["difference"]


def test_half_precision_weights_are_sent_as_differences_of_their_type() -> None:
    start = {"w": torch.tensor([1.0, 2.0], dtype=torch.bfloat16), "v": torch.ones(2)}
    weights = {"w": torch.tensor([1.5, 2.0], dtype=torch.bfloat16), "v": torch.tensor([1.0, 3.0])}
    for send in ("difference", "int8", "bfloat16"):
        moved = from_differences(
            to_differences(weights, start, ["w", "v"], send), {"w": start["w"] * 2, "v": start["v"]}
        )
        assert same_bits(moved, {"w": torch.tensor([2.5, 4.0], dtype=torch.bfloat16), "v": weights["v"]})


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"rounds.optimizer_state": "average"}, "rounds.optimizer_state=average needs all members"),
        ({"actors.quorum": 1}, "actors.quorum loses members"),
        ({"fine_tuning.distillation": 0.5, "fine_tuning.epochs": 1.0}, "fine_tuning.distillation learns from minima"),
        ({"aggregation.method": "greedy_soup"}, "aggregation.method=greedy_soup goes by measurements"),
        ({"aggregation.method": "auto"}, "aggregation.method=auto goes by measurements"),
        ({"aggregation.method": "regmean"}, "aggregation.method=regmean goes by measurements"),
        ({"aggregation.method": "savgm"}, "aggregation.method=savgm goes by measurements"),
    ],
)
def test_what_cannot_be_combined_is_refused_in_a_line(overrides: dict[str, Any], told: str) -> None:
    def plan(num: int) -> None:
        config = config_of(rounds__num=num).with_overrides(overrides)
        make_plan(config, load_full_set(*config.learned))

    with pytest.raises(ValueError, match=told) as caught:
        plan(2)
    assert "\n" not in str(caught.value)
    plan(1)


def test_names_and_keys_of_before_stay_while_it_is_off() -> None:
    config = Config().with_overrides(TINY | {"data.name": "digits"})
    tree = config.to_dict()
    del tree["rounds"]["overlap"]
    assert config.run_name() == NAME
    assert Config.from_dict(tree) == config
    assert [leg.key for leg in Drawing(config, "legs", (60, 60)).legs()][-1] == KEY
    on = config.with_overrides({"rounds.overlap": True})
    assert on.run_name() != config.run_name()
    assert [leg.key for leg in Drawing(on, "legs", (60, 60)).legs()][-1] != KEY


NAME, KEY = "digits-64338cb1", "subsets-aggregate-f7ac5c67a9555382"  # as they were when it came


def test_an_aggregate_is_on_the_critical_path_where_it_is_waited_for() -> None:
    def leg(stage: Any, round: int, subset: int | None, s: float) -> Work:
        return Work(stage, round, subset, 0, "n", device="cpu", started_at=0.0, ended_at=s, outcome="done")

    works = [leg("trunk", 0, None, 2.0), leg("test", 0, None, 1.0)]
    works += [leg("subsets", round, subset, s) for round in range(3) for subset, s in enumerate((4.0, 5.0))]
    quick = [leg("aggregation", round, None, 3.0) for round in range(3)]
    slow = [leg("aggregation", round, None, 9.0) for round in range(3)]
    path_s = partial(ledger.critical_path, length=lambda work: work.wall_s)
    assert path_s([*works, *quick]) == 3 + 3 * (5 + 3)
    assert path_s([*works, *quick], overlap=True) == 3 + 3 * 5 + 3
    assert path_s([*works, *slow], overlap=True) == 3 + 5 + 3 * 9
    drawn = list(Drawing(config_of(rounds__num=3, trunk__epochs=1.0), "legs", (60, 60)).legs())
    for aggregates in (quick, slow):
        lengths = {(work.stage, work.subset): work.wall_s for work in (*works, *aggregates)}
        stages = {leg: "aggregation" if leg.kind == "aggregate" else leg.stage for leg in drawn}
        graph = critical_path(drawn, lambda leg, s=lengths, of=stages: s[of[leg], leg.subset])
        assert graph + 1 == path_s([*works, *aggregates], overlap=True)


def test_bytes_on_the_critical_path_are_those_of_the_longer_chain() -> None:
    one = Exchange(4, start=100, shared=100, own=0, aggregate=100)
    first = dataclasses.replace(one, is_first=True)
    assert critical_bytes([first, one, one], overlap=False) == 3 * (200 + 400)
    assert critical_bytes([first, one, one], overlap=True) == 200 + 3 * 500
    two = dataclasses.replace(one, num_members=1)
    assert critical_bytes([two, two, two], overlap=True) == max(3 * 100 + 200, 100 + 3 * 200)


def test_members_need_their_predecessor_and_the_aggregate_before_the_last() -> None:
    legs = list(Drawing(config_of(), "legs", (60, 60)).legs())
    by_key = {(leg.kind, leg.round, leg.subset): leg for leg in legs}
    for round in range(2, NUM_ROUNDS):
        needed = {by_key["aggregate", round - 2, None], by_key["minimize", round - 1, 1]}
        assert set(by_key["minimize", round, 1].inputs) == needed
    assert by_key["aggregate", 2, None].start.leg == by_key["aggregate", 1, None]
    assert set(closure(legs[-1])) == set(legs)
