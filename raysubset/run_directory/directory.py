"""RunDirectory: the files of a run, on a local path or any pyarrow.fs URI, and how a run begins or resumes."""

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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from raysubset.config import differences, of_now
from raysubset.costs import count_bytes
from raysubset.errors import CorruptFile, first_line
from raysubset.fingerprints import Identity
from raysubset.run_directory.paths import (
    CONFIG_PATH,
    ENVIRONMENT_PATH,
    FROZEN_FOLDER,
    IDENTITY_PATH,
    LEASE_PATH,
    aggregate_path,
    minimum_path,
    subsets_path,
)
from raysubset.run_directory.patience import Patience, StorageLost, opened
from raysubset.run_directory.recent import RECENT, WRITTEN
from raysubset.run_directory.seals import BLANK, MARK, Seal, Sink, fill, flaw_by_itself, has_length, seal_of
from raysubset.run_directory.shapes import refuse_other_values
from raysubset.uris import refuse_ambiguous, shown

if TYPE_CHECKING:  # torch takes seconds, and a report reads no weights
    from torch import Tensor

logger = logging.getLogger(__name__)

FORMAT = 2  # of run directories; another format is refused

_PARTIAL = ".partial"  # suffix of a local file while it is written
_NUM_READERS = 16  # object stores answer in tens of milliseconds, many at a time

_DIGEST = "digest"  # the last key of a JSON object: the digest of its file


class RunDirectory:
    """The folder {storage_path}/{name}. It pickles as these two values, so that actors on other nodes get it."""

    def __init__(self, storage_path: str, name: str) -> None:
        """Touch no storage yet. A storage path without "scheme://" is local: ~ is expanded, and it becomes absolute.

        Raises:
            ValueError: if the URI's credentials contain an unescaped delimiter, such as a "/" that is not written %2F;
                if a file's URI names a host; or if the name is not a plain folder name, as a record that somebody else
                wrote may hold.
        """
        if "/" in name or name in (".", ".."):
            raise ValueError(f"{name!r} in {shown(storage_path)} is no plain name of a folder")
        scheme, mark, _ = storage_path.partition("://")
        if mark and scheme == "file":
            uri = urllib.parse.urlsplit(storage_path)
            if uri.netloc not in ("", "localhost"):
                raise ValueError(f"{shown(storage_path)} names a host: write file:///…, or the path alone")
            storage_path, mark = urllib.parse.unquote(uri.path) or "/", ""
        if mark:
            refuse_ambiguous(storage_path)
        self.storage_path = storage_path if mark else os.path.abspath(os.path.expanduser(storage_path))
        self.name = name
        self.local_path = None if mark else Path(self.storage_path, name)
        self._patience = Patience(self.shown_storage_path.partition("?")[0])

    @classmethod
    def at(cls, uri: str) -> "RunDirectory":
        """Return the run directory at a path or URI that ends with its name, such as `uri`; or a whole bucket."""
        path, mark, query = uri.partition("?") if "://" in uri else (os.path.abspath(os.path.expanduser(uri)), "", "")
        storage_path, _, name = path.rstrip("/").rpartition("/")
        if "://" in uri and "://" not in storage_path:
            return cls(uri, "")
        return cls((storage_path or "/") + mark + query, urllib.parse.unquote(name) if "://" in uri else name)

    def __reduce__(self) -> tuple[Any, ...]:
        return RunDirectory, (self.storage_path, self.name), {"_patience": self._patience}

    def __repr__(self) -> str:
        return f"RunDirectory({self.uri})"

    @property
    def uri(self) -> str:
        """The path or URI, without credentials, for messages and for at()."""
        return _below(self.shown_storage_path, self.name)

    @property
    def shown_storage_path(self) -> str:
        """The storage path without the credentials that a URI may hold, for records and messages."""
        return self.storage_path if self.local_path else shown(self.storage_path)

    @cached_property
    def _filesystem_and_root(self) -> tuple[pafs.FileSystem, str]:
        """The file system, and the run's root in it."""
        if self.local_path:
            return pafs.LocalFileSystem(), str(self.local_path)
        try:
            filesystem, folder = opened(self.storage_path, self._patience)
        except (pa.ArrowInvalid, ImportError) as error:  # its message shows the whole URI, with credentials
            scheme = self.storage_path.partition("://")[0]
            text = (
                f"storage_path of {scheme}:// cannot be opened ({type(error).__name__}): use a path, s3://… or gs://…"
            )
            raise ValueError(text) from None
        return filesystem, f"{folder.rstrip('/')}/{self.name}".rstrip("/")

    def _at(self, path: str) -> tuple[pafs.FileSystem, str]:
        if path.startswith("/") or ".." in path.split("/"):  # the path comes from a record that somebody else wrote
            raise self._damaged(path, "it would lie outside")
        filesystem, root = self._filesystem_and_root
        return filesystem, f"{root}/{path}" if path else root

    # Files

    def exists(self, path: str) -> bool:
        """Return True if there is a file or folder at the path."""
        filesystem, full = self._at(path)
        return filesystem.get_file_info(full).type != pafs.FileType.NotFound

    def list(self, path: str = "", *, recursive: bool = False) -> list[str]:
        """Return the files of a folder, sorted, by paths in the run; [] if it is missing. Hidden files are left out."""
        filesystem, full = self._at(path)
        try:
            infos = filesystem.get_file_info(pafs.FileSelector(full, allow_not_found=True, recursive=recursive))
        except FileNotFoundError:  # happens despite allow_not_found if another process creates the folder meanwhile
            return []
        files = (i for i in infos if i.type == pafs.FileType.File and not i.base_name.startswith("."))
        return sorted(info.path.removeprefix(self._at("")[1] + "/") for info in files)

    @classmethod
    def all_of(cls, storage_path: str) -> "Sequence[RunDirectory]":
        """Return the directories of a storage path, the newest first if storage knows their age, without hidden ones.

        Raises:
            FileNotFoundError: if there is no such folder.
        """
        filesystem, root = cls(storage_path, "-")._filesystem_and_root
        infos = filesystem.get_file_info(pafs.FileSelector(root.rpartition("/")[0] or "/"))
        names = ((info.mtime_ns or 0, info.base_name) for info in infos if info.type == pafs.FileType.Directory)
        return [cls(storage_path, name) for _, name in sorted(names, reverse=True) if not name.startswith(".")]

    def neighbours(self) -> "Sequence[RunDirectory]":
        """Return the other directories of this storage path, the newest first if storage knows their age."""
        try:
            return [directory for directory in self.all_of(self.storage_path) if directory.name != self.name]
        except FileNotFoundError:
            return []

    def delete(self, path: str) -> None:
        """Remove a file, or a folder with its content. A missing path is no error."""
        filesystem, full = self._at(path)
        kind = filesystem.get_file_info(full).type
        with contextlib.suppress(FileNotFoundError):  # the first try may have succeeded, and only its answer got lost
            if kind == pafs.FileType.Directory:
                filesystem.delete_dir(full)
            elif kind != pafs.FileType.NotFound:
                filesystem.delete_file(full)

    def write_bytes(self, path: str, data: bytes | bytearray | memoryview, *, is_durable: bool = True) -> None:
        """Replace a file atomically. Missing folders are created.

        Args:
            is_durable: False: do not wait for a local disk. If the machine goes down within half a minute, the file
                may be empty or have its old content. If only the process dies, nothing is lost.

        Raises:
            OSError: if the disk is full or the storage fails otherwise. The message names the file.
        """
        filesystem, full = self._at(path)
        if self.local_path:
            with _replacement(Path(full), is_durable=is_durable) as file:
                file.write(data)
        else:
            filesystem.handler.write(full, data)

    def read_bytes(self, path: str) -> bytes:
        """Return a file's content. Raise FileNotFoundError if it is missing."""
        filesystem, full = self._at(path)
        return Path(full).read_bytes() if self.local_path else filesystem.handler.read(full)

    def write_json(self, path: str, record: Any, *, is_durable: bool = True, indent: int | None = 1) -> Seal:
        """Write strict JSON, with keys in the given order. NaN and infinities, which JSON lacks, become null.

        An object ends with the digest of the file, which read_json() checks and removes.

        Args:
            indent: None writes one line, for programs, in less than half of the time.

        Returns:
            The file's seal, for a record that names it.
        """
        is_object = isinstance(record, Mapping)
        data = bytearray(_to_json({**record, _DIGEST: BLANK.decode()} if is_object else record, indent).encode())
        if is_object:
            fill(data, data.rfind(BLANK))
        self.write_bytes(path, data, is_durable=is_durable)
        return seal_of(data)

    def read_json(self, path: str) -> Any:
        """Return the record in a JSON file.

        Raises:
            FileNotFoundError: if the file is missing.
            CorruptFile: if it cannot be read, was changed, or holds values of types that files of its name do not have.
        """
        data = self.read_bytes(path)
        with self._corrupt(path, ValueError, RecursionError):  # bad JSON and bad UTF-8 are ValueErrors
            record = json.loads(data)
        if isinstance(record, dict) and (MARK in data or _DIGEST in record):  # damage may hide one of the two signs
            if flaw := flaw_by_itself(data):
                raise self._damaged(path, f"{flaw} (whoever edits it leaves {_DIGEST} out)")
            del record[_DIGEST]
        try:
            refuse_other_values(path, record)
        except ValueError as error:
            raise self._damaged(path, str(error)) from error
        return record

    def read_json_or_none(self, path: str) -> Any:
        """Return the record; None if the file is missing or, with a warning, cannot be read: its work is done again."""
        try:
            return self.read_json(path)
        except FileNotFoundError:
            return None
        except CorruptFile as error:
            logger.warning("%s; continuing without it", error)
            return None

    def write_weights(
        self, path: str, weights: "Mapping[str, Tensor]", *, frozen: str | None = None, is_durable: bool = True
    ) -> Seal:
        """Write a safetensors file, a tensor at a time. Tied tensors are written twice, in the default memory layout.

        Args:
            frozen: the path of the file that holds the rest of the weights.

        Returns:
            The file's seal, for the `files` of the record that names it.
        """
        from raysubset.run_directory.weights_files import to_safetensors

        with self._sealed_file(path, is_durable=is_durable, is_kept=True) as sink:
            for part in to_safetensors(weights, frozen=frozen):
                sink.write(part)
        return sink.seal()

    def write_apart(
        self, path: str, weights: "Mapping[str, Tensor]", frozen: Collection[str], *, is_durable: bool = True
    ) -> dict[str, Seal]:
        """Write weights. Those named frozen, if any, go to a file that all weights with equal ones share.

        A network of which little is trained then leaves, and its readers fetch, little more than that.

        Returns:
            The seals of both files by path, for the `files` of the record that names them.
        """
        from raysubset.run_directory.weights_files import to_safetensors

        unchanged = {name: tensor for name, tensor in weights.items() if name in frozen}
        if not unchanged:
            return {path: self.write_weights(path, weights, is_durable=is_durable)}
        with open(os.devnull, "wb") as nowhere:
            draft = Sink(nowhere)
            for part in to_safetensors(unchanged):
                draft.write(part)
        seal = draft.seal()
        shared_path = f"{FROZEN_FOLDER}/{seal.rpartition(' ')[2][:32]}.safetensors"
        try:
            self.check_lengths({shared_path: seal})
        except CorruptFile:  # gone, or cut short
            self.write_weights(shared_path, unchanged, is_durable=is_durable)
        changed = {name: tensor for name, tensor in weights.items() if name not in unchanged}
        files = {path: self.write_weights(path, changed, frozen=shared_path, is_durable=is_durable)}
        return files | {shared_path: seal}

    def read_weights(self, path: str, files: Mapping[str, Any]) -> "dict[str, Tensor]":
        """Return the weights in a file, on the CPU. A file that this process wrote or read lately is not fetched again.

        Args:
            files: seals by path, of the record that names the file.

        Raises:
            CorruptFile: if the file is missing, or differs from its seal.
        """
        import safetensors.torch

        from raysubset.run_directory.weights_files import frozen_of

        seal = files.get(path)
        recent = RECENT.find(self.uri, path, seal)
        with self._corrupt(path, safetensors.SafetensorError, FileNotFoundError, RecursionError):
            if self.local_path:
                status = os.stat(self.local_path / path)
                version, num_bytes = (status.st_ino, status.st_size, status.st_mtime_ns), status.st_size
                if version != recent:
                    with self._content(path) as data:
                        RECENT.keep(self.uri, path, self._check(path, data, seal), version)
                weights = safetensors.torch.load_file(self.local_path / path)
                with (self.local_path / path).open("rb") as file:
                    shared_path = frozen_of(file)
            else:
                data = self.read_bytes(path) if recent is None else recent
                num_bytes = len(data)
                if recent is None:
                    RECENT.keep(self.uri, path, self._check(path, data, seal), data)
                weights = safetensors.torch.load(data)
                shared_path = frozen_of(io.BytesIO(data))
            count_bytes(num_bytes if recent is None else 0)
            return weights | self._frozen(shared_path, files) if shared_path else weights

    def _frozen(self, path: str, files: Mapping[str, Any]) -> "dict[str, Tensor]":
        """Return weights that no training changes. This process fetches them once, however large they are."""
        key = self.uri, path, str(files.get(path))
        if (weights := RECENT.frozen.get(key)) is None:
            weights = self.read_weights(path, files)
            RECENT.frozen = {key: weights}
        return weights

    def write_checkpoint(self, path: str, state: Mapping[str, Any], *, is_durable: bool = True) -> Seal:
        """torch.save() tensors and plain values, and end the file with a digest of it. Return its seal.

        `position`, such as [epoch, step], orders checkpoints.
        """
        import torch

        with self._sealed_file(path, is_durable=is_durable) as sink:
            torch.save(dict(state), sink)  # pyright: ignore[reportArgumentType]  torch needs write() and flush() only
            sink.write_own_digest()
        return sink.seal()

    @contextlib.contextmanager
    def _sealed_file(self, path: str, *, is_durable: bool = True, is_kept: bool = False) -> Iterator[Sink]:
        """Yield a sink whose parts replace the file, as write_bytes() does, and count. Keep the content if is_kept."""
        content: Any = WRITTEN
        if self.local_path:
            with _replacement(Path(self._at(path)[1]), is_durable=is_durable) as file:
                yield (sink := Sink(file))
        else:
            with io.BytesIO() as buffer:
                yield (sink := Sink(buffer))
                content = buffer.getvalue()  # makes no copy, as nothing more is written
            self.write_bytes(path, content)
        count_bytes(sink.num_bytes)
        if is_kept:
            RECENT.keep(self.uri, path, sink.seal(), content)

    def read_checkpoint(self, path: str) -> dict[str, Any]:
        """Return the state that write_checkpoint() wrote, on the CPU. Run no code.

        Raises:
            CorruptFile: if the file is missing or damaged.
        """
        import torch

        # RuntimeError and UnpicklingError: another program may have written the digest
        errors = FileNotFoundError, ValueError, RuntimeError, pickle.UnpicklingError
        with self._corrupt(path, *errors), self._content(path) as data:
            count_bytes(len(data))
            if flaw := flaw_by_itself(data) if data[-len(BLANK) :].startswith(MARK) else "its end is missing":
                raise ValueError(flaw)
            file: Any = io.BytesIO(data) if isinstance(data, bytes) else data
            return torch.load(file, weights_only=True, map_location="cpu")

    @contextlib.contextmanager
    def _content(self, path: str) -> Iterator[Any]:
        """Yield a file's bytes, of a local file mapped: reading 45 MB takes eight times as long as averaging them."""
        if not self.local_path:
            yield self.read_bytes(path)
            return
        with (self.local_path / path).open("rb") as file:
            yield mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b""

    def write_table(self, path: str, table: pa.Table, *, is_durable: bool = True) -> Seal:
        """Write a Parquet file that holds a digest of itself. Return its seal, for a record that names it."""
        sink = pa.BufferOutputStream()
        metadata = {**(table.schema.metadata or {}), _DIGEST: BLANK}
        pq.write_table(table.replace_schema_metadata(metadata), sink)
        data = bytearray(sink.getvalue())
        fill(data, data.rfind(BLANK))
        self.write_bytes(path, data, is_durable=is_durable)
        return seal_of(data)

    def read_table(self, path: str) -> pa.Table:
        """Return the table in a file. Raise FileNotFoundError if it is missing, CorruptFile if it is damaged."""
        data = self.read_bytes(path)
        if flaw := flaw_by_itself(data):
            raise self._damaged(path, flaw)
        with self._corrupt(path, pa.ArrowInvalid, OSError):  # another program may have written the digest
            table = pq.read_table(pa.BufferReader(data))
        if any(map(_is_foreign, table.schema.types)):
            raise self._damaged(path, "it holds types of other programs")
        metadata = {key: value for key, value in (table.schema.metadata or {}).items() if key != _DIGEST.encode()}
        return table.replace_schema_metadata(metadata or None)

    def read_record(self, path: str, *, whole: bool = False) -> dict[str, Any] | None:
        """Return the record of finished work; None if the work has to be done again.

        That is so if the record is missing or, with a warning, if it is damaged or a file that it names is missing or
        has another length.

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
            logger.warning("%s; the work behind it is done again", error)
            return None
        return record

    def check_lengths(self, files: Mapping[str, Seal]) -> None:
        """Check that files exist and have the lengths that they were written with.

        Args:
            files: seals by path, of the record that names the files.

        Raises:
            CorruptFile: for the first file that is missing or has another length.
        """
        filesystem = self._filesystem_and_root[0]
        infos = filesystem.get_file_info([self._at(path)[1] for path in files])
        for (path, seal), info in zip(files.items(), infos, strict=True):
            if info.type == pafs.FileType.NotFound:
                raise self._damaged(path, "it is gone, though a record names it")
            if not has_length(seal, info.size):
                raise self._damaged(path, f"it has {info.size} bytes instead of {str(seal).partition(',')[0]}")

    def forget(self, path: str) -> None:
        """Delete the records that depend on a damaged file, or else the file itself, so that its work is done again.

        A round's aggregate comes from the round's minima, so it depends on their files.
        """
        folder, _, name = path.rpartition("/")
        match = re.fullmatch(r"rounds/(\d+)(/.+)?", folder)
        if match and path != subsets_path(int(match[1])):
            self.delete(aggregate_path(int(match[1])))
            if match[2]:
                self.delete(minimum_path(folder))
        else:
            is_weights = name.endswith(".safetensors") and folder != FROZEN_FOLDER and not match
            self.delete(minimum_path(folder) if is_weights else path)  # many records name frozen weights, and miss them

    def _check(self, path: str, data: Any, seal: Seal | None) -> Seal:
        """Return the seal if the file's content matches it; raise CorruptFile if not."""
        if seal is None:
            raise self._damaged(path, "no record holds its digest")
        if not has_length(seal, len(data)):
            raise self._damaged(path, f"it has {len(data)} bytes instead of {seal.partition(',')[0]}")
        if seal_of(data) != seal:
            raise self._damaged(path, "it was changed: its digest differs")
        return seal

    def _damaged(self, path: str, flaw: str) -> CorruptFile:
        return CorruptFile(path, f"{path} in {self.uri} is damaged: {flaw}")

    @contextlib.contextmanager
    def _corrupt(self, path: str, *errors: type[Exception]) -> Iterator[None]:
        try:
            yield
        except errors as error:
            raise CorruptFile(path, f"{path} in {self.uri} cannot be read: {first_line(error)}") from error

    def newest_checkpoint(self, folder: str) -> tuple[int, dict[str, Any]] | None:
        """Return (attempt, state) of the readable checkpoint that got furthest, among all attempts at a minimum."""
        checkpoints = []
        for path in self.list(folder):
            if match := re.search(r"/checkpoint-(\d+)\.pt$", path):
                try:
                    checkpoints.append((int(match[1]), self.read_checkpoint(path)))
                except CorruptFile as error:
                    logger.warning("%s; falling back to an earlier checkpoint", error)
        return max(checkpoints, key=lambda checkpoint: (checkpoint[1]["position"], checkpoint[0]), default=None)

    def train_storage(self, folder: str) -> tuple[str, pafs.FileSystem | None]:
        """Return a folder of the run for Ray Train's RunConfig(storage_path=…, storage_filesystem=…)."""
        filesystem, full = self._at(folder)
        return full, None if self.local_path else filesystem

    # The run as a whole

    def below(self, folder: str) -> str:
        """Return the storage path of run directories that lie in a folder of this one."""
        return _below(_below(self.storage_path, self.name), folder)

    def check_writable(self) -> None:
        """Write a small file and remove it.

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
            cause = (isinstance(error, OSError) and error.strerror) or first_line(error)
            raise ValueError(f"cannot write to {self.uri}: {cause}; choose another --storage-path") from error
        if self.local_path:
            with contextlib.suppress(OSError):  # removes only an empty folder, which the probe may have created
                self.local_path.rmdir()

    def read_config(self) -> dict[str, Any]:
        """Return the config of the run here. Raise a ValueError if there is no run, or one of a newer version."""
        config = self.recorded_config()
        if config is None:
            hint = ": --fresh began to delete it and did not finish" if self.exists(CONFIG_PATH) else ""
            raise ValueError(f"there is no run at {self.uri}{hint}")
        return config

    def recorded_config(self) -> dict[str, Any] | None:
        """Return the run's config; None if there is no run, or a driver died while it deleted the run."""
        if not self.exists(CONFIG_PATH):
            return None
        try:
            record = self.read_json(CONFIG_PATH)
        except CorruptFile as error:
            raise CorruptFile(CONFIG_PATH, f"{error}; start over with --fresh") from error
        self._check_ours(record)
        if record["format"] != FORMAT:
            text = f"{self.uri} is of format {record['format']!r}; this version of raysubset reads {FORMAT}"
            raise ValueError(f"{text}: use the version that wrote it, another --name, or start over with --fresh")
        config = record["config"]
        return None if config is None else json.loads(_to_json(of_now(config)))

    def _check_ours(self, record: Any) -> None:
        if not (isinstance(record, dict) and isinstance(record.get("config", ""), dict | None) and "format" in record):
            raise ValueError(f"{self.uri} holds a {CONFIG_PATH} that belongs to no run: choose another --name")

    def differs(self, config: Mapping[str, Any]) -> bool:
        """Return True if no run exists here, or it has a different config. ValueError if its version is newer."""
        old = self.recorded_config()
        return old is None or any(differences(old, json.loads(_to_json(config))))

    def refuse_other_config(self, old: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Stop if the config of the run here would give another result.

        Raises:
            ValueError: with the difference and the way out.
        """
        changes = differences(old, json.loads(_to_json(config)))
        if text := ", ".join(f"{key}: {old_value} → {new_value}" for key, old_value, new_value in changes):
            way_out = "choose another --name, or start over with --fresh"
            raise ValueError(f"{self.uri} holds a run of another config ({text}): {way_out}")

    def read_identity(self) -> Identity | None:
        """Return what the run's names stood for at its start; None if no file says so.

        Raises:
            CorruptFile: if the file cannot be read, with the way out.
        """
        if not self.exists(IDENTITY_PATH):
            return None
        try:
            return Identity.from_table(self.read_table(IDENTITY_PATH))
        except CorruptFile as error:
            raise CorruptFile(IDENTITY_PATH, f"{error}; start over with --fresh") from error

    def refuse_changed(self, identity: Identity, *, accept_changed_code: bool = False) -> None:
        """Stop if the names in the config of the run here stand for other data or code now.

        Raises:
            ValueError: with the difference, what relative names stood for, and the way out.
        """
        old = self.read_identity()
        if old is None:
            if identity.is_empty():
                return
            raise ValueError(
                f"{self.uri} holds a run without {IDENTITY_PATH}, so that nobody can tell whether data and code are "
                "those that it began with: choose another --name, or start over with --fresh"
            )
        changes = identity.changed(old)
        if accept_changed_code and (code_changes := [text for text in changes if text.startswith("code")]):
            logger.warning("%s: %s; finished work stays as it is", self.uri, code_changes[0])
            changes = [text for text in changes if text not in code_changes]
        if not changes:
            return
        moved_names = [f"{name} was {at}" for name, at in old.places.items() if identity.places.get(name, at) != at]
        places = f"; {', '.join(moved_names)}" if moved_names else ""
        way_out = "choose another --name, or start over with --fresh"
        if all(text.startswith("code") for text in changes):
            way_out += ", or add --accept-changed-code if the change does not matter"
        raise ValueError(f"{self.uri} holds a run of other data or code ({'; '.join(changes)}{places}): {way_out}")

    def open(
        self,
        config: Mapping[str, Any],
        environment: Mapping[str, Any],
        identity: Identity | None = None,
        *,
        fresh: bool = False,
        accept_changed_code: bool = False,
    ) -> bool:
        """Create the run, or join the run here. Return True if it resumes. The caller holds the lease.

        On resuming, config.json is written again, as fields that shape no result may differ; environment.json stays as
        it was. `fresh` deletes everything but the lease. If this driver dies meanwhile, the next one completes that.

        Args:
            identity: what names in the config stand for; None: there are no names that stand for anything.

        Raises:
            ValueError: if the run has another config, other data or code, or a newer version, or the folder belongs to
                no run.
        """
        is_there = self.exists(CONFIG_PATH)
        if not is_there and (foreign := self._entries()):
            names = ", ".join(foreign[:3])
            way_out = "choose another --name, or delete what a deleted run has left"
            raise ValueError(f"{self.uri} holds {names} but no {CONFIG_PATH}, so it is no run: {way_out}")
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
        if self.local_path:  # remove what writers that died left
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
        """Return the names in the run's folder, without the lease, config.json, identity.parquet and hidden files."""
        filesystem, full = self._at("")
        infos = filesystem.get_file_info(pafs.FileSelector(full, allow_not_found=True))
        names = {info.base_name for info in infos} - {LEASE_PATH, CONFIG_PATH, IDENTITY_PATH}
        return sorted(name for name in names if not name.startswith("."))


def at_once(read: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """Return read(item) of each item, in their order, with many requests to storage at a time."""
    with ThreadPoolExecutor(_NUM_READERS) as threads:
        return list(threads.map(read, items))


def _is_foreign(kind: pa.DataType) -> bool:
    """Return True if an Arrow type is or holds an extension: some, such as ray.data's objects, unpickle when read."""
    return isinstance(kind, pa.BaseExtensionType) or any(
        _is_foreign(kind.field(number).type) for number in range(kind.num_fields)
    )


def _below(storage_path: str, name: str) -> str:
    """Return the path or URI of a file or folder by the path or URI that it lies in."""
    if "://" not in storage_path:
        return os.path.join(storage_path, name)
    path, mark, query = storage_path.partition("?")
    return f"{path.rstrip('/')}/{urllib.parse.quote(name)}{mark}{query}"


@contextlib.contextmanager
def _replacement(path: Path, *, is_durable: bool) -> Iterator[BinaryIO]:
    """Yield a new file, making its folder. At the end, sync it to the disk if is_durable, and replace the old file."""
    partial = str(path.with_name(f".{path.name}.{uuid.uuid4().hex}{_PARTIAL}"))
    try:
        os.makedirs(path.parent, exist_ok=True)
        with open(partial, "xb") as file:
            yield file
            file.flush()
            if is_durable:
                os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk's error names no file
    finally:
        with contextlib.suppress(OSError):
            os.unlink(partial)


def _to_json(record: Any, indent: int | None = 1) -> str:
    return json.dumps(_finite(record), indent=indent, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
