"""Several nodes of one machine, in a process of its own: subsets sized by their speed, and one that is drained."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

SCRIPT = """
import json, time
from raysubset import Config, run
from raysubset.cluster import ray
from raysubset.cluster.private_ray import utils
from raysubset.events import Progress, Retry, Start
from raysubset.pipeline import node_speeds
from raysubset.run_directory.ledger import Ledger
from raysubset.run_directory import DECISIONS_PATH, RunDirectory
from raysubset.subset_actors import pool
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from tests.forked_workers import PATHS
from tests.slow_steps import slow_down, speed_up

pool.POLL_S = pool.WAIT_S = 0.05

def measured_shortly(*arguments):  # in a process that has the module as it was
    node_speeds.MEASURE_S = 0.5
    return node_speeds.measure_speed(*arguments)

node_speeds.measure_speed = measured_shortly

def kind(name):
    return PATHS | dict(num_cpus=1, labels={"ray.io/accelerator-type": name}, include_log_monitor=False)

utils.get_dashboard_dependency_error = lambda: ImportError("agents without web servers")
cluster = Cluster(initialize_head=True, head_node_args=kind("SLOW") | dict(include_dashboard=False, no_monitor=True))
cluster.add_node(**kind("FAST"))
ray.init(address=cluster.address, log_to_driver=False)
kind_of_node = {n["NodeID"]: n["Labels"]["ray.io/accelerator-type"] for n in ray.nodes()}
starts, notes = [], []

class Interrupted(Exception):
    pass

def interrupt_in_the_second_round(event):
    notes.append(event.text)
    if isinstance(event, Start) and event.attempt.stage == "subsets":
        attempt = event.attempt
        starts.append([attempt.round, attempt.subset, kind_of_node[attempt.node]])
        if len(starts) == 2:
            speed_up("", "subsets")
        if attempt.round == 1 and starts[-2][0] == 1:
            raise Interrupted

def told(config, **more):
    directory = RunDirectory(config.storage_path, config.name)
    sizes = [[round["num_examples"] for round in made["minima"]] for made in more.pop("rounds", [])]
    print("TOLD", json.dumps({"decisions": directory.read_json(DECISIONS_PATH), "sizes": sizes, **more}))

config = Config(name="weighted", storage_path="runs").with_overrides({
    "trunk.epochs": 0.0, "fine_tuning.epochs": 0.0, "subsets.num": 2, "minimize.epochs": 1.0, "rounds.num": 2,
    "subsets.shares": "FAST=3,SLOW=1", "actors.checkpoint_epochs": 1e6, "actors.on_step": "tests.slow_steps:listen"})
slow_down("", "subsets", from_step=1)  # until both nodes have an actor
try:
    run(config, on_event=interrupt_in_the_second_round)
except Interrupted:
    told(config, starts=starts, words=[note for note in notes if note.startswith("sizes are by speed")])
cluster.add_node(**kind("FAST"))
report = run(config)
told(config, rounds=report.record["stages"]["rounds"])

head, drained = ray.get_runtime_context().get_node_id(), []

def drain_a_node(event):
    if isinstance(event, Progress) and not drained and event.attempt.node != head and event.epoch >= 1:
        drained.append(event.attempt.subset)
        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        until = time.time_ns() // 10**6 + 100_000
        is_accepted, error = GcsClient(address=cluster.address).drain_node(event.attempt.node, reason, "test", until)
        assert is_accepted, error
    if isinstance(event, Retry) and "with a checkpoint written" in event.text:
        speed_up("", "subsets")

config = config.with_overrides({
    "name": "measured", "subsets.num": 3, "subsets.shares": "measured", "minimize.epochs": 4.0, "rounds.num": 1,
    "actors.max_attempts": 1})
slow_down("", "subsets", from_step=8)
report = run(config, on_event=drain_a_node)
works = Ledger(RunDirectory.at(report.uri)).read()
(row,) = [row for row in report.record["cost"]["stages"] if row["stage"] == "measuring"]
told(config, rounds=report.record["stages"]["rounds"], passes=row["passes"],
     works=[[work.outcome, work.device, work.cost.num_backward] for work in works if work.stage == "measuring"],
     num_nodes=len({work.node for work in works}), drained=drained,
     moved=[[work.outcome, work.cost.num_steps] for work in works if work.subset in drained])
ray.shutdown()
cluster.shutdown()
"""

NUM_TRAIN = 1294  # of digits

ROOT = Path(__file__).parents[2]


@pytest.mark.usefixtures("ray_cluster")  # whose warm process workers are forked from
def test_subsets_are_sized_for_the_nodes_that_take_them_and_leave_one_that_drains_with_a_checkpoint(
    tmp_path: Path,
) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=550, check=False
    )
    lines = [line.removeprefix("TOLD ") for line in done.stdout.splitlines() if line.startswith("TOLD ")]
    assert len(lines) == 3, done.stdout[-2000:] + done.stderr[-2000:]
    begun, resumed, measured = map(json.loads, lines)

    assert begun["decisions"]["slots"] == [{"kind": "FAST", "speed": 3.0}, {"kind": "SLOW", "speed": 1.0}]
    assert begun["decisions"]["shares"] == [3.0, 1.0]
    # in the second round both actors are up and each takes what was sized for its node, whoever is asked first
    assert sorted(begun["starts"])[-2:] == [[1, 0, "FAST"], [1, 1, "SLOW"]]
    assert begun["words"] == [
        "sizes are by speed: for FAST (speed 3) 1 × 971 examples, for SLOW (speed 1) 1 × 323 examples"
    ]
    assert resumed["decisions"] == begun["decisions"]  # though there is a third node now
    assert resumed["sizes"] == [[971, 323]] * 2

    kinds = {slot["kind"]: slot["speed"] for slot in measured["decisions"]["slots"]}
    assert kinds.keys() == {"FAST (1 CPU)", "SLOW (1 CPU)"}  # each measured once, though two nodes are FAST
    assert 1 / 10 < kinds["FAST (1 CPU)"] / kinds["SLOW (1 CPU)"] < 10  # one machine, busy now and then
    speeds = [slot["speed"] for slot in measured["decisions"]["slots"]]
    assert speeds == sorted([kinds["FAST (1 CPU)"]] * 2 + [kinds["SLOW (1 CPU)"]], reverse=True)
    (sizes,) = measured["sizes"]
    assert sum(sizes) == NUM_TRAIN // 3 * 3
    assert sizes == pytest.approx([speed / sum(speeds) * sum(sizes) for speed in speeds], abs=1)
    assert sorted(work[:2] for work in measured["works"]) == [["done", "FAST"], ["done", "SLOW"]]
    assert measured["num_nodes"] == 1  # of one machine, by one address
    assert measured["passes"] * NUM_TRAIN == pytest.approx(sum(num for *_, num in measured["works"]))

    (subset,) = measured["drained"]
    (left, left_steps), (ended, ended_steps) = measured["moved"]
    assert (left, ended) == ("preempted", "done")  # which costs no attempt, though but one is allowed
    assert left_steps + ended_steps == 4 * math.ceil(sizes[subset] / 64)  # nothing was done twice
