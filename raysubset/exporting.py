"""A trained model for others: torch.export and ONNX files that take raw images, and predictions of image files.

export_model("~/ray_results/digits-1a2b3c4d", "model.onnx", format="onnx")
for prediction in predict_files("~/ray_results/digits-1a2b3c4d", ["photo.png"]): ...
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from raysubset.data import decode_images
from raysubset.network_graph import export
from raysubset.trained_model import ModelRecord, TrainedModel, load_model
from raysubset.training import are_probabilities

ExportFormat = Literal["torch-export", "onnx"]

SUFFIXES: dict[str, str] = {"torch-export": ".pt2", "onnx": ".onnx"}
INPUT, OUTPUT = "images", "outputs"  # the graph's names
OPSET = 18  # of ONNX: the oldest that torch's exporter writes without conversion
_TOLERANCE = 1e-4  # between the file's outputs and the model's
_MOST_IMAGES = 256  # predicted at once …
_BATCH_PIXELS = 2**20  # … and of no more values: an activation is some times as large


def export_model(directory: str, path: str | None = None, *, format: ExportFormat, trust_code: bool = False) -> Path:
    """Write the final model of a run as one file with normalisation inside, and check that it computes the same.

    Its input is float32 [N, C, H, W] in [0, 1], N free; its output float32 [N, num_classes]. Class names and image
    shape (H, W, C) travel along as JSON: in extra files of a .pt2, in the metadata of ONNX.

    Args:
        directory: the run directory, a path or a URI.
        path: where to; by default model.pt2 or model.onnx in the working directory.
        trust_code: as load_model()'s.

    Returns:
        The file.

    Raises:
        ValueError: if there is no finished run, the format's packages are missing, or the network cannot be exported.
    """
    model = load_model(directory, trust_code=trust_code)
    target = Path(os.path.expanduser(path or f"model{SUFFIXES[format]}"))
    if target.suffix != SUFFIXES[format]:
        raise ValueError(f"{target}: a file of --format {format} must end in {SUFFIXES[format]}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to {target.parent} ({error.strerror}): choose another --to") from error
    height, width, channels = model.image_shape
    sample = torch.rand(3, channels, height, width, generator=torch.Generator().manual_seed(0))
    (_write_torch if format == "torch-export" else _write_onnx)(model, sample, target)
    return target


def _described(model: TrainedModel) -> dict[str, str]:
    return {"class_names": json.dumps(model.class_names), "image_shape": json.dumps(model.image_shape)}


def _write_torch(model: TrainedModel, sample: torch.Tensor, target: Path) -> None:
    torch.export.save(export(model, sample), target, extra_files=_described(model))
    with torch.no_grad():
        outputs = torch.export.load(target).module()(sample)
    _check_same(target, outputs.numpy(), model, sample)


def _write_onnx(model: TrainedModel, sample: torch.Tensor, target: Path) -> None:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx needs it and says so only in the middle
    except ImportError as error:
        raise ValueError(f"ONNX export needs {error.name}: pip install 'raysubset[export]'") from error
    program = torch.onnx.export(
        export(model, sample),
        (sample,),
        input_names=[INPUT],
        output_names=[OUTPUT],
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    onnx.helper.set_model_props(proto, _described(model))
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
    classes: tuple[str, ...] = ()  # the most probable first; none where there is an error
    probabilities: tuple[float, ...] = ()  # softmax of the outputs, or these if they are such; not calibrated
    error: str | None = None  # why there is no answer, the file named


def predict_files(
    directory: str, paths: Sequence[str], *, num_classes: int = 3, trust_code: bool = False
) -> list[Prediction]:
    """Classify image files by the final model of a run; predictions() in a list."""
    return list(predictions(directory, paths, num_classes=num_classes, trust_code=trust_code))


def predictions(
    directory: str, paths: Sequence[str], *, num_classes: int = 3, trust_code: bool = False
) -> Iterator[Prediction]:
    """Classify image files by the final model of a run, a batch at a time: memory does not grow with their number.

    Images are resized (shorter side) and centre-cropped to the training images' size, and made grey or coloured as
    those were. A file that cannot be read has its error for an answer.

    Args:
        directory: the run directory, a path or a URI.
        paths: image files.
        num_classes: the most probable classes to give for each.
        trust_code: as load_model()'s.

    Raises:
        ValueError: if there are no files or no finished run, or the run's model cannot be loaded.
    """
    if not paths:
        raise ValueError("give image files to classify")
    model = load_model(directory, trust_code=trust_code)
    num = max(1, min(_MOST_IMAGES, _BATCH_PIXELS // math.prod(model.image_shape)))
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), num):
            batch = paths[start : start + num]
            images = list(pool.map(lambda path: _read_image(path, model.record), batch))
            answers = iter(_classify(model, [image for image in images if not isinstance(image, str)], num_classes))
            for path, image in zip(batch, images, strict=True):
                if isinstance(image, str):
                    yield Prediction(path, error=image)
                    continue
                classes, probabilities = next(answers)
                if all(map(math.isfinite, probabilities)):
                    yield Prediction(path, classes, probabilities)
                else:
                    yield Prediction(path, error=f"{path}: the network's outputs are NaN or infinite")


def _classify(
    model: TrainedModel, images: Sequence[np.ndarray], num_classes: int
) -> list[tuple[tuple[str, ...], tuple[float, ...]]]:
    """(classes, probabilities) of each image, the most probable first."""
    if not images:
        return []
    with torch.inference_mode():
        outputs = model(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
    probabilities = outputs if are_probabilities(outputs) else outputs.softmax(1)
    shares, order = probabilities.topk(min(num_classes, outputs.shape[1]))
    return [
        (tuple(model.class_names[i] for i in classes), tuple(values))
        for classes, values in zip(order.tolist(), shares.tolist(), strict=True)
    ]


def _read_image(path: str, record: ModelRecord) -> np.ndarray | str:
    """uint8 [H, W, C] of the model's shape, read as its training images were; or why not, in a line."""
    height, width, channels = record.image_shape
    image_size = height if height == width else None

    def read(_: int) -> bytes:
        return Path(path).expanduser().read_bytes()

    try:
        (image,) = decode_images(1, read, lambda _: path, image_size=image_size, grey_range=record.grey_range)
    except OSError as error:
        return f"{path}: {error.strerror}; give image files"
    except ValueError as error:
        return str(error)
    if image.shape[:2] != (height, width):
        return f"{path} is {image.shape[0]}x{image.shape[1]}: this model takes images of {height}x{width}"
    if image.shape[2] == channels:
        return image
    if channels == 3:
        return np.repeat(image, 3, axis=2)
    grey = image @ np.array([0.299, 0.587, 0.114])  # ITU-R 601, as Pillow's mode L
    return np.rint(grey)[..., np.newaxis].astype(np.uint8)
