"""The flags of `raysubset run`, as tests of fields read them."""

from collections.abc import Sequence

from raysubset.cli.flags import Run
from raysubset.cli.parsing import parse
from raysubset.config import Config


def parse_config(arguments: Sequence[str], *, default: Config | None = None) -> Config:
    """What the flags give."""
    return parse(Run, arguments, default or Config(), prog="raysubset run").config
