"""A cache of the weights files that this process wrote or read lately, so that it need not fetch them again."""

import threading
from typing import Any

from raysubset.run_directory.seals import Seal

MOST_BYTES = 2**28  # of all contents; the oldest go first
WRITTEN = "written"  # stands for the version of a local file that was written and not looked at since


class Recent:
    """Contents by file and seal. Of a local file, which the system caches, only the version that matched its seal.

    An entry holds for one seal only, so that a file that another process has replaced is read again.
    """

    def __init__(self) -> None:
        self._contents: dict[tuple[str, str], tuple[Seal, Any]] = {}
        self._num_bytes = 0  # of all contents
        self._lock = threading.Lock()
        self.frozen: dict[tuple[str, str, Seal], Any] = {}  # one run's tensors that no training changes, of any size
        # The last weights that were added up, of any size, and the file and seal that they stand for
        self.sum: tuple[tuple[str, str, Seal] | None, Any] = (None, {})

    def keep(self, uri: str, path: str, seal: Seal, content: Any) -> None:
        """Keep a file's content, unless it is too large, or the version of a local file."""
        with self._lock:
            self._forget((uri, path))
            if len(content) > MOST_BYTES:
                return
            self._contents[uri, path] = seal, content
            self._num_bytes += len(content)
            while self._num_bytes > MOST_BYTES:
                self._forget(next(iter(self._contents)))

    def _forget(self, file: tuple[str, str]) -> None:
        _, content = self._contents.pop(file, (None, ""))
        self._num_bytes -= len(content)

    def find(self, uri: str, path: str, seal: Any) -> Any:
        """Return the content or version kept for this file and seal; None if there is none."""
        kept_seal, content = self._contents.get((uri, path), (None, None))
        return content if kept_seal is not None and kept_seal == seal else None


RECENT = Recent()
