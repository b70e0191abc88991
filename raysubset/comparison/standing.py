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
        self._quality, self._num_seeds, self._budgets = quality, num_seeds, budgets
        self._planned = {arm: num_seeds * sum(of_arm) + tried.get(arm, 0.0) for arm, of_arm in budgets.items()}
        self._passes: defaultdict[str, dict[str, float]] = defaultdict(dict)  # of an arm's legs, by their keys
        self._finals: defaultdict[tuple[str, float], list[str]] = defaultdict(list)  # last legs by arm and budget
        self._settings: dict[str, str] = {}
        self._shares: dict[str, float] = {}  # how far legs are, by key
        self._values: dict[str, float] = {}  # of legs that are done; NaN if not finite or not measured
        self._found: set[str] = set()  # the legs that were already done

    def expect(self, arm: str, legs: Iterable[Leg], num_train: int, budget: float | None = None) -> None:
        """Note an arm's last legs to come, at a budget; without a budget they are for its tuning."""
        for last in legs:
            self._passes[arm] |= {leg.key: leg.passes(num_train) for leg in closure(last)}
            if budget is not None:
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
        columns = sorted({budget for budgets in self._budgets.values() for budget in budgets})
        best, text = self._best(columns)
        rows, num, every = list[Row](), 0, self._num_seeds * sum(map(len, self._budgets.values()))
        for arm, budgets in self._budgets.items():
            passes = sum(self._shares.get(key, 0.0) * of_leg for key, of_leg in self._passes[arm].items())
            planned = max(self._planned[arm], sum(self._passes[arm].values()))  # a grid may have grown
            num_done = sum(len(self._results(arm, budget)) for budget in budgets)
            state = "done" if num_done == self._num_seeds * len(budgets) else "at work" if passes else "waiting"
            cells = (self._settings.get(arm, ""), *(self._cell(self._results(arm, budget)) for budget in columns))
            rows.append(Row(arm, cells, state, passes, planned, is_best=arm == best))
            num += num_done
        found = sum(of_arm.get(key, 0.0) for of_arm in self._passes.values() for key in self._found)
        headings = ("learning rate", *(f"{budget:g} passes" for budget in columns))
        return Standing(f"{num} of {every} results{text}", headings, tuple(rows), found)

    def _results(self, arm: str, budget: float) -> list[float]:
        return [self._values[key] for key in self._finals[arm, budget] if key in self._values]

    def _cell(self, values: Sequence[float]) -> str:
        """Return the mean over seeds. If some seeds are missing, add how many there are."""
        if not values:
            return ""
        suffix = f" ({len(values)}/{self._num_seeds})" if len(values) < self._num_seeds else ""
        return f"{self._quality.cell(statistics.fmean(values))}{suffix}"

    def _best(self, budgets: Sequence[float]) -> tuple[str | None, str]:
        """Return the best arm at the largest budget at which several arms have results, and say so."""
        for budget in reversed(budgets):
            means = {arm: statistics.fmean(self._results(arm, budget) or [math.nan]) for arm in self._budgets}
            means = {arm: mean for arm, mean in means.items() if math.isfinite(mean)}
            if len(means) > 1:
                best = max(means, key=lambda arm: self._quality.gain(means[arm]))
                quality = self._quality.phrase(means[best])
                return best, f"; best so far {best}, {quality} on validation data at {budget:g} passes"
        return None, ""
