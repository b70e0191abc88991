"""Rounds: what they leave on disk, how long they are, and what they begin with. Without Ray."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow.fs as pafs
import pytest
import torch

from raysubset.comparison import gathering, sizes_of
from raysubset.comparison.network import Exchange
from raysubset.config import Config
from raysubset.costs import taken_bytes
from raysubset.data import load_full_set
from raysubset.legs import FRESH, Start
from raysubset.pipeline.rounds import Rounds
from raysubset.planning import Plan, make_plan
from raysubset.run_directory import (
    RunDirectory,
    aggregate_path,
    aggregate_weights_path,
    checkpoint_path,
    minimum_folder,
    optimizer_path,
    subsamples_folder,
)
from raysubset.run_directory import directory as stored
from raysubset.run_directory.ledger import Ledger
from raysubset.run_directory.patience import Patience, Patient
from raysubset.run_directory.recent import Recent
from raysubset.subset_actors import Backlog, Pack, SubsetFailed
from raysubset.training import Weights, learning_rate_at, why_not_packed
from raysubset.work import AggregatePiece, Minimizer, Piece, Run, leave_aggregate, round_spans, seeded_model
from raysubset.work import pieces as pieces_of_work
from tests.test_matrix import InProcess, cached
from tests.tiny import same_bits

TINY = {
    "data.name": "tests.tiny:few_digits",
    "subsets.num": 2,
    "subsets.size": 60,
    "minimize.epochs": 1.0,
    "minimize.batch_size": 30,
    "trunk.epochs": 0.0,
    "fine_tuning.epochs": 0.0,
    "model.width": 4,
    "rounds.num": 3,
}


def config_of(**overrides: Any) -> Config:
    return Config().with_overrides(TINY | {key.replace("__", "."): value for key, value in overrides.items()})


@cache
def planned(config: Config) -> Plan:
    return make_plan(config, cached(*config.learned))


def rounds_in(config: Config, directory: RunDirectory, *, per_actor: int = 1) -> tuple[Rounds, Run]:
    opened = Run(config, directory, cached(*config.learned), [], lambda event: None)
    decisions = SimpleNamespace(shares=None, slots=[], may_go_alone=False, per_actor=lambda *_: per_actor)
    return Rounds(opened, planned(config), cast(Any, decisions)), opened


def rounds_of(config: Config, folder: Path, name: str = "run", *, per_actor: int = 1) -> tuple[Rounds, Run]:
    return rounds_in(config, RunDirectory(str(folder), name), per_actor=per_actor)


def run_of(
    config: Config, folder: Path, *, num: int | None = None, name: str = "run", per_actor: int = 1
) -> tuple[Weights, list[Any]]:
    """The first `num` rounds of a run: the last aggregate, and the rounds' records."""
    (rounds, opened), records, start = rounds_of(config, folder, name, per_actor=per_actor), [], FRESH
    for round in range(num or config.rounds.num):
        aggregate, record = rounds.run(cast(Any, InProcess(opened)), round, start)
        start = Start("warm", aggregate)
        records.append(record)
        assert not aggregate.inputs, "nothing of the rounds before stays in memory"
        assert not any(before.inputs for member in rounds.members for before in member.inputs)
    assert start.leg is not None
    return start.leg.output.weights(), records


@pytest.mark.parametrize(
    ("state", "keep"), [("keep", 1), ("average", 2), ("reset", None), ("average", 1), ("keep", None)]
)
def test_what_no_resume_needs_is_deleted_and_any_resume_ends_at_the_same_bits(
    tmp_path: Path, state: str, keep: int | None
) -> None:
    config = config_of(rounds__optimizer_state=state, rounds__keep_minima=keep)
    whole, records = run_of(config, tmp_path, name="whole")
    run = RunDirectory(str(tmp_path), "whole")
    files = run.list("rounds", recursive=True)
    assert [path for path in files if path.endswith("optimizer.pt")] == []
    assert {path.split("/")[1] for path in files if "/minima/" in path} == {"0000", "0001", "0002"} - (
        set() if keep is None else {f"{round:04d}" for round in range(3 - keep)}
    )
    run_of(config, tmp_path, num=2)
    resumed = RunDirectory(str(tmp_path), "run")
    assert any(path.endswith("optimizer.pt") for path in resumed.list("rounds", recursive=True)) == (state != "reset")
    weights, again = run_of(config, tmp_path)
    assert same_bits(weights, whole)
    assert [record["minima"][1]["history"] for record in again] == [one["minima"][1]["history"] for one in records]


def test_members_that_are_done_leave_the_work_on_their_subsamples_its_optimizer_states(tmp_path: Path) -> None:
    config = config_of(rounds__num=2, aggregation__method="savgm", rounds__keep_minima=None)
    whole, _ = run_of(config, tmp_path)
    run = RunDirectory(str(tmp_path), "run")
    run_of(config, tmp_path, num=1, name="other")
    states = [optimizer_path(minimum_folder(0, subset)) for subset in range(2)]
    for path in (subsamples_folder(1), aggregate_path(1), aggregate_weights_path(1)):
        run.delete(path)
    for path in states:  # as they are until their round is aggregated
        run.write_bytes(path, RunDirectory(str(tmp_path), "other").read_bytes(path))
    resumed, _ = run_of(config, tmp_path)
    assert same_bits(resumed, whole)


def test_a_finished_run_keeps_no_minima_where_none_are_to_stay_and_reads_its_aggregate_back(tmp_path: Path) -> None:
    config, run = config_of(rounds__num=2, rounds__keep_minima=0), RunDirectory(str(tmp_path), "run")
    whole, records = run_of(config, tmp_path)
    left = {path.split("/")[1] for path in run.list("rounds", recursive=True) if "/minima/" in path}
    assert left == {"0001"}, "fine-tuning may learn from the last round's"
    rounds_of(config, tmp_path)[0].finish()
    assert [path for path in run.list("rounds", recursive=True) if "/minima/" in path] == []
    again, read_back = run_of(config, tmp_path)  # as a driver does that died before it left the report
    assert same_bits(again, whole)
    assert read_back[1]["minima"] == records[1]["minima"]
    assert [path for path in run.list("rounds", recursive=True) if "/minima/" in path] == []


@pytest.mark.parametrize("recipe", [{}, {"minimize.optimizer": "muon"}, {"minimize.optimizer": "adamw"}])
def test_a_process_that_has_a_state_in_memory_goes_on_as_one_that_reads_its_file(
    tmp_path: Path, recipe: dict[str, Any]
) -> None:
    config = config_of().with_overrides(recipe)
    full_set = load_full_set(*config.learned)
    start = seeded_model(config, full_set).state_dict()

    def second(name: str, *minimizers: Minimizer) -> Weights:
        directory = RunDirectory(str(tmp_path), name)
        first = Piece(config, directory, "subsets", subset_id=0, start_id="start")
        optimizer = (directory, optimizer_path(first.folder))
        pieces = (
            first,
            Piece(config, directory, "subsets", subset_id=0, round=1, start_id="start", optimizer=optimizer),
        )
        for piece, minimizer in zip(pieces, minimizers, strict=True):
            minimizer.minimize([piece], start, attempts=[0], waited_s=0.0)
        if minimizers[0] is minimizers[1]:
            assert list(minimizers[0]._optimizers) == [(directory.uri, optimizer_path(pieces[1].folder))]
        return pieces[1].output.weights()

    one, another, several = (Minimizer(lambda: full_set, num_gpus=0, node="here") for _ in range(3))
    assert same_bits(second("read", one, another), second("kept", several, several))


@pytest.mark.parametrize("state", ["keep", "reset", "average"])
def test_muon_s_momenta_are_kept_reset_or_averaged_over_rounds_packed_or_one_by_one(tmp_path: Path, state: str) -> None:
    config = config_of(minimize__optimizer="muon", rounds__num=2, rounds__optimizer_state=state)
    alone, _ = run_of(config, tmp_path, name="alone")
    assert why_not_packed(seeded_model(config, load_full_set(*config.learned)), config.minimize) is None
    packed, _ = run_of(config, tmp_path, name="packed", per_actor=2)
    for name, value in alone.items():
        torch.testing.assert_close(packed[name], value, rtol=1e-3, atol=1e-3)
    other = "keep" if state == "reset" else "reset"
    others, _ = run_of(config_of(minimize__optimizer="muon", rounds__num=2, rounds__optimizer_state=other), tmp_path)
    assert not same_bits(alone, others)


class Counted(Patient):
    """A storage on a local disk that counts the bytes of tensors' files, by the process that moves them."""

    def __init__(self) -> None:
        super().__init__(pafs.LocalFileSystem(), Patience("counted"))
        self.moved: Counter[str] = Counter()
        self.process = "driver"

    def write(self, path: str, data: Any) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._count(path, len(data))
        super().write(path, data)

    def read(self, path: str) -> bytes:
        data = super().read(path)
        self._count(path, len(data))
        return data

    def _count(self, path: str, num_bytes: int) -> None:
        if path.endswith((".safetensors", ".pt")):
            self.moved[self.process] += num_bytes


class Processes(InProcess):
    """Actors, one a subset, that remember what a process of their own would; the first of them aggregates."""

    def __init__(self, run: Run, storage: Counted, patch: pytest.MonkeyPatch) -> None:
        super().__init__(run)
        self._storage, self._patch = storage, patch
        self._minimizers: dict[int, Minimizer] = defaultdict(
            lambda: Minimizer(lambda: self.opened.full_set, num_gpus=0, node="here")
        )
        self._recent: dict[int, Recent] = defaultdict(Recent)

    def run(self, packs: Sequence[Pack], start: Weights | None, **_: Any) -> Iterator[Any]:
        for pack in packs:
            piece = pack.pieces[0]
            number = piece.subset_id if isinstance(piece, Piece) else None
            self._storage.process = f"actor {number or 0}"
            self._patch.setattr(stored, "RECENT", self._recent[number or 0])
            self._patch.setattr(pieces_of_work, "RECENT", self._recent[number or 0])
            taken_bytes()
            if isinstance(piece, AggregatePiece):
                record: Any = leave_aggregate(self.opened.full_set, 0, piece, start, node="here")[1]
            else:
                assert isinstance(piece, Piece)
                (record,) = self._minimizers[number or 0].minimize([piece], start, attempts=[0], waited_s=0.0)
            self._storage.process = "driver"
            self._patch.setattr(stored, "RECENT", Recent())
            yield piece, record


def bytes_of(exchange: Exchange) -> int:
    """The bytes that all links of a round carry together; the aggregator has the start of a later round already."""
    num, others = exchange.num_members, exchange.num_members - 1
    starts = exchange.start * (num if exchange.is_first else others)
    left = num * (exchange.states + exchange.shared + exchange.own)
    return starts + left + others * exchange.shared + exchange.aggregate + exchange.averaged


@pytest.mark.parametrize(
    ("state", "send", "method", "overlap"),
    [
        ("keep", "float32", "uniform_soup", False),
        ("reset", "bfloat16", "uniform_soup", False),
        ("average", "int8", "uniform_soup", False),
        ("average", "float32", "uniform_soup", False),
        ("keep", "int8", "uniform_soup", False),
        ("keep", "float32", "savgm", False),
        ("average", "float32", "savgm", False),
        ("reset", "float32", "regmean", False),
        ("keep", "float32", "uniform_soup", True),
        ("reset", "int8", "uniform_soup", True),
    ],
)
def test_the_ledger_and_the_forecast_have_each_byte_that_rounds_move_and_no_driver_moves_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, send: str, method: str, overlap: bool
) -> None:
    """And that is forecast to the byte. 2 s: four rounds, of which the second and the last are measured."""
    config = config_of(rounds__send=send, rounds__optimizer_state=state, rounds__evaluate_every=2, rounds__num=4)
    config = config.with_overrides({"aggregation.method": method, "rounds.overlap": overlap})
    storage, remote = Counted(), RunDirectory("counted://storage", "run")
    remote.__dict__["_filesystem_and_root"] = pafs.PyFileSystem(storage), str(tmp_path / "run")
    rounds, opened = rounds_in(config, remote)
    actors = Processes(opened, storage, monkeypatch)
    start, by_round = FRESH, list[int]()
    for round in range(4):
        before = storage.moved.total()
        start = Start("warm", rounds.run(cast(Any, actors), round, start)[0])
        by_round.append(storage.moved.total() - before)
    counted = [sum(w.num_network_bytes for w in Ledger(remote).read() if w.round == round) for round in range(4)]
    assert sum(counted) == sum(by_round)
    assert overlap or counted == by_round
    forecast = sizes_of(config, opened.full_set, planned(config)).rounds
    assert [bytes_of(one) for one in forecast] == [counted[0] + 2 * forecast[0].start, *counted[1:]]
    assert storage.moved["driver"] == 0
    assert start.leg is not None
    assert same_bits(start.leg.output.weights(), run_of(config, tmp_path / "local")[0])


@pytest.mark.parametrize("send", ["float32", "int8"])
def test_what_no_training_changes_is_moved_once_for_each_process_and_the_weights_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, send: str
) -> None:
    config = config_of(rounds__send=send, model__name="tests.adapter:adapter", model__width=None)
    storage, remote = Counted(), RunDirectory("counted://storage", "run")
    remote.__dict__["_filesystem_and_root"] = pafs.PyFileSystem(storage), str(tmp_path / "run")
    rounds, opened = rounds_in(config, remote)
    actors, start = Processes(opened, storage, monkeypatch), FRESH
    for round in range(3):
        start = Start("warm", rounds.run(cast(Any, actors), round, start)[0])
    assert start.leg is not None
    (path,) = (tmp_path / "run" / "frozen").iterdir()
    frozen, forecast = path.stat().st_size, sizes_of(config, opened.full_set, planned(config)).rounds
    assert frozen > 67_000
    works = Ledger(remote).read()
    moved = storage.moved.total()
    assert moved == sum(map(bytes_of, forecast)) - 2 * forecast[0].start == sum(w.num_network_bytes for w in works)
    assert moved < 9 * frozen, "which six minima and three aggregates would hold"

    monkeypatch.setattr("raysubset.work.starting._WORTH_A_FILE", 2**30)
    whole, _ = run_of(config, tmp_path / "whole")
    assert same_bits(start.leg.output.weights(), whole)
    assert not (tmp_path / "whole" / "run" / "frozen").exists()


@pytest.mark.parametrize("of_seed", [True, False])
def test_checkpoints_leave_out_what_no_training_changes_and_resume_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_seed: bool
) -> None:
    config = config_of(minimize__epochs=6.0, model__name="tests.adapter:adapter", model__width=None)
    config = config.with_overrides({"minimize.validate_every": 1, "minimize.patience": 5, "rounds.num": 1})
    full_set = cached(*config.learned)
    start = None if of_seed else seeded_model(config, full_set).state_dict()

    def minimized(name: str, *, stop_at: int | None = None) -> Piece:
        minimizer, directory = Minimizer(lambda: full_set, num_gpus=0, node="here"), RunDirectory(str(tmp_path), name)
        listen = lambda _: lambda progress: progress.step == stop_at and minimizer.request_stop()  # noqa: E731
        monkeypatch.setattr(minimizer, "_listener", listen)
        piece = Piece(config, directory, "subsets", subset_id=0)
        minimizer.minimize([piece], start, attempts=[0], waited_s=0.0)
        return piece

    whole, stopped = minimized("whole"), minimized("stopped", stop_at=5)
    path = checkpoint_path(stopped.folder, 0)
    state = stopped.directory.read_checkpoint(path)
    for weights in (state["model"], state["best"]["model"], state["best_validated"]["model"]):
        assert weights.keys() == {"head.weight", "head.bias"}
    assert minimized("stopped").record() is not None
    assert same_bits(stopped.output.weights(), whole.output.weights())


def test_checkpoints_within_a_round_are_forecast_but_for_their_histories(tmp_path: Path) -> None:
    config = config_of(minimize__epochs=3.0, rounds__num=1, rounds__evaluate_every=1)
    taken_bytes()  # of what tests before have read
    run_of(config, tmp_path)
    (works,) = [[w for w in Ledger(RunDirectory(str(tmp_path), "run")).read() if w.stage == "subsets"]]
    (exchange,) = sizes_of(config, full_set := load_full_set(*config.learned), make_plan(config, full_set)).rounds
    assert exchange.own > 2 * exchange.start, "two checkpoints, with the best weights"
    forecast = exchange.shared + exchange.own
    assert [work.num_network_bytes for work in works] == pytest.approx([forecast] * 2, rel=0.01)


@pytest.mark.parametrize("send", ["bfloat16", "int8"])
def test_rounds_of_sent_differences_end_near_those_of_weights(tmp_path: Path, send: str) -> None:
    whole, _ = run_of(config_of(rounds__num=2), tmp_path, name="whole")
    weights, _ = run_of(config_of(rounds__num=2, rounds__send=send), tmp_path)
    moved = max(float((whole[name] - weights[name]).abs().max()) for name in whole if "num_batches" not in name)
    assert 0 < moved < 0.02


@pytest.mark.parametrize(
    "overrides",
    [
        {"rounds.optimizer_state": "average", "minimize.optimizer": "adamw"},
        {"rounds.send": "int8", "rounds.num": 5},
        {"rounds.send": "bfloat16", "rounds.num": 4, "rounds.outer_momentum": 0.0, "rounds.evaluate_every": 3},
        {"rounds.overlap": True, "rounds.num": 5, "rounds.send": "int8"},
        {"aggregation.method": "savgm", "rounds.lengths": "quadratic", "minimize.schedule": "cosine"},
        {"aggregation.method": "savgm", "rounds.optimizer_state": "average"},
        {"aggregation.method": "aligned_soup", "subsets.start": "independent", "rounds.num": 1},
    ],
    ids=lambda overrides: next(iter(overrides)),
)
def test_legs_with_a_directory_each_end_at_the_bits_of_a_run_in_one_and_exchange_what_was_forecast(
    tmp_path: Path, overrides: dict[str, Any]
) -> None:
    config = config_of(rounds__num=2, actors__checkpoint_epochs=9.0).with_overrides(overrides)
    whole, _ = run_of(config, tmp_path)
    full_set = load_full_set(*config.learned)
    opened = Run(config, RunDirectory(str(tmp_path), "legs"), full_set, [], lambda event: None)
    plan = make_plan(config, full_set)
    legs = list(plan.drawing(config, opened.directory.below("legs"), is_lean=True).legs())
    for leg in legs:
        list(InProcess(opened).run([Pack((leg.piece,))], None))
    assert same_bits(legs[-1].output.weights(), whole)
    exchanges = [gathering.Legs(full_set, plan, {}).exchange(leg) for leg in legs if leg.kind == "aggregate"]
    assert exchanges == list(sizes_of(config, full_set, plan).rounds)


def test_a_damaged_last_aggregate_is_made_again_of_what_is_kept(tmp_path: Path) -> None:
    config = config_of()
    whole, _ = run_of(config, tmp_path)
    directory = RunDirectory(str(tmp_path), "run")
    directory.write_bytes(aggregate_weights_path(2), b"half")
    assert directory.read_record(aggregate_path(2)) is None
    weights, _ = run_of(config, tmp_path)
    assert same_bits(weights, whole)


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle", "warmup_linear", "constant"])
def test_quadratic_lengths_are_those_whose_squared_rates_sum_to_the_same(schedule: str) -> None:
    config = config_of(minimize__schedule=schedule, rounds__lengths="quadratic")
    spans, recipe = round_spans(config, 8), config.stage("subsets")

    def rate(progress: float) -> float:
        return learning_rate_at(recipe, 0, num_steps=1, span=(progress, progress))

    assert (spans[0][0], spans[-1][1]) == (0.0, 1.0)
    assert all(before[1] == after[0] for before, after in itertools.pairwise(spans))
    lengths = [end - begin for begin, end in spans]
    if schedule == "constant":
        assert lengths == pytest.approx([1 / 8] * 8)
        return
    assert lengths == sorted(lengths), "rounds grow as the rate falls"
    steep = [(begin, end) for begin, end in spans if begin > recipe.warmup_fraction][:-1]
    sums = [sum(rate(begin + (end - begin) * (i + 0.5) / 200) ** 2 for i in range(200)) / 200 for begin, end in steep]
    areas = [one * (end - begin) for one, (begin, end) in zip(sums, steep, strict=True)]
    assert areas == pytest.approx([areas[0]] * len(areas), rel=1e-3)


def test_rounds_of_quadratic_length_take_the_epochs_of_equal_ones(tmp_path: Path) -> None:
    config = config_of(rounds__lengths="quadratic", minimize__schedule="cosine", minimize__epochs=4.0)
    _, records = run_of(config, tmp_path)
    epochs = [record["minima"][0]["history"][-1]["epoch"] for record in records]
    assert epochs == sorted(epochs)
    assert epochs[0] < 4.0 < epochs[-1]
    assert sum(epochs) == pytest.approx(12.0, abs=1.5), "up to a step's rounding"


def test_several_rounds_have_the_outer_step_of_the_pilots_and_one_has_none() -> None:
    one, several = Config().rounds, config_of().rounds
    assert (one.momentum, one.has_outer_step()) == (0.0, False)
    assert (several.outer_learning_rate, several.momentum) == (1.0, 0.6)
    assert several.optimizer_state == "keep"
    assert not config_of(rounds__outer_momentum=0.0).rounds.has_outer_step()


class Losing(InProcess):
    """A pool that gives up a subset of a round, or a part of it."""

    def __init__(self, run: Run, lost: tuple[str, int, int]) -> None:
        super().__init__(run)
        self._lost, self.done = lost, list[Any]()

    def results(self, backlog: Backlog, start: Weights | None = None, **_: Any) -> Iterator[Any]:
        while (due := backlog.take()) is not None:
            if due[0].pieces[0].ledger_key == self._lost:
                yield due[0].pieces[0], SubsetFailed(f"{due[0].label} was lost")
                for dependent in backlog.drop_dependents(due[0].pieces[0]):
                    yield dependent, SubsetFailed("what it needs was lost")
                continue
            for piece, record in self.run([due[0]], None if due[0].names_start else start):
                self.done.append(piece.ledger_key)
                yield piece, record
                backlog.note_done(piece)


@pytest.mark.parametrize(
    ("method", "stage"), [("uniform_soup", "subsets"), ("savgm", "subsets"), ("savgm", "subsamples")]
)
def test_a_quorum_leaves_out_a_lost_subset_in_its_round_and_without_one_the_run_ends(
    tmp_path: Path, method: str, stage: str
) -> None:
    config = config_of(subsets__num=3, aggregation__method=method, actors__quorum=2)
    (rounds, opened), start, subsets = rounds_of(config, tmp_path), FRESH, list[Any]()
    pool = Losing(opened, (stage, 1, 1))
    for round in range(3):
        aggregate, record = rounds.run(cast(Any, pool), round, start)
        start = Start("warm", aggregate)
        subsets.append([minimum["subset_id"] for minimum in record["minima"]])
        assert record["aggregation"]["subset_ids"] == subsets[-1]
    assert subsets == [[0, 1, 2], [0, 2], [0, 1, 2]]
    assert len(set(pool.done)) == len(pool.done)
    for name, quorum in (("strict", 3), ("all", None)):
        (rounds, opened), start = rounds_of(config_of(**_with(config, quorum)), tmp_path, name), FRESH
        pool = Losing(opened, (stage, 1, 1))
        start = Start("warm", rounds.run(cast(Any, pool), 0, start)[0])
        with pytest.raises(SubsetFailed, match="was lost"):
            rounds.run(cast(Any, pool), 1, start)
        assert {key[1] for key in pool.done} == {0, 1}


def _with(config: Config, quorum: int | None) -> dict[str, Any]:
    return {"subsets__num": 3, "aggregation__method": config.aggregation.method, "actors__quorum": quorum}


def test_members_of_the_next_round_are_queued_behind_the_aggregate_that_they_start_from(tmp_path: Path) -> None:
    """So that actors need not wait for the driver between rounds."""
    (rounds, opened), queued = rounds_of(config_of(), tmp_path), list[Any]()

    class Watched(InProcess):
        def results(self, backlog: Backlog, start: Weights | None = None, **_: Any) -> Iterator[Any]:
            for piece, record in super().results(backlog, start):
                queued.append((piece.ledger_key, len(backlog), backlog.num_later))
                yield piece, record

    rounds.run(cast(Any, Watched(opened)), 0, FRESH)
    # another member; the aggregate and the next round's three; the round after that
    assert queued == [
        (("subsets", 0, 0), 1, 4 + 2),
        (("subsets", 0, 1), 0, 4 + 2),
        (("aggregation", 0, None), 0, 3 + 2),
    ]
