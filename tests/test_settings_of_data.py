"""Each setting of data is honoured, refused, or said not to apply, whatever data are read as."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raysubset.config import Config, DataConfig, TaskConfig
from raysubset.data import FullSet, load_full_set
from raysubset.objects_in_hand import hold_objects
from raysubset.tasks import Regression
from tests.test_image_targets import IMAGES, PNGS, encode

NUM = 40
DRAWS = np.random.default_rng(0)
LABELS = np.arange(NUM) % 2
NUMBERS, OTHERS = DRAWS.normal(size=(2, NUM))
MASKS = (IMAGES[:NUM, ..., 0] > 128).astype(np.uint8)
TEXT = "A text of some words. " * 200

GIVEN: dict[str, Any] = {
    "root": "/nowhere",
    "download": True,
    "image_size": 6,
    "image_column": "other",
    "target": "other",
    "columns": "a",
    "missing": "mean",
    "window": 16,
    "vocabulary": "characters",
    "validation_fraction": 0.2,
    "test_fraction": 0.3,
    "split_seed": 5,
    "streamed": True,
    "augmentation": "crop_flip",
    "ignored": "test",
}
ARRAYS: dict[str, tuple[Any, str]] = {
    "pair": ((IMAGES[:NUM], LABELS), "classification"),
    "image_label": ({"image": IMAGES[:NUM], "label": LABELS, "other": 1 - LABELS}, "classification"),
    "image_target": ({"image": IMAGES[:NUM], "target": NUMBERS, "other": OTHERS}, "regression"),
    "image_mask": ({"image": IMAGES[:NUM], "mask": MASKS, "other": 1 - MASKS}, "segmentation"),
    "pair_mask": ((IMAGES[:NUM], MASKS.astype(np.int64)), "segmentation"),
    "inputs": ({"inputs": DRAWS.normal(size=(NUM, 3)), "target": NUMBERS, "other": OTHERS}, "regression"),
    "table": (pa.table({"a": NUMBERS, "b": OTHERS, "other": 1 - LABELS, "target": LABELS}), "classification"),
    "text": ([TEXT], "next_token"),
    "two_splits": ({"train": (IMAGES[:30], LABELS[:30]), "test": (IMAGES[30:40], LABELS[30:])}, "classification"),
}
FILES = {
    "images.parquet": "classification",
    "masks.parquet": "segmentation",
    "columns.parquet": "classification",
    "text.txt": "next_token",
    "classes": "classification",
    "scenes": "segmentation",
    "digits": "classification",
    "iris": "classification",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    pq.write_table(pa.table({"image": PNGS, "label": LABELS, "other": 1 - LABELS}), folder / "images.parquet")
    masks = [*map(encode, MASKS)]
    pq.write_table(pa.table({"image": PNGS, "mask": masks, "other": masks[::-1]}), folder / "masks.parquet")
    pq.write_table(ARRAYS["table"][0], folder / "columns.parquet")
    (folder / "text.txt").write_text(TEXT)
    for row in range(NUM):
        for name, pixels in ((f"classes/{LABELS[row]}", IMAGES[row]), ("scenes/images", IMAGES[row])):
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / name / f"{row:02}.png")
        (folder / "scenes/masks").mkdir(exist_ok=True)
        Image.fromarray(MASKS[row]).save(folder / "scenes/masks" / f"{row:02}.png")
    return folder


def load(name: str, files: Path, **settings: Any) -> FullSet:
    if name in ARRAYS:
        data, task = ARRAYS[name]
        config = Config(data=DataConfig(**settings), task=TaskConfig(name=task))
        with hold_objects(config, data=data) as given:
            return load_full_set(given.data, given.task)
    path = name if name in ("digits", "iris") else str(files / name)
    return load_full_set(DataConfig(name=path, **settings), TaskConfig(name=FILES[name]))


usual = cache(load)


def is_same(full_set: FullSet, other: FullSet) -> bool:
    if full_set.task != other.task or type(full_set.train) is not type(other.train):
        return False
    for split in ("train", "validation", "test"):
        ours, theirs = getattr(full_set, split).arrays(), getattr(other, split).arrays()
        if ours.keys() != theirs.keys() or not all(np.array_equal(ours[key], theirs[key]) for key in ours):
            return False
    return True


@pytest.mark.parametrize("setting", GIVEN)
@pytest.mark.parametrize("name", [*ARRAYS, *FILES])
def test_no_setting_is_ignored_in_silence(name: str, setting: str, files: Path):
    expected = usual(name, files)
    try:
        found = load(name, files, **{setting: GIVEN[setting]})
    except ValueError:
        return  # refused
    if is_same(found, expected):
        assert any(f"data.{setting}" in note and note not in expected.notes for note in found.notes)


@pytest.mark.parametrize("size", [6, 16])
def test_a_functions_named_images_are_resized_as_those_of_a_pair_are(size: int, files: Path):
    pair = load("pair", files, image_size=size)
    named = load("image_label", files, image_size=size)
    assert is_same(pair, named)
    assert named.spec.inputs == (3, size, size)


def test_arrays_with_masks_are_not_resized(files: Path):
    for name in ("image_mask", "pair_mask"):
        with pytest.raises(ValueError, match=r"are 8x12, its images 6x6: .*--data.image-size resizes only"):
            load(name, files, image_size=6)


def test_targets_name_arrays():
    data = {"image": IMAGES[:NUM], "age": NUMBERS, "height": OTHERS, "target": NUMBERS * 2}
    config = Config(data=DataConfig(target="age,height"), task=TaskConfig(name="regression"))
    with hold_objects(config, data=data) as given:
        found = load_full_set(given.data, given.task)
    assert isinstance(found.task, Regression)
    assert found.task.target_names == ("age", "height")
    rows = found.train.table.column("row").to_numpy()
    expected = found.task.standardised(np.stack([NUMBERS, OTHERS], axis=1)[rows], where="", rows=rows)
    np.testing.assert_array_equal(found.train.arrays()["target"], expected)
    assert "arrays that are not used: target (age, height are learned from image)" in found.notes


def test_a_mask_and_an_image_are_named(files: Path):
    found = load("image_mask", files, target="other")
    np.testing.assert_array_equal(found.train.arrays()["mask"], 1 - MASKS[found.train.table.column("row").to_numpy()])
    data = {"picture": IMAGES[:NUM], "label": LABELS}
    with hold_objects(Config(data=DataConfig(image_column="picture")), data=data) as given:
        assert is_same(load_full_set(given.data, given.task), load("image_label", files))


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        (
            {"image": IMAGES, "label": LABELS},
            {"target": "lable"},
            "here lable: name .* did you mean label",
        ),
        (
            {"image": IMAGES, "label": LABELS},
            {"image_column": "img"},
            r"gives image \(uint8 \[.*\), label \(int64 \[.*\), .* here img: name them so",
        ),
        ({"image": IMAGES, "label": LABELS}, {"target": "image"}, "image is the input and --data.target"),
        ({"image": IMAGES, "a": LABELS, "b": LABELS}, {"target": "a,b"}, "classification learns one column, not a, b"),
    ],
)
def test_names_of_arrays_that_do_not_fit_are_refused(data: dict[str, Any], settings: dict[str, str], message: str):
    config = Config(data=DataConfig(**settings))  # pyright: ignore[reportArgumentType]
    with hold_objects(config, data=data) as given, pytest.raises(ValueError, match=message):
        load_full_set(given.data, given.task)
