"""Send a run to its trackers, each in a thread of its own, so that a slow or failing tracker delays nothing else."""

import contextlib
import dataclasses
import importlib.util
import logging
import queue
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from raysubset.config import Config, TrackingConfig, flatten
from raysubset.errors import one_line
from raysubset.events import Event, Note, OnEvent
from raysubset.quality import Quality, quality_of
from raysubset.run_directory import (
    COMPARISON_PATH,
    CONFIG_PATH,
    MODEL_PATH,
    MODEL_RECORD_PATH,
    REPORT_PATH,
    TRACKING_FOLDER,
    RunDirectory,
)
from raysubset.tracking.mlflow_runs import MLflowRun
from raysubset.tracking.records import (
    Curves,
    Header,
    Point,
    Record,
    Result,
    comparison_points,
    comparison_summary,
    run_summary,
)
from raysubset.tracking.wandb_runs import WandbRun

logger = logging.getLogger(__name__)

PACKAGES = {"mlflow": "mlflow-skinny", "wandb": "wandb"}
FILES = (CONFIG_PATH, REPORT_PATH, COMPARISON_PATH, MODEL_RECORD_PATH, MODEL_PATH)  # sent if they exist
END_S = 60.0  # for a tracker to receive what remains at the end
STOP_S = 2.0  # the same if the run was stopped: `ray job stop` leaves three seconds


class Tracker(Protocol):
    """A run of a tracker. Its methods are called in this order, by one thread, and may raise anything."""

    def begin(self, header: Header, run_id: str | None) -> str: ...
    def log(self, points: Sequence[Point]) -> None: ...
    def end(self, result: Result) -> None: ...


def refuse_missing(config: TrackingConfig) -> None:
    """Refuse trackers that are not installed, before anything is run.

    Raises:
        ValueError: if a requested tracker is not installed.
    """
    for name in config.names():
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder "wandb", which wandb leaves behind, is a namespace package
            raise ValueError(
                f"tracking.to={config.to} needs {name}, which is not installed: pip install {PACKAGES[name]}, or set "
                "tracking.to=none"
            )


OpenTracker = Callable[[str, TrackingConfig], Tracker]


def open_tracker(name: str, config: TrackingConfig) -> Tracker:
    """Create the tracker of that name; its run is not begun."""
    return MLflowRun(config.uri) if name == "mlflow" else WandbRun()


class _Follower(threading.Thread):
    """Does jobs for one tracker in their order, in a thread that dies with the process."""

    def __init__(self, name: str, begin: Callable[[], Tracker]) -> None:
        super().__init__(name=name, daemon=True)
        self.jobs: queue.SimpleQueue[Callable[[Tracker], None] | None] = queue.SimpleQueue()  # None: the last is done
        self.failure: str | None = None
        self._begin = begin

    def run(self) -> None:
        try:
            tracker = self._begin()
            while (job := self.jobs.get()) is not None:
                job(tracker)
        except Exception as error:  # of any type: others' code and servers must not end a run
            logger.debug("%s failed", self.name, exc_info=True)
            self.failure = one_line(error)


class _Following:
    """All trackers of one run. One that fails gets no more jobs: this is one warning, sent with the next event."""

    def __init__(
        self,
        config: Config,
        directory: RunDirectory,
        tell: OnEvent,
        names: Sequence[str],
        tags: Mapping[str, str],
        make: OpenTracker,
    ) -> None:
        self._tell, self._directory = tell, directory
        header = Header(
            name=directory.name,
            project=config.tracking.project,
            group=config.tracking.group,
            parameters=flatten(directory.read_config()),  # its storage path has no credentials
            tags={"raysubset.uri": directory.uri, **tags},
            folder=_local_folder(directory),
        )

        def begin(name: str) -> Tracker:
            tracker = make(name, config.tracking)
            run_id = tracker.begin(header, _record(directory, name).get("run_id"))
            directory.write_json(_record_path(name), {"run_id": run_id})
            return tracker

        self._followers = [_Follower(name, partial(begin, name)) for name in names]
        for follower in self._followers:
            follower.start()

    def log(self, points: Sequence[Point]) -> None:
        for follower in self._followers if points else ():
            follower.jobs.put(lambda tracker: tracker.log(points))
        self._warn()

    def end(self, result: Result) -> None:
        """Send the result and wait until the trackers have everything, at most END_S or STOP_S each."""
        timeout_s = STOP_S if result.outcome == "stopped" else END_S
        for follower in self._followers:
            follower.jobs.put(partial(self._end, follower.name, result))
            follower.jobs.put(None)
        for follower in self._followers:
            follower.join(timeout_s)
            if follower.is_alive():
                follower.failure = f"no answer within {timeout_s:g} s"
        self._warn()

    def _end(self, name: str, result: Result, tracker: Tracker) -> None:
        if result.outcome != "finished":
            tracker.end(result)
            return
        with _local_files(self._directory) as local_paths:
            tracker.end(dataclasses.replace(result, files=local_paths))
        self._directory.write_json(_record_path(name), {**_record(self._directory, name), "finished": True})

    def _warn(self) -> None:
        for follower in [follower for follower in self._followers if follower.failure is not None]:
            self._followers.remove(follower)
            text = f"{follower.name} no longer follows {self._directory.uri}, which continues: {follower.failure}"
            self._tell(Note(text, is_warning=True))


def _record_path(name: str) -> str:
    return f"{TRACKING_FOLDER}/{name}.json"


def _record(directory: RunDirectory, name: str) -> Record:
    """Return the tracker's run_id and whether it has the finished run, as far as they are known."""
    return directory.read_json_or_none(_record_path(name)) or {}


@contextlib.contextmanager
def tracked(
    config: Config, directory: RunDirectory, tell: OnEvent, *, quality: Quality, make: OpenTracker = open_tracker
) -> Iterator[OnEvent]:
    """Yield a `tell` that sends events to the requested trackers, then to `tell`; send the report when the block ends.

    A resumed run continues the same runs of its trackers, whose ids are kept in the run directory; a tracker that has
    the finished run is left alone. A tracker's failure never reaches the run: it is one warning. If this process dies,
    trackers show the run as running until it is resumed.
    """
    names = [name for name in config.tracking.names() if not _record(directory, name).get("finished")]
    if not names:
        yield tell
        return
    following = _Following(config, directory, tell, names, {"raysubset.method": config.method}, make)
    curves = Curves(config, quality)

    def tell_all(event: Event) -> None:
        following.log(list(curves.points(event)))
        tell(event)

    try:
        yield tell_all
    except Exception:
        following.end(Result("failed"))
        raise
    except BaseException:  # Ctrl-C, a signal, or the sweep's end of a trial
        following.end(Result("stopped"))
        raise
    record = directory.read_json_or_none(REPORT_PATH)  # a trunk alone has none
    following.end(Result("finished", summary={} if record is None else run_summary(record)))


def track_finished(config: Config, directory: RunDirectory, tell: OnEvent) -> None:
    """Send a finished run's numbers and files, but no curves, to requested trackers that do not have them."""
    with tracked(config, directory, tell, quality=quality_of(directory.read_json(REPORT_PATH))):
        pass


def track_comparison(config: Config, directory: RunDirectory, record: Record, tell: OnEvent) -> None:
    """Send a finished comparison's points, speed-ups and verdicts to the requested trackers, warning of failures."""
    names = config.tracking.names()
    if not names:
        return
    following = _Following(config, directory, tell, names, {"raysubset.method": "comparison"}, open_tracker)
    following.log(list(comparison_points(record)))
    summary, tags = comparison_summary(record)
    following.end(Result("finished", summary=summary, tags=tags))


def _local_folder(directory: RunDirectory) -> str | None:
    """Create the folder for wandb's own files; None if the storage is remote."""
    if directory.local_path is None:
        return None
    folder = directory.local_path / TRACKING_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


@contextlib.contextmanager
def _local_files(directory: RunDirectory) -> Iterator[tuple[str, ...]]:
    """Yield local paths of the run's FILES that exist; copies if the storage is remote."""
    paths = [path for path in FILES if directory.exists(path)]
    if directory.local_path is not None:
        yield tuple(str(directory.local_path / path) for path in paths)
        return
    with tempfile.TemporaryDirectory() as folder:
        copies = [Path(folder, Path(path).name) for path in paths]
        for path, copy in zip(paths, copies, strict=True):
            copy.write_bytes(directory.read_bytes(path))
        yield tuple(map(str, copies))
