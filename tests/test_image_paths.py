"""Tables whose image column names files: they are read as the images themselves, and belong to the fingerprint."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raysubset.config import Config
from raysubset.data import FullSet, load_full_set
from raysubset.fingerprints import changes
from tests.tiny import same_bits

NUM = 24
PIXELS = np.random.default_rng(0).integers(0, 256, (NUM, 6, 6), dtype=np.uint8)
CLASSES = np.array(list("ab"))[np.arange(NUM) % 2]
AGES = np.linspace(1, 5, NUM)
OF_NUMBERS = {"task.name": "regression", "data.target": "age"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """train.csv, train.parquet and the pictures that they name; and the same pictures in bytes.parquet."""
    (tmp_path / "pictures").mkdir()
    paths = [f"pictures/{number:04d}.png" for number in range(NUM)]
    for path, pixels in zip(paths, PIXELS, strict=True):
        Image.fromarray(pixels).save(tmp_path / path)
    rows = [f"{path},{name},{age}" for path, name, age in zip(paths, CLASSES, AGES, strict=True)]
    (tmp_path / "train.csv").write_text("\n".join(["image,label,age", *rows]))
    table = pa.table({"image": paths, "label": CLASSES, "age": AGES})
    pq.write_table(table, tmp_path / "train.parquet")
    encoded = pa.array([(tmp_path / path).read_bytes() for path in paths])
    pq.write_table(table.set_column(0, "image", encoded), tmp_path / "bytes.parquet")
    return tmp_path


def loaded(path: Path | str, **settings: Any) -> FullSet:
    config = Config().with_overrides({"data.name": str(path), **settings})
    return load_full_set(*config.learned)


def rows_of(full_set: FullSet) -> list[Any]:
    return [getattr(full_set, name).take() for name in ("train", "validation", "test")]


@pytest.mark.parametrize("name", ["train.csv", "train.parquet"])
@pytest.mark.parametrize("settings", [{}, OF_NUMBERS], ids=["classes", "numbers"])
def test_images_that_a_table_names_are_those_that_another_holds(
    folder: Path, name: str, settings: dict[str, str]
) -> None:
    expected = rows_of(loaded(folder / "bytes.parquet", **settings))
    full_set = loaded(folder / name, **settings)
    assert same_bits(rows_of(full_set), expected)
    assert same_bits(rows_of(loaded(f"file://{folder}/{name}", **settings)), expected)


def test_paths_may_be_absolute_or_look_like_numbers_in_a_column_of_another_name(folder: Path) -> None:
    for number in range(NUM):
        (folder / "pictures" / f"{number:04d}.png").rename(folder / f"{number:04d}")
    rows = [f"{number:04d},{name}" for number, name in enumerate(CLASSES)]
    (folder / "numbers.csv").write_text("\n".join(["file,label", *rows]))
    absolute = [f"{folder}/{number:04d}" for number in range(NUM)]
    pq.write_table(pa.table({"image": absolute, "label": CLASSES}), folder / "absolute.parquet")
    expected = rows_of(loaded(folder / "bytes.parquet"))
    assert same_bits(rows_of(loaded(folder / "numbers.csv", **{"data.image_column": "file"})), expected)
    assert same_bits(rows_of(loaded(folder / "absolute.parquet")), expected)


@pytest.mark.parametrize("name", ["train.csv", "train.parquet"])
def test_a_changed_image_makes_another_data_set(folder: Path, name: str) -> None:
    before = loaded(folder / name).fingerprint
    Image.fromarray(PIXELS[0]).save(folder / "pictures" / "0003.png")
    (difference,) = changes(before, loaded(folder / name).fingerprint)
    assert "pictures/0003.png" in difference


def test_a_table_with_columns_set_is_learned_from_them(folder: Path) -> None:
    full_set = loaded(folder / "train.csv", **{"data.columns": "age"})
    assert full_set.spec.inputs == (1,)
    assert len(full_set.fingerprint) == 1


@pytest.mark.parametrize(
    ("damage", "settings", "message"),
    [
        ("missing", {}, r"there is no image .*/pictures/0007\.png, which .*train.parquet names: paths are relative to"),
        ("damaged", {}, r"pictures/0007\.png cannot be decoded"),
        ("", {"data.image_column": "pictur"}, "has no column pictur: set --data.image-column to some of image"),
        ("", {"data.streamed": True}, "train.parquet holds the paths of images: write the training split"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused_in_a_line(
    folder: Path, damage: str, settings: dict[str, Any], message: str
) -> None:
    path = folder / "pictures" / "0007.png"
    if damage == "missing":
        path.unlink()
    elif damage == "damaged":
        path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=message):
        loaded(folder / "train.parquet", **settings)
