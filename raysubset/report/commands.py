"""The command lines a report ends with: flags are what differs from the defaults."""

import os
import shlex
from collections.abc import Mapping
from typing import Any

from raysubset.config import Config, flatten, of_now
from raysubset.costs import Cost
from raysubset.report.figures import Record

# What a conventional run of a given length does not depend on
_OF_SUBSET_PRETRAINING = (
    "subsets.",
    "trunk.",
    "rounds.",
    "aggregation.",
    "fine_tuning.",
    "minimize.epochs",
    "minimize.tolerance",
    "minimize.target_loss",
    "actors.quorum",
)


def command(config: Mapping[str, Any], verb: str = "run", *options: str) -> str:
    """`raysubset run`, or another verb with its own options, and the flags that give this config, Config.to_dict()'s.

    Fields left out have their defaults.
    """
    defaults = flatten(Config().to_dict())
    words = ["raysubset", verb, *options]
    for key, value in flatten(of_now(config)).items():
        is_usual_place = key == "storage_path" and value == os.path.expanduser(defaults[key])  # as runs record it
        if value != defaults.get(key) and not is_usual_place:
            words += _flag(key, value)
    return shlex.join(words)


def _flag(key: str, value: Any) -> list[str]:
    group, dot, leaf = key.replace("_", "-").rpartition(".")
    if isinstance(value, bool):
        return [f"--{group}{dot}{'' if value else 'no-'}{leaf}"]
    short = isinstance(value, float) and float(f"{value:g}") == value
    return [f"--{group}{dot}{leaf}", f"{value:g}" if short else str(value)]


def conventional_beside(record: Record, passes: float, suffix: str) -> str:
    """The conventional run by one worker that costs so many passes, its own evaluation counted too."""
    data, config = record["data"], record["config"]
    evaluation = Cost(num_forward=data["num_train"] + data["num_validation"] + data["num_test"])
    epochs = max(0.01, passes - evaluation.passes(data["num_train"], record["model"]["forward_share"]))
    changes = {
        "name": _renamed(config["name"], suffix),
        "method": "conventional",
        "conventional.epochs": float(f"{epochs:.4g}"),
        "conventional.num_workers": 1,
    }
    return command(_without(config, *_OF_SUBSET_PRETRAINING) | changes)


def subset_pretraining_beside(record: Record) -> str:
    """Subset pretraining by the config of a conventional run."""
    config = record["config"]
    changes = {"name": _renamed(config["name"], "subsets"), "method": "subset_pretraining"}
    return command(_without(config, "conventional.") | changes)


def comparison_beside(config: Record, *options: str) -> str:
    """A comparison on the data and network of a run of this config, with its recipe."""
    name = _renamed(config["name"], "comparison")
    return command(_without(config, "conventional.", "method") | {"name": name}, "compare", *options)


def _without(config: Record, *beginnings: str) -> dict[str, Any]:
    """A config's values by their dotted names, without those whose names begin so."""
    return {key: value for key, value in flatten(of_now(config)).items() if not key.startswith(beginnings)}


def _renamed(name: str | None, suffix: str) -> str | None:
    return name and f"{name}-{suffix}"
