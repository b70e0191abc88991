"""The trained model as others use it: an nn.Module with its normalisation and class names, from safetensors and JSON.

model = load_model("~/ray_results/digits-1a2b3c4d")
labels = [model.class_names[i] for i in model(images).argmax(1)]        # images uint8 [N, C, H, W]
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from raysubset.config import ModelConfig
from raysubset.data import FULL_RANGE, GreyRange
from raysubset.errors import first_line
from raysubset.models import new_model
from raysubset.network_graph import GraphNetwork, trace
from raysubset.run_directory import RunDirectory, Seal
from raysubset.tasks import Spec
from raysubset.training import Weights

WEIGHTS_PATH, RECORD_PATH = "model.safetensors", "model.json"
GRAPH_PATH, CONSTANTS_PATH = "model.graph.json", "model.constants.safetensors"  # of a user's own network

_MOST_PIXELS = 2**28  # of an image: 16,384×16,384
_LARGE = 1e6  # for a mean or a standard deviation of pixels in [0, 1]


@dataclasses.dataclass(frozen=True)
class ModelRecord:
    """model.json: what load_model() needs beside the weights."""

    model: ModelConfig
    num_classes: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]  # (H, W, C)
    mean: tuple[float, ...]  # of each channel, of pixels in [0, 1]
    std: tuple[float, ...]
    grey_range: GreyRange  # the values of pixels of more than 8 bits that are black and white

    @property
    def spec(self) -> Spec:
        """What the network takes and gives."""
        height, width, channels = self.image_shape
        return Spec((channels, height, width), (self.num_classes,))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, record: Any) -> "ModelRecord":
        """The record that a file holds, which may be anything.

        Raises:
            ValueError: if a value is missing, or of another type or range than a model's.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(record, dict) or not isinstance(record.get("model"), dict) or fields - record.keys():
            raise ValueError("it is no record of a model")
        words = {field.name for field in dataclasses.fields(ModelConfig)}
        if unknown := [*(f"model.{name}" for name in sorted(record["model"].keys() - words)), *record.keys() - fields]:
            raise ValueError(f"it has {', '.join(unknown)}, which this version lacks: update raysubset")
        shape, names, num_classes = record["image_shape"], record["class_names"], record["num_classes"]
        if not _is_list(shape, int, 3) or min(shape) < 1 or math.prod(shape) > _MOST_PIXELS:
            raise ValueError(f"image_shape = {_shown(shape)} is no [H, W, C]")
        if type(num_classes) is not int or not _is_list(names, str, num_classes) or not names:
            raise ValueError(f"num_classes = {_shown(num_classes)} is not the number of class_names")
        statistics = {}
        for name in ("mean", "std"):
            values = record[name]
            if not _is_list(values, (int, float), shape[2]) or not all(-_LARGE < value < _LARGE for value in values):
                raise ValueError(f"{name} = {_shown(values)} should be {shape[2]} numbers, one a channel")
            statistics[name] = tuple(map(float, values))
        grey_range = record["grey_range"]
        if not _is_list(grey_range, int, 2) or not -_LARGE < grey_range[0] < grey_range[1] < _LARGE:
            raise ValueError(f"grey_range = {_shown(grey_range)} should be black and white, of pixels of over 8 bits")
        if min(statistics["std"]) <= 0:
            raise ValueError(f"std = {list(statistics['std'])} must be positive")
        return model_record(
            ModelConfig(**record["model"]),
            num_classes=num_classes,
            class_names=tuple(names),
            image_shape=tuple(shape),
            grey_range=tuple(grey_range),
            **statistics,
        )


def _is_list(value: Any, kind: type | tuple[type, ...], length: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == length
        and all(isinstance(item, kind) and not isinstance(item, bool) for item in value)
    )


def _shown(value: Any) -> str:
    """A value from a file in a few words."""
    return text if len(text := repr(value)) <= 80 else f"{text[:77]}..."


class TrainedModel(nn.Module):
    """A network that normalises its images itself."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, record: ModelRecord) -> None:
        super().__init__()
        self.network = network
        self.class_names = record.class_names
        self.image_shape = record.image_shape  # (H, W, C)
        self.record = record
        for name, values in (("mean", record.mean), ("std", record.std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)

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


def model_record(
    model: ModelConfig,
    *,
    num_classes: int,
    class_names: tuple[str, ...],
    image_shape: tuple[int, int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    grey_range: GreyRange = FULL_RANGE,
) -> ModelRecord:
    """What load_model() needs beside the weights."""
    return ModelRecord(model, num_classes, class_names, image_shape, mean, std, grey_range)


def save_model(
    directory: RunDirectory, weights: Weights, record: ModelRecord, *, network: nn.Module | None = None
) -> tuple[dict[str, Seal], str | None]:
    """Write the weights, of a user's own network the graph that stands for its code, then the record that names them.

    Args:
        record: this process's own, so that a user's function that it names may be called.
        network: the user's own, on the CPU, which takes the weights here; by default the record's function is called.

    Returns:
        The seals of what was written, by path; and why its graph could not be kept, so that load_model() will need its
        code, None where none is needed.
    """
    files, flaw = {WEIGHTS_PATH: directory.write_weights(WEIGHTS_PATH, weights)}, None
    if record.model.is_function:
        network = network or new_model(record.model, record)
        network.load_state_dict(weights)
        try:
            graph, constants = trace(network, record.spec)
        except ValueError as error:
            flaw = str(error)
        else:
            files[CONSTANTS_PATH] = directory.write_weights(CONSTANTS_PATH, constants)
            files[GRAPH_PATH] = directory.write_json(GRAPH_PATH, graph)
    return {**files, RECORD_PATH: directory.write_json(RECORD_PATH, record.to_dict() | {"files": files})}, flaw


def load_model(path: str, *, device: str | torch.device = "cpu", trust_code: bool = False) -> TrainedModel:
    """The final model of a run, in evaluation mode, ready to predict.

    The directory may be a stranger's: nothing is unpickled, imported or called that it names. A user's own network is
    computed by the graph that the run kept of it, for which its code is not needed.

    Args:
        path: the run directory, a path or a URI.
        device: where the model computes.
        trust_code: build a user's own network by its code instead, the package.module:function that model.json names.
            For directories of people you trust, where the run could keep no graph, or to train the network further.

    Raises:
        ValueError: if there is no finished run, it is damaged, a newer version made it, or its network needs code.
    """
    directory = RunDirectory.at(path)
    if not directory.exists(RECORD_PATH):
        raise ValueError(
            f"{directory.uri} holds no {RECORD_PATH}: it is no run directory, or one that is not finished: give another"
        )
    stored = directory.read_json(RECORD_PATH)
    files = stored.pop("files", None) if isinstance(stored, dict) else None
    files = files if isinstance(files, dict) else {}
    try:
        record = ModelRecord.from_dict(stored)
    except ValueError as error:
        raise ValueError(f"{RECORD_PATH} in {directory.uri} cannot be used: {error}") from error
    weights = directory.read_weights(WEIGHTS_PATH, files)
    try:
        network = _network(directory, record, weights, files, trust_code=trust_code)
    except RuntimeError as error:
        raise ValueError(
            f"{WEIGHTS_PATH} in {directory.uri} are not of {record.model.name}: {first_line(error)}"
        ) from error
    return TrainedModel(network, record).eval().to(device)


def _network(
    directory: RunDirectory, record: ModelRecord, weights: Weights, files: Mapping[str, Seal], *, trust_code: bool
) -> nn.Module:
    """The network that the record describes, with the weights.

    Raises:
        ValueError: if it is a user's own, of which there is no graph, and the user's code is not to be trusted.
        RuntimeError: if the weights are another network's.
    """
    if not record.model.is_function:
        return _named_network(record, weights)
    if trust_code:
        network = new_model(record.model, record)
        network.load_state_dict(weights)
        return network
    if not directory.exists(GRAPH_PATH):
        height, width, channels = record.image_shape
        module, _, function = record.model.name.partition(":")
        raise ValueError(
            f"the network of {directory.uri} is code that it only names: load_model() would import {module!r} from "
            f"{os.getcwd()} or what is installed, and call its {function!r} with ({record.num_classes}, ({channels}, "
            f"{height}, {width})). If you trust whoever made this directory, give trust_code=True or --trust-code"
        )
    tensors = {**weights, **directory.read_weights(CONSTANTS_PATH, files)}
    try:
        return GraphNetwork(directory.read_json(GRAPH_PATH), tensors, record.spec)
    except ValueError as error:
        raise ValueError(f"{GRAPH_PATH} in {directory.uri} cannot be used: {error}") from error


def _named_network(record: ModelRecord, weights: Mapping[str, Tensor]) -> nn.Module:
    """One of ours or torchvision's. A record's numbers take no memory before they are seen to be the weights'.

    Raises:
        RuntimeError: if they are not.
    """
    if (record.model.depth or 0) > len(weights):
        raise RuntimeError(f"depth = {record.model.depth}, and there are {len(weights)} tensors")
    if not any(record.num_classes in tensor.shape for tensor in weights.values()):
        raise RuntimeError(f"num_classes = {record.num_classes}, and no tensor has as many")
    try:
        with torch.device("meta"):
            network = new_model(record.model, record)
    except NotImplementedError:  # torchvision's regnets; their size is their name's
        network = new_model(record.model, record)
    except (ValueError, TypeError, OverflowError) as error:  # the last two of a width beyond 64 bits
        raise RuntimeError(first_line(error)) from error
    for name, tensor in network.state_dict().items():
        if name in weights and weights[name].dtype != tensor.dtype:
            raise RuntimeError(f"{name} is {weights[name].dtype}, not {tensor.dtype}")
    network.load_state_dict({name: tensor.clone() for name, tensor in weights.items()}, assign=True)
    return network
