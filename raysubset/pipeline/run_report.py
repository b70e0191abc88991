"""Gather the numbers of a finished run from its ledger and records."""

import os
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from raysubset.data import FullSet
from raysubset.quality import quality_of
from raysubset.run_directory.ledger import LOST, Work, by_stage, critical_path, total_cost
from raysubset.training import Metrics

if TYPE_CHECKING:
    from raysubset.trained_model import TrainedModel


@dataclass(frozen=True, repr=False)
class Shown:
    """A report that can be shown: as its command prints it, and as tables in a notebook."""

    record: dict[str, Any]  # everything, as the report's JSON file holds it

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Self:
        """Build a report from what to_dict() returns."""
        return cls(record)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as its JSON file holds it."""
        return self.record

    @property
    def name(self) -> str:
        return self.record["name"]

    @property
    def uri(self) -> str:
        """The directory's path or URI."""
        return self.record["uri"]

    def show(self) -> None:
        """Print the report as its command does."""
        _screen().print_report(self.record)

    def _repr_html_(self) -> str:
        return _screen().html_of(self.record)


def _screen() -> Any:
    """Import the module that draws reports: a run alone does not need it."""
    return import_module("raysubset.cli.screen")


class RunReport(Shown):
    """All numbers of a finished run; to_dict() is report.json."""

    def __repr__(self) -> str:
        quality = quality_of(self.record)
        passes = f"{self.passes:.2f} passes, {self.critical_path_passes:.2f} on the critical path"
        test = quality.phrase(self.record["test"][quality.name])
        return f"<RunReport {self.name}: test {test} for {passes}; {self.uri}>"

    @property
    def test(self) -> Metrics:
        """Metrics of the final model on the test split, which is read for nothing else."""
        return Metrics.from_dict(self.record["test"])

    @property
    def validation(self) -> Metrics:
        """Metrics of the final model on the validation split."""
        return Metrics.from_dict(self.record["validation"])

    @property
    def passes(self) -> float:
        """Passes of the whole run: every attempt, evaluation and candidate counted."""
        return self.record["cost"]["passes"]

    @property
    def critical_path_passes(self) -> float:
        """Passes as if every subset had a device of its own."""
        return self.record["cost"]["critical_path_passes"]

    @property
    def device_s(self) -> float:
        """Seconds of work on all devices."""
        return self.record["cost"]["device_s"]

    def load_model(self, **options: Any) -> "TrainedModel":
        """Load the final model, ready to predict: load_model() of the run's directory, with its options."""
        from raysubset.trained_model import load_model

        return load_model(self.uri, **options)


def data_record(full_set: FullSet) -> dict[str, Any]:
    """Return the report's record of the data."""
    return {
        "name": full_set.name,
        "num_train": len(full_set.train),
        "num_validation": len(full_set.validation),
        "num_test": len(full_set.test),
        **full_set.task.describe(),
        **({"augmentation": full_set.augmentation.reference} if full_set.augmentation else {}),
        "notes": [note.to_dict() for note in full_set.advice],
    }


def task_record(full_set: FullSet) -> dict[str, Any]:
    """Return the report's record of the task: its name, its loss in words, and its quality for quality_of()."""
    task = full_set.task
    record = {"name": task.name, "loss": task.loss_name, "quality": full_set.quality.to_dict()}
    return record | ({"compares_examples": True} if task.compares_examples else {})


def cost_record(
    works: Sequence[Work], num_train: int, forward_share: float, *, overlap: bool, lacking: Sequence[str] = ()
) -> dict[str, Any]:
    """Return all costs in passes over `num_train` examples, seconds and bytes, in total and for each stage.

    Args:
        overlap: rounds.overlap, which shortens the critical path.
        lacking: the ledger's damaged and missing entries, whose costs are not counted.
    """

    def sums(some: Sequence[Work]) -> dict[str, Any]:
        """Return the costs that a run and each of its stages have, on both clocks."""
        total = total_cost(some)
        return {
            "passes": total.passes(num_train, forward_share),
            "critical_path_passes": critical_path(
                some, lambda work: work.critical_passes(num_train, forward_share), overlap=overlap
            ),
            "num_steps": total.num_steps,
            "device_s": total.device_s,
        }

    return sums(works) | {
        "lost_passes": total_cost(work for work in works if work.outcome in LOST).passes(num_train, forward_share),
        "critical_path_s": critical_path(works, lambda work: work.wall_s, overlap=overlap),
        "num_network_bytes": sum(work.num_network_bytes for work in works),
        **({"lacking": list(lacking)} if lacking else {}),
        "stages": [
            sums(entries)
            | {
                "stage": stage,
                "wall_s": max(work.started_at + work.wall_s for work in entries) - entries[0].started_at,
                "waited_s": sum(work.waited_s for work in entries),
                "num_attempts": len(entries),
                "num_lost": sum(work.outcome in LOST for work in entries),
            }
            for stage, entries in by_stage(works).items()
        ],
    }


def environment() -> dict[str, Any]:
    """Return the versions, the commit and the machine of the driver."""
    packages = {}
    for package in ("raysubset", "ray", "torch", "torchvision", "pyarrow", "numpy"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = None  # not installed, but run from a source tree
    return {
        "python": platform.python_version(),
        "packages": packages,
        "commit": _commit(),
        "platform": platform.platform(),
        "num_cpus": os.cpu_count(),
        "started_at": time.time(),
    }


def _commit() -> str | None:
    """Return the commit of the package's source tree, with "-dirty" if it was changed; None if it was installed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        git = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return git.stdout.strip() or None
