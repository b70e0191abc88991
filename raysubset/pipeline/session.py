"""A Command opens a run, sweep or comparison: alone in its directory, connected to the cluster, on the clock."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any, Literal, Self

from raysubset.cluster import connected, reached
from raysubset.config import Config, Learned, check_number, list_of
from raysubset.data import FullSet, load_full_set
from raysubset.errors import first_line
from raysubset.events import Event, Note, OnEvent, Stage
from raysubset.fingerprints import Identity
from raysubset.pipeline.run_report import environment
from raysubset.run_directory import SESSIONS_PATH, Lease, RunDirectory, StorageLost
from raysubset.run_directory.ledger import Ledger
from raysubset.tracking import refuse_missing
from raysubset.user_code.functions import refuse_import
from raysubset.user_code.given import is_given
from raysubset.user_code.source_files import held_code
from raysubset.work import weights_name
from raysubset.work.identity import identify, known_fingerprint


class Sessions:
    """Sum the seconds of a run, sweep or comparison over all its drivers; time between drivers is not counted.

    with Sessions(directory, lease, began=began) as sessions:      # writes this driver's seconds when the block ends
        tell = sessions.checked(tell)

    This driver's seconds are also written at events, every WRITE_S at most, so that little is lost if it is killed.
    """

    WRITE_S = 10.0

    def __init__(self, directory: RunDirectory, lease: Lease, *, began: float) -> None:
        """`began` is the time.perf_counter() at which this session began."""
        self._directory, self._lease, self._began, self._written_at = directory, lease, began, -math.inf
        earlier = directory.read_json_or_none(SESSIONS_PATH)
        self._session = {"started_at": time.time() - (time.perf_counter() - began), "startup_s": 0.0, "wall_s": 0.0}
        self._sessions: list[dict[str, float]] = [*(earlier["sessions"] if earlier else ()), self._session]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._lease.lost:
            with suppress(OSError):  # it must not hide why the run ends
                self.write()

    def checked(self, tell: OnEvent) -> OnEvent:
        """Return a `tell` that also writes a heartbeat, and raises RuntimeError once another driver has taken over."""

        def checked_tell(event: Event) -> None:
            self._lease.check()
            self.heartbeat()
            tell(event)

        return checked_tell

    def started_up(self) -> None:
        """Note the seconds until the first stage begins."""
        self._session["startup_s"] = time.perf_counter() - self._began

    def heartbeat(self) -> None:
        """Write this session's seconds, unless that was done within WRITE_S; failing storage does not end the run."""
        if time.perf_counter() - self._written_at >= self.WRITE_S:
            with suppress(OSError):  # the next heartbeat tries again
                self.write()

    def write(self) -> None:
        """Write this session's seconds. Raise RuntimeError once another driver has taken over."""
        self._lease.check()
        self._written_at = time.perf_counter()
        self._session["wall_s"] = self._written_at - self._began
        self._directory.write_json(SESSIONS_PATH, {"sessions": self._sessions})

    def seconds(self) -> dict[str, Any]:
        """Return the report's sums over the sessions, with this one up to its last writing."""
        startup, wall = (sum(session[name] for session in self._sessions) for name in ("startup_s", "wall_s"))
        return {"startup": startup, "wall": wall, "num_sessions": len(self._sessions)}


class Command:
    """What run(), sweep() and compare() have in common: a directory that one driver at a time works in, and a cluster.

    command = Command("run", config, on_event, fresh=False, accept_changed_code=False)
    identity = command.load([config], full_sets)
    with command.opened(identity, refuse_unplaceable) as sessions: ...
    """

    def __init__(
        self,
        kind: Literal["run", "sweep", "comparison"],
        config: Config,
        on_event: OnEvent | None,
        *,
        fresh: bool,
        accept_changed_code: bool,
    ) -> None:
        """Begin the session's time, and touch nothing.

        Raises:
            ValueError: if a tracker is not installed, or the user's own module calls this as it is imported.
        """
        self._began = time.perf_counter()
        refuse_import({"comparison": "compare()"}.get(kind, f"{kind}()"))
        refuse_missing(config.tracking)
        self.kind, self.config, self.fresh, self._accept_changed_code = kind, config, fresh, accept_changed_code
        self.tell: OnEvent = on_event or (lambda event: None)
        name = config.run_name() if kind == "run" else config.name or f"{config.run_name()}-{kind}"
        self.directory = RunDirectory(config.storage_path, name)

    @cached_property
    def _old_identity(self) -> Identity | None:
        return None if self.fresh else self.directory.read_identity()

    @property
    def shown_config(self) -> dict[str, Any]:
        """The config, without the credentials that a URI may hold."""
        return dataclasses.replace(self.config, storage_path=self.directory.shown_storage_path).to_dict()

    @property
    def _header(self) -> dict[str, Any]:
        """What config.json holds: no run takes the directory of a sweep for its own."""
        return self.shown_config | ({} if self.kind == "run" else {"kind": self.kind})

    def has_report(self, path: str) -> bool:
        """Return True if a command of this config has left its report at this path, and this one does not start over.

        Raises:
            ValueError: if the storage cannot be read.
        """
        try:
            return not self.fresh and self.directory.exists(path) and not self.directory.differs(self._header)
        except StorageLost:
            raise
        except OSError as error:
            text = f"cannot read {self.directory.uri}: {first_line(error)}; choose another --storage-path"
            raise ValueError(text) from error

    def chosen_seeds(self, seeds: int | Sequence[int], *, least: int) -> Sequence[int]:
        """Return the seeds themselves, each once; if `seeds` is their number, from the config's seed on.

        Raises:
            ValueError: if the number is below `least` or above 1000, or a seed is no whole number.
        """
        values = list_of("--seeds", seeds, int)
        if isinstance(seeds, Iterable):
            return list(dict.fromkeys(values))
        (num,) = values
        check_number("--seeds", num, f"[{least}, 1000]")
        return range(self.config.seed, self.config.seed + num)

    def tell_finished(self, configs: Iterable[Config], full_sets: dict[Learned, FullSet]) -> None:
        """Say that there is nothing to do.

        Raises:
            ValueError: if the data or code of these configs is other than what the report is of.
        """
        identity = identify(configs, full_sets, self._old_identity)
        self.directory.refuse_changed(identity, accept_changed_code=self._accept_changed_code)
        self.tell(Note(f"{self.directory.uri} is finished: this is its report (--fresh starts over)"))

    def load(self, configs: Iterable[Config], full_sets: dict[Learned, FullSet]) -> Identity:
        """Load the full sets of these configs that are not in full_sets yet. Return what their names stand for.

        The sets take with them what weights to start from were now, or when a sweep that gave them began, so that a
        process that reads the file later finds out whether it was replaced.
        """
        configs = list(configs)
        for config in configs:
            if (learned := config.learned) not in full_sets:
                full_sets[learned] = load_full_set(*learned, known=known_fingerprint(self._old_identity, config))
        identity = identify(configs, full_sets, self._old_identity)
        named = (weights_name(config.model) for config in configs if config.model.weights)
        start_weights = {name: identity.data[name] for name in named}
        for learned, full_set in full_sets.items():
            first = start_weights | dict(full_set.start_weights)
            full_sets[learned] = dataclasses.replace(full_set, start_weights=first)
        return identity

    @contextmanager
    def opened(
        self, identity: Identity, refuse_unplaceable: Callable[[RunDirectory | None], None]
    ) -> Iterator[Sessions]:
        """Create or join what is in the directory, and connect to the cluster. If this process dies, its lease expires.

        Args:
            refuse_unplaceable: raises a ValueError if something can never be placed, before a cluster starts. It gets
                the directory; None if nothing there counts.

        Raises:
            ValueError: the user's mistake, such as another config, or an address where no cluster answers; or if
                another driver is at work in the directory.
        """
        directory, tell = self.directory, self.tell
        directory.check_writable()
        with reached(self.config.cluster, tell):
            refuse_unplaceable(None if self.fresh else directory)
            with Lease(directory) as lease:
                options = {"fresh": self.fresh, "accept_changed_code": self._accept_changed_code}
                resumed = directory.open(self._header, environment(), identity, **options)
                tell(Stage(f"{'resuming' if resumed else self.kind} {directory.uri}"))
                if resumed:
                    Ledger(directory).close_lost()
                sessions = Sessions(directory, lease, began=self._began)
                code = {name: table for name, table in identity.code.items() if not is_given(name)}
                with sessions, held_code(code), connected(self.config.cluster, sessions.checked(tell)):
                    yield sessions
        tell(Note(f"report: {directory.uri}"))

    def leave(self, path: str, record: dict[str, Any], sessions: Sessions) -> dict[str, Any]:
        """Write the report of a sweep or comparison, headed by what it is of. Return it as the file holds it."""
        head = {"kind": self.kind, "name": self.directory.name, "uri": self.directory.uri, "config": self.shown_config}
        sessions.write()
        self.directory.write_json(path, head | record | {"seconds": sessions.seconds()})
        return self.directory.read_json(path)
