"""The files of a run, on a local path or any pyarrow.fs URI, and how a run begins or goes on."""

import contextlib
import io
import json
import logging
import math
import mmap
import os
import pickle
import re
import urllib.parse
import uuid
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from raysubset.config import differences, of_now
from raysubset.costs import count_bytes
from raysubset.errors import CorruptFile
from raysubset.fingerprints import Identity
from raysubset.run_directory.paths import CONFIG_PATH, ENVIRONMENT_PATH, IDENTITY_PATH, LEASE_PATH, naming_records
from raysubset.run_directory.patience import Patience, StorageLost, opened
from raysubset.run_directory.recent import RECENT, WRITTEN
from raysubset.run_directory.seals import BLANK, MARK, Seal, Sink, fill, flaw_by_itself, has_length, seal_of
from raysubset.run_directory.shapes import refuse_other_values
from raysubset.uris import refuse_ambiguous, shown

if TYPE_CHECKING:  # torch takes seconds, and a report reads no weights
    from torch import Tensor

logger = logging.getLogger(__name__)

FORMAT = 2  # of run directories; one of another format is refused

_PARTIAL = ".partial"  # ends the name of a local file while it is written


_DIGEST = "digest"  # the last key of a JSON object: its own


class RunDirectory:
    """The folder {storage_path}/{name}. Pickles as these two words, so that actors on other nodes get it by value."""

    def __init__(self, storage_path: str, name: str) -> None:
        """Touches nothing yet. A storage path without "scheme://" is local: ~ is expanded, and it is made absolute.

        Raises:
            ValueError: for a URI whose credentials end before their end, unless written with %2F for their "/", or a
                name that is no plain folder's, as a stranger's record may hold.
        """
        if "/" in name or name in (".", ".."):
            raise ValueError(f"{name!r} in {shown(storage_path)} is no plain name of a folder")
        scheme, mark, _ = storage_path.partition("://")
        if mark and scheme == "file":
            storage_path, mark = urllib.parse.unquote(urllib.parse.urlsplit(storage_path).path), ""
        if mark:
            refuse_ambiguous(storage_path)
        self.storage_path = storage_path if mark else os.path.abspath(os.path.expanduser(storage_path))
        self.name = name
        self.local_path = None if mark else Path(self.storage_path, name)
        self._patience = Patience(self.shown_storage_path.partition("?")[0])

    @classmethod
    def at(cls, uri: str) -> "RunDirectory":
        """The inverse of `uri`: the run directory at a path or URI that ends with its name."""
        path, mark, query = uri.partition("?") if "://" in uri else (os.path.abspath(os.path.expanduser(uri)), "", "")
        storage_path, _, name = path.rstrip("/").rpartition("/")
        return cls((storage_path or "/") + mark + query, urllib.parse.unquote(name) if "://" in uri else name)

    def __reduce__(self) -> tuple[Any, ...]:
        return RunDirectory, (self.storage_path, self.name), {"_patience": self._patience}

    def __repr__(self) -> str:
        return f"RunDirectory({self.uri})"

    @property
    def uri(self) -> str:
        """Where it is, to show and to give back to at(); without the credentials that a storage URI may hold."""
        if self.local_path:
            return str(self.local_path)
        path, mark, query = self.shown_storage_path.partition("?")
        return f"{path.rstrip('/')}/{_quoted(self.name)}{mark}{query}"

    @property
    def shown_storage_path(self) -> str:
        """The storage path without the credentials that a URI may hold: for records and messages."""
        return self.storage_path if self.local_path else shown(self.storage_path)

    @cached_property
    def _place(self) -> tuple[pafs.FileSystem, str]:
        """The file system and the run's root in it."""
        if self.local_path:
            return pafs.LocalFileSystem(), str(self.local_path)
        try:
            filesystem, folder = opened(self.storage_path, self._patience)
        except (pa.ArrowInvalid, ImportError) as error:  # which shows the whole URI
            scheme = self.storage_path.partition("://")[0]
            text = (
                f"storage_path of {scheme}:// cannot be opened ({type(error).__name__}): use a path, s3://… or gs://…"
            )
            raise ValueError(text) from None
        return filesystem, f"{folder.rstrip('/')}/{self.name}"

    def _at(self, path: str) -> tuple[pafs.FileSystem, str]:
        if path.startswith("/") or ".." in path.split("/"):  # a stranger's record named it
            raise self._damaged(path, "it would lie outside")
        filesystem, root = self._place
        return filesystem, f"{root}/{path}" if path else root

    # Files

    def exists(self, path: str) -> bool:
        """Whether there is such a file or folder."""
        filesystem, full = self._at(path)
        return filesystem.get_file_info(full).type != pafs.FileType.NotFound

    def list(self, path: str = "", *, recursive: bool = False) -> list[str]:
        """The files of a folder, sorted, relative to the run; none where it is missing. Hidden files are left out."""
        filesystem, full = self._at(path)
        try:
            infos = filesystem.get_file_info(pafs.FileSelector(full, allow_not_found=True, recursive=recursive))
        except FileNotFoundError:  # despite allow_not_found, where another process makes the folder meanwhile
            return []
        files = (i for i in infos if i.type == pafs.FileType.File and not i.base_name.startswith("."))
        return sorted(info.path.removeprefix(self._at("")[1] + "/") for info in files)

    @classmethod
    def all_of(cls, storage_path: str) -> "Sequence[RunDirectory]":
        """The directories of a storage path, the newest first, where storage tells when; hidden ones are left out.

        Raises:
            FileNotFoundError: without such a folder.
        """
        filesystem, root = cls(storage_path, "-")._place
        infos = filesystem.get_file_info(pafs.FileSelector(root.rpartition("/")[0] or "/"))
        names = ((info.mtime_ns or 0, info.base_name) for info in infos if info.type == pafs.FileType.Directory)
        return [cls(storage_path, name) for _, name in sorted(names, reverse=True) if not name.startswith(".")]

    def neighbours(self) -> "Sequence[RunDirectory]":
        """The directories of the same storage path, without this one; the newest first, where storage tells when."""
        try:
            return [directory for directory in self.all_of(self.storage_path) if directory.name != self.name]
        except FileNotFoundError:
            return []

    def delete(self, path: str) -> None:
        """Remove a file, or a folder and all in it; none to remove is fine."""
        filesystem, full = self._at(path)
        kind = filesystem.get_file_info(full).type
        with contextlib.suppress(FileNotFoundError):  # of a second try, where the first was done and its answer lost
            if kind == pafs.FileType.Directory:
                filesystem.delete_dir(full)
            elif kind != pafs.FileType.NotFound:
                filesystem.delete_file(full)

    def write_bytes(self, path: str, data: bytes | bytearray | memoryview, *, is_durable: bool = True) -> None:
        """Replace a file in one step; its folders are made.

        Args:
            is_durable: False: do not wait for a local disk. If the machine goes down within half a minute the file
                may be empty or as it was; a process that dies loses nothing.

        Raises:
            OSError: a full disk and other failures of the storage, with the file named.
        """
        filesystem, full = self._at(path)
        if self.local_path:
            with _replaced(Path(full), is_durable=is_durable) as file:
                file.write(data)
            return
        # One write, then the close that makes the object visible: no exception can come between parts of it.
        with filesystem.open_output_stream(full, compression=None) as stream:
            stream.write(data)

    def read_bytes(self, path: str) -> bytes:
        """The content; FileNotFoundError where there is none."""
        filesystem, full = self._at(path)
        return Path(full).read_bytes() if self.local_path else filesystem.handler.read(full)

    def write_json(self, path: str, record: Any, *, is_durable: bool = True, indent: int | None = 1) -> Seal:
        """Strict JSON, keys in the order given: NaN and infinities, which JSON lacks, become null. Without an indent it
        takes less than half of the time: a line for the machine.

        An object ends with the digest of the file, which read_json() checks and takes away.

        Returns:
            Its seal, for a record that names it.
        """
        is_object = isinstance(record, Mapping)
        data = bytearray(_to_json({**record, _DIGEST: BLANK.decode()} if is_object else record, indent).encode())
        if is_object:
            fill(data, data.rfind(BLANK))
        self.write_bytes(path, data, is_durable=is_durable)
        return seal_of(data)

    def read_json(self, path: str) -> Any:
        """The record; FileNotFoundError where there is none, CorruptFile where it cannot be read, was changed, or holds
        values of other types than files of its name do.
        """
        data = self.read_bytes(path)
        with self._corrupt(path, ValueError, RecursionError):  # bad JSON and bad UTF-8 are ValueErrors
            record = json.loads(data)
        if isinstance(record, dict) and (MARK in data or _DIGEST in record):  # of which either may be damaged
            if flaw := flaw_by_itself(data):
                raise self._damaged(path, f"{flaw} (whoever edits it leaves {_DIGEST} out)")
            del record[_DIGEST]
        try:
            refuse_other_values(path, record)
        except ValueError as error:
            raise self._damaged(path, str(error)) from error
        return record

    def read_json_or_none(self, path: str) -> Any:
        """None where there is none, or it cannot be read (with a warning): its work is to be done again."""
        try:
            return self.read_json(path)
        except FileNotFoundError:
            return None
        except CorruptFile as error:
            logger.warning("%s; going on as if it were not there", error)
            return None

    def write_weights(self, path: str, weights: "Mapping[str, Tensor]", metadata: dict[str, str] | None = None) -> Seal:
        """safetensors, a tensor at a time. Tied tensors are written apart, layouts in the default order of memory.

        Returns:
            Its seal, for the `files` of the record that names it.
        """
        from raysubset.run_directory.weights_files import to_safetensors

        with self._sealing(path, is_kept=True) as sink:
            for part in to_safetensors(weights, metadata):
                sink.write(part)
        return sink.seal()

    def read_weights(self, path: str, files: Mapping[str, Any]) -> "dict[str, Tensor]":
        """On the CPU; CorruptFile where they are gone or are not what the record that names them says.

        What this process has written or read of late is not fetched again.

        Args:
            files: of that record: seals by path.
        """
        import safetensors.torch

        seal = files.get(path)
        known = RECENT.find(self.uri, path, seal)
        with self._corrupt(path, safetensors.SafetensorError, FileNotFoundError):
            if self.local_path:  # mapped: to read 45 MB into memory takes eight times as long as to average them
                with (self.local_path / path).open("rb") as file:
                    status = os.fstat(file.fileno())
                    version, num_bytes = (status.st_ino, status.st_size, status.st_mtime_ns), status.st_size
                    if version != known:
                        checked = self._check(path, _mapped(file, num_bytes), seal)
                        RECENT.keep(self.uri, path, checked, version)
                weights = safetensors.torch.load_file(self.local_path / path)
            else:
                data = self.read_bytes(path) if known is None else known
                num_bytes = len(data)
                if known is None:
                    RECENT.keep(self.uri, path, self._check(path, data, seal), data)
                weights = safetensors.torch.load(data)
        count_bytes(num_bytes if known is None else 0)
        return weights

    def write_checkpoint(self, path: str, state: Mapping[str, Any], *, is_durable: bool = True) -> Seal:
        """save_checkpoint(); `position`, a list such as [epoch, step], orders checkpoints. Its seal."""
        with self._sealing(path, is_durable=is_durable) as sink:
            save_checkpoint(state, sink)
        return sink.seal()

    @contextlib.contextmanager
    def _sealing(self, path: str, *, is_durable: bool = True, is_kept: bool = False) -> Iterator[Sink]:
        """write_bytes() of parts as they come, counted; read_weights() finds what is kept."""
        content: Any = WRITTEN
        if self.local_path:
            with _replaced(Path(self._at(path)[1]), is_durable=is_durable) as file:
                yield (sink := Sink(file))
        else:
            with io.BytesIO() as buffer:
                yield (sink := Sink(buffer))
                content = buffer.getvalue()  # no copy: nothing is written any more
            self.write_bytes(path, content)
        count_bytes(sink.num_bytes)
        if is_kept:
            RECENT.keep(self.uri, path, sink.seal(), content)

    def read_checkpoint(self, path: str) -> dict[str, Any]:
        """load_checkpoint(); FileNotFoundError where there is none, CorruptFile where it is not as it was written."""
        if not self.local_path:
            data = self.read_bytes(path)
            count_bytes(len(data))
            with self._corrupt(path, ValueError):
                return load_checkpoint(data)
        with (self.local_path / path).open("rb") as file, self._corrupt(path, ValueError):
            count_bytes(num_bytes := os.fstat(file.fileno()).st_size)
            return load_checkpoint(_mapped(file, num_bytes))

    def write_table(self, path: str, table: pa.Table, *, is_durable: bool = True) -> Seal:
        """Parquet that holds a digest of itself; its seal, for a record that names it."""
        sink = pa.BufferOutputStream()
        metadata = {**(table.schema.metadata or {}), _DIGEST: BLANK}
        pq.write_table(table.replace_schema_metadata(metadata), sink)
        data = bytearray(sink.getvalue())
        fill(data, data.rfind(BLANK))
        self.write_bytes(path, data, is_durable=is_durable)
        return seal_of(data)

    def read_table(self, path: str) -> pa.Table:
        """The table; FileNotFoundError where there is none, CorruptFile where it is not as it was written."""
        data = self.read_bytes(path)
        if flaw := flaw_by_itself(data):
            raise self._damaged(path, flaw)
        with self._corrupt(path, pa.ArrowInvalid, OSError):  # sealed by another hand
            table = pq.read_table(pa.BufferReader(data))
        if any(map(_is_foreign, table.schema.types)):
            raise self._damaged(path, "it holds types of other programs")
        metadata = {key: value for key, value in (table.schema.metadata or {}).items() if key != _DIGEST.encode()}
        return table.replace_schema_metadata(metadata or None)

    def read_record(self, path: str, *, whole: bool = False) -> dict[str, Any] | None:
        """The record of finished work. None, with a warning but where there is none, if it is damaged or a file that it
        names is gone or of another length: the work is to be done again.

        Args:
            whole: read the files too, and compare their digests.
        """
        record = self.read_json_or_none(path)
        if record is None:
            return None
        try:
            files = record.get("files") if isinstance(record, dict) else None
            if not isinstance(files, dict):
                raise self._damaged(path, "it names no files")
            self.check_lengths(files)
            for file, seal in files.items() if whole else ():
                self._check(file, self.read_bytes(file), seal)
        except CorruptFile as error:
            logger.warning("%s; what it stands for is made again", error)
            return None
        return record

    def check_lengths(self, files: Mapping[str, Seal]) -> None:
        """Look whether files are there as they were written, as far as their lengths tell.

        Args:
            files: of a record that names them: seals by path.

        Raises:
            CorruptFile: for the first that is gone, or has another length.
        """
        filesystem = self._place[0]
        infos = filesystem.get_file_info([self._at(path)[1] for path in files])
        for (path, seal), info in zip(files.items(), infos, strict=True):
            if info.type == pafs.FileType.NotFound:
                raise self._damaged(path, "it is gone, though a record names it")
            if not has_length(seal, info.size):
                raise self._damaged(path, f"it has {info.size} bytes, and had {str(seal).partition(',')[0]}")

    def forget(self, path: str) -> None:
        """Delete the records that stand on a damaged file, or the file itself where none does: it is made again."""
        for record in naming_records(path):
            self.delete(record)

    def _check(self, path: str, data: Any, seal: Seal | None) -> Seal:
        """The seal, where the file is as the record that holds it says."""
        if seal is None:
            raise self._damaged(path, "no record holds its digest")
        if not has_length(seal, len(data)):
            raise self._damaged(path, f"it has {len(data)} bytes, and had {seal.partition(',')[0]}")
        if seal_of(data) != seal:
            raise self._damaged(path, "it was changed: its digest is another")
        return seal

    def _damaged(self, path: str, flaw: str) -> CorruptFile:
        return CorruptFile(path, f"{path} in {self.uri} is damaged: {flaw}")

    @contextlib.contextmanager
    def _corrupt(self, path: str, *errors: type[Exception]) -> Iterator[None]:
        try:
            yield
        except errors as error:
            raise CorruptFile(path, f"{path} in {self.uri} cannot be read: {_one_line(error)}") from error

    def newest_checkpoint(self, folder: str) -> tuple[int, dict[str, Any]] | None:
        """(attempt, state) of the readable checkpoint that got furthest, over all attempts at a minimum."""
        found = []
        for path in self.list(folder):
            if match := re.search(r"/checkpoint-(\d+)\.pt$", path):
                try:
                    found.append((int(match[1]), self.read_checkpoint(path)))
                except CorruptFile as error:
                    logger.warning("%s; falling back to an earlier checkpoint", error)
        return max(found, key=lambda one: (one[1]["position"], one[0]), default=None)

    def train_storage(self, folder: str) -> tuple[str, pafs.FileSystem | None]:
        """A folder of the run as Ray Train wants it: RunConfig(storage_path=…, storage_filesystem=…)."""
        filesystem, full = self._at(folder)
        return full, None if self.local_path else filesystem

    # The run as a whole

    def below(self, folder: str) -> str:
        """A folder of this directory, as the storage path of others."""
        if self.local_path:
            return str(self.local_path / folder)
        path, mark, query = self.storage_path.partition("?")
        return f"{path.rstrip('/')}/{_quoted(self.name)}/{folder}{mark}{query}"

    def check_writable(self) -> None:
        """Write a small file and remove it again.

        Raises:
            ValueError: if the storage cannot be written, with the cause.
        """
        probe = f".writable-{uuid.uuid4().hex}"
        try:
            self.write_bytes(probe, b"?")
            self.delete(probe)
        except StorageLost:
            raise
        except (OSError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            cause = (isinstance(error, OSError) and error.strerror) or _one_line(error)
            raise ValueError(f"cannot write to {self.uri}: {cause}; choose another --storage-path") from error
        if self.local_path:
            with contextlib.suppress(OSError):  # only an empty folder goes, which the probe may have made
                self.local_path.rmdir()

    def read_config(self) -> dict[str, Any]:
        """The config of the run that is there; ValueError if none is, or one of a newer version."""
        config = self.recorded_config()
        if config is None:
            begun = ": its deletion was begun by --fresh and not completed" if self.exists(CONFIG_PATH) else ""
            raise ValueError(f"there is no run at {self.uri}{begun}")
        return config

    def recorded_config(self) -> dict[str, Any] | None:
        """None where there is none, or a driver died while it deleted the run."""
        if not self.exists(CONFIG_PATH):
            return None
        try:
            record = self.read_json(CONFIG_PATH)
        except CorruptFile as error:
            raise CorruptFile(CONFIG_PATH, f"{error}; start over with --fresh") from error
        self._check_ours(record)
        if record["format"] != FORMAT:
            found = f"{self.uri} is of format {record['format']!r}; this version of raysubset reads {FORMAT}"
            raise ValueError(f"{found}: use the version that made it, another --name, or start over with --fresh")
        config = record["config"]
        return None if config is None else json.loads(_to_json(of_now(config)))

    def _check_ours(self, record: Any) -> None:
        if not (isinstance(record, dict) and isinstance(record.get("config", ""), dict | None) and "format" in record):
            raise ValueError(f"{self.uri} holds a {CONFIG_PATH} that is no run's: choose another --name")

    def differs(self, config: Mapping[str, Any]) -> bool:
        """Whether there is no run of this config to resume; ValueError if one of a newer version is there."""
        old = self.recorded_config()
        return old is None or any(differences(old, json.loads(_to_json(config))))

    def refuse_other_config(self, old: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Stop where the config of the run that is there would give another result.

        Raises:
            ValueError: with the difference and the way out.
        """
        changes = differences(old, json.loads(_to_json(config)))
        if told := ", ".join(f"{key}: {was} → {now}" for key, was, now in changes):
            out = "choose another --name, or start over with --fresh"
            raise ValueError(f"{self.uri} holds a run of another config ({told}): {out}")

    def read_identity(self) -> Identity | None:
        """What the run's names stood for when it was begun; None where nothing says.

        Raises:
            CorruptFile: if it cannot be read, with the way out.
        """
        if not self.exists(IDENTITY_PATH):
            return None
        try:
            return Identity.from_table(self.read_table(IDENTITY_PATH))
        except CorruptFile as error:
            raise CorruptFile(IDENTITY_PATH, f"{error}; start over with --fresh") from error

    def refuse_changed(self, identity: Identity, *, accept_changed_code: bool = False) -> None:
        """Stop where the names of the run that is there stand for other data or code.

        Raises:
            ValueError: with the difference, where the run was begun, and the way out.
        """
        old = self.read_identity()
        if old is None:
            if identity.is_empty():
                return
            raise ValueError(
                f"{self.uri} holds a run without {IDENTITY_PATH}, so that nothing tells whether data and code are "
                "those it was begun with: choose another --name, or start over with --fresh"
            )
        accepted = [text for text in identity.changed(old) if accept_changed_code and text.startswith("code")]
        if accepted:
            logger.warning("%s: %s; what is there stays as it is", self.uri, accepted[0])
        if not (found := [text for text in identity.changed(old) if text not in accepted]):
            return
        moved = [f"{name} was {was}" for name, was in old.places.items() if identity.places.get(name, was) != was]
        places = f"; {', '.join(moved)}" if moved else ""
        out = "choose another --name, or start over with --fresh"
        if all(text.startswith("code") for text in found):
            out += ", or say --accept-changed-code if the change does not matter"
        raise ValueError(f"{self.uri} holds a run of other contents ({'; '.join(found)}{places}): {out}")

    def open(
        self,
        config: Mapping[str, Any],
        environment: Mapping[str, Any],
        identity: Identity | None = None,
        *,
        fresh: bool = False,
        accept_changed_code: bool = False,
    ) -> bool:
        """Create the run, or join the one that is there; True when it resumes. Hold the lease.

        config.json is written again when resuming, as fields that shape no result may differ; environment.json stays
        as it was at the start. `fresh` deletes everything but the lease; the next driver completes that where this one
        dies meanwhile.

        Args:
            identity: what names in the config stand for; None: nothing but themselves.

        Raises:
            ValueError: if another config, other data or code, or a newer version made the run, or the folder is not a
                run's.
        """
        is_there = self.exists(CONFIG_PATH)
        if not is_there and (foreign := self._entries()):
            held = ", ".join(foreign[:3])
            out = "choose another --name, or delete what a deleted run has left"
            raise ValueError(f"{self.uri} holds {held} but no {CONFIG_PATH}, so it is no run: {out}")
        old = None if fresh else self.recorded_config()
        if old is not None:
            self.refuse_other_config(old, config)
            self.refuse_changed(identity or Identity(), accept_changed_code=accept_changed_code)
        elif is_there:
            with contextlib.suppress(CorruptFile):
                self._check_ours(self.read_json(CONFIG_PATH))
            self.write_json(CONFIG_PATH, {"format": FORMAT, "config": None})
            for path in (*self._entries(), IDENTITY_PATH):
                self.delete(path)
        if self.local_path:  # what writers that died left
            for partial in self.local_path.rglob(f".*{_PARTIAL}"):
                partial.unlink(missing_ok=True)
        if identity is not None:
            older = (old is not None and self.read_identity()) or Identity()
            self.write_table(IDENTITY_PATH, identity.joined(older).to_table())
        self.write_json(CONFIG_PATH, {"format": FORMAT, "config": config})
        if not self.exists(ENVIRONMENT_PATH):
            self.write_json(ENVIRONMENT_PATH, environment)
        return old is not None

    def _entries(self) -> Sequence[str]:
        """Names of the files and folders in the run, but for the lease, config.json, identity.parquet and what is
        hidden."""
        filesystem, full = self._at("")
        infos = filesystem.get_file_info(pafs.FileSelector(full, allow_not_found=True))
        names = {info.base_name for info in infos} - {LEASE_PATH, CONFIG_PATH, IDENTITY_PATH}
        return sorted(name for name in names if not name.startswith("."))


def _is_foreign(kind: pa.DataType) -> bool:
    """Whether an Arrow type is an extension, or holds one: some, as ray.data's objects, unpickle what is looked at."""
    return isinstance(kind, pa.BaseExtensionType) or any(
        _is_foreign(kind.field(number).type) for number in range(kind.num_fields)
    )


def _quoted(name: str) -> str:
    """A run's name as part of a URI."""
    return urllib.parse.quote(name, safe="")


@contextlib.contextmanager
def _replaced(path: Path, *, is_durable: bool) -> Iterator[BinaryIO]:
    """A new file beside it, which goes to the disk, then over the old one."""
    partial = str(path.with_name(f".{path.name}.{uuid.uuid4().hex}{_PARTIAL}"))
    try:
        with _created(partial) as file:
            yield file
            file.flush()
            if is_durable:
                os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk names no file
    finally:
        with contextlib.suppress(OSError):
            os.unlink(partial)


def _created(path: str) -> BinaryIO:
    """A new file, with its folders."""
    try:
        return open(path, "xb")
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return open(path, "xb")


def save_checkpoint(state: Mapping[str, Any], sink: Sink) -> None:
    """torch.save() of tensors and plain values, and a digest of it at the end."""
    import torch

    torch.save(dict(state), sink)  # pyright: ignore[reportArgumentType]  it asks for write() alone
    sink.write_own_digest()


def load_checkpoint(data: bytes | mmap.mmap) -> dict[str, Any]:
    """The inverse of save_checkpoint(), on the CPU. Runs no code.

    Raises:
        ValueError: if it is not as it was written.
    """
    import torch

    flaw = flaw_by_itself(data) if data[-len(BLANK) :].startswith(MARK) else "its end is missing"
    if flaw:
        raise ValueError(flaw)
    try:
        file = io.BytesIO(data) if isinstance(data, bytes) else data
        return torch.load(file, weights_only=True, map_location="cpu")  # pyright: ignore[reportArgumentType]
    except (RuntimeError, pickle.UnpicklingError) as error:  # sealed by another hand
        raise ValueError(_one_line(error)) from error


def _mapped(file: BinaryIO, num_bytes: int) -> Any:
    """The bytes of an open file, without reading them into memory."""
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if num_bytes else b""


def _to_json(record: Any, indent: int | None = 1) -> str:
    return json.dumps(_finite(record), indent=indent, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
