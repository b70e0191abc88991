"""One digest over what every kind of leg computes: a refactor is right when it prints the same before and after.

    python jobs/proof.py [--only WORD ...] [--keep FOLDER]

A dozen tiny configs of digits run one after the other on one local Ray. A config's digest is over all its weights
(minima, aggregates, final models: the tensors, not the files' bytes), over who was in which subset, over every
prediction, and over the numbers of its report but those that tell time, place or machine; the last line is one of all.
`--keep` leaves directories and the numbers that were digested (numbers.json in each), for a look at what differs.

Digests hold on one type of CPU with one version of torch (other kernels round differently): compare two commits on one
machine. A commit that changes one says which number changed and why, and brings this table up to date.

Hardware: 2 cores of a shared virtual machine, idle; Ray 2.60, torch 2.14, Python 3.11. Wall time: 3 min (n = 1).
Result:   weights, subsets and predictions are those of commit 3b0b55f, before issue 9, bit for bit; passes differ, as
          the share of a forward pass is the network's own since; and stages by Ray Train have the order of batches that
          an actor has since issue 10, so that a comparison ends at a run's bits: default, two trunk workers,
          distillation, shrink-perturb, streamed and sweep. All digests lack a decision that is no longer made.
          Since tasks the comparison's legs have other keys, as configs have new fields; no number of it changed; its
          runs count reads from storage. A sweep's settings have losses before and after fine-tuning since issue 12.
          Planned passes are sums over legs, rounded once: the last digit of planned_passes differs in rounds and lbfgs.
          Bytes are in no digest since all are counted, as they go by which actor was free: all digests are new, and
          all other numbers and 208 files of weights those of dd47904, compared one by one.
          A comparison's record says since 76d8f7e whether arms may try rates beyond the grid, and sorts what was tried.
          Of two trunk workers the critical path alone, in passes, is another since c51b87f; a comparison's record has
          what arms trained with, and bounds of times, since 18a39a0 and f4afcc5.
          default             ca2ee08c2257dbee
          conventional        e383156474ee4956
          rounds              038ff7d786c12383
          averaged states     c3207af017e9fc87
          fisher              fc1772304a4b0762
          regmean             ce7b2d7e8b9df96f
          savgm               6efd7a39b3ccfbfb
          ties                a52fd8d700afe05e
          auto                e0fb98cfe7b9b588
          aligned soup        807a78717f3a8028
          pswa, extrapolated  843f3ff6625625e8
          wus                 913bac628f35a90f
          lbfgs               e1d33e33e9a75a8e
          two trunk workers   ce0f27a7f08f189f
          distillation        fbee10c054a622ba
          shrink-perturb      f8431aa4fb770af3
          packed              547695c6effb9aa2
          streamed            55e3de172b9057b7
          comparison          945b37437f755678
          sweep               71964f780f3c96dd
          all                 3f2941e4eefa901b
"""

import argparse
import hashlib
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout is enough

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load_file

from raysubset import Config, compare, run, sweep
from raysubset.cluster import connected
from raysubset.config import ClusterConfig, DataConfig
from raysubset.data import Split, load_full_set
from raysubset.run_directory import DECISIONS_PATH, RunDirectory
from raysubset.work.identity import identify

SHORT = {
    "subsets.num": 2,
    "subsets.size": 300,
    "minimize.epochs": 2.0,
    "trunk.epochs": 0.5,
    "fine_tuning.epochs": 0.0,
    "fine_tuning.num_workers": 1,
    "actors.max_num": 1,
    "aggregation.statistics_examples": 256,
    "model.width": 4,
}
FINE_TUNED = {"fine_tuning.epochs": 1.0}
TWO_ROUNDS = {"rounds.num": 2, "rounds.outer_momentum": 0.0, "rounds.keep_minima": None}
RUNS: dict[str, dict[str, Any]] = {
    "default": {"subsets.num": None, "subsets.size": None, "minimize.epochs": 4.0, "actors.max_num": 2, **FINE_TUNED},
    "conventional": {"method": "conventional", "conventional.epochs": 2.0},
    "rounds": {"rounds.outer_learning_rate": 0.7, **TWO_ROUNDS, "rounds.num": 3, "rounds.outer_momentum": 0.5},
    "averaged states": {"rounds.optimizer_state": "average", "minimize.optimizer": "adamw", **TWO_ROUNDS},
    "fisher": {"aggregation.method": "fisher"},
    "regmean": {"aggregation.method": "regmean"},
    "savgm": {"aggregation.method": "savgm"},
    "ties": {"aggregation.method": "ties"},
    "auto": {"aggregation.method": "auto"},
    "aligned soup": {"aggregation.method": "aligned_soup", "subsets.start": "independent", "trunk.epochs": 0.0},
    "pswa, extrapolated": {"minimize.averaging.kind": "pswa", "minimize.extrapolation.kind": "past_global"},
    "wus": {"minimize.skipping.kind": "wus_lr", "minimize.skipping.window": 0.5, "minimize.skipping.threshold": 0.9},
    "lbfgs": {"minimize.optimizer": "lbfgs", "minimize.epochs": 6.0, "minimize.weight_decay": 0.0},
    "two trunk workers": {"trunk.num_workers": 2, "trunk.epochs": 1.0},
    "distillation": {"fine_tuning.distillation": 0.5, **FINE_TUNED},
    "shrink-perturb": {"fine_tuning.start": "shrink_perturb", **FINE_TUNED},
    "packed": {"subsets.per_actor": 2},
    "streamed": {"data.streamed": True, **FINE_TUNED},
}
UNTOLD = {  # what tells of time, place or machine, and words; bytes go by which actor was free; what records got later
    "advice",
    "at_edge",
    "by_bandwidth",
    "config",
    "created_at",
    "critical_path_s",
    "cpu_s",
    "device",
    "device_s",
    "digest",
    "driver",
    "ended_at",
    "environment",
    "files",
    "gbit_per_s",
    "has_batch_norm",
    "identity",
    "leg",
    "machine",
    "name",
    "node",
    "notes",
    "num_gpus",
    "num_network_bytes",
    "peak_bytes",
    "recommendation",
    "s_per_pass",
    "seconds",
    "sentence",
    "sessions",
    "started_at",
    "startup_s",
    "storage_path",
    "task",
    "trial",
    "uri",
    "waited_s",
    "wall_s",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="configs whose name has one of these")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where directories are left")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, connected(ClusterConfig(num_cpus=2, num_gpus=0)):
        folder, of_all = arguments.keep or Path(temporary), hashlib.sha256()
        for name, work in works().items():
            if arguments.only and not any(word in name for word in arguments.only):
                continue
            began = time.perf_counter()
            directory = work(folder, name.replace(" ", "-").replace(",", ""))
            told = digest(directory)
            of_all.update(told.encode())
            print(f"{name:20} {told[:16]} {time.perf_counter() - began:6.1f} s", flush=True)
        print(f"{'all':20} {of_all.hexdigest()[:16]}")


def works() -> dict[str, Callable[[Path, str], Path]]:
    """Each config's name, and what runs it below a folder and says where it left its directory."""

    def of_run(overrides: dict[str, Any]) -> Callable[[Path, str], Path]:
        def work(folder: Path, name: str) -> Path:
            chosen = config(folder, name, overrides)
            if chosen.data.streamed:
                chosen = chosen.with_overrides({"data.name": str(write_digits(folder / "digits"))})
            if chosen.subsets.per_actor > 1:
                take_packing(chosen)
            return Path(run(chosen, on_event=None).uri)

        return work

    def of_comparison(folder: Path, name: str) -> Path:
        compare(
            config(folder, name, FINE_TUNED),
            seeds=2,
            budgets=[3.0],
            arms=["B", "G"],
            learning_rates=[0.1],
            on_event=None,
        )
        return folder / name

    def of_sweep(folder: Path, name: str) -> Path:
        short = config(folder, name, {"subsets.size": None, "trunk.epochs": 1.0})
        sweep(short, {"subsets.size": [200, 400]}, seeds=1, on_event=None)
        return folder / name

    runs = {name: of_run(overrides) for name, overrides in RUNS.items()}
    return {**runs, "comparison": of_comparison, "sweep": of_sweep}


def config(folder: Path, name: str, overrides: dict[str, Any]) -> Config:
    return Config(name=name, storage_path=str(folder)).with_overrides(SHORT | overrides)


def write_digits(folder: Path) -> Path:
    """The digits as Parquet, which can be streamed."""
    digits = load_full_set(DataConfig())
    for name, split in (("train", digits.train), ("test", digits.test)):
        assert isinstance(split, Split)
        rows = split.take()
        images, labels = rows["image"], rows["label"]
        pixels = pa.FixedSizeListArray.from_arrays(pa.array(images.numpy().reshape(-1)), images[0].numel())
        tensors = pa.FixedShapeTensorArray.from_storage(pa.fixed_shape_tensor(pa.uint8(), images.shape[1:]), pixels)
        folder.mkdir(exist_ok=True)
        pq.write_table(pa.table({"image": tensors, "label": labels.numpy()}), folder / f"{name}.parquet")
    return folder


def take_packing(config: Config) -> None:
    """Have a run pack its subsets whether that is faster here or not: a run keeps to what was decided."""
    directory = RunDirectory(config.storage_path, config.run_name())
    directory.open(config.to_dict(), {}, identify([config], {}, None))
    packing = {"per_actor": config.subsets.per_actor, "taken": True}
    directory.write_json(DECISIONS_PATH, {"num_gpus": 0.0, "num_workers": 1, "packing": packing})


def digest(directory: Path) -> str:
    """The digest of a directory's weights, subsets, predictions and reports."""
    items = sorted(numbers(directory), key=lambda item: (item[0], json.dumps(item[1], sort_keys=True)))
    found = json.dumps(items, sort_keys=True, indent=1)
    (directory / "numbers.json").write_text(found)
    return hashlib.sha256(found.encode()).hexdigest()


def numbers(directory: Path) -> Iterator[tuple[str, Any]]:
    """What is digested, by file."""
    for path in directory.rglob("*.safetensors"):
        tensors, digest = load_file(path), hashlib.sha256()
        for key in sorted(tensors):
            digest.update(f"{key} {tensors[key].dtype} {tensors[key].shape}".encode() + tensors[key].tobytes())
        yield named(path, directory), digest.hexdigest()
    for path in directory.rglob("*.parquet"):
        if path.stem.endswith(("subsets", "predictions", "mistakes")):
            rows = pq.read_table(path).to_pylist()
            yield named(path, directory), hashlib.sha256(repr(rows).encode()).hexdigest()
    for path in directory.rglob("*.json"):
        if path.stem in ("report", "comparison", "sweep"):
            yield named(path, directory), timeless(json.loads(path.read_text()))


def named(path: Path, directory: Path) -> str:
    """The path below the directory, without the digests of configs in it: a new field changes them all."""
    return re.sub(r"-[0-9a-f]{8,16}\b", "", str(path.relative_to(directory)))


def timeless(record: Any) -> Any:
    """A record without what tells of time, place or machine."""
    if isinstance(record, dict):
        return {key: timeless(value) for key, value in record.items() if key not in UNTOLD}
    return [timeless(value) for value in record] if isinstance(record, list) else record


if __name__ == "__main__":
    main()
