"""compare() tunes the arms, runs them over budgets and seeds, tests them once, and judges them."""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from raysubset.cluster import num_gpus_of, num_slots, offered, put_once, refuse_unplaceable
from raysubset.comparison.arms import LONG, Arm, Settings, arm_config, final_leg
from raysubset.comparison.checks import checked_arms, checked_margin, takes, unparted_arms, usual_arms
from raysubset.comparison.gathering import Finals, flat, gather
from raysubset.comparison.records import ComparisonReport, Record
from raysubset.comparison.standing import ArmsStanding
from raysubset.comparison.tuning import LEARNING_RATES, MOST_BEYOND, Losses, best_of, in_words, search
from raysubset.config import Config, Learned, check_number, derive_seed
from raysubset.data import FullSet
from raysubset.events import Event, LegDone, Note, OnEvent, Progress, Stage, Waiting
from raysubset.legs import Leg, LegRunner, closure
from raysubset.objects_in_hand import accepts_objects
from raysubset.pipeline.run_report import environment
from raysubset.pipeline.session import Command
from raysubset.planning import Plan, make_plan
from raysubset.run_directory import COMPARISON_PATH, DECISIONS_PATH, RunDirectory
from raysubset.tracking import track_comparison
from raysubset.uris import shown as shown_uri
from raysubset.work import Run
from raysubset.work.identity import places_notes

BUDGETS = (1.0, 2.0, 4.0, 8.0, 16.0)
BANDWIDTH = 1.0  # Gbit/s
STANDING_S = 1.0  # between two reports of how the arms stand, while legs proceed


@accepts_objects
def compare(
    config: Config,
    *,
    data: Any = None,
    model: Any = None,
    task: Any = None,
    seeds: int | Sequence[int] = 5,
    budgets: Sequence[float] = BUDGETS,
    arms: Sequence[str] = (),
    learning_rates: Sequence[float] = (),
    batch_sizes: Sequence[int] = (),
    margin: float | None = None,
    num_workers: int | None = None,
    bandwidth: float = BANDWIDTH,
    on_event: OnEvent | None = None,
    fresh: bool = False,
    accept_changed_code: bool = False,
) -> ComparisonReport:
    """Find out whether subset pretraining pays for this data and model, against conventional training and controls.

    Every arm trains for each budget of passes in total, with each seed; evaluation comes on top. Each arm's learning
    rate is tuned on validation data, at the middle budget and with a seed of its own; the batch size is tuned once, for
    B. The test split is read after all these choices. Equal pieces of work are done once, and counted in full for each
    arm. A comparison of the same name resumes, and arms, budgets and seeds may be added. New budgets may have another
    middle; then learning rates are tuned again. If this process dies, call it again.

    Args:
        config: data, model, subsets and recipe. The epochs of its stages give the proportions in which arms D to H
            divide a budget.
        data, model, task: objects instead of names, as for run().
        seeds: their number, from config.seed on, or the seeds themselves. At least two.
        budgets: passes of training in total, each at least one. A trains for twice the largest.
        arms: letters A to I, or letters with overrides as in "G:aggregation.method=fisher"; by default those of
            ALL_ARMS that the config allows, with a note on the others.
        learning_rates: the grid tried for each arm (times num_workers for I). By default LEARNING_RATES times the
            recipe's own, and beyond that, for an arm whose best rate is at an edge, at most MOST_BEYOND further rates.
        batch_sizes: the grid tried for B; by default only the config's.
        margin: of non-inferiority, in the units of the task's quality. By default the task's; for accuracy that of
            checks.MARGINS for the data, or else checks.MARGIN.
        num_workers: of arm I; by default the number of subsets, but no more than the cluster has room for (recorded).
        bandwidth: of each worker's link, in Gbit/s, for the report's sentence on the way of least wall time.
        on_event: receives events, of finished, lost and repeated legs for example; None: nobody does. Without it,
            raysubset.compare() shows the events, as the command does.
        fresh: delete the earlier comparison of this name, and start over.
        accept_changed_code: resume although the user's code has changed; finished legs stay as they are.

    Raises:
        ValueError: for the user's mistakes, with the way out.
    """
    command = Command("comparison", config, on_event, fresh=fresh, accept_changed_code=accept_changed_code)
    directory, tell = command.directory, command.tell
    if isinstance(seeds, int):
        check_number("--seeds", seeds, "[0, 1000]")
        seeds = range(config.seed, config.seed + seeds)
    own_rates = [factor * config.minimize.peak_learning_rate() for factor in LEARNING_RATES]
    rates = sorted(set(learning_rates or (rate for rate in own_rates if takes(config, rate))))
    named_arms, notes = (arms, []) if arms else usual_arms(config, rates[0])
    chosen_arms = checked_arms(config, seeds, budgets, named_arms, rates)
    for size in batch_sizes:
        check_number("--batch-sizes", size, "[1, ∞)")
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"--num-workers {num_workers}: arm I needs at least one")
    check_number("--bandwidth", bandwidth, "(0, ∞)")
    tell(Waiting(f"reading {shown_uri(config.data.name)}"))
    full_sets: dict[Learned, FullSet] = {}
    configs = [config, *(config.with_overrides(dict(arm.overrides)) for arm in chosen_arms)]
    identity = command.load(configs, full_sets)
    full_set = full_sets[config.learned]
    if full_set.task.compares_examples:
        chosen_arms, parted_notes = unparted_arms(chosen_arms, full_set.task.name, are_usual=not arms)
        notes += parted_notes
    margin = checked_margin(margin, full_set.quality, config.data.name)
    plan = make_plan(config, full_set)
    plans = {
        arm: make_plan(config.with_overrides(dict(arm.overrides)), full_set) if arm.overrides else plan
        for arm in chosen_arms
    }
    for note in (*notes, *places_notes(identity), *full_set.advice, *plan.advice):
        tell(note)
    with command.opened(identity, partial(_refuse_no_place, config)) as sessions:
        tell = sessions.checked(tell)
        sessions.started_up()
        decisions = _decide(directory, config, len(plan.subsets), num_workers, tell)
        comparison = _Comparison(
            Run(config, directory, full_set, put_once(full_set), tell),
            plans,
            seeds,
            budgets=sorted(set(map(float, budgets))),  # floats: 2 and 2.0 would name two legs
            rates=rates,
            sizes=sorted(set(batch_sizes)) or [config.minimize.batch_size],
            most_beyond=0 if learning_rates else MOST_BEYOND,
            **decisions,
        )
        comparison.refuse_unplaceable()
        with comparison.runner:
            settings = comparison.tune()
            finals = comparison.finish(settings)
        record = {
            "kind": "comparison",
            "name": directory.name,
            "uri": directory.uri,
            "config": command.shown_config,
            "environment": environment(),
            **gather(
                finals,
                settings,
                comparison.tried,
                plan,
                full_set,
                comparison.runner.failed,
                tuning_legs=comparison.tuning_legs,
                goes_beyond=not learning_rates,
                seeds=seeds,
                margin=margin,
                num_workers=decisions["num_workers"],
                bandwidth=bandwidth,
            ),
        }
        sessions.write()
        record["seconds"] = sessions.seconds()
        directory.write_json(COMPARISON_PATH, record)
        record = directory.read_json(COMPARISON_PATH)
        track_comparison(config, directory, record, tell)
    tell(Note(f"report: {directory.uri}"))
    return ComparisonReport.from_dict(record)


def _refuse_no_place(config: Config, directory: RunDirectory | None) -> None:
    """Stop before a new cluster starts if the cluster can never place an actor. What was decided before is kept."""
    if directory is None or not directory.exists(DECISIONS_PATH):
        types = offered(config.cluster)
        num_gpus = num_gpus_of(config.actors, lambda event: None, types=types)
        refuse_unplaceable({"CPU": config.actors.num_cpus, "GPU": num_gpus}, "legs of a comparison", types=types)


def _decide(
    directory: RunDirectory, config: Config, num_subsets: int, num_workers: int | None, tell: OnEvent
) -> Record:
    """Return what depends on the cluster, decided once and written down. A given number of workers takes precedence."""
    decisions = directory.read_json_or_none(DECISIONS_PATH)
    if decisions is None:
        num_gpus = num_gpus_of(config.actors, tell)
        most = num_slots({"CPU": config.actors.num_cpus, "GPU": num_gpus}, startable=True)
        decisions = {"num_gpus": num_gpus, "num_workers": max(2, min(num_subsets, most))}
    decisions |= {"num_workers": num_workers or decisions["num_workers"]}
    directory.write_json(DECISIONS_PATH, decisions)
    return decisions


@dataclasses.dataclass
class _Comparison:
    """Draws the legs of all arms, and runs them."""

    run: Run
    plans: Mapping[Arm, Plan]
    seeds: Sequence[int]
    budgets: Sequence[float]  # ascending, like rates and sizes
    rates: Sequence[float]  # the learning rates that arms try
    sizes: Sequence[int]  # the batch sizes that B tries
    most_beyond: int  # rates that an arm tries beyond an edge of its grid
    num_workers: int  # of arm I
    num_gpus: float  # of an actor

    def __post_init__(self) -> None:
        self.tried: list[Record] = []  # by tuning: arm, settings, validation loss
        self.tuning_legs: list[Leg] = []
        self.runner = LegRunner(dataclasses.replace(self.run, tell=self._pass_on), num_gpus=self.num_gpus)
        self._num_train = len(self.run.full_set.train)
        # The middle budget, and a seed that is not among the compared ones
        seed = derive_seed(min(self.seeds), "tuning") % 2**31
        self._tuning_point = self.budgets[(len(self.budgets) - 1) // 2], seed
        num_tried = {arm.key: len(self.rates) * (len(self.sizes) if arm.key == "B" else 1) for arm in self.plans}
        tuning = {key: num * self._tuning_point[0] for key, num in num_tried.items() if num > 1 and key != "A"}
        budgets = {arm.key: self._budgets_of(arm) for arm in self.plans}
        quality = self.run.full_set.quality
        self._standing = ArmsStanding(quality, budgets, num_seeds=len(self.seeds), tried=tuning)
        self._stood_at = 0.0

    def _pass_on(self, event: Event) -> None:
        """Pass on an event of the legs' runner. Report how the arms stand when a leg is done, and as it proceeds."""
        self.run.tell(event)
        if isinstance(event, LegDone):
            self._standing.note_done(event.leg, event.validation, was_there=event.was_there)
            if not event.was_there:
                self.run.tell(self._standing.event())
        elif isinstance(event, Progress):
            self._standing.note_progress(event.attempt.directory, event.epoch / event.num_epochs)
            if time.monotonic() - self._stood_at >= STANDING_S:
                self._stood_at = time.monotonic()
                self.run.tell(self._standing.event())

    def _tell_standing(self, settings: Mapping[str, Settings]) -> None:
        """Report the settings that arms were tuned to."""
        for key, arm_settings in settings.items():
            self._standing.note_settings(key, f"{arm_settings.learning_rate:g}")
        self.run.tell(self._standing.event())

    def leg(self, arm: Arm, settings: Settings, budget: float, seed: int) -> Leg:
        """Return an arm's last leg."""
        use = "tuning" if (budget, seed) == self._tuning_point else f"{budget:g} passes, seed {seed}"
        return final_leg(
            arm,
            arm_config(arm, self.run.config, settings, seed=seed, num_workers=self.num_workers),
            budget,
            self.plans[arm],
            num_train=self._num_train,
            num_workers=self.num_workers,
            legs_path=self.run.directory.below("legs"),
            label=f"{arm.key} at rate {settings.learning_rate:g}, {use}",
        )

    def _finals(self, arm: Arm, settings: Settings) -> dict[float, dict[int, Leg]]:
        """Return an arm's last legs by budget and seed."""
        return {b: {seed: self.leg(arm, settings, b, seed) for seed in self.seeds} for b in self._budgets_of(arm)}

    def _budgets_of(self, arm: Arm) -> Sequence[float]:
        return [LONG * max(self.budgets)] if arm.letter == "A" else self.budgets

    def refuse_unplaceable(self) -> None:
        """Stop before anything runs if an arm has data-parallel work left that the cluster can never place.

        An arm has none left if all legs of its tuning are done, and all legs with a setting of its grid.

        Raises:
            ValueError: with the way out.
        """
        for arm in self.plans:
            last = self.leg(arm, Settings(self.rates[0], self.sizes[0]), *self._tuning_point)
            num_workers = max(leg.num_workers for leg in closure(last))
            if num_workers > 1 and not any(self._has_all(arm, size) for size in self.sizes):
                flag = "--num-workers" if arm.letter == "I" else "--fine-tuning.num-workers, --trunk.num-workers"
                way_out = (
                    f"Give it fewer ({flag}), give a local cluster more logical CPUs (--cluster.num-cpus), leave "
                    "it out of --arms,"
                )
                request = {"CPU": self.run.config.actors.num_cpus, "GPU": self.num_gpus}
                refuse_unplaceable(request, f"workers of arm {arm.key}", num=num_workers, way_out=way_out)

    def _has_all(self, arm: Arm, size: int) -> bool:
        grid = [Settings(rate, size) for rate in self.rates]
        tuning = [self.leg(arm, at, *self._tuning_point) for at in grid if len(grid) > 1]
        return any(
            all(leg.output.record(whole=True) for leg in (*tuning, *flat({arm: self._finals(arm, at)}))) for at in grid
        )

    def tune(self) -> dict[str, Settings]:
        """Return each arm's settings of least validation loss at the middle budget; `tried` has all that was tried.

        A is B for longer, and has B's settings.
        """
        rates = ", ".join(f"{rate:g}" for rate in self.rates)
        at = f"{self._tuning_point[0]:g} passes"
        self.run.tell(Stage(f"tuning: learning rates {rates} and batch sizes {self.sizes} at {at}"))
        baseline = next(arm for arm in self.plans if arm.key == "B")
        settings = self._best({baseline: [Settings(rate, size) for size in self.sizes for rate in self.rates]})
        self._tell_standing(settings)
        grid = [Settings(rate, settings["B"].batch_size) for rate in self.rates]
        settings |= self._best({arm: grid for arm in self.plans if arm.key not in ("A", "B")})
        return settings | {"A": settings["B"]}

    def _best(self, grids: Mapping[Arm, Sequence[Settings]]) -> dict[str, Settings]:
        """Return the best settings of each arm's grid. A grid of one is not run."""
        best = {arm.key: grid[0] for arm, grid in grids.items()}
        all_losses = search(
            {arm: grid for arm, grid in grids.items() if len(grid) > 1},
            self._losses,
            most_beyond=self.most_beyond,
            can_try=lambda setting: takes(self.run.config, setting.learning_rate),
        )
        for arm, losses in all_losses.items():
            best[arm.key] = best_of(losses)
            self.run.tell(Note(in_words(arm, losses), is_warning=losses[best[arm.key]] == math.inf))
        return best

    def _losses(self, grids: Mapping[Arm, Sequence[Settings]]) -> Losses:
        """Run arms with settings at the tuning's budget, and return their validation losses; ∞ if a leg failed."""
        tuned = {(arm, at): self.leg(arm, at, *self._tuning_point) for arm, grid in grids.items() for at in grid}
        for (arm, _), leg in tuned.items():
            self._standing.expect(arm.key, [leg], self._num_train)
        self.runner.run(list(tuned.values()))
        self.tuning_legs += tuned.values()
        losses: Losses = {arm: {} for arm in grids}
        for (arm, at), leg in tuned.items():
            validation = None if leg in self.runner.failed else leg.validation()
            loss = validation["loss"] if validation else None
            losses[arm][at] = math.inf if loss is None else loss
            record = {"arm": arm.key, **dataclasses.asdict(at), "budget": self._tuning_point[0]}
            self.tried.append({**record, "validation_loss": loss, "leg": leg.key})
        return losses

    def finish(self, settings: Mapping[str, Settings]) -> Finals:
        """Run all arms at all budgets with all seeds, then test. Return the last legs by arm, budget and seed."""
        finals = {arm: self._finals(arm, settings[arm.key]) for arm in self.plans}
        for arm, by_budget in finals.items():
            for budget, by_seed in by_budget.items():
                self._standing.expect(arm.key, by_seed.values(), self._num_train, budget)
        self.run.tell(Stage(f"{len(finals)} arms × {len(self.budgets)} budgets × {len(self.seeds)} seeds"))
        self._tell_standing(settings)
        self.runner.run(flat(finals))
        self.run.tell(Stage("test: all choices are made, the test split is read"))
        self.runner.test(flat(finals))
        return finals
