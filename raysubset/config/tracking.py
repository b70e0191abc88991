"""Settings of the experiment trackers: MLflow and Weights & Biases."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from raysubset.config.trees import Part
from raysubset.uris import holds_secret


@dataclass(frozen=True, kw_only=True)
class TrackingConfig(Part):
    prefix = "tracking."

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
