"""Settings of where a run takes place and who follows it: actors, cluster and trackers."""

from collections.abc import Iterator
from typing import Annotated, Literal

from raysubset.config.trees import Part
from raysubset.uris import holds_secret


class ActorsConfig(Part, prefix="actors."):
    num_cpus: Annotated[int, "[1, ∞)"] = 1
    """CPUs and torch threads of a subset actor or Ray Train worker. They shape the result: sums depend on threads."""
    num_gpus: Annotated[float | None, "[0, 1]"] = None
    """GPUs of each actor or worker, at most 1; fractions share a card. By default 1 if the cluster has or can start
    GPUs, else 0 (recorded)."""
    max_num: Annotated[int | None, "[1, ∞)"] = None
    """Maximum number of actors at a time; by default one for each subset, if the cluster has room."""
    max_attempts: Annotated[int, "[1, ∞)"] = 4
    """Attempts in a row, without a new checkpoint, at work whose process or node dies."""
    quorum: Annotated[int | None, "[1, ∞)"] = None
    """Continue with this many minima if the other subsets have failed for good; by default every subset is needed."""
    checkpoint_epochs: Annotated[float, "(0, ∞)"] = 1.0
    """Epochs between two checkpoints of a piece of work."""
    checkpoint_s: Annotated[float, "(0, ∞)"] = 60.0
    """A checkpoint is also written when this many seconds have passed since the last. Several workers of Ray Train with
    extrapolation past_local or skipping, who have states of their own, write by checkpoint_epochs alone."""
    stall_s: Annotated[float, "(0, ∞)"] = 300.0
    """Report work as stalled after so many seconds without a step, and ten times its usual step. After twice that it is
    killed and tried again, as an attempt. The first steps, which may compile or read, may take four times as long."""
    on_step: Annotated[str | None, ("package.module:function",)] = None
    """Your own listener, package.module:function: it is called with a raysubset.training.Step after every step, in the
    actor or Ray Train worker. An exception that it raises ends the run with a message."""
    profile: Annotated[int, "[0, ∞)"] = 0
    """Number of steps of each stage that torch's profiler traces, after the first four: of subset 0 in the first round,
    or of Ray Train's first worker. Perfetto shows the traces, profiles/STAGE.json.gz in the run directory. --profile is
    short for it."""


class ClusterConfig(Part, prefix="cluster."):
    address: str | None = None
    """Ray cluster to connect to; by default the one this job was submitted to, else a new one on this machine."""
    num_cpus: Annotated[int | None, "[1, ∞)"] = None
    """CPUs of a new local cluster; by default all of this machine's."""
    num_gpus: Annotated[int | None, "[0, ∞)"] = None
    """GPUs of a new local cluster; by default all of this machine's."""
    wait_timeout_s: Annotated[float, "[0, 31536000]"] = 1800.0
    """Seconds to wait for a first node that an autoscaler could still start."""

    def problems(self) -> Iterator[str]:
        if "@" in str(self.address) or holds_secret(self.address):
            yield (
                "cluster.address holds a user or a password, and would be written to config.json: Ray's token comes "
                "from ~/.ray/auth_token, RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN"
            )
        if self.address and (self.num_cpus is not None or self.num_gpus is not None):
            yield "cluster.num_cpus and num_gpus are for a new local cluster: leave them out with cluster.address"


class TrackingConfig(Part, prefix="tracking."):
    to: Literal["none", "mlflow", "wandb", "both"] = "none"
    """Experiment trackers that follow the run, beside the TensorBoard events at its end. wandb works offline if it
    finds no API key; WANDB_MODE overrides this."""
    uri: str | None = None
    """MLflow's server or store; by default MLFLOW_TRACKING_URI, else mlflow's own. For wandb set WANDB_BASE_URL."""
    project: str = "raysubset"
    """MLflow's experiment, wandb's project."""
    group: str | None = None
    """Group of the run: a tag in MLflow, a group in wandb. By default a sweep's trials have the sweep's name."""

    def problems(self) -> Iterator[str]:
        if holds_secret(self.uri):
            yield (
                "tracking.uri holds a user's name, a password or a token, and would be written to config.json: set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or the whole as MLFLOW_TRACKING_URI"
            )
        if self.uri and self.to not in ("mlflow", "both"):
            yield f"tracking.uri is MLflow's, and tracking.to={self.to}: set tracking.to=mlflow or both"

    def names(self) -> tuple[str, ...]:
        """Return the names of the requested trackers."""
        return {"none": (), "both": ("mlflow", "wandb")}.get(self.to, (self.to,))
