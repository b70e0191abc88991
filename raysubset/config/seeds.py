"""Independent seeds below one seed."""

import json


def derive_seed(seed: int, *path: int | str) -> int:
    """An independent 63-bit seed for each path below one seed: the same on every machine and Python."""
    import hashlib  # loads OpenSSL, which no flag waits for

    text = json.dumps([seed, *path])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
