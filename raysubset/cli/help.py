"""Write --help and --help-all, the file for --config, and completions for a shell."""

import json
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import MISSING
from itertools import groupby
from typing import Any

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from raysubset.cli.flags import COMMANDS, COMMON, Flag, HelpAsked, flags_of
from raysubset.cli.screen import console_of

_WHAT = "Subset pretraining on Ray: minimize on distinct subsets in parallel, aggregate, fine-tune; count every cost."
_EXAMPLES = (
    ("raysubset run", "a small network on scikit-learn's digits, in under a minute"),
    ("raysubset run --data.name photos.parquet --model.name resnet18", "your own data"),
    ("raysubset compare --quick", "whether it pays: against conventional training"),
    ("raysubset report ~/ray_results/NAME", "the report of a run again"),
)
_CODES = "Exit codes: 0 done; 1 failed; 2 a mistake; 130 stopped: finished work is kept, and the same command resumes."
_WIDE = 70  # columns from which flags and their documentation stand side by side
_SHORT = 20  # most characters of a value's choices in a one-line help
_WIDEST = 110  # most columns of text


def print_help(request: HelpAsked) -> None:
    """Print the requested help to stdout."""
    console = console_of(sys.stdout)
    console.width = min(console.width, _WIDEST)
    if request.kind is None:
        _overview(console)
        return
    title, _, more = (request.kind.__doc__ or "").partition("\n\n")
    positionals = "".join(f" {flag.value}" for flag in request.flags if flag.positional)
    console.print(f"usage: {request.prog}{positionals} [FLAGS]\n", style="bold")
    for paragraph in (request.description or title, more):
        if paragraph:
            console.print(" ".join(paragraph.split()) + "\n")
    of_config = [flag for flag in request.flags if flag.of_config]
    own_flags = [flag for flag in request.flags if not flag.of_config]
    if own_flags:
        console.print(_table(console, own_flags, whole=request.whole or not of_config, is_cut=False))
    if not of_config:
        return
    if request.whole:
        for room, flags in groupby(of_config, lambda flag: flag.name.rpartition(".")[0]):
            console.print(f"\n{room or 'the run'}", style="bold")
            console.print(_table(console, list(flags), whole=True))
        return
    console.print("\nSettings most often changed", style="bold")
    console.print(_table(console, sorted(of_config, key=_rank)[: len(COMMON)], whole=False))
    console.print(
        f"\nAll {len(of_config)} settings with their full documentation: {request.prog} --help-all\n"
        "As a file for --config: raysubset config"
    )


def _overview(console: Any) -> None:
    console.print("usage: raysubset COMMAND [FLAGS]\n", style="bold")
    console.print(f"{_WHAT}\n")
    commands = ((name, " ".join((kind.__doc__ or "").partition("\n")[0].split())) for name, kind in COMMANDS.items())
    for title, rows in (("Commands", commands), ("Examples", _EXAMPLES)):
        console.print(title, style="bold")
        table = Table.grid(padding=(0, 2, 0, 0))
        for name, text in rows:
            table.add_row(Text(name, "cyan"), text)
        console.print(Padding(table, (0, 0, 1, 2)))
    console.print("raysubset COMMAND --help: its flags; --help-all: every setting; raysubset --version")
    console.print(_CODES)


def _rank(flag: Flag) -> int:
    """Return the flag's rank among the settings most often changed; other flags come after them."""
    return COMMON.index(flag.key) if flag.key in COMMON else len(COMMON)


def _table(console: Any, flags: Sequence[Flag], *, whole: bool, is_cut: bool = True) -> Padding:
    """Show each flag with the first sentence of its documentation, cut to a line, if the console is wide, or all of it
    below."""
    is_wide = console.width >= _WIDE and not whole
    table = Table.grid(padding=(0, 2, 0, 0))
    names = [_name(flag, whole=whole) for flag in flags]
    widest = max(map(len, names))
    for flag, name in zip(flags, names, strict=True):
        default = (f"[{_default(flag)}] " if _default(flag) else "", "dim")
        if is_wide:
            words = Text.assemble(default, _first_sentence(flag.doc))
            if is_cut:
                words.truncate(console.width - widest - 4, overflow="ellipsis")
            table.add_row(name, words)
            continue
        table.add_row(name)
        doc = flag.doc if whole else _first_sentence(flag.doc)
        table.add_row(Padding(Text.assemble(doc, " ", default), (0, 0, 0, 4)))
    return Padding(table, (0, 0, 0, 2))


def _name(flag: Flag, *, whole: bool) -> Text:
    value = flag.value if whole or len(flag.value) <= _SHORT else "WORD"
    return Text.assemble((_written(flag), "cyan"), " ", (value, "magenta"))


def _written(flag: Flag) -> str:
    """Return the flag as a user writes it; for a switch of the config the form that changes its default."""
    if flag.positional:
        return ""
    return flag.negated if flag.kind is bool and flag.of_config and flag.default else f"--{flag.name}"


def _default(flag: Flag) -> str:
    if flag.positional or flag.default in (MISSING, None, (), False):
        return ""
    if flag.default is True:
        return "on"
    return " ".join(map(str, flag.default)) if flag.is_many else str(flag.default)


def _first_sentence(doc: str) -> str:
    for mark in (". ", "; "):
        doc = doc.partition(mark)[0]
    return doc.rstrip(".")


# A file for --config


def settings_text(config: Any) -> str:
    """Return YAML for --config: all settings with their documentation; those at their defaults are commented out."""
    flags = [flag for flag in flags_of(COMMANDS["run"], config) if flag.of_config]
    defaults = {flag.key: flag.default for flag in flags_of(COMMANDS["run"]) if flag.of_config}
    ranked = sorted(flags, key=_rank)
    lines = ["# Settings of raysubset, for --config: remove the # of each setting that you change."]
    for title, group in (("Most often changed", ranked[: len(COMMON)]), ("All others", ranked[len(COMMON) :])):
        lines += ["", f"# ==== {title}"]
        for flag in group:
            is_default = flag.default == defaults[flag.key]
            choices = f" ({', '.join(flag.words)})" if flag.words else ""
            lines += ["", *textwrap.wrap(flag.doc + choices, 98, initial_indent="# ", subsequent_indent="# ")]
            value = json.dumps(flag.default, ensure_ascii=False)
            lines.append(f"{'#' if is_default else ''}{flag.key}: {value}")
    return "\n".join(lines) + "\n"


# Completion


def completions(words: Sequence[str]) -> Iterator[str]:
    """Yield completions of a command line's last word, for `complete -C 'raysubset --complete'` in bash.

    Args:
        words: the words of the line, from `raysubset` on.
    """
    *earlier, current = words[1:] or [""]
    if not earlier:
        candidates: Sequence[str] = (*COMMANDS, "--help", "--version")
    elif earlier[0] not in COMMANDS:
        return
    else:
        flags = {f"--{flag.name}": flag for flag in flags_of(COMMANDS[earlier[0]]) if not flag.positional}
        flag = flags.get(earlier[-1])
        if flag is not None and flag.kind is not bool and not current.startswith("--"):
            candidates = flag.words
        elif current.startswith("-"):
            candidates = (*map(_written, flags.values()), "--help", "--help-all")
        else:
            return
    yield from (word for word in candidates if word.startswith(current))
