"""Saves and loads trained models: an nn.Module that includes its scaling and names, in safetensors and JSON."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any, Self

import pyarrow as pa
import torch
from torch import Tensor, nn

from raysubset.config import ModelConfig
from raysubset.errors import first_line
from raysubset.events import Note
from raysubset.models import build_model, dtype_of, torch_as_new
from raysubset.objects_in_hand import hold_objects_of
from raysubset.run_directory import MODEL_PATH, MODEL_RECORD_PATH, SAMPLES_PATH, RunDirectory, Seal
from raysubset.tasks import (
    ImageInputs,
    NextToken,
    Regression,
    Rows,
    Spec,
    TableInputs,
    Task,
    TensorInputs,
    outline,
    task_from_dict,
    task_to_dict,
)
from raysubset.trained_model.network_graph import GraphNetwork, trace
from raysubset.training import Weights
from raysubset.user_code.given import is_given

_NUM_SAMPLES, _NUM_SAMPLED_TOKENS = 3, 200  # of the texts that a report shows
_MOST_MULTIPLIED = 2**40  # weights times tokens that pass, for all of them: half a minute of a CPU core
GRAPH_PATH, CONSTANTS_PATH = "model.graph.json", "model.constants.safetensors"  # of a user's own network


@dataclasses.dataclass(frozen=True)
class ModelRecord:
    """model.json: everything that load_model() needs besides the weights."""

    model: ModelConfig
    task: Task

    @property
    def spec(self) -> Spec:
        """The shapes that the network takes and gives for one example."""
        return self.task.spec()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; raise a ValueError for a user's task that JSON cannot hold."""
        record = {"model": dataclasses.asdict(self.model), **task_to_dict(self.task)}
        return record | {"task": record["task"] | outline(self.task)} if "task" in record else record

    @classmethod
    def from_dict(cls, record: Any, *, trust_code: bool = False) -> "ModelRecord":
        """Read the record of a file, which may hold anything.

        Raises:
            ValueError: if a value is missing or has the wrong type or range.
        """
        flat = ("num_classes", "class_names", "image_shape", "mean", "std", "grey_range")
        fields = {"model", "task"} if isinstance(record, dict) and "task" in record else {"model", *flat}
        if not isinstance(record, dict) or not isinstance(record.get("model"), dict) or fields - record.keys():
            raise ValueError("it is no record of a model")
        known = {field.name for field in dataclasses.fields(ModelConfig)}
        if unknown := [*(f"model.{name}" for name in sorted(record["model"].keys() - known)), *record.keys() - fields]:
            raise ValueError(f"it has {', '.join(unknown)}, which this version lacks: update raysubset")
        task = task_from_dict(record, trust_code=trust_code)
        return cls(ModelConfig(**record["model"]), task)


class TrainedModel(nn.Module):
    """A network with its scaling: it takes raw inputs and returns outputs in the targets' units."""

    mean: Tensor
    std: Tensor
    target_mean: Tensor
    target_std: Tensor

    def __init__(self, network: nn.Module, record: ModelRecord) -> None:
        super().__init__()
        self.network, self.record, self.spec = network, record, record.spec
        task = record.task
        self.class_names = task.class_names
        inputs = getattr(task, "inputs", None)  # which a user's task may have for something else
        self.inputs = inputs if isinstance(inputs, ImageInputs | TableInputs | TensorInputs) else None
        if isinstance(self.inputs, ImageInputs):
            self.image_shape = self.inputs.image_shape  # (H, W, C)
        for name, values in self._scaling().items():
            self.register_buffer(name, values, persistent=False)

    def _scaling(self) -> dict[str, Tensor]:
        """Return the scaling of inputs and outputs, as the record has it."""
        scaling = {}
        if self.inputs is not None and self.spec.num_values is None:
            scaling["mean"], scaling["std"] = self.inputs.scaling()
        if isinstance(self.record.task, Regression):
            scaling["target_mean"], scaling["target_std"] = self.record.task.scaling_of_outputs()
        return scaling

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the network, and take its scaling anew: half precision would round it, MPS refuses float64, and
        the meta device forgets it."""
        scaling, self._buffers = self._buffers, {}
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers = scaling
        to = next(self.network.parameters())
        for name, values in self._scaling().items():
            wide = torch.promote_types(values.dtype, dtype_of(self.network))
            self._buffers[name] = values.to(to.device, torch.float32 if to.device.type == "mps" else wide)
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        """Return outputs float32 [N, *spec.outputs]: logits for classes, numbers in the targets' units for regression.

        Numbers are float64 for inputs in float64: float32 has steps of 128 at the seconds of a date.

        Args:
            inputs: [N, *spec.inputs]. Images have the training images' size and are uint8, or float in [0, 1]. A
                table's features are raw, in the order of feature_names, with categories as 0 and 1, and, if
                data.missing is mean, NaN for missing values. Tokens are integers.

        Raises:
            ValueError: if the shape or type is wrong.
        """
        is_image = isinstance(self.inputs, ImageInputs)
        shape, noun = list(self.spec.inputs), "images" if is_image else "inputs"
        if list(inputs.shape[1:]) != shape:
            sizes = ", ".join(map(str, shape))
            raise ValueError(f"{noun} of shape {tuple(inputs.shape)}; this model takes [N, {sizes}]")
        if self.spec.are_integers:
            if inputs.is_floating_point() or inputs.is_complex():
                text = f"inputs are {inputs.dtype}; this model takes integers from 0, less than"
                raise ValueError(f"{text} {self.spec.num_values}")
            return self.network(inputs.long())
        if not inputs.is_floating_point() and not (is_image and inputs.dtype == torch.uint8):
            takes = "uint8, or floats in [0, 1]" if is_image else "floats"
            raise ValueError(f"{noun} are {inputs.dtype}; this model takes {takes}")
        scaled = inputs.to(self.mean.dtype) if is_image else inputs
        if inputs.dtype == torch.uint8:
            scaled = scaled / 255
        if self.inputs is not None:  # scaled in the inputs' own precision, then cast to the network's
            scaled = (scaled - self.mean.to(scaled.dtype)) / self.std.to(scaled.dtype)
            scaled = scaled.to(dtype_of(self.network))
        if isinstance(self.inputs, TableInputs) and self.inputs.missing == "mean":
            scaled = torch.nan_to_num(scaled, nan=0.0, posinf=torch.inf, neginf=-torch.inf)
        return self._in_units(self.network(scaled), inputs.dtype)

    def of_table(self, table: pa.Table) -> tuple[Tensor, tuple[Note, ...]]:
        """Return outputs, as forward() does of float64, for the rows of a table with the training table's columns.

        Notes tell of values that it lacks, or that training did not have.

        Raises:
            ValueError: if the model was not trained on a table, a column is missing, or it cannot take the values.
        """
        if not isinstance(self.inputs, TableInputs):
            raise ValueError("this model was not trained on a table's columns: give it what it was trained on")
        remedy = "fill it in, leave such rows out, or train with --data.missing mean"
        features, notes = self.inputs.encode(table, remedy=remedy)
        inputs = torch.from_numpy(features).to(next(self.network.parameters()))
        return self._in_units(self.network(inputs), torch.float64), notes

    def generate(self, text: str, num_tokens: int = 200, *, seed: int = 0, temperature: float = 0.8) -> str:
        """Continue a text, drawing one token after another from the model's prediction.

        If the text has more tokens than the window, only the last ones count. Outputs are divided by the temperature;
        temperature 0 takes the most probable token.

        Raises:
            ValueError: if the model does not predict tokens, or the text is empty.
        """
        task = self.record.task
        if not isinstance(task, NextToken):
            raise ValueError(f"this model's task is {task.name}, not next_token: it cannot continue a text")
        tokens, generator = task.vocabulary.encode(text).tolist(), torch.Generator().manual_seed(seed)
        if not tokens:
            raise ValueError("an empty text cannot be continued: give a few characters")
        prompt_length, device = len(tokens), next(self.network.parameters()).device
        with torch.inference_mode():
            for _ in range(num_tokens):
                context = tokens[-task.window :]
                padded = torch.tensor([context + [0] * (task.window - len(context))], device=device)
                outputs = self.network(padded)[0, len(context) - 1].float().cpu()
                if (unknown := task.vocabulary.unknown) is not None:
                    outputs[unknown] = -torch.inf
                if temperature:
                    tokens.append(int((outputs / temperature).softmax(0).multinomial(1, generator=generator)))
                else:
                    tokens.append(int(outputs.argmax()))
        return task.vocabulary.decode(tokens[prompt_length:])

    def _in_units(self, outputs: Tensor, dtype: torch.dtype) -> Tensor:
        """Return numbers in the targets' units, float32 or, if `dtype` is, float64; classes unchanged."""
        if not isinstance(self.record.task, Regression):
            return outputs
        widest = torch.promote_types(outputs.dtype, torch.float32)  # half precision ends at 65,504
        wide = outputs.to(torch.float64 if dtype == torch.float64 else widest)
        return wide * self.target_std.to(wide.dtype) + self.target_mean.to(wide.dtype)


def save_model(
    directory: RunDirectory, weights: Weights, record: ModelRecord, *, network: nn.Module | None = None
) -> tuple[dict[str, Seal], str | None]:
    """Write the weights, for a user's own network also its graph, and then the record that names these files.

    Args:
        record: a record of this process's own config: a user's function that it names may be called.
        network: the user's own network, on the CPU, which loads the weights; by default the record's function makes it.

    Returns:
        The seals of the written files by path; and the reason why the graph could not be kept, so that load_model()
        will need the user's code, or None.
    """
    files, problem = {MODEL_PATH: directory.write_weights(MODEL_PATH, weights)}, None
    if record.model.is_function:
        network = network or build_model(record.model, record.spec)
        network.load_state_dict(weights)
        try:
            graph, constants = trace(network, record.spec)
        except ValueError as error:
            problem = str(error)
        else:
            files[CONSTANTS_PATH] = directory.write_weights(CONSTANTS_PATH, constants)
            files[GRAPH_PATH] = directory.write_json(GRAPH_PATH, graph)
    seal = directory.write_json(MODEL_RECORD_PATH, record.to_dict() | {"files": files})
    return {**files, MODEL_RECORD_PATH: seal}, problem


def leave_samples(directory: RunDirectory, weights: Weights, record: ModelRecord, rows: Rows) -> dict[str, Seal]:
    """Write how a next-token model continues the first half of some windows, as a list of {"prompt", "text"}.

    The rows are those of the test split. Large networks continue them by fewer tokens. No ledger counts this.
    """
    network, task = build_model(record.model, record.spec), record.task
    assert isinstance(task, NextToken)
    network.load_state_dict(weights)
    model = TrainedModel(network, record).eval()
    halves = [tokens[: task.window // 2 + 1].numpy() for tokens in rows["tokens"][:_NUM_SAMPLES]]
    prompts = [task.vocabulary.decode(tokens) for tokens in halves]
    num_weights = sum(tensor.numel() for tensor in weights.values())
    most = _MOST_MULTIPLIED // (num_weights * task.window * _NUM_SAMPLES)
    num_tokens = max(1, min(_NUM_SAMPLED_TOKENS, most))
    samples = [{"prompt": prompt, "text": model.generate(prompt, num_tokens)} for prompt in prompts]
    return {SAMPLES_PATH: directory.write_json(SAMPLES_PATH, samples)}


def load_model(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    trust_code: bool = False,
    model: Any = None,
    task: Any = None,
) -> TrainedModel:
    """Load the final model of a run, in evaluation mode.

    The directory may be a stranger's: loading unpickles, imports and calls nothing that it names. A user's own network
    is computed from the graph that the run kept of it, without its code. A user's own task is then a RecordedTask,
    whose spec() tells what the network takes.

    Args:
        path: the run directory, a path or a URI.
        device: the device of the model.
        trust_code: build a user's own network and task with their code instead, the package.module:function in
            model.json. Use this for directories of people you trust, if the run kept no graph, to train the network
            further, or for the task's batch() and measure().
        model: the network that run() was given as an object. It is used instead of the graph.
        task: the task that run() was given as an object, or its class, for its batch() and measure().

    Raises:
        ValueError: if there is no finished run, it is damaged or of a newer version, or its network needs code.
    """
    directory = RunDirectory.at(os.fspath(path))
    if not directory.exists(MODEL_RECORD_PATH):
        raise ValueError(
            f"{directory.uri} holds no {MODEL_RECORD_PATH}: it is no run directory, or one that is not finished: give "
            "another"
        )
    tree = directory.read_json(MODEL_RECORD_PATH)
    files = tree.pop("files", None) if isinstance(tree, dict) else None
    files = files if isinstance(files, dict) else {}
    with torch_as_new(), hold_objects_of({"model": model, "task": task}, tree):
        try:
            record = ModelRecord.from_dict(tree, trust_code=trust_code)
        except ValueError as error:
            raise ValueError(f"{MODEL_RECORD_PATH} in {directory.uri} cannot be used: {error}") from error
        try:
            network = _network(directory, record, files, trust_code=trust_code or model is not None)
        except RuntimeError as error:
            text = f"{MODEL_PATH} in {directory.uri} are not of {record.model.name}: {first_line(error)}"
            raise ValueError(text) from error
        return TrainedModel(network, record).eval().to(device)


def _network(directory: RunDirectory, record: ModelRecord, files: Mapping[str, Seal], *, trust_code: bool) -> nn.Module:
    """Build the network of the record and load the weights.

    Raises:
        ValueError: if it is a user's own network without a graph, and trust_code is False.
        RuntimeError: if the weights are another network's.
    """
    weights = directory.read_weights(MODEL_PATH, files)
    if not record.model.is_function:
        return _named_network(record, weights)
    if trust_code:
        network = build_model(record.model, record.spec)
        network.load_state_dict(weights)
        return network
    if not directory.exists(GRAPH_PATH):
        if is_given(record.model.name):
            raise ValueError(
                f"the network of {directory.uri} was an object in Python, {record.model.name}, whose graph could not "
                "be kept: give it again, load_model(…, model=…)"
            )
        module, _, function = record.model.name.partition(":")
        raise ValueError(
            f"the network of {directory.uri} is code that it only names: load_model() would import {module!r} from "
            f"{os.getcwd()} or what is installed, and call its {function!r}. If you trust whoever made this "
            "directory, give trust_code=True or --trust-code"
        )
    tensors = {**weights, **directory.read_weights(CONSTANTS_PATH, files)}
    try:
        return GraphNetwork(directory.read_json(GRAPH_PATH), tensors, record.spec)
    except ValueError as error:
        raise ValueError(f"{GRAPH_PATH} in {directory.uri} cannot be used: {error}") from error


def _named_network(record: ModelRecord, weights: Mapping[str, Tensor]) -> nn.Module:
    """Build one of this package's or torchvision's networks with these weights.

    No memory is allocated for sizes that are not those of the weights.

    Raises:
        RuntimeError: if the sizes are not those of the weights.
    """
    if (record.model.depth or 0) > len(weights):
        raise RuntimeError(f"depth = {record.model.depth}, and there are {len(weights)} tensors")
    try:
        with torch.device("meta"):
            network = build_model(record.model, record.spec)
    except NotImplementedError:  # torchvision's regnets, whose size follows from their name
        network = build_model(record.model, record.spec)
    except (ValueError, TypeError, OverflowError) as error:  # the last two for a width beyond 64 bits
        raise RuntimeError(first_line(error)) from error
    for name, tensor in network.state_dict().items():
        if name in weights and weights[name].dtype != tensor.dtype:
            raise RuntimeError(f"{name} is {weights[name].dtype}, not {tensor.dtype}")
    network.load_state_dict({name: tensor.clone() for name, tensor in weights.items()}, assign=True)
    return network
