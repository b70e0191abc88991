"""What came of a comparison: arms, speed-ups, verdicts; comparison.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class ComparisonReport:
    """All numbers of a comparison; to_dict() is comparison.json."""

    name: str
    uri: str  # of the comparison's directory
    verdicts: Mapping[str, Record]  # by clock, "total" and "critical_path": word, text, arm, speed_up, is_smoke_test
    arms: tuple[Record, ...]  # key, title, role, settings, points by budget with a run for each seed
    record: Record  # everything, JSON-able

    def to_dict(self) -> Record:
        """comparison.json."""
        return self.record

    @classmethod
    def from_dict(cls, record: Record) -> "ComparisonReport":
        """The inverse of to_dict()."""
        return cls(
            name=record["name"],
            uri=record["uri"],
            verdicts=record["verdicts"],
            arms=tuple(record["arms"]),
            record=record,
        )
