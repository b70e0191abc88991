"""Comparison draws the legs of all arms, tunes the arms, and has the legs done."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial

from raysubset.cluster import refuse_unplaceable
from raysubset.comparison.arms import LONG, Arm, Settings, arm_config, final_leg
from raysubset.comparison.checks import takes
from raysubset.comparison.records import Record
from raysubset.comparison.standing import ArmsStanding
from raysubset.comparison.tuning import Losses, best_of, in_words, is_at_edge, search
from raysubset.config import derive_seed
from raysubset.events import Event, LegDone, Note, Progress, Stage
from raysubset.legs import Leg, LegRunner, closure
from raysubset.planning import Plan
from raysubset.work import Run

_TUNED = tuple(field.name for field in fields(Settings))
STANDING_S = 1.0  # between two reports of how the arms stand, while legs proceed

Finals = Mapping[Arm, Mapping[float, Mapping[int, Leg]]]
"""Last legs by arm, budget and seed."""


def flat(finals: Finals) -> list[Leg]:
    """Return the last legs of all arms, budgets and seeds."""
    return [leg for by_budget in finals.values() for by_seed in by_budget.values() for leg in by_seed.values()]


@dataclass
class Comparison:
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
        self.baseline = next(arm for arm in self.plans if arm.key == "B")
        self.plan = self.plans[self.baseline]  # of the comparison's own config
        self.tried: list[Record] = []  # by tuning: arm, settings, validation loss
        self.tuning_legs: list[Leg] = []
        self.at_edge: set[str] = set()  # arms for which a rate beyond those tried may be better
        self.runner = LegRunner(replace(self.run, tell=self._pass_on), num_gpus=self.num_gpus)
        self._num_train = len(self.run.full_set.train)
        # The middle budget, and a seed that is not among the compared ones
        seed = derive_seed(min(self.seeds), "tuning") % 2**31
        self._tuning_point = self.budgets[(len(self.budgets) - 1) // 2], seed
        num_tried = {
            arm.key: len(self._grid(arm, self.sizes if arm.key == "B" else self.sizes[:1])) for arm in self.plans
        }
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
        """Stop before anything runs if the cluster can never place the workers of an arm that has not begun.

        Raises:
            ValueError: with the way out.
        """
        for arm in self.plans:
            point = self._tuning_point if len(self.rates) > 1 else (self._budgets_of(arm)[0], self.seeds[0])
            first_legs = [self.leg(arm, Settings(self.rates[0], size), *point) for size in self.sizes]
            num_workers = max(leg.num_workers for leg in closure(*first_legs))
            if num_workers > 1 and not any(leg.output.record() for leg in first_legs):
                flag = "--num-workers" if arm.letter == "I" else "--fine-tuning.num-workers, --trunk.num-workers"
                way_out = (
                    f"Give it fewer ({flag}), give a local cluster more logical CPUs (--cluster.num-cpus), leave "
                    "it out of --arms,"
                )
                request = {"CPU": self.run.config.actors.num_cpus, "GPU": self.num_gpus}
                refuse_unplaceable(request, f"workers of arm {arm.key}", num=num_workers, way_out=way_out)

    def tune(self) -> dict[str, Settings]:
        """Return each arm's settings of least validation loss at the middle budget; `tried` has all that was tried.

        A is B for longer, and has B's settings.
        """
        rates = ", ".join(f"{rate:g}" for rate in self.rates)
        at = f"{self._tuning_point[0]:g} passes"
        self.run.tell(Stage(f"tuning: learning rates {rates} and batch sizes {self.sizes} at {at}"))
        settings = self._best({self.baseline: self._grid(self.baseline, self.sizes)})
        self._tell_standing(settings)
        sizes = [settings["B"].batch_size]
        settings |= self._best({arm: self._grid(arm, sizes) for arm in self.plans if arm.key not in ("A", "B")})
        return settings | {"A": settings["B"]}

    def _grid(self, arm: Arm, sizes: Sequence[int]) -> list[Settings]:
        """Return the settings that an arm tries first. A rate or batch size among its overrides is the only one."""
        fixed = {name: arm.overrides[f"minimize.{name}"] for name in _TUNED if f"minimize.{name}" in arm.overrides}
        return list(dict.fromkeys(replace(Settings(rate, size), **fixed) for size in sizes for rate in self.rates))

    def _best(self, grids: Mapping[Arm, Sequence[Settings]]) -> dict[str, Settings]:
        """Return the best settings of each arm's grid. A grid of one is not run."""
        best = {arm.key: grid[0] for arm, grid in grids.items()}
        all_losses = search(
            {arm: grid for arm, grid in grids.items() if len(grid) > 1},
            self._losses,
            most_beyond=self.most_beyond,
            can_try=lambda arm, setting: takes(arm, self.run.config, setting),
        )
        for arm, losses in all_losses.items():
            best[arm.key] = best_of(losses)
            at_edge = is_at_edge(best[arm.key], losses, partial(takes, arm, self.run.config))
            self.at_edge |= {arm.key} if at_edge else set()
            text = in_words(arm, losses, at_edge=at_edge)
            self.run.tell(Note(text, is_warning=losses[best[arm.key]] == math.inf))
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
            record = {"arm": arm.key, **asdict(at), "budget": self._tuning_point[0]}
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
