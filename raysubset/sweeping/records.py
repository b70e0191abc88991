"""The results of a sweep: its trials, their settings over seeds, the cost of all, and the recommendation."""

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from raysubset.errors import counted
from raysubset.pipeline.run_report import Shown
from raysubset.quality import Quality, quality_of

Record = dict[str, Any]


# The prefixes of a run's measures: of the minima on their own subsets; of the aggregate before fine-tuning, on the
# training set (full_set) and the validation split (before); of the final model on the validation and test splits
WHERE = ("own", "full_set", "before", "validation", "test")


def measures(quality: Quality) -> tuple[str, ...]:
    """Return the names of the measures of which a setting has means and standard errors."""
    names = [f"{where}_{name}" for where in WHERE for name in ("loss", quality.name)]
    return tuple(dict.fromkeys((*names, "passes", "critical_path_passes")))


class SweepReport(Shown):
    """All numbers of a sweep. to_dict() returns sweep.json."""

    def __repr__(self) -> str:
        num = sum(trial["state"] == "done" for trial in self.trials)
        return f"<SweepReport {self.name}: {num} of {len(self.trials)} trials done; {self.recommendation} {self.uri}>"

    @property
    def trials(self) -> tuple[Record, ...]:
        """For each trial name, overrides, seed, state ("done", "pruned", "failed"), error, and measures."""
        return tuple(self.record["trials"])

    @property
    def settings(self) -> tuple[Record, ...]:
        """One for all seeds of the same overrides: mean and standard_error of each measure."""
        return tuple(self.record["settings"])

    @property
    def recommended(self) -> Record | None:
        """The recommended setting."""
        position = self.record["recommended"]
        return None if position is None else self.settings[position]

    @property
    def recommendation(self) -> str:
        """The recommendation in words."""
        return self.record["recommendation"]

    @property
    def passes(self) -> float:
        """Passes of all trials, in total; a trunk that trials share is counted once."""
        return self.record["cost"]["passes"]


def trial_measures(report: Mapping[str, Any]) -> Record:
    """Return what a sweep keeps of a finished run's report. The test result is shown; no choice reads it."""
    quality, rounds = quality_of(report), report["stages"].get("rounds")
    names = ("loss", quality.name)
    metrics: dict[str, Any] = {"validation": report["validation"], "test": report["test"]}
    if rounds:
        minima, aggregate = rounds[-1]["minima"], rounds[-1]["aggregation"]
        size, ratio = (
            statistics.mean(minimum[name] for minimum in minima) for name in ("num_examples", "overdetermination_ratio")
        )
        own_means = {name: _mean([minimum["training"][name] for minimum in minima]) for name in names}
        metrics |= {"own": own_means, "full_set": aggregate["training"], "before": aggregate["validation"]}
    else:
        minima, size, ratio = (), report["data"]["num_train"], report["overdetermination_ratio"]["full_set"]
        metrics["own"] = report["stages"]["conventional"]["training"]
    return {
        "num_subsets": len(minima),
        "subset_size": size,
        "overdetermination_ratio": ratio,
        **{f"{where}_{name}": (metrics.get(where) or {}).get(name) for where in WHERE for name in names},
        **{name: report["cost"][name] for name in ("passes", "critical_path_passes")},
    }


def _mean(values: Sequence[float | None]) -> float | None:
    finite = [value for value in values if value is not None]  # JSON has null for a loss that diverged
    return statistics.mean(finite) if finite and len(finite) == len(values) else None


def settings_of(trials: Sequence[Record], quality: Quality) -> list[Record]:
    """Return a record for each setting, in the order of the trials: means over finished seeds, and standard errors."""
    groups: dict[str, list[Record]] = {}
    for trial in trials:
        groups.setdefault(json.dumps(trial["overrides"], sort_keys=True), []).append(trial)
    return [_setting(group, quality) for group in groups.values()]


def _setting(group: Sequence[Record], quality: Quality) -> Record:
    finished = [trial for trial in group if trial["state"] == "done"]
    setting: Record = {"overrides": group[0]["overrides"], "num_seeds": len(finished)}
    setting |= {f"num_{state}": sum(trial["state"] == state for trial in group) for state in ("pruned", "failed")}
    for key in ("num_subsets", "subset_size", "overdetermination_ratio"):
        setting[key] = _mean([trial[key] for trial in finished])
    for key in measures(quality):
        values = [trial[key] for trial in finished]
        mean, error = _mean(values), None
        if mean is not None and len(values) > 1:
            error = statistics.stdev(values) / math.sqrt(len(values))
        setting[key] = None if mean is None else {"mean": mean, "standard_error": error}  # None for a single seed
    return setting


def recommend(settings: Sequence[Record]) -> int | None:
    """Return the position of the smallest subset within one standard error of the best validation loss.

    The rule is that of Breiman et al. 1984. The standard error is the best setting's own, over its seeds; with one seed
    there is none, and the best is recommended. Among equal sizes the one of least loss is. A setting with a pruned seed
    is left out, as the seeds that remain are its better ones. So is one with a failed seed, if any setting is whole.
    """
    if (best := _best(settings)) is None:
        return None
    limit = _loss(best) + (best["validation_loss"]["standard_error"] or 0.0)
    within = [setting for setting in _eligible(settings) if _loss(setting) <= limit]
    return settings.index(min(within, key=lambda setting: (setting["subset_size"], _loss(setting))))


def _eligible(settings: Sequence[Record]) -> list[Record]:
    """Return the settings with a loss of which no seed failed; if there are none, all with a loss."""
    finite = [setting for setting in settings if not math.isinf(_loss(setting))]
    return [setting for setting in finite if not setting["num_failed"]] or finite


def _best(settings: Sequence[Record]) -> Record | None:
    return min(_eligible(settings), key=_loss, default=None)


def _loss(setting: Record) -> float:
    """Return the mean validation loss; ∞ if it is not finite for all seeds, or one of them was pruned."""
    loss = setting["validation_loss"]
    return math.inf if loss is None or setting["num_pruned"] else loss["mean"]


def recommendation(settings: Sequence[Record]) -> str:
    """Return recommend() in words, with the numbers that it rests on."""
    position, best = recommend(settings), _best(settings)
    if position is None or best is None:
        return "No recommendation: no setting has finished with all its seeds and a finite validation loss."
    recommended = settings[position]
    if best["validation_loss"]["standard_error"] is None:
        text = f"The least validation loss: {_described(recommended)}."
        text += " One seed shows no noise, so smaller subsets may do as well: sweep over several seeds."
    else:
        text = f"The smallest subset within one standard error of the best: {_described(recommended)}."
        text += "" if recommended is best else f" The best: {_described(best)}."
    return " ".join([text, *_of_failed_seeds(settings)])


def _of_failed_seeds(settings: Sequence[Record]) -> Iterator[str]:
    """Yield what failed seeds did to the recommendation, in a sentence."""
    failed = [setting for setting in settings if setting["num_failed"] and not math.isinf(_loss(setting))]
    if not failed:
        return
    names = "; ".join(
        f"{setting['subset_size']:g} examples{_others(setting)}, {setting['num_failed']} of "
        f"{setting['num_failed'] + setting['num_seeds']}"
        for setting in failed
    )
    if failed[0] in _eligible(settings):
        yield f"No setting finished with all its seeds, and those that failed may be the worse ones ({names})."
    else:
        yield f"Settings of which seeds failed were set aside ({names})."


def _others(setting: Record) -> str:
    """Return a setting's overrides other than its size, each after a comma."""
    return "".join(f", {key} = {value}" for key, value in setting["overrides"].items() if key != "subsets.size")


def _described(setting: Record) -> str:
    loss, error = setting["validation_loss"]["mean"], setting["validation_loss"]["standard_error"]
    spread = "" if error is None else f" ± {error:.4f}"
    total, critical = (f"{setting[name]['mean']:.2f} passes" for name in ("passes", "critical_path_passes"))
    return (
        f"{setting['subset_size']:g} examples (Q = {setting['overdetermination_ratio']:.3g}{_others(setting)}) with "
        f"validation loss {loss:.4f}{spread} over {counted(setting['num_seeds'], 'seed')}, for {total}, {critical} on "
        "the critical path"
    )
