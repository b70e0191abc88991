"""Tables by path: which columns are learned from which, by every format and layout; and text files."""

import datetime
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from raysubset.config import DataConfig, TaskConfig, kind_of
from raysubset.data import columns, file_fingerprint, files, fitting
from raysubset.data.columns import read_rows
from raysubset.data.contents import unused_settings
from raysubset.data.finding import find_files
from raysubset.data.loading import load_full_set
from raysubset.data.named import TABLE_NAMES, TEXT_NAMES, read_named_table, read_named_texts
from raysubset.data.split import SplitName
from raysubset.data.tables import Tables
from raysubset.events import Note
from raysubset.fingerprints import entries
from raysubset.tasks.columns import fit_columns, target_numbers

TABLE = pa.table({"age": [1, 2, 3], "sex": ["f", "m", "f"], "price": [0.5, 1.5, 2.5]})
CSV = "age,sex,price\n1,f,0.5\n2,m,1.5\n3,f,2.5\n"


def is_of_columns(config: DataConfig) -> bool:
    return columns.is_of_columns(find_files(config), config)


def read_tables(config: DataConfig, task: str = "classification") -> Tables:
    return columns.read_tables(find_files(config), config, task)


def read_texts(config: DataConfig) -> tuple[dict[SplitName, list[str]], tuple[Note, ...]]:
    return files.read_texts(find_files(config), config)


def classes_of(tables: Tables, *targets: str) -> tuple[dict[SplitName, np.ndarray], tuple[str, ...]]:
    names, task = targets or tables.choice.targets, TaskConfig(name="classification")
    learned = fitting.targets_of_tables(tables.splits, names, DataConfig(), task)
    return learned.values, learned.names


def of(path: Path, **settings: Any) -> DataConfig:
    return DataConfig(name=str(path), **settings)


def texts_of(notes: Any) -> str:
    return " | ".join(map(str, notes))


def test_every_format_holds_the_same_table(tmp_path: Path):
    (tmp_path / "a.csv").write_text(CSV)
    (tmp_path / "a.tsv").write_text(CSV.replace(",", "\t"))
    pq.write_table(TABLE, tmp_path / "a.parquet")
    feather.write_feather(TABLE, tmp_path / "a.feather")
    for suffix in ("csv", "tsv", "parquet", "feather"):
        config = of(tmp_path / f"a.{suffix}", target="price")
        assert is_of_columns(config)
        tables = read_tables(config)
        assert tables.splits["train"].to_pydict() == TABLE.to_pydict()
        assert (tables.choice.features, tables.choice.targets) == (("age", "sex"), ("price",))
        assert texts_of(tables.notes) == f"train split: 3 examples of 1 file (a.{suffix})"
        assert len(entries(file_fingerprint(config))) == 1  # type: ignore[arg-type]


def test_splits_are_told_by_names(tmp_path: Path):
    for name in ("train-0", "train-1", "test"):
        (tmp_path / f"{name}.csv").write_text(CSV)
    (tmp_path / "README.txt").write_text("what it is")
    tables = read_tables(of(tmp_path, target="price"))
    assert {split: table.num_rows for split, table in tables.splits.items()} == {"train": 6, "test": 3}
    assert "left out: .txt (1: README.txt)" in texts_of(tables.notes)


def test_a_folder_of_a_hive_key_is_a_column(tmp_path: Path):
    for sex in ("f", "m"):
        (tmp_path / f"sex={sex}").mkdir()
        (tmp_path / f"sex={sex}" / "part-0.csv").write_text("age,price\n1,2\n")
        pq.write_table(pa.table({"age": [1], "price": [2]}), tmp_path / f"sex={sex}" / "part-1.parquet")
    for ignored in ("*.csv", "*.parquet"):
        config = of(tmp_path, target="sex", ignored=ignored)
        assert is_of_columns(config)
        tables = read_tables(config)
        assert tables.splits["train"].column("sex").to_pylist() == ["f", "m"]
        assert tables.choice.features == ("age", "price")


def test_the_target_is_named_or_found(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_text("a,label,b\n1,0,2\n")
    tables = read_tables(of(path))
    assert (tables.choice.targets, tables.choice.features) == (("label",), ("a", "b"))
    assert "the column label is learned; --data.target names another" in texts_of(tables.notes)
    assert read_tables(of(path, target="a, b")).choice.targets == ("a", "b")
    assert read_tables(of(path, columns="b,a")).choice.features == ("b", "a")
    path.write_text('"a, b",target\n1,0\n')
    assert read_tables(of(path, columns="a, b")).choice.features == ("a, b",)
    path.write_text(",Unnamed: 0,a,target\n0,0,7,0\n")
    tables = read_tables(of(path))
    assert tables.choice.features == ("a",)
    assert "row numbers that pandas wrote are left out: '', 'Unnamed: 0'" in texts_of(tables.notes)


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        (
            CSV,
            {},
            "has no column target or label: set --data.target to the one to learn, of age, sex, p",
        ),
        ("target,label,a\n1,1,1\n", {}, "has both columns target and label: set --data.target"),
        (CSV, {"target": "prise"}, "has no column prise: set --data.target to some of .*; did you mean price"),
        (CSV, {"target": "price", "columns": "age,sexx"}, "no column sexx: set --data.columns to .*did you mean sex"),
        (CSV, {"target": "price", "columns": "age,price"}, "price is in --data.columns and --data.target"),
        (CSV, {"target": "price", "columns": " ,"}, "data.columns = ' ,' names no column: set it to some of age, sex"),
        ("target\n1\n", {}, "has no columns beside target: give it some to learn from"),
        ("a,a,target\n1,1,1\n", {}, "has several columns 'a'"),
        ("a,target\n", {}, "has no rows"),
        (
            CSV,
            {"target": "price", "streamed": True},
            r"data.streamed reads .* Parquet files, but .*a.csv is none: write",
        ),
    ],
)
def test_a_column_that_is_not_there_is_refused(tmp_path: Path, text: str, settings: dict[str, Any], message: str):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_tables(of(tmp_path / "a.csv", **settings))
    assert "\n" not in str(caught.value)


def test_files_that_do_not_go_together_are_refused(tmp_path: Path):
    (tmp_path / "train.csv").write_text(CSV)
    (tmp_path / "test.csv").write_text("age,sex\n1,f\n")
    with pytest.raises(ValueError, match=r"test.csv has no column price, .*leave the split out with --data.ignored"):
        read_tables(of(tmp_path, target="price"))
    assert [*read_tables(of(tmp_path, target="price", ignored="test")).splits] == ["train"]
    (tmp_path / "test.csv").unlink()
    (tmp_path / "train-2.csv").write_text("age,sex,price\n2020-01-01,f,1\n")
    with pytest.raises(ValueError, match=r"the 2 files of the train split .* do not go together: .*age.*alike in all"):
        read_tables(of(tmp_path, target="price"))


def test_values_that_look_otherwise_in_another_csv_file_are_read_as_if_all_were_one_file(tmp_path: Path):
    written = {  # a day at midnight is written as a date alone
        "train-0.csv": "zip,at,n,target\n007,2020-01-01,1,0\n8,2020-01-02,2,1\n",
        "train-1.csv": "zip,at,n,target\nA1,2020-01-03 12:30:00,0.5,0\n,2020-01-04 00:00:00,,1\n",
        "test.csv": "zip,at,n,target\n007,2020-01-01,1,0\n",
    }
    for name, text in written.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "one.csv").write_text(written["train-0.csv"] + written["train-1.csv"].partition("\n")[2])
    tables, (one,) = read_tables(of(tmp_path, ignored="one.csv")), read_tables(of(tmp_path / "one.csv")).splits.values()
    assert tables.splits["train"].schema == one.schema
    assert tables.splits["train"].to_pydict() == one.to_pydict()
    assert one.column("zip").to_pylist() == ["007", "8", "A1", None]
    assert tables.splits["test"].column("zip").to_pylist() == ["007"]  # not 7, which no training row has
    own = columns.read_columns(find_files(of(tmp_path, ignored="one.csv")), of(tmp_path))[0]
    assert own["test"].column("zip").to_pylist() == ["007"]


def test_a_text_among_the_numbers_of_a_held_out_split_is_named(tmp_path: Path):
    rows = "".join(f"{n},{n % 2}\n" for n in range(12))
    (tmp_path / "train.csv").write_text(f"age,target\n{rows}")
    (tmp_path / "test.csv").write_text(f"age,target\n{rows}old,1\n")
    with pytest.raises(
        ValueError, match=r"in training it was numbers \('old' in row 12 of the test split stands among"
    ):
        load_full_set(of(tmp_path))


@pytest.mark.parametrize(("zone", "is_told"), [("", False), ("Z", True)])
def test_times_with_a_zone_in_one_split_and_without_in_another_are_told_of(tmp_path: Path, zone: str, is_told: bool):
    for name, mark in (("train", ""), ("test", zone)):
        rows = "".join(f"2020-01-{n:02}T10:00:00{mark},{n % 2}\n" for n in range(1, 13))
        (tmp_path / f"{name}.csv").write_text(f"at,target\n{rows}")
    text = "times of column at have a zone in one split and none in another, where they count as UTC"
    assert (Note(text, is_warning=True) in load_full_set(of(tmp_path)).advice) == is_told


def test_images_stay_images(tmp_path: Path):
    pq.write_table(pa.table({"image": [b""], "label": [0]}), tmp_path / "images.parquet")
    pq.write_table(pa.table({"img": [b""], "label": [0]}), tmp_path / "slip.parquet")
    assert not is_of_columns(of(tmp_path / "images.parquet"))
    assert not is_of_columns(of(tmp_path / "slip.parquet"))  # and is refused as a slip in data.image_column
    assert not is_of_columns(of(tmp_path / "images.parquet", image_column="imag"))
    config = of(tmp_path / "slip.parquet", columns="img")
    assert is_of_columns(config)
    with pytest.raises(ValueError, match="column img of the table holds binary"):
        fit_columns(read_tables(config).splits["train"], ["img"], missing="refuse")
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        (tmp_path / "pets" / name / "0.png").write_bytes(b"")
    (tmp_path / "pets" / "labels.csv").write_text(CSV)
    assert find_files(of(tmp_path / "pets")).kind == "images"


def test_settings_that_do_not_apply_are_said():
    config = DataConfig(columns="a", window=64, image_size=8)
    assert texts_of(unused_settings(config, "images")) == (
        "warning: digits is read as images, to which data.columns, data.window does not apply"
    )
    assert "to which data.image_size, data.columns does" in texts_of(unused_settings(config, "texts"))
    assert unused_settings(DataConfig(augmentation="none", validation_fraction=0.3), "columns") == ()


def test_a_split_without_labels_is_carved_from_the_others(tmp_path: Path):
    pq.write_table(pa.table({"a": np.arange(50.0), "label": np.arange(50) % 3}), tmp_path / "train.parquet")
    pq.write_table(pa.table({"a": np.arange(900.0, 909), "label": [-1] * 9}), tmp_path / "test.parquet")
    full_set = load_full_set(of(tmp_path, window=3))
    assert (len(full_set.train), len(full_set.validation), len(full_set.test)) == (36, 4, 10)
    assert full_set.test.arrays()["inputs"].max() < 3
    assert "the test split is left out, since none of its 9 examples has a label" in texts_of(full_set.notes)
    assert full_set.notes[-1].endswith("is read as columns, to which data.window does not apply")


def test_classes_are_numbered_whatever_the_targets_type(tmp_path: Path):
    def numbers(train: Any, test: Any) -> tuple[list[int], list[int], tuple[str, ...]]:
        for name, column in (("train", train), ("test", test)):
            table = pa.table({"a": np.arange(len(column)), "target": column})
            pq.write_table(table, tmp_path / f"{name}.parquet")
        labels, names = classes_of(read_tables(of(tmp_path)))
        return labels["train"].tolist(), labels["test"].tolist(), names

    assert numbers([0, 1, 1], [1, 0]) == ([0, 1, 1], [1, 0], ("0", "1"))
    assert numbers([3, 10, 3, 10], [10, 3]) == ([0, 1, 0, 1], [1, 0], ("3", "10"))
    assert numbers([-1, 1, 1, -1], [1, 1]) == ([0, 1, 1, 0], [1, 1], ("-1", "1"))
    assert numbers([True, False], [True, True]) == ([1, 0], [1, 1], ("false", "true"))
    assert numbers(["b", "a"], ["a", "b"]) == ([1, 0], [0, 1], ("a", "b"))
    assert numbers(pa.array(["b", "a"]).dictionary_encode(), ["a", "b"]) == ([0, 1], [1, 0], ("b", "a"))
    with pytest.raises(ValueError, match="class 7 in row 0 of the test split is not in the train split"):
        numbers([3, 10, 3, 10], [7])
    with pytest.raises(ValueError, match=r"labels of the train split are double, such as 0.5: .*--task regression"):
        numbers([0.5, 1.0], [0.5])
    with pytest.raises(ValueError, match="are 3 different integers in 4 rows, from 5 to 900: use --task regr"):
        numbers([5, 70, 900, 5], [5])
    tables = read_tables(of(tmp_path))
    with pytest.raises(ValueError, match=r"classification learns one column, not target, a: set --data.target to one"):
        classes_of(tables, "target", "a")


def test_a_target_that_is_no_class_is_refused(tmp_path: Path):
    pq.write_table(pa.table({"a": [1, 2], "target": [[1], [2]]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"labels of the train split are list.*: they must be integers or class names"):
        classes_of(read_tables(of(tmp_path / "a.parquet", columns="a")))
    pq.write_table(pa.table({"a": [1, 2], "target": pa.nulls(2)}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="none of the 2 examples of the train split has a label"):
        classes_of(read_tables(of(tmp_path / "a.parquet")))


def test_class_names_of_hugging_faces_metadata_are_kept(tmp_path: Path):
    feature = b'{"info": {"features": {"target": {"_type": "ClassLabel", "names": ["no", "yes"]}}}}'
    table = pa.table({"a": [1, 2, 3], "target": [1, 0, 1]}).replace_schema_metadata({"huggingface": feature})
    pq.write_table(table, tmp_path / "a.parquet")
    labels, names = classes_of(read_tables(of(tmp_path / "a.parquet")))
    assert (labels["train"].tolist(), names) == ([1, 0, 1], ("no", "yes"))
    bytes_alone = table.set_column(1, "target", pa.array([1, 0, 1], pa.uint8()))
    (tmp_path / "split").mkdir()
    pq.write_table(bytes_alone, tmp_path / "split" / "train.parquet")
    absent = bytes_alone.set_column(1, "target", pa.array([None] * 3, pa.uint8()))
    pq.write_table(absent, tmp_path / "split" / "test.parquet")  # as a contest's
    labels, names = classes_of(read_tables(of(tmp_path / "split")))
    assert (labels["train"].tolist(), [*labels], names) == ([1, 0, 1], ["train"], ("no", "yes"))


def test_rows_to_predict_are_read_as_in_training(tmp_path: Path):
    training = pa.table({"zip": ["007", "A1", "007"], "n": [1, 2, 3]})
    inputs, _ = fit_columns(training, ["zip", "n"], missing="refuse")
    (tmp_path / "new.csv").write_text("more,n,zip\nx,2,007\n")
    rows = read_rows(str(tmp_path / "new.csv"), inputs)
    assert inputs.encode(rows)[0].tolist() == [[1, 0, 0]]
    (tmp_path / "new.csv").write_text("n,zipp\n2,007\n")
    with pytest.raises(ValueError, match=r"new.csv has no column zip, only n, zipp; did you mean zipp"):
        read_rows(str(tmp_path / "new.csv"), inputs)


def test_texts_are_documents_by_split(tmp_path: Path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "b.txt").write_bytes(b"\xef\xbb\xbfh\xc3\xa9")
    (tmp_path / "train" / "a.txt").write_text("first\r\n", newline="")
    (tmp_path / "test.txt").write_text("held out")
    texts, notes = read_texts(of(tmp_path))
    assert texts == {"train": ["first\r\n", "hé"], "test": ["held out"]}
    assert texts_of(notes).startswith("train split: 9 characters of 2 files (train/a.txt, train/b.txt)")
    assert len(entries(file_fingerprint(of(tmp_path)))) == 3  # type: ignore[arg-type]
    (tmp_path / "notes.md").write_text(CSV)
    for name in ("notes.md", "test.txt"):
        assert [*read_texts(of(tmp_path / name))[0]] == ["train"]


def test_text_that_is_none_is_refused_in_a_line(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo \xff three")
    with pytest.raises(ValueError, match=r"byte 8 of .*a.txt, in line 2, is not UTF-8 \(0xff\): write it as UTF-8"):
        read_texts(of(tmp_path / "a.txt"))
    (tmp_path / "a.md").write_text("some")
    with pytest.raises(ValueError, match=r"a.md should end in .parquet.*; use --task next_token to learn text"):
        load_full_set(of(tmp_path / "a.md"))
    with pytest.raises(ValueError, match=r"holds no tables or images, only a.txt: use --task next_token to learn text"):
        load_full_set(of(tmp_path))
    (tmp_path / "b.csv").write_text(CSV)
    with pytest.raises(ValueError, match=r"holds tables \(b.csv\), and text is read from .txt files: .*--data.ignored"):
        read_texts(of(tmp_path))
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a.txt is empty"):
        read_texts(of(tmp_path / "a.txt"))


def test_a_text_of_too_few_windows_is_refused_with_how_long_they_may_be(tmp_path: Path):
    (tmp_path / "a.txt").write_text("a" * 200)
    with pytest.raises(ValueError, match=r"has 1 window of 128 tokens, .*: give --data.window 42 or less"):
        load_full_set(of(tmp_path / "a.txt"))
    full_set = load_full_set(of(tmp_path / "a.txt", window=42))
    assert (len(full_set.train), len(full_set.validation), len(full_set.test)) == (2, 1, 1)


def test_few_rows_of_numbers_are_parted_too(tmp_path: Path):
    (tmp_path / "a.csv").write_text("a,target\n" + "".join(f"{n},{n / 2}\n" for n in range(6)))
    full_set = load_full_set(of(tmp_path / "a.csv"), TaskConfig(name="regression"))
    assert (len(full_set.train), len(full_set.validation), len(full_set.test)) == (4, 1, 1)


def test_links_to_nothing_are_refused_where_they_would_be_read(tmp_path: Path):
    (tmp_path / "a.csv").write_text(CSV)
    (tmp_path / "b.csv").symlink_to(tmp_path / "gone.csv")
    with pytest.raises(ValueError, match=r"links to nothing, b.csv: fetch what they stand for"):
        read_tables(of(tmp_path, target="price"))


def test_dates_of_a_csv_file_become_seconds(tmp_path: Path):
    (tmp_path / "a.csv").write_text("day,target\n1970-01-01,1\n1970-01-03,2\n")
    table = read_tables(of(tmp_path / "a.csv")).splits["train"]
    assert table.column("day").to_pylist()[0] == datetime.date(1970, 1, 1)
    assert fit_columns(table, ["day"], missing="refuse")[0].columns[0].mean == 86400


@pytest.mark.parametrize("name", TABLE_NAMES)
def test_scikit_learns_tables_are_read_as_it_gives_them(name: str):
    from sklearn import datasets

    loaded: Any = getattr(datasets, f"load_{name}")(**({"scaled": False} if name == "diabetes" else {}))
    tables = read_named_table(DataConfig(name=name))
    assert (tables.choice.features, tables.choice.targets) == (tuple(loaded.feature_names), ("target",))
    table = tables.splits["train"]
    np.testing.assert_array_equal(
        [table.column(feature).to_numpy() for feature in tables.choice.features], loaded.data.T
    )
    if name == "diabetes":
        assert target_numbers(table, ["target"])[1][:, 0].tolist() == loaded.target.tolist()
    else:
        labels, names = classes_of(tables)
        assert (labels["train"].tolist(), names) == (loaded.target.tolist(), tuple(loaded.target_names))
    inputs, _ = fit_columns(table, tables.choice.features, missing="refuse")
    assert inputs.shape == loaded.data.shape[1:]
    assert kind_of(name) == "named"
    assert file_fingerprint(DataConfig(name=name)) is None


def test_pythons_help_is_parted_by_topics():
    texts, notes = read_named_texts(DataConfig(name=TEXT_NAMES[0]))
    assert sorted(texts["train"] + texts["test"]) == sorted(topics.topics.values())
    assert len(texts["test"]) == round(len(topics.topics) / 10)
    assert texts == read_named_texts(DataConfig(name="python_docs"))[0]
    assert f"of {len(texts['test'])} of the {len(topics.topics)} help topics of Python 3." in texts_of(notes)
    assert [*read_named_texts(DataConfig(name="python_docs", ignored="test"))[0]] == ["train"]
