"""What a user's function returns is told apart: images, tables, and arrays, each checked before it is learned from."""

import importlib
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysubset.config import DataConfig, TaskConfig
from raysubset.data import load_full_set
from raysubset.data.columns import is_of_columns
from raysubset.data.finding import find_files
from raysubset.data.fitting import of_arrays, of_tables
from raysubset.data.functions import Arrays, read_returned, read_returned_texts, read_table_arrays
from raysubset.data.tables import Tables
from raysubset.tasks import Regression

MODULE = """
import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

features = np.arange(12.0).reshape(6, 2)
labels = np.arange(6) % 2
images = np.arange(6 * 16, dtype=np.uint8).reshape(6, 4, 4)
numbers = features[:, :1] * 2

class Items(Dataset):
    def __init__(self, items):
        self.items = items
    def __len__(self):
        return len(self.items)
    def __getitem__(self, number):
        return self.items[number] if self.items[number] is not None else 1 / 0

class Frame:
    def __arrow_c_stream__(self, requested_schema=None):
        raise pa.ArrowTypeError("Expected bytes, got an int", "Conversion failed for column x")

class Endless(IterableDataset):
    def __iter__(self):
        yield 1, 2

def load():
"""


@pytest.fixture
def returned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Reads what a function of this body returns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def classes(config: DataConfig) -> Any:
        return read_returned(config, "classification")

    def read(body: str, reader: Callable[[DataConfig], Any] = classes, **settings: Any) -> Any:
        (tmp_path / "own_rows.py").write_text(MODULE + textwrap.indent(body, "    "))
        monkeypatch.delitem(sys.modules, "own_rows", raising=False)
        importlib.invalidate_caches()
        return reader(DataConfig(name="own_rows:load", **settings))

    return read


FEATURES = np.arange(12.0).reshape(6, 2)
LABELS = np.arange(6) % 2


def assert_holds(arrays: Any, **expected: np.ndarray) -> None:
    assert isinstance(arrays, Arrays)
    for split in arrays.splits.values():
        assert split.keys() == expected.keys()
        for name, values in expected.items():
            assert split[name].flags.c_contiguous
            np.testing.assert_array_equal(split[name], values, strict=True)


@pytest.mark.parametrize(
    "body",
    [
        "return features, labels",
        "return torch.tensor(features, requires_grad=True), torch.tensor(labels)",
        "return features.tolist(), labels.tolist()",
        "return np.asfortranarray(features), labels",
        "return features.astype('>f8'), labels",
        "return TensorDataset(torch.tensor(features), torch.tensor(labels))",
        "return Items([(features[n], int(labels[n])) for n in range(6)])",
        "return dict(train=(features, labels), test=(features, labels))",
        "return (features, labels), (features, labels)",
        "data = Items(list(zip(features, labels)))\nreturn data, data",
    ],
)
def test_a_pair_of_arrays_that_are_no_images_is_inputs_and_targets(returned: Callable[..., Any], body: str):
    found = returned(body)
    assert_holds(found, inputs=FEATURES, target=LABELS)
    assert str(found.notes[0]) == "train split: 6 examples of what own_rows:load returned"


def test_a_dict_of_arrays_keeps_its_names(returned: Callable[..., Any]):
    scene = "image=images, boxes=features.astype(np.float32), seen=labels == 1"
    expected = {
        "image": np.arange(6 * 16, dtype=np.uint8).reshape(6, 4, 4),
        "boxes": FEATURES.astype(np.float32),
        "seen": (LABELS == 1).astype(np.uint8),
    }
    assert_holds(returned(f"return dict({scene})"), **expected)
    assert_holds(returned(f"return dict(train=dict({scene}), validation=dict({scene}))"), **expected)
    items = "[dict(image=images[n], boxes=features[n].astype(np.float32), seen=labels[n] == 1) for n in range(6)]"
    assert_holds(returned(f"return Items({items})"), **expected)
    ignored = returned(f"return dict(train=dict({scene}), test=3)", ignored="test")
    assert [*ignored.splits] == ["train"]


def test_images_with_other_targets_than_classes_are_arrays(returned: Callable[..., Any]):
    images = np.arange(6 * 16, dtype=np.uint8).reshape(6, 4, 4, 1)
    assert_holds(returned("return images, numbers"), image=images, target=FEATURES[:, :1] * 2)
    assert_holds(returned("return images, labels / 2"), image=images, target=LABELS / 2)
    masks = images[..., 0] > 50
    assert_holds(returned("return images, images > 50"), image=images, mask=masks.astype(np.uint8))
    assert_holds(
        returned("return images / 255 - 1, numbers"), inputs=images[..., 0] / 255 - 1, target=FEATURES[:, :1] * 2
    )


def test_floats_that_may_be_series_are_not_read_as_grey_images_in_silence(returned: Callable[..., Any]):
    """Series of 3 steps of 2 sensors, in [0, 1], were rounded to 8 bits."""
    series = "series = (features / 11).reshape(2, 3, 2)\nreturn "
    for body in ("series, [0, 1]", "Items([(series[0], 0), (series[1], 1)])", "dict(train=(series * 9, [0, 1]))"):
        with pytest.raises(ValueError, match=r"float64 \[N, 3, 2\] beside labels.*dict\(inputs=…, label=…\) for"):
            returned(series + body)
    with pytest.raises(ValueError, match=r"bool \[N, 3, 2\] beside labels"):  # spikes, for example
        returned(series + "series > 0.5, [0, 1]")
    values = (FEATURES / 11).reshape(2, 3, 2)
    assert_holds(returned(series + "dict(inputs=series, label=[0, 1])"), inputs=values, label=LABELS[:2])
    assert_holds(returned(series + "series, [0.5, 1.5]"), inputs=values, target=np.array([0.5, 1.5]))
    own = returned(series + "series, [0, 1]", lambda config: read_returned(config, "own_rows:Task"))
    assert_holds(own, image=values[..., np.newaxis], label=LABELS[:2])
    (note,) = returned("return (features / 11)[:4].reshape(2, 2, 2), [0, 1]").notes
    assert note.text.endswith(
        "returned, float64 [N, 2, 2, 1] as grey images (series go by name: dict(inputs=…, label=…))"
    )


def test_inputs_of_one_number_or_of_truth_values_are_features(returned: Callable[..., Any]):
    assert_holds(returned("return features[:, 0], labels"), inputs=FEATURES[:, :1], target=LABELS)
    assert_holds(returned("return features > 5, labels"), inputs=(FEATURES > 5).astype(np.float32), target=LABELS)


def test_a_users_own_task_gets_a_tables_columns_as_arrays(returned: Callable[..., Any]):
    body, user, score = "return pa.table(dict(user=[3, 1, 2], score=[0.5, 1.5, 2.5]))", [3, 1, 2], [0.5, 1.5, 2.5]
    arrays = returned(body, lambda config: read_returned(config, "mine:Ratings"))
    assert_holds(arrays, user=np.array(user), score=np.array(score))
    assert isinstance(returned(body, lambda config: read_returned(config, "regression"), target="score"), Tables)


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list, lambda each: pa.list_(each, 2)])
def test_a_users_own_task_gets_columns_of_lists_as_arrays(tmp_path: Path, kind: Callable[[pa.DataType], pa.DataType]):
    seen = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    frames = [[[each] * 3, [0, 1, 2]] for each in range(3)]
    table = pa.table(
        {"seen": pa.array(seen, kind(pa.float32())), "frames": pa.array(frames, kind(pa.list_(pa.int8())))}
    )
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=2)
    config = DataConfig(name=str(tmp_path / "rows.parquet"))
    assert is_of_columns(find_files(config), config)
    arrays = read_table_arrays(find_files(config), config)
    assert_holds(arrays, seen=np.array(seen, np.float32), frames=np.array(frames, np.int8))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1.0, 2.0], [3.0]], r"seen of .* has a list of 1 in row 1, not 2: give all rows one length, padded if need"),
        ([[1.0], None], "has no list in row 1"),
        ([None, [1.0]], "has no list in row 0"),
        ([[[1], [2]], [[3], [4, 5]]], "has a list of 2 in row 1, not 1"),
        ([[1.0], [None]], "has nan in row 1"),
        ([[{"x": 1}]], "has type object: it must be numbers or texts"),
    ],
)
def test_lists_that_make_no_array_are_told_with_the_row(returned: Callable[..., Any], rows: list[Any], message: str):
    with pytest.raises(ValueError, match=message):
        returned(f"return pa.table(dict(seen={rows}))", lambda config: read_returned(config, "mine:Ratings"))


@pytest.mark.parametrize("settings", [{"target": "force"}, {"target": "force", "columns": "seen"}, {"target": "seen"}])
def test_columns_of_lists_are_learned_by_named_tasks(returned: Callable[..., Any], settings: dict):
    """Not as a table that lacks a column of images."""
    body = "return pa.table(dict(seen=[[1.0, 2.0], [3.0, 5.0]] * 20, force=[1.0, 2.0] * 20))"
    tables = returned(body, lambda config: read_returned(config, "regression"), **settings)
    full_set = of_tables(tables, DataConfig(**settings), TaskConfig(name="regression"))
    train = full_set.train.take(np.arange(2))
    lists, force = ("inputs", "target") if settings["target"] == "force" else ("target", "inputs")
    assert (train[lists].shape, train[force].shape) == ((2, 2), (2, 1))


@pytest.mark.parametrize("settings", [{"target": "force"}, {"target": "force", "columns": "seen"}, {"target": "seen"}])
def test_other_lists_are_refused_by_named_tasks_with_the_way_out(returned: Callable[..., Any], settings: dict):
    body = "return pa.table(dict(seen=[[[1.0]], [[3.0]]] * 20, force=[1.0, 2.0] * 20))"
    with pytest.raises(ValueError, match=r"seen of .* holds list<.*give each number of the lists a column, or return"):
        of_tables(
            returned(body, lambda config: read_returned(config, "regression"), **settings),
            DataConfig(**settings),
            TaskConfig(name="regression"),
        )


def test_a_users_own_task_gets_the_columns_of_files_as_arrays(tmp_path: Path):
    header, rows = "user,score,site,", ["3,0.5,x,0", "1,1.5,y,1", "2,2.5,x,2"]  # the last is pandas' row number
    for split, lines in {"train": rows, "test": rows[::-1]}.items():
        (tmp_path / f"{split}.csv").write_text("\n".join([header, *lines]))
    config = DataConfig(name=str(tmp_path), columns="score,user")
    arrays = read_table_arrays(find_files(config), config)
    assert_holds(
        replace(arrays, splits={"train": arrays.splits["train"]}),
        user=np.array([3, 1, 2]),
        score=np.array([0.5, 1.5, 2.5]),
    )
    np.testing.assert_array_equal(arrays.splits["test"]["score"], [2.5, 1.5, 0.5])
    everything = read_table_arrays(find_files(config), replace(config, columns=None))
    assert [*everything.splits["train"]] == ["user", "score", "site"]
    with pytest.raises(ValueError, match=r"site of .* are texts: give numbers, .* to --data.columns"):
        of_arrays(everything.splits, config, TaskConfig(name="mine:Ratings"), ())
    with pytest.raises(ValueError, match=r"label of .* are texts: give numbers"):
        of_arrays({"train": {"label": np.array(["a", "b"])}}, config, TaskConfig(name="mine:Ratings"), ())
    with pytest.raises(ValueError, match=r"no column users: .*user"):
        read_table_arrays(find_files(config), replace(config, columns="users"))
    with pytest.raises(ValueError, match=r"leave --data\.streamed out"):
        read_table_arrays(find_files(config), replace(config, streamed=True))


def test_targets_of_several_dimensions_are_flattened(returned: Callable[..., Any]):
    """As those of several series over several horizons are."""
    returned("return dict(inputs=features, target=np.arange(36.0).reshape(6, 3, 2))")
    full_set = load_full_set(DataConfig(name="own_rows:load"), TaskConfig(name="regression"))
    assert full_set.spec.outputs == (6,)
    assert isinstance(full_set.task, Regression)
    assert full_set.task.target_names == tuple(f"target_{k}" for k in range(6))
    stored, rows = full_set.train.arrays()["target"], full_set.train.table["row"].to_numpy()
    restored = stored * np.array(full_set.task.std) + np.array(full_set.task.mean)
    np.testing.assert_allclose(restored, np.arange(36.0).reshape(6, 6)[rows], atol=1e-4)
    with pytest.raises(ValueError, match=r"learns one column, not target_0, .* or write a task of your own, which may"):
        load_full_set(DataConfig(name="own_rows:load"), TaskConfig(name="classification"))


def test_tokens_are_counted_in_the_whole_train_split(returned: Callable[..., Any], tmp_path: Path):
    tokens = "np.arange(120).reshape(40, 3) % 50"
    returned(f"return dict(inputs={tokens}, label=np.arange(40) % 2)")
    full_set = load_full_set(DataConfig(name="own_rows:load"))
    assert full_set.task.spec().num_values == 50
    assert "integers are tokens, here 50 of them: give floats if they are numbers" in full_set.notes
    returned(
        f"data = dict(inputs={tokens}, label=np.arange(40) % 2)\n"
        "return dict(train=data, test=dict(data, inputs=data['inputs'] + 9))"
    )
    with pytest.raises(
        ValueError, match=r"inputs of the test split have token 50 in row 13: the train split's are 0 to 49"
    ):
        load_full_set(DataConfig(name="own_rows:load"))


def test_masks_of_one_class_are_refused(returned: Callable[..., Any]):
    returned("return np.zeros((30, 4, 4, 3), np.uint8), np.zeros((30, 4, 4), int)")
    with pytest.raises(ValueError, match="all pixels of own_rows:load's training masks are of class 0"):
        load_full_set(DataConfig(name="own_rows:load"))


def test_images_with_their_classes_are_images(returned: Callable[..., Any]):
    for body in ("return images, labels", "return Items(list(zip(images, labels)))", "return images, labels[:, None]"):
        assert_holds(returned(body), image=np.arange(6 * 16, dtype=np.uint8).reshape(6, 4, 4, 1), label=LABELS)


def test_whole_numbers_beside_images_are_classes_or_the_targets_of_regression(returned: Callable[..., Any]):
    returned("return np.arange(640, dtype=np.uint8).reshape(40, 4, 4), np.arange(40) % 5")
    full_set = load_full_set(DataConfig(name="own_rows:load"), TaskConfig(name="regression"))
    assert isinstance(full_set.task, Regression)
    targets, rows = full_set.train.arrays()["target"], full_set.train.table["row"].to_numpy()
    np.testing.assert_allclose(targets[:, 0] * full_set.task.std[0] + full_set.task.mean[0], rows % 5, atol=1e-6)
    assert load_full_set(DataConfig(name="own_rows:load")).task.class_names == ("0", "1", "2", "3", "4")


def test_a_table_without_images_is_one_of_columns(returned: Callable[..., Any]):
    table = "pa.table(dict(a=features[:, 0], target=labels))"
    for body in (f"return {table}", f"return dict(train={table}, test={table})"):
        found = returned(body)
        assert isinstance(found, Tables)
        assert (found.choice.features, found.choice.targets) == (("a",), ("target",))
        assert str(found.notes[0]) == "train split: 6 examples of what own_rows:load returned"
    with pytest.raises(ValueError, match=r"split of what own_rows:load returned has no column aa: .*did you mean a"):
        returned(f"return {table}", target="target", columns="aa")


def test_a_function_may_return_texts(returned: Callable[..., Any]):
    assert returned("return 'one text'", read_returned_texts)[0] == {"train": ["one text"]}
    texts, notes = returned("return dict(test='c', train=['a', 'bé'])", read_returned_texts)
    assert (texts, [*texts]) == ({"train": ["a", "bé"], "test": ["c"]}, ["train", "test"])
    assert str(notes[0]) == "train split: 3 characters of what own_rows:load returned"
    for body in ("return features, labels", "return [b'a']", "return []"):
        with pytest.raises(ValueError, match=r"own_rows:load is a (tuple|list): for --task next_token give a text"):
            returned(body, read_returned_texts)
    for body in ("return 'a'", "return ['a', 'b']"):
        with pytest.raises(ValueError, match="own_rows:load is text: use --task next_token"):
            returned(body)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return features", "is an ndarray: give an Arrow table, a pair"),
        ("return features, labels[:5]", r"has 6 inputs but labels of shape \(5,\)"),
        ("return dict(a=features, b=labels[:5])", r"arrays of own_rows:load differ in length \(a 6, b 5\)"),
        ("return dict(a=features, b=[1, [2]])", "b of own_rows:load does not make one array"),
        ("return [[1.0, 2.0], [1.0]], [0, 1]", r"row 1 has shape \(1,\), row 0 \(2,\); give all one shape"),
        ("features[4, 1] = np.nan\nreturn features, labels", "inputs of own_rows:load has nan in row 4"),
        ("numbers[2] = -np.inf\nreturn features, numbers", "target of own_rows:load has -inf in row 2"),
        (
            "return features, np.array([1, 'a'] * 3, dtype=object)",
            "target of own_rows:load has type object: it must be",
        ),
        ("return features[:0], labels[:0]", r"inputs of own_rows:load has shape \(0, 2\)"),
        ("return dict(row=labels)", "names an array 'row'"),
        ("return torch.zeros(6, 2, dtype=torch.bfloat16), labels", "does not make an array of numpy's: .*BFloat16"),
        (
            "return Frame()",
            "own_rows:load does not make an Arrow table: Expected bytes, got an int; Conversion failed for",
        ),
        ("return Endless()", "reading item 0 of own_rows:load raised .*; a Dataset needs a length"),
        ("return Items([])", "has no items"),
        ("return Items([(1, 2), None])", "reading item 1 of own_rows:load raised ZeroDivisionError: division by zero"),
        ("return Items([3])", "item 0 of own_rows:load is an int: all should be pairs"),
        (
            "return Items([(images[0], 1), (images[0, 1:], 1)])",
            r"input of .*: row 1 has shape \(3, 4\), row 0",
        ),
        (
            "return Items([dict(a=1), dict(b=1)])",
            r"item 1 of own_rows:load is a dict with \['b'\]: all should",
        ),
        (
            "return dict(train=(features, labels), test=dict(inputs=features))",
            "inputs, target as train split and inputs",
        ),
        (
            "return dict(train=(features, labels), test=(features[:, :1], labels))",
            r"float64 \[N, 1\] in the test split",
        ),
        (
            "return dict(train=(features, labels), test=(images, labels))",
            "gives inputs, target as train split and image, label as test split",
        ),
        ("return dict(tset=(features, labels))", "has a split 'tset', not one of .*; did you mean test"),
    ],
)
def test_what_cannot_be_learned_from_is_refused_in_a_line(returned: Callable[..., Any], body: str, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        returned(body)
    assert "\n" not in str(caught.value)


def test_integers_beyond_64_bits_with_a_sign_are_refused(returned: Callable[..., Any]):
    """They would become negative ones."""
    body = "return dict(inputs=features, target=np.arange(6, dtype=np.uint64) + np.uint64(2**63 - {}))"
    for task in ("regression", "own_rows:Task"):
        with pytest.raises(ValueError, match="target of own_rows:load has 9223372036854775809, beyond 64-bit integers"):
            returned(body.format(4), lambda config, task=task: load_full_set(config, TaskConfig(name=task)))
    body = "return dict(inputs=features, label=np.arange(6, dtype=np.uint64) % 2 + np.uint64(2**63 - 2))"
    assert returned(body, load_full_set).task.class_names == ("9223372036854775806", "9223372036854775807")
