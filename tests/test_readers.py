"""Readers: by name, by function, by path; every layout read back equal, every damage named in one line."""

import importlib
import io
import itertools
import json
import os
import sys
import textwrap
import tracemalloc
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pyarrow import fs

from raysubset.config import DataConfig
from raysubset.data import FullSet, finding, load_full_set
from raysubset.data.columns import read_rows
from raysubset.data.images import EncodedImages, as_images
from raysubset.data.images import decode as decode_images
from raysubset.data.layout import lay_out_images, lay_out_tables
from raysubset.data.listing import Listing, list_folder
from raysubset.data.tables import choose_columns


def random_images(num: int, height: int = 6, width: int = 6, channels: int = 3, seed: int = 0) -> np.ndarray:
    images = np.random.default_rng(seed).integers(0, 256, (num, height, width, channels), dtype=np.uint8)
    return images.squeeze(3) if channels == 1 else images


def encode(image: np.ndarray, kind: str = "PNG", **more: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind, **more)
    return stream.getvalue()


def encoded_table(images: np.ndarray, labels: Any, **columns: Any) -> pa.Table:
    return pa.table({"image": [encode(image) for image in images], "label": labels, **columns})


def by_row(full_set: FullSet) -> np.ndarray:
    """All images of a source without a test split, in its own order."""
    splits = (full_set.train, full_set.validation, full_set.test)
    rows = np.concatenate([split.table.column("row").to_numpy() for split in splits])
    return np.concatenate([split.arrays()["image"] for split in splits])[np.argsort(rows)]


def load(path: Path | str, **settings: Any) -> FullSet:
    return load_full_set(DataConfig(name=str(path), **settings))


OWN_DATA = """
import numpy as np
import pyarrow as pa
import torch

images = np.arange(40 * 36, dtype=np.uint8).reshape(40, 6, 6)
labels = np.arange(40) % 4
column = pa.FixedSizeListArray.from_arrays(images.ravel(), 36)

def load():
"""
OWN_IMAGES = np.arange(40 * 36, dtype=np.uint8).reshape(40, 6, 6)


@pytest.fixture
def own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Write a module with a function of this body into the working folder; returns the function's name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(body: str) -> str:
        (tmp_path / "own_data.py").write_text(OWN_DATA + textwrap.indent(body, "    "))
        monkeypatch.delitem(sys.modules, "own_data", raising=False)
        importlib.invalidate_caches()
        return "own_data:load"

    return write


# By name


def test_missing_files_are_listed_with_the_way_out(tmp_path: Path):
    with pytest.raises(ValueError, match=r"mnist is not under .*MNIST/raw/train-images-idx3-ubyte.*--data\.download"):
        load("mnist", root=str(tmp_path))
    with pytest.raises(ValueError, match=r"cifar100 is not under .*cifar-100-python/train.*--data\.download"):
        load("cifar100", root=str(tmp_path))


def test_a_damaged_file_is_told_from_a_missing_one(tmp_path: Path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{name}-ubyte").write_bytes(b"\x00\x00\x08\x03\x00\x00\x00\x05")
    with pytest.raises(ValueError, match=r"fashion_mnist under .* is damaged"):
        load("fashion_mnist", root=str(tmp_path))


def idx(array: np.ndarray) -> bytes:
    """As MNIST's files are written: two zeros, 8 for bytes, the number of dimensions, each of them, and the bytes."""
    sizes = [size.to_bytes(4, "big") for size in array.shape]
    return b"".join([bytes([0, 0, 8, array.ndim]), *sizes, array.astype(np.uint8).tobytes()])


def test_idx_files_are_read_as_they_are_and_damaged_ones_are_refused(tmp_path: Path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    images, labels = np.arange(40 * 28 * 28).reshape(40, 28, 28) % 251, np.arange(40) % 10
    for part, last in (("train", 40), ("t10k", 20)):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(images[:last]))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels[:last]))
    (processed := raw.parent / "processed").mkdir()  # which torchvision would read instead
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(40, 28, 28, dtype=torch.uint8), torch.zeros(40, dtype=torch.int64)), processed / name)
    full_set = load("fashion_mnist", root=str(tmp_path))
    assert np.array_equal(full_set.test.arrays()["image"][..., 0], images[:20])
    assert full_set.test.arrays()["label"].tolist() == labels[:20].tolist()
    assert full_set.task.class_names[9] == "Ankle boot"

    (raw / "t10k-images-idx3-ubyte").write_bytes(idx(images[:20])[:-1])
    text = r"damaged \(t10k-images-idx3-ubyte is no whole IDX .*cannot reshape array of size 15679 .*--data\.download"
    with pytest.raises(ValueError, match=text):
        load("fashion_mnist", root=str(tmp_path))
    (raw / "t10k-images-idx3-ubyte").write_bytes(idx(images[:19]))
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte has 19 images, and t10k-labels-idx1-ubyte 20 labels"):
        load("fashion_mnist", root=str(tmp_path))


def test_a_failing_download_is_one_line_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(urllib.request, "_opener", None)  # else the process keeps these proxies, or has kept others
    with pytest.raises(ValueError, match=r"mnist could not be downloaded \(.*\): put .* by hand") as caught:
        load("mnist", root=str(tmp_path), download=True)
    assert "\n" not in str(caught.value)


def test_named_sets_are_resized_too():
    assert load("digits", image_size=12).train.shapes["image"] == (12, 12, 1)


# By function


@pytest.mark.parametrize(
    "images",
    [
        "images",
        "images[..., None]",
        "torch.from_numpy(images)",
        "list(images)",
        "images / 255",
        "(images / 255).astype(np.float32)",
    ],
)
def test_a_function_may_return_arrays(own_data: Callable[[str], str], images: str):
    full_set = load(own_data(f"return {images}, labels"))
    assert np.array_equal(by_row(full_set)[..., 0], OWN_IMAGES)
    assert len(full_set.task.class_names) == 4
    assert any("rounded to 8 bits" in note for note in full_set.notes) == ("255" in images)


def test_a_function_may_return_torch_labels_or_class_names(own_data: Callable[[str], str]):
    assert load(own_data("return images, torch.arange(40) % 4")).task.class_names == ("0", "1", "2", "3")
    assert load(own_data("return images, np.array(['cat', 'ant'] * 20)")).task.class_names == ("ant", "cat")
    assert load(own_data("return images, ['cat', 'ant'] * 20")).task.class_names == ("ant", "cat")


def test_a_function_may_return_splits(own_data: Callable[[str], str]):
    pairs = "train=(images, labels), validation=(images[:8], labels[:8]), test=(images, labels)"
    name = own_data(f"return dict({pairs})")
    full_set = load(name)
    assert (len(full_set.train), len(full_set.validation), len(full_set.test)) == (40, 8, 40)
    assert full_set.notes == (
        f"train split: 40 examples of what {name} returned",
        f"validation split: 8 examples of what {name} returned",
        f"test split: 40 examples of what {name} returned",
        f"{name} has 8 validation examples of its own: data.validation_fraction does not apply",
    )


def test_a_function_may_return_a_table(own_data: Callable[[str], str]):
    full_set = load(own_data("return pa.table(dict(image=column, label=labels))"))
    assert np.array_equal(by_row(full_set)[..., 0], OWN_IMAGES)


def test_a_slice_of_a_table_does_not_bring_the_rest_along(own_data: Callable[[str], str]):
    table = "table = pa.table(dict(image=column, label=labels, word=['w' * 1000] * 40))"
    full_set = load(own_data(f"{table}\nreturn dict(train=table, test=table.slice(4, 8))"))
    assert full_set.test.arrays()["label"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert np.array_equal(full_set.test.arrays()["image"][..., 0], OWN_IMAGES[4:12])
    assert full_set.test.table.get_total_buffer_size() < 10_000


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 3", "is an int: give an Arrow table, a pair"),
        ("return images", "is an ndarray: give an Arrow table, a pair"),
        ("return dict(trian=(images, labels))", "has a split 'trian'.*did you mean train"),
        ("return dict(test=(images, labels))", "has no train split, only test"),
        ("return images, labels[:5]", r"has 40 images but labels of shape \(5,\)"),
        (
            "return images, np.array([1, 'a'] * 20, dtype=object)",
            "label of .* has type object: it must be numbers",
        ),
        ("return images, np.zeros(40, int)", "all 40 training examples of data.name are of class 0"),
        ("return images.astype(int), labels", "are int64: they must be uint8, or floats"),
        ("return images / 128, labels", "run from 0 to 1.9.*floats must lie in"),
        ("return images / 255 - 1, labels", "run from -1 to 0: floats must lie in"),
        (
            "x = images / 255\nx[7, 2, 3] = np.nan\nreturn x, labels",
            "image of own_data:load has nan in row 7",
        ),
        ("return np.zeros((40, 3, 6, 6), np.uint8), np.arange(40) % 4", r"have shape \(40, 3, 6, 6\)"),
        ("return np.zeros((0, 6, 6), np.uint8), np.arange(0)", "give one entry an example, and one example"),
        ("return [np.zeros((6, 6)), np.zeros((6, 7))], [0, 1]", "does not make one array, as where examples differ"),
        ("return images[:2], np.arange(2)", "2 examples of 2 classes are too few"),
        (
            "return dict(train=(images, labels), test=(images[:, :5], labels))",
            r"differ in shape \(train 6x6, test 5x6\): give --data.image-size",
        ),
        (
            "return dict(train=(images, labels), test=(images, labels + 1))",
            "class 4 in row 3 of the test split",
        ),
        (
            "return pa.table(dict(img=[b''], label=[0]))",
            "no column image: set --data.image-column to some of img, label",
        ),
    ],
)
def test_what_a_function_should_not_return(own_data: Callable[[str], str], body: str, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        load(own_data(body))
    assert "\n" not in str(caught.value)


def test_a_name_without_a_function_behind_it_is_refused(own_data: Callable[[str], str]):
    own_data("return 1")
    with pytest.raises(ValueError, match="own_data has no function laod; did you mean load"):
        load("own_data:laod")
    with pytest.raises(ValueError, match="no module no_such_module"):
        load("no_such_module:load")
    with pytest.raises(ValueError, match=r"no module own_data\.deeper"):
        load("own_data.deeper:load")
    with pytest.raises(ValueError, match=r"should be package\.module:function"):
        load(":load")


def test_what_a_function_raises_is_told_with_its_place(own_data: Callable[[str], str]):
    with pytest.raises(
        ValueError, match=r"raised ZeroDivisionError: division by zero; see own_data.py, line \d+, in load"
    ):
        load(own_data("return 1 / 0"))
    with pytest.raises(ValueError, match="no_such_dependency"):
        load(own_data("import no_such_dependency"))


# Tables


def tensor_columns(images: np.ndarray) -> dict[str, pa.Array]:
    """One column of images in each layout that keeps pixels as numbers."""
    _, height, width, channels = images.shape
    flat = pa.array(images.ravel())
    row = pa.FixedSizeListArray.from_arrays(flat, channels)
    column = pa.FixedSizeListArray.from_arrays(row, width)
    return {
        "fixed_shape_tensor": pa.FixedShapeTensorArray.from_numpy_ndarray(images),
        "flat": pa.FixedSizeListArray.from_arrays(flat, height * width * channels),
        "nested": pa.FixedSizeListArray.from_arrays(column, height),
    }


@pytest.mark.parametrize("layout", ["fixed_shape_tensor", "flat", "nested"])
@pytest.mark.parametrize("kind", [".parquet", ".feather", ".arrow"])
@pytest.mark.parametrize("channels", [1, 3])
def test_tensors_are_read_back_from_every_format(tmp_path: Path, layout: str, kind: str, channels: int):
    images = random_images(40, channels=channels).reshape(40, 6, 6, channels)
    table = pa.table({"image": tensor_columns(images)[layout], "label": np.arange(40) % 4, "sensor": ["a", "b"] * 20})
    path = tmp_path / f"set{kind}"
    if kind == ".parquet":
        pq.write_table(table, path, row_group_size=7)
    elif kind == ".feather":
        feather.write_feather(table, path)
    else:  # a stream, as the `datasets` library caches it
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    full_set = load(path)
    assert np.array_equal(by_row(full_set), images)
    assert full_set.train.table.column_names == ["image", "label", "row", "sensor"]
    assert all(column.num_chunks == 1 for column in full_set.train.table.columns)
    rows = full_set.train.table.column("row").to_numpy()
    assert full_set.train.table.column("sensor").to_pylist() == ["ab"[row % 2] for row in rows]


def test_tensors_whose_dimensions_are_permuted_are_read_in_their_order_or_refused(tmp_path: Path):
    images = random_images(40, channels=3).reshape(40, 6, 6, 3)[:, :5]
    for order, is_read in (((0, 2, 1, 3), True), ((0, 3, 1, 2), False)):  # [N, W, H, C] and [N, C, H, W] in memory
        moved = np.ascontiguousarray(images.transpose(order)).transpose(np.argsort(order))
        table = pa.table({"image": pa.FixedShapeTensorArray.from_numpy_ndarray(moved), "label": np.arange(40) % 2})
        pq.write_table(table, tmp_path / "set.parquet")
        if is_read:
            assert np.array_equal(by_row(load(tmp_path / "set.parquet")), images)
        else:
            with pytest.raises(ValueError, match=r"permuted by \[2, 0, 1\], which writers take in two ways"):
                load(tmp_path / "set.parquet")


def test_hugging_faces_layout_gives_splits_classes_and_images(tmp_path: Path):
    images = random_images(30)
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "dog", "emu"]}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    (tmp_path / "data").mkdir()
    for name, part in (("train-00000-of-00002", 0), ("train-00001-of-00002", 1), ("test-00000-of-00001", 2)):
        structs = [{"bytes": encode(image), "path": None} for image in images[part * 10 : part * 10 + 10]]
        table = pa.table({"image": structs, "label": np.arange(10) % 2}).replace_schema_metadata(metadata)
        pq.write_table(table, tmp_path / "data" / f"{name}.parquet")
    (tmp_path / "README.md").write_text("a card")
    full_set = load(tmp_path)
    assert full_set.task.class_names == ("cat", "dog", "emu")
    assert len(full_set.task.class_names) == 3
    assert np.array_equal(full_set.test.arrays()["image"], images[20:])
    assert len(full_set.train) + len(full_set.validation) == 20
    rows = full_set.train.table.column("row").to_numpy()
    assert np.array_equal(full_set.train.arrays()["image"], images[:20][rows])


def test_a_uri_reads_like_a_path(tmp_path: Path):
    pq.write_table(encoded_table(random_images(40), np.arange(40) % 2), tmp_path / "set.parquet")
    assert load(f"file://{tmp_path}/set.parquet").train == load(tmp_path / "set.parquet").train
    assert load(f"file://{tmp_path}/").train == load(tmp_path).train


def test_a_bare_file_name_and_a_home_folder_are_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pq.write_table(encoded_table(random_images(40), np.arange(40) % 2), tmp_path / "set.parquet")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load("~/set.parquet").test) == 8
    monkeypatch.chdir(tmp_path)
    assert len(load("set.parquet").test) == 8


def splits_of(*files: str, label_column: str = "label") -> dict[str, list[str]]:
    layout = lay_out_tables(files, where="set", label_column=label_column)
    return {split: [file.path for file in members] for split, members in layout.items()}


@pytest.mark.parametrize(
    ("file", "split"),
    [
        ("train-00000-of-00001.parquet", "train"),
        ("data/test-00000-of-00001.parquet", "test"),
        ("validation/part-0.parquet", "validation"),
        ("val.parquet", "validation"),
        ("my_dev_set.parquet", "validation"),
        ("test/0.parquet", "test"),
        ("seg_test/0.parquet", "test"),
        ("val2017.parquet", "validation"),
        ("Test Data/0.parquet", "test"),
        ("testImages.parquet", "test"),
        ("TestSet/0.parquet", "test"),
        ("valdata.parquet", "validation"),
        ("photos (test).parquet", "test"),
        ("split=test/part-0.parquet", "test"),
        ("set=val/part-0.parquet", "validation"),
        ("subset=eval/year=2020/part-0.parquet", "test"),
        ("kind=Test/part-0.parquet", "test"),
        ("scene=test_track/part-0.parquet", "train"),
        ("label=test/part-0.parquet", "train"),
        ("testimony.parquet", "train"),
        ("extra-00000.parquet", "train"),
    ],
)
def test_splits_are_found_by_the_words_of_names(file: str, split: str):
    assert splits_of(file) == {split: [file]}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["train.parquet", "extra.parquet", "test.parquet"], "extra.parquet names no split, as train.parquet does"),
        (["test/train-0.parquet"], r"test/train-0.parquet names several splits \(test, train\)"),
        (["train_val.parquet"], r"train_val.parquet names several splits"),
        (["mytrain.parquet", "mytest.parquet"], "mytrain.parquet, mytest.parquet may name splits"),
        (["strain/0.parquet", "stest/0.parquet"], "strain, stest may name splits"),
        (["test.parquet", "eval.parquet", "train.parquet"], "test.parquet and eval.parquet both name the test split"),
        (["train/0.parquet", "training/0.parquet"], "both name the train split"),
        (["is_test=0/0.parquet", "is_test=1/0.parquet"], "is_test=0 may name a split, but not which: rename it"),
        (["split=0/0.parquet", "split=1/0.parquet"], "split=0 may name a split"),
        (["data.parquet", "data.feather"], "data.parquet and data.feather may be one table in two formats"),
    ],
)
def test_tables_whose_names_leave_the_split_open_are_refused_with_the_way_out(files: list[str], message: str):
    with pytest.raises(ValueError, match=rf"data.name = set: .*{message}.*") as caught:
        splits_of(*files)
    assert "\n" not in str(caught.value)


def test_one_line_a_split_says_what_was_read_and_one_what_was_left_out(tmp_path: Path):
    for name in ("train-a", "train-b", "test", "_temporary/0/train-c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(encoded_table(random_images(10), np.arange(10) % 2), tmp_path / f"{name}.parquet")
    for name in ("_SUCCESS", "card.md", ".train.crc"):
        (tmp_path / name).write_text("")
    notes = load(tmp_path).notes
    assert notes[:3] == (
        "train split: 20 examples of 2 files (train-a.parquet, train-b.parquet)",
        "test split: 10 examples of 1 file (test.parquet)",
        "left out: hidden (1: .train.crc), tables under names that begin with _ (1: _temporary/0/train-c.parquet), "
        "without a suffix (1: _SUCCESS), .md (1: card.md)",
    )


def test_caches_beside_the_tables_of_the_datasets_library_are_left_out(tmp_path: Path):
    table = encoded_table(random_images(40), np.arange(40) % 2)
    for name in ("data-00000-of-00001", "cache-0123456789abcdef", "cache-01ef_00000_of_00002", "tmpab12cd34"):
        with pa.ipc.new_stream(tmp_path / f"{name}.arrow", table.schema) as writer:
            writer.write_table(table)
    full_set = load(tmp_path)
    assert len(by_row(full_set)) == 40
    assert any("caches of the datasets library (3: cache-0123" in note for note in full_set.notes)


@pytest.mark.parametrize(
    "log", ["_delta_log/0.json", "test/_delta_log/0.json", ".hoodie/x", "metadata/v1.metadata.json"]
)
def test_a_table_whose_log_says_what_is_alive_is_refused(tmp_path: Path, log: str):
    pq.write_table(encoded_table(random_images(10), np.arange(10) % 2), tmp_path / "part-0.parquet")
    (tmp_path / log).parent.mkdir(parents=True)
    (tmp_path / log).write_text("{}")
    with pytest.raises(
        ValueError, match=r"makes it an? (Delta|Hudi|Iceberg) table, whose log .* give data.name a func"
    ):
        load(tmp_path)


@pytest.mark.parametrize("streamed", [False, True])
def test_hive_folders_name_splits_labels_and_columns(tmp_path: Path, streamed: bool):
    images = random_images(60)
    for number, (split, label) in enumerate(itertools.product(("train", "test"), ("cat", "dog%20"))):
        folder = tmp_path / f"split={split}" / f"label={label}" / f"year={2020 + number}"
        folder.mkdir(parents=True)
        part = [encode(image) for image in images[number * 15 : number * 15 + 15]]
        pq.write_table(pa.table({"image": part}), folder / "part-0.parquet", row_group_size=5)
    full_set = load(tmp_path, streamed=streamed)
    assert full_set.task.class_names == ("cat", "dog ")
    assert np.array_equal(full_set.test.arrays()["image"], images[30:])
    assert full_set.test.arrays()["label"].tolist() == [0] * 15 + [1] * 15
    assert full_set.test.table["year"].to_pylist() == [2022] * 15 + [2023] * 15
    rows = full_set.train.table.column("row").to_numpy()
    assert full_set.train.arrays()["label"].tolist() == [int(row >= 15) for row in rows]
    assert np.array_equal(full_set.train.take()["image"].numpy(), images[:30][rows])


def test_hive_labels_are_integers_only_if_all_are(tmp_path: Path):
    for labels, names in ((("0", "1"), ("0", "1")), (("00", "01"), ("00", "01"))):
        for label in labels:
            folder = tmp_path / labels[0] / f"label={label}"
            folder.mkdir(parents=True)
            pq.write_table(pa.table({"image": [encode(i) for i in random_images(10)]}), folder / "0.parquet")
        full_set = load(tmp_path / labels[0])
        assert full_set.task.class_names == names


def test_a_split_or_file_that_is_ignored_is_not_opened(tmp_path: Path):
    for name in ("train", "test", "extra"):
        pq.write_table(encoded_table(random_images(40), np.arange(40) % 2), tmp_path / f"{name}.parquet")
    (tmp_path / "test.parquet").write_text("damaged")
    with pytest.raises(ValueError, match=r"no training files, only test.parquet; left out: ignored \(2: "):
        load(tmp_path, ignored="train.parquet,extra.parquet")
    full_set = load(tmp_path, ignored="test, extra.*")
    assert len(by_row(full_set)) == 40
    assert "left out: ignored (1: extra.parquet), of ignored splits (1: test.parquet)" in full_set.notes
    with pytest.raises(
        ValueError, match=r"data.ignored = tset: .* has no such split, file or folder; did you mean test"
    ):
        load(tmp_path, ignored="tset,extra.parquet")


def test_a_split_of_a_function_or_named_set_can_be_ignored(own_data: Callable[[str], str], tmp_path: Path):
    name = own_data("return dict(train=(images, labels), test=(images, ['?'] * 40), unlabelled=images)")
    assert len(by_row(load(name, ignored="test,unlabelled"))) == 40
    with pytest.raises(ValueError, match=r"data.ignored = validation: own_data:load has no such split"):
        load(name, ignored="validation")
    with pytest.raises(ValueError, match=r"data.ignored = test: digits has no such split"):
        load("digits", ignored="test")


def test_training_data_cannot_be_ignored(own_data: Callable[[str], str], tmp_path: Path):
    for name in (own_data("return dict(train=(images, labels), test=(images, labels))"), "digits", "python_docs"):
        with pytest.raises(ValueError, match=r"data.ignored = train: .* would have no training data left"):
            load(name, ignored="train")


def test_a_folder_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Listing takes long on object storage."""
    for name in ("cat", "dog"):
        write_images(tmp_path / "photos" / name, random_images(5))
    (tmp_path / "tables").mkdir()
    pq.write_table(encoded_table(random_images(40), np.arange(40) % 2), tmp_path / "tables" / "a.parquet")
    listed = list[str]()

    def listing(system: fs.FileSystem, root: str) -> Listing:
        listed.append(root)
        return list_folder(system, root)

    monkeypatch.setattr(finding, "list_folder", listing)
    for name in ("photos", "tables"):
        load(tmp_path / name)
    assert listed == [str(tmp_path / "photos"), str(tmp_path / "tables")]


def test_strings_and_dictionaries_name_the_classes(tmp_path: Path):
    words = ["dog", "cat"] * 20
    pq.write_table(encoded_table(random_images(40), words), tmp_path / "strings.parquet")
    assert load(tmp_path / "strings.parquet").task.class_names == ("cat", "dog")
    feather.write_feather(encoded_table(random_images(40), pa.array(words).dictionary_encode()), tmp_path / "d.feather")
    assert load(tmp_path / "d.feather").task.class_names == ("dog", "cat")


def test_columns_can_be_named_otherwise(tmp_path: Path):
    table = encoded_table(random_images(40), np.arange(40) % 2, row=["x"] * 40).rename_columns(["img", "fine", "row"])
    pq.write_table(table, tmp_path / "set.parquet")
    full_set = load(tmp_path / "set.parquet", image_column="img", target="fine")
    assert full_set.train.table.column_names == ["image", "label", "row"]
    with pytest.raises(ValueError, match=r"has no column image: set --data.image-column to some of .*did you mean img"):
        load(tmp_path / "set.parquet")
    with pytest.raises(ValueError, match=r"set.parquet has no column fin: set --data.target .*did you mean fine"):
        load(tmp_path / "set.parquet", image_column="img", target="fin")


def write_bad_table(path: Path, image: Any, label: Any) -> None:
    pq.write_table(pa.table({"image": image, "label": label}), path)


PNG = encode(random_images(1)[0])


@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        ([PNG, b"no image", PNG, PNG], [0, 1, 0, 1], "the image in row 1 of .* cannot be decoded"),
        ([PNG, PNG[:60], PNG, PNG], [0, 1, 0, 1], "the image in row 1 of .* cannot be decoded"),
        ([PNG, None, PNG], [0, 1, 0], "the image in row 1 of .* is null"),
        ([{"bytes": PNG, "path": "a"}, {"bytes": None, "path": "b"}], [0, 1], "the image in row 1 .* without bytes"),
        (
            [PNG, encode(random_images(1, height=9)[0]), PNG, PNG],
            [0, 1, 0, 1],
            "row 0 .* 6x6, the image in row 1 .* 9x6: give --data",
        ),
        (["a.png", "b.png"] * 2, [0, 1, 0, 1], "there is no image .*/a.png, which .* names"),
        ([[1, 2], [3, 4]], [0, 1], "are list<.*>: need encoded bytes"),
        (pa.array([[1, 2], [3, 4]], pa.list_(pa.uint8(), 2)), [0, 1], "flat lists of 2 pixels, no square"),
        (pa.array([[1], [None]], pa.list_(pa.uint8(), 1)), [0, 1], "hold null pixels"),
        (pa.array([[0.5], [float("nan")]], pa.list_(pa.float32(), 1)), [0, 1], "image 1 of .* NaN"),
        ([PNG, PNG], [0, None], "the label in row 1 of .* is null"),
        ([PNG, PNG], [0.0, 1.0], "labels of .* are double"),
        ([PNG, PNG], [0, 1], "2 examples of 2 classes are too few"),
        (pa.array([], pa.binary()), pa.array([], pa.int64()), "has no rows"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, image: Any, label: Any, message: str):
    write_bad_table(tmp_path / "set.parquet", image, label)
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path / "set.parquet")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [".parquet", ".feather"])
def test_damaged_files_are_named_wherever_they_are_cut(tmp_path: Path, kind: str):
    path = tmp_path / f"set{kind}"
    table = encoded_table(random_images(40), np.arange(40) % 2)
    (pq.write_table if kind == ".parquet" else feather.write_feather)(table, path)
    whole = path.read_bytes()
    for size in (0, 1, 4, 8, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"set\{kind} (is empty|cannot be read)") as caught:
            load(path)
        assert "\n" not in str(caught.value)


def test_damage_inside_a_file_never_ends_the_process(tmp_path: Path):
    path = tmp_path / "set.feather"
    feather.write_feather(encoded_table(random_images(12), np.arange(12) % 2, word=["ab"] * 12), path)
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(100):
        bad = bytearray(whole)
        bad[random.integers(len(whole))] ^= 0xFF
        path.write_bytes(bad)
        try:
            load(path)
        except (ValueError, pa.ArrowMemoryError):
            continue


@pytest.mark.parametrize("name", ["image", "label", "sensor"])
@pytest.mark.parametrize("kind", [".parquet", ".arrow"])
def test_two_columns_of_one_name_are_refused(tmp_path: Path, name: str, kind: str):
    table = encoded_table(random_images(10), np.arange(10) % 2, sensor=["a"] * 10)
    table = table.append_column(name, table.column(name))
    path = tmp_path / f"set{kind}"
    if kind == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(ValueError, match=rf"set\{kind} has several columns {name!r}: give each a name of its own"):
        load(path)


def test_splits_that_lack_classes_are_told_with_which(tmp_path: Path):
    labels = [0] * 36 + [1, 2, 2, 2]
    names = json.dumps({"info": {"features": {"label": {"_type": "ClassLabel", "names": list("abcd")}}}})
    table = encoded_table(random_images(40), labels).replace_schema_metadata({"huggingface": names})
    pq.write_table(table, tmp_path / "set.parquet")
    lacking = [note for note in load(tmp_path / "set.parquet").notes if "no example" in note]
    assert "warning: the train split has no example of class d" in lacking
    assert "warning: the test split has no example of class b, d" in lacking
    pq.write_table(encoded_table(random_images(40), [0, 1] * 20), tmp_path / "set.parquet")
    assert not [note for note in load(tmp_path / "set.parquet").notes if "no example" in note]
    categories = pa.DictionaryArray.from_arrays(pa.array([0, 1] * 20), ["a", "b", "c"])  # as pandas keeps unused ones
    pq.write_table(pa.table({"x": range(40), "label": categories}), tmp_path / "set.parquet")
    lacking = [note for note in load(tmp_path / "set.parquet").notes if "no example" in note]
    assert lacking == [
        f"warning: the {split} split has no example of class c" for split in ("train", "test", "validation")
    ]


def test_files_that_do_not_go_together_are_refused(tmp_path: Path):
    pq.write_table(encoded_table(random_images(10), np.arange(10) % 2), tmp_path / "a.parquet")
    pq.write_table(encoded_table(random_images(10), ["x", "y"] * 5), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"the 2 files of the train split of .* do not go together"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere/set.parquet", "there is no file or folder .*/nowhere/set.parquet"),
        ("set.parquet", "there is no file or folder .*/set.parquet"),
        ("nosuchscheme://bucket/set.parquet", "is no URI that pyarrow can open"),
        ("./notes.pdf", "notes.pdf should end in .parquet"),
        ("./empty", "the folder holds neither .parquet"),
        ("./only_test", "no training files, only test.parquet"),
    ],
)
def test_a_path_to_nothing_readable_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.pdf").write_text("hello")
    (tmp_path / "empty").mkdir()
    (tmp_path / "only_test").mkdir()
    (tmp_path / "only_test" / "test.parquet").write_text("")
    with pytest.raises(ValueError, match=message):
        load(name)


def test_a_scheme_that_wants_a_package_says_which(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"hf://datasets/a/b is no URI that pyarrow can open: .*huggingface_hub"):
        load("hf://datasets/a/b")


# Folders of images


def write_images(root: Path, images: np.ndarray, kind: str = "png") -> None:
    root.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(root / f"{number:03}.{kind}")


def test_a_folder_per_class(tmp_path: Path):
    write_images(tmp_path / "dog", random_images(10, seed=1))
    write_images(tmp_path / "cat", random_images(10, seed=2))
    (tmp_path / "cat" / ".hidden.png").write_text("not an image")
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    full_set = load(tmp_path)
    assert full_set.task.class_names == ("cat", "dog")
    assert np.array_equal(by_row(full_set), np.concatenate([random_images(10, seed=2), random_images(10, seed=1)]))
    rows = full_set.train.table.column("row").to_numpy()
    assert full_set.train.table.column("file").to_pylist() == [
        f"{['cat', 'dog'][r // 10]}/{r % 10:03}.png" for r in rows
    ]
    assert full_set.notes[:2] == (
        "train split: 20 examples of 2 class folders (cat, dog), such as cat/000.png",
        "left out: hidden (1: cat/.hidden.png), .txt (1: cat/notes.txt)",
    )


def test_copies_of_files_are_told_as_they_may_be_tested_on(tmp_path: Path):
    write_images(tmp_path / "train" / "cat", random_images(6, seed=1))
    write_images(tmp_path / "train" / "dog", random_images(6, seed=2))
    write_images(tmp_path / "test" / "cat", random_images(4, seed=3))
    write_images(tmp_path / "test" / "dog", random_images(4, seed=4))

    def told() -> list[str]:
        return [note for note in load(tmp_path).notes if "the bytes of another" in note]

    assert not told()
    (tmp_path / "test" / "dog" / "009.png").write_bytes((tmp_path / "train" / "dog" / "005.png").read_bytes())
    (one,) = told()
    assert "1 file has the bytes of another (train/dog/005.png and test/dog/009.png): what is trained on may be" in one
    (tmp_path / "train" / "cat" / "000 (1).png").write_bytes((tmp_path / "train" / "cat" / "000.png").read_bytes())
    assert ["2 files have the bytes of another" in note for note in told()] == [True]


def test_names_that_begin_with_an_underscore_and_every_suffix_of_pillow_are_read(tmp_path: Path):
    for suffix in ("jfif", "jpe", "jp2", "tga", "avif", "webp", "JPG", "pnm", "dib", "qoi"):
        write_images(tmp_path / "_background_", random_images(1), suffix)
    write_images(tmp_path / "dog", random_images(3))
    (tmp_path / "dog" / "000.png").rename(tmp_path / "dog" / "_DSC0001.png")
    full_set = load(tmp_path)
    assert len(by_row(full_set)) == 13
    assert full_set.task.class_names == ("_background_", "dog")


def test_videos_and_what_systems_leave_behind_are_no_images(tmp_path: Path):
    for name in ("cat", "dog"):
        write_images(tmp_path / name, random_images(5))
    for litter in (
        "__MACOSX/cat/._000.png",
        "cat/@eaDir/000.png/THUMB.jpg",
        "cat/Thumbs.db",
        ".git/x.png",
        "a.zip",
        "cat/a.mpg",
    ):
        (tmp_path / litter).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / litter).write_bytes(b"?")
    full_set = load(tmp_path)
    assert full_set.task.class_names == ("cat", "dog")
    assert "left out: hidden (3: __MACOSX/cat/._000.png, cat/@eaDir/000.png/THUMB.jpg, …)" in full_set.notes[1]
    assert ".zip (1: a.zip), .db (1: cat/Thumbs.db), .mpg (1: cat/a.mpg)" in full_set.notes[1]


@pytest.mark.parametrize("emptied", ["owl", "train/owl"])
def test_a_class_folder_without_images_is_refused_as_torchvision_does(tmp_path: Path, emptied: str):
    from torchvision.datasets import ImageFolder

    classes = (tmp_path / emptied).parent
    for name in ("cat", "dog"):
        write_images(classes / name, random_images(5))
    (tmp_path / emptied).mkdir()
    (tmp_path / emptied / "photo.heic").write_bytes(b"?")
    with pytest.raises(FileNotFoundError, match="owl"):
        ImageFolder(classes)
    with pytest.raises(ValueError, match=rf"folder {emptied} holds no image: .*--data.ignored {emptied}$"):
        load(tmp_path)
    assert load(tmp_path, ignored=emptied).task.class_names == ("cat", "dog")


def test_folders_of_splits_hold_folders_of_classes(tmp_path: Path):
    for number, part in enumerate(("train/cat", "train/dog", "Test/cat", "Test/dog", "val/cat")):
        write_images(tmp_path / part, random_images(4, seed=number))
    full_set = load(tmp_path)
    assert (len(full_set.train), len(full_set.validation), len(full_set.test)) == (8, 4, 8)
    assert np.array_equal(full_set.validation.arrays()["image"], random_images(4, seed=4))


def layout_of(*folders: str, empty: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """The classes of each split of folders with an image in each."""
    paths = sorted(f"{folder}/0.png" for folder in folders)
    layout = lay_out_images(paths, empty=empty, where="set", label_column="label")
    return {split: [str(file.class_name) for file in files] for split, files in layout.items()}


def crossed(*splits: str) -> list[str]:
    return [f"{split}/{name}" for split in splits for name in ("cat", "dog")]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "test"),
        ("TRAIN", "Test"),
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("train_images", "test_images"),
        ("train2017", "test2017"),
        ("Training Data", "Test Data"),
        ("train-set", "test-set"),
        ("trainset", "testset"),
        ("TrainImages", "TestImages"),
        ("split=train", "split=test"),
    ],
)
def test_folders_of_splits_are_told_by_the_words_in_their_names(train: str, test: str):
    classes = ["cat", "dog"]
    assert layout_of(*crossed(train, test)) == {"train": classes, "test": classes}


@pytest.mark.parametrize(
    "classes",
    [
        ["plane", "train"],
        ["cat", "test", "trains"],
        ["bullet_train", "plane", "test_tube"],
        ["bullet_train", "freight_train"],
        ["invalid", "valid"],
        ["cat", "cat2", "evaluation"],
    ],
)
def test_a_class_may_be_named_with_a_word_of_a_split(classes: list[str]):
    assert layout_of(*classes) == {"train": classes}
    assert layout_of(*(f"train/{name}" for name in classes)) == {"train": classes}


def test_folders_below_a_class_belong_to_it():
    assert layout_of("cat/2020", "cat/2021", "dog/2020/may") == {"train": ["cat", "cat", "dog"]}


def test_labels_of_hive_folders_are_the_classes():
    assert layout_of("label=cat", "label=dog") == {"train": ["cat", "dog"]}


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ([*crossed("train", "test"), "docs"], "docs names no split, as test does: .*--data.ignored docs"),
        ([*crossed("train", "test"), "docs/x"], "docs names no split, as test does"),
        ([*crossed("train"), "cat"], "cat names no split, as train does"),
        (["train", "test", "docs"], "docs names no split, as test does"),
        ([*crossed("mytrain", "mytest")], "mytest, mytrain may name splits: separate the word"),
        ([*crossed("test"), "cat", "dog"], "cat, dog name no split, as test does"),
        ([*crossed("trainval", "test")], "trainval names no split, as test does"),
        ([*crossed("train", "training")], "train and training both name the train split"),
        ([*crossed("train_images", "train_masks")], "both name the train split"),
        ([*crossed("train", "train/train"), *crossed("test")], "folder train names a split, and so do folders in it"),
        ([*crossed("train"), "test"], "test/0.png lies in no class's folder: .*--data.ignored test$"),
        (["cat/train", "cat/test", "dog/train", "dog/test"], "test, train in the class folder cat name splits"),
        ([*crossed("archive")], "archive is its only folder, .* set data.name to set/archive"),
        ([*crossed("archive/train", "archive/test")], "archive is its only folder"),
    ],
)
def test_folders_that_may_be_splits_or_classes_are_refused_with_the_way_out(folders: list[str], message: str):
    with pytest.raises(ValueError, match=rf"data.name = set: .*{message}"):
        layout_of(*folders)


def test_an_empty_folder_of_a_split_is_refused():
    with pytest.raises(ValueError, match=r"folder val names a split and holds no image: .*--data.ignored val$"):
        layout_of(*crossed("train", "test"), empty=("val", "annotations"))


def test_classes_that_hold_the_same_folders_are_warned_of(tmp_path: Path):
    for part in crossed("trn", "tst"):
        write_images(tmp_path / part, random_images(5))
    warning = "warning: class folders trn, tst of the train split hold folders of the same names (cat, dog): if those"
    assert any(note.startswith(warning) for note in load(tmp_path).notes)
    (tmp_path / "trn").rename(tmp_path / "trainingsdaten")
    with pytest.raises(ValueError, match=r"class folders trainingsdaten, tst .*: name splits by words of their own"):
        load(tmp_path)


def test_an_archive_unpacked_twice_is_refused(tmp_path: Path):
    for part in ("cat", "dog", "pets/cat", "pets/dog"):
        write_images(tmp_path / part, random_images(5))
    with pytest.raises(ValueError, match=r"pets holds cat/000.png, .* once more, .*--data.ignored pets$"):
        load(tmp_path)
    assert load(tmp_path, ignored="pets").task.class_names == ("cat", "dog")


def test_tables_beside_folders_of_images_are_refused(tmp_path: Path):
    pq.write_table(encoded_table(random_images(40), np.arange(40) % 2), tmp_path / "set.parquet")
    Image.fromarray(random_images(1)[0]).save(tmp_path / "preview.png")
    assert any("left out: .png (1: preview.png)" in note for note in load(tmp_path).notes)
    write_images(tmp_path / "cat", random_images(5))
    with pytest.raises(ValueError, match=r"holds tables \(set.parquet\) and folders of images .*--data.ignored '\*"):
        load(tmp_path)


def test_images_beside_the_class_folders_are_refused(tmp_path: Path):
    write_images(tmp_path / "cat", random_images(2))
    Image.fromarray(random_images(1)[0]).save(tmp_path / "lost.png")
    with pytest.raises(ValueError, match=r"lost.png lies in no class's folder: .*--data.ignored lost.png"):
        load(tmp_path)


def test_a_test_folder_alone_is_refused(tmp_path: Path):
    write_images(tmp_path / "test" / "cat", random_images(2))
    with pytest.raises(ValueError, match="no train folder, only test"):
        load(tmp_path)


# Links


def test_a_link_back_up_is_not_followed(tmp_path: Path):
    for name in ("cat", "dog"):
        write_images(tmp_path / "set" / name, random_images(5))
        (tmp_path / "set" / name / "back").symlink_to(tmp_path / "set")
        (tmp_path / "set" / name / "higher").symlink_to(tmp_path)
    full_set = load(tmp_path / "set")
    assert len(by_row(full_set)) == 10
    assert "left out: links back to a folder they lie in (4: cat/back, cat/higher, …)" in full_set.notes


def test_links_to_what_is_read_count_once_and_links_to_elsewhere_are_followed(tmp_path: Path):
    for part in ("set/cat", "set/dog", "elsewhere"):
        write_images(tmp_path / part, random_images(5))
    (tmp_path / "set" / "cat" / "again.png").symlink_to(tmp_path / "set" / "cat" / "000.png")
    (tmp_path / "set" / "dog" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "owl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"dog/more/000.png and owl/000.png are one file by a link, in two splits or"):
        load(tmp_path / "set")
    full_set = load(tmp_path / "set", ignored="more")
    assert len(by_row(full_set)) == 15
    assert any("links to files that are read (1: cat/again.png)" in note for note in full_set.notes)


def test_a_link_to_nothing_is_refused_where_data_are_missed(tmp_path: Path):
    for name in ("cat", "dog"):
        write_images(tmp_path / name, random_images(5))
    (tmp_path / "cat" / "lost.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match=r"links to nothing, cat/lost.png: fetch what they stand for"):
        load(tmp_path)
    (tmp_path / "owl").symlink_to(tmp_path / "nowhere")
    (tmp_path / "cat" / ".#lock.png").symlink_to("nobody")
    with pytest.raises(ValueError, match=r"links to nothing, owl: fetch what they stand for"):
        load(tmp_path, ignored="cat/lost.png")
    assert len(by_row(load(tmp_path, ignored="cat/lost.png,owl"))) == 10


def test_a_folder_of_tables_is_read_once_however_links_go(tmp_path: Path):
    path = tmp_path / "set" / "all.parquet"
    path.parent.mkdir()
    pq.write_table(encoded_table(random_images(40), np.arange(40) % 2), path)
    (tmp_path / "set" / "loop").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "latest.parquet").symlink_to(path)
    (tmp_path / "link").symlink_to(tmp_path / "set")
    assert len(by_row(load(tmp_path / "set"))) == len(by_row(load(tmp_path / "link"))) == 40
    (tmp_path / "set" / "train.parquet").symlink_to(path)
    (tmp_path / "set" / "test.parquet").symlink_to(path)
    with pytest.raises(ValueError, match=r"test.parquet and train.parquet are one .*--data.ignored train.parquet$"):
        load(tmp_path / "set", ignored="all.parquet,latest.parquet")


def test_other_file_systems_are_listed_like_the_local_one(tmp_path: Path):
    for part in ("cat", "dog/may"):
        write_images(tmp_path / part, random_images(2))
    local = list_folder(fs.LocalFileSystem(), str(tmp_path))
    other = list_folder(fs.SubTreeFileSystem(str(tmp_path.parent), fs.LocalFileSystem()), tmp_path.name)
    assert local == other
    assert [*other.files] == ["cat/000.png", "cat/001.png", "dog/may/000.png", "dog/may/001.png"]
    assert other.folders == ("cat", "dog", "dog/may")


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path):
    write_images(tmp_path / "cat", random_images(5))
    (tmp_path / "cat" / os.fsdecode(b"caf\xe9.png")).write_bytes(b"?")
    with pytest.raises(ValueError, match=r"file name b'cat/caf\\xe9.png' is not UTF-8"):
        load(tmp_path)


def test_an_undecodable_file_is_named(tmp_path: Path):
    for name in ("cat", "dog"):
        write_images(tmp_path / name, random_images(2))
    (tmp_path / "cat" / "broken.jpg").write_bytes(encode(random_images(1)[0], "JPEG")[:100])
    with pytest.raises(ValueError, match=r"cat/broken.jpg cannot be decoded"):
        load(tmp_path)


def test_two_images_of_differing_shapes_are_named_and_image_size_cures_it(tmp_path: Path):
    write_images(tmp_path / "cat", random_images(5))
    write_images(tmp_path / "dog", random_images(5, height=12, width=8))
    with pytest.raises(ValueError, match=r"cat/000.png is 6x6, dog/000.png 12x8: give --data.image-size"):
        load(tmp_path)
    assert load(tmp_path, image_size=4).train.shapes["image"] == (4, 4, 3)


def test_a_grey_split_is_repeated_where_another_has_colours(tmp_path: Path):
    for name in ("cat", "dog"):
        write_images(tmp_path / "train" / name, random_images(5))
        write_images(tmp_path / "test" / name, random_images(5, channels=1))
    full_set = load(tmp_path)
    assert np.array_equal(full_set.test.arrays()["image"][:5], np.stack([random_images(5, channels=1)] * 3, axis=3))
    assert any("the test split is grey" in note for note in full_set.notes)


# Decoding


def decode(*data: bytes, image_size: int | None = None) -> np.ndarray:
    return decode_images(EncodedImages(len(data), data.__getitem__, str), image_size)[0]


def test_grey_sets_have_one_channel_and_mixed_sets_three():
    grey, colour = random_images(1, channels=1)[0], random_images(1)[0]
    assert np.array_equal(decode(encode(grey), encode(grey))[1, ..., 0], grey)
    mixed = decode(encode(grey), encode(colour))
    assert np.array_equal(mixed, [np.stack([grey] * 3, axis=2), colour])


@pytest.mark.parametrize("channels", [1, 3])
def test_many_images_come_in_order_and_colour_may_come_late(channels: int):
    images = random_images(1200, channels=1)
    last = random_images(1, channels=channels)[0]
    found = decode(*map(encode, images), encode(last))
    assert found.shape == (1201, 6, 6, channels)
    assert (found[:1200] == images[..., np.newaxis]).all()
    assert np.array_equal(found[1200].squeeze(), last)


def test_decoding_and_quantising_hold_the_images_once():
    def peak(work: Callable[[], object]) -> float:
        tracemalloc.start()
        work()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak

    one = encode(np.zeros((40, 40, 3), np.uint8))  # tracemalloc sees numpy's memory
    assert peak(lambda: decode_images(EncodedImages(5000, lambda _: one, str), None)) < 1.6 * 5000 * 40 * 40 * 3
    floats = np.zeros((1000, 64, 64, 1), np.float64)
    assert peak(lambda: as_images(floats, "it", None)) < floats.nbytes / 4


def test_exif_orientation_is_honoured():
    image = random_images(1, height=4, width=6)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90° clockwise
    assert np.array_equal(decode(encode(image, exif=exif))[0], np.rot90(image, k=-1))


def test_sixteen_bit_grey_is_scaled_and_palettes_are_coloured():
    levels = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    assert decode(encode(levels))[0, ..., 0].tolist() == [[0, 1, 128, 255]]
    palette = Image.fromarray(random_images(1)[0]).quantize(4)
    stream = io.BytesIO()
    palette.save(stream, "PNG")
    assert np.array_equal(decode(stream.getvalue())[0], np.asarray(palette.convert("RGB")))


def test_float_images_in_files_are_refused():
    with pytest.raises(ValueError, match="0 cannot be decoded: 32-bit pixels"):
        decode(encode(np.zeros((2, 2), np.float32), "TIFF"))


def test_resizing_is_torchvisions_resize_and_centre_crop():
    from torchvision.transforms import functional

    image = random_images(1, height=40, width=80)[0]
    resized = functional.center_crop(functional.resize(Image.fromarray(image), [10]), [10, 10])  # pyright: ignore[reportArgumentType]
    found = decode(encode(image), image_size=10)[0]
    assert np.abs(found.astype(int) - np.asarray(resized).astype(int)).max() <= 1
    arrays, _ = as_images(image[np.newaxis], "it", image_size=10)
    assert np.array_equal(arrays[0], found)


def test_images_of_the_wanted_size_are_left_alone():
    images = random_images(3)
    assert np.shares_memory(as_images(images, "it", image_size=6)[0], images)


# Files that mean the same in other words


def class_labels(table: pa.Table, names: Any) -> pa.Table:
    """The table as the `datasets` library writes it, with these names of its classes."""
    features = {"label": {"_type": "ClassLabel", "names": names}}
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def shaded(labels: list[int], shades: list[int]) -> pa.Table:
    """Images of a shade for each label."""
    images = np.zeros((len(labels), 6, 6), np.uint8) + np.array(shades, np.uint8)[labels][:, None, None]
    return encoded_table(images, labels)


@pytest.mark.parametrize("streamed", [False, True])
def test_files_that_order_their_classes_otherwise_are_taken_by_name(tmp_path: Path, streamed: bool):
    pq.write_table(class_labels(shaded([0, 1] * 10, [10, 20]), ["ant", "bee"]), tmp_path / "train-0.parquet")
    pq.write_table(class_labels(shaded([0, 2] * 10, [20, 0, 10]), ["bee", "cow", "ant"]), tmp_path / "train-1.parquet")
    pq.write_table(class_labels(shaded([0, 1] * 10, [20, 10]), ["bee", "ant"]), tmp_path / "test.parquet")
    full_set = load(tmp_path, streamed=streamed)
    assert any("order their classes differently: labels are taken by name" in note for note in full_set.notes)
    assert full_set.task.class_names == ("ant", "bee", "cow")
    for split in (full_set.train, full_set.validation, full_set.test):
        taken = split.take()
        assert set(zip(taken["image"][:, 0, 0, 0].tolist(), taken["label"].tolist(), strict=True)) == {(10, 0), (20, 1)}


def test_a_file_without_class_names_beside_one_with_is_refused(tmp_path: Path):
    pq.write_table(shaded([0, 1] * 10, [10, 20]), tmp_path / "a.parquet")
    pq.write_table(class_labels(shaded([0, 1] * 10, [10, 20]), ["bee", "ant"]), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"the 2 files of the train split of .* do not go together: .*label"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "is_told"),
    [
        ('{"info": null}', False),
        ('{"info": {"features": null}}', False),
        ('{"info": {"features": {"label": null}}}', False),
        ("[1, 2]", False),
        ("no JSON", True),
        ('{"info": {"features": {"label": {"_type": "ClassLabel"}}}}', True),
        ('{"info": {"features": {"label": {"_type": "ClassLabel", "names": null}}}}', True),
        ('{"info": {"features": {"label": {"_type": "ClassLabel", "names": [1, 2]}}}}', True),
    ],
)
def test_metadata_that_says_nothing_is_passed_over(tmp_path: Path, text: str, is_told: bool):
    table = encoded_table(random_images(20), [0, 1] * 10).replace_schema_metadata({"huggingface": text})
    pq.write_table(table, tmp_path / "a.parquet")
    full_set = load(tmp_path / "a.parquet")
    assert full_set.task.class_names == ("0", "1")
    assert any("a.parquet is ignored" in note for note in full_set.notes) == is_told


def test_a_test_split_without_labels_is_left_out_without_being_decoded(tmp_path: Path):
    pq.write_table(encoded_table(random_images(40), [0, 1] * 20), tmp_path / "train.parquet")
    pq.write_table(pa.table({"image": [b"damaged"] * 5, "label": [-1] * 5}), tmp_path / "test.parquet")
    full_set = load(tmp_path)
    assert len(full_set.test) == 8
    assert any("the test split is left out, since none of its 5 examples" in note for note in full_set.notes)


def test_arrows_other_layouts_of_texts_and_bytes_are_read(tmp_path: Path):
    images = random_images(40)
    plain = encoded_table(images, ["cat", "dog"] * 20, site=["a", "b"] * 20)
    kinds = {
        "view": {"image": pa.binary_view(), "label": pa.string_view(), "site": pa.string_view()},
        "large": {"image": pa.large_binary(), "label": pa.large_string(), "site": pa.large_string()},
        "dictionary": {"image": pa.binary(), "label": pa.dictionary(pa.int8(), pa.large_string()), "site": pa.string()},
    }
    for name, kind in kinds.items():
        table = pa.table({key: plain[key].combine_chunks().cast(type_) for key, type_ in kind.items()})
        with pa.ipc.new_file(tmp_path / f"{name}.arrow", table.schema) as writer:
            writer.write_table(table)
        full_set = load(tmp_path / f"{name}.arrow")
        assert full_set.task.class_names == ("cat", "dog")
        assert np.array_equal(by_row(full_set), images)
        assert full_set.train.table["site"].to_pylist()[0] in ("a", "b")
    (tmp_path / "dictionary.arrow").unlink()
    assert len(by_row(load(tmp_path))) == 80  # files of several layouts go together
    bytes_ = pa.DictionaryArray.from_arrays(pa.array([0, 1] * 10), pa.array([encode(image) for image in images[:2]]))
    pq.write_table(pa.table({"image": bytes_, "label": [0, 1] * 10}), tmp_path / "bytes.parquet")
    assert np.array_equal(by_row(load(tmp_path / "bytes.parquet"))[:2], images[:2])


class RayTensors(pa.ExtensionType):
    """A type that ray.data writes, here without ray.data: not registered, so that readers see its storage."""

    def __init__(self, storage: pa.DataType, name: str, text: bytes) -> None:
        self._text = text
        super().__init__(storage, name)

    def __arrow_ext_serialize__(self) -> bytes:
        return self._text

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pa.DataType, text: bytes) -> "RayTensors":
        return cls(storage, "", text)


def ray_tensors(images: list[np.ndarray], name: str, text: bytes) -> pa.Array:
    pixels = [image.ravel().tolist() for image in images]
    if name.endswith("variable_shaped_tensor"):
        shapes = [list(image.shape) for image in images]
        kind = pa.struct([("data", pa.large_list(pa.uint8())), ("shape", pa.list_(pa.int64()))])
        storage = pa.array([{"data": p, "shape": s} for p, s in zip(pixels, shapes, strict=True)], kind)
    else:
        kind = (pa.large_list if name.endswith("v2") else pa.list_)(pa.uint8())
        storage = pa.array(pixels, kind)
    return pa.ExtensionArray.from_storage(RayTensors(kind, name, text), storage)


@pytest.mark.parametrize("name", ["arrow_tensor", "arrow_tensor_v2", "arrow_variable_shaped_tensor"])
@pytest.mark.parametrize("streamed", [False, True])
def test_tensors_of_ray_data_are_read_without_it(tmp_path: Path, name: str, streamed: bool):
    images = random_images(40, width=5)
    text = b"3" if "variable" in name else b"[6, 5, 3]"
    table = pa.table({"image": ray_tensors(list(images), f"ray.data.{name}", text), "label": [0, 1] * 20})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=16)
    full_set = load(tmp_path / "a.parquet", streamed=streamed)
    rows = full_set.train.table["row"].to_numpy()
    assert np.array_equal(full_set.train.take()["image"], images[rows])


@pytest.mark.parametrize("name", ["ray.data.arrow_tensor", "ray.data.arrow_tensor_v2", "arrow", "lists"])
@pytest.mark.parametrize("streamed", [False, True])
def test_vectors_are_features_whoever_wrote_them(tmp_path: Path, name: str, streamed: bool):
    vectors = np.random.default_rng(0).integers(0, 255, (40, 3)).astype(np.uint8)
    if name == "arrow":
        column = pa.FixedShapeTensorArray.from_numpy_ndarray(vectors)
    else:
        column = pa.array(vectors.tolist()) if name == "lists" else ray_tensors([*vectors], name, b"[3]")
    table = pa.table({"embedding": column, "label": [0, 1] * 20})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=16)
    full_set = load(tmp_path / "a.parquet", streamed=streamed)
    inputs = cast(Any, full_set.task).inputs
    assert inputs.feature_names == ("embedding[0]", "embedding[1]", "embedding[2]")
    for split in (full_set.train, full_set.test):
        raw = vectors[full_set.train.table["row"].to_numpy()]
        features = (vectors[split.table["row"].to_numpy()] - raw.mean(0)) / raw.std(0)
        np.testing.assert_allclose(split.take()["inputs"], features, rtol=1e-5, atol=1e-6)
    predicted = read_rows(str(tmp_path / "a.parquet"), inputs)
    assert predicted["embedding"].to_pylist() == vectors.tolist()


def test_tensors_of_ray_data_that_differ_in_shape_are_resized_or_refused(tmp_path: Path):
    images = [np.full((6 + number % 2, 6, 3), number, np.uint8) for number in range(40)]
    name = "ray.data.arrow_variable_shaped_tensor"
    pq.write_table(pa.table({"image": ray_tensors(images, name, b"3"), "label": [0, 1] * 20}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"differ in shape: give --data.image-size"):
        load(tmp_path / "a.parquet")
    assert by_row(load(tmp_path / "a.parquet", image_size=4))[:, 0, 0, 0].tolist() == list(range(40))
    for text, message in (
        (b"\x80\x05", "is pickled, as Ray 2.49|written by Ray 2.49"),  # Ray's own words where ray.data is imported
        (b"[9, 9, 3]", r"do not have the shape \[9, 9, 3\]"),
    ):
        tensors = ray_tensors(images[::2], "ray.data.arrow_tensor_v2", text)
        pq.write_table(pa.table({"image": tensors, "label": [0, 1] * 10}), tmp_path / "b.parquet")
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "b.parquet")


def test_a_pair_of_pairs_is_train_and_test_as_keras_returns_them(own_data: Callable[[str], str]):
    full_set = load(own_data("return (images, labels[:, None]), (images[:8], labels[:8, None])"))
    assert (len(full_set.train) + len(full_set.validation), len(full_set.test)) == (40, 8)
    assert full_set.test.arrays()["label"].tolist() == [0, 1, 2, 3] * 2


def test_floats_that_use_few_levels_are_warned_of(own_data: Callable[[str], str]):
    notes = load(own_data("return images / 4095, labels")).notes
    assert any("warning: 99.9 % of the training pixels lie between 0 and 16" in note for note in notes)


@pytest.mark.parametrize("nested", [False, True])
def test_pickled_objects_in_a_table_are_refused_and_never_looked_at(nested: bool):
    class Pickled(pa.ExtensionType):
        """As ray.data's, whose values are unpickled by as_py()."""

        def __init__(self) -> None:
            super().__init__(pa.binary(), "ray.data.arrow_pickled_object")

        def __arrow_ext_serialize__(self) -> bytes:
            return b""

    column = pa.ExtensionArray.from_storage(Pickled(), pa.array([b"no pickle"] * 4))
    labels = pa.StructArray.from_arrays([column], ["a"]) if nested else column
    table = pa.table({"image": pa.array([b"x"] * 4), "label": labels})
    with pytest.raises(ValueError, match=r"column label of x\.parquet holds pickled Python objects"):
        choose_columns(table.schema, "x.parquet", DataConfig(name="x.parquet"), "classification")
