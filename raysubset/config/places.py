"""Where it runs: actors and cluster."""

from dataclasses import dataclass

from raysubset.config.trees import need


@dataclass(frozen=True, kw_only=True)
class ActorsConfig:
    num_cpus: int = 1
    """CPUs, and torch threads, of a subset actor or Ray Train worker. Part of the result: sums depend on threads."""
    num_gpus: float | None = None
    """GPUs of each; fractions share a card. By default 1 where the cluster has or can start GPUs, else 0 (recorded)."""
    max_num: int | None = None
    """Most actors at a time; by default one a subset, as far as the cluster has room."""
    max_attempts: int = 4
    """Attempts at work whose process or node dies; at a subset, those in a row that leave no further checkpoint."""
    quorum: int | None = None
    """Go on with this many minima when other subsets have failed for good; by default every subset is needed."""
    checkpoint_epochs: float = 1.0
    """A subset's checkpoint is written every so many epochs …"""
    checkpoint_s: float = 60.0
    """… and whenever this many seconds have gone since the last."""

    def __post_init__(self) -> None:
        need(self.num_cpus >= 1, f"actors.num_cpus = {self.num_cpus} must be at least 1")
        gpus = self.num_gpus
        need(
            gpus is None or (gpus >= 0 and (gpus <= 1 or gpus == int(gpus))),
            f"actors.num_gpus = {gpus} must be a fraction up to 1 or a whole number",
        )
        for name in ("max_num", "quorum"):
            value = getattr(self, name)
            need(value is None or value >= 1, f"actors.{name} = {value} must be at least 1")
        need(self.max_attempts >= 1, f"actors.max_attempts = {self.max_attempts} must be at least 1")
        need(
            self.checkpoint_epochs > 0 and self.checkpoint_s > 0,
            "actors.checkpoint_epochs and actors.checkpoint_s must be positive",
        )


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    address: str | None = None
    """Ray cluster to connect to; by default the one this job was submitted to, else a new one on this machine."""
    num_cpus: int | None = None
    """CPUs of a new local cluster; by default the machine's."""
    num_gpus: int | None = None
    """GPUs of a new local cluster; by default the machine's."""
    wait_timeout_s: float = 1800.0
    """How long to wait for a first node that an autoscaler could still start."""

    def __post_init__(self) -> None:
        local = self.num_cpus is None and self.num_gpus is None
        need(
            self.address is None or local,
            "cluster.num_cpus and cluster.num_gpus are for a new local cluster: leave them out with cluster.address",
        )
        need(self.num_cpus is None or self.num_cpus >= 1, f"cluster.num_cpus = {self.num_cpus} must be at least 1")
