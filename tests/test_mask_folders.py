"""Images beside their masks in folders: the same set as a function's arrays give, bit for bit, or a line of refusal."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from raysubset.config import DataConfig, TaskConfig
from raysubset.data import FullSet, load_full_set
from raysubset.data.contents import file_fingerprint
from raysubset.data.layout import lay_out_masks
from tests.test_image_targets import IMAGES, MASKS, assert_same, of_arrays

NUM = 24


def write(folder: Path, files: dict[str, np.ndarray]) -> Path:
    for name, pixels in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
    return folder


def pairs(image: str, mask: str, rows: range = range(NUM)) -> dict[str, np.ndarray]:
    """Files by their names, in which * is the row."""
    files = {image.replace("*", f"{row:02}"): IMAGES[row] for row in rows}
    return files | {mask.replace("*", f"{row:02}"): MASKS[row] for row in rows}


def read(folder: Path, *, task: str = "segmentation", **settings: Any) -> FullSet:
    return load_full_set(DataConfig(name=str(folder), **settings), TaskConfig(name=task))


@pytest.mark.parametrize(
    ("image", "mask", "settings"),
    [
        ("images/*.bmp", "masks/*.png", {}),
        ("Images/*.png", "Labels/*_label.png", {}),
        ("image/a/*.png", "mask/a/*.gif", {}),
        ("JPEGImages/*.png", "Segmentation/*.png", {"image_column": "JPEGImages", "target": "Segmentation"}),
    ],
)
def test_folders_of_images_and_masks_are_learned_as_a_functions_arrays_are(
    tmp_path: Path, image: str, mask: str, settings: dict[str, str]
):
    found = read(write(tmp_path, pairs(image, mask)), **settings)
    assert_same(found, of_arrays({"image": IMAGES[:NUM], "mask": MASKS[:NUM]}, "segmentation"), "unet")
    origin = f"images with masks, such as {image.replace('*', '00')} with {mask.replace('*', '00')}"
    assert f"train split: {NUM} examples of {origin}" in found.notes


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("{}/images/*.png", "{}/masks/*.png"),
        ("images/{}/*.png", "masks/{}/*.png"),
        ("{}_images/*.png", "{}_mask/*.png"),
    ],
)
def test_splits_are_told_by_the_words_of_folders(tmp_path: Path, image: str, mask: str):
    for split, rows in (("train", range(12)), ("val", range(12, 18)), ("test", range(18, 24))):
        write(tmp_path, pairs(image.format(split), mask.format(split), rows))
    found = read(tmp_path)
    for name, rows in (("train", slice(12)), ("validation", slice(12, 18)), ("test", slice(18, 24))):
        arrays = getattr(found, name).arrays()
        np.testing.assert_array_equal(arrays["image"], IMAGES[rows])
        np.testing.assert_array_equal(arrays["mask"], MASKS[rows])


def test_a_changed_mask_is_a_changed_set(tmp_path: Path):
    config = DataConfig(name=str(write(tmp_path, pairs("images/*.png", "masks/*.png"))))
    before = file_fingerprint(config)
    assert before is not None
    write(tmp_path, {"masks/03.png": MASKS[4]})
    assert not before.equals(file_fingerprint(config))


def test_black_and_white_masks_are_of_two_classes(tmp_path: Path):
    files = pairs("images/*.png", "masks/*.png")
    drawn = {name: np.where(pixels == 3, 255, 0).astype(np.uint8) for name, pixels in files.items() if "masks" in name}
    found = read(write(tmp_path, files | drawn))
    assert "masks hold 0 and 255 alone: 255 is read as class 1" in found.notes
    arrays = found.train.arrays()
    np.testing.assert_array_equal(arrays["mask"], MASKS[found.train.table.column("row").to_numpy()] == 3)
    assert found.task.class_names == ("0", "1")


def test_a_mask_of_four_bits_is_refused_as_its_1_would_be_class_17(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path, pairs("images/*.png", "masks/*.png"))
    monkeypatch.setitem(PngImagePlugin._OUTMODES, "L", PngImagePlugin._OUTMODES["L;4"])
    write(tmp_path, {"masks/05.png": np.minimum(MASKS[5], 1) * 17})
    assert set(np.unique(np.asarray(Image.open(tmp_path / "masks/05.png")))) == {0, 17}  # 0 and 1 in the file
    with pytest.raises(ValueError, match=r"masks/05.png cannot be decoded: PNG of 2 or 4 bits a pixel, .*: save it wi"):
        read(tmp_path)


def test_a_mask_too_large_for_pillow_is_told_with_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path, pairs("images/*.png", "masks/*.png"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match=r"cannot be decoded: masks/00.png, .*decompression bomb"):
        read(tmp_path)


def test_masks_without_an_image_are_left_out(tmp_path: Path):
    files = pairs("images/*.png", "masks/*.png") | {"masks/extra.png": MASKS[0]}
    found = read(write(tmp_path, files))
    assert "left out: masks without an image (1: masks/extra.png)" in found.notes
    assert len(found.train) + len(found.validation) + len(found.test) == NUM


@pytest.mark.parametrize(
    ("changed", "settings", "message"),
    [
        ({"masks/05.png": None}, {}, "images/05.png has no mask, as images/00.png has masks/00.png: add"),
        ({"masks/05.png": MASKS[5][:4]}, {}, r"masks/05.png cannot be decoded: it is 4x12, its image 8x12: give both"),
        ({"masks/05.png": np.full_like(MASKS[5], 255)}, {}, "the mask of images/05.png has 255: 0 to 254 are classes"),
        ({"masks/05.png": IMAGES[5]}, {}, r"masks/05.png cannot be decoded: PNG of mode RGB: save the number of each"),
        ({"masks/05.bmp": MASKS[5]}, {}, "masks/05.bmp and masks/05.png may be one mask: remove one"),
        ({"images/05.bmp": IMAGES[5]}, {}, "images/05.bmp and images/05.png may be one image: remove one"),
        (
            {"images/test/9.png": IMAGES[5], "masks/test/9.png": MASKS[5]},
            {},
            "images names no split, as images/test does",
        ),
        (
            {},
            {"task": "classification"},
            "such as images/00.png with masks/00.png, which --task classification does not",
        ),
        ({}, {"streamed": True}, "but .* is a folder of image files: write the training split as Parquet"),
    ],
)
def test_what_is_wrong_with_a_mask_is_told_with_its_file(
    tmp_path: Path, changed: dict[str, np.ndarray | None], settings: dict[str, Any], message: str
):
    files = pairs("images/*.png", "masks/*.png") | changed
    write(tmp_path, {name: pixels for name, pixels in files.items() if pixels is not None})
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path, **settings)
    assert "\n" not in str(caught.value)


def test_a_class_that_no_training_mask_has_is_told_with_its_file(tmp_path: Path):
    write(tmp_path, pairs("train/images/*.png", "train/masks/*.png", range(12)))
    write(tmp_path, pairs("test/images/*.png", "test/masks/*.png", range(12, 24)))
    write(tmp_path, {"test/masks/15.png": np.full_like(MASKS[0], 9)})
    with pytest.raises(ValueError, match=r"the mask of test/images/15.png has class 9, which no training mask has"):
        read(tmp_path)


def test_images_of_a_test_split_without_masks_are_left_out_by_its_name(tmp_path: Path):
    write(tmp_path, pairs("train/images/*.png", "train/masks/*.png"))
    write(tmp_path, {"testing/images/a.png": IMAGES[0]})
    with pytest.raises(ValueError, match=r"testing/images/a.png has no mask, as train/images/00.png has train/"):
        read(tmp_path)
    assert len(read(tmp_path, ignored="test").train)


@pytest.mark.parametrize(
    "paths",
    [
        ["cat/1.png", "dog/1.png"],
        ["image/1.png", "label/1.png", "text/1.png"],  # three classes
        ["images/cat/1.png", "images/dog/1.png"],
        ["images/label=cat/1.png", "images/label=dog/1.png"],
        ["imagery/1.png", "masked/1.png"],
        ["masks/1.png", "labels/1.png"],
        ["images/with_mask/1.png", "images/without_mask/1.png"],
        ["with_mask/1.png", "without_mask/1.png"],
    ],
)
def test_other_folders_hold_classes(paths: list[str]):
    assert lay_out_masks(paths, image_word="image", mask_word=None, where="here") is None
