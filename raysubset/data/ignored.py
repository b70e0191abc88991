"""What the user wants left out of a data set: data.ignored."""

import fnmatch
from collections.abc import Iterable, Mapping
from typing import TypeVar

from raysubset.config import DataConfig, nearest

Name = TypeVar("Name", bound=str)
Value = TypeVar("Value")


class Ignored:
    """The patterns of data.ignored. It remembers which of them met something, so that a slip is not passed over."""

    def __init__(self, config: DataConfig) -> None:
        self._where = config.name
        self._patterns = [word.strip().rstrip("/") for word in (config.ignored or "").split(",") if word.strip()]
        self._met: set[str] = set()

    def matches(self, path: str) -> bool:
        """Return True if a pattern names this file or folder, or one around it, by its name or path."""
        if not self._patterns:
            return False
        parts = path.split("/")
        names = {*parts, *("/".join(parts[: depth + 1]) for depth in range(len(parts)))}
        met = {pattern for pattern in self._patterns for name in names if fnmatch.fnmatchcase(name, pattern)}
        self._met |= met
        return bool(met)

    def chosen(self, splits: Mapping[Name, Value]) -> dict[Name, Value]:
        """The splits that no pattern names, where patterns name nothing else.

        Raises:
            ValueError: as refuse_unmet() does.
        """
        chosen = self.without(splits)
        self.refuse_unmet(splits)
        return chosen

    def without(self, splits: Mapping[Name, Value]) -> dict[Name, Value]:
        """The splits that no pattern names."""
        self._met |= {pattern for pattern in self._patterns if pattern in splits}
        return {split: value for split, value in splits.items() if split not in self._patterns}

    def refuse_unmet(self, known: Iterable[str]) -> None:
        """Refuse patterns that met nothing.

        Args:
            known: names that might have been meant.

        Raises:
            ValueError: naming the pattern and the nearest name.
        """
        for pattern in self._patterns:
            if pattern not in self._met:
                hint = nearest(pattern, known)
                raise ValueError(f"data.ignored = {pattern}: {self._where} has no such split, file or folder{hint}")
