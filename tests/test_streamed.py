"""Sets larger than memory: everything equals the set in memory, bit for bit, and memory stays flat."""

import dataclasses
import io
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from raysubset.config import Config, DataConfig, MinimizeConfig, ModelConfig
from raysubset.data import FullSet, StreamedExamples, StreamedSplit, load_full_set, read_here, streamed
from raysubset.data.streamed import WINDOW_BYTES, part_sizes, streaming_notes
from raysubset.models import build_model
from raysubset.planning import make_plan, manifest
from raysubset.run_directory import RunDirectory
from raysubset.tasks import Spec
from raysubset.training import evaluate, minimize
from raysubset.work import Minimizer, Piece
from tests import tiny
from tests.tiny import measured

ROOT = Path(__file__).parents[1]
NUM, SIDE = 400, 6


def pixels(num: int = NUM, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, SIDE, SIDE, channels), dtype=np.uint8)


def encoded(image: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image.squeeze()).save(stream, kind)
    return stream.getvalue()


def table(image: Any, num: int = NUM, **columns: Any) -> pa.Table:
    """Four classes in random order, and three sites."""
    labels = np.random.default_rng(1).integers(0, 4, num)
    return pa.table({"image": image, "label": labels, "site": [f"site {row % 3}" for row in range(num)]} | columns)


def tensors(images: np.ndarray) -> pa.Array:
    return pa.FixedShapeTensorArray.from_numpy_ndarray(images)


def both(path: Path | str, **settings: Any) -> tuple[FullSet, FullSet]:
    """The set in memory, and streamed."""
    in_memory, streamed = (
        load_full_set(DataConfig(name=str(path), streamed=flag, **settings)) for flag in (False, True)
    )
    assert isinstance(streamed.train, StreamedSplit)
    return in_memory, streamed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of tensors in row groups of 23 and 30."""
    folder = tmp_path_factory.mktemp("streamed")
    whole = table(tensors(pixels()))
    pq.write_table(whole.slice(0, 180), folder / "a.parquet", row_group_size=23)
    pq.write_table(whole.slice(180), folder / "b.parquet", row_group_size=30)
    return folder


@pytest.fixture(scope="module")
def sets(folder: Path) -> tuple[FullSet, FullSet]:
    return both(folder)


def stream(full_set: FullSet, *, augment: bool = False, window_rows: int = 70) -> StreamedExamples:
    """The training examples, in windows of about so many."""
    examples = full_set.training_batches(augment=augment)
    assert isinstance(examples, StreamedExamples)
    return dataclasses.replace(examples, window_bytes=window_rows * full_set.train.num_bytes_per_example)


def epoch(
    examples: Any, sizes: Sequence[int], *, seed: int = 5, **where: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(examples.epoch(order_seed=seed, augmentation_seed=6, batch_sizes=sizes, **where))


def as_rows(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> list[bytes]:
    """The images one by one, to be compared as sets."""
    return [image.contiguous().numpy().tobytes() for images, _ in batches for image in images]


# The set


def test_a_subset_reads_whole_row_groups_of_which_it_takes_rows(sets: tuple[FullSet, FullSet]):
    train = sets[1].train
    assert isinstance(train, StreamedSplit)
    assert train.share_read(np.arange(len(train))) == 1.0
    groups = [
        *(min(start + 23, 180) - start for start in range(0, 180, 23)),
        *[30] * 7,
        10,
    ]  # rows, as the files have them
    starts = np.cumsum([0, *groups])
    rows = train.table.column("row").to_numpy()
    for positions in (np.array([0]), np.array([3, 200]), np.arange(0, len(train), 9)):
        touched = {int(np.searchsorted(starts, row, side="right")) - 1 for row in rows[positions]}
        assert train.share_read(positions) == pytest.approx(sum(groups[group] for group in touched) / NUM)
    assert train.share_read(np.arange(0, len(train), 9)) > 0.9  # scattered: nearly all of the files


def hugging_face(images: np.ndarray) -> list[dict[str, Any]]:
    return [{"bytes": encoded(image), "path": None} for image in images]


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(lambda: tensors(pixels()), id="tensors"),
        pytest.param(lambda: [encoded(image) for image in pixels()], id="encoded"),
        pytest.param(lambda: hugging_face(pixels()), id="hugging face"),
        pytest.param(lambda: [encoded(image) for image in pixels(channels=1)], id="grey"),
        pytest.param(
            lambda: [encoded(image) for image in [*pixels(390, 1), *pixels(10, 3)]], id="grey, and coloured at the end"
        ),
        pytest.param(lambda: tensors(pixels().astype(np.float32) / 255), id="floats"),
    ],
)
def test_rows_labels_splits_and_statistics_are_those_of_the_set_in_memory(
    image: Callable[[], Any], tmp_path: Path
) -> None:
    pq.write_table(table(image()), tmp_path / "all.parquet", row_group_size=37)
    in_memory, streamed = both(tmp_path / "all.parquet")
    assert streamed.task == in_memory.task
    assert streamed.notes[:-1] == in_memory.notes
    assert streamed.train.table == in_memory.train.table.drop_columns("image")
    assert streamed.validation.table == in_memory.validation.table
    assert streamed.test.table == in_memory.test.table
    chosen = np.random.default_rng(2).integers(0, len(in_memory.train), 90)  # in any order, some of them twice
    assert tiny.same_bits(streamed.train.take(chosen), in_memory.train.take(chosen))
    assert torch.equal(streamed.train.take()["image"], in_memory.train.take()["image"])


def test_splits_of_their_own_class_names_and_resizing_are_as_in_memory(tmp_path: Path) -> None:
    names = pa.array([f"class {number % 4}" for number in range(NUM)])
    coloured = table([encoded(image) for image in pixels(seed=3)]).set_column(1, "label", names)
    grey = table([encoded(image) for image in pixels(channels=1)]).set_column(1, "label", names)
    pq.write_table(grey, tmp_path / "train-0.parquet", row_group_size=50)
    pq.write_table(coloured, tmp_path / "test-0.parquet")
    in_memory, streamed = both(tmp_path, image_size=4)
    assert streamed.task == in_memory.task
    assert tiny.inputs_of(streamed).image_shape == (4, 4, 3)
    assert streamed.notes[:-1] == in_memory.notes
    assert streamed.validation.table == in_memory.validation.table
    assert streamed.test.table == in_memory.test.table
    assert torch.equal(streamed.train.take()["image"], in_memory.train.take()["image"])


def test_subsets_and_their_manifest_are_those_of_the_set_in_memory(sets: tuple[FullSet, FullSet]) -> None:
    config = Config().with_overrides({"subsets.scheme": "column", "subsets.column": "site", "model.width": 4})
    expected, found = (make_plan(config, full_set) for full_set in sets)
    assert len(expected.subsets) == 3
    assert manifest(found.subsets, sets[1]) == manifest(expected.subsets, sets[0])
    assert found.advice == expected.advice


def test_a_subsets_minimum_has_the_same_bits(sets: tuple[FullSet, FullSet]) -> None:
    minima = []
    indices = np.random.default_rng(0).permutation(len(sets[0].train))[:60]
    for full_set in sets:
        model = build_model(ModelConfig(width=4, depth=1), Spec((3, SIDE, SIDE), (4,)), seed=0)
        minimize(model, full_set.examples("train", indices), MinimizeConfig(epochs=2.0, batch_size=20), seed=1)
        minima.append(model.state_dict())
    assert tiny.same_bits(*minima)


def test_a_streamed_set_pickles_without_its_images(sets: tuple[FullSet, FullSet]) -> None:
    num_pixels = len(sets[1].train) * SIDE * SIDE * 3
    train = pickle.dumps(sets[1].train)
    assert len(train) < num_pixels / 2
    again = pickle.loads(train)
    assert torch.equal(again.take(np.arange(5))["image"], sets[0].train.take(np.arange(5))["image"])


def test_what_is_held_is_counted_without_the_images_on_disk(sets: tuple[FullSet, FullSet]) -> None:
    in_memory, streamed = sets
    pixels_of_all = len(in_memory.train) * SIDE * SIDE * 3
    assert in_memory.train.num_bytes - streamed.train.num_bytes == pixels_of_all
    assert streamed.training_num_bytes(10) == in_memory.training_num_bytes(10) == 10 * (108 + 8)
    train = streamed.train
    assert isinstance(train, StreamedSplit)
    huge = dataclasses.replace(streamed, train=HugeSplit(train.table, train.shapes, train.groups))
    assert huge.training_num_bytes() == 2 * WINDOW_BYTES


class HugeSplit(StreamedSplit):
    """A split that claims to be of very large images."""

    num_bytes_per_example: Any = 2**40  # pyright: ignore[reportIncompatibleMethodOverride]


def test_only_row_groups_with_wanted_rows_are_read(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "all.parquet"
    pq.write_table(pq.read_table(folder), path, row_group_size=100, compression="none", use_dictionary=False)
    in_memory, streamed = both(path)
    column = pq.ParquetFile(path).metadata.row_group(2).column(0)
    content = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    content[middle : middle + 64] = bytes(64)
    path.write_bytes(content)
    rows = in_memory.train.table["row"].to_numpy()
    whole, damaged = np.flatnonzero((rows < 200) | (rows >= 300)), np.flatnonzero((rows >= 200) & (rows < 300))
    # Written without checksums, so the damage shows in the pixels of that row group, and nowhere else.
    assert torch.equal(streamed.train.take(whole)["image"], in_memory.train.take(whole)["image"])
    assert not torch.equal(streamed.train.take(damaged)["image"], in_memory.train.take(damaged)["image"])


def test_files_that_changed_or_went_are_named(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "all.parquet"
    pq.write_table(pq.read_table(folder), path, row_group_size=100)
    streamed = load_full_set(DataConfig(name=str(path), streamed=True))
    pq.write_table(pq.read_table(folder), path, row_group_size=90)
    with pytest.raises(ValueError, match=r"all\.parquet has changed .*start a new run"):
        streamed.train.take(np.arange(3))
    path.unlink()
    with pytest.raises(ValueError, match=r"all\.parquet cannot be read, .*every node"):
        streamed.train.take(np.arange(3))


def test_images_of_two_shapes_are_refused_with_the_way_out(tmp_path: Path) -> None:
    images = [encoded(image) for image in [*pixels(200), *pixels(200)[:, :4]]]
    pq.write_table(table(images), tmp_path / "two.parquet", row_group_size=100)
    with pytest.raises(ValueError, match=r"two\.parquet differ in shape \(6x6 and 4x6\): give --data\.image-size"):
        load_full_set(DataConfig(name=str(tmp_path / "two.parquet"), streamed=True))


def test_what_is_no_parquet_is_refused_with_the_way_out(tmp_path: Path) -> None:
    for name in ("digits", "own_data:load"):
        with pytest.raises(
            ValueError, match=rf"data\.streamed reads row groups of Parquet files, but {name} is.*write"
        ):
            load_full_set(DataConfig(name=name, streamed=True))
    with (
        pa.OSFile(str(tmp_path / "all.arrow"), "wb") as file,
        pa.ipc.new_file(file, table(tensors(pixels())).schema) as w,
    ):
        w.write_table(table(tensors(pixels())))
    with pytest.raises(ValueError, match=r"all\.arrow is none.*or leave --data\.streamed out"):
        load_full_set(DataConfig(name=str(tmp_path / "all.arrow"), streamed=True))


def test_lbfgs_on_a_streamed_full_set_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lbfgs needs all examples in memory, and data\.streamed holds none: use sgd"):
        Config().with_overrides({"minimize.optimizer": "lbfgs", "data.streamed": True})


def test_a_stage_on_the_full_set_never_holds_all_images(
    sets: tuple[FullSet, FullSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = StreamedSplit.take

    def take_some(self: StreamedSplit, indices: np.ndarray | None = None) -> dict[str, torch.Tensor]:
        assert indices is not None
        assert len(indices) < len(self)
        return take(self, indices)

    monkeypatch.setattr(StreamedSplit, "take", take_some)
    config = Config().with_overrides({"model.name": "mlp", "trunk.epochs": 1.0, "minimize.epochs": 1.0})
    trunk = Piece(config, RunDirectory(str(tmp_path), "run"), "trunk", start_id="start")
    Minimizer(lambda: sets[1], num_gpus=0, node="there").minimize([trunk], None, attempts=[0], waited_s=0.0)


def test_large_row_groups_are_warned_of(sets: tuple[FullSet, FullSet], monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(sets[1].train, StreamedSplit)
    assert len(streaming_notes(sets[1].train, 0)) == 1
    monkeypatch.setattr(streamed, "LARGE_ROW_GROUP_BYTES", sets[1].train.groups.num_bytes_of_largest() - 1)
    assert str(streaming_notes(sets[1].train, 0)[1]).startswith("warning: a row group of the train split of ")


# Its examples


def test_an_epoch_has_every_example_once_and_the_augmentation_it_has_in_memory(sets: tuple[FullSet, FullSet]) -> None:
    sizes = [50] * 5 + [38]
    streamed = epoch(stream(sets[1], augment=True), sizes)
    in_memory = epoch(sets[0].training_batches(augment=True), sizes)
    assert [len(labels) for _, labels in streamed] == sizes
    assert len(set(as_rows(in_memory))) == 288
    assert sorted(as_rows(streamed)) == sorted(as_rows(in_memory))


def test_the_order_follows_the_seed_and_mixes_row_groups(sets: tuple[FullSet, FullSet]) -> None:
    examples = stream(sets[1])
    first, again, other = (as_rows(epoch(examples, [72] * 4, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert isinstance(sets[1].train, StreamedSplit)
    bounds = sets[1].train.group_bounds()
    place = {row: position for position, row in enumerate(as_rows(list(stream(sets[1]).in_order([288]))))}
    groups = np.searchsorted(bounds, [place[row] for row in first[:72]], side="right")
    assert len(set(groups)) > 2
    assert np.count_nonzero(np.diff(groups)) > 20  # not one group after another


@pytest.mark.parametrize("num_workers", [1, 3])
def test_going_on_within_an_epoch_gives_the_remaining_batches_without_reading_the_first_windows(
    sets: tuple[FullSet, FullSet], num_workers: int
) -> None:
    sizes, rank = [31] * 9 + [9], num_workers - 1
    read: list[int] = []

    def counting(split: StreamedSplit, windows: Sequence[np.ndarray]) -> Any:
        read.append(sum(int((ranges[:, 1] - ranges[:, 0]).sum()) for ranges in windows))
        return read_here(split, windows)

    examples = dataclasses.replace(stream(sets[1], augment=True, window_rows=20), read=counting)
    whole = epoch(examples, sizes, rank=rank, num_workers=num_workers)
    for first in (1, 4, 9):
        rest = epoch(examples, sizes, first=first, rank=rank, num_workers=num_workers)
        assert tiny.same_bits(rest, whole[first:])
    assert read[0] >= read[1] >= read[2] > read[3]
    assert read[3] < read[0] / 2


@pytest.mark.parametrize("num_workers", [2, 3, 5])
def test_workers_share_an_epoch_in_equal_steps_and_leave_nothing_out(
    sets: tuple[FullSet, FullSet], num_workers: int
) -> None:
    sizes = [29] * 9 + [27]
    parts = [epoch(stream(sets[1]), sizes, rank=rank, num_workers=num_workers) for rank in range(num_workers)]
    assert [sum(len(part[step][1]) for part in parts) for step in range(10)] == sizes
    assert max(len(part[0][1]) for part in parts) - min(len(part[0][1]) for part in parts) <= 1
    together = sorted(row for part in parts for row in as_rows(part))
    assert together == sorted(as_rows(epoch(sets[0].training_batches(), sizes)))


def test_parts_of_batches_are_dealt_one_by_one() -> None:
    assert [part_sizes([3, 3, 2], rank, 2) for rank in (0, 1)] == [[2, 1, 1], [1, 2, 1]]
    assert part_sizes([4, 5], 0, 1) == [4, 5]


def test_windows_smaller_than_a_batch_make_whole_batches(sets: tuple[FullSet, FullSet]) -> None:
    small = epoch(stream(sets[1], window_rows=1), [100, 188])
    assert [len(labels) for _, labels in small] == [100, 188]
    assert len(set(as_rows(small))) == 288


def test_batches_as_they_lie_and_their_loss_are_those_of_the_set_in_memory(sets: tuple[FullSet, FullSet]) -> None:
    sizes = [100, 100, 88]
    assert tiny.same_bits(list(stream(sets[1]).in_order(sizes)), list(sets[0].training_batches().in_order(sizes)))
    model = tiny.linear(SIDE * SIDE * 3, 4)
    expected, found = (evaluate(model, full_set.training_batches(), MinimizeConfig()) for full_set in sets)
    assert found == expected


def test_a_training_run_stopped_within_an_epoch_goes_on_to_the_same_bits(sets: tuple[FullSet, FullSet]) -> None:
    config, states = MinimizeConfig(epochs=2.0, batch_size=40), []
    through, stopped, resumed = (tiny.linear(SIDE * SIDE * 3, 4) for _ in range(3))
    examples = stream(sets[1], augment=True)
    minimize(through, examples, config, seed=1)

    def stop(progress: Any) -> bool:
        if progress.step == 11:
            states.append(tiny.through_a_file(progress.capture()))
        return progress.step == 11

    minimize(stopped, examples, config, seed=1, on_step=stop)
    minimize(resumed, examples, config, seed=1, state=states[0])
    assert tiny.same_bits(tiny.weights(resumed), tiny.weights(through))


def test_what_cannot_be_read_in_the_middle_of_an_epoch_ends_it(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "all.parquet"
    pq.write_table(pq.read_table(folder), path, row_group_size=20)
    batches = stream(load_full_set(DataConfig(name=str(path), streamed=True)), window_rows=20).epoch(
        order_seed=0, augmentation_seed=0, batch_sizes=[20] * 14
    )
    next(batches)
    os.truncate(path, 100)
    with pytest.raises(ValueError, match=r"row group \d+ of .*all\.parquet cannot be read"):
        list(batches)


# Memory

FLAT = """
import dataclasses, json, resource, sys
import numpy as np, torch
from raysubset.config import DataConfig
from raysubset.data import load_full_set
from raysubset.tasks import Spec

torch.set_num_threads(1)
peaks = []
for path in sys.argv[1:]:
    full_set = load_full_set(DataConfig(name=path, streamed=True, validation_fraction=0.01, test_fraction=0.01))
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    full_set.train.take(np.random.default_rng(0).permutation(len(full_set.train))[:100])
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    examples = dataclasses.replace(full_set.training_batches(), window_bytes=2**23)
    num, sizes = 0, [25] * (len(examples) // 25)
    for images, _ in examples.epoch(order_seed=0, augmentation_seed=0, batch_sizes=sizes):
        num += len(images)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(json.dumps({"num": num, "peaks": peaks}))
"""


def test_loading_a_subset_and_an_epoch_take_a_fraction_of_the_sets_memory(tmp_path: Path) -> None:
    side = 128
    images = np.random.default_rng(0).integers(0, 256, (25, side, side, 3), dtype=np.uint8)
    part = table([encoded(image, "BMP") for image in images], len(images))
    result = measured(FLAT, tmp_path, part, (5, 300))  # 6 MiB, and 352 MiB
    assert result["num"] == 7350
    small, *large = (peak / 1024 for peak in result["peaks"][2:])
    # Two windows of 8 MiB, row groups of 1 MiB, 7 MiB held out; most is what allocators keep for the threads.
    assert max(large) - small < 352 / 2, (small, large)  # 64 MiB were measured
