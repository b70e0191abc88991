"""A trained model for others: torch.export and ONNX files that take raw images, and predictions of image files.

export_model("~/ray_results/digits-cnn-1a2b3c4d", "model.onnx", format="onnx")
for prediction in predict_files("~/ray_results/digits-cnn-1a2b3c4d", ["photo.png"]): ...
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from raysubset.data import decode_images
from raysubset.errors import first_line
from raysubset.trained_model import TrainedModel, load_model

ExportFormat = Literal["torch-export", "onnx"]

SUFFIXES: dict[str, str] = {"torch-export": ".pt2", "onnx": ".onnx"}
INPUT, OUTPUT = "images", "outputs"  # the graph's names
OPSET = 18  # of ONNX: the oldest that torch's exporter writes without conversion
_TOLERANCE = 1e-4  # between the file's outputs and the model's


def export_model(directory: str, path: str | None = None, *, format: ExportFormat) -> Path:
    """Write the final model of a run as one file with normalisation inside, and check that it computes the same.

    Its input is float32 [N, C, H, W] in [0, 1], N free; its output float32 [N, num_classes]. Class names and image
    shape travel along: as extra files in a .pt2, as metadata in ONNX.

    Args:
        directory: the run directory, a path or a URI.
        path: where to; by default model.pt2 or model.onnx in the working directory.

    Returns:
        The file.

    Raises:
        ValueError: if there is no finished run, the format's packages are missing, or the network cannot be exported.
    """
    model = load_model(directory)
    target = Path(os.path.expanduser(path or f"model{SUFFIXES[format]}"))
    if target.suffix != SUFFIXES[format]:
        raise ValueError(f"{target}: a file of --format {format} ends in {SUFFIXES[format]}")
    target.parent.mkdir(parents=True, exist_ok=True)
    height, width, channels = model.image_shape
    sample = torch.rand(3, channels, height, width, generator=torch.Generator().manual_seed(0))
    (_write_torch if format == "torch-export" else _write_onnx)(model, sample, target)
    return target


def _write_torch(model: TrainedModel, sample: torch.Tensor, target: Path) -> None:
    program = _exported(model, sample)
    torch.export.save(program, target, extra_files={"class_names": "\n".join(model.class_names)})
    with torch.no_grad():
        outputs = torch.export.load(target).module()(sample)
    _check_same(target, outputs.numpy(), model, sample)


def _exported(model: TrainedModel, sample: torch.Tensor) -> torch.export.ExportedProgram:
    try:
        return torch.export.export(model, (sample,), dynamic_shapes=({0: torch.export.Dim("num_images", min=1)},))
    except Exception as error:  # torch.export raises what its tracer happens to meet
        raise ValueError(f"torch.export cannot trace this network: {first_line(error)}") from error


def _write_onnx(model: TrainedModel, sample: torch.Tensor, target: Path) -> None:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx needs it and says so only in the middle
    except ImportError as error:
        raise ValueError(f"ONNX export needs {error.name}: pip install 'raysubset[export]'") from error
    program = torch.onnx.export(
        _exported(model, sample),
        (sample,),
        input_names=[INPUT],
        output_names=[OUTPUT],
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    onnx.helper.set_model_props(
        proto, {"class_names": "\n".join(model.class_names), "image_shape": ",".join(map(str, model.image_shape))}
    )
    onnx.checker.check_model(proto)
    onnx.save(proto, target)
    session = onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])
    (outputs,) = session.run([OUTPUT], {INPUT: sample.numpy()})
    _check_same(target, np.asarray(outputs), model, sample)


def _check_same(target: Path, outputs: np.ndarray, model: TrainedModel, sample: torch.Tensor) -> None:
    with torch.no_grad():
        expected = model(sample).numpy()
    difference = float(np.abs(outputs - expected).max())
    if not difference <= _TOLERANCE * max(1.0, float(np.abs(expected).max())):
        target.unlink()
        raise ValueError(f"the exported network's outputs differ from the model's by {difference:g}: nothing was kept")


@dataclass(frozen=True)
class Prediction:
    """What the model makes of one image file."""

    path: str
    classes: tuple[str, ...]  # the most probable first
    probabilities: tuple[float, ...]  # softmax of the outputs; not calibrated


def predict_files(directory: str, paths: Sequence[str], *, num_classes: int = 3) -> list[Prediction]:
    """Classify image files by the final model of a run.

    Images are resized (shorter side) and centre-cropped to the training images' size, and made grey or coloured as
    those were.

    Args:
        directory: the run directory, a path or a URI.
        paths: image files.
        num_classes: the most probable classes to give for each.

    Raises:
        ValueError: if there is no finished run, a file cannot be read, or the images are not square where the training
            images were.
    """
    model = load_model(directory)
    height, width, channels = model.image_shape
    images = _read_images(paths, side=height if height == width else None, channels=channels)
    with torch.inference_mode():
        outputs = model(torch.from_numpy(images).permute(0, 3, 1, 2))
    probabilities, order = outputs.softmax(1).topk(min(num_classes, outputs.shape[1]))
    return [
        Prediction(path, tuple(model.class_names[i] for i in classes), tuple(values))
        for path, classes, values in zip(paths, order.tolist(), probabilities.tolist(), strict=True)
    ]


def _read_images(paths: Sequence[str], *, side: int | None, channels: int) -> np.ndarray:
    """uint8 [N, H, W, channels]."""
    if not paths:
        raise ValueError("give image files to classify")

    def read(number: int) -> bytes:
        try:
            return Path(paths[number]).expanduser().read_bytes()
        except OSError as error:
            raise ValueError(f"{paths[number]}: {error.strerror}") from error

    images = decode_images(len(paths), read, describe=lambda number: paths[number], image_size=side)
    if images.shape[3] == channels:
        return images
    if channels == 3:
        return np.repeat(images, 3, axis=3)
    grey = images @ np.array([0.299, 0.587, 0.114])  # ITU-R 601, as Pillow's mode L
    return np.rint(grey)[..., np.newaxis].astype(np.uint8)
