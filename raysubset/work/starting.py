"""seeded_model(): the network that a run starts from, with seeded weights or those that model.weights names."""

import io
import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any, cast

import pyarrow as pa
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from raysubset.config import Config, ModelConfig, derive_seed
from raysubset.data import FullSet
from raysubset.errors import ChangedFile, first_line, listed
from raysubset.events import Note
from raysubset.fingerprints import Entry, changes, fingerprint, hasher
from raysubset.models import architecture, build_model
from raysubset.run_directory import FROZEN_FOLDER, MODEL_PATH, MODEL_RECORD_PATH, RunDirectory
from raysubset.run_directory.weights_files import frozen_of
from raysubset.tasks import Task, task_from_dict
from raysubset.training import Weights

PRETRAINED = "pretrained"
_WORTH_A_FILE = 2**16  # bytes of weights


def seeded_model(config: Config, full_set: FullSet, start_id: str = "initial") -> nn.Module:
    """Return the config's network at the start of a run, with the weights that model.weights names, or seeded ones.

    Args:
        start_id: "initial" for the shared start; every other name has its own seeded weights.

    Raises:
        ValueError: if model.weights does not exist, or is of another network.
        ChangedFile: if it is another file than full_set.start_weights knows.
    """
    model = random_model(config, full_set, start_id)
    if config.model.weights:
        _load(config.model, model, _read(config.model, full_set))
    return model


def random_model(config: Config, full_set: FullSet, start_id: str = "initial") -> nn.Module:
    """Return the config's network with seeded weights, whatever model.weights says."""
    path = ("start",) if start_id == "initial" else ("start", start_id)
    return build_model(config.model, full_set.spec, seed=derive_seed(config.seed, *path))


def fixed_weights(start: Weights, averaged: Collection[str]) -> Weights:
    """Return the start weights that training usually leaves as they are; none if they are not worth a file.

    Args:
        averaged: models.averaged_names(), which training changes. The rest are frozen parameters, masks and the like.
    """
    fixed = {name: tensor for name, tensor in start.items() if name not in averaged}
    return fixed if sum(tensor.nbytes for tensor in fixed.values()) >= _WORTH_A_FILE else {}


def unchanged_names(weights: Weights, fixed: Weights) -> frozenset[str]:
    """Return the names of the fixed weights that are what they were."""
    return frozenset(name for name, tensor in fixed.items() if torch.equal(weights[name].cpu(), tensor))


def restore_frozen(directory: RunDirectory, path: str, start: Weights) -> bool:
    """Write a file of frozen weights again, as these start weights hold them: the names that files which share it lack.

    Returns:
        False if no file shares it, or its content was other; then it is gone.
    """
    for other in directory.list("", recursive=True):
        if other.endswith(".safetensors") and other != path:
            data = directory.read_bytes(other)
            with suppress(ValueError, safetensors.SafetensorError):  # of a file that is damaged too
                if frozen_of(io.BytesIO(data)) == path:
                    changed = safetensors.torch.load(data)
                    seal = directory.write_weights(path, {n: t for n, t in start.items() if n not in changed})
                    if seal.rpartition(" ")[2].startswith(path.removeprefix(f"{FROZEN_FOLDER}/").partition(".")[0]):
                        return True
    directory.delete(path)
    return False


def start_note(config: Config, full_set: FullSet) -> list[Note]:
    """Return a note on the weights that a run starts from, if model.weights names any: how many tensors were used.

    It warns if a finished run's weights fit, but had as many other classes, features or tokens.
    """
    if not config.model.weights:
        return []
    model, weights = random_model(config, full_set), _read(config.model, full_set)
    fresh = _load(config.model, model, weights)
    exception = f"; {listed(fresh)} differ in shape and are fresh" if fresh else ""
    num_loaded = len(model.state_dict()) - len(fresh)
    if others := _other_meanings(config.model, full_set):
        exception += f"; its {' and '.join(others)} were others, as many as here, whose weights these start from"
    return [Note(f"starts from {config.model.weights}: {num_loaded} tensors{exception}", is_warning=bool(others))]


def _other_meanings(config: ModelConfig, full_set: FullSet) -> list[str]:
    """Return what rows of weights stand for, where it was something else in the finished run that they are of."""
    directory, file = _weights_file(architecture(config, full_set.spec))
    if file != MODEL_PATH or not directory.exists(MODEL_RECORD_PATH):
        return []
    try:
        before, now = (
            _meanings(task) for task in (task_from_dict(directory.read_json(MODEL_RECORD_PATH)), full_set.task)
        )
    except (ValueError, KeyError):  # of a user's own task, whose code is not imported for a note
        return []
    return [name for name, value in now.items() if value != before[name] and len(value) == len(before[name])]


def _meanings(task: Task) -> dict[str, Any]:
    return {
        "classes": task.class_names,
        "targets": getattr(task, "target_names", ()),
        "features": getattr(getattr(task, "inputs", None), "feature_names", ()),
        "tokens": getattr(task, "vocabulary", ()),
    }


def weights_name(config: ModelConfig) -> str:
    """Return what identities call the file that model.weights names."""
    return f"weights {config.weights}"


def weights_fingerprint(config: ModelConfig) -> pa.Table:
    """Return a digest of the file that model.weights names.

    Raises:
        ValueError: if there is none.
    """
    directory, file = _weights_file(config)
    return _fingerprint(file, directory.read_bytes(file))


def _fingerprint(file: str, data: bytes) -> pa.Table:
    return fingerprint([Entry(file, len(data), hasher(data).hexdigest())])


def _weights_file(config: ModelConfig) -> tuple[RunDirectory, str]:
    """Return the folder and name of the file that model.weights names.

    Raises:
        ValueError: if there is none.
    """
    assert config.weights
    if config.weights == PRETRAINED:
        return _pretrained_file(config.name)
    directory = RunDirectory.at(config.weights)
    if directory.exists(MODEL_PATH):
        return directory, MODEL_PATH
    if not directory.name.endswith((".safetensors", ".pt", ".pth")) or not directory.exists(""):
        raise ValueError(
            f"model.weights = {config.weights}: that path has neither a finished run nor a file of weights "
            "(.safetensors, .pt, .pth)"
        )
    return RunDirectory.at(directory.storage_path), directory.name


def _pretrained_file(name: str) -> tuple[RunDirectory, str]:
    """Return the file of torchvision's default weights of a network, in torch.hub's folder of downloads."""
    from torchvision import models

    if name not in models.list_models(module=models):
        raise ValueError(f"model.weights = {PRETRAINED} is for torchvision's networks, and model.name = {name}")
    url = cast(Any, models.get_model_weights(name)).DEFAULT.url
    folder, file = os.path.join(torch.hub.get_dir(), "checkpoints"), url.rpartition("/")[2]
    if not os.path.exists(os.path.join(folder, file)):
        raise ValueError(
            f"model.weights = {PRETRAINED}: {file} is not in {folder}, and nothing is downloaded: get {url}"
        )
    return RunDirectory.at(folder), file


def _read(config: ModelConfig, full_set: FullSet) -> dict[str, Tensor]:
    """Return the tensors of the file that model.weights names, by name. Pickles are read with weights_only=True."""
    directory, file = _weights_file(architecture(config, full_set.spec))
    data = directory.read_bytes(file)
    name, new = weights_name(config), _fingerprint(file, data)
    if difference := changes(full_set.start_weights.get(name, new), new):
        raise ChangedFile(
            f"{name} changed while they were in use: {listed(difference)}: put the old file back, and the same command "
            "resumes; or start over with --fresh, or under another --name"
        )
    try:
        if file.endswith(".safetensors"):
            content: Any = safetensors.torch.load(data)
        else:
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            if isinstance(content, Mapping):
                content = content.get("state_dict", content.get("model", content))
    except Exception as error:  # a damaged file, or a pickle of more than tensors, may raise anything
        raise ValueError(f"model.weights = {config.weights}: no tensors can be read ({first_line(error)})") from error
    if not isinstance(content, Mapping) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise ValueError(f"model.weights = {config.weights}: it holds no state dict of tensors by name")
    return {str(name).removeprefix("module."): tensor for name, tensor in content.items()}


def _load(config: ModelConfig, model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Put weights into a model, and return the names of those that keep their own values because their shapes differ.

    Raises:
        ValueError: if names differ, or no shape agrees.
    """
    model_tensors = model.state_dict()
    if not model_tensors.keys() & weights.keys():  # a module that repeats grey images wraps it
        weights = {f"network.{name}": tensor for name, tensor in weights.items()}
    auxiliary = ("aux", "AuxLogits", "network.aux", "network.AuxLogits")  # heads that torchvision trains with
    missing = [name for name in model_tensors if name not in weights]
    unknown = [name for name in weights if name not in model_tensors and not name.startswith(auxiliary)]
    fresh = [name for name, tensor in model_tensors.items() if name in weights and weights[name].shape != tensor.shape]
    if missing or unknown or len(fresh) == len(model_tensors):
        flaws = [f"it lacks {listed(missing)}"] if missing else []
        flaws += [f"{listed(unknown)} are not the network's"] if unknown else []
        reason = "; ".join(flaws or ["no tensor has the shape of the network's"])
        raise ValueError(f"model.weights = {config.weights} is of another network than {config.name}: {reason}")
    with torch.no_grad():
        for name, tensor in model_tensors.items():
            if name not in fresh:
                tensor.copy_(weights[name])
    return fresh
