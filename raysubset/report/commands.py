"""Write the command lines that a report ends with: their flags are the settings that differ from the defaults."""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from raysubset.config import OF_SUBSET_PRETRAINING, Config, flatten, of_now
from raysubset.costs import Cost, averaging_forward, epochs_of_cost
from raysubset.quality import ACCURACY, Quality
from raysubset.report.figures import Record

# A conventional run of equal cost leaves out what shapes subset pretraining alone, ends it early or costs more
_NOT_OF_BASELINE = (
    *OF_SUBSET_PRETRAINING,
    *("minimize.tolerance", "minimize.target_loss", "minimize.patience", "minimize.validate_every"),
)


def command(config: Mapping[str, Any], verb: str = "run", *options: str) -> str:
    """Return `raysubset run`, or another verb with its options, with the flags that give this Config.to_dict().

    Fields that the config leaves out have their defaults. The kind, of a sweep or comparison, is no field.
    """
    defaults = flatten(Config().to_dict())
    words = ["raysubset", verb, *options]
    for key, value in flatten(of_now(config)).items():
        is_default_place = key == "storage_path" and value == os.path.expanduser(defaults[key])  # as runs record it
        if key != "kind" and value != defaults.get(key) and not is_default_place:
            words += _flag(key, value)
    return shlex.join(words)


def _flag(key: str, value: Any) -> list[str]:
    group, dot, leaf = key.replace("_", "-").rpartition(".")
    if isinstance(value, bool):
        return [f"--{group}{dot}{'' if value else 'no-'}{leaf}"]
    return [f"--{group}{dot}{leaf}", exactly(value)]


def exactly(value: Any) -> str:
    """Return the value as a flag takes it: a number that the command reads back as the same one."""
    short = isinstance(value, float) and float(f"{value:g}") == value
    return f"{value:g}" if short else str(value)


def above_command(verb: str, seeds: Sequence[int]) -> str:
    """Return the line above a command with --seeds, which names only seeds that follow one another."""
    ordered = sorted(seeds)
    if ordered == list(range(ordered[0], ordered[0] + len(ordered))):
        return "The command:"
    return f"The command, but for seeds that it cannot name; in Python: {verb}(…, seeds={ordered})."


def conventional_beside(record: Record, passes: float, suffix: str) -> str:
    """Return the command of a conventional run by one worker that costs so many passes, with its evaluation."""
    data, config, model = record["data"], record["config"], record["model"]
    baseline = _without(config, *_NOT_OF_BASELINE) | {"method": "conventional"}
    num_train, has_batch_norm = data["num_train"], model.get("has_batch_norm", False)  # not of earlier versions
    try:
        recipe = Config().with_overrides(baseline).stage("conventional")
    except ValueError:  # this version cannot read the settings
        recipe = None

    def evaluated(epochs: float) -> float:
        num_forward = num_train + data["num_validation"] + data["num_test"]
        if recipe:
            num_forward += averaging_forward(replace(recipe, epochs=epochs), num_train, has_batch_norm=has_batch_norm)
        return Cost(num_forward=num_forward).passes(num_train, model["forward_share"])

    epochs = epochs_of_cost(passes, evaluated, least=0.01)
    changes = {
        "name": _renamed(config["name"], suffix),
        "conventional.epochs": float(f"{epochs:.4g}"),
        "conventional.num_workers": 1,
    }
    return command(baseline | changes)


def subset_pretraining_beside(record: Record) -> str:
    """Return the command of subset pretraining with the config of a conventional run."""
    config = record["config"]
    changes = {"name": _renamed(config["name"], "subsets"), "method": "subset_pretraining"}
    return command(_without(config, "conventional.") | changes)


def comparison_beside(config: Record, *options: str, quality: Quality = ACCURACY) -> str:
    """Return the command of a comparison with the data, network and recipe of a run of this config.

    It leaves out what a comparison refuses. MARGIN stands for a margin that only the user knows.
    """
    name = _renamed(config["name"], "comparison")
    margin = ("--margin", "MARGIN") if quality.needs_margin else ()
    shared = _without(config, "conventional.", "method", "actors.quorum", "subsets.shares")
    return command(shared | {"name": name}, "compare", *options, *margin)


def margin_in_words(quality: Quality) -> str:
    """Return what MARGIN in comparison_beside() stands for, or "" if the command has none."""
    return f", MARGIN: how much worse in {quality.label} still counts as good" if quality.needs_margin else ""


def _without(config: Record, *prefixes: str) -> dict[str, Any]:
    """Return a config's values by their dotted names, without names that have one of the prefixes."""
    return {key: value for key, value in flatten(of_now(config)).items() if not key.startswith(prefixes)}


def _renamed(name: str | None, suffix: str) -> str | None:
    return name and f"{name}-{suffix}"
