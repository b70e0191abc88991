"""Tiny examples and networks that the tests of training and aggregation share."""

import io
import json
import os
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from torch import Tensor, nn

from raysubset.config import MinimizeConfig, ModelConfig
from raysubset.data import Examples, FullSet
from raysubset.models import build_model
from raysubset.run_directory import RunDirectory
from raysubset.tasks import Classification, CrossEntropy, ImageInputs, Spec, SquaredError
from raysubset.trained_model import ModelRecord
from raysubset.training import Metrics, Progress, minimize

CROSS_ENTROPY, SQUARED_ERROR = CrossEntropy(), SquaredError(is_one_hot=True)


def examples(
    num: int = 30,
    side: int = 8,
    *,
    augmentation: Literal["none", "crop_flip"] = "none",
    objective: CrossEntropy | SquaredError | None = None,
    seed: int = 0,
) -> Examples:
    """Random grey pixels, labels of three classes that depend on them."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (num, side, side, 1), dtype=torch.uint8, generator=generator)
    labels = images[:, : side // 2].float().mean((1, 2, 3)).argsort().argsort() * 3 // num
    return image_examples(images, labels, 0.5, 0.5, augmentation, objective=objective, num_classes=3)


def few_digits() -> tuple[np.ndarray, np.ndarray]:
    """A quarter of digits, for runs that measure all of it again and again."""
    from sklearn.datasets import load_digits

    images, labels = cast(Any, load_digits(return_X_y=True))
    return (images[:450] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8), labels[:450]


def image_examples(
    images: Tensor,
    labels: Tensor,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
    augmentation: Literal["none", "crop_flip"] = "none",
    *,
    objective: CrossEntropy | SquaredError | None = None,
    num_classes: int | None = None,
) -> Examples:
    """Images uint8 [N, H, W, C] and their classes, int64 [N], to be augmented as they say."""
    height, width, channels = images.shape[1:]
    mean, std = (
        (values,) * channels if isinstance(values, int | float) else tuple(map(float, values)) for values in (mean, std)
    )
    names = tuple(map(str, range(num_classes or int(labels.max()) + 1)))
    task = Classification(
        ImageInputs((height, width, channels), mean, std, augmentation), names, objective or CrossEntropy()
    )
    return Examples({"image": images, "label": labels}, task, augment=True)


def with_labels(examples: Examples, labels: Tensor) -> Examples:
    return replace(examples, rows={**examples.rows, "label": labels})


def inputs_of(data: Examples | FullSet) -> ImageInputs:
    """What a classification of images is learned from."""
    assert isinstance(data.task, Classification)
    assert isinstance(data.task.inputs, ImageInputs)
    return data.task.inputs


def image_record(
    model: ModelConfig, class_names: tuple[str, ...], image_shape: tuple[int, int, int], mean: float, std: float
) -> ModelRecord:
    """model.json of a classification of images whose channels have one mean and deviation."""
    inputs = ImageInputs(image_shape, (mean,) * image_shape[2], (std,) * image_shape[2])
    return ModelRecord(model, Classification(inputs, class_names))


def metrics(loss_sum: float, num_correct: int, num_examples: int) -> Metrics:
    """Of classification."""
    return Metrics.of_sums(examples(1).task, loss_sum, {"num_correct": num_correct}, num_examples)


def cnn(norm: Literal["batch", "group", "none"] = "batch", *, seed: int = 0) -> nn.Module:
    """Two convolutions of 4 and 8 channels, channels-last."""
    model = build_model(ModelConfig(width=4, depth=2, norm=norm), Spec((1, 8, 8), (3,)), seed=seed)
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def noisy_network(seed: int = 0) -> nn.Module:
    """A convolution, batch-norm, dropout and a linear layer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = OrderedDict[str, nn.Module](
            conv=nn.Conv2d(1, 4, 3, bias=False),
            norm=nn.BatchNorm2d(4),
            relu=nn.ReLU(),
            flatten=nn.Flatten(),
            dropout=nn.Dropout(0.4),
            head=nn.Linear(4 * 36, 3),
        )
        return nn.Sequential(layers)


def linear(num_inputs: int, num_outputs: int = 3, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """One linear layer over the pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(num_inputs, num_outputs)).to(dtype)


def zero(num_inputs: int) -> nn.Module:
    """One linear layer of zeros: the cross-entropy of each example is that of three classes alike, log 3."""
    model = linear(num_inputs)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def stored_weights(run: RunDirectory, path: str) -> dict[str, Tensor]:
    """Those of a run's file, whichever record names it."""
    return safetensors.torch.load(run.read_bytes(path))


def same_bits(a: Any, b: Any) -> bool:
    """Whether nested dicts, lists and tensors are equal to the last bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint gives back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def stop_at(step: int, states: list[dict[str, Any]]) -> Callable[[Progress], bool]:
    """An on_step of minimize() that ends it after the step, and leaves what a checkpoint of then gives back."""

    def stop(progress: Progress) -> bool:
        if progress.step == step:
            states.append(through_a_file(progress.capture()))
        return progress.step == step

    return stop


def resume_at_the_bits(
    network: Callable[..., nn.Module], recipe: MinimizeConfig, step: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Where a minimization of some examples ends, and what its checkpoint after the step has: from there another
    network ends at the same bits."""
    unbroken, resumed, states = network(), network(seed=9), []
    minimize(unbroken, examples(), recipe, seed=5)
    minimize(network(), examples(), recipe, seed=5, on_step=stop_at(step, states))
    minimize(resumed, examples(), recipe, seed=5, state=states[0])
    assert same_bits(weights(resumed), weights(unbroken))
    return weights(unbroken), states[0]


def losses_between_steps(train: Callable[[Callable[[Any], bool]], Any], *, num: int = 100) -> list[float]:
    """What a second thread is answered that asks for the running loss, while training goes on between any two of the
    instructions that answer it: by random schedules of seed 0, each a step at some of them.

    Args:
        train: is given an on_step, of a Progress or of several, and does a few steps for each of `num` questions.
    """
    random, may_step, has_stepped = Random(0), threading.Semaphore(0), threading.Semaphore(0)
    seen: list[Progress] = []
    has_ended = False

    def on_step(told: Progress | Sequence[Progress]) -> bool:
        seen.append(told if isinstance(told, Progress) else told[0])
        has_stepped.release()
        may_step.acquire()
        return has_ended

    def step() -> None:
        may_step.release()
        assert has_stepped.acquire(timeout=60)

    training = threading.Thread(target=train, args=(on_step,))
    training.start()
    assert has_stepped.acquire(timeout=60)
    try:
        with before_instructions(Progress.running_loss, lambda: random.random() < 0.1 and step()):
            return [seen[-1].running_loss() for _ in range(num)]
    finally:
        has_ended = True
        may_step.release()
        training.join()


def measured(script: str, folder: Path, part: pa.Table, nums_of_groups: Sequence[int]) -> dict[str, Any]:
    """The JSON that a script prints in a process of its own, given Parquet files of so many row groups, a part each."""
    paths = [folder / f"{num}.parquet" for num in nums_of_groups]
    for path, num in zip(paths, nums_of_groups, strict=True):
        with pq.ParquetWriter(path, part.schema, compression="none", use_dictionary=False) as writer:
            for _ in range(num):
                writer.write_table(part)
    command = [sys.executable, "-c", script, *map(str, paths)]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    return json.loads(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)


@contextmanager
def before_instructions(of: Callable[..., Any], act: Callable[[], object]) -> Iterator[None]:
    """Act before every bytecode instruction of a function that this thread calls in the block."""

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code is not of.__code__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            act()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def between_instructions(question: Callable[[], Any], of: Callable[..., Any], act: Callable[[], object]) -> list[Any]:
    """Ask a question again and again, and act before the first, second … bytecode instruction of a function that
    answers it, as another thread may. Return an answer for each instruction."""
    answers, num, acts_at = list[Any](), 0, 1

    def count() -> None:
        nonlocal num
        num += 1
        if num == acts_at:
            act()

    while num >= acts_at - 1:
        num = 0
        with before_instructions(of, count):
            answers.append(question())
        acts_at += 1
    return answers[:-1]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set torch's default type for the block."""
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
