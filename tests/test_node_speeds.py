"""Slots, shares and speeds: by hand; measured where the reference is the clock of the test itself."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from raysubset.cluster import NodeType
from raysubset.config import Config, SubsetsConfig
from raysubset.data import load_full_set
from raysubset.pipeline import node_speeds
from raysubset.pipeline.node_speeds import (
    Slot,
    decide_slots,
    fastest_nodes,
    in_words,
    kind_of,
    measure_speed,
    measured_slots,
    shares,
    slot_of,
    speed_of_node,
    weighted_slots,
)
from raysubset.planning import make_plan
from raysubset.run_directory import RunDirectory
from raysubset.subset_actors import Pack
from raysubset.subset_actors.packs import Backlog, in_packs
from raysubset.subsets import sizes_by_share
from raysubset.work import Piece, Run

REQUEST = {"CPU": 1, "GPU": 0.5}


def nodes(accelerator: str, num_gpus: int, num_alive: int = 1, **others: Any) -> NodeType:
    ids = tuple(f"{accelerator}-{i}" for i in range(num_alive))
    fields = {"num_startable": 0, "node_ids": ids} | others
    return NodeType("alive", {"CPU": 8, "GPU": num_gpus}, num_alive, accelerator=accelerator, **fields)


@pytest.fixture
def one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def test_weights_by_type_give_the_fastest_slots_first_and_one_to_other_types():
    types = [nodes("T4", 1), nodes("A100", 1), nodes("L4", 1)]
    slots = weighted_slots(types, REQUEST, {"A100": 3.5, "T4": 0.5}, most=100)
    assert slots == [Slot("A100", 3.5)] * 2 + [Slot("L4", 1.0)] * 2 + [Slot("T4", 0.5)] * 2
    assert weighted_slots(types, REQUEST, {"A100": 3.5}, most=3) == [Slot("A100", 3.5)] * 2 + [Slot("T4", 1.0)]


def test_nodes_that_can_be_started_count_by_type_or_by_the_autoscalers_name():
    startable = NodeType("gpu.spot", {"CPU": 8, "GPU": 1}, 0, 1_000_000, "GPU", "gpu.spot")
    slots = weighted_slots([nodes("T4", 1), startable], REQUEST, {"gpu.spot": 4.0}, most=3)
    assert slots == [Slot("gpu.spot", 4.0)] * 3
    assert weighted_slots([startable], REQUEST, {"GPU": 2.0}, most=1) == [Slot("GPU", 2.0)]


def test_a_measurement_that_fails_is_closed_in_the_ledger(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def call_on_cluster(*arguments: Any, **options: Any) -> None:
        raise TimeoutError("the cluster is busy")

    monkeypatch.setattr(node_speeds, "call_on_cluster", call_on_cluster)
    monkeypatch.setattr(node_speeds, "node_types", lambda: [nodes("T4", 1)])
    monkeypatch.setattr(node_speeds, "address_of", lambda node_id: "10.0.0.1")
    config, full_set = Config().with_overrides({"subsets.shares": "measured"}), cast(Any, None)
    run = Run(config, RunDirectory(str(tmp_path), "run"), full_set, [], lambda event: None)
    with pytest.raises(TimeoutError):
        decide_slots(run, np.arange(4), num_gpus=0.5, num_subsets=2)
    (work,) = run.ledger.read()
    assert (work.stage, work.outcome) == ("measuring", "failed")
    assert (work.error or "").startswith("TimeoutError: the cluster is busy; see test_node_speeds.py, line ")


def test_nodes_that_hold_no_actor_are_no_slots():
    assert weighted_slots([nodes("CPU", 0), nodes("T4", 1)], REQUEST, {"T4": 2.0}, most=9) == [Slot("T4", 2.0)] * 2


def test_weights_that_fit_no_node_are_refused_with_what_there_is():
    with pytest.raises(ValueError, match=r"weights to T5, but the nodes .* of none of these types; the cluster has T4"):
        weighted_slots([nodes("T4", 1)], REQUEST, {"T5": 2.0}, most=9)
    with pytest.raises(ValueError, match="no node is up or known to be startable that holds 1 CPU"):
        weighted_slots([], REQUEST, {"T5": 2.0}, most=9)


def test_each_kind_of_node_is_measured_once():
    measured: list[str] = []

    def measure(type: NodeType) -> float:
        measured.append(type.accelerator)
        return {"T4": 100.0, "A100": 300.0}[type.accelerator]

    types = [nodes("T4", 1, num_alive=2), nodes("A100", 1)]
    slots = measured_slots(types, REQUEST, measure, most=100)
    assert measured == ["T4", "A100"]
    assert [slot.speed for slot in slots] == [300, 300, 100, 100, 100, 100]
    assert slots[0].kind == "A100 (8 CPU + 1 GPU)"


def test_a_promise_of_nodes_cannot_be_measured_and_the_way_out_is_told():
    startable = NodeType("gpu", {"CPU": 8, "GPU": 1}, 0, 4)
    with pytest.raises(ValueError, match=r"no node is up that holds 1 CPU \+ 0.5 GPU: give weights by type"):
        measured_slots([startable], REQUEST, lambda type: 1.0, most=4)


def test_kinds_differ_by_accelerator_by_the_autoscalers_type_and_by_resources():
    group = NodeType("alive", {"CPU": 8}, 1, 0, group="big")
    kinds = [nodes("CPU", 0), nodes("T4", 0), group, NodeType("alive", {"CPU": 4}, 1, 0)]
    assert len({kind_of(type) for type in kinds}) == 4
    assert kind_of(group) == "CPU of big (8 CPU)"


def test_all_slots_finish_together_also_where_some_have_more_turns():
    slots = [Slot("A", 3.0), Slot("B", 2.0), Slot("C", 1.0)]
    for num in range(1, 12):
        sizes = shares(slots, num)
        used = slots[:num]
        times = [
            sum(size for subset, size in enumerate(sizes) if slot_of(slots, subset) is slot) / slot.speed
            for slot in used
        ]
        assert times == pytest.approx([1.0] * len(used))
    assert shares(slots, 4) == [1.5, 2.0, 1.0, 1.5]


def test_the_words_name_kinds_speeds_and_sizes():
    slots = [Slot("FAST", 3.0), Slot("SLOW", 1.0)]
    assert in_words(slots, [485, 161, 486]) == (
        "sizes are by speed: for FAST (speed 3) 2 × 485 to 486 examples, for SLOW (speed 1) 1 × 161 examples"
    )


def test_a_nodes_speed_is_its_types_weight_or_its_kinds_measurement(monkeypatch: pytest.MonkeyPatch):
    types = [nodes("T4", 1), nodes("A100", 1)]
    monkeypatch.setattr(node_speeds, "node_types", lambda: types)
    weighted, measured = SubsetsConfig(shares="A100=3,T4=2"), SubsetsConfig(shares="measured")
    slots = [Slot(kind_of(types[1]), 70.0)]
    assert speed_of_node(weighted, [], "A100-0") == 3.0
    assert speed_of_node(weighted, [], "gone") is None
    assert speed_of_node(measured, slots, "A100-0") == 70.0
    assert speed_of_node(measured, slots, "T4-0") is None  # came up after the measurement
    assert speed_of_node(SubsetsConfig(shares="A100=3"), [], "T4-0") == 1.0


def test_actors_are_asked_for_on_the_fastest_nodes_as_often_as_each_has_room(monkeypatch: pytest.MonkeyPatch):
    startable = NodeType("gpu", {"CPU": 8, "GPU": 1}, 0, 4, "H100", "gpu")
    types = [nodes("T4", 1, num_alive=2), nodes("CPU", 0), nodes("A100", 1), startable]
    monkeypatch.setattr(node_speeds, "node_types", lambda: types)
    config = Config().with_overrides({"subsets.shares": "A100=3,T4=2,H100=9"})
    places = ["A100-0", "A100-0", "T4-0", "T4-0", "T4-1", "T4-1"]
    assert fastest_nodes(config, [Slot("any", 1.0)] * 9, num_gpus=0.5) == places
    assert fastest_nodes(config, [Slot("any", 1.0)] * 3, num_gpus=0.5) == places[:3]
    measured = config.with_overrides({"subsets.shares": "measured"})
    slots = [Slot(kind_of(types[0]), 70.0)] * 3  # the A100 came up after the measurement
    assert fastest_nodes(measured, slots, num_gpus=1.0) == ["T4-0", "T4-1"]


def test_a_plan_by_shares_has_the_same_examples_in_unequal_parts():
    config = Config().with_overrides({"subsets.num": 4, "subsets.shares": "A=3,B=1"})
    full_set = load_full_set(config.data)
    plan = make_plan(config, full_set, shares=[3, 1, 3, 1])
    assert [len(subset.indices) for subset in plan.subsets] == sizes_by_share([3, 1, 3, 1], 4 * 323)
    assert plan.passes == pytest.approx(make_plan(config, full_set).passes)
    assert any("Q of 4 subsets of 161 to 485 examples" in note.text for note in plan.advice)


@pytest.mark.usefixtures("one_thread")
def test_speed_is_measured_by_training_for_a_while_and_its_work_is_counted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(node_speeds, "MEASURE_S", 0.3)
    config = Config().with_overrides({"minimize.epochs": 1.0, "minimize.target_loss": 1e9})  # over at once in a run
    full_set = load_full_set(config.data)
    speed = measure_speed(full_set, config, make_plan(config, full_set).subsets[0].indices, 0.0)
    assert speed.cost.device_s > 0.3
    num, first = speed.cost.num_backward, config.minimize.batch_size  # the first step, which sets up, is not timed
    assert (num - first) / speed.cost.device_s < speed.examples_per_s < num / 0.3
    assert speed.card_bytes is None


@pytest.mark.usefixtures("one_thread")
def test_speed_of_an_optimizer_that_finds_its_minimum_first_is_measured_too():
    config = Config().with_overrides({"minimize.optimizer": "lbfgs", "minimize.learning_rate": 1e-9})
    full_set = load_full_set(config.data)
    speed = measure_speed(full_set, config, make_plan(config, full_set).subsets[0].indices[:50], 0.0)
    assert speed.examples_per_s >= speed.cost.num_backward / speed.cost.device_s


def piece(subset_id: int, **options: Any) -> Piece:
    return Piece(Config(), RunDirectory("storage", "run"), "subsets", subset_id=subset_id, **options)


def test_a_node_takes_first_what_was_sized_for_its_speed_and_then_whatever_there_is():
    pieces = [piece(i, node_speed=speed) for i, speed in enumerate([3.0, 2.0, 1.0, 3.0, 1.0])]
    backlog = Backlog(in_packs(pieces, 1))

    def take(speed: float | None) -> int | None:
        due = backlog.take(speed)
        return due[0].pieces[0].ledger_key[2] if due else None

    assert [take(1.0), take(1.9), take(1.0), take(1.0), take(3.5), take(1.0)] == [2, 1, 4, 0, 3, None]


def test_pieces_are_given_out_in_their_order_where_sizes_are_equal():
    backlog = Backlog(in_packs([piece(i) for i in range(3)], 1))
    backlog.put_back(Pack((piece(9),)), in_s=60)
    taken = [backlog.take(speed) for speed in (None, 2.0, None, None)]
    assert [due[0].pieces[0].ledger_key[2] if due else None for due in taken] == [0, 1, 2, None]
