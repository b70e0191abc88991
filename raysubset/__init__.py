"""Subset pretraining on Ray (arXiv:2410.16523).

Actors each minimize the loss on a distinct subset of the training data, without talking to one another; an aggregator
averages the minima or selects among them; a Ray Train job fine-tunes the result on the full set; and the report counts
every cost, so that it can be compared with conventional training.

    from raysubset import Config, run
    print(run(Config()).test)
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

_HOMES = {
    "Config": "config",
    "run": "pipeline",
    "RunReport": "pipeline",
    "sweep": "sweeping",
    "SweepReport": "sweeping",
    "compare": "comparison",
    "ComparisonReport": "comparison",
    "load_model": "trained_model",
}


def __getattr__(name: str) -> Any:
    """Import on first use: an actor that needs the loop must not wait for the rest."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
