"""Parse the flags of a command by argparse, and show its help. Each mistake is a one-line error."""

import argparse
import functools
import os
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from itertools import groupby
from typing import Any, NoReturn

from raysubset.cli.flags import COMMANDS, COMMON, Command, Flag, OfConfig, flags_of
from raysubset.config import Config, nearest, read_config

HELP = ("-h", "--help", "--help-all")
_WHAT = "Subset pretraining on Ray: minimize on distinct subsets in parallel, aggregate, fine-tune; count every cost."
_MORE = """Examples:
  raysubset run: a small network on scikit-learn's digits, in under a minute
  raysubset run --data.name photos.parquet --model.name resnet18: your own data
  raysubset compare --quick: whether it pays, against conventional training
  raysubset report ~/ray_results/NAME: the report of a run again

raysubset COMMAND --help: its flags; --help-all: every setting; raysubset --version
Exit codes: 0 done; 1 failed; 2 a mistake; 130 stopped: finished work is kept, and the same command resumes."""
_SHORT = {"--task": "--task.name", "--start-from": "--model.weights", "--profile": "--actors.profile"}
_WIDEST = 110  # most columns of help
_FLAG = 38  # most of them for a flag and its value beside their documentation
_CHOICES = 20  # most characters of a value's choices in a one-line help


def parse_command(arguments: Sequence[str]) -> Command:
    """Parse a command line; raise what parse() does."""
    verb = arguments[0]
    if verb not in COMMANDS:
        raise ValueError(f"there is no command {verb}{nearest(verb, COMMANDS) or '; see raysubset --help'}")
    return parse(COMMANDS[verb], arguments[1:], Config(), prog=f"raysubset {verb}")


def parse(
    kind: Any, arguments: Sequence[str], default: Config, *, prog: str, description: str | None = None, **defaults: Any
) -> Any:
    """Parse the flags of a command of this class, which change a default config; `defaults` are of its own fields.

    Args:
        description: the first lines of help, in place of the command's own.

    Raises:
        ValueError: for a mistake in the flags, in one line.
        SystemExit: after help was printed.
    """
    words, flags = [_with_dashes(word) for word in arguments], flags_of(kind, default, **defaults)
    parser = _command_parser(kind, flags, words, prog, description)
    values, unknown = parser.parse_known_intermixed_args(words)
    if unknown:
        raise ValueError(_unknown(unknown[0], ["", *words][words.index(unknown[0])], kind, prog))
    overrides: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in vars(values).items()
    }
    own_keys = [flag.key for flag in flags if not flag.of_config and flag.key in overrides]
    options = defaults | {key: overrides.pop(key) for key in own_keys}
    if not issubclass(kind, OfConfig):
        return kind(**options)
    config = default
    if file := options.get("config_file"):
        config = read_config(file, default)
        if not options.get("trust_code"):
            _refuse_code(file, config, default, overrides)
    return kind(config.with_overrides(overrides), **options)


def _with_dashes(word: str) -> str:
    """Return --minimize.batch-size for --minimize.batch_size, and the whole name for a short one."""
    name, equals, value = word.partition("=")
    if not name.startswith("--"):
        return word
    name = name.replace("_", "-")
    return f"{_SHORT.get(name, name)}{equals}{value}"


class _Parser(argparse.ArgumentParser):
    """Holds only what is given, and raises its errors."""

    def __init__(self, prog: str, usage: str, texts: Sequence[str], more: str) -> None:
        usage = textwrap.fill(usage, _width() - len("usage: "))
        text = "\n\n".join(" ".join(text.split()) for text in texts if text)
        super().__init__(prog, usage, text, more, formatter_class=_Formatter, add_help=False, allow_abbrev=False)
        self.argument_default = argparse.SUPPRESS
        self.add_argument(*HELP, action="help", help=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


class _Formatter(argparse.HelpFormatter):
    """Fits the terminal, and keeps the line breaks of texts."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=_FLAG, width=_width())

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(textwrap.fill(line, width) for line in text.splitlines())


def _width() -> int:
    return min(shutil.get_terminal_size().columns, _WIDEST)


def overview() -> str:
    """Return the help on all commands."""
    parser = _Parser("raysubset", "raysubset COMMAND [FLAGS]", [_WHAT], _MORE)
    commands = parser.add_argument_group("Commands")
    for name, kind in COMMANDS.items():
        commands.add_argument(name, help=" ".join((kind.__doc__ or "").partition("\n")[0].split()))
    return parser.format_help()


def _command_parser(
    kind: type, flags: Sequence[Flag], words: Sequence[str], prog: str, description: str | None
) -> _Parser:
    """Return a command's parser. Its help shows the settings most often changed, or every one for --help-all."""
    num, is_asked, more = sum(flag.of_config for flag in flags), not {*HELP}.isdisjoint(words), ""
    is_whole = not (num and is_asked) or "--help-all" in words
    if not is_whole:
        common = {flag.key: flag for flag in flags if flag.of_config}
        flags = [*(flag for flag in flags if not flag.of_config), *map(common.__getitem__, COMMON)]
        more = f"All {num} settings with their full documentation: {prog} --help-all\n"
        more += "As a file for --config: raysubset config"
    usage = " ".join([prog, *(flag.positional for flag in flags if flag.positional), "[FLAGS]"])
    title, _, details = (kind.__doc__ or "").partition("\n\n")
    parser = _Parser(prog, usage, [description or title, details], more)
    for title, group in groupby(flags, lambda flag: _title(flag, is_whole=is_whole)):
        shown = parser.add_argument_group(title)
        for flag in group:
            _add(shown, flag, _help(flag, is_whole=is_whole) if is_asked else "", is_whole=is_whole)
    return parser


def _add(parser: Any, flag: Flag, help: str, *, is_whole: bool) -> None:
    """Add a flag or a positional argument to argparse's parser, or to a group of it."""
    if flag.kind is bool:
        forms = {f"--{flag.name}": "store_true"} | ({flag.negated: "store_false"} if flag.of_config else {})
        for form, action in forms.items():
            shown = help if form == flag.written else argparse.SUPPRESS
            parser.add_argument(form, dest=flag.key, action=action, help=shown)
        return
    options: dict[str, Any] = {} if flag.positional else {"dest": flag.key}
    if not flag.of_config and flag.words:
        options["choices"] = flag.words
    value = flag.value if is_whole or len(flag.value) <= _CHOICES else "WORD"
    options |= {"type": functools.partial(_value, flag), "nargs": flag.nargs, "metavar": value, "help": help}
    parser.add_argument(flag.key if flag.positional else f"--{flag.name}", **options)


def _title(flag: Flag, *, is_whole: bool) -> str | None:
    """Return the title over a flag in help; None for the command's own."""
    if not flag.of_config:
        return None
    return (flag.name.rpartition(".")[0] or "the run") if is_whole else "Settings most often changed"


def _help(flag: Flag, *, is_whole: bool) -> str:
    """Return a flag's default and documentation, or its first sentence, for a setting cut to one line."""
    default = "" if flag.default in (MISSING, None, (), False) or flag.positional else flag.default
    shown = "on" if default is True else " ".join(map(str, default)) if flag.nargs else str(default)
    text = flag.doc if is_whole else flag.doc.partition(". ")[0].partition("; ")[0].rstrip(".")
    text = f"[{shown}] {text}" if shown else text
    if flag.of_config and not is_whole:
        text = textwrap.shorten(text, max(_width() - _FLAG, _FLAG), placeholder="…")
    return text.replace("%", "%%")


def _value(flag: Flag, word: str) -> Any:
    """Parse a word as the flag's value; the config's fields check their own ranges and choices."""
    if flag.has_none and word in ("None", "null"):
        return None
    try:
        return word if word in flag.words else flag.kind(word)
    except ValueError:
        number = " or ".join(("a whole number" if flag.kind is int else "a number", *flag.words))
        raise argparse.ArgumentTypeError(f"give {number}, not {word!r}") from None


_EVERYDAY = {  # a field's name, or its last part, and its names in other programs
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
_FIRST = ("minimize.", "fine-tuning.", "actors.")  # their fields are suggested before others of the same last name
_MOST_SUGGESTIONS = 3


@functools.cache
def _names_of(kind: type) -> list[str]:
    return [flag.name for flag in flags_of(kind) if not flag.positional]


def _unknown(word: str, before: str, kind: Any, prog: str) -> str:
    """Return the error for a word that a command does not take, with the flag meant or the command that takes it."""
    see = f"see {prog} --help"
    if not word.startswith("-"):
        return f"unexpected argument {word!r}{f' after {before}' if before.startswith('--') else ''}; {see}"
    flag = word.partition("=")[0]
    if flag in ("--resume", "--continue"):
        return f"there is no flag {flag}, and no need of one: the same command under the same --name resumes; {see}"
    name, names = flag.lstrip("-").lower(), _names_of(kind)
    meant = next((field for field, others in _EVERYDAY.items() if name in others.split()), name)
    matches = [meant] if meant in names else [known for known in names if known.endswith(f".{meant}")]
    if matches:
        matches.sort(key=lambda match: (match.count("."), not match.startswith(_FIRST)))
        suggestions = " or ".join(f"--{match}" for match in matches[:_MOST_SUGGESTIONS])
        return f"there is no flag {flag}; did you mean {suggestions}?"
    if near := nearest(flag, [f"--{known}" for known in names]):
        return f"there is no flag {flag}{near}"
    if commands := [command for command, other in COMMANDS.items() if name in _names_of(other)]:
        return f"{flag} is a flag of {' and '.join(commands)}, not of {prog}; {see}"
    return f"there is no flag {flag}; {see}"


def _refuse_code(file: str, config: Config, default: Config, overrides: Mapping[str, Any]) -> None:
    """Refuse a config file, which may be a stranger's, if it names a function that no flag names too."""
    default_functions = default.functions()
    for key, name in config.functions().items():
        if name != default_functions.get(key) and key not in overrides:
            raise ValueError(
                f"--config {file} names code: {key} = {name} would be imported from {os.getcwd()} or an installed "
                "package, and called. If you trust whoever wrote the file, add --trust-code, or give "
                f"--{key.replace('_', '-')} yourself"
            )
