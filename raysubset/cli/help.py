"""Write the file for --config, and completions for a shell."""

import json
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from raysubset.cli.flags import COMMANDS, COMMON, flags_of


def settings_text(config: Any) -> str:
    """Return YAML for --config: all settings with their documentation; those at their defaults are commented out."""
    flags = [flag for flag in flags_of(COMMANDS["run"], config) if flag.of_config]
    defaults = {flag.key: flag.default for flag in flags_of(COMMANDS["run"]) if flag.of_config}
    common, others = ([flag for flag in flags if (flag.key in COMMON) is is_common] for is_common in (True, False))
    common.sort(key=lambda flag: COMMON.index(flag.key))
    lines = ["# Settings of raysubset, for --config: remove the # of each setting that you change."]
    for title, group in (("Most often changed", common), ("All others", others)):
        lines += ["", f"# ==== {title}"]
        for flag in group:
            is_default = flag.default == defaults[flag.key]
            choices = f" ({', '.join(flag.words)})" if flag.words else ""
            lines += ["", *textwrap.wrap(flag.doc + choices, 98, initial_indent="# ", subsequent_indent="# ")]
            value = json.dumps(flag.default, ensure_ascii=False)
            lines.append(f"{'#' if is_default else ''}{flag.key}: {value}")
    return "\n".join(lines) + "\n"


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
            candidates = (*(flag.written for flag in flags.values()), "--help", "--help-all")
        else:
            return
    yield from (word for word in candidates if word.startswith(current))
