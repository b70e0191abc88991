"""The results of a comparison: arms, speed-ups and verdicts, as in comparison.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raysubset.pipeline.run_report import Shown

Record = dict[str, Any]


@dataclass(frozen=True, repr=False)
class ComparisonReport(Shown):
    """All numbers of a comparison. to_dict() returns comparison.json."""

    name: str
    uri: str  # of the comparison's directory
    verdicts: Mapping[str, Record]  # by clock, "total" and "critical_path": word, text, arm, speed_up, is_smoke_test
    arms: tuple[Record, ...]  # key, title, role, settings, points by budget with a run for each seed
    record: Record  # everything, ready for JSON

    def __repr__(self) -> str:
        words = ", ".join(f"{clock} {verdict['word']}" for clock, verdict in self.verdicts.items())
        return f"<ComparisonReport {self.name}: {len(self.arms)} arms; {words}; {self.uri}>"

    @property
    def has_failed(self) -> bool:
        """Return True if a compared run failed, or a tuning run for another reason than that its loss diverged."""
        runs = (run for arm in self.arms for point in arm["points"] for run in point["runs"])
        reasons = self.record["failed"].values()
        return any(run["error"] for run in runs) or any("DivergedError" not in reason for reason in reasons)

    @classmethod
    def from_dict(cls, record: Record) -> "ComparisonReport":
        """Return the report of a comparison.json."""
        return cls(
            name=record["name"],
            uri=record["uri"],
            verdicts=record["verdicts"],
            arms=tuple(record["arms"]),
            record=record,
        )
