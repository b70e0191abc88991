"""Derive independent seeds from one seed."""

import json


def derive_seed(seed: int, *path: int | str) -> int:
    """Derive an independent 63-bit seed for each path below one seed: the same on every machine and Python version."""
    import hashlib  # loads OpenSSL: parsing flags should not wait for it

    text = json.dumps([seed, *path])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
