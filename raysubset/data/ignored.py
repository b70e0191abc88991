"""data.ignored: the splits, files and folders that the user leaves out of a data set."""

import fnmatch
from collections.abc import Iterable, Mapping
from typing import TypeVar

from raysubset.config import DataConfig, nearest
from raysubset.data.split import SplitName

Value = TypeVar("Value")


class Ignored:
    """The patterns of data.ignored. It records which of them matched, so that a mistyped pattern is refused."""

    def __init__(self, config: DataConfig) -> None:
        self._where = config.name
        self._patterns = [word.strip().rstrip("/") for word in (config.ignored or "").split(",") if word.strip()]
        self._matched: set[str] = set()

    def matches(self, path: str) -> bool:
        """Return True if a pattern names this file or folder, or one around it, by its name or path."""
        if not self._patterns:
            return False
        parts = path.split("/")
        names = {*parts, *("/".join(parts[: depth + 1]) for depth in range(len(parts)))}
        matching = {pattern for pattern in self._patterns for name in names if fnmatch.fnmatchcase(name, pattern)}
        self._matched |= matching
        return bool(matching)

    def chosen(self, splits: Mapping[SplitName, Value]) -> dict[SplitName, Value]:
        """Return the splits that no pattern names. Patterns may name nothing but splits.

        Raises:
            ValueError: as refuse_unmatched() does, and if the training split is named.
        """
        chosen = self.without(splits)
        if "train" in splits and "train" not in chosen:
            raise ValueError(f"data.ignored = train: {self._where} would have no training data left")
        self.refuse_unmatched(splits)
        return chosen

    def without(self, splits: Mapping[SplitName, Value]) -> dict[SplitName, Value]:
        """Return the splits that no pattern names."""
        self._matched |= {pattern for pattern in self._patterns if pattern in splits}
        return {split: value for split, value in splits.items() if split not in self._patterns}

    def refuse_unmatched(self, names: Iterable[str]) -> None:
        """Refuse patterns that matched nothing.

        Args:
            names: the names that the user may have meant.

        Raises:
            ValueError: with the pattern and the nearest name.
        """
        for pattern in self._patterns:
            if pattern not in self._matched:
                hint = nearest(pattern, names)
                raise ValueError(f"data.ignored = {pattern}: {self._where} has no such split, file or folder{hint}")
