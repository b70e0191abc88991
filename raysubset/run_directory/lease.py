"""One driver a run: the lease that refuses a second one."""

import contextlib
import dataclasses
import errno
import fcntl
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from raysubset.config import from_tree
from raysubset.run_directory.directory import RunDirectory
from raysubset.run_directory.paths import CONFIG_PATH, LEASE_PATH, SESSIONS_PATH

logger = logging.getLogger(__name__)

RENEW_S = 10.0  # a lease is renewed this often …
DEAD_AFTER_S = 60.0  # … and dead when it was not for this long. Clocks of nodes must agree better than this
_SETTLE_S = 1.0  # where there are no locks: by then a rival that wrote its lease at the same time is seen

# What processes write that do not look at the lease: of runs, comparisons and sweeps
_OF_WORKERS = ("ledger", "rounds", "trunk", "fine_tuning", "conventional", "legs", "trials", "trunks", SESSIONS_PATH)


@dataclasses.dataclass(frozen=True)
class _Holder:
    """lease.json."""

    driver: str
    host: str
    pid: int
    process_started: str | None
    process_space: str
    since: float  # unix s
    renewed_at: float  # unix s


class Lease:
    """Keeps a second driver out of a run: a file that names the holder, renewed by a thread while it is held.

    A holder on this machine is dead when its process is; any other, when it has not renewed for a minute. On local
    storage a lock makes taking it exact. Elsewhere a rival may slip in within a second; whoever wrote last has it, and
    the other finds `lost` set at its next renewal and should stop.
    """

    def __init__(
        self, directory: RunDirectory, *, renew_s: float = RENEW_S, clock: Callable[[], float] = time.time
    ) -> None:
        self.lost: str | None = None  # why it is: another driver has it, or the run's folder is gone
        self._directory, self._renew_s, self._clock = directory, renew_s, clock
        self._stop = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name=f"lease of {directory.name}", daemon=True)
        self._record = {
            "driver": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_started": _process_started(os.getpid()),
            "process_space": _process_space(),
            "since": clock(),
        }

    def __enter__(self) -> "Lease":
        """Take it.

        Raises:
            ValueError: if another driver holds it.
        """
        with _alone(self._directory.local_path) as alone:
            holder = self._holder()
            if holder is not None and self._lives(holder):
                self._refuse(holder)
            self._write()
            if not alone:
                time.sleep(_SETTLE_S)
            holder = self._holder()
            if holder is not None and holder["driver"] != self._record["driver"]:
                self._refuse(holder)
        self._keeper.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._keeper.join()
        try:
            if self._directory.exists(LEASE_PATH) or self._directory.exists(CONFIG_PATH):
                self._give_back()
            else:  # the folder was deleted: what this driver's workers made of it again would pass for no run
                for path in _OF_WORKERS:
                    self._directory.delete(path)
        except OSError as error:  # must not hide why the block was left
            logger.warning("the lease of %s could not be given back and ends by itself: %s", self._directory.uri, error)

    def is_held(self) -> bool:
        """Whether a driver that lives holds it now."""
        holder = self._holder()
        return holder is not None and self._lives(holder)

    def _give_back(self) -> None:
        with _alone(self._directory.local_path):
            holder = self._holder()
            if holder is not None and holder["driver"] == self._record["driver"]:
                self._directory.delete(LEASE_PATH)

    def renew(self) -> None:
        """Say that the holder lives; sets `lost` instead where the lease is another's or the run's folder is gone."""
        if self._directory.exists(LEASE_PATH):  # not the folder, which actors make again where it is deleted under them
            with _alone(self._directory.local_path):
                holder = self._holder()
                if holder is None or holder["driver"] == self._record["driver"]:  # none: the file was damaged
                    self._write()
                    return
            self.lost = f"another driver has taken over {self._directory.uri}"
        else:
            self.lost = f"{self._directory.uri} is gone, deleted or no longer mounted"
        logger.error("%s; this driver stops", self.lost)

    def _keep(self) -> None:
        while not self.lost and not self._stop.wait(self._renew_s):
            try:
                self.renew()
            except OSError as error:
                logger.warning("the lease of %s could not be renewed, trying again: %s", self._directory.uri, error)

    def _holder(self) -> dict[str, Any] | None:
        """What the file says; None where there is none, or none that says it."""
        record = self._directory.read_json_or_none(LEASE_PATH)
        try:
            return None if record is None else dataclasses.asdict(from_tree(_Holder, record, noun="value of a lease"))
        except ValueError as error:
            logger.warning("%s in %s is damaged: %s; it holds nobody off", LEASE_PATH, self._directory.uri, error)
            return None

    def _write(self) -> None:
        self._directory.write_json(LEASE_PATH, self._record | {"renewed_at": self._clock()})

    def _lives(self, holder: Mapping[str, Any]) -> bool:
        if holder["process_space"] == self._record["process_space"]:
            started = _process_started(holder["pid"])
            if started != "":
                return started == holder["process_started"]
        return self._clock() - holder["renewed_at"] <= DEAD_AFTER_S

    def _refuse(self, holder: Mapping[str, Any]) -> NoReturn:
        since = datetime.fromtimestamp(holder["since"]).astimezone().isoformat(" ", "seconds")
        by = f"process {holder['pid']} on {holder['host']} since {since}"
        if holder["process_space"] != self._record["process_space"]:  # only its renewals tell
            ends_in_s = max(0.0, DEAD_AFTER_S - (self._clock() - holder["renewed_at"]))
            by += f" (if that has died, its lease ends in {ends_in_s:.0f} s)"
        raise ValueError(f"{self._directory.uri} is being written by {by}; wait for it, or choose another --name")


def _process_space() -> str:
    """Where a process id means the same process: one boot of one machine, one container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return socket.gethostname()


def _process_started(pid: int) -> str | None:
    """When a living process started, in ticks since boot; "" where the system does not tell; None if it is dead."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # another user's
        pass
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    state, *fields = stat.rpartition(")")[2].split()  # man 5 proc: field 3, and from field 4
    return None if state in "ZX" else fields[18]


@contextlib.contextmanager
def _alone(folder: Path | None) -> Iterator[bool]:
    """Keep other processes out of the same block; False on storage without locks, where nothing keeps them out."""
    if folder is None:
        yield False
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lease.lock").open("ab") as file:
        locked = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
            locked = False
        yield locked
