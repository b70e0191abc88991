"""What came of a sweep: its trials, their settings over seeds, what all cost, and the recommendation."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raysubset.quality import Quality, quality_of
from raysubset.run_report import Shown

Record = dict[str, Any]


# What a run's loss and quality are of: the minima on their own subsets; the aggregate on the training set and on the
# validation split, before fine-tuning; the final model on validation and test split
WHERE = ("own", "full_set", "before", "validation", "test")


def measures(quality: Quality) -> tuple[str, ...]:
    """The names of what a setting has means of, and errors."""
    measured = [f"{where}_{name}" for where in WHERE for name in ("loss", quality.name)]
    return tuple(dict.fromkeys((*measured, "passes", "critical_path_passes")))


@dataclass(frozen=True, repr=False)
class SweepReport(Shown):
    """All numbers of a sweep; to_dict() is sweep.json."""

    name: str
    uri: str  # of the sweep's directory
    trials: tuple[Record, ...]  # name, overrides, seed, state ("done", "pruned", "failed"), error, and their measures
    settings: tuple[Record, ...]  # one for all seeds of the same overrides: mean and standard_error of each measure
    recommended: Record | None  # the setting
    recommendation: str  # in words
    passes: float  # of all trials, in total; a trunk that trials share is counted once
    record: Record  # everything, JSON-able

    def __repr__(self) -> str:
        num = sum(trial["state"] == "done" for trial in self.trials)
        return f"<SweepReport {self.name}: {num} of {len(self.trials)} trials done; {self.recommendation} {self.uri}>"

    def to_dict(self) -> Record:
        """sweep.json."""
        return self.record

    @classmethod
    def from_dict(cls, record: Record) -> "SweepReport":
        """The inverse of to_dict()."""
        settings, position = tuple(record["settings"]), record["recommended"]
        return cls(
            name=record["name"],
            uri=record["uri"],
            trials=tuple(record["trials"]),
            settings=settings,
            recommended=None if position is None else settings[position],
            recommendation=record["recommendation"],
            passes=record["cost"]["passes"],
            record=record,
        )


def trial_measures(report: Mapping[str, Any]) -> Record:
    """What a sweep keeps of a finished run's report. The test result is shown, and read by no choice."""
    quality, rounds = quality_of(report), report["stages"].get("rounds")
    measured: dict[str, Any] = {"validation": report["validation"], "test": report["test"]}
    if rounds:
        minima, aggregate = rounds[-1]["minima"], rounds[-1]["aggregation"]
        size = statistics.mean(minimum["num_examples"] for minimum in minima)
        ratio = statistics.mean(minimum["overdetermination_ratio"] for minimum in minima)
        own = {name: _mean([minimum["training"][name] for minimum in minima]) for name in ("loss", quality.name)}
        measured |= {"own": own, "full_set": aggregate["training"], "before": aggregate["validation"]}
    else:
        minima, size, ratio = (), report["data"]["num_train"], report["overdetermination_ratio"]["full_set"]
        measured["own"] = report["stages"]["conventional"]["training"]
    return {
        "num_subsets": len(minima),
        "subset_size": size,
        "overdetermination_ratio": ratio,
        **{
            f"{where}_{name}": (measured.get(where) or {}).get(name)
            for where in WHERE
            for name in ("loss", quality.name)
        },
        "passes": report["cost"]["passes"],
        "critical_path_passes": report["cost"]["critical_path_passes"],
    }


def _mean(values: Sequence[float | None]) -> float | None:
    finite = [value for value in values if value is not None]  # JSON has null where a loss diverged
    return statistics.mean(finite) if finite and len(finite) == len(values) else None


def settings_of(trials: Sequence[Record], quality: Quality) -> list[Record]:
    """One record a setting, in the order of the trials: means over the seeds that finished, with standard errors."""
    groups: dict[str, list[Record]] = {}
    for trial in trials:
        groups.setdefault(json.dumps(trial["overrides"], sort_keys=True), []).append(trial)
    return [_setting(group, quality) for group in groups.values()]


def _setting(group: Sequence[Record], quality: Quality) -> Record:
    done = [trial for trial in group if trial["state"] == "done"]
    setting: Record = {
        "overrides": group[0]["overrides"],
        "num_seeds": len(done),
        **{f"num_{state}": sum(trial["state"] == state for trial in group) for state in ("pruned", "failed")},
    }
    for key in ("num_subsets", "subset_size", "overdetermination_ratio"):
        setting[key] = statistics.mean(trial[key] for trial in done) if done else None
    for key in measures(quality):
        values = [trial[key] for trial in done]
        setting[key] = None if not values or None in values else _spread(values)  # JSON has null where a loss diverged
    return setting


def _spread(values: Sequence[float]) -> Record:
    """Mean and its standard error over seeds; of one seed there is none."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "standard_error": error}


def recommend(settings: Sequence[Record]) -> int | None:
    """The position of the smallest subset within one standard error of the best validation loss (Breiman et al. 1984).

    The error is the best setting's own, over its seeds; with one seed there is none and the best is recommended. Among
    equal sizes the least loss is. A setting with a pruned seed is left out: those that remain are its better ones.
    """
    able = [n for n, one in enumerate(settings) if one["validation_loss"] is not None and not one["num_pruned"]]
    if not able:
        return None
    best = settings[_best(settings, able)]["validation_loss"]
    limit = best["mean"] + (best["standard_error"] or 0.0)
    within = [n for n in able if settings[n]["validation_loss"]["mean"] <= limit]
    return min(within, key=lambda n: (settings[n]["subset_size"], settings[n]["validation_loss"]["mean"]))


def _best(settings: Sequence[Record], able: Sequence[int]) -> int:
    return min(able, key=lambda n: settings[n]["validation_loss"]["mean"])


def recommendation(settings: Sequence[Record]) -> str:
    """recommend() in words, with what it rests on."""
    position = recommend(settings)
    if position is None:
        return "No recommendation: no setting has finished with all its seeds and a finite validation loss."
    able = [n for n, one in enumerate(settings) if one["validation_loss"] is not None and not one["num_pruned"]]
    chosen, best = settings[position], settings[_best(settings, able)]
    error = best["validation_loss"]["standard_error"]
    total, critical = chosen["passes"]["mean"], chosen["critical_path_passes"]["mean"]
    cost = f"It costs {total:.2f} passes in total, {critical:.2f} of them on the critical path"
    if error is None:
        return (
            f"The least validation loss: {_described(chosen)}. {cost}. One seed tells nothing of the noise, so smaller "
            "subsets may do as well: sweep over several seeds."
        )
    if chosen is best:
        return (
            f"The best is also the smallest subset within its standard error: {_described(chosen)}. {cost}. Smaller "
            f"ones, if any, have more than {best['validation_loss']['mean'] + error:.4f}."
        )
    return (
        f"The smallest subset within one standard error of the best: {_described(chosen)}. {cost}; the best, "
        f"{_described(best)}, {best['passes']['mean']:.2f} and {best['critical_path_passes']['mean']:.2f}."
    )


def _described(setting: Record) -> str:
    loss, error = setting["validation_loss"]["mean"], setting["validation_loss"]["standard_error"]
    spread = "" if error is None else f" ± {error:.4f}"
    others = "".join(f", {key} = {value}" for key, value in setting["overrides"].items() if key != "subsets.size")
    seeds = f"{setting['num_seeds']} seed{'s' if setting['num_seeds'] > 1 else ''}"
    return (
        f"{setting['subset_size']:g} examples (Q = {setting['overdetermination_ratio']:.3g}{others}) with validation "
        f"loss {loss:.4f}{spread} over {seeds}"
    )
