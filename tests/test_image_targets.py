"""Numbers and masks of images in files: the same set as a function's arrays give, bit for bit, or a line of refusal."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageOps
from pyarrow import ipc

from raysubset.config import Config, DataConfig, MinimizeConfig, ModelConfig, TaskConfig
from raysubset.data import FullSet, load_full_set
from raysubset.models import architecture, build_model
from raysubset.objects_in_hand import hold_objects
from raysubset.run_directory import RunDirectory
from raysubset.tasks import Regression
from raysubset.trained_model import ModelRecord, load_model, save_model
from raysubset.trained_model.exporting import predict_files
from raysubset.training import minimize

NUM = 40
DRAWS = np.random.default_rng(0)
IMAGES = DRAWS.integers(0, 256, (NUM, 8, 12, 3), dtype=np.uint8)
MASKS = DRAWS.integers(0, 4, (NUM, 8, 12), dtype=np.uint8)
AGES = DRAWS.normal(40, 9, NUM)


def encode(pixels: np.ndarray, mode: str | None = None, kind: str = "PNG", **options: Any) -> bytes:
    image, file = Image.fromarray(pixels), io.BytesIO()
    if mode == "P":
        image = Image.fromarray(pixels, mode="P")
        image.putpalette([7 * value % 256 for value in range(768)])
    elif mode:
        image = image.convert(mode)
    image.save(file, kind, **options)
    return file.getvalue()


PNGS = [encode(image) for image in IMAGES]
MASK_PNGS = [encode(mask) for mask in MASKS]


def of_file(path: Path, columns: dict[str, Any], task: str, *, ignored: int | None = None, **settings: Any) -> FullSet:
    pq.write_table(pa.table(columns), path / "set.parquet")
    return load_full_set(DataConfig(name=str(path / "set.parquet"), **settings), TaskConfig(name=task, ignored=ignored))


def of_arrays(arrays: dict[str, np.ndarray], task: str, *, ignored: int | None = None) -> FullSet:
    with hold_objects(Config(task=TaskConfig(name=task, ignored=ignored)), data=arrays) as config:
        return load_full_set(config.data, config.task)


def assert_same(found: FullSet, expected: FullSet, model: str) -> None:
    """The same rows, statistics and spec, and so the same weights at the end of training."""
    assert found.task == expected.task
    assert found.spec == expected.spec
    ends = []
    for name in ("train", "validation", "test"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert ours.arrays().keys() == theirs.arrays().keys()
        for column, values in theirs.arrays().items():
            np.testing.assert_array_equal(ours.arrays()[column], values, strict=True)
        assert ours.table.column("row").equals(theirs.table.column("row"))
    np.testing.assert_array_equal(found.strata, expected.strata)
    for full_set in (found, expected):
        network = build_model(ModelConfig(name=model, width=2, depth=1), full_set.spec, seed=1)
        minimize(network, full_set.examples("train"), MinimizeConfig(epochs=1, batch_size=8), seed=2)
        ends.append(network.state_dict())
    assert all(torch.equal(values, ends[1][name]) for name, values in ends[0].items())


def test_images_by_name_are_warned_of_as_images_of_files_are() -> None:
    labels = np.arange(NUM) % 2
    splits = {"train": {"image": IMAGES * 0, "label": labels}, "test": {"image": IMAGES, "label": labels * 0}}
    with hold_objects(Config(), data=splits) as config:
        notes = load_full_set(config.data, config.task).notes
    assert "warning: all pixels of all training images are equal (0 of 255)" in notes
    assert "warning: the test split has no example of class 1" in notes


@pytest.mark.parametrize("kind", ["parquet", "arrow", "struct"])
def test_a_column_of_numbers_is_learned_as_a_functions_targets_are(tmp_path: Path, kind: str):
    column = [{"bytes": png, "path": None} for png in PNGS] if kind == "struct" else PNGS
    table = pa.table({"image": column, "target": AGES, "who": [str(number) for number in range(NUM)]})
    path = tmp_path / ("a.arrow" if kind == "arrow" else "a.parquet")
    if kind == "arrow":
        with ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    else:
        pq.write_table(table, path)
    found = load_full_set(DataConfig(name=str(path)), TaskConfig(name="regression"))
    assert_same(found, of_arrays({"image": IMAGES, "target": AGES}, "regression"), "cnn")
    assert found.train.table.column("who").to_pylist() == found.train.table.column("row").cast(pa.string()).to_pylist()
    assert "the column target is learned; --data.target names another" in found.notes


def test_several_columns_of_integers_and_truth_values_are_several_targets(tmp_path: Path):
    years, smiles = AGES.astype(int), AGES > 40
    found = of_file(tmp_path, {"image": PNGS, "years": years, "smiles": smiles}, "regression", target="years, smiles")
    both = np.stack([years, smiles], axis=1).astype(float)
    expected = of_arrays({"image": IMAGES, "target": both}, "regression")
    assert isinstance(found.task, Regression)
    assert found.task.target_names == ("years", "smiles")
    for name in ("mean", "std", "inputs"):
        assert getattr(found.task, name) == getattr(expected.task, name)
    np.testing.assert_array_equal(found.test.arrays()["target"], expected.test.arrays()["target"])


def flat(values: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values[0].size)


@pytest.mark.parametrize(
    "masks",
    [
        MASK_PNGS,
        [{"bytes": png, "path": None} for png in MASK_PNGS],
        [encode(mask, "P") for mask in MASKS],
        [encode(mask.astype(np.uint16)) for mask in MASKS],
        pa.array(MASK_PNGS).cast(pa.binary_view()),
        flat(MASKS),
        pa.FixedSizeListArray.from_arrays(flat(MASKS.reshape(-1, 12).astype(np.int64)), 8),
        pa.FixedShapeTensorArray.from_numpy_ndarray(MASKS.astype(np.int16)),
        pa.FixedShapeTensorArray.from_numpy_ndarray(MASKS[..., np.newaxis]),
    ],
    ids=["png", "struct", "palette", "16 bits", "view", "flat", "nested", "tensor", "one channel"],
)
def test_a_column_of_masks_is_learned_as_a_functions_masks_are(tmp_path: Path, masks: Any):
    found = of_file(tmp_path, {"image": PNGS, "mask": masks}, "segmentation", ignored=2)
    expected = of_arrays({"image": IMAGES, "mask": MASKS}, "segmentation", ignored=2)
    assert_same(found, expected, "unet")
    assert found.task.class_names == ("0", "1", "2", "3")


def test_masks_are_resized_and_cropped_with_their_images_and_keep_their_classes(tmp_path: Path):
    photos = [np.pad(image, ((0, number % 3), (0, number % 2), (0, 0))) for number, image in enumerate(IMAGES)]
    masks = [np.pad(mask, ((0, number % 3), (0, number % 2))) for number, mask in enumerate(MASKS)]
    columns = {"image": [*map(encode, photos)], "mask": [*map(encode, masks)]}
    found = of_file(tmp_path, columns, "segmentation", image_size=6)

    def fit(pixels: np.ndarray, how: Image.Resampling) -> np.ndarray:
        return np.asarray(ImageOps.fit(Image.fromarray(pixels), (6, 6), how))

    image = np.stack([fit(photo, Image.Resampling.BILINEAR) for photo in photos])
    mask = np.stack([fit(mask, Image.Resampling.NEAREST) for mask in masks])
    assert_same(found, of_arrays({"image": image, "mask": mask}, "segmentation"), "unet")


def test_splits_of_their_own_are_learned_by_what_training_rows_decide(tmp_path: Path):
    for name, rows in (("train", slice(0, 30)), ("test", slice(30, NUM))):
        pq.write_table(pa.table({"image": PNGS[rows], "age": AGES[rows]}), tmp_path / f"{name}.parquet")
    found = load_full_set(DataConfig(name=str(tmp_path), target="age"), TaskConfig(name="regression"))
    assert len(found.test) == 10
    mean = AGES[:30][found.train.table.column("row").to_numpy()].mean()
    assert isinstance(found.task, Regression)
    assert found.task.mean == pytest.approx((mean,))


def ages(values: Any) -> dict[str, Any]:
    return {"image": PNGS, "age": values}


def masks(*first: Any) -> dict[str, Any]:
    return {"image": PNGS, "mask": [*first, *MASK_PNGS[len(first) :]]}


COLOURED = encode(IMAGES[0])


@pytest.mark.parametrize(
    ("columns", "task", "settings", "message"),
    [
        (ages(AGES), "regression", {"target": "agee"}, "no column agee: set --data.target to some of image, age; did"),
        (ages(AGES), "regression", {}, "has no column target or label: set --data.target to the one to learn"),
        (ages(AGES), "regression", {"target": "image"}, "it cannot be learned from itself"),
        (
            ages([*map(str, AGES)]),
            "regression",
            {"target": "age"},
            "the target age .* is text, such as '.*use --task classificat",
        ),
        (ages([None, *AGES[1:]]), "regression", {"target": "age"}, "column age has no value in row 0 of .*leave such"),
        (ages([*AGES[1:], np.nan]), "regression", {"target": "age"}, "column age has no value in row 39 of"),
        (
            ages([*AGES[1:], np.inf]),
            "regression",
            {"target": "age"},
            "column age is inf in row 39 of .*: leave such rows",
        ),
        (ages([3] * NUM), "regression", {"target": "age"}, "age is 3 in all 29 training examples: there is nothing"),
        (ages(AGES), "regression", {"target": "age", "streamed": True}, "learns something else: leave --data.streamed"),
        (ages(AGES), "classification", {"target": "age"}, "must be integers or class names; --task regression learns"),
        (ages(AGES), "segmentation", {"target": "age"}, "masks of .* are double: need encoded bytes"),
        (masks(), "regression", {"target": "mask"}, "the target mask of .* holds binary: give numbers for regression"),
        (masks(), "classification", {"target": "mask"}, "labels of .* are binary: they must be .*--task segmentation"),
        (masks(None), "segmentation", {}, "the mask in row 0 of .* is null: leave such rows out"),
        (
            masks(COLOURED),
            "segmentation",
            {},
            "the mask in row 0 of .* PNG of mode RGB: save the number of each pixel's",
        ),
        (
            masks(*[COLOURED] * 20),
            "segmentation",
            {},
            "at least 10 images .*row 9 of the train split of [^ ]*: PNG of mode RGB",
        ),
        (masks(encode(MASKS[0], kind="JPEG")), "segmentation", {}, "the mask in row 0 of .* JPEG of mode L: save"),
        (
            masks(b"", encode(MASKS[1].T)),
            "segmentation",
            {},
            "row 0 .*cannot identify .*row 1 .* is 12x8, its image 8x12",
        ),
        (masks(encode(MASKS[0] + np.uint16(300))), "segmentation", {}, "row 0 .* it has 30.: 0 to 254 are classes"),
        (
            masks(encode(MASKS[0] + 252)),
            "segmentation",
            {},
            "the mask in row 0 of the train split has 255: 0 to 254 are",
        ),
        (masks(*[encode(MASKS[0] * 0)] * NUM), "segmentation", {}, "are of class 0: at least two classes are needed"),
        (
            ages(flat(MASKS[:, :4])),
            "segmentation",
            {"target": "age"},
            "masks of the train split are 48, its images 8x12",
        ),
        (
            ages(flat(MASKS * 1.0)),
            "segmentation",
            {"target": "age"},
            r"masks of the train split are float64: give the number of each",
        ),
        (
            ages(flat(IMAGES % 4)),
            "segmentation",
            {"target": "age"},
            "masks of the train split are 288, its images 8x12",
        ),
        (
            ages(flat(MASKS)),
            "segmentation",
            {"target": "age", "image_size": 6},
            "are 96, its images 6x6: .*--data.image-size resizes only encoded",
        ),
        (masks() | {"m": MASK_PNGS}, "segmentation", {"target": "mask,m"}, "one column of masks, not mask, m: set"),
        (
            masks(),
            "segmentation",
            {"streamed": True},
            "reads images with classes, and --task segmentation learns someth",
        ),
    ],
)
def test_what_cannot_be_learned_of_images_is_refused_in_a_line(
    tmp_path: Path, columns: dict[str, Any], task: str, settings: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message) as caught:
        of_file(tmp_path, columns, task, **settings)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_a_class_that_no_training_mask_has_is_refused(tmp_path: Path):
    test = np.where(MASKS == 3, 4, MASKS).astype(np.uint8)
    for name, values in (("train", np.where(MASKS == 1, 0, MASKS)), ("test", test)):
        pq.write_table(pa.table({"image": PNGS, "mask": [*map(encode, values)]}), tmp_path / f"{name}.parquet")
    config = DataConfig(name=str(tmp_path))
    with pytest.raises(
        ValueError, match=r"of the test split has class 1, which no training mask has: leave the split out"
    ):
        load_full_set(config, TaskConfig(name="segmentation"))
    with pytest.raises(ValueError, match="the mask in row 0 of the test split has class 4, which no training mask has"):
        load_full_set(config, TaskConfig(name="segmentation", ignored=1))


def test_classes_by_name_are_no_numbers(tmp_path: Path):
    text = '{"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}'
    table = pa.table({"image": PNGS, "label": [0, 1] * 20}).replace_schema_metadata({"huggingface": text})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(
        ValueError, match=r"the target label of .* is text, such as 'cat': .*: use --task classification"
    ):
        load_full_set(DataConfig(name=str(tmp_path / "a.parquet")), TaskConfig(name="regression"))


def test_a_file_is_predicted_a_mask_and_each_classs_share_of_its_pixels(tmp_path: Path):
    full_set = of_file(tmp_path, masks(), "segmentation", ignored=2)
    config = ModelConfig(name="unet", width=2, depth=1)
    network = build_model(config, full_set.spec, seed=3)
    record = ModelRecord(architecture(config, full_set.spec), full_set.task)
    save_model(RunDirectory.at(str(tmp_path / "run")), network.state_dict(), record)
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(PNGS[number])
    (tmp_path / "small.png").write_bytes(encode(IMAGES[0][:4]))
    files = [str(tmp_path / name) for name in ("0.png", "small.png", "1.png")]
    first, small, second = predict_files(str(tmp_path / "run"), files)
    outputs = load_model(str(tmp_path / "run"))(torch.from_numpy(IMAGES[:2]).permute(0, 3, 1, 2))
    assert [first.mask, second.mask] == outputs.argmax(1).tolist()
    shares = dict(zip(first.classes, first.probabilities, strict=True))
    all_shares = {str(number): np.mean(np.array(first.mask) == number) for number in range(4)}
    assert shares == pytest.approx({name: all_shares.pop(name) for name in shares})
    assert len(shares) == 3
    assert all(share <= min(shares.values()) for share in all_shares.values())
    assert small.error
    assert small.error.endswith("is 4x12: this model takes images of 8x12")
    with torch.no_grad():
        for values in network.parameters():
            values.fill_(torch.nan)
    save_model(RunDirectory.at(str(tmp_path / "run")), network.state_dict(), record)
    (found,) = predict_files(str(tmp_path / "run"), files[:1])
    assert found.error == f"{files[0]}: the network's outputs are NaN or infinite"
