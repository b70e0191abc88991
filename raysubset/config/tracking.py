"""Settings of the experiment trackers: MLflow and Weights & Biases."""

from dataclasses import dataclass
from typing import Literal

from raysubset.config.trees import check_fields, need
from raysubset.uris import holds_secret


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    to: Literal["none", "mlflow", "wandb", "both"] = "none"
    """Experiment trackers that follow the run, beside the TensorBoard events at its end. wandb works offline if it
    finds no API key; WANDB_MODE overrides this."""
    uri: str | None = None
    """MLflow's server or store; by default MLFLOW_TRACKING_URI, else mlflow's own. For wandb set WANDB_BASE_URL."""
    project: str = "raysubset"
    """MLflow's experiment, wandb's project."""
    group: str | None = None
    """Group of the run: a tag in MLflow, a group in wandb. By default a sweep's trials have the sweep's name."""

    def __post_init__(self) -> None:
        need(
            not holds_secret(self.uri),
            "tracking.uri holds a user's name, a password or a token, and would be written to config.json: set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or the whole as MLFLOW_TRACKING_URI",
        )
        check_fields(self, "tracking.")
        need(
            self.uri is None or self.to in ("mlflow", "both"),
            f"tracking.uri is MLflow's, and tracking.to={self.to} does not ask for it: set tracking.to=mlflow or both",
        )

    def names(self) -> tuple[str, ...]:
        """Return the names of the requested trackers."""
        return {"none": (), "both": ("mlflow", "wandb")}.get(self.to, (self.to,))
