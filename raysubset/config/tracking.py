"""Who else is told of a run: MLflow and Weights & Biases."""

from dataclasses import dataclass
from typing import Literal

from raysubset.config.trees import check_fields, need
from raysubset.uris import holds_secret


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    to: Literal["none", "mlflow", "wandb", "both"] = "none"
    """Trackers that are told of the run as it goes, beside TensorBoard's events at its end. wandb is offline where it
    finds no API key; WANDB_MODE decides otherwise."""
    uri: str | None = None
    """MLflow's server or store; by default that of MLFLOW_TRACKING_URI, else mlflow's own. wandb: WANDB_BASE_URL."""
    project: str = "raysubset"
    """MLflow's experiment, wandb's project."""
    group: str | None = None
    """What runs belong to: a tag in MLflow, a group in wandb. By default a sweep's trials have the sweep's name."""

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
        """The trackers asked for."""
        return {"none": (), "both": ("mlflow", "wandb")}.get(self.to, (self.to,))
