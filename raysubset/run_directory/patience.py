"""Remote storage that is asked again while it does not answer.

storage = Patient(filesystem, Patience("s3://bucket"))
storage.write("bucket/run/a.json", data)  # as often as it takes, for PATIENCE_S
pafs.PyFileSystem(storage)                # the same for Ray Train, which wants a file system
"""

import copy
import logging
import re
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from raysubset.errors import first_line

logger = logging.getLogger(__name__)

PATIENCE_S = 60.0  # no longer than a lease lives without renewal: later another driver may have the run
FIRST_PAUSE_S, MOST_PAUSE_S = 1.0, 10.0  # doubled each time; pyarrow tries three times or for seconds before it raises

# What pyarrow's file systems raise has no error number, but these words: of S3, Google and Azure, and when none answers
_MAY_PASS = re.compile(
    r"AWS Error (\w+ \(HTTP status (408|429|5\d\d)\)|SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_|THROTTLING|REQUEST_TIME)"
    r"|Status\((UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|INTERNAL)|Azure Error: \[\w*\] (408|429|5\d\d)"
)
_UNREACHABLE = re.compile(r"AWS Error NETWORK_CONNECTION|CURL error|Azure Error: \[\w*\] Fail")
_OF_THE_FILE = re.compile(r"^.*?(?=AWS Error|Azure Error|google::)")  # what comes before the cause
_MOST_CHARACTERS = 160

T = TypeVar("T")


class StorageLost(OSError):
    """Storage has not answered for PATIENCE_S; the message says so in a line, with the way out."""


class Patience:
    """Takes a step again while the storage does not answer.

    From the first step that fails, all steps share PATIENCE_S and one warning; then each is taken once, until one
    succeeds. What would fail in the same way is raised at once: a missing file, no permission; and an address at which
    nothing has ever answered, which may be a mistake. Pickled, it has answered, to whoever pickled it.
    """

    def __init__(self, name: str, *, has_answered: bool = False) -> None:
        """The name of the storage is shown, so it holds no secrets."""
        self.name, self.has_answered = name, has_answered
        self._silent_since: float | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(Patience, has_answered=True), (self.name,)

    def take(self, step: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """What the step returns.

        Raises:
            StorageLost: if the storage has not answered for PATIENCE_S.
            OSError: if the step failed, and would again.
        """
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                result = step(*arguments, **options)
            except OSError as error:
                if not self._may_pass(error):
                    raise
                self._note_silence(error)
            else:
                self._hear()
                return result
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, MOST_PAUSE_S)

    def _may_pass(self, error: OSError) -> bool:
        if isinstance(error, ConnectionError | TimeoutError) or _UNREACHABLE.search(str(error)):
            return self.has_answered
        if error.errno is None and _MAY_PASS.search(str(error)):
            return True
        self._hear()
        return False

    def _hear(self) -> None:
        self.has_answered, self._silent_since = True, None

    def _note_silence(self, error: OSError) -> None:
        """Say so the first time; StorageLost after PATIENCE_S."""
        now, cause = time.monotonic(), _OF_THE_FILE.sub("", first_line(error))[:_MOST_CHARACTERS].rstrip(":;. ")
        with self._lock:
            since = self._silent_since
            if since is None:  # another thread may hear the storage between any two lines
                self._silent_since = now
        if since is None:
            text = "storage %s does not answer (%s): trying again for up to %.0f s"
            logger.warning(text, self.name, cause, PATIENCE_S)
        elif now - since > PATIENCE_S:
            text = f"storage {self.name} has not answered for {now - since:.0f} s ({cause})"
            raise StorageLost(f"{text}; what was done is kept: the same command resumes once it answers") from error


class Patient(pafs.FileSystemHandler):
    """A file system whose steps are taken with patience; files are read and written whole."""

    def __init__(self, filesystem: pafs.FileSystem, patience: Patience) -> None:
        self._filesystem, self._take = filesystem, patience.take

    def write(self, path: str, data: Any) -> None:
        """Replace a file, in one write and the close that makes it visible: no exception comes between parts of it."""

        def write() -> None:
            with self._filesystem.open_output_stream(path, compression=None) as stream:
                stream.write(data)

        self._take(write)

    def read(self, path: str) -> bytes:
        """A file's content; FileNotFoundError where there is none."""

        def read() -> bytes:
            with self._filesystem.open_input_file(path) as file:  # its size is asked for first: two requests, not many
                return file.read()

        return self._take(read)

    # What pyarrow asks of a handler

    def get_type_name(self) -> str:
        return self._filesystem.type_name

    def normalize_path(self, path: str) -> str:
        return self._filesystem.normalize_path(path)

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        return self._take(self._filesystem.get_file_info, paths)

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        return self._take(self._filesystem.get_file_info, selector)

    def create_dir(self, path: str, recursive: bool) -> None:
        self._take(self._filesystem.create_dir, path, recursive=recursive)

    def delete_dir(self, path: str) -> None:
        self._take(self._filesystem.delete_dir, path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self._take(self._filesystem.delete_dir_contents, path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError("a run has no business there")

    def delete_file(self, path: str) -> None:
        self._take(self._filesystem.delete_file, path)

    def move(self, source: str, destination: str) -> None:
        self._take(self._filesystem.move, source, destination)

    def copy_file(self, source: str, destination: str) -> None:
        self._take(self._filesystem.copy_file, source, destination)

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return pa.BufferReader(self.read(path))

    def open_input_file(self, path: str) -> pa.NativeFile:
        return pa.BufferReader(self.read(path))

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        return pa.PythonFile(_Written(self, path), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        raise NotImplementedError("object stores append nothing")


def opened(uri: str, patience: Patience) -> tuple[pafs.PyFileSystem, str]:
    """The file system of a URI, and the path in it.

    Raises:
        ArrowInvalid, ImportError: if it is no URI of a file system; the message shows it whole.
    """
    if uri.startswith(("gs://", "gcs://")) and "retry_limit_seconds=" not in uri:  # its own limit is 15 minutes
        uri = f"{uri}{'&' if '?' in uri else '?'}retry_limit_seconds=6"
    opening = Patience(patience.name, has_answered=patience.has_answered)  # which asks S3 alone, for the region
    filesystem, path = opening.take(pafs.FileSystem.from_uri, uri)
    if isinstance(filesystem, pafs.S3FileSystem):
        # Made of its parts, it tries 3 times; by a URI 31 times, which of a server that is silent takes 99 s
        quick = copy.copy(filesystem)
        filesystem = quick if quick == filesystem else filesystem  # some options get lost
    return pafs.PyFileSystem(Patient(filesystem, patience)), path


class _Written:
    """A file that goes to the storage when it is closed."""

    def __init__(self, storage: Patient, path: str) -> None:
        self._storage, self._path, self._sink, self.closed = storage, path, pa.BufferOutputStream(), False

    def write(self, data: Any) -> int:
        return self._sink.write(data)

    def flush(self) -> None: ...

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._storage.write(self._path, self._sink.getvalue())
