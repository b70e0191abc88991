"""The results of a comparison: arms, speed-ups and verdicts, as in comparison.json."""

from collections.abc import Mapping
from typing import Any

from raysubset.pipeline.run_report import Shown

Record = dict[str, Any]


class ComparisonReport(Shown):
    """All numbers of a comparison. to_dict() returns comparison.json."""

    def __repr__(self) -> str:
        words = ", ".join(f"{clock} {verdict['word']}" for clock, verdict in self.verdicts.items())
        return f"<ComparisonReport {self.name}: {len(self.arms)} arms; {words}; {self.uri}>"

    @property
    def verdicts(self) -> Mapping[str, Record]:
        """By clock, "total" and "critical_path": word, text, arm, speed_up, is_smoke_test."""
        return self.record["verdicts"]

    @property
    def arms(self) -> tuple[Record, ...]:
        """For each arm key, title, role, settings, and points by budget with a run for each seed."""
        return tuple(self.record["arms"])

    @property
    def has_failed(self) -> bool:
        """Return True if a compared run failed, or a tuning run for another reason than that its loss diverged."""
        runs = (run for arm in self.arms for point in arm["points"] for run in point["runs"])
        tuning = ({"error": reason} for reason in self.record["failed"].values())
        return any(run["error"] for run in runs) or not all(map(has_diverged, tuning))


def has_diverged(run: Record) -> bool:
    """Return True if a run failed because its loss diverged, which is a result of its method."""
    return "DivergedError" in (run["error"] or "")
