"""Give the command line and Config what they should refuse, and see how they do it.

    python -m tests.chaos.bad_input --finished ~/ray_results/a-finished-run-of-digits [--only WORD] [--fields] [--list]

Well answered: exit code 2, one line on standard error, no traceback, the flag or the value named, a way out said,
within --most-s seconds, before Ray is started, and nothing left in the storage path. Each case is a process of its own.
`--fields` tries every field of Config against bad values in this process instead: what is refused, what is taken, and
what raises anything but ValueError. tests/test_bad_input.py has those that flags alone decide in the default suite.
"""

import argparse
import csv
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from raysubset.config import Config, flatten

MISTAKE = 2
WAY_OUT = re.compile(
    r"\b(must|should|give|set|choose|use|see|leave|takes|needs|at least|at most|did you mean|not one of|expected|"
    r"known are|start over|write|install|pip|put|between|cannot be|there is no (flag|command)|is missing|lower|raise|"
    r"ask for less|larger|smaller|less|more|positive|is it up)\b",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing that a user might get wrong."""

    label: str
    arguments: tuple[str, ...]
    named: str  # a pattern that the answer should match: it names the value or the field
    storage: bool = True  # whether --storage-path is given
    codes: tuple[int, ...] = (MISTAKE,)
    rate: bool = True  # counted; else only recorded
    most_bytes: int = 0  # of address space, where a mistake might take all memory of the machine


@dataclasses.dataclass(frozen=True)
class Answer:
    """How it was answered."""

    code: int | None  # None: not within the time
    seconds: float
    num_lines: int
    traceback: bool
    named: bool
    way_out: bool
    ray_started: bool
    left: str  # in the storage path
    said: str

    def faults(self, case: Case, most_s: float) -> list[str]:
        found = []
        if self.code is None:
            found.append("no answer in time")
        elif self.code not in case.codes:
            found.append(f"exit code {self.code}")
        if self.traceback:
            found.append("traceback")
        if self.code not in (None, 0) and self.num_lines != 1:
            found.append(f"{self.num_lines} lines")
        if self.code not in (None, 0) and not self.named:
            found.append("not named")
        if self.code not in (None, 0) and not self.way_out:
            found.append("no way out")
        if self.ray_started:
            found.append("Ray was started")
        if self.seconds > most_s and self.code is not None:
            found.append(f"{self.seconds:.0f} s")
        if self.left and self.code not in (None, 0):
            found.append(f"left {self.left}")
        return found


def run(*arguments: str) -> tuple[str, ...]:
    return ("run", *arguments)


def cases(place: Path) -> Iterator[Case]:
    """All of them. `place` holds bad files, made by make_files()."""
    yield from cases_of_flags()
    yield from cases_of_files(place)


def cases_of_flags() -> Iterator[Case]:
    """Those that are refused before any data is read."""
    # flags: words
    yield Case("no such command", ("rum",), "rum", storage=False)
    yield Case("no such flag", run("--subset.num", "4"), "subset.num")
    yield Case("flag of underscores and a typo", run("--minimize.learning_rat", "1"), "learning.rat")
    yield Case("missing value", run("--subsets.num"), "subsets.num")
    yield Case("stray argument", run("digits"), "digits")
    yield Case("empty flag", run("--"), "--", rate=False)
    for flag, value in [
        ("--subsets.num", "four"),
        ("--subsets.num", "2.5"),
        ("--subsets.num", ""),
        ("--subsets.num", "1e3"),
        ("--seed", "x"),
        ("--minimize.learning-rate", "fast"),
        ("--minimize.learning-rate", ""),
        ("--minimize.epochs", "many"),
        ("--data.streamed", "yes"),
        ("--minimize.optimizer", "sdg"),
        ("--aggregation.method", "mean"),
        ("--data.augmentation", "flip"),
        ("--subsets.scheme", "random"),
        ("--method", "paper"),
        ("--fine-tuning.keep", "first"),
        ("--rounds.optimizer-state", "kept"),
        ("--minimize.averaging.kind", "SWA"),
        ("--tracking.to", "tensorboard"),
        ("--model.norm", "layer"),
        ("--task.loss", "mse"),
    ]:
        yield Case(
            f"{flag} {value!r}", run(flag, value), re.escape(flag.lstrip("-").split(".")[-1]).replace(r"\-", "[-_]")
        )

    # numbers out of range
    for field in (
        "subsets.num",
        "subsets.size",
        "minimize.batch-size",
        "rounds.num",
        "actors.num-cpus",
        "actors.max-attempts",
        "actors.max-num",
        "trunk.num-workers",
        "fine-tuning.num-workers",
        "model.width",
        "model.depth",
        "data.image-size",
        "subsets.per-actor",
    ):
        for value in ("0", "-3"):
            yield Case(f"{field} {value}", run(f"--{field}", value), field.split(".")[-1].replace("-", "[-_]"))
    for field in (
        "minimize.learning-rate",
        "minimize.epochs",
        "minimize.momentum",
        "minimize.weight-decay",
        "subsets.fraction",
        "subsets.alpha",
        "data.validation-fraction",
        "trunk.epochs",
        "fine-tuning.epochs",
        "rounds.outer-learning-rate",
        "conventional.epochs",
        "actors.num-gpus",
        "aggregation.ties-density",
        "fine-tuning.distillation",
        "cluster.wait-timeout-s",
    ):
        for value in ("nan", "inf", "-1"):
            yield Case(f"{field} {value}", run(f"--{field}", value), field.split(".")[-1].replace("-", "[-_]"))
    for field, value in [
        ("trunk.learning-rate", "-0.1"),
        ("trunk.learning-rate", "0"),
        ("fine-tuning.learning-rate", "nan"),
        ("fine-tuning.learning-rate", "0"),
        ("actors.checkpoint-epochs", "0"),
        ("actors.checkpoint-s", "nan"),
        ("aggregation.num-gpus", "1.5"),
        ("aggregation.num-gpus", "inf"),
        ("cluster.num-gpus", "-1"),
        ("minimize.target-loss", "nan"),
        ("data.test-fraction", "1"),
    ]:
        yield Case(f"{field} {value}", run(f"--{field}", value), field.split(".")[-1].replace("-", "[-_]"))

    # contradictions
    for label, flags in {
        "size and fraction": ("--subsets.size", "100", "--subsets.fraction", "0.5"),
        "num, size and fraction": ("--subsets.num", "2", "--subsets.size", "100", "--subsets.fraction", "0.5"),
        "independent start and a trunk": ("--subsets.start", "independent"),
        "independent start and a mean": ("--subsets.start", "independent", "--trunk.epochs", "0"),
        "independent start and rounds": (
            "--subsets.start",
            "independent",
            "--trunk.epochs",
            "0",
            "--rounds.num",
            "2",
            "--aggregation.method",
            "aligned_soup",
        ),
        "column without scheme": ("--subsets.column", "who"),
        "scheme without column": ("--subsets.scheme", "column"),
        "scheme without function": ("--subsets.scheme", "function"),
        "min_workers above num_workers": ("--fine-tuning.num-workers", "1", "--fine-tuning.min-workers", "2"),
        "distillation without fine-tuning": ("--fine-tuning.epochs", "0", "--fine-tuning.distillation", "0.5"),
        "smoothing of squared error": ("--task.loss", "squared_error", "--task.label-smoothing", "0.1"),
        "rounds and tolerance": ("--rounds.num", "2", "--minimize.tolerance", "0.1"),
        "cluster address and CPUs": ("--cluster.address", "127.0.0.1:1", "--cluster.num-cpus", "2"),
        "width of a torchvision network": ("--model.name", "resnet18", "--model.width", "4"),
        "depth that no ResNet has": ("--model.name", "cifar_resnet", "--model.depth", "21"),
        "lbfgs in rounds": ("--minimize.optimizer", "lbfgs", "--rounds.num", "2"),
        "extrapolation of adam": ("--minimize.optimizer", "adam", "--minimize.extrapolation.kind", "isotropic"),
        "quorum above num": ("--subsets.num", "2", "--actors.quorum", "3"),
    }.items():
        yield Case(
            label,
            run(*flags),
            "|".join(word.lstrip("-").split(".")[-1].replace("-", "[-_]") for word in flags if word.startswith("--")),
        )

    # names and places
    for label, name in {
        "empty": "",
        "with a slash": "a/b",
        "climbing": "../x",
        "dot": ".",
        "too long": "n" * 300,
        "with a newline": "a\nb",
        "with NUL's neighbour": "a\x01b",
    }.items():
        yield Case(
            f"name {label}",
            run("--name", name),
            "name|File name",
            rate=label not in ("with a newline", "with NUL's neighbour"),
        )


def cases_of_files(place: Path) -> Iterator[Case]:
    """Those that data, models, storage, clusters or other runs decide."""
    finished = str(place / "finished")

    # more than there is
    yield Case("more subsets than examples", run("--subsets.num", "1000000"), "1000000|1,000,000")
    yield Case("a subset larger than the set", run("--subsets.size", "1000000"), "1000000|1,000,000")
    yield Case("subsets that do not fit together", run("--subsets.num", "10", "--subsets.size", "1000"), "1000|10")
    yield Case("a batch larger than memory", run("--minimize.batch-size", "1000000000000"), "batch", rate=False)
    yield Case(
        "a network larger than memory",
        run("--model.width", "10000000000"),
        "width|parameters|memory",
        most_bytes=9 << 30,
    )
    yield Case(
        "a network of 200 blocks", run("--model.depth", "200"), "depth|parameters|memory|channels", most_bytes=9 << 30
    )
    yield Case(
        "images larger than memory",
        run("--data.image-size", "1000000"),
        "image.size|memory|1000000",
        most_bytes=9 << 30,
    )
    yield Case("more CPUs than there are", run("--actors.num-cpus", "64"), "64 CPU")
    yield Case("more GPUs than there are", run("--actors.num-gpus", "1"), "1 GPU")
    yield Case("GPUs for aggregation where there are none", run("--aggregation.num-gpus", "1"), "GPU")
    yield Case("more Train workers than there is room", run("--fine-tuning.num-workers", "50"), "50")
    yield Case("more trunk workers than there is room", run("--trunk.num-workers", "50"), "50")
    yield Case("streamed digits", run("--data.streamed"), "streamed")
    yield Case("quorum above the subsets", run("--actors.quorum", "9"), "quorum")

    # places
    yield Case("storage path is a file", run("--storage-path", str(place / "file")), "file", storage=False)
    yield Case("storage path below a file", run("--storage-path", str(place / "file" / "x")), "file", storage=False)
    yield Case("storage path of an unknown scheme", run("--storage-path", "foo://bar/x"), "foo", storage=False)
    yield Case("storage path empty", run("--storage-path", ""), "storage", storage=False)
    yield Case(
        "S3 that is not there",
        run("--storage-path", "s3://k:s@b/x?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1"),
        "s3|storage",
        storage=False,
    )
    yield Case("storage path on /proc", run("--storage-path", "/proc/x"), "proc", storage=False)
    yield Case(
        "a run of something else", run("--storage-path", str(place), "--name", "foreign"), "foreign", storage=False
    )
    yield Case(
        "a finished run with other settings",
        run("--storage-path", str(place), "--name", "finished", "--seed", "9"),
        "seed",
        storage=False,
    )

    # data
    for label, name in {
        "typo": "digitz",
        "no such file": "/nowhere/x.parquet",
        "no such folder": "/nowhere/",
        "empty": "",
        "text as Parquet": str(place / "text.parquet"),
        "half a Parquet": str(place / "half.parquet"),
        "no image column": str(place / "noimage.parquet"),
        "an empty table": str(place / "empty.parquet"),
        "null labels": str(place / "nulls.parquet"),
        "float labels": str(place / "floats.parquet"),
        "one class": str(place / "oneclass.parquet"),
        "bytes that are no image": str(place / "garbage.parquet"),
        "images of two shapes": str(place / "shapes.parquet"),
        "a folder without images": str(place / "emptyfolder"),
        "a folder of texts": str(place / "texts"),
        "no such module": "nomodule:load",
        "no such function": "json:load_digits",
        "a function that raises": "bad_functions:raises",
        "a function that returns None": "bad_functions:nothing",
        "a function of other lengths": "bad_functions:lengths",
        "a function with NaN labels": "bad_functions:nan_labels",
        "negative labels": "bad_functions:negative",
        "float images": "bad_functions:float_images",
        "no examples": "bad_functions:no_examples",
        "a password in the URI": "s3://key:secret@bucket/data",
        "http": "http://127.0.0.1:9/x.parquet",
        "ftp": "ftp://host/x",
    }.items():
        mine = name.rstrip("/").rsplit("/", 1)[-1].rsplit(":", 1)[-1]
        yield Case(
            f"data: {label}",
            run("--data.name", name),
            f"data.name|{re.escape(mine)}" if mine else "data.name",
            codes=(1, 2) if "raises" in label else (2,),
        )
    for label, (name, flags, named) in MISTAKES_IN_TABLES.items():
        yield Case(f"data: {label}", run("--data.name", name, *flags), named)
    yield Case("MNIST that is not there", run("--data.name", "mnist", "--data.root", "/nowhere"), "nowhere")
    yield Case("MNIST that is damaged", run("--data.name", "mnist", "--data.root", str(place / "mnist")), "mnist")
    yield Case(
        "download without a network",
        run("--data.name", "mnist", "--data.root", str(place / "fresh"), "--data.download"),
        "mnist",
    )
    yield Case(
        "a column that is not there",
        run("--data.name", str(place / "good.parquet"), "--data.target", "labl"),
        "labl",
    )
    yield Case("a subset column that is not there", run("--subsets.scheme", "column", "--subsets.column", "who"), "who")

    # models and functions
    for label, name in {
        "typo": "resnet81",
        "no such module": "nomodule:net",
        "raises": "bad_functions:net_raises",
        "no module returned": "bad_functions:nothing2",
        "other outputs": "bad_functions:net_outputs",
        "no parameters": "bad_functions:net_empty",
        "lenet5 of 8x8": "lenet5",
        "a colon": ":",
        "empty": "",
    }.items():
        yield Case(
            f"model: {label}",
            run("--model.name", name),
            re.escape(name.rsplit(":", 1)[-1]) or "model",
            codes=(1, 2) if label == "raises" else (2,),
        )
    yield Case(
        "subset function of wrong length",
        run("--subsets.scheme", "function", "--subsets.function", "bad_functions:cut_wrong"),
        "cut_wrong|subsets.function",
    )
    yield Case(
        "subset function that raises",
        run("--subsets.scheme", "function", "--subsets.function", "bad_functions:cut_raises"),
        "cut_raises",
        codes=(1, 2),
    )

    # clusters
    yield Case("nobody at the address", run("--cluster.address", "127.0.0.1:23999"), "23999")
    yield Case("no such host", run("--cluster.address", "no.such.host.invalid:6379"), "no.such.host")
    yield Case("an address without a port", run("--cluster.address", "127.0.0.1"), "127.0.0.1")
    yield Case("a word for an address", run("--cluster.address", "nonsense"), "nonsense")
    yield Case("something else listens there", run("--cluster.address", "127.0.0.1:23998"), "23998")
    yield Case("auto without a cluster", run("--cluster.address", "auto"), "auto")
    yield Case("shares that are no speeds", run("--subsets.shares", "A100=fast"), "shares")
    yield Case(
        "tracking URI with a password",
        run("--tracking.to", "mlflow", "--tracking.uri", "http://u:p@h/"),
        "tracking.uri",
    )

    # --config
    for label, name in {
        "no such file": "nofile.json",
        "no JSON": "text.parquet",
        "a list": "list.json",
        "unknown field": "unknown.json",
        "wrong type": "type.json",
        "nested wrong": "nested.json",
        "NaN": "nan.json",
        "a folder": "emptyfolder",
        "binary": "half.parquet",
        "deep": "deep.json",
    }.items():
        yield Case(f"config file: {label}", run("--config", str(place / name)), re.escape(name))

    # other commands
    yield Case("report of nothing", ("report",), "directory|DIRECTORY", storage=False)
    yield Case("report of no directory", ("report", "/nowhere"), "nowhere", storage=False)
    yield Case("report of a foreign folder", ("report", str(place / "texts")), "texts", storage=False)
    yield Case("report of a corrupt run", ("report", str(place / "corrupt")), "corrupt|report.json", storage=False)
    yield Case(
        "report of a run whose report is a list",
        ("report", str(place / "listreport")),
        "report.json|listreport",
        storage=False,
    )
    yield Case(
        "report of a run whose report lacks parts",
        ("report", str(place / "partreport")),
        "report.json|partreport",
        storage=False,
    )
    yield Case("report --format yaml", ("report", finished, "--format", "yaml"), "format", storage=False)
    yield Case(
        "report --to where there is none",
        ("report", finished, finished, "--format", "html", "--to", "/nowhere/x/y.html"),
        "nowhere",
        storage=False,
    )
    yield Case("report --to for one", ("report", finished, "--to", "x"), "--to", storage=False)
    yield Case("predict of no image", ("predict", finished), "image|IMAGE", storage=False)
    yield Case("predict of a missing image", ("predict", finished, "/nowhere.png"), "nowhere.png", storage=False)
    yield Case("predict of a text", ("predict", finished, str(place / "text.parquet")), "text.parquet", storage=False)
    yield Case("predict of a folder", ("predict", finished, str(place / "texts")), "texts", storage=False)
    yield Case("predict by no run", ("predict", "/nowhere", str(place / "x.png")), "nowhere", storage=False)
    yield Case(
        "predict by a model of half a file",
        ("predict", str(place / "halfmodel"), str(place / "x.png")),
        "model.safetensors",
        storage=False,
    )
    yield Case(
        "predict by a model.json that lacks parts",
        ("predict", str(place / "partmodel"), str(place / "x.png")),
        "model.json",
        storage=False,
    )
    yield Case(
        "predict by a model.json of another width",
        ("predict", str(place / "widemodel"), str(place / "x.png")),
        "model",
        storage=False,
    )
    yield Case(
        "predict by a model.json that is no JSON",
        ("predict", str(place / "textmodel"), str(place / "x.png")),
        "model.json",
        storage=False,
    )
    yield Case("export to another suffix", ("export", finished, "--to", "/tmp/x.foo"), "x.foo", storage=False)
    yield Case("export to where one may not", ("export", finished, "--to", "/proc/x/model.pt2"), "proc", storage=False)
    yield Case("export --format tflite", ("export", finished, "--format", "tflite"), "format", storage=False)
    yield Case("sweep of nothing", ("sweep",), "sizes|space")
    yield Case("sweep of size 0", ("sweep", "--sizes", "0"), "size")
    yield Case("sweep of size -5", ("sweep", "--sizes=-5"), "size|-5")
    yield Case("sweep of words", ("sweep", "--sizes", "a"), "sizes")
    yield Case("sweep of size beyond the set", ("sweep", "--sizes", "10000000"), "10000000|size")
    yield Case("sweep --space without values", ("sweep", "--space", "minimize.momentum"), "minimize.momentum")
    yield Case("sweep --space of an unknown field", ("sweep", "--space", "minimize.momentun=0.1,0.2"), "momentun")
    yield Case("sweep --space of a bad value", ("sweep", "--space", "minimize.momentum=0.1,2"), "momentum")
    yield Case("sweep --seeds 0", ("sweep", "--sizes", "80", "--seeds", "0"), "seeds")
    yield Case("sweep --seeds -1", ("sweep", "--sizes", "80", "--seeds=-1"), "seeds")
    yield Case("compare --seeds 0", ("compare", "--seeds", "0"), "seeds")
    yield Case("compare --arms Z", ("compare", "--arms", "Z"), "Z")
    yield Case("compare --arms with a bad override", ("compare", "--arms", "B", "G:foo=1"), "foo")
    yield Case("compare --budgets 0", ("compare", "--budgets", "0"), "budget")
    yield Case("compare --budgets nan", ("compare", "--budgets", "nan"), "budget")
    yield Case("compare --budgets -2", ("compare", "--budgets=-2"), "budget")
    yield Case("compare --learning-rates 0", ("compare", "--learning-rates", "0"), "learning.rate")
    yield Case("compare --learning-rates nan", ("compare", "--learning-rates", "nan"), "learning.rate")
    yield Case("compare --batch-sizes 0", ("compare", "--batch-sizes", "0"), "batch.size")
    yield Case("compare --margin -1", ("compare", "--margin=-1"), "margin")
    yield Case("compare --margin nan", ("compare", "--margin", "nan"), "margin")
    yield Case("compare --num-workers 0", ("compare", "--num-workers", "0"), "num.workers")
    yield Case("compare by nobody", ("compare", "--method", "conventional"), "method|conventional")
    yield Case("advise --num-workers 0", ("advise", "--num-workers", "0"), "num-workers", storage=False)
    yield Case("advise --against nothing", ("advise", "--against", "/nowhere"), "nowhere", storage=False)
    yield Case("advise --against a run", ("advise", "--against", finished), "against", storage=False)
    yield Case(
        "doctor of a bad path", ("doctor", "--data.name", "/nowhere/x.parquet"), "nowhere", codes=(1, 2), rate=False
    )


def make_files(place: Path, finished: Path) -> None:
    """The bad files that cases() speaks of. `finished` is the directory of a finished run."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)

    def png(side: int) -> bytes:
        sink = io.BytesIO()
        Image.new("L", (side, side), side).save(sink, "PNG")
        return sink.getvalue()

    (place / "x.png").write_bytes(png(8))
    (place / "file").write_text("a file")
    (place / "text.parquet").write_text("this is text, not Parquet\n" * 10)
    good = pa.table({"image": [png(8)] * 200, "label": [i % 2 for i in range(200)]})
    pq.write_table(good, place / "good.parquet")
    (place / "half.parquet").write_bytes((place / "good.parquet").read_bytes()[:-50])
    pq.write_table(good.drop(["image"]), place / "noimage.parquet")
    pq.write_table(good.slice(0, 0), place / "empty.parquet")
    pq.write_table(good.set_column(1, "label", pa.array([None] * 200, pa.int64())), place / "nulls.parquet")
    pq.write_table(good.set_column(1, "label", pa.array([0.5] * 200)), place / "floats.parquet")
    pq.write_table(good.set_column(1, "label", pa.array([0] * 200)), place / "oneclass.parquet")
    pq.write_table(good.set_column(0, "image", pa.array([b"no image"] * 200)), place / "garbage.parquet")
    pq.write_table(
        good.set_column(0, "image", pa.array([png(8 + i % 2) for i in range(200)])), place / "shapes.parquet"
    )
    make_tables(place)
    (place / "emptyfolder").mkdir()
    for kind in "ab":
        (place / "texts" / kind).mkdir(parents=True)
        (place / "texts" / kind / "x.txt").write_text("x")
    (place / "foreign").mkdir()
    (place / "foreign" / "thesis.tex").write_text("x")
    raw = place / "mnist" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    ):
        (raw / name).write_bytes(b"\0\0\x08\x03\0\0\0\x0a" + b"x" * 40)
    for name, tree in {
        "list.json": [1],
        "unknown.json": {"subset": {"num": 2}},
        "type.json": {"seed": "x"},
        "nested.json": {"subsets": 4},
    }.items():
        (place / name).write_text(json.dumps(tree))
    (place / "nan.json").write_text('{"minimize": {"learning_rate": NaN}}')
    (place / "deep.json").write_text("[" * 100000)
    shutil.copytree(finished, place / "finished")
    for name in ("corrupt", "listreport", "partreport", "halfmodel", "partmodel", "widemodel", "textmodel"):
        shutil.copytree(finished, place / name)
    (place / "corrupt" / "report.json").write_text('{"name": ')
    (place / "listreport" / "report.json").write_text("[1, 2]")
    (place / "partreport" / "report.json").write_text('{"name": "x"}')
    weights = (place / "halfmodel" / "model.safetensors").read_bytes()
    (place / "halfmodel" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (place / "partmodel" / "model.json").write_text('{"model": {"name": "cnn"}}')
    record = json.loads((finished / "model.json").read_text())
    record["model"]["width"] = 99
    (place / "widemodel" / "model.json").write_text(json.dumps(record))
    (place / "textmodel" / "model.json").write_text("{")


def make_tables(place: Path) -> None:
    """The files and functions of MISTAKES_IN_TABLES."""
    for name, text in TABLES.items():
        (place / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    (place / "bad_functions.py").write_text(FUNCTIONS)


def table(*, x: str = "", target: str = "", num: int = 60) -> str:
    """A CSV file of columns x, kind and target, whose fortieth row holds something else."""
    rows = [[str(i), "abc"[i % 3], str(i * 0.5)] for i in range(num)]
    rows[40] = [x or "40", "a", target or "20"]
    return "\n".join(map(",".join, [["x", "kind", "target"], *rows]))


TABLES: dict[str, str | bytes] = {
    "good.csv": table(),
    "nan.csv": table(x="NaN"),
    "inf.csv": table(x="inf"),
    "notarget.csv": table(target="NaN"),
    "inftarget.csv": table(target="-inf"),
    "stray.csv": table(x="forty"),
    "constant.csv": "x,target\n" + "".join(f"{i},7\n" for i in range(60)),
    "damaged.csv": "x,target\n1,2\n3\n4,5\n",
    "quote.csv": 'x,target\n1,"2\n4,5\n',
    "headless.csv": "5.1,3.5,a\n4.9,3.0,b\n",
    "semicolons.csv": "x;target\n1;2\n",
    "latin.csv": "x,target\ncaf\xe9,1\nthe,2\ncaf\xe9,1\n".encode("latin-1"),
    "onlytarget.csv": "target\n1\n2\n",
    "blank.csv": "",
    "short.txt": "too short",
    "latin.txt": "caf\xe9 ".encode("latin-1") * 500,
}
_REGRESSION, _TEXT = ("--task.name", "regression"), ("--task.name", "next_token")
# By what is wrong: data.name, further flags, and what the answer should name.
MISTAKES_IN_TABLES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "no target": ("good.csv", ("--data.target", "prise"), "prise"),
    "a target that is a feature": ("good.csv", (*_REGRESSION, "--data.columns", "x,target"), "target"),
    "a feature that is not there": ("good.csv", (*_REGRESSION, "--data.columns", "x,knid"), "did you mean kind"),
    "numbers as classes": ("good.csv", (), "--task regression"),
    "texts as numbers": ("good.csv", (*_REGRESSION, "--data.target", "kind"), "kind"),
    "text among numbers": ("stray.csv", _REGRESSION, "'forty' in row 40"),
    "NaN": ("nan.csv", _REGRESSION, "column x has no value in row 40"),
    "infinity": ("inf.csv", _REGRESSION, "column x is inf in row 40"),
    "a target that is missing": ("notarget.csv", _REGRESSION, "column target has no value in row 40"),
    "an infinite target": ("inftarget.csv", _REGRESSION, "column target is -inf in row 40"),
    "a constant target": ("constant.csv", _REGRESSION, "target is 7"),
    "a damaged line": ("damaged.csv", _REGRESSION, "line 3 of"),
    "an open quote": ("quote.csv", _REGRESSION, "line 2 of"),
    "no header": ("headless.csv", (), "5.1, 3.5, a"),
    "semicolons": ("semicolons.csv", (), "semicolons"),
    "Latin-1": ("latin.csv", (), "row 0"),
    "nothing but a target": ("onlytarget.csv", _REGRESSION, "onlytarget"),
    "an empty file": ("blank.csv", (), "blank.csv"),
    "a text shorter than a window": ("short.txt", _TEXT, "--data.window"),
    "a text in Latin-1": ("latin.txt", _TEXT, "byte 3"),
    "text as a table": ("short.txt", _REGRESSION, "short.txt"),
    "a table as masks": ("good.csv", ("--task.name", "segmentation"), "segmentation"),
    "a named table as text": ("iris", _TEXT, "iris"),
    "names of classes as numbers": ("iris", _REGRESSION, "setosa"),
    "rows of differing lengths": ("bad_functions:ragged", _REGRESSION, "row 1"),
    "arrays of differing lengths": ("bad_functions:unequal", _REGRESSION, "inputs 9, target 8"),
    "NaN in arrays": ("bad_functions:nan_inputs", _REGRESSION, "row 5"),
    "a set without a length": ("bad_functions:endless", _REGRESSION, "endless"),
    "items of differing shapes": ("bad_functions:shapes", _REGRESSION, "row 1 has shape"),
}


FUNCTIONS = """
import numpy as np, torch
_IMAGES = np.zeros((200, 8, 8), np.uint8); _LABELS = np.arange(200) % 2
def raises(): raise KeyError("the user's own mistake")
def nothing(): return None
def lengths(): return _IMAGES, _LABELS[:7]
def nan_labels(): return _IMAGES, np.full(200, np.nan)
def negative(): return _IMAGES, _LABELS - 1
def float_images(): return np.full((200, 8, 8), np.nan), _LABELS
def no_examples(): return _IMAGES[:0], _LABELS[:0]
def ragged(): return [[1.0, 2.0], [1.0]], [0.5, 1.5]
def unequal(): return dict(inputs=np.ones((9, 2)), target=np.arange(8.0))
def nan_inputs(): return np.where(np.arange(18).reshape(9, 2) == 10, np.nan, 1.0), np.arange(9.0)
class _Endless(torch.utils.data.IterableDataset):
    def __iter__(self): yield 1, 2
class _Shapes(torch.utils.data.Dataset):
    def __len__(self): return 9
    def __getitem__(self, number): return np.ones(4 + number), float(number)
def endless(): return _Endless()
def shapes(): return _Shapes()
def net_raises(num_classes, shape): raise TypeError("the user's own mistake")
def nothing2(num_classes, shape): return None
def net_outputs(num_classes, shape): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
def net_empty(num_classes, shape): return torch.nn.Flatten()
def cut_wrong(labels, num, seed): return np.zeros(3, int)
def cut_raises(labels, num, seed): raise KeyError("the user's own mistake")
"""


def ask(case: Case, out: Path, place: Path, limit_s: float) -> Answer:
    """Run one case in a process of its own, with a folder for Ray's session and the storage of its own."""
    ray_folder, storage = Path(tempfile.gettempdir()) / "rbad", out / "storage"  # Ray's sockets need a short path
    for folder in (ray_folder, storage):
        shutil.rmtree(folder, ignore_errors=True)
    ray_folder.mkdir(exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "raysubset",
        *case.arguments,
        *(("--storage-path", str(storage)) if case.storage else ()),
    ]
    if case.most_bytes:
        command = ["prlimit", f"--as={case.most_bytes}", *command]
    env = os.environ | {"RAY_TMPDIR": str(ray_folder)}
    began = time.monotonic()
    process = subprocess.Popen(
        command, cwd=place, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, errors = process.communicate(timeout=limit_s)
        code = process.returncode
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            _, errors = process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            _, errors = process.communicate()
        code = None
    seconds = time.monotonic() - began
    return judge(case, code, errors, seconds, ray_started=any(ray_folder.glob("ray/session_*")), storage=storage)


def judge(case: Case, code: int | None, errors: str, seconds: float, *, ray_started: bool, storage: Path) -> Answer:
    """What standard error and the storage path say of an answer."""
    lines = [line for line in errors.splitlines() if line.strip()]
    own = [line for line in lines if not re.match(r"\d\d:\d\d:\d\d ", line)]  # progress is no part of the answer
    said = "\n".join(own)
    left = [str(path.relative_to(storage)) for path in sorted(storage.rglob("*"))][:4] if storage.exists() else []
    return Answer(
        code,
        seconds,
        len(own),
        "Traceback" in errors,
        bool(re.search(case.named, said)),
        bool(WAY_OUT.search(said)),
        ray_started,
        ", ".join(left),
        said[:600],
    )


def try_fields() -> None:
    """Every field of Config against bad values, without a process."""
    values = [-1, 0, 10**30, -1.0, 0.0, float("nan"), float("inf"), 1e300, "", "x", "\0", True, [], {}, None]
    counts: Counter[str] = Counter()
    for key, default in flatten(Config().to_dict()).items():
        taken = []
        for value in values:
            if (value is None and default is None) or (type(value) is type(default) and value == default):
                continue
            try:
                Config().with_overrides({key: value})
                counts["taken"] += 1
                taken.append(value)
            except ValueError:
                counts["refused"] += 1
            except Exception as error:  # that is what is looked for
                counts["raised"] += 1
                print(f"RAISED {key} = {value!r}: {type(error).__name__}: {error}")
        print(f"{key} (default {default!r}) takes {taken}")
    print(dict(counts))


def main() -> None:
    parser = argparse.ArgumentParser(description="Give raysubset bad input, and see how it is answered.")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "bad")
    parser.add_argument("--finished", type=Path, help="the directory of a finished run of digits")
    parser.add_argument("--only", default="")
    parser.add_argument("--skip", type=int, default=0, help="cases, to go on where it was stopped")
    parser.add_argument("--most-s", type=float, default=15.0)
    parser.add_argument("--limit-s", type=float, default=60.0)
    parser.add_argument("--fields", action="store_true")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    if options.fields:
        try_fields()
        return
    place = options.out / "files"
    todo = [case for case in cases(place) if options.only in case.label][options.skip :]
    if options.list:
        print("\n".join(case.label for case in todo), len(todo), sep="\n")
        return
    make_files(place, options.finished)
    rows, good = [], 0
    for case in todo:
        answer = ask(case, options.out, place, options.limit_s)
        faults = answer.faults(case, options.most_s)
        good += not faults and case.rate
        rows.append(
            {
                "label": case.label,
                "counted": case.rate,
                "faults": "; ".join(faults),
                **dataclasses.asdict(answer),
                "arguments": " ".join(case.arguments),
            }
        )
        mark = "ok  " if not faults else "FAIL" if case.rate else "note"
        print(f"{mark} {case.label}: {'; '.join(faults) or answer.said[:160]}", flush=True)
        with (options.out / "answers.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    counted = sum(row["counted"] for row in rows)
    print(f"\nanswered well: {good} of {counted} counted ({len(rows)} tried)")


if __name__ == "__main__":
    main()
