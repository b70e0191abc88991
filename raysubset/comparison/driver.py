"""compare(): arms tuned, run over budgets and seeds, tested once, judged."""

import dataclasses
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from raysubset.cluster import connected, num_gpus_of, num_slots, offered, put_once, reached, refuse_unplaceable
from raysubset.comparison.arms import ALL_ARMS, LONG, Arm, Settings, arm_config, final_leg, parse_arm
from raysubset.comparison.gathering import gather
from raysubset.comparison.records import ComparisonReport, Record
from raysubset.comparison.standing import ArmsStanding
from raysubset.config import Config, check_number, derive_seed
from raysubset.data import load_full_set
from raysubset.events import Event, LegDone, Note, OnEvent, Stage, Waiting
from raysubset.identity import identify, known_fingerprint, places_notes
from raysubset.legs import Leg, LegRunner, closure
from raysubset.objects_in_hand import taking_objects
from raysubset.planning import Plan, make_plan
from raysubset.quality import ACCURACY, Quality
from raysubset.run_directory import COMPARISON_PATH, DECISIONS_PATH, Lease, RunDirectory
from raysubset.run_report import Sessions, environment
from raysubset.soundness import refuse_fresh_weights
from raysubset.tracking import refuse_missing, track_comparison
from raysubset.uris import shown as shown_uri
from raysubset.user_functions import refuse_import
from raysubset.work import Run

LEARNING_RATES = (0.3, 1.0, 3.0)  # tried for each arm, times the recipe's own
BUDGETS = (1.0, 2.0, 4.0, 8.0, 16.0)
MARGINS = {"mnist": 0.001, "fashion_mnist": 0.001, "cifar10": 0.005, "cifar100": 0.01}
BANDWIDTH = 1.0  # Gbit/s
MARGIN = 0.005  # of non-inferiority, in accuracy, for other data; other qualities have one of their task's, or none

COMMON = ("name", "storage_path", "seed", "method", "data", "task", "model", "cluster", "tracking")  # no arm's own
OF_SUBSETS = ("D", "E", "F", "G", "H")  # arms with a stage of subsets


@taking_objects
def compare(
    config: Config,
    *,
    data: Any = None,
    model: Any = None,
    task: Any = None,
    seeds: int | Sequence[int] = 5,
    budgets: Sequence[float] = BUDGETS,
    arms: Sequence[str] = ALL_ARMS,
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

    Every arm trains for each budget of passes in total, evaluation on top, with each seed; learning rates are tuned for
    each arm on validation data at the middle budget with a seed of its own, and the batch size once, for B. The test
    split is read when all that is chosen. Equal pieces of work are done once and counted in full for each arm. A
    comparison of the same name is gone on with, and further arms, budgets and seeds may be added (other budgets may
    have another middle, at which learning rates are tuned anew); if this process dies, calling it again is all there is
    to do.

    Args:
        config: data, model, subsets and recipe; its stages' epochs give the proportions in which arms D to H divide a
            budget.
        data, model, task: objects in the place of names, as run() takes them.
        seeds: how many, from config.seed on; or which. At least two.
        budgets: passes of training in total; at least one pass each. A trains for twice the largest.
        arms: letters A to I, or letters with overrides as in "G:aggregation.method=fisher".
        learning_rates: the grid tried for each arm (for I times num_workers); by default LEARNING_RATES times the
            recipe's own.
        batch_sizes: the grid tried for B; by default the config's alone.
        margin: of non-inferiority, in the units of the task's quality; by default its own, and of accuracy that of
            MARGINS for the data, else MARGIN.
        num_workers: of arm I; by default the number of subsets, as far as the cluster has room (recorded).
        bandwidth: of each worker's link, in Gbit/s, at which the report says which way takes the least wall time.
        on_event: told of legs as they are done, lost and retried; None: nobody is. raysubset.compare() shows them, as
            the command does, unless this is given.
        fresh: delete what a comparison of this name left behind, and start over.
        accept_changed_code: go on where the user's code has changed since; legs that are done stay as they are.

    Raises:
        ValueError: the user's mistake, with the way out.
    """
    began = time.perf_counter()
    refuse_import("compare()")
    tell: OnEvent = on_event or (lambda event: None)
    if isinstance(seeds, int):
        check_number("--seeds", seeds, "[0, 1000]")
    seeds = list(range(config.seed, config.seed + seeds)) if isinstance(seeds, int) else list(seeds)
    learning_rates = list(learning_rates) or [f * config.minimize.peak_learning_rate() for f in LEARNING_RATES]
    chosen = _checked(config, seeds, budgets, arms, learning_rates)
    for size in batch_sizes:
        check_number("--batch-sizes", size, "[1, ∞)")
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"--num-workers {num_workers}: arm I needs at least one")
    check_number("--bandwidth", bandwidth, "(0, ∞)")
    refuse_missing(config.tracking)
    directory = RunDirectory(config.storage_path, config.name or f"{config.run_name()}-comparison")
    known = None if fresh else directory.read_identity()
    tell(Waiting(f"reading {shown_uri(config.data.name)}"))
    full_set = load_full_set(*config.learned, known=known_fingerprint(known, config))
    margin = _margin(margin, full_set.quality, config.data.name)
    configs = [config.with_overrides(dict(arm.overrides)) for arm in chosen]
    identity = identify([config, *configs], {config.learned: full_set}, known)
    plan = make_plan(config, full_set)
    plans = {arm.key: plan for arm in chosen}
    plans |= {a.key: make_plan(config.with_overrides(dict(a.overrides)), full_set) for a in chosen if a.overrides}
    for note in (*places_notes(identity), *full_set.advice, *plan.advice):
        tell(note)
    directory.check_writable()
    shown = dataclasses.replace(config, storage_path=directory.shown_storage_path)  # no credentials
    with ExitStack() as stack:
        stack.enter_context(reached(config.cluster, tell))
        if fresh or not directory.exists(DECISIONS_PATH):
            types = offered(config.cluster)
            num_gpus = num_gpus_of(config.actors, lambda event: None, types=types)
            request = {"CPU": config.actors.num_cpus, "GPU": num_gpus}
            refuse_unplaceable(request, "legs of a comparison", types=types)
        lease = stack.enter_context(Lease(directory))
        resumed = directory.open(
            shown.to_dict() | {"kind": "comparison"},
            environment(),
            identity,
            fresh=fresh,
            accept_changed_code=accept_changed_code,
        )
        sessions = stack.enter_context(Sessions(directory, lease, began=began))
        tell = sessions.checked(tell)
        tell(Stage(f"{'resuming' if resumed else 'comparison'} {directory.uri}"))
        with connected(config.cluster, tell):
            sessions.started_up()
            decided = _decide(directory, config, len(plan.subsets), num_workers, tell)
            run = Run(config, directory, full_set, put_once(full_set), tell)
            work = _Comparison(run, decided, plans, seeds, budgets)
            rates, sizes = sorted(set(learning_rates)), sorted(set(batch_sizes)) or [config.minimize.batch_size]
            work.refuse_unplaceable(chosen, rates, sizes)
            settings, tuning = work.tune(chosen, rates, sizes)
            finals = work.run(chosen, settings)
        record = {
            "kind": "comparison",
            "name": directory.name,
            "uri": directory.uri,
            "config": shown.to_dict(),
            "environment": environment(),
            **gather(
                finals,
                settings,
                tuning,
                plan,
                full_set,
                work.runner.failed,
                tuning_legs=work.tuning_legs,
                seeds=seeds,
                margin=margin,
                num_workers=decided["num_workers"],
                bandwidth=bandwidth,
            ),
        }
        sessions.write()
        record["seconds"] = sessions.seconds()
        directory.write_json(COMPARISON_PATH, record)
        track_comparison(config, directory, directory.read_json(COMPARISON_PATH), tell)
    tell(Note(f"report: {directory.uri}"))
    return ComparisonReport.from_dict(directory.read_json(COMPARISON_PATH))


def _checked(
    config: Config,
    seeds: Sequence[int],
    budgets: Sequence[float],
    arms: Sequence[str],
    learning_rates: Sequence[float],
) -> list[Arm]:
    """The arms.

    Raises:
        ValueError: for what cannot be compared.
    """
    if len(set(seeds)) < 2:
        raise ValueError(f"--seeds: {len(set(seeds))} cannot tell a difference from noise: give at least 2, better 5")
    if not arms:
        raise ValueError("a comparison needs arms: B and at least one of D, E, G and H")
    chosen = [parse_arm(key) for key in dict.fromkeys(arms)]
    if "B" not in {arm.key for arm in chosen}:
        raise ValueError("everything is measured against conventional training: add B to --arms")
    if not any(arm.role == "candidate" for arm in chosen):
        raise ValueError("there is no arm of subset pretraining to judge: add D, E, G or H to --arms")
    if config.method != "subset_pretraining":
        raise ValueError(f"a comparison has arms of both methods: leave out --method {config.method}")
    for budget in budgets:
        check_number("--budgets", budget, "(-∞, ∞)")
    if not budgets or min(budgets) < 1:
        least = f"{min(budgets):g} passes" if budgets else "no budget"
        raise ValueError(f"--budgets: {least} is too small for one epoch of conventional training: give at least 1")
    for rate in learning_rates:
        check_number("--learning-rates", rate, "(0, ∞)")
        config.with_overrides({"minimize.learning_rate": rate})  # refuses what the optimizer cannot take
    for arm in chosen:
        _refuse_what_arms_do_not(arm, config)
    return chosen


def _refuse_what_arms_do_not(arm: Arm, config: Config) -> None:
    """Refuse settings that would be ignored: before anything is run.

    Raises:
        ValueError: for those, and for overrides that are no fields.
    """
    own = config.with_overrides(dict(arm.overrides))
    for name in arm.overrides:
        if name.partition(".")[0] in COMMON:
            raise ValueError(f"arm {arm.key}: {name} is the same for all arms: set it for the whole comparison")
    refuse_fresh_weights(own.with_overrides({"fine_tuning.start": arm.start}))
    if loop := own.minimize.whole_loop:
        whose = {"C": "sees a share of the examples in each epoch", "I": "is shared by several workers"}
        if arm.letter in whose:
            text = f"{whose[arm.letter]}, and {loop} takes all examples in one process"
            raise ValueError(f"arm {arm.key} {text}: leave it out of --arms, or use sgd, adam or adamw")
        if own.data.streamed and arm.letter not in OF_SUBSETS:
            text = f"trains on the full set, which data.streamed does not hold, and {loop} has all examples in memory"
            raise ValueError(f"arm {arm.key} {text}: use sgd, adam or adamw, or leave --data.streamed out")
    if arm.letter not in OF_SUBSETS:
        return
    for is_set, name, words in (
        (own.subsets.shares != "equal", "subsets.shares", "the size of its subsets would be by the nodes there are"),
        (own.actors.quorum is not None, "actors.quorum", "its minima would be those that come first"),
    ):
        if is_set:
            raise ValueError(f"arm {arm.key}: {words}, which no other run repeats: leave out {name}")


def _margin(given: float | None, quality: Quality, data_name: str) -> float:
    """The margin of non-inferiority, in the quality's units.

    Raises:
        ValueError: if it is out of range, or none is given for a quality that has none.
    """
    if given is not None:
        check_number("--margin", given, "[0, 1)" if quality.is_share else "[0, ∞)")
        return given
    is_accuracy = quality.name == ACCURACY.name
    if is_accuracy and data_name in MARGINS:
        return MARGINS[data_name]
    if quality.margin is None and not is_accuracy:
        raise ValueError(
            f"how much worse in {quality.label} may a model be and still count as good? No margin of non-inferiority "
            "is known for it: give --margin"
        )
    return MARGIN if quality.margin is None else quality.margin


def _decide(
    directory: RunDirectory, config: Config, num_subsets: int, num_workers: int | None, tell: OnEvent
) -> Record:
    """What depends on the cluster: decided once and written down. A number of workers that is given is taken."""
    decided = directory.read_json_or_none(DECISIONS_PATH)
    if decided is None:
        num_gpus = num_gpus_of(config.actors, tell)
        most = num_slots({"CPU": config.actors.num_cpus, "GPU": num_gpus}, startable=True)
        decided = {
            "num_gpus": num_gpus,
            "num_workers": max(2, min(num_subsets, most)),
        }
    decided |= {"num_workers": num_workers or decided["num_workers"]}
    directory.write_json(DECISIONS_PATH, decided)
    return decided


class _Comparison:
    """Legs of all arms, made and run."""

    def __init__(
        self, run: Run, decided: Record, plans: Mapping[str, Plan], seeds: Sequence[int], budgets: Sequence[float]
    ) -> None:
        """plans: by the arms' keys."""
        self._config, self._num_train, self._plans, self._tell = run.config, len(run.full_set.train), plans, run.tell
        self._quality = run.full_set.quality
        self._seeds, self._budgets = seeds, sorted(set(map(float, budgets)))  # a leg's name would tell 2 from 2.0
        self._num_workers, self._num_gpus = decided["num_workers"], decided["num_gpus"]
        self._legs_path = run.directory.below("legs")
        self.tuning_legs: list[Leg] = []
        self.runner = LegRunner(dataclasses.replace(run, tell=self._hear), num_gpus=decided["num_gpus"])
        self._standing: ArmsStanding | None = None

    def _hear(self, event: Event) -> None:
        """Tell what the legs' runner tells, and how the arms stand whenever a leg is done."""
        self._tell(event)
        if isinstance(event, LegDone) and self._standing is not None:
            self._standing.note_done(event.leg, event.validation)
            if not event.was_there:
                self._tell(self._standing.event())

    def _tell_standing(self, settings: Mapping[str, Settings]) -> None:
        """Show what arms were tuned to."""
        if self._standing is not None:
            for key, own in settings.items():
                self._standing.note_settings(key, f"{own.learning_rate:g}")
            self._tell(self._standing.event())

    def _expect(self, arm: Arm, legs: Iterable[Leg], budget: float = 0.0) -> None:
        if self._standing is not None:
            self._standing.expect(arm.key, legs, self._num_train, budget)

    def leg(self, arm: Arm, settings: Settings, budget: float, seed: int) -> Leg:
        """An arm's last leg."""
        config = arm_config(arm, self._config, settings, seed=seed, num_workers=self._num_workers)
        shape = {"num_train": self._num_train, "num_workers": self._num_workers, "legs_path": self._legs_path}
        return final_leg(arm, config, budget, self._plans[arm.key], **shape)

    def _finals(self, arm: Arm, settings: Settings) -> dict[float, dict[int, Leg]]:
        """An arm's last legs by budget and seed."""
        return {b: {seed: self.leg(arm, settings, b, seed) for seed in self._seeds} for b in self._budgets_of(arm)}

    def _budgets_of(self, arm: Arm) -> list[float]:
        return [LONG * max(self._budgets)] if arm.letter == "A" else self._budgets

    def _tuned_at(self) -> tuple[float, int]:
        """The middle budget, and a seed that is none of those compared."""
        return self._budgets[(len(self._budgets) - 1) // 2], derive_seed(min(self._seeds), "tuning") % 2**31

    def refuse_unplaceable(self, arms: Sequence[Arm], rates: Sequence[float], sizes: Sequence[int]) -> None:
        """Stop before anything is run if an arm has data-parallel work left that the cluster can never place.

        It has none if all its legs are there: those of its tuning, and those of a setting it may have been tuned to.

        Raises:
            ValueError: with the way out.
        """
        for arm in arms:
            last = self.leg(arm, Settings(rates[0], sizes[0]), *self._tuned_at())
            num_workers = max(leg.num_workers for leg in closure(last))
            if num_workers > 1 and not any(self._has_all(arm, rates, size) for size in sizes):
                flag = "--num-workers" if arm.letter == "I" else "--fine-tuning.num-workers, --trunk.num-workers"
                way_out = (
                    f"Give it fewer ({flag}), give a local cluster more logical CPUs (--cluster.num-cpus), leave "
                    "it out of --arms,"
                )
                request = {"CPU": self._config.actors.num_cpus, "GPU": self._num_gpus}
                refuse_unplaceable(request, f"workers of arm {arm.key}", num=num_workers, way_out=way_out)

    def _has_all(self, arm: Arm, rates: Sequence[float], size: int) -> bool:
        grid = [Settings(rate, size) for rate in rates]
        tuning = [self.leg(arm, one, *self._tuned_at()) for one in grid if len(grid) > 1]
        finals = [[leg for by_seed in self._finals(arm, one).values() for leg in by_seed.values()] for one in grid]
        return any(all(leg.output.record(whole=True) is not None for leg in tuning + own) for own in finals)

    def tune(
        self, arms: Sequence[Arm], rates: Sequence[float], sizes: Sequence[int]
    ) -> tuple[dict[str, Settings], list[Record]]:
        """The settings of each arm with the least validation loss at the middle budget; and all that was tried.

        A is B for longer, and takes B's.
        """
        budget, seed = self._tuned_at()
        baseline = next(arm for arm in arms if arm.key == "B")
        tried: list[Record] = []
        told = ", ".join(f"{rate:g}" for rate in rates)
        self._tell(Stage(f"tuning: learning rates {told} and batch sizes {sizes} at {budget:g} passes"))
        num_rates = len(rates) if len(rates) > 1 else 0
        tuning = {arm.key: budget * num_rates for arm in arms if arm.key not in ("A", "B")}
        tuning["B"] = budget * (num_rates or len(sizes) > 1) * len(sizes)
        budgets = {arm.key: self._budgets_of(arm) for arm in arms}
        self._standing = ArmsStanding(self._quality, budgets, num_seeds=len(self._seeds), tried=tuning)
        grid = [Settings(rate, size) for size in sizes for rate in rates]
        settings = {"B": self._best({baseline: grid}, budget, seed, tried)["B"]}
        self._tell_standing(settings)
        others = {
            arm: [Settings(rate, settings["B"].batch_size) for rate in rates]
            for arm in arms
            if arm.key not in ("A", "B")
        }
        settings |= self._best(others, budget, seed, tried)
        settings["A"] = settings["B"]
        return settings, tried

    def _best(
        self, grids: Mapping[Arm, Sequence[Settings]], budget: float, seed: int, tried: list[Record]
    ) -> dict[str, Settings]:
        """The best of each arm's grid; of a grid of one, that one, without running it."""
        best = {arm.key: grid[0] for arm, grid in grids.items()}
        tuned = {arm: grid for arm, grid in grids.items() if len(grid) > 1}
        legs = {(arm.key, one): self.leg(arm, one, budget, seed) for arm, grid in tuned.items() for one in grid}
        for arm, grid in tuned.items():
            self._expect(arm, (legs[arm.key, one] for one in grid))
        self.runner.run(list(legs.values()))
        self.tuning_legs.extend(legs.values())
        for arm, grid in tuned.items():
            losses: dict[Settings, float] = {}
            for one in grid:
                leg = legs[arm.key, one]
                is_lost = leg in self.runner.failed
                validation = None if is_lost else leg.validation()
                loss = validation["loss"] if validation else None
                losses[one] = math.inf if loss is None else loss
                own = dataclasses.asdict(one)
                tried.append({"arm": arm.key, **own, "budget": budget, "validation_loss": loss, "leg": leg.key})
            found = best[arm.key] = min(grid, key=lambda one: losses[one])
            if losses[found] == math.inf:
                self._tell(Note(f"{arm.key} diverged or failed at every learning rate of the grid", is_warning=True))
                continue
            rates = {one.learning_rate for one in grid}
            edge = len(rates) > 1 and found.learning_rate in (min(rates), max(rates))
            note = ", at the edge of the grid" if edge else ""
            text = f"{arm.key}: learning rate {found.learning_rate:g}{note}, batch {found.batch_size}"
            self._tell(Note(text))
        return best

    def run(self, arms: Sequence[Arm], settings: Mapping[str, Settings]) -> dict[Arm, dict[float, dict[int, Leg]]]:
        """All arms at all budgets with all seeds, and then their test results: last legs by arm, budget and seed."""
        finals = {arm: self._finals(arm, settings[arm.key]) for arm in arms}
        for arm, of_arm in finals.items():
            for budget, of_budget in of_arm.items():
                self._expect(arm, of_budget.values(), budget)
        flat = [leg for of_arm in finals.values() for of_budget in of_arm.values() for leg in of_budget.values()]
        shape = f"{len(arms)} arms × {len(self._budgets)} budgets × {len(self._seeds)} seeds"
        self._tell(Stage(shape))
        self._tell_standing(settings)
        self.runner.run(flat)
        self._tell(Stage("test: every choice is made, the test split is read"))
        self.runner.test(flat)
        return finals
