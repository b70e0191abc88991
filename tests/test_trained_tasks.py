"""Models of tables, texts and tasks of one's own, saved, loaded and applied to files."""

import logging
import pickle
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import torch

from raysubset.config import Config, DataConfig, MinimizeConfig, ModelConfig, TaskConfig
from raysubset.data import FullSet, load_full_set
from raysubset.models import architecture, build_model
from raysubset.objects_in_hand import hold_objects
from raysubset.run_directory import RunDirectory
from raysubset.tasks import NextToken, RecordedTask, Regression, TableInputs
from raysubset.trained_model import ModelRecord, TrainedModel, leave_samples, load_model, save_model
from raysubset.trained_model import model as model_module
from raysubset.trained_model.exporting import export_model, predict_files
from raysubset.training import predict

OWN = """
from raysubset.tasks import Spec, Task

class Sum(Task):
    quality = "near"
    def fit(self, train):
        self.inputs = 3  # no inputs of raysubset's own
        self.scale = float(train["inputs"].max())
        return self
    def spec(self):
        return Spec((self.inputs,), (1,))
    def batch(self, rows, draws):
        return rows["inputs"] / self.scale, rows["total"][:, None]
    def loss(self, outputs, targets):
        return (outputs - targets).square().sum()
    def measure(self, outputs, targets):
        return {"near": (outputs - targets).abs().squeeze(1) < 1}

def numbers():
    import numpy as np
    inputs = np.arange(60, dtype=np.float32).reshape(20, 3)
    return {"inputs": inputs, "total": inputs.sum(1)}
"""


def saved(full_set: FullSet, folder, name: str = "auto", **sizes: Any) -> torch.nn.Module:
    """A run directory in `folder` with a fresh network, which is returned in evaluation mode."""
    config = ModelConfig(name=name, **sizes)
    network = build_model(config, full_set.spec, seed=3)
    record = ModelRecord(architecture(config, full_set.spec), full_set.task)
    save_model(RunDirectory.at(str(folder)), network.state_dict(), record)
    return network.eval()


@pytest.fixture
def prices(tmp_path):
    """A table with a number, a category and a price that depends on both."""
    generator = np.random.default_rng(0)
    area, kind = generator.uniform(20, 200, 90), generator.choice(["flat", "house"], 90)
    table = pa.table({"area": area, "kind": kind, "price": 1000 * area + 5000 * (kind == "house")})
    pa_csv.write_csv(table, tmp_path / "prices.csv")
    return load_full_set(DataConfig(name=str(tmp_path / "prices.csv"), target="price"), TaskConfig(name="regression"))


def test_a_regressions_outputs_are_in_the_targets_units(prices, tmp_path):
    network = saved(prices, tmp_path / "run")
    model, task = load_model(str(tmp_path / "run")), prices.task
    raw = torch.tensor([[100.0, 1.0, 0.0], [50.0, 0.0, 1.0]], dtype=torch.float64)  # area, kind=flat, kind=house
    area = next(column for column in task.inputs.columns if column.name == "area")
    scaled = raw.clone()
    scaled[:, 0] = (raw[:, 0] - area.mean) / area.deviation
    expected = network(scaled.float()).double() * task.std[0] + task.mean[0]
    torch.testing.assert_close(model(raw), expected)
    torch.testing.assert_close(model(raw.float()), expected.float())


def test_a_networks_cast_to_half_precision_leaves_its_scaling_exact(prices, tmp_path):
    network, task = saved(prices, tmp_path / "run").bfloat16(), prices.task
    raw = torch.tensor([[100.0, 1.0, 0.0], [50.0, 0.0, 1.0]], dtype=torch.float64)
    shift, scale = task.inputs.scaling()
    expected = network(((raw - shift) / scale).bfloat16()).double() * task.std[0] + task.mean[0]
    model = load_model(str(tmp_path / "run")).bfloat16()
    torch.testing.assert_close(model(raw), expected)
    assert model(raw.bfloat16()).dtype == torch.float32  # prices beyond 65,504 are infinite in float16
    assert [buffer.dtype for _, buffer in model.named_buffers()] == [torch.float64] * 4

    def refuse_float64(tensor: torch.Tensor) -> torch.Tensor:
        assert tensor.dtype != torch.float64, "MPS has none"
        return tensor.float()

    model._apply(refuse_float64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_dates_in_seconds_are_predicted_to_the_second(tmp_path, caplog):
    """Numbers about 1.7e9, in and out, of which float32 has every 128th."""
    generator = np.random.default_rng(0)
    begin, end = 1.7e9 + generator.normal(0, 60, (2, 90))
    pq.write_table(pa.table({"begin": begin, "end": end}), tmp_path / "times.parquet")
    config = DataConfig(name=str(tmp_path / "times.parquet"), target="end")
    full_set = load_full_set(config, TaskConfig(name="regression"))
    network, rows = saved(full_set, tmp_path / "run"), full_set.test.table["row"].to_numpy()
    outputs = predict(network, full_set.examples("test"), MinimizeConfig())
    of_columns = full_set.task.tabulate(outputs, outputs)
    model = load_model(str(tmp_path / "run"))
    outputs = model(torch.from_numpy(begin[rows, None]))[:, 0].tolist()
    assert outputs == pytest.approx(of_columns["prediction"], abs=1e-3)
    answers = [*predict_files(str(tmp_path / "run"), [str(tmp_path / "times.parquet")])]
    assert [answers[row].values["end"] for row in rows] == pytest.approx(of_columns["prediction"], abs=1e-3)
    assert str(answers[0]).endswith(f", row 0: end {answers[0].values['end']:.0f}")
    export_model(str(tmp_path / "run"), str(tmp_path / "it.pt2"), format="torch-export")
    assert "float32 rounds begin, end by more than" in caplog.text

    def arrays():
        return {"inputs": begin[:, None], "target": end}

    with hold_objects(Config(task=TaskConfig(name="regression")), data=arrays) as named:
        full_set = load_full_set(*named.learned)
    network, rows = saved(full_set, tmp_path / "arrays"), full_set.test.table["row"].to_numpy()
    task = full_set.task
    assert isinstance(task, Regression)
    expected = predict(network, full_set.examples("test"), MinimizeConfig()).double() * task.std[0]
    outputs = load_model(str(tmp_path / "arrays"))(torch.from_numpy(begin[rows, None])) - task.mean[0]
    torch.testing.assert_close(outputs, expected, atol=1e-3, rtol=0)
    export_model(str(tmp_path / "arrays"), str(tmp_path / "it.pt2"), format="torch-export")
    assert "float32 rounds inputs[:, 0], target by more than" in caplog.text


def test_a_tables_rows_are_predicted_by_column_names_in_any_order(prices, tmp_path):
    saved(prices, tmp_path / "run")
    rows = pa.table({"kind": ["house", "flat"], "unread": [1, 2], "area": [50.0, 100.0]})
    pa_csv.write_csv(rows, tmp_path / "new.csv")
    first, second = predict_files(str(tmp_path / "run"), [str(tmp_path / "new.csv")])
    outputs = load_model(str(tmp_path / "run"))(torch.tensor([[50.0, 0.0, 1.0], [100.0, 1.0, 0.0]]))
    assert [first.row, second.row] == [0, 1]
    assert [first.values["price"], second.values["price"]] == pytest.approx(outputs.flatten().tolist(), rel=1e-5)
    assert str(first).startswith(f"{tmp_path / 'new.csv'}, row 0: price ")


def test_a_category_that_training_had_not_is_told(prices, tmp_path, caplog):
    saved(prices, tmp_path / "run")
    pa_csv.write_csv(pa.table({"kind": ["castle"], "area": [50.0]}), tmp_path / "new.csv")
    with caplog.at_level(logging.WARNING):
        (found,) = predict_files(str(tmp_path / "run"), [str(tmp_path / "new.csv")])
    assert found.error is None
    assert "castle" in caplog.text or "kind" in caplog.text


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"area": [1.0]}, "kind"),
        (
            {"area": [None], "kind": ["flat"]},
            "area has no value in row 0 of the table: fill it in, ",
        ),
    ],
)
def test_a_table_that_does_not_fit_is_an_error_that_names_the_file(prices, tmp_path, columns, words):
    saved(prices, tmp_path / "run")
    pa_csv.write_csv(pa.table(columns), tmp_path / "new.csv")
    (found,) = predict_files(str(tmp_path / "run"), [str(tmp_path / "new.csv")])
    assert found.error
    assert words in found.error
    assert "new.csv" in found.error
    (missing,) = predict_files(str(tmp_path / "run"), [str(tmp_path / "nowhere.csv")])
    assert missing.error
    assert missing.error.startswith(f"{tmp_path / 'nowhere.csv'}: there is no file")


@pytest.mark.parametrize(("span_s", "is_coarse"), [(60, True), (10**6, False)])
def test_an_exported_table_takes_raw_numbers_and_warns_of_those_that_float32_rounds(
    tmp_path, caplog, span_s, is_coarse
):
    generator = np.random.default_rng(0)
    seconds, area = 1_700_000_000 + generator.integers(0, span_s, 90), generator.uniform(20, 200, 90)
    table = pa.table({"when": pa.array(seconds, pa.timestamp("s")), "area": area, "price": 1000 * area})
    pa_csv.write_csv(table, tmp_path / "prices.csv")
    config = DataConfig(name=str(tmp_path / "prices.csv"), target="price")
    saved(load_full_set(config, TaskConfig(name="regression")), tmp_path / "run")
    with caplog.at_level(logging.WARNING):
        path = export_model(str(tmp_path / "run"), str(tmp_path / "model.pt2"), format="torch-export")
    assert ("float32 rounds when by more than" in caplog.text) == is_coarse
    rows = torch.tensor(np.stack([seconds, area], 1)).float()
    with torch.no_grad():
        outputs, expected = torch.export.load(path).module()(rows), load_model(str(tmp_path / "run"))(rows)
    torch.testing.assert_close(outputs, expected)


def test_a_tables_classes_have_their_names(tmp_path):
    full_set = load_full_set(DataConfig(name="iris"))
    saved(full_set, tmp_path / "run", width=4)
    model = load_model(str(tmp_path / "run"))
    assert model.class_names == ("setosa", "versicolor", "virginica")
    assert isinstance(model.inputs, TableInputs)
    with pytest.raises(ValueError, match=r"\[N, 4\]"):
        model(torch.zeros(2, 5))
    path = export_model(str(tmp_path / "run"), str(tmp_path / "iris.pt2"), format="torch-export")
    raw = torch.rand(5, 4)
    torch.testing.assert_close(torch.export.load(path).module()(raw), model(raw))


@pytest.fixture
def tokens(tmp_path):
    (tmp_path / "text.txt").write_text("abc abd abe " * 60)
    config = DataConfig(name=str(tmp_path / "text.txt"), window=8, vocabulary="characters")
    return load_full_set(config, TaskConfig(name="next_token"))


@pytest.mark.parametrize("name", ["lstm", "transformer"])
def test_a_text_is_gone_on_with_by_the_same_draws(tokens, tmp_path, name):
    saved(tokens, tmp_path / "run", name, width=8, depth=1)
    model = load_model(str(tmp_path / "run"))
    assert model.generate("abc ", 30, seed=1) == model.generate("abc ", 30, seed=1)
    assert model.generate("abc ", 30, seed=1) != model.generate("abc ", 30, seed=2)
    assert set(model.generate("abc ", 50)) <= set("abcde ")  # never the unknown character
    assert len(model.generate("abc abd abe abc", 12, temperature=0)) == 12
    (found,) = predict_files(str(tmp_path / "run"), [str(tmp_path / "text.txt")])
    assert len(found.text) == 200
    with pytest.raises(ValueError, match="empty text"):
        model.generate("")
    with pytest.raises(ValueError, match="integers from 0, less than 7"):
        model(torch.zeros(1, 8))


def test_a_text_file_is_gone_on_with_as_training_would_read_it(tokens, tmp_path, monkeypatch):
    """With its line ends, and without its byte order mark."""
    saved(tokens, tmp_path / "run", "lstm", width=8, depth=1)
    monkeypatch.setattr(TrainedModel, "generate", lambda _, text: f"from {text}")
    prompt = tmp_path / "prompt.txt"
    prompt.write_bytes(b"\xef\xbb\xbfabe\r\n")
    assert [each.text for each in predict_files(str(tmp_path / "run"), [str(prompt)])] == ["from abe\r\n"]
    prompt.write_bytes(b"\xff")
    (found,) = predict_files(str(tmp_path / "run"), [str(prompt)])
    assert (found.error or "").startswith(f"byte 0 of {prompt}, in line 1, is not UTF-8")


def test_the_likeliest_token_is_that_of_the_networks_outputs(tokens, tmp_path):
    network, task = saved(tokens, tmp_path / "run", "transformer", width=8, depth=1), tokens.task
    assert isinstance(task, NextToken)
    ids = task.vocabulary.encode("abc abd ").tolist()
    outputs = network(torch.tensor([ids]))[0, -1]
    outputs[task.vocabulary.unknown] = -torch.inf
    expected = task.vocabulary.decode([int(outputs.argmax())])
    assert load_model(str(tmp_path / "run")).generate("abc abd ", 1, temperature=0) == expected


def test_samples_go_on_from_half_a_window_and_those_of_large_networks_are_short(tokens, tmp_path, monkeypatch):
    network = saved(tokens, tmp_path / "run", "lstm", width=8, depth=1)
    directory = RunDirectory.at(str(tmp_path / "run"))
    record = ModelRecord(ModelConfig(name="lstm", width=8, depth=1), tokens.task)
    (path,) = leave_samples(directory, network.state_dict(), record, tokens.test.take())
    samples = directory.read_json(path)
    assert [len(sample["prompt"]) for sample in samples] == [5] * len(samples)
    assert all(len(sample["text"]) == 200 for sample in samples)
    num_weights = sum(tensor.numel() for tensor in network.state_dict().values())
    monkeypatch.setattr(model_module, "_MOST_MULTIPLIED", 7 * num_weights * tokens.task.window * 3)
    leave_samples(directory, network.state_dict(), record, tokens.test.take())
    assert all(len(sample["text"]) == 7 for sample in directory.read_json(path))


def test_a_task_of_ones_own_is_called_only_where_it_is_trusted(tmp_path, monkeypatch):
    (tmp_path / "sums_of_mine.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    full_set = load_full_set(DataConfig(name="sums_of_mine:numbers"), TaskConfig(name="sums_of_mine:Sum"))
    network = saved(full_set, tmp_path / "run", "mlp", width=4)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(sys, "path", [path for path in sys.path if path != str(tmp_path)])
        elsewhere.delitem(sys.modules, "sums_of_mine")
        stranger = load_model(str(tmp_path / "run"))
        assert "sums_of_mine" not in sys.modules
    assert isinstance(stranger.record.task, RecordedTask)
    assert stranger.spec == full_set.spec
    assert torch.equal(pickle.loads(pickle.dumps(stranger))(torch.ones(2, 3)), network(torch.ones(2, 3)))
    with pytest.raises(ValueError, match=r"takes tensors of \[3\]: load_model\(directory\)\(x\)"):
        list(predict_files(str(tmp_path / "run"), ["new.csv"]))
    path = export_model(str(tmp_path / "run"), str(tmp_path / "sums.pt2"), format="torch-export")
    torch.testing.assert_close(torch.export.load(path).module()(torch.ones(4, 3)), network(torch.ones(4, 3)))
    model = load_model(str(tmp_path / "run"), trust_code=True)
    assert model.record.task.scale == full_set.task.scale  # pyright: ignore
    inputs = torch.rand(2, 3)
    assert torch.equal(model(inputs), network(inputs))
