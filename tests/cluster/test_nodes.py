"""Several nodes of one machine, in a process of its own: subsets sized by their speed, and one that is drained."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

SCRIPT = """
import json, subprocess, sys
from raysubset import Config, run
from raysubset.cluster import ray
from raysubset.events import Progress, Start
from raysubset.ledger import Ledger
from raysubset.run_directory import DECISIONS_PATH, RunDirectory
from raysubset.subset_actors import pool
from ray.cluster_utils import Cluster

pool.POLL_S = pool.WAIT_S = 0.05  # so that progress is heard of in time, on any machine

def kind(name):
    return dict(num_cpus=1, labels={"ray.io/accelerator-type": name})

cluster = Cluster(initialize_head=True, head_node_args=kind("SLOW") | dict(include_dashboard=False))
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
        if attempt.round == 1 and starts[-2][0] == 1:
            raise Interrupted

def told(config, **more):
    directory = RunDirectory(config.storage_path, config.name)
    sizes = [[round["num_examples"] for round in made["minima"]] for made in more.pop("rounds", [])]
    print("TOLD", json.dumps({"decisions": directory.read_json(DECISIONS_PATH), "sizes": sizes, **more}))

config = Config(name="weighted", storage_path=sys.argv[1]).with_overrides({
    "trunk.epochs": 0.0, "fine_tuning.epochs": 0.0, "subsets.num": 2, "minimize.epochs": 40.0, "rounds.num": 2,
    "subsets.shares": "FAST=3,SLOW=1", "actors.checkpoint_epochs": 1e6})
try:
    run(config, on_event=interrupt_in_the_second_round)
except Interrupted:
    told(config, starts=starts, words=[note for note in notes if note.startswith("sizes are by speed")])
cluster.add_node(**kind("FAST"))
report = run(config)
told(config, rounds=report.record["stages"]["rounds"])

config = config.with_overrides({
    "name": "measured", "subsets.num": 3, "subsets.shares": "measured", "minimize.epochs": 1.0, "rounds.num": 1})
report = run(config)
works = [work for work in Ledger(RunDirectory.at(report.uri)).read() if work.stage == "measuring"]
(row,) = [row for row in report.record["cost"]["stages"] if row["stage"] == "measuring"]
told(config, rounds=report.record["stages"]["rounds"], passes=row["passes"],
     works=[[work.outcome, work.device, work.cost.num_backward] for work in works],
     num_nodes=len({work.node for work in Ledger(RunDirectory.at(report.uri)).read()}))

head, drained = ray.get_runtime_context().get_node_id(), []

def drain_the_node(event):
    if isinstance(event, Progress) and not drained and event.attempt.node != head and event.epoch >= 2:
        drained.append(event.attempt.subset)
        command = ["drain-node", "--address", cluster.address, "--node-id", event.attempt.node, "--reason",
                   "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test", "--deadline-remaining-seconds", "100"]
        subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *command], check=True)

config = Config(name="drained", storage_path=sys.argv[1]).with_overrides({
    "trunk.epochs": 0.0, "fine_tuning.epochs": 0.0, "subsets.num": 3, "minimize.epochs": 450.0,
    "actors.max_attempts": 1, "actors.checkpoint_epochs": 1e6})
report = run(config, on_event=drain_the_node)
works = [work for work in Ledger(RunDirectory.at(report.uri)).read() if work.subset in drained]
told(config, works=[[work.outcome, work.cost.num_steps] for work in works])
ray.shutdown()
cluster.shutdown()
"""

NUM_TRAIN = 1294  # of digits


def test_subsets_are_sized_for_the_nodes_that_take_them_and_leave_one_that_drains_with_a_checkpoint(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=550, check=False
    )
    lines = [line.removeprefix("TOLD ") for line in done.stdout.splitlines() if line.startswith("TOLD ")]
    assert len(lines) == 4, done.stdout[-2000:] + done.stderr[-2000:]
    begun, resumed, measured, drained = map(json.loads, lines)

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
    assert 1 / 3 < kinds["FAST (1 CPU)"] / kinds["SLOW (1 CPU)"] < 3  # one machine
    speeds = [slot["speed"] for slot in measured["decisions"]["slots"]]
    assert speeds == sorted([kinds["FAST (1 CPU)"]] * 2 + [kinds["SLOW (1 CPU)"]], reverse=True)
    (sizes,) = measured["sizes"]
    assert sum(sizes) == NUM_TRAIN // 3 * 3
    assert sizes == pytest.approx([speed / sum(speeds) * sum(sizes) for speed in speeds], abs=1)
    assert sorted(work[:2] for work in measured["works"]) == [["done", "FAST"], ["done", "SLOW"]]
    assert measured["num_nodes"] == 1  # of one machine, by one address
    assert measured["passes"] * NUM_TRAIN == pytest.approx(sum(num for *_, num in measured["works"]))

    (left, left_steps), (ended, ended_steps) = drained["works"]
    assert (left, ended) == ("preempted", "done")  # which costs no attempt, though but one is allowed
    assert left_steps + ended_steps == 450 * 7  # nothing was done twice
