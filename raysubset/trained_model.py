"""The trained model as others use it: an nn.Module with its normalisation and class names, from safetensors and JSON.

model = load_model("~/ray_results/digits-cnn-1a2b3c4d")
labels = [model.class_names[i] for i in model(images).argmax(1)]        # images uint8 [N, C, H, W]
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from raysubset.config import ModelConfig
from raysubset.models import build_model
from raysubset.run_directory import RunDirectory
from raysubset.training import Weights

WEIGHTS_PATH, RECORD_PATH = "model.safetensors", "model.json"


class TrainedModel(nn.Module):
    """A network that normalises its images itself."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, record: dict[str, Any]) -> None:
        super().__init__()
        self.network = network
        self.class_names: tuple[str, ...] = tuple(record["class_names"])
        self.image_shape: tuple[int, int, int] = tuple(record["image_shape"])  # (H, W, C)
        self.record = record
        for name in ("mean", "std"):
            self.register_buffer(
                name, torch.tensor(record[name], dtype=torch.float32).view(1, -1, 1, 1), persistent=False
            )

    def forward(self, images: Tensor) -> Tensor:
        """Outputs float32 [N, num_classes] (logits, for cross-entropy).

        Args:
            images: [N, C, H, W] of the training images' size; uint8, or float in [0, 1].

        Raises:
            ValueError: if the shape or the type is another.
        """
        height, width, channels = self.image_shape
        if images.ndim != 4 or tuple(images.shape[1:]) != (channels, height, width):
            raise ValueError(
                f"images of shape {tuple(images.shape)}; this model takes [N, {channels}, {height}, {width}]"
            )
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise ValueError(f"images are {images.dtype}; this model takes uint8, or floats in [0, 1]")
        scaled = images.to(self.mean.dtype)
        if images.dtype == torch.uint8:
            scaled = scaled / 255
        return self.network((scaled - self.mean) / self.std)


def save_model(run: RunDirectory, weights: Weights, record: dict[str, Any]) -> None:
    """Write the weights, then the record that names them."""
    run.write_weights(WEIGHTS_PATH, weights)
    run.write_json(RECORD_PATH, record)


def model_record(
    model: ModelConfig,
    *,
    num_classes: int,
    class_names: tuple[str, ...],
    image_shape: tuple[int, int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> dict[str, Any]:
    """What load_model() needs beside the weights."""
    return {
        "model": dataclasses.asdict(model),
        "num_classes": num_classes,
        "class_names": list(class_names),
        "image_shape": list(image_shape),
        "mean": list(mean),
        "std": list(std),
    }


def load_model(path: str, *, device: str | torch.device = "cpu") -> TrainedModel:
    """The final model of a run, in evaluation mode, ready to predict. Nothing is unpickled.

    Args:
        path: the run directory, a path or a URI.

    Raises:
        ValueError: if there is no finished run, or a newer version made it.
    """
    run = RunDirectory.at(path)
    if not run.exists(RECORD_PATH):
        raise ValueError(f"{run.uri} holds no {RECORD_PATH}: it is no run directory, or the run is not finished")
    record = run.read_json(RECORD_PATH)
    if unknown := record["model"].keys() - {field.name for field in dataclasses.fields(ModelConfig)}:
        made = f"its {RECORD_PATH} has {', '.join(f'model.{name}' for name in sorted(unknown))}"
        raise ValueError(f"{run.uri} was made by a newer raysubset ({made}, which this version lacks): update it")
    shape = tuple(record["image_shape"])
    network = build_model(ModelConfig(**record["model"]), num_classes=record["num_classes"], image_shape=shape, seed=0)
    network.load_state_dict(run.read_weights(WEIGHTS_PATH))
    return TrainedModel(network, record).eval().to(device)
