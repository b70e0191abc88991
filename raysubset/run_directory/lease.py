"""The lease of a run, which refuses a second driver."""

import contextlib
import errno
import fcntl
import logging
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from raysubset.run_directory.directory import RunDirectory
from raysubset.run_directory.paths import LEASE_PATH

logger = logging.getLogger(__name__)

RENEW_S = 10.0  # a lease is renewed this often …
DEAD_AFTER_S = 60.0  # … and dead if not renewed for this long. The clocks of nodes must agree better than this
_SETTLE_S = 1.0  # on storage without locks: after this time, a rival's lease that was written at once is visible


class Lease:
    """Keeps a second driver out of a run, by a file that names the holder and that a thread renews.

    A holder on this machine is dead if its process is; any other, if it has not renewed for a minute. On local storage
    a lock makes taking the lease exact. On other storage a rival may take it within the same second: the last to write
    holds the lease, and the other finds `lost` set at its next renewal and should stop.
    """

    def __init__(
        self, directory: RunDirectory, *, renew_s: float = RENEW_S, clock: Callable[[], float] = time.time
    ) -> None:
        self.lost: str | None = None  # the reason: another driver has the lease, or the run's folder is gone
        self._directory, self._renew_s, self._clock = directory, renew_s, clock
        self._written_at = math.inf
        self._stop = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name=f"lease of {directory.name}", daemon=True)
        self._record = {
            "driver": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_started": _process_start(os.getpid()),
            "process_space": _process_space(),
            "since": clock(),
        }

    def __enter__(self) -> "Lease":
        """Take the lease.

        Raises:
            ValueError: if another driver holds it.
        """
        if self._directory.local_path:
            self._directory.local_path.mkdir(parents=True, exist_ok=True)
        with _exclusive(self._directory.local_path) as is_locked:
            holder = self._holder()
            if holder is not None and self._is_alive(holder):
                self._refuse(holder)
            self._write()
            if not is_locked:
                time.sleep(_SETTLE_S)
            holder = self._holder()
            if holder is not None and not self._is_own(holder):
                self._refuse(holder)
        self._keeper.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._keeper.join()
        if self.lost:
            return
        try:
            with _exclusive(self._directory.local_path):
                if self._is_own(self._holder()):
                    self._directory.delete(LEASE_PATH)
        except OSError as error:  # must not hide the exception that left the block
            logger.warning("the lease of %s could not be released and will expire: %s", self._directory.uri, error)

    def check(self) -> None:
        """Stop a driver that has lost the lease. One that stood still for long, suspended or stopped, looks first.

        Raises:
            RuntimeError: if another driver has taken over, or the run's folder is gone.
        """
        if self._clock() - self._written_at > DEAD_AFTER_S:
            self._try_to_renew()
        if self.lost:
            raise RuntimeError(f"{self.lost}; this driver stops")

    def is_held(self) -> bool:
        """Return True if a living driver holds the lease now."""
        holder = self._holder()
        return holder is not None and self._is_alive(holder)

    def renew(self) -> None:
        """Write that the holder lives, or set `lost` if another driver has the lease or the run's folder is gone."""
        holder, uri = None, self._directory.uri
        with contextlib.suppress(FileNotFoundError), _exclusive(self._directory.local_path):
            holder = self._holder()
            is_damaged = holder is None and self._directory.exists(LEASE_PATH)
            if is_damaged or self._is_own(holder):
                self._write()
                return
        self.lost = f"another driver has taken over {uri}" if holder else f"{uri} is gone, deleted or no longer mounted"
        logger.error("%s; this driver stops", self.lost)

    def _keep(self) -> None:
        while not self.lost and not self._stop.wait(self._renew_s):
            self._try_to_renew()

    def _try_to_renew(self) -> None:
        try:
            self.renew()
        except OSError as error:
            logger.warning("the lease of %s could not be renewed, trying again: %s", self._directory.uri, error)

    def _holder(self) -> dict[str, Any] | None:
        """Return the holder that the file names; None if there is no file, or it is damaged."""
        return self._directory.read_json_or_none(LEASE_PATH)

    def _write(self) -> None:
        now = self._clock()
        self._directory.write_json(LEASE_PATH, self._record | {"renewed_at": now})
        self._written_at = now

    def _is_own(self, holder: Mapping[str, Any] | None) -> bool:
        return holder is not None and holder["driver"] == self._record["driver"]

    def _is_alive(self, holder: Mapping[str, Any]) -> bool:
        if holder["process_space"] == self._record["process_space"]:
            process_start = _process_start(holder["pid"])
            if process_start != "":
                return process_start == holder["process_started"]
        return self._clock() - holder["renewed_at"] <= DEAD_AFTER_S

    def _refuse(self, holder: Mapping[str, Any]) -> NoReturn:
        since = datetime.fromtimestamp(holder["since"]).astimezone().isoformat(" ", "seconds")
        by = f"process {holder['pid']} on {holder['host']} since {since}"
        if holder["process_space"] != self._record["process_space"]:  # only renewals show whether it lives
            ends_in_s = max(0.0, DEAD_AFTER_S - (self._clock() - holder["renewed_at"]))
            by += f" (if that has died, its lease ends in {ends_in_s:.0f} s)"
        raise ValueError(f"{self._directory.uri} is being written by {by}; wait for it, or choose another --name")


def _process_space() -> str:
    """Return the name of the space in which a process id is unique: one boot of one machine, one container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def _process_start(pid: int) -> str | None:
    """Return when a process started, in ticks since boot; "" if the system does not tell; None if it is dead."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # the process belongs to another user
        pass
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    state, *fields = stat.rpartition(")")[2].split()  # man 5 proc: field 3, and the fields from 4 on
    return None if state in "ZX" else fields[18]


@contextlib.contextmanager
def _exclusive(folder: Path | None) -> Iterator[bool]:
    """Keep other processes out of the same block. Yield False on storage without locks, which cannot do so.

    Raises:
        FileNotFoundError: if the folder is gone.
    """
    if folder is None:
        yield False
        return
    with (folder / ".lease.lock").open("ab") as file:
        is_locked = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
            is_locked = False
        yield is_locked
