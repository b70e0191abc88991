"""How a comparison's arms stand while it runs: a table of quality by arm and budget, which fills in leg by leg."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from raysubset.events import Row, Standing
from raysubset.legs import Leg, closure
from raysubset.quality import Quality


class ArmsStanding:
    """Keeps which legs of which arms are done, and what last legs measure on validation data, never on test data."""

    def __init__(
        self, quality: Quality, budgets: Mapping[str, Sequence[float]], *, num_seeds: int, tried: Mapping[str, float]
    ) -> None:
        """Begin with no leg done.

        Args:
            budgets: by arm.
            tried: passes for which an arm's tuning will train.
        """
        self._quality, self._num_seeds, self._tried, self._of_arm = quality, num_seeds, tried, budgets
        self._budgets = sorted({budget for of_arm in budgets.values() for budget in of_arm})
        self._arms_of: defaultdict[str, dict[str, float]] = defaultdict(dict)  # passes by leg and arm
        self._finals: dict[str, list[tuple[str, float]]] = defaultdict(list)  # the arms and budgets that a leg ends
        self._qualities: dict[tuple[str, float], list[float]] = defaultdict(list)  # NaN if not finite or not measured
        self._passes: defaultdict[str, float] = defaultdict(float)
        self._of_tuning: defaultdict[str, float] = defaultdict(float)  # more than `tried` where a grid grew
        self._settings: dict[str, str] = {}
        self._done: set[str] = set()
        self._found = 0.0  # passes of the legs that were already done
        self._shares: dict[str, float] = {}  # how far legs at work are, by key

    def expect(self, arm: str, legs: Iterable[Leg], num_train: int, budget: float = 0.0) -> None:
        """Note an arm's last legs to come, at a budget; without a budget they are for its tuning."""
        for last in legs:
            for leg in closure(last):
                self._arms_of[leg.key][arm] = leg.passes(num_train)
                self._of_tuning[arm] += 0.0 if budget else leg.passes(num_train)
            if budget:
                self._finals[last.key].append((arm, budget))

    def note_settings(self, arm: str, text: str) -> None:
        """Note the settings that an arm was tuned to."""
        self._settings[arm] = text

    def note_done(self, key: str, validation: Mapping[str, Any] | None, *, was_there: bool = False) -> None:
        """Note that a leg is done, or was already done when the comparison was resumed."""
        if key in self._done:
            return
        self._done.add(key)
        self._shares.pop(key, None)
        for arm, passes in self._arms_of[key].items():
            self._passes[arm] += passes
            self._found += passes if was_there else 0.0
        for point in self._finals.get(key, ()):
            value = validation[self._quality.name] if validation else None
            self._qualities[point].append(math.nan if value is None else value)

    def note_progress(self, key: str, share: float) -> None:
        """Note what share of its training a leg has done so far."""
        if key not in self._done:
            self._shares[key] = share

    def event(self) -> Standing:
        """Return the current table."""
        means = {point: statistics.fmean(values) for point, values in self._qualities.items()}
        best = self._best(means)
        at_work: defaultdict[str, float] = defaultdict(float)
        for key, share in self._shares.items():
            for arm, passes in self._arms_of[key].items():
                at_work[arm] += share * passes
        rows = []
        for arm, budgets in self._of_arm.items():
            planned = self._num_seeds * sum(budgets) + max(self._tried.get(arm, 0.0), self._of_tuning[arm])
            num_passes = self._passes[arm] + at_work[arm]
            num = sum(len(self._qualities.get((arm, budget), ())) for budget in budgets)
            state = "done" if num == self._num_seeds * len(budgets) else "at work" if num_passes else "waiting"
            cells = (self._settings.get(arm, ""), *(self._cell(arm, budget, means) for budget in self._budgets))
            rows.append(Row(arm, cells, state, min(num_passes, planned), planned, is_best=arm == best))
        columns = ("learning rate", *(f"{budget:g} passes" for budget in self._budgets))
        num, every = sum(map(len, self._qualities.values())), self._num_seeds * sum(map(len, self._of_arm.values()))
        text = f"{num} of {every} results"
        if best is not None:
            at = max(budget for arm, budget in means if arm == best)
            text += f"; best so far {best}, {self._quality.phrase(means[best, at])} on validation data at {at:g} passes"
        return Standing(text, columns, tuple(rows), self._found)

    def _cell(self, arm: str, budget: float, means: Mapping[tuple[str, float], float]) -> str:
        """Return the mean over seeds. If some seeds are missing, add how many there are."""
        values = self._qualities.get((arm, budget), ())
        if not values:
            return ""
        suffix = f" ({len(values)}/{self._num_seeds})" if len(values) < self._num_seeds else ""
        return f"{self._quality.cell(means[arm, budget])}{suffix}"

    def _best(self, means: Mapping[tuple[str, float], float]) -> str | None:
        """Return the best arm at the largest budget at which several arms have results."""
        for budget in reversed(self._budgets):
            arm_means = {arm: mean for (arm, at), mean in means.items() if at == budget and math.isfinite(mean)}
            if len(arm_means) > 1:
                return max(arm_means, key=lambda arm: self._quality.gain(arm_means[arm]))
        return None
