"""What streaming a set from Parquet costs against holding it in memory: examples a second, and peak memory.

    python jobs/bench_streaming.py

Two sets are written: random tensors of 64×64×3 without compression, and JPEG of 96×96×3, both with 128 rows a row
group. Each way of an epoch runs in a process of its own with one torch thread and does nothing with its batches of 64
but normalise them, so this is what the stream gives at best; peak memory is the process's ru_maxrss less that of one
that only loads a hundredth of the set. Loading is timed apart: streamed or not, every image is decoded once for shape
and statistics. Ray Data reads with one task at a time, on two logical CPUs of which the reading process has one.

Hardware: 2 cores of a virtual machine shared with other work (load 6 to 20); Ray 2.60, Python 3.11. Wall time: 2 min.
Result:   n = 1, the faster of two epochs, examples/s and as a share of the set in memory; peak beyond the small set:
          tensors, 96 MiB decoded:  in memory 287,000, 1372 MiB;  streamed 21,400 (0.074), 73 MiB;
                                    Ray Data 8,300 (0.029), 222 MiB and the reading task's own
          JPEG, 108 MiB decoded:    in memory 94,800, 295 MiB;    streamed 6,100 (0.065), 89 MiB;
                                    Ray Data 3,100 (0.032), 257 MiB and the reading task's own
          Ray Data takes seconds to begin (first epochs of 7 s and 3 s), which sets as small as these make look worse.
          Tensors in Parquet take four times their size in the file, and more while they are read.
"""

import argparse
import dataclasses
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

MIB = 2**20
ROWS_PER_GROUP, BATCH = 128, 64
WINDOW_BYTES = 16 * MIB
SETS = {"tensors": (8_192, 64), "jpeg": (4_096, 96)}  # examples, side
HELD_OUT = 0.01  # for validation, and for testing
WAYS = ("in memory", "streamed", "ray data")


def write(path: Path, kind: str, num: int, side: int) -> None:
    """Smooth random colours, so that JPEG has something to compress."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    generator = np.random.default_rng(0)
    shape = (side, side, 3)
    type_ = pa.fixed_shape_tensor(pa.uint8(), shape) if kind == "tensors" else pa.binary()
    schema = pa.schema({"image": type_, "label": pa.int64()})
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for _ in range(0, num, ROWS_PER_GROUP):
            coarse = generator.integers(0, 256, (ROWS_PER_GROUP, side // 8, side // 8, 3), dtype=np.uint8)
            images = coarse.repeat(8, axis=1).repeat(8, axis=2)
            column: Any
            if kind == "tensors":
                column = pa.FixedShapeTensorArray.from_numpy_ndarray(images)
            else:
                column = []
                for image in images:
                    stream = io.BytesIO()
                    Image.fromarray(image).save(stream, "JPEG")
                    column.append(stream.getvalue())
            labels = generator.integers(0, 10, ROWS_PER_GROUP)
            writer.write_table(pa.table({"image": column, "label": labels}, schema=schema))


def epoch(path: str, way: str) -> dict[str, float]:
    """Load the set and go through an epoch twice, in this process."""
    import torch

    from raysubset import Config
    from raysubset.cluster import put_once, ray
    from raysubset.config import DataConfig, derive_seed
    from raysubset.data import StreamedExamples, load_full_set
    from raysubset.fine_tuning.streaming import read_by_ray_data
    from raysubset.training import Shard

    torch.set_num_threads(1)
    started = time.perf_counter()
    streamed = way != "in memory"
    full_set = load_full_set(
        DataConfig(name=path, streamed=streamed, validation_fraction=HELD_OUT, test_fraction=HELD_OUT)
    )
    load_s = time.perf_counter() - started
    examples = full_set.training_batches()
    if isinstance(examples, StreamedExamples):
        examples = dataclasses.replace(examples, window_bytes=WINDOW_BYTES)
        if way == "ray data":
            ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
            examples = read_by_ray_data(examples, put_once(full_set), shard=Shard(), config=Config())
    sizes, seconds = [BATCH] * (len(examples) // BATCH), []
    for number in range(2):
        started = time.perf_counter()
        for _ in examples.epoch(order_seed=derive_seed(number, "order"), augmentation_seed=0, batch_sizes=sizes):
            pass
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"per_s": sum(sizes) / min(seconds), "first_per_s": sum(sizes) / seconds[0], "load_s": load_s, "peak": peak}


def measure(path: Path, way: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--path", str(path), "--way", way]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.path:
        print(json.dumps(epoch(arguments.path, arguments.way)))
        return
    with tempfile.TemporaryDirectory() as folder:
        for kind, (num, side) in SETS.items():
            path, small = Path(folder) / f"{kind}.parquet", Path(folder) / f"{kind}-small.parquet"
            write(path, kind, num, side)
            write(small, kind, ROWS_PER_GROUP, side)
            size = num * side * side * 3 / MIB
            print(f"{kind}: {num} examples, {size:.0f} MiB decoded, {path.stat().st_size / MIB:.0f} MiB in the file")
            found = {way: measure(path, way) for way in WAYS}
            for way, of_way in found.items():
                beyond = (of_way["peak"] - measure(small, way)["peak"]) / MIB
                ratio = of_way["per_s"] / found["in memory"]["per_s"]
                print(
                    f"  {way:10}: {of_way['per_s']:8,.0f} examples/s ({ratio:.3f} of in memory; first epoch "
                    f"{of_way['first_per_s']:,.0f}), loaded in {of_way['load_s']:.1f} s, peak {beyond:.0f} MiB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
