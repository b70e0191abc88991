"""Subset pretraining on Ray (arXiv:2410.16523).

Actors each minimize the loss on a distinct subset of the training data, without talking to one another. An aggregator
averages the minima or selects among them. A Ray Train job fine-tunes the result on the full set. The report counts
every cost, so that it can be compared with conventional training.

    from raysubset import Config, run
    report = run(Config(seed=3))  # shows its progress, as the command does
    report.test, report.passes  # and report.show(), report.load_model()

Settings are fields of Config: see help(raysubset.config.MinimizeConfig). Events are in raysubset.events.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raysubset.comparison import ComparisonReport as ComparisonReport
    from raysubset.comparison import compare as compare
    from raysubset.config import Config as Config
    from raysubset.pipeline import RunReport as RunReport
    from raysubset.pipeline import run as run
    from raysubset.sweeping import SweepReport as SweepReport
    from raysubset.sweeping import sweep as sweep
    from raysubset.trained_model import load_model as load_model

__version__ = "0.1.0"
__all__ = ["Config", "run", "RunReport", "sweep", "SweepReport", "compare", "ComparisonReport", "load_model"]

# The folders of the functions that show their progress, as commands do
VERBS = {"run": "pipeline", "sweep": "sweeping", "compare": "comparison"}
_HOMES = VERBS | {"RunReport": "pipeline", "SweepReport": "sweeping", "ComparisonReport": "comparison"}
_HOMES |= {"Config": "config", "load_model": "trained_model"}


def __getattr__(name: str) -> Any:
    """Import the name on first use: an actor that needs only the training loop does not wait for the rest."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name in VERBS:
        value = importlib.import_module(f"{__name__}.cli.live").shown(value)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
