"""Seals, which show damage to a file: its length and digest, in the record that names it or in the file itself.

files = {path: run.write_weights(path, weights)}         # a seal, for the record that names the file
run.write_json(record_path, {**record, "files": files})  # the JSON holds a digest of itself
"""

import hashlib
import mmap
from typing import Any, BinaryIO

Seal = str  # "1234 bytes, sha256 …"

MARK = b"raysubset sha256 "  # comes before the digest that a file holds of itself
BLANK = MARK + b"0" * 64  # the file is digested with these zeros in place of the digest


def seal_of(data: Any) -> Seal:
    """Return the length and digest of a file (bytes, or a map of them), for the record that names it."""
    return f"{_length(len(data))}{hashlib.sha256(data).hexdigest()}"


class Sink:
    """A file that is digested while it is written, so that its seal needs no second reading and no copy in memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self.num_bytes = file, hashlib.sha256(), 0

    def write(self, part: bytes | memoryview) -> int:
        """Append bytes."""
        self._digest.update(part)
        self._file.write(part)
        self.num_bytes += len(part)
        return len(part)

    def flush(self) -> None:
        """Do nothing: torch.save() calls flush(), and whoever opened the file closes it."""

    def write_own_digest(self) -> None:
        """End the file with the digest of itself, taken with BLANK in its place, for flaw_by_itself()."""
        blank = self._digest.copy()
        blank.update(BLANK)
        self.write(MARK + blank.hexdigest().encode())

    def seal(self) -> Seal:
        """Return seal_of() what was written."""
        return f"{_length(self.num_bytes)}{self._digest.hexdigest()}"


def has_length(seal: Any, num_bytes: int) -> bool:
    """Return True if the seal is of a file of this length."""
    return isinstance(seal, str) and seal.startswith(_length(num_bytes))


def size_of(seal: Seal) -> int:
    """Return the length in bytes that a seal names."""
    return int(seal.partition(" ")[0])


def _length(num_bytes: int) -> str:
    return f"{num_bytes} bytes, sha256 "


def fill(data: bytearray | memoryview, at: int) -> None:
    """Write the digest of a whole file over the BLANK at a position in it."""
    data[at + len(MARK) : at + len(BLANK)] = hashlib.sha256(data).hexdigest().encode()


def flaw_by_itself(data: bytes | mmap.mmap) -> str | None:
    """Return what is wrong with a file that holds a digest of itself; None if it is as it was written."""
    at = data.rfind(MARK)
    if at < 0:
        return "the digest at its end is missing: it was cut short"
    begin, end = at + len(MARK), at + len(BLANK)
    digest = hashlib.sha256()
    with memoryview(data) as view:
        for part in (view[:begin], BLANK[len(MARK) :], view[end:]):
            digest.update(part)
    return None if data[begin:end] == digest.hexdigest().encode() else "it was changed: its digest differs"
