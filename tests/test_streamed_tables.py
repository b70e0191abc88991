"""Tables larger than memory: everything equals the table in memory, bit for bit, and few columns are held at a time."""

import dataclasses
import pickle
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from raysubset.config import Config, DataConfig, MinimizeConfig, ModelConfig, TaskConfig
from raysubset.data import FullSet, StreamedExamples, StreamedSplit, load_full_set, row_groups
from raysubset.data.row_groups import RowGroups
from raysubset.fingerprints import changes
from raysubset.models import build_model
from raysubset.planning import make_plan, manifest
from raysubset.training import evaluate, minimize
from tests import tiny
from tests.tiny import measured

ROOT = Path(__file__).parents[1]
NUM = 400


def rows(num: int = NUM, seed: int = 0) -> pa.Table:
    """Every kind of column, two targets, and one column that does not vary."""
    generator = np.random.default_rng(seed)
    age = generator.normal(40, 10, num)
    site = generator.choice(["north", "south", "öst"], num)
    return pa.table(
        {
            "age": age,
            "size": pa.array(generator.integers(-5, 2000, num), pa.int32()),
            "site": site,
            "price": 3 * age + generator.normal(0, 1, num),
            "taken": pa.array(generator.integers(0, 10**9, num), pa.timestamp("s")),
            "is_new": generator.random(num) < 0.5,
            "cost": pa.array(generator.integers(0, 10**6, num)).cast(pa.decimal128(20)),
            "same": np.ones(num),
            "kind": pa.array(generator.choice(["a", "b", "c"], num)).dictionary_encode(),
            "label": generator.choice(["cat", "dog"], num),
        }
    )


def with_holes(table: pa.Table) -> pa.Table:
    """Some numbers and texts missing."""
    for name in ("age", "site"):
        holed = pa.array([None if row % 7 == 3 else value for row, value in enumerate(table[name].to_pylist())])
        table = table.set_column(table.column_names.index(name), name, holed)
    return table


def load(path: Path, task: str, *, streamed: bool, **settings: Any) -> FullSet:
    return load_full_set(DataConfig(name=str(path), streamed=streamed, **settings), TaskConfig(name=task))


def both(path: Path, task: str = "regression", **settings: Any) -> tuple[FullSet, FullSet]:
    """The table in memory, and streamed."""
    settings = {"target": "price" if task == "regression" else "label", **settings}
    in_memory, streamed = (load(path, task, streamed=flag, **settings) for flag in (False, True))
    assert isinstance(streamed.train, StreamedSplit)
    return in_memory, streamed


def check_equal(in_memory: FullSet, streamed: FullSet) -> None:
    """Everything but the note on streaming, and the features' own columns, which are not held."""
    assert streamed.task == in_memory.task
    assert streamed.notes[:-1] == in_memory.notes
    assert "streamed: the" in streamed.notes[-1]
    assert changes(in_memory.fingerprint, streamed.fingerprint) == []  # stamps come when a file is no longer new
    for name in ("train", "validation", "test"):
        found, expected = getattr(streamed, name), getattr(in_memory, name)
        assert dict(found.shapes) == dict(expected.shapes)
        assert found.table["row"] == expected.table["row"]
        assert tiny.same_bits(found.take(), expected.take())
    assert np.array_equal(streamed.strata, in_memory.strata)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("streamed") / "rows.parquet"
    pq.write_table(rows(), path, row_group_size=23)
    return path


@pytest.fixture(scope="module")
def sets(path: Path) -> tuple[FullSet, FullSet]:
    return both(path)


def stream(full_set: FullSet, window_rows: int = 70) -> StreamedExamples:
    examples = full_set.training_batches()
    assert isinstance(examples, StreamedExamples)
    return dataclasses.replace(examples, window_bytes=window_rows * full_set.train.num_bytes_per_example)


# The set


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        pytest.param("regression", {}, id="a number"),
        pytest.param("regression", {"target": "price,size"}, id="two numbers"),
        pytest.param("classification", {}, id="classes"),
        pytest.param("classification", {"target": "is_new"}, id="truth values"),
        pytest.param("regression", {"columns": "cost,age,kind"}, id="some columns, in an order of their own"),
    ],
)
@pytest.mark.parametrize("read_bytes", [2**28, 1])
def test_rows_targets_splits_and_statistics_are_those_of_the_table_in_memory(
    path: Path, monkeypatch: pytest.MonkeyPatch, task: str, settings: dict[str, Any], read_bytes: int
) -> None:
    monkeypatch.setattr(row_groups, "_READ_BYTES", read_bytes)
    in_memory, streamed = both(path, task, **settings)
    check_equal(in_memory, streamed)
    chosen = np.random.default_rng(2).integers(0, len(in_memory.train), 90)  # in any order, some of them twice
    assert tiny.same_bits(streamed.train.take(chosen), in_memory.train.take(chosen))


@pytest.mark.parametrize("names", [("1", "20"), ("a", "b")])
def test_folders_of_nulls_are_missing_values_of_their_column(tmp_path: Path, names: tuple[str, str]) -> None:
    generator = np.random.default_rng(0)
    for name in (*names, "__HIVE_DEFAULT_PARTITION__"):
        (tmp_path / f"site={name}").mkdir()
        columns = {"x": generator.normal(size=30), "target": generator.normal(size=30)}
        pq.write_table(pa.table(columns), tmp_path / f"site={name}" / "a.parquet", row_group_size=10)
    sets = [
        load_full_set(DataConfig(name=str(tmp_path), missing="mean", streamed=streamed), TaskConfig(name="regression"))
        for streamed in (False, True)
    ]
    found, streamed = (full_set.train.take(np.arange(len(full_set.train)))["inputs"] for full_set in sets)
    assert torch.equal(found, streamed)
    assert found.shape[1] == (4 if names == ("a", "b") else 2)  # a category each, and one of the missing; or a number
    assert any("missing" in note and "site (" in note for note in sets[0].notes)


def test_missing_values_are_filled_and_told_as_in_memory(tmp_path: Path) -> None:
    pq.write_table(with_holes(rows()), tmp_path / "rows.parquet", row_group_size=23)
    in_memory, streamed = both(tmp_path / "rows.parquet", missing="mean")
    check_equal(in_memory, streamed)
    assert "missing values of the train split filled with the training mean: age (" in " ".join(streamed.notes)


def test_a_test_split_of_its_own_is_read_into_memory_and_its_unknown_values_are_told(tmp_path: Path) -> None:
    pq.write_table(rows(), tmp_path / "train.parquet", row_group_size=23)
    other = rows(60, seed=1)
    pq.write_table(
        other.set_column(2, "site", pa.array(["west", *other["site"].to_pylist()[1:]])), tmp_path / "test.parquet"
    )
    in_memory, streamed = both(tmp_path)
    check_equal(in_memory, streamed)
    assert "values of the test split that no training row has" in " ".join(streamed.notes)
    assert "site (1, such as 'west')" in " ".join(streamed.notes)


def test_files_of_several_types_are_read_in_the_type_of_all(tmp_path: Path) -> None:
    first, second = rows().slice(0, 180), rows().slice(180)
    pq.write_table(first, tmp_path / "a.parquet", row_group_size=23)
    for name, kind in {"size": pa.float64(), "taken": pa.timestamp("ns"), "kind": pa.string()}.items():
        second = second.set_column(second.column_names.index(name), name, second[name].cast(kind))
    second = second.select(sorted(second.column_names))  # in another order
    pq.write_table(second, tmp_path / "b.parquet", row_group_size=30)
    check_equal(*both(tmp_path))


def test_columns_that_folders_name_are_features_too(tmp_path: Path) -> None:
    for year in (2019, 2020, 2021):
        folder = tmp_path / f"year={year}"
        folder.mkdir()
        pq.write_table(rows(120, seed=year), folder / "part-0.parquet", row_group_size=50)
    in_memory, streamed = both(tmp_path)
    check_equal(in_memory, streamed)
    check_equal(*both(tmp_path, columns="year"))


def test_features_are_not_held_and_what_is_no_feature_is(sets: tuple[FullSet, FullSet], path: Path) -> None:
    in_memory, streamed = sets
    assert streamed.train.table.column_names == ["target", "row"]
    assert len(pickle.dumps(streamed.train)) < in_memory.train.num_bytes / 2
    some = load(path, "regression", streamed=True, target="price", columns="age,size")
    assert some.train.table.column_names == ["target", "row", "site", "is_new", "label"]


def test_subsets_by_a_feature_that_is_not_held_are_those_in_memory(sets: tuple[FullSet, FullSet]) -> None:
    config = Config().with_overrides(
        {"subsets.scheme": "column", "subsets.column": "site", "model.width": 4, "task.name": "regression"}
    )
    expected, found = (make_plan(config, full_set) for full_set in sets)
    assert len(expected.subsets) == 3
    assert manifest(found.subsets, sets[1]) == manifest(expected.subsets, sets[0])


@pytest.mark.parametrize("column", ["sight", "age"])
def test_a_column_that_names_no_subsets_is_refused_as_in_memory(sets: tuple[FullSet, FullSet], column: str) -> None:
    config = Config().with_overrides({"subsets.scheme": "column", "subsets.column": column})
    lines = []
    for full_set in sets:
        with pytest.raises(ValueError, match="is no column of the training table") as caught:
            make_plan(config, full_set)
        lines.append(str(caught.value).partition("it has ")[2].removesuffix(": choose one").split(", "))
    assert {"site", "is_new", "label"} <= {*lines[0]}
    assert sorted(lines[0]) == sorted(lines[1])


def test_a_subsets_minimum_and_the_loss_of_all_have_the_same_bits(sets: tuple[FullSet, FullSet]) -> None:
    minima, losses = [], []
    indices = np.random.default_rng(0).permutation(len(sets[0].train))[:60]
    for full_set in sets:
        model = build_model(ModelConfig(name="mlp", width=4), full_set.spec, seed=0)
        minimize(model, full_set.examples("train", indices), MinimizeConfig(epochs=2.0, batch_size=20), seed=1)
        minima.append(model.state_dict())
        losses.append(evaluate(model, full_set.training_batches(), MinimizeConfig()))
    assert tiny.same_bits(*minima)
    assert losses[0] == losses[1]


def test_an_epoch_has_every_row_once_in_the_order_of_its_seed(sets: tuple[FullSet, FullSet]) -> None:
    sizes = [50] * 5 + [len(sets[0].train) - 250]

    def epoch(examples: Any, seed: int) -> list[bytes]:
        batches = examples.epoch(order_seed=seed, augmentation_seed=0, batch_sizes=sizes)
        return [torch.cat(row).numpy().tobytes() for batch in batches for row in zip(*batch, strict=True)]

    first, again, other = (epoch(stream(sets[1]), seed) for seed in (1, 1, 2))
    assert first == again != other
    assert sorted(first) == sorted(other) == sorted(epoch(sets[0].training_batches(), 1))
    lying = list(stream(sets[1]).in_order(sizes))
    assert tiny.same_bits(lying, list(sets[0].training_batches().in_order(sizes)))


# What cannot be


def bad(name: str, row: int, value: Any) -> pa.Table:
    """The rows with one value another."""
    table = rows()
    values = table[name].to_pylist()
    values[row] = value
    return table.set_column(table.column_names.index(name), name, pa.array(values))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        pytest.param(bad("age", 390, float("nan")), "column age has no value in row 390 of the", id="NaN"),
        pytest.param(bad("age", 390, float("inf")), "column age is inf in row 390 of the", id="infinite"),
        pytest.param(bad("price", 200, None), "column price has no value in row 200 of the train split", id="target"),
        pytest.param(bad("site", 390, None), "column site has no value in row 390 of", id="text"),
        pytest.param(
            rows().set_column(2, "site", pa.array([f"s{number // 2}" for number in range(NUM)])),
            "column site of the train split has 2?[0-9]* ?different texts",
            id="too many texts",
        ),
        pytest.param(rows().set_column(3, "price", pa.array(np.ones(NUM))), "price is 1 in all", id="constant"),
        pytest.param(rows().append_column("age", rows()["age"]), "has several columns 'age'", id="twice"),
    ],
)
def test_bad_values_in_a_late_row_group_are_refused_as_in_memory(tmp_path: Path, table: pa.Table, message: str) -> None:
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=23)
    texts = []
    for flag in (False, True):
        with pytest.raises(ValueError, match=message) as caught:
            load(tmp_path / "rows.parquet", "regression", streamed=flag, target="price")
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
    assert "\n" not in texts[0]


def test_a_file_of_another_type_or_without_a_column_is_refused(tmp_path: Path) -> None:
    pq.write_table(rows().slice(0, 200), tmp_path / "a.parquet", row_group_size=23)
    texts = rows().slice(200).set_column(0, "age", pa.array(["old"] * 200))
    for table, message in (
        (texts, r"the 2 files of the train split of .* do not go together: .*age"),
        (rows().slice(200).drop_columns("age"), r"b\.parquet has no column age, only"),
    ):
        pq.write_table(table, tmp_path / "b.parquet")
        for flag in (False, True):
            with pytest.raises(ValueError, match=message):
                load(tmp_path, "regression", streamed=flag, target="price")


def test_a_table_that_is_no_parquet_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_file(file, rows().schema) as writer:
        writer.write_table(rows())
    with pytest.raises(ValueError, match=r"a\.arrow is none: write the training split as Parquet, or leave"):
        load(tmp_path / "a.arrow", "regression", streamed=True, target="price")


# Memory


def test_loading_reads_each_value_once_and_few_columns_at_a_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, int]] = []
    tables = RowGroups.tables

    def counting(self: RowGroups, groups: Iterable[int], columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        for table in tables(self, groups, columns):
            read.append((table.num_rows, table.num_columns))
            yield table

    monkeypatch.setattr(RowGroups, "tables", counting)
    monkeypatch.setattr(row_groups, "_READ_BYTES", 3 * 16 * NUM)
    full_set = load(path, "regression", streamed=True, target="price")
    assert sum(num_rows * num_columns for num_rows, num_columns in read) == NUM * 9
    assert {num_columns for _, num_columns in read} == {3}
    read.clear()
    full_set.train.take(np.arange(5))
    assert read == [(23, 8)]  # one row group, without the column that does not vary


FLAT = """
import dataclasses, json, resource, sys
import numpy as np, torch
from raysubset.config import DataConfig, TaskConfig
from raysubset.data import load_full_set, row_groups

torch.set_num_threads(1)
row_groups._READ_BYTES = 2**25  # four columns of the large table
peaks = []
for path in sys.argv[1:]:
    config = DataConfig(name=path, target="0", streamed=True, validation_fraction=0.01, test_fraction=0.01)
    full_set = load_full_set(config, TaskConfig(name="regression"))
    examples = dataclasses.replace(full_set.training_batches(), window_bytes=2**23)
    sizes = [1000] * (len(examples) // 1000)
    num = sum(len(targets) for _, targets in examples.epoch(order_seed=0, augmentation_seed=0, batch_sizes=sizes))
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(json.dumps({"num": num, "peaks": peaks}))
"""


def test_loading_and_an_epoch_take_a_fraction_of_the_tables_memory(tmp_path: Path) -> None:
    """Takes seconds: memory is measured in a process of its own, of a table that it could be seen in."""
    generator = np.random.default_rng(0)
    part = pa.table({str(number): generator.normal(size=5000) for number in range(40)})
    result = measured(FLAT, tmp_path, part, (5, 100))  # 8 MB, and 160 MB
    assert result["num"] >= 480_000
    small, large = (peak / 1024 for peak in result["peaks"])
    assert large - small < 160 / 2, (small, large)
