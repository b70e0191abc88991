"""Flags in config's words: what each command takes, and how it is read. Mistakes are told in one line."""

import dataclasses
import functools
import os
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal

from raysubset.config import Config, field_docs, nearest, read_config


@dataclass(frozen=True)
class _OfConfig:
    config: Config
    config_file: str | None = field(default=None, metadata={"flag": "config", "value": "FILE"})
    """YAML or JSON to take settings from, as `raysubset config` writes it, or a run's config.json; flags override it. A
    function that it names is called only with --trust-code, or where a flag names it too."""
    trust_code: bool = False
    """Import and call the functions that the file of --config names. Only for files of people you trust."""


@dataclass(frozen=True)
class _Resumed(_OfConfig):
    fresh: bool = False
    """Delete what was left behind under this name, and start over."""
    accept_changed_code: bool = False
    """Resume though the code of a function that the config names has changed: what is done stays as it is."""


@dataclass(frozen=True)
class Run(_Resumed):
    """Run subset pretraining, or a conventional run, and print its report; goes on with an unfinished run of that name.

    Exit codes: 0 done; 1 failed; 2 a mistake in flags, config, data or request; 130 stopped by Ctrl-C or SIGTERM, with
    what was done kept: the same command resumes.
    """


@dataclass(frozen=True)
class Report:
    """Print the report of a finished run, sweep or comparison again; of an unfinished one, how far it is (exit code 2).

    Several runs are laid side by side.
    """

    directories: tuple[str, ...] = field(default=(), metadata={"positional": "DIRECTORY …"})
    """The run directory, or several: paths or URIs."""
    format: Literal["text", "json", "html"] = "text"
    """Tables, everything as JSON, or a page for the browser, whose path is printed."""
    to: str | None = None
    """Where the page of several runs goes; by default report.html in the working directory. That of one goes to
    report/report.html in its directory."""


@dataclass(frozen=True)
class Ls:
    """List the runs, sweeps and comparisons of a storage path: state, result and cost, the newest last.

    Damaged directories are named; exit code 2 if there are any.
    """

    storage: str = field(default=Config.storage_path, metadata={"positional": "[STORAGE]"})
    """The storage path: a folder or URI."""
    format: Literal["text", "json"] = "text"


@dataclass(frozen=True)
class Doctor(_OfConfig):
    """Check data, model, storage and cluster before a run: what there is, what this config asks for, memory and time.

    Exit code 0 when a run can start, 1 when something is wrong. Takes the flags of `run`.
    """


@dataclass(frozen=True)
class Sweep(_Resumed):
    """Run every combination of the values given, over seeds, as trials of Ray Tune; print a table and a recommendation.

    Goes on with an unfinished sweep of that name. Takes the flags of `run`. Exit codes as there; 1 if a trial failed.
    """

    sizes: tuple[int, ...] = ()
    """Examples per subset: short for --space subsets.size=…"""
    space: tuple[str, ...] = ()
    """What else to vary: field=value,value …, by the fields' dotted names."""
    seeds: int = 3
    """Runs of each combination, with seeds from --seed on."""
    baseline: bool = False
    """Run conventional training too, of as many epochs as a subset has (or --conventional.epochs): the line to beat."""
    prune: bool = False
    """Stop trials whose validation loss falls behind that of others at as many passes (ASHA)."""


@dataclass(frozen=True)
class Compare(_Resumed):
    """Find out whether subset pretraining pays: arms, controls, budgets and seeds, all costs counted, and a verdict.

    Goes on with an unfinished comparison of that name. Takes the flags of `run`. Exit codes as there; 1 if work failed.
    """

    seeds: int | None = None
    """Runs of each arm and budget, with seeds from --seed on; by default 5. A verdict needs 5."""
    budgets: tuple[float, ...] = ()
    """Passes of training in total, each of which every arm gets; at least 1. By default 1 2 4 8 16."""
    arms: tuple[str, ...] = ()
    """A long conventional, B conventional, C RS2, D one subset, E D with shrink-perturb, F D from fresh weights,
    G aggregate, H trunk and aggregate, I data-parallel; or with overrides: G:aggregation.method=fisher."""
    learning_rates: tuple[float, ...] = ()
    """The grid tried for each arm, on validation data; by default 0.3, 1 and 3 times --minimize.learning-rate."""
    batch_sizes: tuple[int, ...] = ()
    """The grid tried for B, whose best all arms take; by default --minimize.batch-size alone."""
    margin: float | None = None
    """Of non-inferiority, in the quality's units; by default, in accuracy, 0.001 on MNIST, 0.005 on CIFAR-10, 0.01 on
    CIFAR-100, 0.005 else; of other qualities what the task says."""
    num_workers: int | None = None
    """Of arm I; by default as many as there are subsets, as far as the cluster has room."""
    bandwidth: float | None = None
    """Of each worker's link, in Gbit/s, at which the report says what takes the least wall time; by default 1."""
    quick: bool = False
    """A first answer within two minutes on two cores: arms B D G H, two seeds, few budgets. A smoke test."""


@dataclass(frozen=True)
class Advise(_OfConfig):
    """Say what to expect of subset pretraining, data-parallel training and one device, with the formulas; no training.

    The speed of this machine is measured for a few seconds. Takes the flags of `run`.
    """

    num_workers: int = 4
    """Devices to train with."""
    against: str | None = None
    """A finished comparison of the same data and model, to hold the formula against what it measured."""


@dataclass(frozen=True)
class FindRate(_OfConfig):
    """Try rising learning rates for a few steps each on the first subset, and suggest one to begin with; no run.

    In this process, without Ray. Takes the flags of `run`.
    """

    to: str | None = None
    """A file for a page with the plot, for the browser; by default there is none."""


@dataclass(frozen=True)
class Export:
    """Write the model of a finished run as one file that takes floats in [0, 1], and check what it computes."""

    directory: str = field(metadata={"positional": "DIRECTORY"})
    """The run directory: a path or URI."""
    format: Literal["torch-export", "onnx"] = "torch-export"
    """model.pt2 for torch.export.load(), or model.onnx."""
    to: str | None = None
    """The file; by default model.pt2 or model.onnx in the working directory."""
    trust_code: bool = False
    """Import and call the package.module:function of the run's own network, where the run could keep no graph of it.
    Only for directories of people you trust."""


@dataclass(frozen=True)
class Predict:
    """Apply the model of a finished run: to images, a line each; to the rows of a table; or to a text's end.

    Classes come with the most probable first, numbers in the units of the training data; text is gone on with. Of masks
    the line has each class's share of the pixels, and JSON the class of each pixel too. A file that cannot be read is
    named on stderr, and the exit code is 2; the others have their lines.
    """

    directory: str = field(metadata={"positional": "DIRECTORY"})
    """The run directory: a path or URI."""
    files: tuple[str, ...] = field(metadata={"positional": "FILE …"})
    """Images: files, or Parquet and Arrow files with the column that training read. Tables with the training table's
    columns, or text files, as the model takes them."""
    format: Literal["text", "json"] = "text"
    trust_code: bool = False
    """Import and call the package.module:function of the run's own network, where the run could keep no graph of it.
    Only for directories of people you trust."""


@dataclass(frozen=True)
class Settings(_OfConfig):
    """Write a file for --config: every setting with its documentation and default, those given with flags set.

    YAML; the settings most often changed come first. Takes the flags of `run`.
    """

    to: str | None = None
    """The file; by default it is printed."""


Command = Run | Sweep | Compare | Advise | FindRate | Report | Ls | Doctor | Export | Predict | Settings

COMMANDS: Mapping[str, type] = {
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

COMMON = (  # fields of the config that --help shows, and a file for --config has first
    *("name", "storage_path", "seed", "method"),
    *("data.name", "data.root", "data.image_size", "data.target", "task.name", "model.name", "model.width"),
    *("subsets.num", "subsets.size", "trunk.epochs", "rounds.num"),
    *("minimize.epochs", "minimize.batch_size", "minimize.learning_rate", "minimize.optimizer"),
    *("aggregation.method", "fine_tuning.epochs", "fine_tuning.num_workers"),
    *("actors.num_cpus", "actors.num_gpus", "cluster.address"),
)


@dataclass(frozen=True)
class Flag:
    """A flag or an argument of a command: what it is called, takes, is by default, and means."""

    name: str  # without dashes: "minimize.learning-rate"
    key: str  # the config's dotted field, or the command's own
    kind: type  # of a value: bool, int, float or str
    words: tuple[str, ...]  # that a value may be; (): any
    has_none: bool
    is_many: bool
    default: Any  # MISSING where it must be given
    owner: type  # the dataclass whose field it is
    of_config: bool
    placeholder: str = ""
    is_positional: bool = False

    @property
    def doc(self) -> str:
        """Its documentation, read from its class's source."""
        return field_docs(self.owner)[self.key.rpartition(".")[2]]

    @property
    def negated(self) -> str:
        """How one of the config's switches is written that is to be off."""
        room, dot, name = self.name.rpartition(".")
        return f"--{room}{dot}no-{name}"

    @property
    def value(self) -> str:
        """What stands for its value in help; "" where it takes none."""
        if self.placeholder or self.kind is bool:
            return self.placeholder
        named = {int: "N", float: "NUMBER"}.get(self.kind, "TEXT")
        words = [named] * (self.kind is not str or not self.words) + list(self.words)
        return ("{" + ",".join(words) + "}" if self.words else named) + (" …" if self.is_many else "")


def flags_of(kind: type, default: Config | None = None, **defaults: Any) -> list[Flag]:
    """What a command takes: its own flags, and then those of the config, if it takes one.

    Args:
        defaults: of its own fields, where they are others than its class has.
    """
    hints = typing.get_type_hints(kind)
    flags = []
    for each in dataclasses.fields(kind):
        if each.name == "config":
            continue
        name, position = each.metadata.get("flag", each.name), each.metadata.get("positional")
        placeholder, value = each.metadata.get("value", position or ""), defaults.get(each.name, each.default)
        about = (value, kind, False, placeholder, position is not None)
        flags.append(_flag(name, each.name, hints[each.name], *about))
    if issubclass(kind, _OfConfig):
        flags += _flags_of_config(Config, default or Config(), "")
    return flags


def _flags_of_config(kind: type, default: Any, prefix: str) -> Iterator[Flag]:
    hints = typing.get_type_hints(kind)
    for name, hint in hints.items():
        key, value = prefix + name, getattr(default, name)
        if dataclasses.is_dataclass(hint):
            yield from _flags_of_config(typing.cast(type, hint), value, f"{key}.")
        else:
            yield _flag(key, key, hint, value, kind, True)


def _flag(name: str, key: str, hint: Any, default: Any, owner: type, of_config: bool, *more: Any) -> Flag:
    options = typing.get_args(hint) if typing.get_origin(hint) in (UnionType, typing.Union) else (hint,)
    has_none, kind = type(None) in options, next(one for one in options if one is not type(None))
    words = next((typing.get_args(one) for one in options if typing.get_origin(one) is Literal), ())
    if is_many := typing.get_origin(kind) is tuple:
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is Literal:
        kind = str
    return Flag(name.replace("_", "-"), key, kind, words, has_none, is_many, default, owner, of_config, *more)


def parse_config(arguments: Sequence[str], *, default: Config | None = None) -> Config:
    """The config that flags of `raysubset run` give.

    Raises:
        ValueError: for a mistake in them, in one line.
    """
    return parse(Run, arguments, default or Config(), prog="raysubset run").config


class HelpAsked(Exception):
    """Somebody asks what a command takes, or what commands there are (kind is None)."""

    def __init__(self, kind: type | None = None, flags: Sequence[Flag] = (), prog: str = "", *, whole: bool) -> None:
        self.kind, self.flags, self.prog, self.whole = kind, flags, prog, whole
        self.description: str | None = None  # instead of the kind's


def parse_command(arguments: Sequence[str]) -> Command:
    """The command that a line gives.

    Raises:
        ValueError: for a mistake, in one line.
        HelpAsked: for --help.
    """
    verb = arguments[0] if arguments else "--help"
    if verb in COMMANDS:
        return parse(COMMANDS[verb], arguments[1:], Config(), prog=f"raysubset {verb}")
    if verb not in _HELP:
        raise ValueError(f"there is no command {verb}{nearest(verb, COMMANDS) or '; see raysubset --help'}")
    raise HelpAsked(whole=verb == "--help-all")


def parse(kind: Any, arguments: Sequence[str], default: Config, *, prog: str, **defaults: Any) -> Any:
    """A command of its flags; defaults are of its fields beside the config.

    Raises:
        ValueError: for a mistake in them, in one line.
        HelpAsked: for --help.
    """
    flags = flags_of(kind, default, **defaults)
    given = _read(kind, flags, arguments, prog)
    own = {key: given.pop(key) for key in [flag.key for flag in flags if not flag.of_config] if key in given}
    for flag in flags:
        if flag.is_positional and flag.default is dataclasses.MISSING and flag.key not in own:
            raise ValueError(f"{flag.value.split()[0]} is missing; see {prog} --help")
    if not issubclass(kind, _OfConfig):
        return kind(**defaults | own)
    config = default
    if file := own.get("config_file"):
        config = read_config(file, default)
        if not own.get("trust_code"):
            _refuse_code(file, config, default, given)
    return kind(config.with_overrides(given), **defaults | own)


_HELP = ("-h", "--help", "--help-all")


def _read(kind: type, flags: Sequence[Flag], arguments: Sequence[str], prog: str) -> dict[str, Any]:
    """Values by the keys of flags and arguments."""
    known = {f"--{flag.name}": flag for flag in flags if not flag.is_positional}
    negated = {flag.negated: flag for flag in flags if flag.kind is bool and flag.of_config}
    if "--task.name" in known:
        known["--task"] = known["--task.name"]  # the everyday words
        known["--start-from"] = known["--model.weights"]
        known["--profile"] = known["--actors.profile"]
    places = [flag for flag in flags if flag.is_positional]
    given: dict[str, Any] = {}
    left, before = list(arguments), ""
    while left:
        word = left.pop(0)
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        if word in _HELP:
            raise HelpAsked(kind, flags, prog, whole=word == "--help-all")
        if flag := known.get(name):
            values = [value] if equals else []
            if flag.kind is bool:
                if equals:
                    raise ValueError(f"{name} takes no value: it is given or not, not {word}")
                given[flag.key] = True
            else:
                while left and not left[0].startswith("--") and left[0] not in _HELP and (flag.is_many or not values):
                    if equals:
                        break
                    values.append(left.pop(0))
                if not values:
                    raise ValueError(f"{name} needs a value; see {prog} --help")
                read = [_value(flag, name, one, prog) for one in values]
                given[flag.key] = tuple(read) if flag.is_many else read[0]
        elif name in negated and not equals:
            given[negated[name].key] = False
        elif word.startswith("-") or not places:
            raise ValueError(_unknown(name if word.startswith("-") else word, before, kind, prog))
        elif places[0].is_many:
            given[places[0].key] = (*given.get(places[0].key, ()), word)
        else:
            given[places.pop(0).key] = word
        before = name
    return given


def _value(flag: Flag, name: str, word: str, prog: str) -> Any:
    """The value that a word gives a flag; the config's fields check their own ranges and choices."""
    if flag.has_none and word in ("None", "null"):
        return None
    if flag.words and word not in flag.words and not flag.of_config:
        raise ValueError(f"{name} = {word!r} is not one of {', '.join(flag.words)}{nearest(word, flag.words)}")
    try:
        return word if word in flag.words else flag.kind(word)
    except ValueError:
        number = " or ".join(("a whole number" if flag.kind is int else "a number", *flag.words))
        raise ValueError(f"{name} takes {number}, not {word!r}; see {prog} --help") from None


_EVERYDAY = {  # a field's name, or its last part, and what other programs call it
    "learning-rate": "lr",
    "epochs": "num-epochs max-epochs",
    "batch-size": "bs",
    "weight-decay": "wd",
    "optimizer": "opt",
    "precision": "amp bf16",
    "data.name": "data dataset data-path",
    "data.root": "data-dir",
    "image-size": "img-size",
    "model.name": "model arch network",
    "subsets.num": "subsets num-subsets",
    "rounds.num": "rounds num-rounds",
    "seed": "seeds",
    "num-workers": "workers n-workers",
    "actors.num-gpus": "gpus num-gpus",
    "actors.num-cpus": "cpus num-cpus",
    "cluster.address": "ray-address",
    "storage-path": "output output-dir out out-dir outdir save-dir log-dir logdir storage",
    "name": "run-name",
    "tracking.to": "mlflow wandb",
    "fresh": "overwrite force",
}
_FIRST = ("minimize.", "fine-tuning.", "actors.")  # whose fields are meant before others of the same last name
_MOST_MEANT = 3


@functools.cache
def _names_of(kind: type) -> list[str]:
    return [flag.name for flag in flags_of(kind) if not flag.is_positional]


def _unknown(flag: str, before: str, kind: Any, prog: str) -> str:
    """What to say of a word that a command does not take: the flag that is meant, or the command that takes it."""
    see = f"see {prog} --help"
    if not flag.startswith("-") or flag == "--":
        after = f" after {before}" if before.startswith("--") else ""
        return f"unexpected argument {flag!r}{after}; {see}"
    if flag in ("--resume", "--continue"):
        return f"there is no flag {flag}, and no need of one: the same command under the same --name resumes; {see}"
    name, known = flag.lstrip("-").replace("_", "-").lower(), _names_of(kind)
    meant = next((field for field, others in _EVERYDAY.items() if name in others.split()), name)
    found = [meant] if meant in known else [one for one in known if one.endswith(f".{meant}")]
    if found:
        found.sort(key=lambda one: (one.count("."), not one.startswith(_FIRST)))
        return f"there is no flag {flag}; did you mean {' or '.join(f'--{one}' for one in found[:_MOST_MEANT])}?"
    if near := nearest(flag, [f"--{one}" for one in known]):
        return f"there is no flag {flag}{near}"
    if takers := [verb for verb, other in COMMANDS.items() if name in _names_of(other)]:
        return f"{flag} is a flag of {' and '.join(takers)}, not of {prog}; {see}"
    return f"there is no flag {flag}; {see}"


def _refuse_code(file: str, config: Config, default: Config, given: Mapping[str, Any]) -> None:
    """ValueError where a config from a file, which may be a stranger's, names a function that no flag names as well."""
    before = default.functions()
    for key, name in config.functions().items():
        if name != before.get(key) and key not in given:
            raise ValueError(
                f"--config {file} names code: {key} = {name} would be imported from {os.getcwd()} or what is "
                f"installed, and called. If you trust whoever made the file, add --trust-code, or give "
                f"--{key.replace('_', '-')} yourself"
            )
