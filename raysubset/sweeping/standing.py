"""How a sweep's trials stand while Ray Tune runs them: a table that fills in."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from raysubset.events import Row, Standing
from raysubset.quality import Quality

COLUMNS = ("stage", "passes", "validation loss")


class TrialsStanding:
    """Keeps what each trial last reported. The best trial is that of least validation loss."""

    def __init__(self, quality: Quality, planned: Mapping[str, float], found: Mapping[str, float]) -> None:
        """Begin with no trial started.

        Args:
            planned: the trials' passes, by name.
            found: by name, the passes that earlier commands did.
        """
        self._quality, self._planned = quality, planned
        self._found = sum(min(found[name], passes) for name, passes in planned.items())
        self._states: dict[str, Literal["waiting", "at work", "done", "failed"]] = dict.fromkeys(planned, "waiting")
        self._last: dict[str, dict[str, Any]] = {name: {"passes": found[name]} for name in planned}

    def update(
        self, name: str, state: Literal["at work", "done", "failed"], report: Mapping[str, Any] | None = None
    ) -> Standing:
        """Note a trial's state and report, and return the table."""
        self._states[name] = state
        self._last[name] |= report or {}
        losses = {trial: last.get("validation_loss", math.nan) for trial, last in self._last.items()}
        losses = {trial: loss for trial, loss in losses.items() if math.isfinite(loss)}
        best = min(losses, key=losses.__getitem__) if len(losses) > 1 else None
        num_ended = sum(state in ("done", "failed") for state in self._states.values())
        text = f"{num_ended} of {len(self._states)} trials ended"
        if best is not None:
            text += f"; best so far {best}, validation loss {losses[best]:.4f}"
        columns = COLUMNS if self._quality.name == "loss" else (*COLUMNS, self._quality.heading)
        rows = (self._row(trial, losses.get(trial), is_best=trial == best) for trial in self._planned)
        return Standing(text, columns, tuple(rows), self._found)

    def _row(self, name: str, loss: float | None, *, is_best: bool) -> Row:
        last, state, planned = self._last[name], self._states[name], self._planned[name]
        passes, value = last["passes"], last.get(f"validation_{self._quality.name}")
        cells = ["failed" if state == "failed" else last.get("stage", ""), f"{passes:.2f}" if passes else ""]
        cells.append("" if loss is None else f"{loss:.4f}")
        if self._quality.name != "loss":
            cells.append("" if value is None else self._quality.cell(value))
        done = min(passes, planned)
        planned = done if state in ("done", "failed") else planned  # it may have been stopped early
        return Row(name, tuple(cells), state, done, planned, is_best=is_best)
