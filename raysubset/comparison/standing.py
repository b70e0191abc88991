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
        self._quality, self._num_seeds, self._tried, self._budgets = quality, num_seeds, tried, budgets
        self._passes: defaultdict[str, dict[str, float]] = defaultdict(dict)  # by leg and arm
        self._of_tuning: defaultdict[str, float] = defaultdict(float)  # more than `tried` where a grid grew
        self._finals: defaultdict[tuple[str, float], list[str]] = defaultdict(list)  # last legs by arm and budget
        self._settings: dict[str, str] = {}
        self._shares: dict[str, float] = {}  # how far legs are, by key
        self._values: dict[str, float] = {}  # of legs that are done; NaN if not finite or not measured
        self._found: set[str] = set()  # the legs that were already done

    def expect(self, arm: str, legs: Iterable[Leg], num_train: int, budget: float = 0.0) -> None:
        """Note an arm's last legs to come, at a budget; without a budget they are for its tuning."""
        for last in legs:
            for leg in closure(last):
                self._passes[leg.key][arm] = leg.passes(num_train)
                self._of_tuning[arm] += 0.0 if budget else leg.passes(num_train)
            if budget:
                self._finals[arm, budget].append(last.key)

    def note_settings(self, arm: str, text: str) -> None:
        """Note the settings that an arm was tuned to."""
        self._settings[arm] = text

    def note_done(self, key: str, validation: Mapping[str, Any] | None, *, was_there: bool = False) -> None:
        """Note that a leg is done, or was already done when the comparison was resumed."""
        if key not in self._values:
            value = validation[self._quality.name] if validation else None
            self._values[key], self._shares[key] = math.nan if value is None else value, 1.0
            self._found |= {key} if was_there else set()

    def note_progress(self, key: str, share: float) -> None:
        """Note what share of its training a leg has done so far."""
        if key not in self._values:
            self._shares[key] = share

    def event(self) -> Standing:
        """Return the current table."""
        values = {
            point: [self._values[key] for key in keys if key in self._values] for point, keys in self._finals.items()
        }
        means = {point: statistics.fmean(of_point) for point, of_point in values.items() if of_point}
        columns = sorted({budget for budgets in self._budgets.values() for budget in budgets})
        best = self._best(means, columns)
        passes: defaultdict[str, float] = defaultdict(float)
        for key, share in self._shares.items():
            for arm, of_arm in self._passes[key].items():
                passes[arm] += share * of_arm
        rows = []
        for arm, budgets in self._budgets.items():
            planned = self._num_seeds * sum(budgets) + max(self._tried.get(arm, 0.0), self._of_tuning[arm])
            num = sum(len(values.get((arm, budget), ())) for budget in budgets)
            state = "done" if num == self._num_seeds * len(budgets) else "at work" if passes[arm] else "waiting"
            cells = (self._settings.get(arm, ""), *(self._cell(values.get((arm, budget), ())) for budget in columns))
            rows.append(Row(arm, cells, state, min(passes[arm], planned), planned, is_best=arm == best))
        num, every = sum(map(len, values.values())), self._num_seeds * sum(map(len, self._budgets.values()))
        text = f"{num} of {every} results"
        if best is not None:
            at = max(budget for arm, budget in means if arm == best)
            text += f"; best so far {best}, {self._quality.phrase(means[best, at])} on validation data at {at:g} passes"
        found = sum(sum(self._passes[key].values()) for key in self._found)
        return Standing(text, ("learning rate", *(f"{budget:g} passes" for budget in columns)), tuple(rows), found)

    def _cell(self, values: Sequence[float]) -> str:
        """Return the mean over seeds. If some seeds are missing, add how many there are."""
        if not values:
            return ""
        suffix = f" ({len(values)}/{self._num_seeds})" if len(values) < self._num_seeds else ""
        return f"{self._quality.cell(statistics.fmean(values))}{suffix}"

    def _best(self, means: Mapping[tuple[str, float], float], budgets: Sequence[float]) -> str | None:
        """Return the best arm at the largest budget at which several arms have results."""
        for budget in reversed(budgets):
            arm_means = {arm: mean for (arm, at), mean in means.items() if at == budget and math.isfinite(mean)}
            if len(arm_means) > 1:
                return max(arm_means, key=lambda arm: self._quality.gain(arm_means[arm]))
        return None
