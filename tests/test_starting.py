"""model.weights: what a run starts from instead of random weights."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from raysubset.cli import call
from raysubset.config import Config
from raysubset.data import FullSet, load_full_set
from raysubset.errors import ChangedFile
from raysubset.models import architecture
from raysubset.pipeline.session import Command
from raysubset.planning import make_plan
from raysubset.run_directory import MODEL_PATH, RunDirectory
from raysubset.tasks import Classification
from raysubset.trained_model import ModelRecord, save_model
from raysubset.work import Minimizer, Piece, perturbed, seeded_model
from raysubset.work.identity import identify
from raysubset.work.starting import random_model, start_note

NETWORK = {"model.name": "mlp", "model.width": 8, "data.name": "iris"}


@pytest.fixture(scope="module")
def full_set() -> FullSet:
    return load_full_set(*Config().with_overrides(NETWORK).learned)


def config_from(path: Path | str, **overrides: Any) -> Config:
    return Config().with_overrides(NETWORK | {"model.weights": str(path)} | overrides)


def weights_of(full_set: FullSet, seed: int = 7) -> dict[str, Tensor]:
    return dict(random_model(Config(seed=seed).with_overrides(NETWORK), full_set).state_dict())


def saved(folder: Path, weights: dict[str, Tensor], file: str = "start.safetensors") -> Path:
    path = folder / file
    save_file(weights, path) if file.endswith(".safetensors") else torch.save(weights, path)
    return path


@pytest.mark.parametrize("place", ["a run", "start.safetensors", "start.pt", "state_dict of a checkpoint"])
def test_the_shared_start_has_the_weights_of_a_run_or_a_file(place: str, full_set: FullSet, tmp_path: Path) -> None:
    weights = weights_of(full_set)
    if place == "a run":
        RunDirectory(str(tmp_path), "a-run").write_weights(MODEL_PATH, weights)
        path = tmp_path / "a-run"
    elif place.startswith("start"):
        path = saved(tmp_path, weights, place)
    else:
        path = tmp_path / "checkpoint.pth"
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": one for name, one in weights.items()}}, path)
    config = config_from(path, seed=1)
    started = seeded_model(config, full_set).state_dict()
    assert all(torch.equal(started[name], weights[name]) for name in weights)
    assert "4 tensors" in start_note(config, full_set)[0].text
    assert [note for note in make_plan(config, full_set).advice if "starts from" in note.text]


def test_what_is_thrown_away_begins_there_again_and_noise_stays_random(full_set: FullSet, tmp_path: Path) -> None:
    config, weights = config_from(saved(tmp_path, weights_of(full_set))), weights_of(full_set)
    again = seeded_model(config, full_set, "fine_tuning").state_dict()
    assert torch.equal(again["head.weight"], weights["head.weight"])
    plain = perturbed(Config().with_overrides(NETWORK), full_set, weights)
    assert torch.equal(perturbed(config, full_set, weights)["head.weight"], plain["head.weight"])


def test_a_head_for_other_classes_is_fresh_and_named(full_set: FullSet, tmp_path: Path) -> None:
    weights = weights_of(full_set)
    weights["head.weight"], weights["head.bias"] = torch.zeros(5, 8), torch.zeros(5)
    config = config_from(saved(tmp_path, weights))
    started, fresh = seeded_model(config, full_set).state_dict(), random_model(config, full_set).state_dict()
    assert torch.equal(started["head.weight"], fresh["head.weight"])
    hidden = next(name for name in weights if not name.startswith("head"))
    assert torch.equal(started[hidden], weights[hidden])
    assert "head.weight, head.bias differ in shape and are fresh" in start_note(config, full_set)[0].text


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (("setosa", "versicolor", "virginica"), ""),
        (("cat", "dog", "setosa"), "; its classes were others, as many as here, whose weights these start from"),
        (("cat", "dog", "fox", "owl"), "; head.weight, head.bias differ in shape and are fresh"),
    ],
)
def test_as_many_other_classes_of_a_finished_run_are_told(
    classes: tuple[str, ...], words: str, full_set: FullSet, tmp_path: Path
) -> None:
    assert isinstance(full_set.task, Classification)
    other = replace(full_set, task=replace(full_set.task, class_names=classes))
    record = ModelRecord(architecture(config_from(tmp_path).model, other.spec), other.task)
    save_model(RunDirectory.at(str(tmp_path)), weights_of(other), record)
    (note,) = start_note(config_from(tmp_path), full_set)
    assert note.text.endswith(f" tensors{words}")
    assert note.is_warning == ("others" in words)


def another_network(folder: Path, full_set: FullSet) -> Path:
    return saved(folder, {"conv.weight": torch.zeros(2, 2), "head.weight": weights_of(full_set)["head.weight"]})


def damaged(folder: Path, full_set: FullSet) -> Path:
    path = saved(folder, weights_of(full_set))
    path.write_bytes(path.read_bytes()[:100])
    return path


class Planted:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/unpickled"),))


def pickled(folder: Path, full_set: FullSet) -> Path:
    torch.save({"head.weight": Planted()}, folder / "start.pt")
    return folder / "start.pt"


def no_tensors(folder: Path, full_set: FullSet) -> Path:
    torch.save({"epoch": 3}, folder / "start.pt")
    return folder / "start.pt"


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (another_network, "is of another network than mlp: it lacks"),
        (damaged, "no tensors can be read"),
        (pickled, "no tensors can be read"),
        (no_tensors, "it holds no state dict"),
        (lambda folder, _: folder / "missing.safetensors", "that path has neither a finished run nor a file"),
        (lambda folder, _: folder, "that path has neither a finished run nor a file"),
        (lambda *_: "pretrained", "pretrained is for torchvision's networks, and model.name = mlp"),
    ],
)
def test_what_cannot_be_started_from_is_refused_in_a_line(
    make: Callable[[Path, FullSet], Path | str], told: str, full_set: FullSet, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        make_plan(config_from(make(tmp_path, full_set)), full_set)
    assert "\n" not in str(caught.value)


def test_pretrained_weights_that_are_not_on_disk_are_named(
    full_set: FullSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    config = config_from("pretrained", **{"model.name": "resnet18", "model.width": None, "data.name": "digits"})
    images = load_full_set(*config.learned)
    with pytest.raises(ValueError, match="nothing is downloaded: get http"):
        start_note(config, images)


def test_pretrained_weights_of_grey_images_lie_behind_what_repeats_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import models

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    network = models.resnet18(num_classes=1000)
    torch.save(network.state_dict(), tmp_path / "checkpoints" / models.ResNet18_Weights.DEFAULT.url.rpartition("/")[2])
    config = config_from("pretrained", **{"model.name": "resnet18", "model.width": None, "data.name": "digits"})
    images = load_full_set(*config.learned)
    started = seeded_model(config, images).state_dict()
    assert torch.equal(started["network.conv1.weight"], network.conv1.weight)
    assert "network.fc.weight, network.fc.bias differ in shape" in start_note(config, images)[0].text


def test_a_file_with_other_bytes_is_another_start(full_set: FullSet, tmp_path: Path) -> None:
    config = config_from(saved(tmp_path, weights_of(full_set)))
    before = identify([config], {config.learned: full_set}, None)
    saved(tmp_path, weights_of(full_set, seed=8))
    (told,) = identify([config], {config.learned: full_set}, None).changed(before)
    assert "start.safetensors has other bytes" in told


def test_a_file_that_is_replaced_while_it_is_in_use_is_not_read(full_set: FullSet, tmp_path: Path) -> None:
    config = config_from(saved(tmp_path, weights_of(full_set)), storage_path=str(tmp_path))
    full_sets = {config.learned: full_set}
    command = partial(Command, "run", config, None, fresh=False, accept_changed_code=False)
    command().load([config], full_sets)
    in_use = pickle.loads(pickle.dumps(full_sets[config.learned]))  # as actors and trials of a sweep get it
    piece, minimizer = (
        Piece(config, RunDirectory(str(tmp_path), "run"), "trunk"),
        Minimizer(lambda: in_use, num_gpus=0, node=""),
    )
    assert minimizer.minimize([piece], None, attempts=[0], waited_s=0.0)[0] is not None
    saved(tmp_path, weights_of(full_set, seed=8))
    full_sets = {config.learned: in_use}
    command().load([config], full_sets)  # a later trial of the sweep
    for later in (in_use, full_sets[config.learned]):
        minimizer = Minimizer(lambda later=later: later, num_gpus=0, node="")
        with pytest.raises(
            ChangedFile, match=r"start.safetensors changed while .*has other bytes: put the old file back"
        ):
            minimizer.minimize([piece], None, attempts=[1], waited_s=0.0)
    saved(tmp_path, weights_of(full_set))
    assert minimizer.minimize([piece], None, attempts=[2], waited_s=0.0)[0] is not None


def test_contradictions_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="would start all subsets alike"):
        config_from("x.pt", **{"subsets.start": "independent", "trunk.epochs": 0.0})
    assert call(["run", "--start-from", "s3://key:secret@bucket/x.pt"]) == 2
    assert "model.weights holds a password" in capsys.readouterr().err
