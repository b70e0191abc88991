"""Files of weights that this process has written or read of late: it need not fetch them again."""

import threading
from typing import Any

from raysubset.run_directory.seals import Seal

MOST_BYTES = 2**28  # of all that is kept; the oldest go first
WRITTEN = "written"  # in the place of a local file's version: not looked at since


class Recent:
    """Contents by file and seal; of a local file, whose content the operating system keeps, the version that was as
    its seal says. What is kept is of one digest, so a file that another process has replaced since is read anew."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], tuple[Seal, Any]] = {}
        self._num_bytes = 0
        self._lock = threading.Lock()

    def keep(self, uri: str, path: str, seal: Seal, content: Any) -> None:
        """Keep a file's content, if it is not too large, or the version of a local one."""
        with self._lock:
            self._drop((uri, path))
            if _num_bytes(content) > MOST_BYTES:
                return
            self._kept[uri, path] = seal, content
            self._num_bytes += _num_bytes(content)
            while self._num_bytes > MOST_BYTES:
                self._drop(next(iter(self._kept)))

    def find(self, uri: str, path: str, seal: Any) -> Any:
        """Return what is kept of this file with this seal; None where nothing is."""
        found, content = self._kept.get((uri, path), (None, None))
        return content if found is not None and found == seal else None

    def _drop(self, key: tuple[str, str]) -> None:
        _, content = self._kept.pop(key, (None, None))
        self._num_bytes -= _num_bytes(content)


def _num_bytes(content: Any) -> int:
    """What it holds in memory: nothing of a local file."""
    return len(content) if isinstance(content, bytes) else 0


RECENT = Recent()
