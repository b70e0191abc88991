"""The plan of a sweep: its trials and their names, the trunks they share, and how many run at once."""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from raysubset.config import Config, MinimizeConfig, derive_seed
from raysubset.legs import Drawing, Leg
from raysubset.planning import workers_of_stages
from raysubset.run_directory import RunDirectory
from raysubset.run_directory.ledger import Ledger, Work

CONVENTIONAL = "conventional"  # the method of a sweep's baseline
_OWN = ("name", "storage_path", "seed", "method", "cluster.")  # fields of the sweep as a whole


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    name: str  # of its run directory, below the sweep's trials/
    overrides: Mapping[str, Any]  # by dotted name, without the seed
    seed: int
    config: Config

    @cached_property
    def directory(self) -> RunDirectory:
        return RunDirectory(self.config.storage_path, self.name)

    def works(self) -> list[Work]:
        """Return the entries of its ledger."""
        return Ledger(self.directory).read()

    @property
    def is_baseline(self) -> bool:
        """True for a conventional run, which no setting of the space is."""
        return self.config.method == CONVENTIONAL


def plan_trials(
    config: Config,
    space: Mapping[str, Any],
    *,
    seeds: Sequence[int],
    num_samples: int,
    storage_path: str,
    baseline: bool = False,
) -> list[Trial]:
    """Return the trials: every combination of the space's lists, with each sample of its distributions and each seed.

    A trial's name says what it overrides, so that a sweep with more values or seeds finds what is done. Samples are
    drawn from config.seed. A trial's Ray Train job has one worker unless fine_tuning.num_workers says otherwise: with
    as many as the cluster happens to hold, trials would differ in something that is not swept.

    Args:
        config: what all trials have in common.
        space: dotted names to lists (or Tune's grid_search), and Tune's distributions.
        num_samples: of the distributions, for each combination of the lists.
        storage_path: of the trials' run directories.
        baseline: add a conventional run for each seed, of conventional.epochs or of as many epochs as a subset has.

    Raises:
        ValueError: for an empty space or list, an unknown field, a value that a check refuses, or two equal trials.
    """
    if config.method != "subset_pretraining":
        raise ValueError(f"a sweep is of subset pretraining: leave out --method {config.method}")
    if not seeds:
        raise ValueError("--seeds: a sweep needs at least one")
    shared: dict[str, Any] = {"storage_path": storage_path}
    if config.fine_tuning.num_workers == "auto":
        shared["fine_tuning.num_workers"] = 1
    settings = [(overrides, overrides) for overrides in _settings(space, config.seed, num_samples)]
    if baseline:
        overrides = {"method": CONVENTIONAL}
        epochs = config.conventional.epochs or config.minimize.epochs * config.rounds.num
        settings.append((overrides, {**overrides, "conventional.epochs": epochs, "fine_tuning.distillation": 0.0}))
    trials = []
    for overrides, changes in settings:
        for seed in seeds:
            name = _name({**overrides, "seed": seed})
            trial_config = config.with_overrides({**shared, **changes, "seed": seed, "name": name})
            trials.append(Trial(name, overrides, seed, trial_config))
    repeated = [name for name, num in Counter(trial.name for trial in trials).items() if num > 1]
    if repeated:
        raise ValueError(f"the sweep has trial {repeated[0]} more than once: give each value and seed once")
    return trials


def _settings(space: Mapping[str, Any], seed: int, num_samples: int) -> Iterator[dict[str, Any]]:
    """Yield the overrides of each setting, in the order of the lists."""
    if not space:
        raise ValueError('there is nothing to sweep: give lists of values by name, as {"subsets.size": [100, 300]}')
    if num_samples < 1:
        raise ValueError(f"num_samples = {num_samples} must be at least 1")
    lists: dict[str, list[Any]] = {}
    samples: dict[str, list[Any]] = {}
    for key, domain in space.items():
        if key.startswith(_OWN):
            raise ValueError(f"{key} cannot be swept" + ("; give --seeds" if key == "seed" else ""))
        # tune.grid_search() is a mapping with this one key
        values: Any = domain["grid_search"] if isinstance(domain, Mapping) and "grid_search" in domain else domain
        if hasattr(values, "sample"):  # a distribution of ray.tune
            sample = values.sample(size=num_samples, random_state=derive_seed(seed, "space", key) % 2**32)
            samples[key] = [_plain(value) for value in (sample if num_samples > 1 else [sample])]
        elif isinstance(values, list | tuple | range) and len(values):
            lists[key] = list(values)
        else:
            raise ValueError(f"{key}: {values!r} is neither a list of values nor a distribution of ray.tune")
    if num_samples > 1 and not samples:
        raise ValueError(f"num_samples = {num_samples} is for distributions, and the space has none")
    for values in itertools.product(*lists.values()):
        for number in range(num_samples):
            overrides = dict(zip(lists, values, strict=True)) | {key: sample[number] for key, sample in samples.items()}
            yield {key: overrides[key] for key in space}


def _plain(value: Any) -> Any:
    """Return a number of numpy as Python's own."""
    return value.item() if hasattr(value, "item") else value


def _name(values: Mapping[str, Any]) -> str:
    """Return a plain folder name, such as 'subsets.size-100_seed-0'."""

    def word(value: Any) -> str:
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
        return "".join(c if c.isalnum() or c in ".-" else "-" for c in text)

    return "_".join(f"{key}-{word(value)}" for key, value in values.items())


def trunk_leg(config: Config, legs_path: str) -> Leg:
    """Return the trunk of a config as a leg. Legs are equal if all that a trunk depends on is equal."""
    unused = {f"minimize.{name}": getattr(MinimizeConfig(), name) for name in ("schedule", "tolerance", "target_loss")}
    rates = {"minimize.learning_rate": config.stage("trunk").learning_rate, "trunk.learning_rate": None}
    room = {"actors.quorum": None, "actors.max_num": None}
    return Drawing(config.with_overrides({**unused, **rates, **room}), legs_path).trunk()


def shared_trunks(trials: Sequence[Trial], legs_path: str) -> dict[str, Leg]:
    """Return the trunks that two or more trials share, by trial name."""
    with_trunk = [trial for trial in trials if trial.config.trunk.epochs and not trial.is_baseline]
    trunks = {trial.name: trunk_leg(trial.config, legs_path) for trial in with_trunk}
    num = Counter(trunks.values())
    return {name: trunk for name, trunk in trunks.items() if num[trunk] > 1}


def widest_stage(config: Config) -> int:
    """Return how many places a run needs at once: those of its Ray Train jobs, or one for a subset actor.

    The workers of a streamed set need one more place, for the tasks that read for them.
    """
    is_streamed = config.data.streamed
    workers = workers_of_stages(config, of_fine_tuning=config.fine_tuning.workers(auto=1))
    return max(num + (is_streamed and (num > 1 or stage == "fine_tuning")) for stage, num in workers.items())


def divide(num_slots: int, *, widest: int, num_trials: int) -> tuple[int, int]:
    """Return how many trials run at once, and the most places that each may take.

    Together the trials never request more than there is, so that none waits for what another holds. Otherwise a Ray
    Train job, which needs all its workers at once and gives up after some minutes, would starve beside patient actors.
    """
    at_once = max(1, min(num_trials, num_slots // widest))
    return at_once, max(1, num_slots // at_once)
