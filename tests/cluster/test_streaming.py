"""A set that is larger than the object store: a whole run on it, and the same epoch whoever reads it."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from raysubset import Config, run
from raysubset.cluster import object_store_bytes, put_once
from raysubset.config import DataConfig, TaskConfig
from raysubset.data import StreamedExamples, load_full_set
from raysubset.fine_tuning import fine_tune
from raysubset.fine_tuning.streaming import most_workers, read_by_ray_data, refuse_without_readers
from raysubset.run_directory import RunDirectory
from raysubset.run_directory.ledger import Ledger
from raysubset.sweeping.plan import widest_stage
from raysubset.training import Metrics, Shard
from raysubset.work import Piece, Run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

NUM, SIDE = 3_300, 160  # 242 MiB decoded


def write_learnable(path: Path, num: int, side: int, *, rows_per_group: int) -> None:
    """Noise as BMP, which takes no time to decode; its two classes differ in brightness."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, num)
    noise = generator.integers(0, 128, (2, 64, side, side, 3), dtype=np.uint8) + np.uint8([[[[[0]]]], [[[[127]]]]])
    schema = pa.schema({"image": pa.binary(), "label": pa.int64()})
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for start in range(0, num, rows_per_group):
            part = labels[start : start + rows_per_group]
            images = [encoded(noise[label, generator.integers(64)]) for label in part]
            writer.write_table(pa.table({"image": images, "label": part}, schema=schema))


def encoded(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "BMP")
    return stream.getvalue()


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("streamed") / "small.parquet"
    write_learnable(path, 2000, 8, rows_per_group=70)
    return path


@pytest.fixture(scope="module")
def small_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, generator = tmp_path_factory.mktemp("streamed") / "table.parquet", np.random.default_rng(0)
    inputs, site = generator.normal(size=2000), generator.choice(["north", "south"], 2000)
    pq.write_table(pa.table({"x": inputs, "site": site, "target": 2 * inputs}), path, row_group_size=70)
    return path


@pytest.mark.parametrize("kind", ["images", "table"])
@pytest.mark.usefixtures("ray_cluster")
def test_ray_data_gives_the_bits_that_the_process_itself_would_read(
    small_set: Path, small_table: Path, kind: str
) -> None:
    task = TaskConfig(name="regression" if kind == "table" else "auto")
    config = Config(data=DataConfig(name=str(small_table if kind == "table" else small_set), streamed=True), task=task)
    full_set = load_full_set(config.data, config.task)
    here = full_set.training_batches(augment=True)
    assert isinstance(here, StreamedExamples)
    here = dataclasses.replace(here, window_bytes=300 * full_set.train.num_bytes_per_example)
    there = read_by_ray_data(here, put_once(full_set), shard=Shard(), config=config)
    sizes = [100] * (len(here) // 100)
    for rank, num_workers, first in ((0, 1, 0), (1, 3, 2)):
        epochs = [
            each.epoch(
                order_seed=3, augmentation_seed=4, batch_sizes=sizes, first=first, rank=rank, num_workers=num_workers
            )
            for each in (here, there)
        ]
        num = 0
        for (images, labels), (expected_images, expected_labels) in zip(*epochs, strict=True):
            assert torch.equal(images, expected_images)
            assert torch.equal(labels, expected_labels)
            num += len(labels)
        assert num >= (len(sizes) - first) * 100 // num_workers


@pytest.mark.usefixtures("ray_cluster")
def test_workers_that_leave_no_cpu_for_reading_are_refused_with_the_way_out() -> None:
    config = Config()
    assert most_workers(1) == 3  # of the session's four CPUs
    assert most_workers(2) == 1
    refuse_without_readers(config, "fine_tuning", num_workers=3)
    with pytest.raises(ValueError, match=r"4 fine_tuning workers of 1 CPU.*need 5 CPUs.*can have 4.*num-workers"):
        refuse_without_readers(config, "fine_tuning", num_workers=4)


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_whose_workers_would_leave_no_cpu_is_refused_before_its_subsets(small_set: Path, tmp_path: Path) -> None:
    config = Config(storage_path=str(tmp_path), data=DataConfig(name=str(small_set), streamed=True))
    with pytest.raises(ValueError, match="4 fine_tuning worker"):
        run(config.with_overrides({"fine_tuning.num_workers": 4, "subsets.size": 100}))
    assert not list(tmp_path.rglob("minimum.json"))


def test_a_sweep_keeps_a_place_for_the_reading_tasks() -> None:
    config = Config(data=DataConfig(name="x.parquet", streamed=True))
    assert widest_stage(config) == 2
    assert widest_stage(config.with_overrides({"data.streamed": False})) == 1
    assert widest_stage(config.with_overrides({"fine_tuning.epochs": 0.0})) == 1


@pytest.mark.usefixtures("ray_cluster")
def test_the_one_worker_that_auto_takes_is_an_actor_which_streams_epoch_after_epoch(
    small_set: Path, tmp_path: Path
) -> None:
    config = Config(storage_path=str(tmp_path), data=DataConfig(name=str(small_set), streamed=True)).with_overrides(
        {
            "subsets.num": 2,
            "subsets.size": 101,
            "trunk.epochs": 0.5,
            "minimize.epochs": 1.0,
            "fine_tuning.epochs": 2.0,
            "model.width": 4,
            "actors.max_num": 1,
        }
    )
    report = run(config)
    works = {work.stage: work for work in Ledger(RunDirectory.at(report.uri)).read()}
    assert {works[stage].num_workers for stage in ("trunk", "fine_tuning")} == {1}
    assert works["fine_tuning"].cost.num_backward == 2 * len(load_full_set(config.data).train)
    assert report.test.accuracy > 0.9


@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_stream_their_parts_of_a_set_three_times_as_large_as_the_object_store_to_its_end_twice(
    tmp_path: Path,
) -> None:
    path = tmp_path / "large.parquet"
    write_learnable(path, NUM, SIDE, rows_per_group=125)
    assert 3 * object_store_bytes() < NUM * SIDE * SIDE * 3
    config = Config(storage_path=str(tmp_path), data=DataConfig(name=str(path), streamed=True)).with_overrides(
        {
            "data.validation_fraction": 0.02,
            "data.test_fraction": 0.02,
            "model.name": "mlp",  # its steps take little time
            "model.width": 4,
            "minimize.batch_size": 47,  # leaves the workers unequal parts
            "minimize.learning_rate": 1e-4,  # so that there is a loss left in the second epoch
            "fine_tuning.epochs": 2.0,
        }
    )
    full_set, directory = load_full_set(config.data), RunDirectory(str(tmp_path), "run")
    opened = Run(config, directory, full_set, put_once(full_set), lambda event: None)
    piece = Piece(config, directory, "fine_tuning", by_train=True, num_workers=2)
    fine_tune(opened, piece, num_gpus=0.0)
    record = piece.record()
    assert record is not None
    (work,) = Ledger(directory).read()
    assert (work.outcome, work.num_workers) == ("done", 2)
    assert work.cost.num_backward == 2 * len(full_set.train)
    first, second = record["history"]
    assert (first["epoch"], second["epoch"]) == (1, 2)
    assert second["loss"] < first["loss"]
    assert Metrics.from_dict(record["validation"]).accuracy > 0.9
