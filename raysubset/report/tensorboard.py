"""TensorBoard event files of scalars, written from the format itself: the usual writer imports torch, for seconds.

A file is a row of records (TFRecord: length, its checksum, data, its checksum), each an Event of tensorflow's
event.proto.
"""

import struct
from collections.abc import Iterable, Sequence

import numpy as np

Scalar = tuple[str, float, int]  # tag, value, step


def event_file(scalars: Iterable[Scalar], *, wall_time: float) -> bytes:
    """The bytes of an event file that holds the scalars in their order, all with one time, in unix s."""
    time = b"\x09" + struct.pack("<d", wall_time)  # field 1, 64 bits
    events = [time + b"\x1a\x0dbrain.Event:2"]  # field 3, its length, the version of the format
    for tag, value, step in scalars:
        scalar = _field(0x0A, tag.encode()) + b"\x15" + struct.pack("<f", value)  # tag, and field 2, 32 bits
        events.append(time + b"\x10" + _varint(step) + _field(0x2A, _field(0x0A, scalar)))
    lengths = [struct.pack("<Q", len(event)) for event in events]
    sums = zip(lengths, _checksums(lengths), events, _checksums(events), strict=True)
    return b"".join(part for record in sums for part in record)


def _field(key: int, data: bytes) -> bytes:
    return bytes([key]) + _varint(len(data)) + data


def _varint(number: int) -> bytes:
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])


def _checksums(records: Sequence[bytes]) -> list[bytes]:
    """The masked CRC-32C of each record, all of them a byte at a time side by side."""
    lengths = np.array([len(record) for record in records])
    padded = np.zeros((len(records), lengths.max()), np.uint8)
    for row, record in zip(padded, records, strict=True):
        row[: len(record)] = np.frombuffer(record, np.uint8)
    sums = np.full(len(records), 0xFFFFFFFF, np.uint32)
    for place in range(padded.shape[1]):
        stepped = _TABLE[(sums ^ padded[:, place]) & 0xFF] ^ (sums >> 8)
        sums = np.where(place < lengths, stepped, sums)
    sums = ~sums
    masked = ((sums >> 15) | (sums << 17)) + np.uint32(0xA282EAD8)  # modulo 2³²
    return [struct.pack("<I", number) for number in masked.tolist()]


def _table() -> np.ndarray:
    """uint32 [256]: what a byte does to the checksum (Castagnoli's polynomial, reflected)."""
    numbers = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        numbers = np.where(numbers & 1, (numbers >> 1) ^ np.uint32(0x82F63B78), numbers >> 1)
    return numbers


_TABLE = _table()
