"""Run: one opened run, as its driver passes it on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raysubset.config import Config
from raysubset.data import FullSet
from raysubset.events import OnEvent
from raysubset.run_directory import RunDirectory
from raysubset.run_directory.ledger import Ledger


@dataclass(frozen=True)
class Run:
    """One opened run. The run's work depends on nothing else."""

    config: Config
    directory: RunDirectory
    full_set: FullSet
    full_set_ref: Sequence[Any]  # the full set in the object store: put_once()
    tell: OnEvent

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.directory)
