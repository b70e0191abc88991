"""A run that is gone on with after its data file was written anew, with the same labels and other images (other size, other
pixels): minima of the old images are mixed with rounds on the new, and the report tells of neither. Only rows and labels
are compared. Kind: TensorAuto/OpenTau#502, NVIDIA-NeMo/RL#2519. Starts a local Ray."""

from common import *
import ray
from raysubset import Config, run as run_
from raysubset.events import Stage

ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="error", num_cpus=2)


def write(side):
    x, y = learnable(side=side)
    pq.write_table(pa.table({"image": [encoded(i) for i in x], "label": y}), "d.parquet")


class Stop(Exception):
    pass


def stop(event):
    if isinstance(event, Stage) and "round 2" in event.text:
        raise Stop


config = Config(storage_path=f"{DIR}/store", name="r").with_overrides(
    {
        "data.name": f"{DIR}/d.parquet",
        "minimize.epochs": 1.0,
        "trunk.epochs": 0.0,
        "fine_tuning.epochs": 0.0,
        "rounds.num": 2,
    }
)
write(8)
try:
    run_(config, on_event=stop)
except Stop:
    pass
write(10)
said = []
try:
    run_(config, on_event=lambda e: said.append(e.text))
    check(
        "8x8 images replaced by 10x10 between two rounds: refused or told of",
        any("changed" in s for s in said),
        "finished without a word",
    )
except ValueError:
    check("8x8 images replaced by 10x10 between two rounds: refused or told of", True)
