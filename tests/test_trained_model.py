import pickle
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import nn

from raysubset import load_model
from raysubset.config import ModelConfig
from raysubset.models import build_model
from raysubset.run_directory import RunDirectory
from raysubset.trained_model import RECORD_PATH, TrainedModel, model_record, save_model

CONFIG = ModelConfig(name="cnn", width=4, depth=1)
SHAPE, MEAN, STD = (6, 5, 3), (0.1, 0.2, 0.3), (0.5, 0.25, 0.125)
NAMES = ("cat", "dog")


@pytest.fixture
def network() -> nn.Module:
    network = build_model(CONFIG, num_classes=2, image_shape=SHAPE, seed=1)
    network.train()(torch.randn(16, 3, 6, 5))  # batch-norm statistics other than the initial ones
    return network.eval()


@pytest.fixture
def run(tmp_path: Path, network: nn.Module) -> RunDirectory:
    run = RunDirectory(str(tmp_path), "a-run")
    record = model_record(CONFIG, num_classes=2, class_names=NAMES, image_shape=SHAPE, mean=MEAN, std=STD)
    save_model(run, network.state_dict(), record)
    return run


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(256, (7, 3, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_loaded_model_is_the_network_on_normalised_images(run: RunDirectory, network: nn.Module, images: torch.Tensor):
    model = load_model(run.uri)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    with torch.no_grad():
        expected = network((images / 255 - mean) / std)
        assert torch.equal(model(images), expected)
        assert torch.equal(model(images / 255), expected)
    assert model.class_names == NAMES
    assert not model.training


def test_images_of_another_shape_are_refused(run: RunDirectory, images: torch.Tensor):
    model = load_model(run.uri)
    for wrong in (images[0], images[:, :2], images.transpose(2, 3)):
        with pytest.raises(ValueError, match=r"this model takes \[N, 3, 6, 5\]"):
            model(wrong)


def test_images_of_another_type_are_refused_and_floats_are_taken_as_the_networks(
    run: RunDirectory, images: torch.Tensor
):
    model = load_model(run.uri)
    with pytest.raises(ValueError, match=r"images are torch\.int64; this model takes uint8, or floats in \[0, 1\]"):
        model(images.long())
    assert torch.allclose(model(images.double() / 255), model(images), atol=1e-5)
    half = model.bfloat16()
    assert half(images).dtype == half(images / 255).dtype == torch.bfloat16


def test_a_folder_without_a_model_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"holds no model\.json"):
        load_model(str(tmp_path / "none"))


def test_nothing_is_unpickled(run: RunDirectory, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("unpickled")

    assert run.list() == ["model.json", "model.safetensors"]
    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    assert isinstance(load_model(run.uri), TrainedModel)


def test_a_file_cut_short_is_named(run: RunDirectory):
    data = run.read_bytes("model.safetensors")
    run.write_bytes("model.safetensors", data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors in .* cannot be read"):
        load_model(run.uri)


def test_a_model_of_a_newer_version_is_refused_with_the_way_out(run: RunDirectory):
    record = run.read_json(RECORD_PATH)
    run.write_json(RECORD_PATH, record | {"model": record["model"] | {"num_heads": 4}})
    with pytest.raises(ValueError, match=r"a-run was made by a newer raysubset .*model\.num_heads.*: update it"):
        load_model(run.uri)
