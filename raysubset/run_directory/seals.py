"""How damage to a file is noticed: by its length and digest, in the record that names it or in the file itself.

files = {path: run.write_weights(path, weights)}         # a seal, for the record that names the file
run.write_json(record_path, {**record, "files": files})  # which holds a seal of itself
"""

import hashlib
import mmap
from typing import Any, BinaryIO

Seal = str  # "1234 bytes, sha256 …"

MARK = b"raysubset sha256 "  # before the digest that a file holds of itself
BLANK = MARK + b"0" * 64  # the digest is taken with zeros in its place


def seal_of(data: Any) -> Seal:
    """Length and digest of a file (bytes, or a map of them), for the record that names it."""
    return f"{_length(len(data))}{hashlib.sha256(data).hexdigest()}"


class Sink:
    """A file that is digested while it is written, so that nobody has to hold or read it as a whole for its seal."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self.num_bytes = file, hashlib.sha256(), 0

    def write(self, part: bytes | memoryview) -> int:
        """Append bytes."""
        self._digest.update(part)
        self._file.write(part)
        self.num_bytes += len(part)
        return len(part)

    def flush(self) -> None:
        """Nothing: torch.save() asks for it, and whoever opened the file closes it."""

    def write_own_digest(self) -> None:
        """End the file with the digest of itself that flaw_by_itself() looks at: taken with BLANK in its place."""
        blank = self._digest.copy()
        blank.update(BLANK)
        self.write(MARK + blank.hexdigest().encode())

    def seal(self) -> Seal:
        """seal_of() what was written."""
        return f"{_length(self.num_bytes)}{self._digest.hexdigest()}"


def has_length(seal: Any, num_bytes: int) -> bool:
    """Whether a seal is of a file of this length."""
    return isinstance(seal, str) and seal.startswith(_length(num_bytes))


def size_of(seal: Seal) -> int:
    """Return the length that a seal is of."""
    return int(seal.partition(" ")[0])


def _length(num_bytes: int) -> str:
    return f"{num_bytes} bytes, sha256 "


def fill(data: bytearray | memoryview, at: int) -> None:
    """Put the digest of a whole file over the BLANK that it has at some place."""
    data[at + len(MARK) : at + len(BLANK)] = hashlib.sha256(data).hexdigest().encode()


def flaw_by_itself(data: bytes | mmap.mmap) -> str | None:
    """What is wrong with a file that holds a digest of itself; None where it is as it was written."""
    at = data.rfind(MARK)
    if at < 0:
        return "the digest that ends it is missing: it was cut short"
    begin, end = at + len(MARK), at + len(BLANK)
    digest = hashlib.sha256()
    with memoryview(data) as view:
        for part in (view[:begin], BLANK[len(MARK) :], view[end:]):
            digest.update(part)
    return None if data[begin:end] == digest.hexdigest().encode() else "it was changed: its digest is another"
