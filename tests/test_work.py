"""What is done for a run, in this process: the same files and bits as on a cluster."""

import math
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from raysubset import Config
from raysubset.aggregation import Aggregation, RunningMean
from raysubset.data import FullSet, load_full_set
from raysubset.models import build_model, copied, num_parameters
from raysubset.planning import make_plan
from raysubset.report import sections
from raysubset.run_directory import (
    RunDirectory,
    aggregate_weights_path,
    checkpoint_path,
    minimum_folder,
    minimum_path,
    outputs_path,
    statistics_path,
    weights_path,
)
from raysubset.run_directory.ledger import Ledger
from raysubset.subsets import overdetermination_ratio
from raysubset.tasks import Spec
from raysubset.training import Cost, Measure, Progress, Weights, evaluate
from raysubset.training.optimizers import make_optimizer
from raysubset.work import (
    AggregatePiece,
    Minimizer,
    Piece,
    Report,
    TestPiece,
    cut_subsets,
    leave_aggregate,
    leave_test,
    perturbed,
)
from raysubset.work.networks import Networks
from tests.test_report import a_record
from tests.tiny import between_instructions, same_bits, stored_weights

CONFIG = Config().with_overrides({"subsets.num": 2, "subsets.size": 120, "minimize.epochs": 2.0, "model.norm": "group"})


@pytest.fixture(scope="module")
def full_set() -> FullSet:
    return load_full_set(CONFIG.data)


@pytest.fixture(scope="module")
def start(full_set: FullSet) -> Weights:
    return build_model(CONFIG.model, full_set.spec, seed=1).state_dict()


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_a_minimizer_whose_device_is_missing_has_no_work_to_stop_for(
    full_set: FullSet, start: Weights, directory: RunDirectory
) -> None:
    without = Minimizer(lambda: full_set, num_gpus=1, node="there")
    with pytest.raises(torch.AcceleratorError, match=r"torch .* sees none"):
        without.minimize([piece(directory, 0)], start, attempts=[0], waited_s=0.0)
    assert not without.is_busy  # else a signal would wait for a step


@pytest.mark.parametrize("measures", [("validation",), ("training", "validation")])
def test_a_stage_of_ray_train_is_measured_on_what_its_piece_names(
    full_set: FullSet, start: Weights, directory: RunDirectory, measures: tuple[Measure, ...]
) -> None:
    options: dict[str, Any] = {"epochs": 1.0, "by_train": True, "measures": measures}
    one = Piece(CONFIG, directory, "conventional", start_id="start", **options)
    (record,) = minimizer(full_set).minimize([one], start, attempts=[0], waited_s=0.0)
    assert isinstance(record, dict)
    assert (record["training"] is not None) == ("training" in measures)
    num, num_validation, (work,) = len(full_set.train), len(full_set.validation), Ledger(directory).read()
    assert work.cost.num_forward == num + 2 * num_validation + num * ("training" in measures)  # after its epoch too


@pytest.mark.timeout(60)
def test_a_clock_that_is_set_back_meanwhile_makes_no_duration_negative(
    full_set: FullSet, start: Weights, directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([7200.0, *[0.0] * 100])
    monkeypatch.setattr("raysubset.work.minimizing.time.time", lambda: next(now))
    piece, minimizer = Piece(CONFIG, directory, "subsets", 0), Minimizer(lambda: full_set, num_gpus=0, node="here")
    assert minimizer.minimize([piece], start, attempts=[0], waited_s=0.0)[0] is not None
    (work,) = Ledger(directory).read()
    assert 0 < work.cost.device_s <= work.wall_s < 60


def test_a_second_notice_while_the_first_is_heeded_holds_nothing_up_and_each_is_kept(
    full_set: FullSet, start: Weights, directory: RunDirectory
) -> None:
    stopped, until = minimizer(full_set), time.process_time() + 0.3
    before = signal.signal(signal.SIGVTALRM, lambda *_: stopped.request_stop(preempted=True))
    signal.setitimer(signal.ITIMER_VIRTUAL, 1e-5, 1e-5)
    try:
        while time.process_time() < until:
            stopped.request_stop()
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    one = piece(directory, 0)
    assert stopped.minimize([one], start, attempts=[0], waited_s=0.0) == [None]
    assert [work.outcome for work in Ledger(directory).read()] == ["preempted"]


def test_a_report_is_of_one_step_whatever_training_does_meanwhile() -> None:
    """A step takes a second and passes as many examples as steps were made, so that no two steps have the same pace."""
    progress = Progress(100, 10)

    def step() -> None:
        progress.step += 1
        progress.cost += Cost(progress.step, progress.step, 1, 1.0)

    step()
    reports = between_instructions(lambda: Report.of(progress), Report.of.__func__, step)
    assert len(reports) > 10
    assert all(report.examples_per_s == report.cost.num_forward / report.cost.device_s for report in reports)


def test_several_pieces_at_once_leave_minima_of_their_own(
    full_set: FullSet, start: Weights, directory: RunDirectory
) -> None:
    pieces = [piece(directory, subset) for subset in range(2)]
    records = minimizer(full_set).minimize(pieces, start, attempts=[0, 0], waited_s=0.0)
    assert [directory.read_json(minimum_path(one.folder)) for one in pieces] == records
    first, second = (stored_weights(directory, weights_path(one.folder)) for one in pieces)
    assert not same_bits(first, second)


class Counting(nn.Module):
    """A network whose outputs depend on how often it was called, of which its state dict knows nothing."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.linear, self.drop, self.num_calls = nn.Linear(64, spec.outputs[0]), nn.Dropout(0.5), 0

    def forward(self, images: Tensor) -> Tensor:
        self.num_calls += 1
        return self.linear(self.drop(images.flatten(1))) / self.num_calls


class Locked(Counting):
    """One that cannot be copied."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.lock = threading.Lock()


WINDOW = {"minimize.skipping.window": 0.5, "minimize.batch_size": 20}


@pytest.mark.parametrize(
    "overrides",
    [
        {"model.norm": "batch", "minimize.skipping.kind": "wus", "minimize.skipping.threshold": 0.9, **WINDOW},
        {"model.name": "tests.test_work:Counting"},
        {"model.name": "tests.test_work:Locked"},
    ],
    ids=["ours, weights frozen at the end", "a user's with a state of its own", "that cannot be copied"],
)
def test_a_second_piece_of_a_process_leaves_what_a_fresh_process_would(
    full_set: FullSet, tmp_path: Path, overrides: dict[str, Any]
) -> None:
    norm = {"model.norm": CONFIG.model.norm if "model.name" not in overrides else Config().model.norm}
    config = CONFIG.with_overrides(norm | overrides)
    start = build_model(config.model, full_set.spec, seed=1).state_dict()
    left, several = [], minimizer(full_set)
    for name, doer in (("fresh", None), ("kept", several)):
        run = RunDirectory(str(tmp_path), name)
        members = [Piece(config, run, "subsets", subset_id=subset, start_id="start") for subset in range(2)]
        for member in members:
            (doer or minimizer(full_set)).minimize([member], start, attempts=[0], waited_s=0.0)
        networks = doer and doer.networks
        piece = AggregatePiece(config, run, tuple(members))
        _, record = leave_aggregate(full_set, 0, piece, start, node="there", networks=networks)
        files = [weights_path(members[1].folder), outputs_path(members[1].folder), aggregate_weights_path(0)]
        left.append((*(stored_weights(run, file) for file in files), record["aggregation"]["validation"]))
    (*fresh, metrics), (*kept, other_metrics) = left
    assert all(same_bits(one, other) for one, other in zip(fresh, kept, strict=True))
    assert metrics == other_metrics


def test_a_network_that_is_used_again_has_the_layout_of_a_new_one(full_set: FullSet, directory: RunDirectory) -> None:
    config = CONFIG.with_overrides({"model.name": "cnn", "minimize.optimizer": "lbfgs", "minimize.epochs": 2.0})
    start, doer = build_model(config.model, full_set.spec, seed=1).state_dict(), minimizer(full_set)
    piece = Piece(config, directory, "subsets", subset_id=0, start_id="start")
    layouts = []
    for networks in (doer.networks, Networks()):
        doer.minimize([piece], start, attempts=[0], waited_s=0.0)  # leaves the default layout
        model = networks.placed(config, full_set, start, torch.device("cpu"))
        layouts.append([parameter.stride() for parameter in model.parameters()])
    assert layouts[0] == layouts[1]


MASKED = """
from torch import nn
def network(spec):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    network[1].weight.register_hook(lambda gradient: 0 * gradient)
    return network
"""
SCALED = """
from torch import nn, ones
class Scaled(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 10))
        self.scale = nn.Parameter(ones(10))
        self[1].register_forward_hook(lambda module, inputs, outputs: outputs * self.scale)
def network(spec):
    return Scaled()
"""


@pytest.mark.parametrize(
    ("module", "code", "without_gradient"), [("masked_nets", MASKED, ["1.weight"]), ("scaled_nets", SCALED, [])]
)
def test_a_network_with_hooks_that_a_copy_would_lose_is_built_anew(
    module, code, without_gradient, full_set, tmp_path, monkeypatch
):
    (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    config = CONFIG.with_overrides({"model.name": f"{module}:network", "model.norm": "batch"})
    start, networks = build_model(config.model, full_set.spec).state_dict(), Networks()
    for _ in range(2):
        model = networks.placed(config, full_set, start, torch.device("cpu"))
        model(torch.ones(1, 1, 8, 8)).sum().backward()
        lacking = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert lacking == without_gradient


def test_parameters_keep_the_attributes_by_which_a_users_optimizer_knows_them(full_set, tmp_path, monkeypatch):
    (tmp_path / "marked_nets.py").write_text(
        "from torch import nn\n"
        "from torch.optim import SGD\n"
        "def marked(spec):\n"
        "    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
        "    network[1].weight.is_slow = True\n"
        "    return network\n"
        "def make(parameters, recipe):\n"
        "    return SGD([{'params': [p], 'lr': 0.01 if hasattr(p, 'is_slow') else 0.1} for p in parameters])\n"
    )
    monkeypatch.chdir(tmp_path)
    names = {"model.name": "marked_nets:marked", "minimize.optimizer": "marked_nets:make", "model.norm": "batch"}
    config = CONFIG.with_overrides(names)
    start, networks = build_model(config.model, full_set.spec).state_dict(), Networks()
    for _ in range(2):
        model = copied(networks.placed(config, full_set, start, torch.device("cpu")))
        assert [group["lr"] for group in make_optimizer(model, config.minimize).param_groups] == [0.01, 0.1]


def one_round(config: Config, full_set: FullSet, directory: RunDirectory) -> tuple[Aggregation, float]:
    """Do all work of a run of one round without trunk and fine-tuning; its aggregate, and its passes."""
    plan, start = make_plan(config, full_set), build_model(config.model, full_set.spec, seed=1).state_dict()
    doer, options = minimizer(full_set), {"start_id": "start", "statistics": plan.statistics}
    members = tuple(Piece(config, directory, "subsets", subset_id=one.id, **options) for one in plan.subsets)
    for member in members:
        doer.minimize([member], start, attempts=[0], waited_s=0.0)
    round = AggregatePiece(config, directory, members)
    made, _ = leave_aggregate(full_set, 0, round, start, node="there")
    assert isinstance(made, Aggregation)
    leave_test(full_set, 0, TestPiece(config, round.output, "test", is_final=True), node="there")
    works = Ledger(directory).read()
    return made, sum(work.cost.passes(len(full_set.train), plan.forward_share) for work in works)


@pytest.mark.parametrize(("limit_s", "of_minimum", "of_aggregate"), [(math.inf, 1, 2), (-1.0, 4, 3)])
def test_short_work_waits_for_the_disk_with_its_record_alone(
    full_set: FullSet,
    directory: RunDirectory,
    start: Weights,
    monkeypatch: pytest.MonkeyPatch,
    limit_s: float,
    of_minimum: int,
    of_aggregate: int,
) -> None:
    config = CONFIG.with_overrides({"minimize.epochs": 1.0})  # without checkpoints
    members = tuple(Piece(config, directory, "subsets", subset_id=subset, start_id="start") for subset in range(2))
    for module in ("work.minimizing", "run_directory.ledger"):
        monkeypatch.setattr(f"raysubset.{module}.WRITE_BACK_S", limit_s)
    synced = list[int]()
    monkeypatch.setattr(os, "fsync", synced.append)
    for number, member in enumerate(members, start=1):
        minimizer(full_set).minimize([member], start, attempts=[0], waited_s=0.0)
        assert len(synced) == number * of_minimum
    leave_aggregate(full_set, 0, AggregatePiece(config, directory, members), start, node="there", attempt=3)
    assert len(synced) == 2 * of_minimum + of_aggregate
    assert [work.attempt for work in Ledger(directory).read() if work.stage == "aggregation"] == [3]


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
    for work in Ledger(directory).read():  # by one process, so that no second counts twice
        assert work.cost.device_s <= work.wall_s + 0.02
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
    members, mean = tuple(piece(directory, subset) for subset in range(2)), RunningMean()
    for one in members:
        minimizer(full_set).minimize([one], start, attempts=[0], waited_s=0.0)
        mean.add(stored_weights(directory, weights_path(one.folder)))
    round = AggregatePiece(CONFIG, directory, members, lists_minima=True)
    made, record = leave_aggregate(full_set, 0, round, start, node="there")
    ratio = overdetermination_ratio(120, 10, num_parameters(build_model(CONFIG.model, full_set.spec)))
    wanted = [directory.read_json(minimum_path(one.folder)) | {"overdetermination_ratio": ratio} for one in members]
    assert record["minima"] == wanted
    assert round.record() == directory.read_json(round.output.record_path)
    assert same_bits(stored_weights(directory, aggregate_weights_path(0)), mean.weights())
    final, test = (TestPiece(CONFIG, round.output, "test", is_final=is_final) for is_final in (True, False))
    tested = leave_test(full_set, 0, final, made.aggregate.weights, node="there")
    assert leave_test(full_set, 0, test, node="there") == test.record() == tested["metrics"]
    model = build_model(CONFIG.model, full_set.spec)
    model.load_state_dict(made.aggregate.weights)
    assert tested["metrics"].items() >= evaluate(model, full_set.examples("test"), CONFIG.minimize).sums.items()
    assert all(directory.exists(path) for path in tested["files"])
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
    trunk = Piece(CONFIG, RunDirectory(str(tmp_path), "another"), "trunk").output
    files = {trunk.weights_path: trunk.directory.write_weights(trunk.weights_path, start)}
    trunk.directory.write_json(trunk.record_path, first | {"files": files})
    one = piece(elsewhere, 1, start=trunk)
    minimizer(full_set).minimize([one], None, attempts=[0], waited_s=0.0)
    assert same_bits(*(stored_weights(run, weights_path(one.folder)) for run in (directory, elsewhere)))
    assert not same_bits(perturbed(CONFIG, full_set, start), start)
    changed = piece(RunDirectory(str(tmp_path), "changed"), 1, start=trunk, is_perturbed=True)
    assert same_bits(changed.start_weights(full_set) or {}, perturbed(CONFIG, full_set, start))


@pytest.mark.parametrize(
    "changes",
    [{"validate_every": 1}, {"patience": 50}, {"averaging.kind": "pswa", "averaging.period": 0.2}],
)
def test_a_conventional_run_is_as_long_as_makes_its_cost_equal(
    changes: dict[str, Any], full_set: FullSet, tmp_path: Path
) -> None:
    overrides = {f"minimize.{name}": value for name, value in changes.items()}
    config = Config().with_overrides(
        {"trunk.epochs": 0.0, "fine_tuning.epochs": 0.0, "minimize.epochs": 4.0} | overrides
    )
    plan, passes = make_plan(config, full_set), list[float]()
    conventional = config.with_overrides({"method": "conventional"})
    epochs = make_plan(conventional, full_set).passes
    members, whole = RunDirectory(str(tmp_path), "members"), RunDirectory(str(tmp_path), "whole")
    alone = plan.drawing(conventional, whole).conventional(epochs, num_workers=1)
    for directory, legs in ((members, [*plan.drawing(config, members).legs()]), (whole, [alone])):
        for leg in legs:
            if isinstance(leg.piece, AggregatePiece):
                leave_aggregate(full_set, 0.0, leg.piece, node="there")
            else:
                minimizer(full_set).minimize([leg.piece], None, attempts=[0], waited_s=0.0)
        cost = sum((work.cost for work in Ledger(directory).read()), Cost())
        passes.append(cost.passes(len(full_set.train), plan.forward_share))
    assert passes[1] == pytest.approx(passes[0], rel=0.02)


@pytest.mark.parametrize(("column", "target"), [("row", "label"), ("label", "kind"), ("inputs", "kind")])
def test_subsets_are_not_cut_by_a_column_whose_name_the_training_table_has_for_something_else(
    column: str, target: str, tmp_path: Path
) -> None:
    names = ("row", "label", "inputs", "kind", "site")
    table = pa.table({name: [number // 5 % (place + 2) for number in range(60)] for place, name in enumerate(names)})
    pq.write_table(table, tmp_path / "table.parquet")
    overrides = {"data.name": str(tmp_path / "table.parquet"), "data.target": target, "subsets.scheme": "column"}
    config = Config().with_overrides(overrides | {"subsets.column": column})
    own = load_full_set(*config.learned)
    with pytest.raises(ValueError, match=f"subsets.column = '{column}' is a name that raysubset's own table .* rename"):
        cut_subsets(config, own, 0)
    for name in {"site", target}:
        subsets = cut_subsets(config.with_overrides({"subsets.column": name}), own, 0)
        rows = own.train.table.column("row").to_numpy()
        assert [len({*table[name].take(rows[subset.indices]).to_pylist()}) for subset in subsets] == [1] * len(subsets)
