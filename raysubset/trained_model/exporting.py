"""Uses a trained model elsewhere: torch.export and ONNX files that take raw inputs, and predictions from files.

export_model("~/ray_results/digits-1a2b3c4d", "model.onnx", format="onnx")
for prediction in predict_files("~/ray_results/digits-1a2b3c4d", ["photo.png"]): ...
"""

import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from raysubset.config import TABLE_SUFFIXES, DataConfig
from raysubset.data import EncodedImages, decode, read_image_rows, read_rows, text_of
from raysubset.errors import listed
from raysubset.run_directory import RunDirectory
from raysubset.tasks import Classification, ImageInputs, NextToken, Regression, Segmentation, TableInputs, TensorInputs
from raysubset.trained_model import TrainedModel, load_model
from raysubset.trained_model.network_graph import export, refuse_difference
from raysubset.training import are_probabilities

ExportFormat = Literal["torch-export", "onnx"]

SUFFIXES: dict[str, str] = {"torch-export": ".pt2", "onnx": ".onnx"}
INPUT, OUTPUT = "images", "outputs"  # the names in the graph
OPSET = 18  # of ONNX: the oldest that torch's exporter writes without conversion
_logger = logging.getLogger(__name__)

_MOST_IMAGES = 256  # in a batch of predictions …
_BATCH_PIXELS = 2**20  # … of at most so many values: an activation is several times as large
_NUM_CLASSES = 3  # in each answer


def export_model(directory: str, path: str | None = None, *, format: ExportFormat, trust_code: bool = False) -> Path:
    """Write the final model of a run, with its normalisation, to one file, and check that the file computes the same.

    Its input is float32 [N, C, H, W] in [0, 1] for images, float32 [N, F] for a table's features, or int64 [N, T] for
    tokens, with any N. Its output is float32, [N, num_classes] for classes. The file also holds, as JSON, class names
    and image shape (H, W, C), or the names of features and targets: a .pt2 in extra files, ONNX in its metadata. A
    warning names features and targets for which float32 is too coarse, as for times in seconds within some minutes.

    Args:
        directory: the run directory, a path or a URI.
        path: the file to write; by default model.pt2 or model.onnx in the working directory.
        trust_code: as for load_model().

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
    generator = torch.Generator().manual_seed(0)
    if isinstance(model.inputs, ImageInputs):
        sample = torch.rand(3, *model.spec.inputs, generator=generator)
    else:
        sample = model.spec.random(3, generator)
    if isinstance(model.inputs, TableInputs):
        sample = (sample * model.std + model.mean).float()
    if coarse := _coarse(model):
        text = "float32 rounds %s by more than a hundredth of the standard deviation; load_model() takes float64 too"
        _logger.warning(text, listed(coarse))
    (_write_torch if format == "torch-export" else _write_onnx)(model, sample, target)
    return target


def _coarse(model: TrainedModel) -> list[str]:
    """Return the features and targets whose training values float32 rounds by over a hundredth of their deviation."""
    scales = list[tuple[str, float, float]]()
    if isinstance(inputs := model.inputs, TableInputs | TensorInputs):
        shift, scale = map(torch.Tensor.tolist, inputs.scaling())
        names = (
            inputs.feature_names if isinstance(inputs, TableInputs) else [f"inputs[:, {k}]" for k in range(len(shift))]
        )
        scales += zip(names, shift, scale, strict=True)
    if isinstance(task := model.record.task, Regression):
        scales += zip(task.target_names, task.mean, task.std, strict=True)
    epsilon = torch.finfo(torch.float32).eps
    return [name for name, shift, scale in scales if abs(shift) * epsilon > scale / 100]


def _metadata(model: TrainedModel) -> dict[str, str]:
    metadata = {"class_names": model.class_names, "image_shape": getattr(model, "image_shape", None)}
    metadata |= {"inputs": getattr(model.inputs, "feature_names", None)}
    metadata |= {"targets": getattr(model.record.task, "target_names", None)}
    return {key: json.dumps(value) for key, value in metadata.items() if value}


def _write_torch(model: TrainedModel, sample: torch.Tensor, target: Path) -> None:
    torch.export.save(export(model, sample), target, extra_files=_metadata(model))
    with torch.no_grad():
        _check_same(target, torch.export.load(target).module()(sample), model, sample)


def _write_onnx(model: TrainedModel, sample: torch.Tensor, target: Path) -> None:
    graph = export(model, sample)
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx needs it and fails without it only halfway

        program = torch.onnx.export(
            graph,
            (sample,),
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    except ImportError as error:  # a package is missing, or is older than this torch needs
        raise ValueError(f"ONNX export needs {error.name}: pip install -U 'raysubset[export]'") from error
    assert program is not None
    proto = program.model_proto
    onnx.helper.set_model_props(proto, _metadata(model))
    onnx.checker.check_model(proto)
    onnx.save(proto, target)
    session = onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])
    (outputs,) = session.run([OUTPUT], {INPUT: sample.numpy()})
    _check_same(target, torch.from_numpy(outputs), model, sample)


def _check_same(target: Path, outputs: torch.Tensor, model: TrainedModel, sample: torch.Tensor) -> None:
    try:
        with torch.no_grad():
            refuse_difference(outputs, model(sample))
    except ValueError as error:
        target.unlink()
        raise ValueError(f"{target} was removed: {error}") from error


@dataclass(frozen=True)
class Prediction:
    """The model's answer for an image (a file or a table's row), a row of features, or a text."""

    path: str
    classes: tuple[str, ...] = ()  # the most probable first; empty if there is an error
    # The softmax of the outputs, or outputs that are probabilities; not calibrated. For masks: shares of the pixels.
    probabilities: tuple[float, ...] = ()
    error: str | None = None  # the reason why there is no answer, with the file's name
    row: int | None = None  # of a table, from 0
    values: dict[str, float] = field(default_factory=dict)  # for regression, by the target's name
    text: str = ""  # the continuation of a text
    mask: list[list[int]] = field(default_factory=list)  # for segmentation: [H][W], the class number of each pixel

    def __str__(self) -> str:
        pairs = zip(self.classes, self.probabilities, strict=True)
        answers = [f"{name} {share:.1%}" for name, share in pairs]
        answers += [
            f"{name} {value:{'.0f' if 1e6 <= abs(value) < 1e15 else '.6g'}}" for name, value in self.values.items()
        ]
        return self.error or f"{self.place}: {', '.join(answers) or self.text}"

    @property
    def place(self) -> str:
        """The path, with the row of a table."""
        return self.path if self.row is None else f"{self.path}, row {self.row}"


_Image = tuple[Prediction, EncodedImages | np.ndarray, int]  # its place, and the images of which it is one, by number


def predict_files(directory: str, paths: Sequence[str], *, trust_code: bool = False) -> Iterator[Prediction]:
    """Apply the final model of a run to files, a batch of images or a table at a time.

    Images are files, or rows of Parquet and Arrow files in the column that training read. They are resized (shorter
    side) and centre-cropped to the training images' size, and converted to grey or colour as those were. Tables need
    the training table's columns, by name. Texts are continued. A file or image that cannot be read yields its error.

    Args:
        directory: the run directory, a path or a URI.
        paths: image files and tables of images, tables, or text files, as the model takes them.
        trust_code: as for load_model().

    Raises:
        ValueError: if there are no files or no finished run, the model cannot be loaded, or it takes inputs that no
            file holds.
    """
    if not paths:
        raise ValueError("give files to predict from")
    model = load_model(directory, trust_code=trust_code)
    task = model.record.task
    if isinstance(task, NextToken):
        yield from (_continue_text(model, path) for path in paths)
    elif isinstance(model.inputs, TableInputs):
        for path in paths:
            yield from _predict_table(model, model.inputs, path)
    elif isinstance(model.inputs, ImageInputs) and isinstance(task, Classification | Regression | Segmentation):
        config = RunDirectory.at(directory).recorded_config() or {}
        column = config.get("data", {}).get("image_column", DataConfig.image_column)  # that training read
        yield from _predict_images(model, model.inputs, _images_of(paths, column, _side(model.inputs)))
    else:
        text = f"this model's task is {task.name}, and it takes tensors of {list(model.spec.inputs)}"
        raise ValueError(f"{text}: load_model(directory)(x)")


def _continue_text(model: TrainedModel, path: str) -> Prediction:
    try:
        return Prediction(path, text=model.generate(text_of(Path(path).expanduser().read_bytes(), path)))
    except OSError as error:
        return Prediction(path, error=f"{path}: {error.strerror}; give text files")
    except ValueError as error:
        return _unreadable(path, error)


def _predict_table(model: TrainedModel, inputs: TableInputs, path: str) -> Iterator[Prediction]:
    try:
        with torch.inference_mode():
            outputs, notes = model.of_table(read_rows(path, inputs))
    except ValueError as error:
        yield _unreadable(path, error)
        return
    for note in notes:
        _logger.warning("%s: %s", path, note.text)
    yield from _answers(model, outputs, [Prediction(path, row=row) for row in range(len(outputs))])


def _unreadable(path: str, error: ValueError) -> Prediction:
    """Return the answer for a table that cannot be read."""
    text = str(error).removeprefix("data.name = ")
    return Prediction(path, error=text if path in text else f"{path}: {text}")


def _images_of(paths: Sequence[str], column: str, side: int | None) -> Iterator[_Image]:
    """Yield the place of each image file, and of each row of tables of images; a table that cannot be read is one."""
    files = EncodedImages(len(paths), lambda n: Path(paths[n]).expanduser().read_bytes(), paths.__getitem__)
    for number, path in enumerate(paths):
        if not path.lower().endswith(TABLE_SUFFIXES):
            yield Prediction(path), files, number
            continue
        try:
            images = read_image_rows(path, column, image_size=side)
        except ValueError as error:
            yield _unreadable(path, error), files, number
        else:
            yield from ((Prediction(path, row=row), images, row) for row in range(len(images)))


def _predict_images(model: TrainedModel, inputs: ImageInputs, images: Iterator[_Image]) -> Iterator[Prediction]:
    num = max(1, min(_MOST_IMAGES, _BATCH_PIXELS // math.prod(model.image_shape)))
    with ThreadPoolExecutor() as pool:
        while batch := list(islice(images, num)):
            decoded = list(pool.map(partial(_read_image, inputs), *zip(*batch, strict=True)))
            readable = [image for image in decoded if isinstance(image, np.ndarray)]
            places = [place for (place, *_), image in zip(batch, decoded, strict=True) if isinstance(image, np.ndarray)]
            answers = iter(())
            if readable:
                with torch.inference_mode():
                    outputs = model(torch.from_numpy(np.stack(readable)).permute(0, 3, 1, 2))
                answers = _answers(model, outputs, places)
            for image in decoded:
                yield next(answers) if isinstance(image, np.ndarray) else image


def _answers(model: TrainedModel, outputs: torch.Tensor, places: Iterable[Prediction]) -> Iterator[Prediction]:
    """Yield each place with its answer from a row of outputs: classes, the most probable first, or numbers by name."""
    task = model.record.task
    are_logits = isinstance(task, Classification) and not are_probabilities(outputs)
    for place, output in zip(places, outputs, strict=True):
        numbers, mask = output.softmax(0) if are_logits else output, []
        if not numbers.isfinite().all():
            yield replace(place, error=f"{place.place}: the network's outputs are NaN or infinite")
            continue
        if isinstance(task, Regression):
            yield replace(place, values=dict(zip(task.target_names, output.tolist(), strict=True)))
            continue
        if isinstance(task, Segmentation):  # by the classes' shares of the pixels
            classes = output.argmax(0)
            numbers, mask = classes.flatten().bincount(minlength=len(output)) / classes.numel(), classes.tolist()
        shares, order = numbers.topk(min(_NUM_CLASSES, len(numbers)))
        names = tuple(task.class_names[number] for number in order.tolist())
        yield replace(place, classes=names, probabilities=tuple(shares.tolist()), mask=mask)


def _side(inputs: ImageInputs) -> int | None:
    """Return the side to which images are resized; None if the training images were not square."""
    height, width, _ = inputs.image_shape
    return height if height == width else None


def _read_image(
    inputs: ImageInputs, place: Prediction, images: EncodedImages | np.ndarray, number: int
) -> np.ndarray | Prediction:
    """Return an image, uint8 [H, W, C], in the model's shape and as its training images were; or its place's error."""
    height, width, channels = inputs.image_shape
    if place.error:
        return place
    try:
        if isinstance(images, EncodedImages):
            read, name = partial(images.read, number), images.describe(number)
            (image,), _ = decode(EncodedImages(1, lambda _: read(), lambda _: name), _side(inputs), inputs.grey_range)
        else:
            image = images[number]
        if image.shape[:2] != (height, width):
            size = "x".join(map(str, image.shape[:2]))
            raise ValueError(f"{place.place} is {size}: this model takes images of {height}x{width}")
    except OSError as error:
        text = f"{place.path}: {error.strerror}; give image files, or Parquet or Arrow files of images"
        return replace(place, error=text)
    except ValueError as error:
        return replace(place, error=str(error))
    if image.shape[2] == channels:
        return image
    if channels == 3:
        return np.repeat(image, 3, axis=2)
    grey = image @ np.array([0.299, 0.587, 0.114])  # ITU-R 601, as Pillow's mode L
    return np.rint(grey)[..., np.newaxis].astype(np.uint8)
