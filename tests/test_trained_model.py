import pickle
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import nn

from raysubset import load_model
from raysubset.config import ModelConfig
from raysubset.models import build_model
from raysubset.run_directory import MODEL_RECORD_PATH, RunDirectory
from raysubset.tasks import Classification, ImageInputs, Spec
from raysubset.trained_model import ModelRecord, TrainedModel, save_model
from raysubset.trained_model.model import GRAPH_PATH
from tests.tiny import default_dtype

CONFIG = ModelConfig(name="cnn", width=4, depth=1)
SHAPE, MEAN, STD = (6, 5, 3), (0.1, 0.2, 0.3), (0.5, 0.25, 0.125)
NAMES = ("cat", "dog")
TASK = Classification(ImageInputs(SHAPE, MEAN, STD), NAMES)


@pytest.fixture
def network() -> nn.Module:
    network = build_model(CONFIG, Spec((3, 6, 5), (2,)), seed=1)
    network.train()(torch.randn(16, 3, 6, 5))  # batch-norm statistics other than the initial ones
    return network.eval()


@pytest.fixture
def run(tmp_path: Path, network: nn.Module) -> RunDirectory:
    run = RunDirectory(str(tmp_path), "a-run")
    save_model(run, network.state_dict(), ModelRecord(CONFIG, TASK))
    return run


@pytest.fixture(scope="module")
def users_run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Of a network of the user's own, whose module is gone: had it been imported, it would have left a file."""
    run = RunDirectory(str(tmp_path_factory.mktemp("users")), "a-run")
    record = ModelRecord(ModelConfig(name="their_net:net"), TASK)
    network = UsersNetwork().eval()
    assert save_model(run, network.state_dict(), record, network=network)[1] is None
    return run


class UsersNetwork(nn.Module):
    """With batch norm, tied weights, a buffer that no state dict holds, and sizes that depend on the batch's."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.first, self.second, self.head = nn.Linear(120, 120), nn.Linear(120, 120), nn.Linear(120, 2)
            self.second.weight = self.first.weight
            self.norm.running_mean = torch.randn(4)
            self.register_buffer("signs", torch.randn(120).sign(), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.norm(self.conv(images)).relu()
        features = features.view(images.size(0), -1) * self.signs
        return self.head(self.second(self.first(features)).softmax(1))


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


@pytest.mark.parametrize(
    "caller", [torch.inference_mode, lambda: torch.device("meta"), lambda: default_dtype(torch.float64)]
)
def test_a_model_is_loaded_alike_whatever_the_caller_has_set_in_torch(run: RunDirectory, caller: Any):
    images = torch.rand(3, 3, 6, 5)
    with caller():
        model = load_model(Path(run.uri))  # pyright: ignore
    assert torch.equal(model(images), load_model(run.uri)(images))
    model(images).sum().backward()


def test_a_model_that_was_on_the_meta_device_has_its_scaling_again(run: RunDirectory):
    images, model = torch.rand(3, 3, 6, 5), load_model(run.uri)
    expected, weights = model(images), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    again = model.to("meta").to_empty(device="cpu")
    again.load_state_dict(weights)
    assert torch.equal(again(images), expected)


def test_nothing_is_unpickled_nor_imported(run: RunDirectory, users_run: RunDirectory, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("unpickled or imported")

    assert run.list() == ["model.json", "model.safetensors"]
    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr("raysubset.user_code.functions.importlib.import_module", refuse)
    for one in (run, users_run):
        assert isinstance(load_model(one.uri), TrainedModel)


def test_a_users_network_is_loaded_without_its_code(users_run: RunDirectory, images: torch.Tensor):
    model, network = load_model(users_run.uri), UsersNetwork().eval()
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    for num in (1, 7):
        with torch.no_grad():
            torch.testing.assert_close(model(images[:num]), network((images[:num] / 255 - mean) / std))
    assert model.network.state_dict().keys() - {"signs"} == network.state_dict().keys()


def test_a_records_function_is_called_only_where_the_user_says_so(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "evil_net.py").write_text("open('imported', 'w')\ndef net(*shape):\n    open('called', 'w')\n")
    monkeypatch.chdir(tmp_path)
    run.write_json(MODEL_RECORD_PATH, run.read_json(MODEL_RECORD_PATH) | {"model": {"name": "evil_net:net"}})
    with pytest.raises(ValueError, match=r"import 'evil_net' from .* call its 'net'\. If you trust .*--trust-code"):
        load_model(run.uri)
    assert not (tmp_path / "imported").exists()
    with pytest.raises(ValueError, match="evil_net:net returned a NoneType"):
        load_model(run.uri, trust_code=True)
    assert (tmp_path / "called").exists()


HUGE = 10**9


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"name": "cnn", "width": HUGE, "depth": 1}},
        {"model": {"name": "cnn", "width": 2**62, "depth": 1}},
        {"model": {"name": "cnn", "width": 4, "depth": HUGE}},
        {"model": {"name": "mlp", "width": 4, "depth": HUGE}},
        {"model": {"name": "vit_h_14"}},
        {"model": {"name": "cnn", "width": "4"}},
        {"model": {"name": ["os:execv"]}},
        {"model": None},
        {"num_classes": HUGE},
        {"num_classes": HUGE, "class_names": "x"},
        {"class_names": [1, 2]},
        {"class_names": {"0": "cat", "1": "dog"}},
        {"image_shape": [HUGE, HUGE, 3]},
        {"image_shape": [6, 5, HUGE]},
        {"image_shape": [6.0, 5, 3]},
        {"image_shape": "653"},
        {"mean": [0.1, 0.2, None]},
        {"grey_range": [0]},
        {"grey_range": [4095, 0]},
        {"grey_range": [0, 10**400]},
        {"std": [0.5, 0.25, 0.0]},
        {"std": [10**400, 1, 1]},
    ],
    ids=str,
)
def test_values_of_a_record_are_checked_before_they_take_memory(run: RunDirectory, change: dict[str, Any]):
    run.write_json(MODEL_RECORD_PATH, run.read_json(MODEL_RECORD_PATH) | change)
    with pytest.raises(ValueError, match="a-run") as raised:
        load_model(run.uri)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("record", [None, [], "model", 3, {}, {"model": {}}], ids=str)
def test_a_record_of_another_shape_is_named(run: RunDirectory, record: Any):
    run.write_json(MODEL_RECORD_PATH, record)
    with pytest.raises(ValueError, match=r"model\.json in .*a-run (cannot be used|is damaged: .* null)"):
        load_model(run.uri)


CALLS: list[list[Any]] = [
    ["os.system.default", ["touch marker"], {}],
    ["aten.from_file.default", ["marker", True, 8], {}],  # makes the file
    ["aten.add_.Tensor", [{"value": 0}, {"value": 0}], {}],
    ["aten.__class__.default", [], {}],
    ["prim.Print.default", ["marker"], {}],
    ["aten.max_pool2d_with_indices_backward.default", [], {}],
    ["aten.full.default", [[HUGE, HUGE], 1.0], {}],
    ["aten.full.default", [[{"value": 1}, HUGE], 1.0], {}],
    ["mul", [[1], HUGE], {}],
    ["mul", ["x", HUGE], {}],
    ["mul", [2**40, 2**40], {}],
    ["item", [{"value": 0}, 0], {}],
    ["item", [{}, "__class__"], {}],
    ["aten.relu.default", [{"value": 10**6}], {}],
    ["aten.relu.default", [{"value": "x"}], {}],
    ["aten.relu.default", [{"torch": "load"}], {}],
    ["aten.relu.default", "x", {}],
    ["aten.relu.default"],
    [["aten"], [], {}],
]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_a_graph_calls_nothing_but_operators_on_tensors(
    users_run: RunDirectory, call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    run = RunDirectory(str(tmp_path), "a-run")
    for path in users_run.list():
        run.write_bytes(path, users_run.read_bytes(path))
    graph = run.read_json(GRAPH_PATH)
    run.write_json(GRAPH_PATH, graph | {"calls": [call], "outputs": len(graph["tensors"]) + 1})
    with pytest.raises(
        ValueError, match=r"model\.graph\.json in .*a-run cannot be used: it holds no network"
    ) as raised:
        load_model(run.uri)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "marker").exists()


def test_a_network_without_a_graph_needs_code_and_the_run_says_why(run: RunDirectory):
    class Branching(UsersNetwork):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images if images.mean() > 0 else -images)

    stored = run.read_json(MODEL_RECORD_PATH) | {"model": {"name": "their_net:net"}}
    record = ModelRecord.from_dict({key: value for key, value in stored.items() if key != "files"})
    network = Branching()
    _, flaw = save_model(run, network.state_dict(), record, network=network)
    assert flaw is not None
    assert flaw.startswith("torch.export cannot trace this network")
    with pytest.raises(ValueError, match="trust_code=True"):
        load_model(run.uri)


def test_a_file_cut_short_is_named(run: RunDirectory):
    data = run.read_bytes("model.safetensors")
    run.write_bytes("model.safetensors", data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors in .* is damaged: it has \d+ bytes instead of \d+ bytes"):
        load_model(run.uri)


def test_a_model_of_a_newer_version_is_refused_with_the_way_out(run: RunDirectory):
    record = run.read_json(MODEL_RECORD_PATH)
    run.write_json(MODEL_RECORD_PATH, record | {"model": record["model"] | {"num_heads": 4}})
    with pytest.raises(
        ValueError,
        match=r"a-run cannot be used: it has model\.num_heads, which this version lacks: update raysubset",
    ):
        load_model(run.uri)
