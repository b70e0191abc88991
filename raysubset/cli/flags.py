"""Define the commands and their flags, which have the config's names."""

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal

from raysubset.config import Config, field_docs


@typing.dataclass_transform(frozen_default=True, field_specifiers=(field,))
class Command:
    """A command: each subclass is a frozen dataclass, whose fields are the command's flags."""

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True)(cls)


class OfConfig(Command):
    config: Config
    config_file: str | None = field(default=None, metadata={"flag": "config", "value_name": "FILE"})
    """YAML or JSON file of settings, as `raysubset config` writes it, or a run's config.json; flags override it. A
    function that it names is called only with --trust-code, or if a flag names it too."""
    trust_code: bool = False
    """Import and call the functions that the file of --config names. Only for files of people you trust."""


class Resumed(OfConfig):
    fresh: bool = False
    """Delete what exists under this name, and start over."""
    accept_changed_code: bool = False
    """Resume although the code of a function that the config names has changed; finished work is kept."""


class Run(Resumed):
    """Run subset pretraining, or a conventional run, and print its report; resume an unfinished run of that name.

    Exit codes: 0 done; 1 failed; 2 a mistake in flags, config, data or request; 130 stopped by Ctrl-C or SIGTERM:
    finished work is kept, and the same command resumes.
    """


class Report(Command):
    """Print the report of a finished run, sweep or comparison; say how far an unfinished one is (exit code 2).

    Several runs are shown side by side.
    """

    directories: tuple[str, ...] = field(default=(), metadata={"positional": "DIRECTORY", "nargs": "*"})
    """The run directory, or several: paths or URIs."""
    format: Literal["text", "json", "html"] = "text"
    """text: tables; json: everything; html: a page for the browser, whose path is printed."""
    to: str | None = None
    """File for the page of several runs; by default report.html in the working directory. The page of one run is
    report/report.html in its directory."""


class Ls(Command):
    """List the runs, sweeps and comparisons of a storage path: state, result and cost, the newest last.

    Damaged directories are listed too; the exit code is 2 if there are any.
    """

    storage: str = field(default=Config.storage_path, metadata={"positional": "STORAGE", "nargs": "?"})
    """The storage path: a folder or URI."""
    format: Literal["text", "json"] = "text"


class Doctor(OfConfig):
    """Check data, model, storage and cluster before a run: resources, what this config requests, memory and time.

    The exit code is 0 if a run can start, 1 if something is wrong. Takes the flags of `run`.
    """


class Sweep(Resumed):
    """Run every combination of the values, over seeds, as trials of Ray Tune; print a table and a recommendation.

    Resumes an unfinished sweep of that name. Takes the flags and has the exit codes of `run`; 1 if a trial failed.
    """

    sizes: tuple[int, ...] = ()
    """Examples per subset: short for --space subsets.size=…"""
    space: tuple[str, ...] = ()
    """Other fields to vary, by their dotted names: field=value,value …"""
    seeds: int = 3
    """Runs of each combination, with seeds from --seed on."""
    baseline: bool = False
    """Run conventional training too, for as many epochs as a subset has (or --conventional.epochs), as the baseline."""
    prune: bool = False
    """Stop trials whose validation loss falls behind the others' after the same passes (ASHA)."""


class Compare(Resumed):
    """Find out whether subset pretraining pays: arms, controls, budgets and seeds, all costs counted, and a verdict.

    Resumes an unfinished comparison of that name. Takes the flags and has the exit codes of `run`; 1 if work failed,
    other than by a rate that diverges in tuning.
    """

    seeds: int | None = None
    """Runs of each arm and budget, with seeds from --seed on; by default 5. A verdict needs 5."""
    budgets: tuple[float, ...] = ()
    """Budgets in passes of training in total; every arm trains with each. At least 1; by default 1 2 4 8 16."""
    arms: tuple[str, ...] = ()
    """Arms to compare: A long conventional, B conventional, C RS2, D one subset, E D with shrink-perturb, F D from
    fresh weights, G aggregate, H trunk and aggregate, I data-parallel; or with overrides: G:aggregation.method=fisher.
    By default all that the settings allow, and H:rounds.num=4."""
    learning_rates: tuple[float, ...] = ()
    """Grid tried for each arm, on validation data; by default 0.3, 1 and 3 times --minimize.learning-rate, and up to
    three rates further while an arm's best one is at an edge."""
    batch_sizes: tuple[int, ...] = ()
    """Grid tried for B, whose best value all arms use; by default only --minimize.batch-size."""
    margin: float | None = None
    """Margin of non-inferiority, in the quality's units. Defaults for accuracy: 0.001 on MNIST, 0.005 on CIFAR-10, 0.01
    on CIFAR-100, else 0.005; for other qualities the task's own."""
    num_workers: int | None = None
    """Workers of arm I; by default one for each subset, if the cluster has room."""
    bandwidth: float | None = None
    """Bandwidth of each worker's link in Gbit/s, for the least wall time in the report; by default 1."""
    quick: bool = False
    """A first answer, for digits in 20 s on two idle cores: arms B D G H, two seeds, few budgets. A smoke test."""


class Advise(OfConfig):
    """Forecast subset pretraining, data-parallel training and one device by formulas, without training.

    The speed of this machine is measured for a few seconds. Takes the flags of `run`.
    """

    num_workers: int = 4
    """Devices to train with."""
    against: str | None = None
    """A finished comparison of the same data and model, to check the formula by its measurements."""


class FindRate(OfConfig):
    """Try rising learning rates for a few steps each on the first subset, and suggest one to begin with.

    Works in this process, without Ray. Takes the flags of `run`.
    """

    to: str | None = None
    """File for a page with the plot, for the browser; by default there is none."""


class Export(Command):
    """Write the model of a finished run as one file that takes floats in [0, 1], and check its outputs."""

    directory: str = field(metadata={"positional": "DIRECTORY"})
    """The run directory: a path or URI."""
    format: Literal["torch-export", "onnx"] = "torch-export"
    """model.pt2 for torch.export.load(), or model.onnx."""
    to: str | None = None
    """The file; by default model.pt2 or model.onnx in the working directory."""
    trust_code: bool = False
    """Import and call the package.module:function of the run's own network, if the run could not keep its graph.
    Only for directories of people you trust."""


class Predict(Command):
    """Apply the model of a finished run to images, with a line each, to the rows of a table, or to the end of a text.

    Classes are sorted by probability, numbers are in the units of the training data, and texts are continued. For masks
    a line has each class's share of the pixels, and JSON also the class of each pixel. A file that cannot be read is
    named on stderr, and the exit code is 2; the other files have their lines.
    """

    directory: str = field(metadata={"positional": "DIRECTORY"})
    """The run directory: a path or URI."""
    files: tuple[str, ...] = field(metadata={"positional": "FILE"})
    """What the model takes: image files, or Parquet and Arrow files with the images' column; tables with the training
    table's columns; or text files."""
    format: Literal["text", "json"] = "text"
    trust_code: bool = False
    """Import and call the package.module:function of the run's own network, if the run could not keep its graph.
    Only for directories of people you trust."""


class Settings(OfConfig):
    """Write a YAML file for --config: every setting with its documentation and its default, or its flag's value.

    The settings most often changed come first. Takes the flags of `run`.
    """

    to: str | None = None
    """The file; by default the text is printed."""


COMMANDS: Mapping[str, type[Command]] = {
    "run": Run,
    "compare": Compare,
    "sweep": Sweep,
    "advise": Advise,
    "find-rate": FindRate,
    "doctor": Doctor,
    "ls": Ls,
    "report": Report,
    "predict": Predict,
    "export": Export,
    "config": Settings,
}

COMMON = (  # config fields that --help shows and that come first in a file for --config
    *("name", "storage_path", "seed", "method"),
    *("data.name", "data.root", "data.image_size", "data.target", "task.name", "model.name", "model.width"),
    *("subsets.num", "subsets.size", "trunk.epochs", "rounds.num"),
    *("minimize.epochs", "minimize.batch_size", "minimize.learning_rate", "minimize.optimizer"),
    *("aggregation.method", "fine_tuning.epochs", "fine_tuning.num_workers"),
    *("actors.num_cpus", "actors.num_gpus", "cluster.address"),
)


@dataclass(frozen=True)
class Flag:
    """A flag or a positional argument of a command."""

    name: str  # without dashes: "minimize.learning-rate"
    key: str  # the config's dotted field, or the command's own field
    kind: type  # of a value: bool, int, float or str
    words: tuple[str, ...]  # the values allowed; (): any
    has_none: bool
    nargs: str | None  # argparse's; "+" or "*": a tuple of values
    default: Any
    owner: type  # the dataclass whose field it is
    of_config: bool
    value_name: str = ""  # in help, in place of what its kind gives
    positional: str | None = None  # the name in help of an argument without dashes; None: a flag

    @property
    def doc(self) -> str:
        """Return the flag's documentation, read from its class's source."""
        return field_docs(self.owner)[self.key.rpartition(".")[2]]

    @property
    def negated(self) -> str:
        """Return the form that turns off one of the config's switches: --minimize.no-compile."""
        room, dot, name = self.name.rpartition(".")
        return f"--{room}{dot}no-{name}"

    @property
    def written(self) -> str:
        """Return the flag as a user writes it; for a switch of the config the form that changes its default."""
        return self.negated if self.kind is bool and self.of_config and self.default else f"--{self.name}"

    @property
    def value(self) -> str:
        """Return the placeholder for the value in help."""
        if name := self.positional or self.value_name:
            return name
        placeholder = {int: "N", float: "NUMBER"}.get(self.kind, "TEXT")
        words = [placeholder] * (self.kind is not str or not self.words) + list(self.words)
        return "{" + ",".join(words) + "}" if self.words else placeholder


def flags_of(kind: type, default: Config | None = None, **defaults: Any) -> list[Flag]:
    """Return a command's own flags, then the config's if it takes one.

    Args:
        defaults: of the command's own fields, if they differ from the class's.
    """
    hints = typing.get_type_hints(kind)
    flags = []
    for entry in dataclasses.fields(kind):
        if entry.name != "config":
            metadata = {"flag": entry.name, **entry.metadata}
            value = defaults.get(entry.name, entry.default)
            flags.append(_flag(entry.name, hints[entry.name], value, kind, of_config=False, **metadata))
    if issubclass(kind, OfConfig):
        flags += _flags_of_config(Config, default or Config(), "")
    return flags


def _flags_of_config(kind: type, default: Any, prefix: str) -> Iterator[Flag]:
    hints = typing.get_type_hints(kind)
    for name, hint in hints.items():
        key, value = prefix + name, getattr(default, name)
        if dataclasses.is_dataclass(hint):
            yield from _flags_of_config(typing.cast(type, hint), value, f"{key}.")
        else:
            yield _flag(key, hint, value, kind, of_config=True, flag=key)


def _flag(key: str, hint: Any, default: Any, owner: type, *, of_config: bool, flag: str, **more: str) -> Flag:
    options = typing.get_args(hint) if typing.get_origin(hint) in (UnionType, typing.Union) else (hint,)
    has_none, kind = type(None) in options, next(option for option in options if option is not type(None))
    words = next((typing.get_args(option) for option in options if typing.get_origin(option) is Literal), ())
    nargs = more.pop("nargs", "+" if typing.get_origin(kind) is tuple else None)
    if typing.get_origin(kind) is tuple:
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is Literal:
        kind = str
    return Flag(flag.replace("_", "-"), key, kind, words, has_none, nargs, default, owner, of_config, **more)
