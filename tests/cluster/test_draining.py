"""A node that is drained, as after a spot notice: on two nodes of one machine, in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

SCRIPT = """
import os, subprocess, sys
from raysubset import Config, run
from raysubset.cluster import ray
from raysubset.events import Progress
from raysubset.ledger import Ledger
from raysubset.run_directory import RunDirectory
from raysubset.subset_actors import pool
from ray.cluster_utils import Cluster

pool.POLL_S = pool.WAIT_S = 0.05  # so that progress is heard of in time, on any machine

cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False))
cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, log_to_driver=False)
head = ray.get_runtime_context().get_node_id()
drained = []

def drain_the_other_node(event):
    if isinstance(event, Progress) and not drained and event.attempt.node != head and event.epoch >= 2:
        drained.append(event.attempt.subset)
        command = ["drain-node", "--address", cluster.address, "--node-id", event.attempt.node, "--reason",
                   "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test", "--deadline-remaining-seconds", "100"]
        subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *command], check=True)

config = Config(name="drained", storage_path=sys.argv[1]).with_overrides({
    "trunk.epochs": 0.0, "fine_tuning.epochs": 0.0, "subsets.num": 2, "minimize.epochs": 300.0,
    "actors.max_attempts": 1, "actors.checkpoint_epochs": 1e6})
report = run(config, on_event=drain_the_other_node)
works = [work for work in Ledger(RunDirectory.at(report.uri)).read() if work.subset in drained]
print("OUTCOMES", *[work.outcome for work in works], sum(work.cost.num_steps for work in works))
ray.shutdown()
cluster.shutdown()
"""


def test_a_drained_nodes_subset_moves_with_a_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=170, check=False
    )
    told = [line for line in done.stdout.splitlines() if line.startswith("OUTCOMES")]
    assert told == [f"OUTCOMES preempted done {300 * 11}"], done.stdout[-2000:] + done.stderr[-2000:]
