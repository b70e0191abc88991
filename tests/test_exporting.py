"""Exported files compute what the model does; predictions of files are the model's."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pyarrow import csv, ipc

from raysubset import load_model
from raysubset.cli import call
from raysubset.config import Config, DataConfig, ModelConfig
from raysubset.models import build_model
from raysubset.run_directory import RunDirectory
from raysubset.run_directory.directory import FORMAT
from raysubset.tasks import Spec
from raysubset.trained_model import TrainedModel, save_model
from raysubset.trained_model.exporting import export_model, predict_files
from tests.tiny import image_record, stored_weights

NAMES = ("cat", "a\ndog", "é, el")


def saved(folder: Path, model: ModelConfig, shape: tuple[int, int, int]) -> str:
    """A run directory that holds a model with batch-norm statistics other than the initial ones."""
    network = build_model(model, Spec((shape[2], *shape[:2]), (3,)), seed=1)
    network.train()(torch.randn(16, shape[2], *shape[:2]))
    run = RunDirectory(str(folder), "a-run")
    save_model(run, network.state_dict(), image_record(model, NAMES, shape, 0.1, 0.5))
    return run.uri


@pytest.fixture
def directory(tmp_path: Path) -> str:
    return saved(tmp_path, ModelConfig(name="cnn", width=4, depth=2), (8, 8, 1))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def test_the_torch_export_file_computes_the_same_for_any_number_of_images(directory: str, images, tmp_path: Path):
    path = export_model(directory, str(tmp_path / "out" / "m.pt2"), format="torch-export")
    extra = {"class_names": ""}
    program = torch.export.load(path, extra_files=extra).module()
    with torch.no_grad():
        for num in (1, 5):
            torch.testing.assert_close(program(images[:num]), load_model(directory)(images[:num]))
    assert json.loads(extra["class_names"]) == list(NAMES)


@pytest.mark.parametrize("missing", ["onnxruntime", "onnxscript._framework_apis.torch_2_99"])
def test_a_package_for_onnx_that_is_missing_or_too_old_is_named(
    missing: str, directory: str, tmp_path: Path, monkeypatch
):
    def needs_a_newer_onnxscript(*arguments: Any, **options: Any) -> None:
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(torch.onnx, "export", needs_a_newer_onnxscript)
    with pytest.raises(ValueError, match=rf"ONNX export needs {missing}: pip install -U 'raysubset\[export\]'"):
        export_model(directory, str(tmp_path / "m.onnx"), format="onnx")


@pytest.mark.parametrize("model", [ModelConfig(name="cnn"), ModelConfig(name="resnet18")], ids=lambda model: model.name)
def test_the_onnx_file_computes_the_same_in_onnxruntime(model: ModelConfig, tmp_path: Path):
    import onnxruntime

    directory = saved(tmp_path, model, (32, 32, 3))
    session = onnxruntime.InferenceSession(export_model(directory, str(tmp_path / "m.onnx"), format="onnx"))
    images = torch.rand(5, 3, 32, 32)
    with torch.no_grad():
        expected = load_model(directory)(images).numpy()
    for num in (1, 5):
        (found,) = session.run(["outputs"], {"images": images[:num].numpy()})
        np.testing.assert_allclose(found, expected[:num], rtol=1e-4, atol=1e-4)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["class_names"]) == list(NAMES)
    assert json.loads(metadata["image_shape"]) == [32, 32, 3]


def test_a_file_of_the_wrong_suffix_is_refused(directory: str):
    with pytest.raises(ValueError, match=r"must end in \.onnx"):
        export_model(directory, "model.pt2", format="onnx")


def test_a_folder_without_a_model_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="no run directory, or one that is not finished"):
        export_model(str(tmp_path), format="onnx")


def test_predictions_of_files_are_the_models_own(directory: str, tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(np.stack([pixels] * 3, axis=2)).save(tmp_path / "coloured.png")
    grey, coloured = predict_files(directory, [str(tmp_path / "a.png"), str(tmp_path / "coloured.png")])
    with torch.no_grad():
        expected = load_model(directory)(torch.from_numpy(pixels)[None, None]).softmax(1)[0]
    assert grey.classes[0] == NAMES[int(expected.argmax())]
    assert grey.probabilities == pytest.approx(sorted(expected.tolist(), reverse=True), abs=1e-6)
    assert (coloured.classes, coloured.probabilities) == (grey.classes, pytest.approx(grey.probabilities, abs=0.02))


def test_greys_of_twelve_bits_are_predicted_as_they_were_trained_on(directory: str, tmp_path: Path):
    run = RunDirectory.at(directory)
    run.write_json("model.json", run.read_json("model.json") | {"grey_range": [0, 4095]})
    greys = np.random.default_rng(0).integers(0, 4096, (8, 8), dtype=np.uint16)
    Image.fromarray(greys).save(tmp_path / "deep.png")
    Image.fromarray(np.rint(greys / (4095 / 255)).astype(np.uint8)).save(tmp_path / "same.png")
    Image.fromarray(greys * 2).save(tmp_path / "brighter.png")
    names = [str(tmp_path / f"{name}.png") for name in ("deep", "same", "brighter")]
    deep, same, brighter = predict_files(directory, names)
    assert (deep.classes, deep.probabilities) == (same.classes, same.probabilities)
    assert brighter.error is not None
    assert "beyond 0 to 4095, which the full set uses" in brighter.error


def test_images_of_another_size_are_resized(directory: str, tmp_path: Path):
    Image.fromarray(np.full((40, 60, 3), 200, dtype=np.uint8)).save(tmp_path / "photo.jpg")
    (prediction,) = predict_files(directory, [str(tmp_path / "photo.jpg")])
    assert set(prediction.classes) == set(NAMES)


def test_files_that_cannot_be_read_leave_the_others_their_answers(directory: str, tmp_path: Path, capsys):
    good, bad = str(tmp_path / "a.png"), str(tmp_path / "bad.png")
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(good)
    Path(bad).write_bytes(b"x")
    assert call(["predict", directory, good, bad, "none.png", good]) == 2
    printed = capsys.readouterr()
    assert printed.out.count(f"{good}: ") == 2
    assert [line.split(":")[1].split()[0] for line in printed.err.splitlines()] == [bad, "none.png"]
    assert call(["predict", directory, good, bad, "--format", "json"]) == 2
    answered, refused = map(json.loads, capsys.readouterr().out.splitlines())
    assert set(answered) == {"path", "classes", "probabilities"}
    assert set(refused) == {"path", "error"}


def test_outputs_that_are_no_numbers_are_an_error_and_not_nan(directory: str, tmp_path: Path, capsys):
    run = RunDirectory.at(directory)
    weights = stored_weights(run, "model.safetensors")
    weights = {k: t * float("nan") if t.is_floating_point() else t for k, t in weights.items()}
    save_model(run, weights, load_model(directory).record)
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(tmp_path / "a.png")
    assert call(["predict", directory, str(tmp_path / "a.png"), "--format", "json"]) == 2
    printed = capsys.readouterr()
    assert "NaN" in json.loads(printed.out, parse_constant=pytest.fail)["error"]
    assert printed.err.endswith("a.png: the network's outputs are NaN or infinite\n")


def test_files_are_predicted_a_batch_at_a_time(directory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("raysubset.trained_model.exporting._MOST_IMAGES", 2)
    paths = [str(tmp_path / f"{i}.png") for i in range(5)]
    for i, path in enumerate(paths):
        Image.fromarray(np.full((8, 8), 50 * i, dtype=np.uint8)).save(path)
    sizes: list[int] = []
    forward = TrainedModel.forward

    def counted(model: TrainedModel, images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        return forward(model, images)

    monkeypatch.setattr(TrainedModel, "forward", counted)
    found = list(predict_files(directory, paths))
    assert sizes == [2, 2, 1]
    assert [prediction.path for prediction in found] == paths
    for prediction in found:
        (alone,) = predict_files(directory, [prediction.path])
        assert prediction.probabilities == pytest.approx(alone.probabilities, abs=1e-6)


def test_a_users_network_is_exported_and_predicts_without_its_code(tmp_path: Path):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    run = RunDirectory(str(tmp_path), "a-run")
    record = image_record(ModelConfig(name="their_net:net"), NAMES, (8, 8, 1), 0.1, 0.5)
    save_model(run, network.state_dict(), record, network=network)
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(tmp_path / "a.png")
    (prediction,) = predict_files(run.uri, [str(tmp_path / "a.png")])
    expected = network(torch.full((1, 1, 8, 8), -0.2)).softmax(1)[0]
    assert prediction.probabilities == pytest.approx(sorted(expected.tolist(), reverse=True), abs=1e-6)
    for suffix, format in ((".pt2", "torch-export"), (".onnx", "onnx")):
        export_model(run.uri, str(tmp_path / f"m{suffix}"), format=format)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["predict", "{run}", "nowhere.png"], "nowhere.png: No such file"),
        (["predict", "{run}", "{run}/model.json"], "model.json cannot be decoded: cannot identify image file\n"),
        (["export", "{run}", "--format", "onx"], "--format: invalid choice: 'onx' (choose from"),
        (["export", "nowhere"], "no run directory"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], told: str, directory: str, capsys):
    assert call([argument.format(run=directory) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_the_commands_print_what_scripts_read(directory: str, tmp_path: Path, capsys):
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(tmp_path / "a.png")
    assert call(["predict", directory, str(tmp_path / "a.png"), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["classes"][0] in NAMES
    assert call(["export", directory, "--to", str(tmp_path / "m.pt2")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "m.pt2")


@pytest.mark.parametrize("kind", ["encoded", "struct", "tensors", "arrow", "paths", "csv"])
def test_rows_of_a_table_of_images_are_predicted_as_their_files_are(kind: str, directory: str, tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8), dtype=np.uint8)
    files = [tmp_path / f"{number}.png" for number in range(5)]
    for image, file in zip(pixels, files, strict=True):
        Image.fromarray(image).save(file)
    column: Any = [file.read_bytes() for file in files]
    if kind == "struct":
        column = [{"bytes": data, "path": "a.png"} for data in column]
    if kind == "tensors":
        column = pa.FixedShapeTensorArray.from_numpy_ndarray(pixels)
    if kind in ("paths", "csv"):
        column = [file.name for file in files]
    table, path = pa.table({"image": column, "label": range(5)}), str(tmp_path / "set.parquet")
    if kind == "arrow":
        path = str(tmp_path / "set.arrow")
        with ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    elif kind == "csv":
        path = str(tmp_path / "set.csv")
        csv.write_csv(table, path)
    else:
        pq.write_table(table, path)
    found = list(predict_files(directory, [str(files[1]), path, str(files[2])]))
    expected = list(predict_files(directory, [*map(str, files)]))
    assert [(one.path, one.row) for one in found] == [
        (str(files[1]), None),
        *((path, row) for row in range(5)),
        (str(files[2]), None),
    ]
    for one, other in zip(found, [expected[1], *expected, expected[2]], strict=True):
        assert one.classes == other.classes
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-6)


def test_an_image_of_a_table_that_cannot_be_read_is_named(directory: str, tmp_path: Path, capsys):
    file, path = tmp_path / "a.png", tmp_path / "set.parquet"
    Image.fromarray(np.full((6, 9, 3), 90, dtype=np.uint8)).save(file)
    pq.write_table(pa.table({"image": [file.read_bytes(), b"x", file.read_bytes()]}), path)
    assert call(["predict", directory, str(path)]) == 2
    printed = capsys.readouterr()
    assert [row for row in range(3) if f"{path}, row {row}: " in printed.out] == [0, 2]
    assert f"the image in row 1 of {path} cannot be decoded: cannot identify image file\n" in printed.err


def test_a_table_of_images_is_read_by_the_column_that_training_read(directory: str, tmp_path: Path, capsys):
    file, path = tmp_path / "a.png", tmp_path / "set.parquet"
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(file)
    pq.write_table(pa.table({"pictures": [file.read_bytes()], "n": [1]}), path)
    assert call(["predict", directory, str(path), str(file)]) == 2
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{file}: ")
    assert f"{path} has no column image, only pictures, n" in printed.err
    assert printed.err.count("\n") == 1
    config = Config(data=DataConfig(image_column="pictures")).to_dict()
    RunDirectory.at(directory).write_json("config.json", {"format": FORMAT, "config": config})
    assert call(["predict", directory, str(path)]) == 0
    for column, told in ((["b.png"], "there is no image"), ([None], "null")):
        pq.write_table(pa.table({"pictures": pa.array(column, pa.string())}), path)
        (found,) = predict_files(directory, [str(path)])
        assert told in (found.error or "")
        assert path.name in (found.error or "")
