"""Requests to remote storage that are repeated while it does not answer.

storage = Patient(filesystem, Patience("s3://bucket"))
storage.write("bucket/run/a.json", data)  # as often as needed, for PATIENCE_S
pafs.PyFileSystem(storage)                # the same for Ray Train, which needs a file system
"""

import copy
import errno
import io
import logging
import re
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

# pyarrow's file systems raise errors without a number, but with these words, for S3, Google and Azure
_MAY_PASS = re.compile(
    r"AWS Error (\w+ \(HTTP status (408|429|5\d\d)\)|SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_|THROTTLING|REQUEST_TIME)"
    r"|Status\((UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|INTERNAL)|Azure Error: \[\w*\] (408|429|5\d\d)"
)
_UNREACHABLE = re.compile(r"AWS Error NETWORK_CONNECTION|CURL error|Azure Error: \[\w*\] Fail")
_BEFORE_CAUSE = re.compile(r"^.*?(?=AWS Error|Azure Error|google::)")  # the part of a message about the file
_MOST_CHARACTERS = 160

T = TypeVar("T")


class StorageLost(OSError):
    """Storage has not answered for PATIENCE_S. The message is one line, with the way out."""


def is_unusable(error: BaseException | None) -> bool:
    """Return True if storage is full, read-only or silent, so that other work would fail as well."""
    return isinstance(error, StorageLost) or (
        isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    )


class Patience:
    """Repeats a step while the storage does not answer.

    From the first step that fails, all steps share PATIENCE_S and one warning. After that each step is tried once,
    until one succeeds. An error that would come again is raised at once: a missing file, a missing permission, or an
    address that has never answered, which may be a mistake. A pickled copy counts as having had an answer.
    """

    def __init__(self, name: str, *, has_answered: bool = False) -> None:
        """Set the name of the storage. It is shown in messages, so it must hold no secrets."""
        self.name, self.has_answered = name, has_answered
        self._silent_since: float | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(Patience, has_answered=True), (self.name,)

    def take(self, step: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Return the result of the step.

        Raises:
            StorageLost: if the storage has not answered for PATIENCE_S.
            OSError: if the step failed, and would fail again.
        """
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                result = step(*arguments, **options)
                self._note_answer()
                return result
            except OSError as error:
                if not self._may_pass(error):
                    raise
                self._note_silence(error)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, MOST_PAUSE_S)

    def _may_pass(self, error: OSError) -> bool:
        if isinstance(error, ConnectionError | TimeoutError) or _UNREACHABLE.search(str(error)):
            return self.has_answered
        if error.errno is None and _MAY_PASS.search(str(error)):
            return True
        self._note_answer()
        return False

    def _note_answer(self) -> None:
        self.has_answered, self._silent_since = True, None

    def _note_silence(self, error: OSError) -> None:
        """Log the first failure as a warning. Raise StorageLost after PATIENCE_S."""
        now, cause = time.monotonic(), _BEFORE_CAUSE.sub("", first_line(error))[:_MOST_CHARACTERS].rstrip(":;. ")
        since = self._silent_since  # another thread may get an answer between any two lines
        if since is None:
            self._silent_since = now
            text = "storage %s does not answer (%s): trying again for up to %.0f s"
            logger.warning(text, self.name, cause, PATIENCE_S)
        elif now - since > PATIENCE_S:
            text = f"storage {self.name} has not answered for {now - since:.0f} s ({cause})"
            raise StorageLost(f"{text}; finished work is kept: the same command resumes once it answers") from error


class Patient(pafs.FileSystemHandler):
    """A file system whose steps are repeated with patience. Files are read and written as a whole."""

    def __init__(self, filesystem: pafs.FileSystem, patience: Patience) -> None:
        self._filesystem, self._take = filesystem, patience.take

    def write(self, path: str, data: Any) -> None:
        """Replace a file by one write and the close that makes it visible: no exception can come between two parts."""

        def write() -> None:
            with self._filesystem.open_output_stream(path, compression=None) as stream:
                stream.write(data)

        self._take(write)

    def read(self, path: str) -> bytes:
        """Return a file's content. Raise FileNotFoundError if it is missing."""

        def read() -> bytes:
            with self._filesystem.open_input_file(path) as file:  # it requests the size first: two requests, not many
                try:
                    return file.read()
                except OSError as error:  # deleted between the two requests
                    if self._filesystem.get_file_info(path).type == pafs.FileType.NotFound:
                        raise FileNotFoundError(path) from error
                    raise

        return self._take(read)

    # The methods that pyarrow needs of a handler

    def get_type_name(self) -> str:
        return self._filesystem.type_name

    def normalize_path(self, path: str) -> str:
        return self._filesystem.normalize_path(path)

    def get_file_info(self, paths: list[str] | pafs.FileSelector) -> list[pafs.FileInfo]:
        return self._take(self._filesystem.get_file_info, paths)

    get_file_info_selector = get_file_info

    def create_dir(self, path: str, recursive: bool) -> None:
        self._take(self._filesystem.create_dir, path, recursive=recursive)

    def delete_dir(self, path: str) -> None:
        self._take(self._filesystem.delete_dir, path)

    def delete_file(self, path: str) -> None:
        self._take(self._filesystem.delete_file, path)

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return pa.BufferReader(self.read(path))

    open_input_file = open_input_stream

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        return pa.PythonFile(_Written(partial(self.write, path)), mode="w")

    def _refuse(self, *_: Any) -> Any:
        raise NotImplementedError("neither a run nor Ray Train asks for this")

    move = copy_file = delete_dir_contents = delete_root_dir_contents = open_append_stream = _refuse


def opened(uri: str, patience: Patience) -> tuple[pafs.PyFileSystem, str]:
    """Return the file system of a URI, and the path in it.

    Raises:
        ArrowInvalid, ImportError: if it is no URI of a file system. The message shows the whole URI.
    """
    if uri.startswith(("gs://", "gcs://")) and "retry_limit_seconds=" not in uri:  # pyarrow's own limit is 15 minutes
        uri = f"{uri}{'&' if '?' in uri else '?'}retry_limit_seconds=6"
    opening = Patience(patience.name, has_answered=patience.has_answered)  # only S3 is contacted here, for the region
    filesystem, path = opening.take(pafs.FileSystem.from_uri, uri)
    if isinstance(filesystem, pafs.S3FileSystem):
        # Created from its parts it tries 3 times; from a URI 31 times, which take 99 s with a silent server
        few_tries = copy.copy(filesystem)
        filesystem = few_tries if few_tries == filesystem else filesystem  # copying loses some options
    return pafs.PyFileSystem(Patient(filesystem, patience)), path


class _Written(io.BytesIO):
    """A file that is sent to the storage when it is closed."""

    def __init__(self, send: Callable[[bytes], None]) -> None:
        super().__init__()
        self._send = send

    def close(self) -> None:
        if not self.closed:
            content = self.getvalue()
            super().close()
            self._send(content)

    def __del__(self) -> None: ...  # BytesIO's would close the file, and send as much as an exception has left of it
