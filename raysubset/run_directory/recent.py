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
        self._kept: dict[tuple[str, str], tuple[Seal, int, Any]] = {}
        self._lock = threading.Lock()

    def keep(self, uri: str, path: str, seal: Seal, num_bytes: int, content: Any) -> None:
        """Keep a file's content, or the version of a local one, if it is not too large."""
        with self._lock:
            self._kept.pop((uri, path), None)
            self._kept[uri, path] = seal, num_bytes, content
            while sum(size for _, size, _ in self._kept.values()) > MOST_BYTES:
                del self._kept[next(iter(self._kept))]

    def find(self, uri: str, path: str, seal: Any) -> Any:
        """Return what is kept of this file with this seal; None where nothing is."""
        found, _, content = self._kept.get((uri, path), (None, 0, None))
        return content if found is not None and found == seal else None


RECENT = Recent()
