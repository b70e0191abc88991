"""Where it runs: actors and cluster."""

from dataclasses import dataclass
from typing import Annotated

from raysubset.config.trees import check_fields, need
from raysubset.uris import holds_secret


@dataclass(frozen=True, kw_only=True)
class ActorsConfig:
    num_cpus: Annotated[int, "[1, ∞)"] = 1
    """CPUs, and torch threads, of a subset actor or Ray Train worker. Part of the result: sums depend on threads."""
    num_gpus: Annotated[float | None, "[0, 1]"] = None
    """GPUs of each, at most 1; fractions share a card. By default 1 where the cluster has or can start GPUs, else 0
    (recorded)."""
    max_num: Annotated[int | None, "[1, ∞)"] = None
    """Most actors at a time; by default one a subset, as far as the cluster has room."""
    max_attempts: Annotated[int, "[1, ∞)"] = 4
    """Attempts at work whose process or node dies; at a subset, those in a row that leave no further checkpoint."""
    quorum: Annotated[int | None, "[1, ∞)"] = None
    """Go on with this many minima when other subsets have failed for good; by default every subset is needed."""
    checkpoint_epochs: Annotated[float, "(0, ∞)"] = 1.0
    """A subset's checkpoint is written every so many epochs …"""
    checkpoint_s: Annotated[float, "(0, ∞)"] = 60.0
    """… and whenever this many seconds have gone since the last."""
    stall_s: Annotated[float, "(0, ∞)"] = 300.0
    """Work without a step for so long, and for ten times its usual step, is said to stand still. After twice that it is
    killed and tried again, as an attempt. The first steps, which may compile or read, may take four times as long."""

    on_step: str | None = None
    """Told of every step in the actor or Ray Train worker that made it: package.module:function of a
    raysubset.training.Step, for a tracker of your own. What it raises ends the run in a line."""
    profile: Annotated[int, "[0, ∞)"] = 0
    """Steps of each stage that torch's profiler traces, after the first four: of subset 0 in the first round, or of Ray
    Train's first worker. The traces are profiles/STAGE.json.gz in the run directory, for Perfetto. --profile is short
    for it."""

    def __post_init__(self) -> None:
        need(
            self.on_step is None or ":" in self.on_step,
            f"actors.on_step = {self.on_step!r} should be package.module:function",
        )
        check_fields(self, "actors.")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    address: str | None = None
    """Ray cluster to connect to; by default the one this job was submitted to, else a new one on this machine."""
    num_cpus: Annotated[int | None, "[1, ∞)"] = None
    """CPUs of a new local cluster; by default the machine's."""
    num_gpus: Annotated[int | None, "[0, ∞)"] = None
    """GPUs of a new local cluster; by default the machine's."""
    wait_timeout_s: Annotated[float, "[0, 31536000]"] = 1800.0
    """How long to wait for a first node that an autoscaler could still start."""

    def __post_init__(self) -> None:
        need(
            "@" not in str(self.address) and not holds_secret(self.address),
            "cluster.address holds a user or a password, and would be written to config.json: Ray's token comes from "
            "~/.ray/auth_token, RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN",
        )
        check_fields(self, "cluster.")
        local = self.num_cpus is None and self.num_gpus is None
        need(
            self.address is None or local,
            "cluster.num_cpus and cluster.num_gpus are for a new local cluster: leave them out with cluster.address",
        )
