"""How damage to a file is noticed: by its length and digest, in the record that names it or in the file itself.

files = {path: run.write_weights(path, weights)}         # a seal, for the record that names the file
run.write_json(record_path, {**record, "files": files})  # which holds a seal of itself
"""

import hashlib
from typing import Any

Seal = str  # "1234 bytes, sha256 …"

MARK = b"raysubset sha256 "  # before the digest that a file holds of itself
BLANK = MARK + b"0" * 64  # the digest is taken with zeros in its place


def seal_of(data: Any) -> Seal:
    """Length and digest of a file (bytes, or a map of them), for the record that names it."""
    return f"{_length(len(data))}{hashlib.sha256(data).hexdigest()}"


def has_length(seal: Any, num_bytes: int) -> bool:
    """Whether a seal is of a file of this length."""
    return isinstance(seal, str) and seal.startswith(_length(num_bytes))


def _length(num_bytes: int) -> str:
    return f"{num_bytes} bytes, sha256 "


def fill(data: bytearray | memoryview, at: int) -> None:
    """Put the digest of a whole file over the BLANK that it has at some place."""
    data[at + len(MARK) : at + len(BLANK)] = hashlib.sha256(data).hexdigest().encode()


def flaw_by_itself(data: bytes) -> str | None:
    """What is wrong with a file that holds a digest of itself; None where it is as it was written."""
    at = data.rfind(MARK)
    if at < 0:
        return "the digest that ends it is missing: it was cut short"
    begin, end = at + len(MARK), at + len(BLANK)
    digest, view = hashlib.sha256(), memoryview(data)
    for part in (view[:begin], BLANK[len(MARK) :], view[end:]):
        digest.update(part)
    return None if data[begin:end] == digest.hexdigest().encode() else "it was changed: its digest is another"
