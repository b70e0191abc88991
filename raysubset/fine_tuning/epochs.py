"""Epochs: reports each epoch of a Ray Train stage, as its first worker adds it to the history in storage."""

from typing import Any

from raysubset.events import EpochDone, OnEvent
from raysubset.quality import Quality, metrics_in_words
from raysubset.run_directory import RunDirectory, history_path


class Epochs:
    """Reports each epoch of a stage once; epochs that were there before are not reported."""

    def __init__(self, directory: RunDirectory, stage: str, *, quality: Quality, tell: OnEvent) -> None:
        self._directory, self._stage, self._quality, self._tell = directory, stage, quality, tell
        self.num = len(self._history())

    def tell_new(self) -> None:
        """Report the epochs that were added since the last call."""
        try:
            entries = self._history()
        except OSError:  # the storage may answer the next time
            return
        for entry in entries[self.num :]:
            self.num += 1
            loss = "not finite" if entry["loss"] is None else f"{entry['loss']:.4f}"
            text = f"{self._stage}: epoch {entry['epoch']:g}, loss {loss}, validation "
            self._tell(EpochDone(text + metrics_in_words(entry["validation"], self._quality), self._stage, entry))

    def _history(self) -> list[dict[str, Any]]:
        return self._directory.read_json_or_none(history_path(self._stage)) or []
