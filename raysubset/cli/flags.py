"""Flags in config's words: what each command takes, and how it is read. Mistakes are told in one line."""

import argparse
import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from io import StringIO
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from raysubset.config import Config, flatten, nearest

_HELP = "Subset pretraining on Ray: minimize on distinct subsets in parallel, aggregate, fine-tune; count every cost."


@dataclasses.dataclass(frozen=True)
class _OfConfig:
    config: Annotated[Config, tyro.conf.arg(name="")]
    config_file: Annotated[str | None, tyro.conf.arg(name="config", metavar="FILE")] = None
    """JSON to take defaults from: a run's config.json, or any part of one; flags override it. A function that it names
    is called only with --trust-code, or where a flag names it too."""


@dataclasses.dataclass(frozen=True)
class _Resumed(_OfConfig):
    fresh: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Delete what was left behind under this name, and start over."""
    accept_changed_code: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Resume though the code of a function that the config names has changed: what is done stays as it is."""


@dataclasses.dataclass(frozen=True)
class Run(_Resumed):
    """Run subset pretraining, or a conventional run, and print its report; goes on with an unfinished run of that name.

    Exit codes: 0 done; 1 failed; 2 a mistake in flags, config, data or request; 130 stopped by Ctrl-C or SIGTERM, with
    what was done kept: the same command resumes.
    """


@dataclasses.dataclass(frozen=True)
class Report:
    """Print the report of a finished run, sweep or comparison again; of an unfinished one, how far it is (exit code 2).

    Several runs are laid side by side.
    """

    directories: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DIRECTORY …")]
    """The run directory, or several: paths or URIs."""
    format: Literal["text", "json", "html"] = "text"
    """Tables, everything as JSON, or a page for the browser, whose path is printed."""
    to: str | None = None
    """Where the page of several runs goes; by default report.html in the working directory. That of one goes to
    report/report.html in its directory."""


@dataclasses.dataclass(frozen=True)
class Doctor(_OfConfig):
    """Check data, model, storage and cluster before a run: what there is, what this config asks for, memory and time.

    Exit code 0 when a run can start, 1 when something is wrong. Takes the flags of `run`.
    """


@dataclasses.dataclass(frozen=True)
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
    prune: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Stop trials whose validation loss falls behind that of others at as many passes (ASHA)."""


@dataclasses.dataclass(frozen=True)
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
    quick: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """A first answer within two minutes on two cores: arms B D G H, two seeds, few budgets. A smoke test."""


@dataclasses.dataclass(frozen=True)
class Advise(_OfConfig):
    """Say what to expect of subset pretraining, data-parallel training and one device, with the formulas; no training.

    The speed of this machine is measured for a few seconds. Takes the flags of `run`.
    """

    num_workers: int = 4
    """Devices to train with."""
    against: str | None = None
    """A finished comparison of the same data and model, to hold the formula against what it measured."""


@dataclasses.dataclass(frozen=True)
class Export:
    """Write the model of a finished run as one file that takes floats in [0, 1], and check what it computes."""

    directory: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIRECTORY")]
    """The run directory: a path or URI."""
    format: Literal["torch-export", "onnx"] = "torch-export"
    """model.pt2 for torch.export.load(), or model.onnx."""
    to: str | None = None
    """The file; by default model.pt2 or model.onnx in the working directory."""
    trust_code: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Import and call the package.module:function of the run's own network, where the run could keep no graph of it.
    Only for directories of people you trust."""


@dataclasses.dataclass(frozen=True)
class Predict:
    """Apply the model of a finished run: to image files, a line each; to the rows of a table; or to a text's end.

    Classes come with the most probable first, numbers in the units of the training data; text is gone on with. A file
    that cannot be read is named on stderr, and the exit code is 2; the others have their lines.
    """

    directory: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIRECTORY")]
    """The run directory: a path or URI."""
    files: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE …")]
    """Image files, tables with the training table's columns, or text files, as the model takes them."""
    format: Literal["text", "json"] = "text"
    trust_code: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Import and call the package.module:function of the run's own network, where the run could keep no graph of it.
    Only for directories of people you trust."""


Command = Run | Sweep | Compare | Advise | Report | Doctor | Export | Predict

_PLAIN = (Report, Export, Predict)  # commands that take no config

_COMMANDS: Mapping[str, type] = {kind.__name__.lower(): kind for kind in get_args(Command)}


def parse_config(arguments: Sequence[str], *, default: Config | None = None) -> Config:
    """The config that flags of `raysubset run` give.

    Raises:
        ValueError: for a mistake in them, in one line.
    """
    return parse(Run, arguments, default or Config(), prog="raysubset run").config


def parse_command(arguments: Sequence[str]) -> Command:
    verb = arguments[0] if arguments else "--help"
    if verb in _COMMANDS:
        return parse(_COMMANDS[verb], arguments[1:], Config(), prog=f"raysubset {verb}")
    if verb not in ("-h", "--help"):
        raise ValueError(f"there is no command {verb}{nearest(verb, _COMMANDS) or '; see raysubset --help'}")
    overview: Any = None
    for name, kind in _COMMANDS.items():
        default = {} if kind in _PLAIN else {"default": kind(Config())}
        one = Annotated[kind, tyro.conf.subcommand(name, **default)]
        overview = one if overview is None else overview | one
    _tyro(overview, ["--help"], prog="raysubset", description=_HELP)
    raise AssertionError("tyro leaves after printing help")


def parse(
    kind: Any, arguments: Sequence[str], default: Config, *, prog: str, description: str | None = None, **defaults: Any
) -> Any:
    """A command of its flags; defaults are of its fields beside the config.

    Raises:
        ValueError: for a mistake in them, in one line.
    """
    if kind in _PLAIN:
        return _tyro(kind, arguments, prog=prog)
    arguments = [re.sub(r"^--task(?==|$)", "--task.name", word) for word in arguments]
    rest, base = _config_file(arguments, default)
    return _tyro(kind, rest, prog=prog, default=kind(base, **defaults), description=description)


def _tyro(kind: Any, arguments: Sequence[str], *, prog: str, **options: Any) -> Any:
    """tyro.cli(), with ValueErrors of one line where it draws boxes."""
    said = StringIO()
    try:
        with redirect_stderr(said):
            command, unknown = tyro.cli(kind, args=arguments, prog=prog, return_unknown_args=True, **options)
    except SystemExit as exit:
        if exit.code in (None, 0):  # help
            raise
        raise ValueError(f"{_first_sentence(said.getvalue())}; see {prog} --help") from None
    if unknown:
        before = arguments[arguments.index(unknown[0]) - 1] if unknown[0] in arguments else ""
        raise ValueError(_unknown(unknown[0].partition("=")[0], before, kind, prog))
    return command


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


def _flags_of(kind: Any) -> list[str]:
    """A command's own flags, without dashes, and those of the config that it takes."""
    names = [field.name for field in dataclasses.fields(kind) if tyro.conf.Positional not in _marks(field)]
    if "config" in names:
        own = [name for name in names if name not in ("config", "config_file")]
        names = [*flatten(Config().to_dict()), *own, "config"]
    return [name.replace("_", "-") for name in names]


def _marks(field: dataclasses.Field[Any]) -> tuple[Any, ...]:
    return getattr(field.type, "__metadata__", ())


def _unknown(flag: str, before: str, kind: Any, prog: str) -> str:
    """What to say of a word that a command does not take: the flag that is meant, or the command that takes it."""
    see = f"see {prog} --help"
    if not flag.startswith("-") or flag == "--":
        after = f" after {before}" if before.startswith("--") else ""
        return f"unexpected argument {flag!r}{after}; {see}"
    if flag in ("--resume", "--continue"):
        return f"there is no flag {flag}, and no need of one: the same command under the same --name resumes; {see}"
    name, known = flag.lstrip("-").replace("_", "-").lower(), _flags_of(kind)
    meant = next((field for field, others in _EVERYDAY.items() if name in others.split()), name)
    found = [meant] if meant in known else [one for one in known if one.endswith(f".{meant}")]
    if found:
        found.sort(key=lambda one: (one.count("."), not one.startswith(_FIRST)))
        return f"there is no flag {flag}; did you mean {' or '.join(f'--{one}' for one in found[:_MOST_MEANT])}?"
    if near := nearest(flag, [f"--{one}" for one in known]):
        return f"there is no flag {flag}{near}"
    if takers := [verb for verb, other in _COMMANDS.items() if name in _flags_of(other)]:
        return f"{flag} is a flag of {' and '.join(takers)}, not of {prog}; {see}"
    return f"there is no flag {flag}; {see}"


_PLAINER = (  # tyro's words, and ours; which of its objects a check of ours was in is its own affair
    (r"^Error parsing (?!-)\S+: ", ""),
    (r"^Error parsing (--\S+): .*(?:int\(\)|\bINT\b).*?('.*')\]?$", r"\1 takes a whole number, not \2"),
    (r"^Error parsing (--\S+): .*(?:float|\bFLOAT\b).*?('.*')\]?$", r"\1 takes a number, not \2"),
    (r"^Error parsing (--\S+): .*?\[('.*')\]$", r"\1 cannot be \2"),
    (r"^Missing value for argument '(--\S+)'.*", r"\1 needs a value"),
    (r"^Missing from .*?: ([A-Z]+) .*", r"\1 is missing"),
)


def _first_sentence(boxed: str) -> str:
    """The message of a box that tyro drew, in ASCII or not: below the title, up to the next rule or empty line."""

    def is_rule(line: str) -> bool:
        return not line.strip("─-")

    lines = [line.strip(" │╰╯") for line in boxed.splitlines()]
    body = takewhile(lambda line: not is_rule(line), dropwhile(is_rule, lines[1:]))
    text = " ".join(body).rstrip(".")
    for pattern, plainer in _PLAINER:
        text = re.sub(pattern, plainer, text)
    return text


def _config_file(arguments: Sequence[str], default: Config) -> tuple[list[str], Config]:
    """Take --config FILE out of the arguments and read it: a run's config.json, or any part of one.

    Raises:
        ValueError: if there is no such file, it is not a config, or it names code that the user has not vouched for.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    parser.add_argument("--trust-code", action="store_true")
    try:
        found, rest = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError:
        raise ValueError("--config needs the path of a JSON file") from None
    if found.config is None:
        return rest, default
    try:
        tree = json.loads(Path(found.config).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {found.config}: {error.strerror}; give a run's config.json") from error
    except (ValueError, RecursionError) as error:  # bad JSON and bad UTF-8 both are ValueErrors
        raise ValueError(f"--config {found.config} is no JSON: {error}; give a run's config.json") from error
    if isinstance(tree, dict) and isinstance(tree.get("config"), dict):
        tree = tree["config"]  # a run's config.json or report.json
    try:
        config = Config.from_dict(_merged(default.to_dict(), tree))
    except ValueError as error:
        raise ValueError(f"--config {found.config}: {error}") from error
    if not found.trust_code:
        _refuse_code(found.config, config, default, rest)
    return rest, config


def _refuse_code(file: str, config: Config, default: Config, flags: Sequence[str]) -> None:
    """ValueError where a config from a file, which may be a stranger's, names a function that no flag names as well."""
    before = default.functions()
    for field, name in config.functions().items():
        flag = f"--{field}"
        if name != before.get(field) and not any(word.partition("=")[0] == flag for word in flags):
            raise ValueError(
                f"--config {file} names code: {field} = {name} would be imported from {os.getcwd()} or what is "
                f"installed, and called. If you trust whoever made the file, add --trust-code, or give {flag} yourself"
            )


def _merged(tree: dict[str, Any], changes: Any) -> Any:
    """The tree with nested fields replaced; whatever is no object is left for from_dict() to refuse."""
    if not isinstance(changes, dict):
        return changes
    return tree | {
        key: _merged(tree[key], value) if isinstance(tree.get(key), dict) else value for key, value in changes.items()
    }
