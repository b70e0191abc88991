"""The full set: splits without copies, exact constants, batches against references, carving, bad input."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
import torch

from raysubset.config import DataConfig
from raysubset.data import Examples, FullSet, Split, load_full_set
from raysubset.data.full_set import count_levels, statistics_of_levels
from raysubset.data.split import carve
from raysubset.data.targets import named_labels, number_classes
from raysubset.tasks import crop_and_flip
from tests.tiny import image_examples, inputs_of

REAL_DATA = Path(os.environ.get("RAYSUBSET_DATA", Path(__file__).parents[2] / "shared" / "data"))


def random_images(num: int, height: int = 8, width: int = 8, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, height, width, channels), dtype=np.uint8)


def make_split(num: int = 20, **shape: int) -> Split:
    images = random_images(num, **shape)
    tensors = {"image": images, "label": np.arange(num) % 4}
    return Split.from_arrays(tensors, np.arange(num), {"sensor": pa.array(["a", "b"] * (num // 2))})


def make_examples(num: int = 20, augmentation: Literal["none", "crop_flip"] = "none", **shape: int) -> Examples:
    images = torch.from_numpy(random_images(num, **shape))
    channels = images.shape[3]
    return image_examples(
        images, torch.arange(num), [0.3, 0.4, 0.5][:channels], [0.2, 0.25, 0.3][:channels], augmentation
    )


def crop_and_flip_one_by_one(images: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Pad, slice and mirror each image alone: the definition."""
    _, height, width, _ = images.shape
    border_y, border_x = height // 8, width // 8
    results = []
    for image, (dy, dx, flip) in zip(images, draws, strict=True):
        crop = np.pad(image, ((border_y, border_y), (border_x, border_x), (0, 0)))[dy : dy + height, dx : dx + width]
        results.append(crop[:, ::-1] if flip else crop)
    return np.stack(results)


@pytest.fixture(scope="module")
def digits() -> FullSet:
    return load_full_set(DataConfig())


# Split


def test_from_arrays_shares_memory_with_its_images():
    images = random_images(20)
    split = Split.from_arrays({"image": images, "label": np.arange(20)}, np.arange(20), {})
    assert np.shares_memory(split.arrays()["image"], images)
    assert np.array_equal(split.arrays()["image"], images)


def test_a_split_is_read_only_and_in_place():
    split = make_split()
    first, again = split.arrays(), split.arrays()
    assert first["image"].shape == (20, 8, 8, 3)
    for name, values in first.items():
        assert np.shares_memory(values, again[name])
        assert not values.flags.writeable
    assert split.table.column("sensor").to_pylist() == ["a", "b"] * 10


def test_taking_everything_copies_nothing():
    split = make_split()
    taken, arrays = split.take(), split.arrays()
    assert taken["image"].data_ptr() == arrays["image"].ctypes.data
    assert taken["label"].data_ptr() == arrays["label"].ctypes.data
    assert taken["image"].shape == (20, 8, 8, 3)


def test_taking_some_copies_them_in_order():
    split = make_split()
    taken = split.take(np.array([5, 3, 3]))
    assert np.array_equal(taken["image"].numpy(), split.arrays()["image"][[5, 3, 3]])
    assert taken["label"].tolist() == [1, 3, 3]
    taken["image"].zero_()
    assert split.arrays()["image"].any()


def test_pickle_carries_the_splits_out_of_band_and_without_slack(digits: FullSet):
    buffers: list[pickle.PickleBuffer] = []
    stream = pickle.dumps(digits, protocol=5, buffer_callback=buffers.append)
    assert len(stream) < 10_000
    total = len(digits.train) + len(digits.validation) + len(digits.test)
    own = total * (64 + 8 + 8) + digits.fingerprint.get_total_buffer_size()
    assert sum(buffer.raw().nbytes for buffer in buffers) == own
    restored: FullSet = pickle.loads(stream, buffers=[bytes(buffer.raw()) for buffer in buffers])
    assert restored == digits


def test_a_restored_split_reads_the_buffers_it_was_given(digits: FullSet):
    buffers: list[pickle.PickleBuffer] = []
    stream = pickle.dumps(digits.test, protocol=5, buffer_callback=buffers.append)
    stored = [np.frombuffer(bytes(buffer.raw()), np.uint8) for buffer in buffers]
    restored: Split = pickle.loads(stream, buffers=stored)
    assert any(np.shares_memory(restored.arrays()["image"], buffer) for buffer in stored)


# Constants


def test_channel_statistics_are_numpys():
    images = random_images(3000, channels=3)
    mean, std = statistics_of_levels(count_levels(images))
    pixels = images.reshape(-1, 3) / 255
    np.testing.assert_allclose(mean, pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std(axis=0), rtol=1e-12)


def test_constant_images_have_a_deviation_of_one_grey_level():
    assert statistics_of_levels(count_levels(np.full((4, 2, 2, 1), 51, np.uint8))) == ((0.2,), (1 / 255,))


def test_constants_come_from_the_training_split(digits: FullSet):
    pixels, inputs = digits.train.arrays()["image"] / 255, inputs_of(digits)
    assert inputs.mean == pytest.approx([pixels.mean()], rel=1e-12)
    assert inputs.std == pytest.approx([pixels.std()], rel=1e-12)


# Examples


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("channels_last", [True, False])
def test_a_batch_is_torchvisions_normalisation(channels: int, channels_last: bool):
    from torchvision.transforms import functional

    examples = make_examples(channels=channels)
    indices = torch.tensor([7, 2, 2, 19])
    images, labels = examples.batch(indices, channels_last=channels_last)
    as_floats, inputs = examples.rows["image"][indices].permute(0, 3, 1, 2) / 255, inputs_of(examples)
    torch.testing.assert_close(images, functional.normalize(as_floats, list(inputs.mean), list(inputs.std)))
    assert labels.tolist() == [7, 2, 2, 19]
    size = 8 * 8 * channels
    strides = (size, 1, 8 * channels, channels) if channels_last else (size, 64, 8, 1)
    assert images.stride() == strides


def test_a_batch_comes_in_the_wanted_dtype():
    images, _ = make_examples().batch(torch.tensor([0]), dtype=torch.float64)
    assert images.dtype == torch.float64


def test_a_batch_of_the_training_split_is_centred_and_scaled(digits: FullSet):
    images, _ = digits.examples("train").batch(torch.arange(len(digits.train)))
    assert images.mean().item() == pytest.approx(0, abs=1e-4)
    assert images.std(correction=0).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("shape", [(32, 32, 3), (28, 28, 1), (16, 40, 3), (5, 5, 1)])
def test_crop_and_flip_is_pad_slice_and_mirror_of_each_image(shape: tuple[int, int, int]):
    height, width, channels = shape
    examples = make_examples(50, "crop_flip", height=height, width=width, channels=channels)
    draws = examples.draw(seed=1)
    assert draws is not None
    found = crop_and_flip(examples.rows["image"], draws)
    assert np.array_equal(found.numpy(), crop_and_flip_one_by_one(examples.rows["image"].numpy(), draws.numpy()))


def test_crop_and_flip_is_torchvisions_crop_and_flip():
    from torchvision.transforms import functional

    examples = make_examples(30, "crop_flip", height=32, width=32)
    draws = examples.draw(seed=2)
    assert draws is not None
    found = crop_and_flip(examples.rows["image"], draws).permute(0, 3, 1, 2)
    for image, result, (dy, dx, flip) in zip(
        examples.rows["image"].permute(0, 3, 1, 2), found, draws.tolist(), strict=True
    ):
        crop = functional.crop(functional.pad(image, [4]), dy, dx, 32, 32)
        assert torch.equal(result, functional.hflip(crop) if flip else crop)


def test_padding_is_black_before_normalisation():
    examples = make_examples(1, "crop_flip", height=8, width=8, channels=1)
    images, _ = examples.batch(torch.tensor([0]), draws=torch.tensor([[0, 1, 0]]))
    assert images[0, 0, 0].tolist() == pytest.approx([-0.3 / 0.2] * 8)


def test_draws_belong_to_examples_however_they_are_batched():
    examples = make_examples(20, "crop_flip", height=16, width=16)
    draws = examples.draw(seed=3)
    whole, _ = examples.batch(torch.arange(20), draws=draws)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    for part in order.split(3):
        assert torch.equal(examples.batch(part, draws=draws)[0], whole[part])


def test_draws_are_a_function_of_the_seed_and_reach_every_shift():
    examples = make_examples(4000, "crop_flip", height=16, width=24, channels=1)
    first, again, other = examples.draw(5), examples.draw(5), examples.draw(6)
    assert first is not None
    assert again is not None
    assert other is not None
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert [column.unique().tolist() for column in first.unbind(1)] == [[*range(5)], [*range(7)], [0, 1]]


def test_without_augmentation_nothing_is_drawn():
    assert make_examples().draw(seed=0) is None


def test_a_batch_writes_nothing_to_the_images():
    examples = make_examples(20, "crop_flip")
    before = examples.rows["image"].clone()
    images, _ = examples.batch(torch.arange(20), draws=examples.draw(0))
    images.zero_()
    assert torch.equal(examples.rows["image"], before)


def test_examples_of_a_whole_split_share_its_memory(digits: FullSet):
    examples = digits.examples("train")
    assert examples.rows["image"].data_ptr() == digits.train.arrays()["image"].ctypes.data
    assert len(examples) == len(digits.train)
    assert len(digits.examples("test", np.array([4, 2]))) == 2


def test_examples_are_augmented_only_where_asked_and_the_set_is():
    full_set = load_full_set(DataConfig(augmentation="crop_flip"))
    asked, unasked = (full_set.examples("train", np.arange(3), augment=augment) for augment in (True, False))
    assert asked.is_augmented
    assert asked.draw(0) is not None
    assert not unasked.is_augmented
    assert unasked.draw(0) is None
    assert not load_full_set(DataConfig()).examples("train", np.arange(3), augment=True).is_augmented


# Carving


def test_carving_is_stratified_as_scikit_learn_does_it():
    from sklearn.model_selection import train_test_split

    labels = np.random.default_rng(0).choice(5, 997, p=[0.5, 0.2, 0.15, 0.1, 0.05])
    kept, carved = carve(labels, fraction=0.1, seed=0)
    _, theirs = train_test_split(labels, test_size=100, stratify=labels, random_state=0)
    assert sorted([*kept, *carved]) == list(range(997))
    assert np.abs(np.bincount(labels[carved]) - np.bincount(theirs)).max() <= 1
    assert len(carved) == 100


def test_carving_depends_on_its_seed_alone():
    labels = np.arange(100) % 3
    assert np.array_equal(carve(labels, fraction=0.2, seed=1)[1], carve(labels, fraction=0.2, seed=1)[1])
    assert not np.array_equal(carve(labels, fraction=0.2, seed=1)[1], carve(labels, fraction=0.2, seed=2)[1])


def test_a_class_of_one_example_stays_in_training():
    kept, carved = carve(np.array([0, 0, 0, 0, 1]), fraction=0.5, seed=0)
    assert 4 in kept
    assert len(carved) == 2


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_both_sides_of_a_carving_keep_an_example(fraction: float):
    kept, carved = carve(np.array([0, 0, 1, 1]), fraction=fraction, seed=0)
    assert len(kept)
    assert len(carved)
    assert set(np.array([0, 0, 1, 1])[kept]) == {0, 1}


def test_too_few_examples_to_carve_are_refused():
    with pytest.raises(ValueError, match="3 examples of 3 classes are too few"):
        carve(np.array([0, 1, 2]), fraction=0.5, seed=0)


def test_rows_are_disjoint_and_name_the_sources_examples(digits: FullSet):
    from sklearn.datasets import load_digits

    loaded: Any = load_digits()
    splits = (digits.train, digits.validation, digits.test)
    rows = [split.table.column("row").to_numpy() for split in splits]
    assert sorted(np.concatenate(rows)) == list(range(1797))
    for split, chosen in zip(splits, rows, strict=True):
        assert np.array_equal(split.arrays()["label"], loaded.target[chosen])
        assert np.array_equal(split.arrays()["image"][..., 0], np.rint(loaded.images[chosen] * 255 / 16))


def test_a_carved_test_split_is_noted(digits: FullSet):
    assert (len(digits.train), len(digits.validation), len(digits.test)) == (1294, 144, 359)
    assert digits.notes == (
        "train split: 1797 examples of the named set digits",
        "digits has no test split: 20% of its examples (359) carved off for testing",
    )


def test_the_test_split_does_not_depend_on_the_validation_fraction(digits: FullSet):
    other = load_full_set(DataConfig(validation_fraction=0.3))
    assert other.test == digits.test


def test_another_split_seed_carves_others(digits: FullSet):
    other = load_full_set(DataConfig(split_seed=1))
    assert not np.array_equal(other.test.table.column("row"), digits.test.table.column("row"))


# Labels


def source(labels: list, **more: list) -> dict:
    return {name: pa.chunked_array([values]) for name, values in {"train": labels, **more}.items()}


def test_strings_become_sorted_class_names():
    numbers, names, _ = number_classes(source(["cat", "ant", "cat"], test=["cat", "ant"]))
    assert names == ("ant", "cat")
    assert numbers["train"].tolist() == [1, 0, 1]
    assert numbers["test"].tolist() == [1, 0]


def test_a_dictionary_column_orders_its_classes():
    values = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0]), ["zebra", "ant"])
    numbers, class_names, _ = number_classes({"train": pa.chunked_array([values])})
    assert class_names == ("zebra", "ant")
    assert numbers["train"].tolist() == [0, 1, 0]


def test_integers_are_the_names_of_classes_in_ascending_order():
    numbers, names, notes = number_classes(source([10, 1, 3, 1, 3, 10], test=[3, 10]))
    assert names == ("1", "3", "10")
    assert numbers["train"].tolist() == [2, 0, 1, 0, 1, 2]
    assert numbers["test"].tolist() == [1, 2]
    assert notes == ()
    categories = pa.DictionaryArray.from_arrays(pa.array([1, 0, 1, 0]), pa.array([2, 10]))  # as pandas writes them
    assert number_classes({"train": pa.chunked_array([categories])})[1] == ("2", "10")
    _, names, notes = number_classes(source([-1, 0, 1, 2, -1, 0, 1, 2]))
    assert names == ("-1", "0", "1", "2")
    assert str(notes[0]).startswith("warning: label -1 is read as a class of its own: leave such rows out")


def test_named_classes_may_lack_examples():
    assert number_classes({"train": named(["a", "b", "c"], [0, 2, 0])})[1] == ("a", "b", "c")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: source([0, 0, 0]), "all 3 training examples of data.name are of class 0: at least two"),
        (lambda: source(["a", "a"]), "all 2 training examples of data.name are of class a: at least two"),
        (lambda: source([0, 1_000_000_000]), "2 different integers in 2 rows, from 0 to 1000000000: use --task regr"),
        (lambda: source([0, 1], test=[0, 2]), "class 2 in row 1 of the test split is not .* with --data.ignored test"),
        (lambda: source([0, 1], test=[-1, 0]), "class -1 in row 0 of the test split .*: leave such rows out"),
        (lambda: source(["cat", "dog"], test=["cot"]), "class cot in row 0 of the test split is .*did you mean cat"),
        (lambda: source(["cat", "dog"], test=[0]), "class 0 in row 0 of the test split is not in the train split"),
        (
            lambda: source([0.0, 1.5]),
            "are double, such as 0.0: they must be integers or class names",
        ),
        (lambda: source([0, None, 1]), "the label in row 1 of the train split is null"),
        (lambda: {"train": named(["a", "b"], [0, 1, 2])}, "label 2 in row 2 of it is out of range: 2 are named"),
    ],
)
def test_labels_that_name_no_class_are_refused(make: Callable[[], dict], message: str):
    with pytest.raises(ValueError, match=message):
        number_classes(make())


def named(names: list[str], numbers: list[int]) -> pa.ChunkedArray:
    return named_labels(np.array(numbers), names, "it")


def test_a_split_that_orders_its_classes_otherwise_is_taken_by_name():
    train = named(["ant", "bee", "cat"], [0, 1, 2, 0])
    numbers, names, _ = number_classes({"train": train, "test": named(["cat", "ant"], [0, 0, 1])})
    assert names == ("ant", "bee", "cat")
    assert numbers["test"].tolist() == [2, 2, 0]


def test_numbers_with_names_meet_labels_that_are_names():
    words = pa.chunked_array([["dog", "cat", "dog"]])
    numbers, names, _ = number_classes({"train": words, "test": named(["dog", "cat"], [0, 1])})
    assert names == ("cat", "dog")
    assert numbers["test"].tolist() == [1, 0]
    numbers, names, _ = number_classes({"train": named(["dog", "cat"], [0, 1]), "test": words})
    assert names == ("dog", "cat")
    assert numbers["test"].tolist() == [0, 1, 0]


def test_classes_of_one_name_stay_apart_by_their_numbers():
    numbers, names, _ = number_classes({"train": named(["crane", "owl", "crane"], [0, 1, 2])})
    assert names == ("crane (0)", "owl", "crane (2)")
    assert numbers["train"].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="class crane in row 0 of the test split is not in the train split"):
        number_classes({"train": named(["crane", "crane"], [0, 1]), "test": named(["owl", "crane"], [1, 1])})


@pytest.mark.parametrize("labels", [[-1, -1], [None, None]])
def test_a_split_without_any_label_is_left_out_and_said(labels: list):
    numbers, _, notes = number_classes(source([0, 1], test=labels))
    assert numbers.keys() == {"train"}
    assert str(notes[0]).startswith("warning: the test split is left out, since none of its 2 examples has a label")
    with pytest.raises(ValueError, match="none of the 2 examples of the train split has a label: give some"):
        number_classes(source(labels))


def test_two_unicode_forms_of_a_name_are_one_class():
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    numbers, names, _ = number_classes(source([composed, decomposed, "bar"], test=[decomposed]))
    assert names == ("bar", composed)
    assert numbers["train"].tolist() == [1, 1, 0]
    assert numbers["test"].tolist() == [1]
    numbers, names, _ = number_classes(
        {"train": named([composed, "bar"], [0, 1]), "test": named(["bar", decomposed], [1])}
    )
    assert numbers["test"].tolist() == [0]


# Names


@pytest.mark.parametrize("name", ["mnits", "no_such_set"])
def test_an_unknown_name_lists_the_known(name: str):
    with pytest.raises(ValueError, match=r"digits, .*, mnist, fashion_mnist, cifar10, cifar100") as caught:
        load_full_set(DataConfig(name=name))
    assert ("did you mean mnist?" in str(caught.value)) == (name == "mnits")


# Real data


@pytest.mark.skipif(not (REAL_DATA / "cifar-10-batches-py").exists(), reason=f"no CIFAR-10 under {REAL_DATA}")
def test_cifar10_is_torchvisions():
    from torchvision.datasets import CIFAR10

    full_set = load_full_set(DataConfig(name="cifar10", root=str(REAL_DATA)))
    theirs = CIFAR10(REAL_DATA, train=False)
    assert np.array_equal(full_set.test.arrays()["image"], theirs.data)
    assert full_set.test.arrays()["label"].tolist() == theirs.targets
    assert full_set.task.class_names == tuple(theirs.classes)
    assert full_set.task.augmentation == "crop_flip"
    assert np.bincount(full_set.train.arrays()["label"]).tolist() == [4500] * 10
    assert np.bincount(full_set.validation.arrays()["label"]).tolist() == [500] * 10
    assert inputs_of(full_set).mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=1e-3)  # as published for all 50,000
    assert inputs_of(full_set).std == pytest.approx((0.2470, 0.2435, 0.2616), abs=1e-3)
    buffers: list[pickle.PickleBuffer] = []
    assert len(pickle.dumps(full_set, protocol=5, buffer_callback=buffers.append)) < 10_000
    own = 60_000 * (3072 + 8 + 8) + full_set.fingerprint.get_total_buffer_size()
    assert sum(buffer.raw().nbytes for buffer in buffers) == own


@pytest.mark.skipif(not (REAL_DATA / "MNIST").exists(), reason=f"no MNIST under {REAL_DATA}")
def test_mnist_is_torchvisions():
    from torchvision.datasets import MNIST

    full_set = load_full_set(DataConfig(name="mnist", root=str(REAL_DATA)))
    theirs = MNIST(REAL_DATA, train=True)
    rows = full_set.train.table.column("row").to_numpy()
    assert np.array_equal(full_set.train.arrays()["image"][..., 0], theirs.data.numpy()[rows])
    assert np.array_equal(full_set.train.arrays()["label"], theirs.targets.numpy()[rows])
    assert full_set.train.arrays()["image"].shape[1:] == inputs_of(full_set).image_shape == (28, 28, 1)
    assert full_set.task.augmentation == "none"
    assert full_set.task.class_names == tuple("0123456789")
    assert (len(full_set.train), len(full_set.validation), len(full_set.test)) == (54000, 6000, 10000)
